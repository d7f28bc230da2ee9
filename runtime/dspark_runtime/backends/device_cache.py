"""Cache memory on the GPU: allocated once, at the length the engine was compiled for."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from dspark_runtime.backends.cuda import Bytes, Cuda
from dspark_runtime.backends.device_shapes import PassRanges, largest_sizes
from dspark_runtime.bundle.contract import CacheLayer
from dspark_runtime.errors import CapacityError

R = TypeVar("R")
ELEMENT_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
_SLOTS = 4  # lists of rows on their way to the GPU at once, one for every sequence of a pass at least
_MOST_ROWS = 1024


class DeviceCache:
    """Key and value memory of all layers, and the stream that every pass over it is enqueued on.

    See :class:`dspark_runtime.backends.protocol.CacheMemory`. One stream orders passes and moves, whatever engine runs
    them, so that nothing has to wait for the host. ``copies`` is the stream on which their results leave the device:
    a separate stream, or the same one without ``overlap``. ``limit`` is the engines' capacity: the memory never grows.
    ``dtype`` is the element type of the caches, ``stream`` the one to use, None for a new one, and ``lock`` that of
    whoever enqueues on it: a pass or a capture goes there as a whole. ``runners`` keeps what engines opened over it, by
    their name: staging memory, contexts and captured graphs are for its addresses.
    """

    def __init__(
        self,
        cuda: Cuda,
        layers: Sequence[CacheLayer],
        batch: int,
        limit: int,
        dtype: str,
        stream: int | None = None,
        lock: threading.RLock | None = None,
        overlap: bool = True,
    ) -> None:
        self.lock = lock or threading.RLock()
        self.batch, self.capacity, self.dtype, self._element = batch, limit, dtype, ELEMENT_BYTES[dtype]
        self.cuda, self.stream = cuda, cuda.stream("target") if stream is None else stream
        self.overlap, self.copies = overlap, cuda.stream("copy") if overlap else self.stream
        self._shapes = {
            (i, part): (layer.kv_heads, width)
            for i, layer in enumerate(layers)
            for part, width in (("key", layer.key_dim), ("value", layer.value_dim))
        }
        self._tensors = {
            key: cuda.allocate(batch * heads * limit * width * self._element)
            for key, (heads, width) in self._shapes.items()
        }
        self._tables = self._upload_tables()
        self._rows = [_RowList(cuda) for _ in range(max(_SLOTS, batch))]
        self._sent = self._arrived = 0
        self.runners: dict[str, Any] = {}
        memory = [*self._tensors.values(), *self._tables]
        weakref.finalize(self, _free, cuda, memory).atexit = False  # a process that ends gives it back anyway

    def runner(self, name: str, make: Callable[[], R]) -> R:
        """What the engine ``name`` opened over this memory before, or else ``make`` now."""
        found: R = self.runners.get(name) or make()
        self.runners[name] = found
        return found

    def tensor(self, layer: int, part: str, first: int) -> int:
        """Device memory of one cache tensor from sequence ``first`` on."""
        heads, width = self._shapes[layer, part]
        return self._tensors[layer, part] + first * heads * self.capacity * width * self._element

    def resize(self, capacity: int, keep: int) -> None:
        """See :class:`CacheMemory`; the engine's length is fixed, so that growing is an error."""
        if capacity > self.capacity:
            raise CapacityError(
                f"{capacity} cache slots are needed and the engine has {self.capacity}; shorten the request, or "
                "compile the bundle again with a larger --max-length"
            )

    def gather(self, sequence: int, sources: Sequence[int], to: int) -> None:
        """See :class:`CacheMemory`; ``sources`` rise and none lies before the place it moves to."""
        if any(source < to + j for j, source in enumerate(sources)) or sorted(set(sources)) != list(sources):
            raise ValueError(f"rows {list(sources)} do not rise from {to} on")
        columns = max(heads * width for heads, width in self._shapes.values()) * self._element // 2
        numbers = np.array([len(sources), to, sequence, self.capacity], np.int32)
        rows = self._rows[self._sent % len(self._rows)]
        with self.lock:
            device = rows.send(sources, self.stream, self._sent, self._arrived)
            self._sent += 1
            self.cuda.compact(self._tables, len(self._shapes), columns, device, numbers, self.stream)

    def mark(self) -> int:
        """A point on the stream, for :meth:`reached`."""
        return self._sent

    def reached(self, mark: int) -> None:
        """The host has waited for something after ``mark``: whatever was sent before it has been read."""
        self._arrived = max(self._arrived, mark)

    def move(self, source: int, target: int, length: int) -> None:
        """See :class:`CacheMemory`."""
        for (layer, part), (heads, width) in self._shapes.items():
            row = width * self._element
            to, origin = self.tensor(layer, part, target), self.tensor(layer, part, source)
            with self.lock:
                pitch = self.capacity * row
                self.cuda.copy_rows((to, pitch), (origin, pitch), length * row, heads, self.stream)

    def _upload_tables(self) -> tuple[int, int, int]:
        arrays: tuple[npt.NDArray[np.generic], ...] = (
            np.array(list(self._tensors.values()), np.uint64),
            np.array([heads for heads, _ in self._shapes.values()], np.int32),
            np.array([width * self._element // 2 for _, width in self._shapes.values()], np.int32),  # moved in halves
        )
        pointers = []
        for array in arrays:
            host = self.cuda.pinned(array.nbytes)
            host[:] = array.view(np.uint8)
            pointers.append(self.cuda.allocate(array.nbytes))
            self.cuda.copy_in(pointers[-1], host, self.stream)
        return pointers[0], pointers[1], pointers[2]


def _free(cuda: Cuda, memory: Sequence[int]) -> None:
    for address in memory:
        cuda.free(address)


class LentCache:
    """The first ``batch`` sequences of a cache, for as long as this object lives; then the cache goes back to ``pool``.

    Memory on the device is made once and used again: what the sequences before left in it is never looked at.
    """

    def __init__(self, cache: DeviceCache, batch: int, pool: list[DeviceCache]) -> None:
        self.cache, self.batch, self.capacity = cache, batch, cache.capacity
        self.resize, self.gather, self.move = cache.resize, cache.gather, cache.move
        weakref.finalize(self, pool.append, cache)


class CachePool:
    """Caches of one plan, each as large as the plan takes. Contexts of a plan share scratch memory, so that all its
    passes are on one stream: ``stream``, or a new one for ``lane`` where that is None."""

    def __init__(
        self,
        cuda: Cuda,
        layers: Sequence[CacheLayer],
        ranges: PassRanges,
        stream: int | None,
        lane: str,
        overlap: bool,
    ) -> None:
        self._cuda, self._layers, self._ranges, self._stream = cuda, layers, ranges, stream
        self._lane, self._overlap = lane, overlap
        self._lock, self._free = threading.RLock(), list[DeviceCache]()

    def lend(self, batch: int, capacity: int) -> LentCache:
        """A cache that nobody uses, or a new one; CapacityError if it has less than ``capacity`` slots."""
        memory = LentCache(self._free.pop() if self._free else self._new(), batch, self._free)
        memory.resize(capacity, 0)
        return memory

    def _new(self) -> DeviceCache:
        with self._lock:
            if self._stream is None:
                self._stream = self._cuda.stream(self._lane)
        most, ranges = largest_sizes(self._ranges)["batch"], self._ranges
        return DeviceCache(
            self._cuda, self._layers, most, ranges.capacity, ranges.dtype, self._stream, self._lock, self._overlap
        )


class _RowList:
    """Row numbers in page-locked memory, not written again before the GPU has read them."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda, self._host = cuda, cuda.pinned(_MOST_ROWS * 8)
        self._device, self._read, self._number = cuda.allocate(_MOST_ROWS * 8), cuda.event(), -1

    def send(self, rows: Sequence[int], stream: int, number: int, arrived: int) -> int:
        """Enqueue copy ``number`` to the GPU; those before ``arrived`` are known to be done."""
        if self._number >= arrived:
            self._cuda.synchronize(self._read)
        part: Bytes = self._host[: 8 * len(rows)]
        part.view(np.int64)[:] = rows
        self._cuda.copy_in(self._device, part, stream)
        self._cuda.record(self._read, stream)
        self._number = number
        return self._device
