"""Does the runtime's arrangement of a pass change what the graph computes? It must not.

Every check runs the runtime's own passes and compares their logits with the same text run as one plain chain.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dspark_export.validate.checks import Check
from dspark_export.validate.probe import Probe, branching, one_pass, with_float_products
from dspark_export.validate.tolerances import BETWEEN_FORMS, largest_relative
from dspark_runtime import Bundle
from dspark_runtime.arrays import FloatArray
from dspark_runtime.speculation.tree import TokenTree

_HARMLESS = 1e4  # what a masked slot inside a pass's window may hold: 0 * NaN would be NaN, see docs/graphs.md
_LAST = 8  # rows after a text that are compared


@dataclass(frozen=True)
class Question:
    """One robustness check: ``ask`` gives how far logits are off; ``where`` and ``advice`` explain a failure."""

    name: str
    title: str
    where: str
    advice: str
    ask: Callable[[Bundle, Sequence[Sequence[int]]], float]


def check_robustness(bundle: Bundle, texts: Sequence[Sequence[int]], level: str) -> Iterator[Check]:
    """One check after the other; ``texts`` are at least two, of different lengths, 24 tokens and more each."""
    limit = BETWEEN_FORMS
    bundle = with_float_products(bundle)
    questions = QUESTIONS if level == "full" else [q for q in QUESTIONS if q.name != "longest_context"]
    for question in questions:
        began = time.perf_counter()
        off = question.ask(bundle, texts)
        passed = off <= limit
        yield Check(
            id=f"robustness.{question.name}",
            family="robustness",
            title=question.title,
            status="passed" if passed else "failed",
            measured=off if np.isfinite(off) else None,
            limit=limit,
            unit="of the largest magnitude",
            where="" if passed else question.where,
            message="" if passed else question.advice,
            seconds=time.perf_counter() - began,
        )


def _after(bundle: Bundle, ids: Sequence[int], tree: TokenTree) -> FloatArray:
    """Logits [rows, vocab] of a tree after ``ids``, each of its paths run as a separate text."""
    found = np.zeros((len(tree), bundle.limits.vocab_size), np.float32)
    for leaf in tree.leaves():
        path = tree.path(leaf)
        found[path] = one_pass(bundle, [*ids, *(tree.tokens[row] for row in path)], len(path))
    return found


def _poisoned_suffix(bundle: Bundle, texts: Sequence[Sequence[int]]) -> float:
    ids = texts[0]
    at = len(ids) - _LAST
    probe = Probe(bundle, [ids[:at]])
    probe.poison(float("nan"))
    chain = TokenTree.chain(ids[at], ids[at + 1 :])
    return largest_relative(probe.run_trees([chain])[0], one_pass(bundle, ids, len(chain)))


def _padding_rows(bundle: Bundle, texts: Sequence[Sequence[int]]) -> float:
    ids = texts[0]
    at = len(ids) - 3
    probe = Probe(bundle, [ids[:at]], rows=11)
    chain = TokenTree.chain(ids[at], ids[at + 1 :])
    return largest_relative(probe.run_trees([chain])[0], one_pass(bundle, ids, len(chain)))


def _tree_against_paths(bundle: Bundle, texts: Sequence[Sequence[int]]) -> float:
    ids = texts[0]
    at = len(ids) - _LAST
    tree, _ = branching(ids, at, bundle.limits.vocab_size)
    return largest_relative(Probe(bundle, [ids[:at]]).run_trees([tree])[0], _after(bundle, ids[:at], tree))


def _compaction(bundle: Bundle, texts: Sequence[Sequence[int]]) -> float:
    ids = texts[0]
    at = len(ids) - _LAST
    probe = Probe(bundle, [ids[:at]])
    tree, path = branching(ids, at, bundle.limits.vocab_size)
    probe.run_trees([tree])
    probe.cache.commit(0, path)
    # Attention does not care for the order of slots, so logits alone would not show rows that changed places.
    kept, plain = probe.committed(0), Probe(bundle, [ids[: at + 4]]).committed(0)
    places = max(largest_relative(kept[name], plain[name]) for name in plain)
    rest = TokenTree.chain(ids[at + 4], ids[at + 5 :])
    return max(places, largest_relative(probe.run_trees([rest])[0], one_pass(bundle, ids, len(rest))))


def _ragged_batch(bundle: Bundle, texts: Sequence[Sequence[int]]) -> float:
    cuts = [len(ids) - _LAST for ids in texts]
    probe = Probe(bundle, [ids[:at] for ids, at in zip(texts, cuts, strict=True)])
    probe.poison(_HARMLESS)
    trees = [branching(ids, at, bundle.limits.vocab_size)[0] for ids, at in zip(texts, cuts, strict=True)]
    trees[-1] = TokenTree.chain(texts[-1][cuts[-1]], texts[-1][cuts[-1] + 1 : cuts[-1] + 3])
    found = probe.run_trees(trees)
    wanted = [_after(bundle, ids[:at], tree) for ids, at, tree in zip(texts, cuts, trees, strict=True)]
    return max(largest_relative(f, w) for f, w in zip(found, wanted, strict=True))


def _chunked_prefill(bundle: Bundle, texts: Sequence[Sequence[int]]) -> float:
    ids = texts[0]
    at = len(ids) - 2
    chain = TokenTree.chain(ids[at], ids[at + 1 :])
    wanted = one_pass(bundle, ids, len(chain))
    return max(
        largest_relative(Probe(bundle, [ids[:at]], chunk=chunk).run_trees([chain])[0], wanted)
        for chunk in (3, 7, at - 1)
    )


def _longest_context(bundle: Bundle, texts: Sequence[Sequence[int]]) -> float:
    """The very last positions of the model, reached in chunks of two sizes."""
    positions, joined = bundle.limits.positions, [token for ids in texts for token in ids]
    ids = [joined[i % len(joined)] for i in range(positions)]
    at = positions - _LAST
    chain = TokenTree.chain(ids[at], ids[at + 1 :])
    found = [Probe(bundle, [ids[:at]], chunk=chunk, room=_LAST).run_trees([chain])[0] for chunk in (512, 384)]
    return largest_relative(found[0], found[1]) if np.isfinite(found[1]).all() else float("inf")


QUESTIONS = (
    Question(
        "tree_against_paths",
        "A token tree gives every path the logits it has alone",
        "mask of a token tree",
        "A row of a tree sees rows that are not its ancestors, or has a wrong position: look at TokenTree.ancestors "
        "and TokenTree.positions, and at what the graph does with the mask.",
        _tree_against_paths,
    ),
    Question(
        "compaction",
        "Accepted rows of a tree are the same as if they had been the text",
        "cache compaction after a tree",
        "Keys and values of accepted rows are not where they belong: look at KvCache.commit and the backend's gather.",
        _compaction,
    ),
    Question(
        "poisoned_suffix",
        "Slots after the committed ones are never read",
        "cache slots after the text",
        "The graph or the runtime reads slots that nobody has written in this pass: look at write_indices and kv_len.",
        _poisoned_suffix,
    ),
    Question(
        "padding_rows",
        "Padding rows change nothing",
        "padding rows of a pass",
        "Rows that only fill up a pass are seen by real ones: look at how the loop masks them.",
        _padding_rows,
    ),
    Question(
        "ragged_batch",
        "A ragged batch gives every sequence the logits it has alone",
        "a batch of sequences of different lengths",
        "Sequences of one pass disturb each other: look at write_indices, positions and masks of a batch.",
        _ragged_batch,
    ),
    Question(
        "chunked_prefill",
        "A prompt in chunks is the same prompt",
        "prefill in chunks",
        "Chunks of a prompt do not continue each other: look at the positions and slots of a prompt pass.",
        _chunked_prefill,
    ),
    Question(
        "longest_context",
        "The last positions of the model can be used",
        "the end of the context",
        "At the end of the context logits depend on how the prompt was cut: look at position tables and capacities.",
        _longest_context,
    ),
)
