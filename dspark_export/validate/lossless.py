"""Speculative texts against plain ones, with every first difference judged.

In the exact setting all speculative tokens must be equal. Otherwise, and between texts alone and in batches, which run
other variants of the graph, logits move a little with the number of rows of a pass, and a text may leave the plain one
where the target's best tokens are closer than that. At every first divergence the target is asked again, by teacher
forcing: it is a ``near tie`` if both tokens, and the two best ones, are within the bundle's row noise of the best, and
``WRONG`` otherwise. Row noise is the figure of the manifest; where that has none, the largest change of a logit at the
divergence itself between passes of 1, 2, 3, 5, 8 and 16 rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dspark_export.build.row_noise import NOISE_PREFIX, NOISE_ROWS, logits_by_rows, noise_text, row_logits
from dspark_export.prompts.sets import PromptItem
from dspark_export.prompts.texts import PLAIN, encode, first_difference
from dspark_export.validate.checks import Check
from dspark_export.validate.probe import one_pass
from dspark_export.validate.tolerances import AGAINST_MODEL
from dspark_runtime import Bundle, Generation
from dspark_runtime.arrays import FloatArray

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NEAR_TIE, WRONG = "near tie", "WRONG"


@dataclass(frozen=True)
class Divergence:
    """A first difference from the plain text. ``margin`` is between the target's two best logits there, ``behind`` how
    far the worse of the two chosen tokens is behind the best one; ``local_noise`` is the row noise at this place.
    ``token`` is None where one of the texts had ended."""

    mode: str
    batch: int
    set: str
    prompt: int
    position: int
    plain_token: int | None
    token: int | None
    margin: float | None
    behind: float | None
    local_noise: float | None
    verdict: str


OnText = Callable[[str, int, int], None]
"""Called with a mode, a batch size, and the texts it has finished."""


def generate(
    bundle: Bundle,
    ids: Sequence[list[int]],
    mode: str,
    batch: int,
    max_new_tokens: int,
    on_text: OnText = lambda *_: None,
) -> list[Generation]:
    """Greedy texts of every prompt, ``batch`` of them at a time."""
    runs = bundle.with_fresh_schedule()
    texts: list[Generation] = []
    for start in range(0, len(ids), batch):
        part = ids[start : start + batch]
        texts += runs.generate(part, max_new_tokens=max_new_tokens, speculate=mode, batch_size=batch)
        on_text(mode, batch, len(texts))
    return texts


def next_logits(bundle: Bundle, tokens: Sequence[int]) -> np.ndarray:
    """The target's logits [passes, vocab] after ``tokens``: first from one pass, then with passes of other rows."""
    context = len(tokens) - 1
    widths = [1, *(rows for rows in NOISE_ROWS if rows < context)]
    # row_logits gives no logits for its first pass, so the last token, or the last rows, come in a second one.
    return np.stack([row_logits(bundle.target, tokens, len(tokens) - rows, rows)[-1] for rows in widths])


def judge(
    bundle: Bundle, prompt: list[int], plain: list[int], position: int, chosen: Sequence[int | None], promised: bool
) -> dict[str, Any]:
    """Margin, noise and verdict at the first divergence of one text; ``promised``: there should be none."""
    if None in chosen:  # only a token can end a greedy text: one of them ended without a reason
        return {"margin": None, "behind": None, "local_noise": None, "verdict": WRONG}
    logits = next_logits(bundle, [*prompt, *plain[:position]])
    reference = logits[0]
    best, second = np.sort(reference)[::-1][:2]
    local = float(np.abs(logits - reference).max())
    recorded = bundle.manifest.precision.row_noise
    noise = local if recorded is None else recorded.max_abs_logit_diff
    behind = float(best - min(reference[token] for token in chosen if token is not None))
    margin = float(best - second)
    allowed = not promised and max(margin, behind) <= noise
    return {"margin": margin, "behind": behind, "local_noise": local, "verdict": NEAR_TIE if allowed else WRONG}


def compare(
    bundle: Bundle,
    items: Sequence[PromptItem],
    modes: Sequence[str],
    batches: Sequence[int],
    max_new_tokens: int,
    on_text: OnText = lambda *_: None,
) -> tuple[list[dict[str, Any]], list[Divergence]]:
    """Run everything; one row per mode and batch size, and all first divergences."""
    ids = [encode(bundle, item.text) for item in items]

    def tokens_of(mode: str, batch: int) -> list[list[int]]:
        return [g.tokens for g in generate(bundle, ids, mode, batch, max_new_tokens, on_text)]

    plain = {batch: tokens_of(PLAIN, batch) for batch in sorted({1, *batches})}
    rows, divergences = [], []
    for mode in modes:
        for batch in batches:
            if (mode, batch) == (PLAIN, 1):
                continue
            reference = 1 if mode == PLAIN else batch
            texts = plain[batch] if mode == PLAIN else tokens_of(mode, batch)
            found = []
            for index, (expected, tokens) in enumerate(zip(plain[reference], texts, strict=True)):
                position = first_difference(expected, tokens)
                if position is not None:
                    was, now = (t[position] if position < len(t) else None for t in (expected, tokens))
                    promised = bundle.exact and mode != PLAIN
                    verdict = judge(bundle, ids[index], expected, position, (was, now), promised)
                    found.append(Divergence(mode, batch, items[index].set, index, position, was, now, **verdict))
            wrong = sum(d.verdict == WRONG for d in found)
            figures = {"equal": len(ids) - len(found), "near_ties": len(found) - wrong, "wrong": wrong}
            rows.append({"mode": mode, "batch": batch, "compared_with_plain_batch": reference} | figures)
            divergences += found
    return rows, divergences


# Checks ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Texts:
    """Greedy texts of the prompts ``ids``, one after the other, by mode."""

    ids: list[list[int]]
    alone: dict[str, list[Generation]]


def check_plain(bundle: Bundle, model: PreTrainedModel | None, texts: Texts) -> Check:
    """How far the tokens of plain decoding are behind the best one, when the whole text runs in a single pass.

    With float weights the pass is PyTorch's, otherwise the bundle's own graph's with an empty cache.
    """
    began = time.perf_counter()
    by_model = model is not None and not bundle.manifest.precision.quantized
    recorded = bundle.manifest.precision.row_noise
    worst, where = 0.0, ""
    for number, (prompt, generation) in enumerate(zip(texts.ids, texts.alone[PLAIN], strict=True)):
        tokens = generation.tokens
        if not tokens:
            continue
        whole = [*prompt, *tokens[:-1]]
        logits = _by_model(model, whole) if by_model and model is not None else one_pass(bundle, whole, len(tokens))
        logits = logits[-len(tokens) :]
        best = logits.max(1)
        behind = (best - logits[np.arange(len(tokens)), tokens]) / np.maximum(1.0, np.abs(logits).max(1))
        at = int(behind.argmax())
        if float(behind[at]) > worst:
            worst, where = float(behind[at]), f"prompt {number}, token {at}"
    noise = 0.0 if by_model or recorded is None else recorded.max_abs_logit_diff
    limit = 2 * AGAINST_MODEL + 2 * noise / 10  # logits of language models reach 10 and more
    passed = worst <= limit
    return Check(
        id="losslessness.plain",
        family="losslessness",
        title=f"Plain text is the greedy choice of {'PyTorch' if by_model else 'one pass over the whole text'}",
        status="passed" if passed else "failed",
        measured=worst,
        limit=limit,
        unit="of the largest logit, behind the best token",
        where="" if passed else where,
        message=""
        if passed
        else f"At {where} plain decoding takes a token that is not the target's choice: positions, slots or masks of "
        "the decoding loop are wrong, or the cache is damaged between passes.",
        seconds=time.perf_counter() - began,
        data={"tokens": sum(len(g.tokens) for g in texts.alone[PLAIN])},
    )


def _by_model(model: PreTrainedModel, ids: Sequence[int]) -> FloatArray:
    import torch

    with torch.inference_mode():
        found: FloatArray = model(torch.tensor([list(ids)]), use_cache=False).logits[0].float().numpy()
    return found


def check_mode(bundle: Bundle, texts: Texts, mode: str, began: float) -> Check:
    """Speculative texts of ``mode`` against the plain ones, every first difference judged."""
    found = []
    for index, (plain, mine) in enumerate(zip(texts.alone[PLAIN], texts.alone[mode], strict=True)):
        position = first_difference(plain.tokens, mine.tokens)
        if position is not None:
            was, now = (t[position] if position < len(t) else None for t in (plain.tokens, mine.tokens))
            verdict = judge(bundle, texts.ids[index], plain.tokens, position, (was, now), bundle.exact)
            found.append(Divergence(mode, 1, "", index, position, was, now, **verdict))
    wrong = [d for d in found if d.verdict == WRONG]
    where = f"{mode}: prompt {wrong[0].prompt}, token {wrong[0].position}" if wrong else ""
    return Check(
        id=f"losslessness.{mode}",
        family="losslessness",
        title=f"{mode} keeps the plain text",
        status="failed" if wrong else "passed",
        measured=float(len(wrong)),
        limit=0.0,
        unit="texts with a wrong token",
        where=where,
        message=""
        if not wrong
        else f"{len(wrong)} of {len(texts.ids)} texts leave the plain text at a token that is not a near tie. At "
        f"{where} plain decoding emits {wrong[0].plain_token} and {mode} {wrong[0].token}: rows are accepted that the "
        "target did not choose, or what it sees is not the committed text.",
        seconds=time.perf_counter() - began,
        data={
            "equal": len(texts.ids) - len(found),
            "near_ties": len(found) - len(wrong),
            "wrong": len(wrong),
            "divergences": [asdict(d) for d in found],
        },
    )


def check_noise(bundle: Bundle, ids: Sequence[int]) -> Check:
    """How far logits move when a pass has several rows instead of one; the histogram is over single logits.

    A largest difference depends on the text, so it is compared with the build's figure on the build's text; ``ids`` are
    for bundles without that figure. The 0 that the sequence kernels measured is not a limit where other operators run.
    """
    began = time.perf_counter()
    recorded = bundle.manifest.precision.row_noise
    if recorded is None:
        found = logits_by_rows(bundle.target, ids, min(NOISE_PREFIX, len(ids) // 2))
    else:
        found = logits_by_rows(bundle.target, noise_text(bundle.files))
    edges = np.concatenate([[0.0], 10.0 ** np.arange(-8.0, 2.5, 0.5)])
    histogram = {
        str(count): np.histogram(np.minimum(difference, edges[-1]), edges)[0].tolist()
        for count, difference in found.from_single()
    }
    equal = bundle.rows_are_equal
    measured = found.other_rows if bundle.exact and not equal else found.single_row
    limit = 0.0 if equal else None
    kernels = any(graph.kernels for graph in bundle.manifest.graphs)
    elsewhere = kernels and recorded is not None and recorded.max_abs_logit_diff == 0.0
    if recorded is not None and not equal and not elsewhere:
        limit = 4 * max(recorded.without_single_rows if bundle.exact else recorded.max_abs_logit_diff, 1e-4)
    passed = limit is None or measured <= limit
    return Check(
        id="losslessness.noise",
        family="losslessness",
        title="Logits of passes with more rows" if bundle.exact and not equal else "Logits of one row and of several",
        status="passed" if passed else "failed",
        measured=measured,
        limit=limit,
        unit="largest difference of a logit",
        where="" if passed else "kernels of this machine",
        message=""
        if passed
        else "Logits depend on the number of rows far more than when the bundle was built: on this "
        "machine other kernels run. Build the bundle here, or open it with exact.",
        seconds=time.perf_counter() - began,
        data={
            "edges": edges.tolist(),
            "histogram": histogram,
            "single_row": found.single_row,
            "other_rows": found.other_rows,
        },
    )
