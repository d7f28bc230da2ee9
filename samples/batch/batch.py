"""Several prompts in one batch: ragged lengths, each with its own end; the texts are those of single runs.

python samples/batch/batch.py BUNDLE
"""

from __future__ import annotations

import sys
import time

from dspark_runtime import Bundle, Statistics

PROMPTS = ["What is bread made of?", "Why is ice lighter than water? Answer in one sentence.", "Say hello.", "2 + 2 ="]


def main(path: str) -> None:
    """Answers four prompts at once."""
    bundle = Bundle.open(path)
    began = time.perf_counter()
    answers = bundle.generate(PROMPTS, chat=True, max_new_tokens=48, batch_size=4)
    seconds = time.perf_counter() - began
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        print(f"> {prompt}\n{answer.text}\n[{answer.finish_reason}, {len(answer.tokens)} tokens]\n")
    total = Statistics.total([answer.stats for answer in answers])
    print(f"together {total.emitted / seconds:.1f} tokens/s, {total.accepted_length:.2f} tokens a round and sequence")


if __name__ == "__main__":
    main(sys.argv[1])
