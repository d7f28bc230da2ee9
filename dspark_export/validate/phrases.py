"""Is the store of phrases what a user relies on: bounded, and saved and opened again without a loss?

That it has no say in the text is a question of losslessness, like that of any drafter.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from dspark_export.validate.checks import Check
from dspark_runtime import Bundle, PhraseOptions
from dspark_runtime.phrases.store import PhraseStore

_BOUND = 64  # contexts; a few texts have more
_DRAFTS = 8  # per round, whatever the schedule would have


def check_store(bundle: Bundle, prompts: Sequence[Sequence[int]], tokens: int) -> Check:
    """Let a store learn ``tokens`` tokens of an answer to each prompt, save it, open it, and generate them again."""
    began = time.perf_counter()
    small, store = (bundle.phrases.fresh(PhraseOptions(history=most)) for most in (_BOUND, PhraseOptions.history))
    _rounds(bundle, small, prompts, tokens)
    first = _rounds(bundle, store, prompts, tokens)
    with tempfile.TemporaryDirectory() as folder:
        path = store.save(Path(folder) / "phrases.store")
        opened = bundle.phrases.fresh(PhraseOptions(file=path))
    kept = opened.contexts()
    second = _rounds(bundle, opened, prompts, tokens)
    where, message = "", ""
    if small.contexts() > _BOUND:
        where = "the bound of the history"
        message = f"a history of at most {_BOUND} contexts holds {small.contexts()}"
    elif kept == 0 or kept != store.contexts():
        where = "saving and opening"
        message = f"{store.contexts()} contexts were learned, and {kept} are there once saved and opened again"
    elif second > first:
        where = "drafting from the history"
        message = f"texts that are known take {second} rounds, and took {first} before they were"
    return Check(
        id="plumbing.store",
        family="plumbing",
        title="What the store learns is bounded, and survives saving and opening",
        status="failed" if where else "passed",
        measured=second,
        limit=first,
        unit="rounds",
        where=where,
        message=message,
        seconds=time.perf_counter() - began,
    )


def _rounds(bundle: Bundle, store: PhraseStore, prompts: Sequence[Sequence[int]], tokens: int) -> int:
    drafting = bundle.with_phrases(store)
    return sum(
        drafting.generate(list(prompt), max_new_tokens=tokens, speculate="store", draft_length=_DRAFTS).stats.rounds
        for prompt in prompts
    )
