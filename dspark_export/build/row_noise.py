"""How far logits move with the number of rows in a pass, which is why text could depend on speculation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from dspark_runtime.backends.protocol import Engine, StepBuffers
from dspark_runtime.bundle.files import BundleFiles
from dspark_runtime.bundle.manifest import RowNoise
from dspark_runtime.speculation.kv_cache import round_up

NOISE_ROWS = (2, 3, 5, 8, 16)
NOISE_PREFIX = 16
NOISE_OTHERS = (1, 3, 7)
_OTHERS_LONGER = 37  # tokens that each sequence beside has more than the one before
_NOISE_TOKENS = 144

_TEXT = """A bicycle stays upright while it moves because small corrections never stop. When it leans to the left, the \
front wheel turns a little to the left as well, and the contact points of the wheels move back under the weight of the \
rider. def mean(values): return sum(values) / len(values). At 15 kilometres per hour the wheels turn about twice a \
second; at 30 they turn four times, and the same lean is corrected in half the time. A heavy load on the handlebar \
makes this slower. Question: a train leaves at 9:40 and arrives at 11:05. How long is the journey? Answer: from 9:40 \
to 10:40 is one hour, and from 10:40 to 11:05 are 25 minutes, so it takes 1 hour and 25 minutes."""


def distances(wanted: np.ndarray, found: np.ndarray) -> np.ndarray:
    """[positions, 2]: divergence in nats, and 1 where the most likely token is the same; of logits [positions,
    vocab]."""
    p, q = (x.astype(np.float64) - np.logaddexp.reduce(x.astype(np.float64), 1, keepdims=True) for x in (wanted, found))
    return np.stack(((np.exp(p) * (p - q)).sum(1), p.argmax(1) == q.argmax(1)), 1)


def row_logits(engine: Engine, ids: Sequence[int], prefix: int, rows: int) -> np.ndarray:
    """Logits [len(ids) - prefix, vocab] of a text run as one pass over ``prefix`` tokens, then ``rows`` at a time."""
    memory = engine.allocate(1, round_up(len(ids)))
    runner = engine.open(memory)
    runner.select(0, 1)
    collected = []
    start = 0
    while start < len(ids):
        count = prefix if start == 0 else min(rows, len(ids) - start)
        buffers = runner.prepare(count, count, start + count)
        buffers.input_ids[0] = ids[start : start + count]
        buffers.position_ids[0] = np.arange(start, start + count)
        buffers.logit_rows[0] = np.arange(count)
        buffers.write_indices[0] = start
        buffers.attention_mask[0, 0] = np.tri(count, start + count, start, dtype=np.bool_)
        runner.run()
        if start:
            collected.append(buffers.logits[0].copy())
        start += count
    return np.concatenate(collected)


def batch_logits(engine: Engine, ids: Sequence[int], prefix: int, rows: int, others: int) -> np.ndarray:
    """:func:`row_logits` of a text beside ``others`` sequences, each longer than the one before, in the same passes."""
    lengths = [prefix + place * _OTHERS_LONGER for place in range(others + 1)]
    steps = (len(ids) - prefix) // rows
    memory = engine.allocate(others + 1, round_up(lengths[-1] + steps * rows))
    runner = engine.open(memory)
    texts = [np.resize(np.roll(ids, -7 * place), lengths[place] + steps * rows) for place in range(others + 1)]
    for row, (text, length) in enumerate(zip(texts, lengths, strict=True)):
        runner.select(row, 1)
        _fill(runner.prepare(length, 1, length), [text[:length]], [0])
        runner.run()
    runner.select(0, others + 1)
    collected = []
    for step in range(steps):
        starts = [length + step * rows for length in lengths]
        buffers = runner.prepare(rows, rows, starts[-1] + rows)
        _fill(buffers, [text[start : start + rows] for text, start in zip(texts, starts, strict=True)], starts)
        runner.run()
        collected.append(buffers.logits[0].copy())
    return np.concatenate(collected)


def _fill(buffers: StepBuffers, tokens: Sequence[np.ndarray], starts: Sequence[int]) -> None:
    """A pass over as many ``tokens`` of each sequence, after ``starts`` of them."""
    slots = buffers.attention_mask.shape[-1]
    buffers.logit_rows[:] = np.arange(buffers.logit_rows.shape[1])
    for row, (part, start) in enumerate(zip(tokens, starts, strict=True)):
        buffers.input_ids[row] = part
        buffers.position_ids[row] = np.arange(start, start + len(part))
        buffers.write_indices[row] = start
        buffers.attention_mask[row, 0] = np.tri(len(part), slots, start, dtype=np.bool_)


def noise_between_batches(engine: Engine, ids: Sequence[int], most_positions: int) -> float | None:
    """The largest difference of a logit between a text alone and beside others; None if there is no room for those."""
    longest = len(ids) + NOISE_OTHERS[-1] * _OTHERS_LONGER
    if len(ids) < NOISE_PREFIX + NOISE_ROWS[1] or longest > most_positions:
        return None
    found = 0.0
    for rows in NOISE_ROWS[:2]:
        alone = batch_logits(engine, ids, NOISE_PREFIX, rows, 0)
        for others in NOISE_OTHERS:
            beside = batch_logits(engine, ids, NOISE_PREFIX, rows, others)
            found = max(found, float(np.abs(alone - beside).max()))
    return found


@dataclass(frozen=True)
class LogitsByRows:
    """Logits [positions, vocab] of one text: from passes over one row, and over several, by their number."""

    single: np.ndarray
    several: dict[int, np.ndarray]

    def from_single(self) -> Iterator[tuple[int, np.ndarray]]:
        """For every number of rows, how far its logits are from those of single rows."""
        return ((count, _distance(self.single, logits)) for count, logits in self.several.items())

    @property
    def single_row(self) -> float:
        """The largest difference from passes over one row."""
        return max((float(distance.max()) for _, distance in self.from_single()), default=0.0)

    @property
    def other_rows(self) -> float:
        """The largest difference between passes over several rows: of all others from the smallest number."""
        fewest = next(iter(self.several.values()), self.single)
        return max((float(_distance(fewest, logits).max()) for logits in self.several.values()), default=0.0)


def logits_by_rows(engine: Engine, ids: Sequence[int], prefix: int = NOISE_PREFIX) -> LogitsByRows:
    """Run a text after its first ``prefix`` tokens with every number of ``NOISE_ROWS`` that there is room for."""
    body = len(ids) - prefix
    several = {}
    for count in (n for n in NOISE_ROWS if n <= body):
        # A last chunk of one row would be a single-row pass again: cut the text to whole chunks.
        whole = body // count * count
        several[count] = row_logits(engine, ids[: prefix + whole], prefix, count)
    return LogitsByRows(row_logits(engine, ids, prefix, 1), several)


def _distance(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    shared = min(len(left), len(right))
    distance: np.ndarray = np.abs(left[:shared] - right[:shared])
    return distance


def row_noise(engine: Engine, ids: Sequence[int]) -> RowNoise | None:
    """What the manifest says of the noise, measured over ``ids``; None for texts too short to compare anything."""
    if len(ids) < NOISE_PREFIX + NOISE_ROWS[1]:  # two numbers of rows, to compare with each other
        return None
    found = logits_by_rows(engine, ids)
    return RowNoise(
        max_abs_logit_diff=found.single_row,
        without_single_rows=found.other_rows,
        rows=tuple(found.several),
        positions=len(found.single),
    )


def noise_text(files: BundleFiles) -> list[int]:
    """The token ids row noise is measured on: real words, or, without a tokenizer, arbitrary ids."""
    model = files.manifest.model
    vocab_size, room = model.vocab_size, model.max_positions
    path = files.tokenizer_dir / "tokenizer.json"
    if path.is_file():
        ids = Tokenizer.from_file(str(path)).encode(_TEXT).ids
    else:
        ids = [int(i) for i in np.random.default_rng(0).integers(0, vocab_size, _NOISE_TOKENS)]
    return [i for i in ids if i < vocab_size][: min(_NOISE_TOKENS, room)]
