"""The Python API: greedy, streamed and sampled text, statistics, and a conversation.

python samples/python_api/generate.py BUNDLE
"""

from __future__ import annotations

import sys

from dspark_runtime import Bundle, SamplingParams


def main(path: str) -> None:
    """Runs the examples on the bundle at ``path``."""
    bundle = Bundle.open(path)

    answer = bundle.generate("Name three primary colours.", chat=True, max_new_tokens=40)
    print(answer.text)
    print(f"{answer.stats.tokens_per_second:.1f} tokens/s, {answer.stats.accepted_length:.2f} tokens a round")

    for chunk in bundle.generate("The sea was", max_new_tokens=30, stream=True):
        print(chunk.text, end="", flush=True)
    print()

    # The same seed gives the same text, speculative or not.
    params = SamplingParams(temperature=0.8, top_p=0.95)
    fast = bundle.generate("The sea was", params, max_new_tokens=30, seed=7)
    plain = bundle.generate("The sea was", params, max_new_tokens=30, seed=7, speculate=False)
    print(fast.text, "| same as plain:", fast.tokens == plain.tokens)

    conversation = [{"role": "user", "content": "What is a glacier?"}]
    conversation.append({"role": "assistant", "content": bundle.chat(conversation, max_new_tokens=40).text})
    conversation.append({"role": "user", "content": "Where is one?"})
    print(bundle.chat(conversation, max_new_tokens=40, stop=["\n\n"]).text)


if __name__ == "__main__":
    main(sys.argv[1])
