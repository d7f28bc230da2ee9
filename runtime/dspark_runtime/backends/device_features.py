"""Features of the target on their way to a drafter's engine without leaving the GPU.

The target's pass writes them to one buffer, :class:`DeviceTaps`. The drafter's stream waits for the pass, copies rows
that became context to its own blocks and records an event, which the target's next pass waits for. The drafter's next
pass copies them into its input. The host only enqueues.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dspark_runtime.arrays import AnyArray, Runs
from dspark_runtime.backends.cuda import Cuda
from dspark_runtime.backends.device_cache import ELEMENT_BYTES, DeviceCache, LentCache
from dspark_runtime.backends.protocol import CacheMemory, ResidentTaps
from dspark_runtime.bundle.contract import TensorSpec
from dspark_runtime.errors import BackendError

_BLOCK_ROWS = 256


class DeviceTaps:
    """``hidden_taps`` [batch, tokens, width] of a runner's last pass, at ``address``.

    ``ran`` is the event of that pass. ``readers`` are events of those that copy from it, for the next pass to wait for.
    """

    def __init__(self, address: int, dtype: str, width: int, ran: int) -> None:
        self.address, self.dtype, self.width, self.ran = address, dtype, width, ran
        self.tokens = 0
        self.readers: set[int] = set()

    def release(self, cuda: Cuda, stream: int) -> None:
        """What is enqueued on ``stream`` from now on may overwrite the taps."""
        for event in self.readers:
            cuda.wait(stream, event)
        self.readers.clear()

    def place(self, batch_row: int, row: int, column: int) -> int:
        """Address of one number."""
        return self.address + ((batch_row * self.tokens + row) * self.width + column) * ELEMENT_BYTES[self.dtype]


@dataclass
class _Block:
    """Rows ``first`` to ``end - 1`` of the memory at ``address`` wait to be taken."""

    address: int
    first: int = 0
    end: int = 0


@dataclass(frozen=True)
class TakenRows:
    """An input [batch, rows, width] that lies in pieces: (offset in the input, address, bytes) of each.

    It is for the next pass of its store's drafter: later ones may overwrite the pieces.
    """

    shape: tuple[int, ...]
    pieces: Sequence[tuple[int, int, int]]

    def write(self, cuda: Cuda, to: int, stream: int) -> None:
        """Enqueue the copies; memory between the pieces is not touched."""
        for offset, source, size in self.pieces:
            cuda.copy_rows((to + offset, size), (source, size), size, 1, stream)


class DeviceFeatures:
    """See :class:`dspark_runtime.backends.protocol.FeatureStore`.

    Args:
        memory: the drafter's cache, whose stream everything is enqueued on.
        spec: the input that takes the features, [batch, rows, width].
    """

    resident = True

    def __init__(self, memory: DeviceCache, spec: TensorSpec) -> None:
        self._memory, self._cuda = memory, memory.cuda
        self._row_bytes = ELEMENT_BYTES[spec.dtype] * int(spec.shape[-1])
        self._element = ELEMENT_BYTES[spec.dtype]
        self._gathered = memory.cuda.event()
        self._blocks: dict[int, list[_Block]] = {}
        self._free: list[int] = []
        self._allocated: list[int] = []
        weakref.finalize(self, _give_back, memory.cuda, self._allocated).atexit = False

    def clear(self) -> None:
        """Forget everything; the memory is used again."""
        for row in list(self._blocks):
            self.drop(row)

    def add(self, row: int, features: AnyArray) -> None:
        """See :class:`FeatureStore`; never called, see ``resident``."""
        raise BackendError("these features are collected on the GPU; host memory has none of them")

    def collect(self, row: int, taps: ResidentTaps, batch_row: int, rows: Sequence[int], columns: Runs) -> None:
        """See :class:`FeatureStore`: enqueued after the target's pass, nothing waits."""
        if not isinstance(taps, DeviceTaps):
            raise BackendError(f"features are collected on the GPU, not from a {type(taps).__name__}")
        stream = self._memory.stream
        with self._memory.lock:
            self._cuda.wait(stream, taps.ran)
            for first, count in _runs(rows):
                for start, block, place, size in self._room(row, first, count):
                    to = block.address + place * self._row_bytes
                    for column, width in columns:
                        source = taps.place(batch_row, start, column), taps.width * self._element
                        self._cuda.copy_rows((to, self._row_bytes), source, width * self._element, size, stream)
                        to += width * self._element
            self._cuda.record(self._gathered, stream)
        taps.readers.add(self._gathered)

    def waiting(self, row: int) -> int:
        """See :class:`FeatureStore`."""
        return sum(block.end - block.first for block in self._blocks.get(row, ()))

    def move(self, source: int, target: int) -> None:
        """See :class:`FeatureStore`."""
        self.drop(target)
        self._blocks[target] = self._blocks.pop(source, [])

    def drop(self, row: int) -> None:
        """See :class:`FeatureStore`; the memory is used again."""
        self._free += [block.address for block in self._blocks.pop(row, [])]

    def take(self, first: int, counts: Sequence[int], rows: int) -> TakenRows:
        """See :class:`FeatureStore`; padding is what was there: features of an earlier pass, or zero."""
        pieces = []
        for i, count in enumerate(counts):
            to = i * rows * self._row_bytes
            for address, size in self._taken(first + i, count):
                pieces.append((to, address, size))
                to += size
        return TakenRows((len(counts), rows, self._row_bytes // self._element), pieces)

    def _room(self, row: int, first: int, count: int) -> Iterator[tuple[int, _Block, int, int]]:
        """Places for ``count`` rows from ``first`` on: (row, block, place in it, how many)."""
        blocks = self._blocks.setdefault(row, [])
        while count:
            if not blocks or blocks[-1].end == _BLOCK_ROWS:
                blocks.append(_Block(self._free.pop() if self._free else self._new_block()))
            block = blocks[-1]
            size = min(count, _BLOCK_ROWS - block.end)
            yield first, block, block.end, size
            block.end += size
            first, count = first + size, count - size

    def _taken(self, row: int, count: int) -> Iterator[tuple[int, int]]:
        """Address and bytes of the oldest ``count`` rows, which wait no longer."""
        blocks = self._blocks.get(row, [])
        while count:
            block = blocks[0]
            size = min(count, block.end - block.first)
            yield block.address + block.first * self._row_bytes, size * self._row_bytes
            block.first, count = block.first + size, count - size
            if block.first == block.end:
                self._free.append(blocks.pop(0).address)

    def _new_block(self) -> int:
        self._allocated.append(self._cuda.allocate(_BLOCK_ROWS * self._row_bytes))
        return self._allocated[-1]


def takes_resident(memory: DeviceCache, target: CacheMemory, spec: TensorSpec | None) -> bool:
    """Whether a drafter over ``memory`` can read the features of a target with the cache ``target`` where they are."""
    other = target.cache if isinstance(target, LentCache) else target
    if spec is None or not isinstance(other, DeviceCache):
        return False
    return other.cuda is memory.cuda and other.dtype == spec.dtype


def _runs(rows: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first, count) of neighbouring numbers."""
    if isinstance(rows, range) and rows.step == 1:
        yield rows.start, len(rows)
        return
    first = before = rows[0]
    for row in rows[1:]:
        if row != before + 1:
            yield first, before + 1 - first
            first = row
        before = row
    yield first, before + 1 - first


def _give_back(cuda: Cuda, memory: Sequence[int]) -> None:
    for address in memory:
        cuda.free(address)
