"""A drafter of your own: propose the token that last followed the current one, in any text seen so far.

python samples/custom_drafter/bigrams.py BUNDLE
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import pairwise

from dspark_runtime import Bundle, Drafter, DraftRequest


class BigramDrafter(Drafter):
    """Remembers one successor per token, across requests. It may be wrong: the target has the last word."""

    name = "bigrams"

    def __init__(self) -> None:
        self.after: dict[int, int] = {}
        self.last: dict[int, int] = {}

    def begin(self, request: int, prompt: Sequence[int]) -> None:
        self.after.update(pairwise(prompt))
        self.last[request] = prompt[-1]

    def commit(self, request: int, tokens: Sequence[int]) -> None:
        self.after.update(pairwise([self.last[request], *tokens]))
        self.last[request] = tokens[-1]

    def draft(self, request: DraftRequest) -> list[int]:
        chain = [request.tokens[-1]]
        while len(chain) <= request.limit and chain[-1] in self.after:
            chain.append(self.after[chain[-1]])
        return chain[1:]


def main(path: str) -> None:
    """Generates with the drafter above and checks the text against plain decoding."""
    bundle = Bundle.open(path)
    prompt = "Write the numbers from one to twenty as words, one per line."
    settings = {"chat": True, "max_new_tokens": 80}
    plain = bundle.generate(prompt, speculate="off", **settings)
    drafted = bundle.generate(prompt, speculate=BigramDrafter(), draft_length=3, **settings)
    print(drafted.text)
    print(f"{drafted.stats.accepted_length:.2f} tokens a round; same tokens: {drafted.tokens == plain.tokens}")


if __name__ == "__main__":
    main(sys.argv[1])
