"""The compiled form of :mod:`dspark_runtime.phrases.tables`, in the library of the sequence kernels.

Trees and counts are the same, bit for bit; a tree takes a tenth to a fifteenth of the time. Where the library is
missing, or older than phrases, :func:`phrase_forms` gives the plain form.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dspark_runtime.backends.ort_kernels import kernel_library
from dspark_runtime.errors import BackendError
from dspark_runtime.phrases.tables import (
    CLASSES,
    LONGEST,
    Follower,
    GrowingPhrases,
    Grown,
    PackedPhrases,
    Phrases,
    PhraseTable,
    Shape,
    StoredPhrases,
    grow,
)

MOST_NODES = 256
_Context = ctypes.c_uint32 * LONGEST
_Outputs = ctypes.c_uint32 * MOST_NODES
_Places = ctypes.c_int32 * MOST_NODES


class Grow(Protocol):
    """The function of a form that grows trees, see :func:`dspark_runtime.phrases.tables.grow`."""

    def __call__(
        self, sources: Sequence[Phrases | None], rates: Sequence[float], context: Sequence[int], shape: Shape
    ) -> Grown: ...


@dataclass(frozen=True)
class PhraseForms:
    """One implementation: makes tables and stores, and grows trees from those it made."""

    table: Callable[[int, int | None], GrowingPhrases]
    stored: Callable[[PackedPhrases], Phrases]
    grow: Grow
    rates: Callable[[Sequence[float]], Sequence[float]]


def phrase_forms(compiled: bool | None = None, path: Path | None = None) -> PhraseForms:
    """The compiled form where this installation has it, else the plain one.

    Args:
        compiled: False for the plain form; True insists on the compiled one.
        path: library to take instead of the installation's.

    Raises:
        BackendError: the compiled form is insisted on, and missing; or the library cannot be loaded.
    """
    found = kernel_library() if path is None and compiled is not False else None
    path = found.path if found is not None else path
    library = None if path is None or compiled is False else _library(path)
    if library is None:
        if compiled:
            raise BackendError("this installation has no compiled phrases; they are part of the sequence kernels")
        return PhraseForms(PhraseTable, StoredPhrases, grow, list)
    return PhraseForms(
        lambda orders, most: CompiledTable(library, orders, most),
        lambda packed: CompiledStore(library, packed),
        functools.partial(_grow, library),
        lambda rates: (ctypes.c_double * len(rates))(*rates),  # type: ignore[arg-type,return-value]
    )


class CompiledTable:
    """See :class:`dspark_runtime.phrases.tables.PhraseTable`."""

    def __init__(self, library: ctypes.PyDLL, orders: int, most_contexts: int | None = None) -> None:
        self._library, self._orders = library, orders
        self.pointer = _made(library.dspark_phrases_new(orders, most_contexts or 0))
        weakref.finalize(self, library.dspark_phrases_free, self.pointer)
        self._given = _Context(), _Outputs(), _Outputs()

    def __len__(self) -> int:
        return int(self._library.dspark_phrases_contexts(self.pointer))

    def find(self, key: int) -> tuple[int, Sequence[Follower]] | None:
        """Slow: copies everything. For tests."""
        return StoredPhrases(self.packed()).find(key)

    def add(self, tokens: Sequence[int], followers: Sequence[Follower]) -> None:
        """Count ``followers`` for every context that ends with the last of ``tokens``."""
        ends = tokens[-LONGEST:]
        known, count = len(ends), len(followers)
        if count > MOST_NODES:
            raise ValueError(f"{count} followers; at most {MOST_NODES} are counted at once")
        given, next_, weights = self._given
        given[:known] = list(ends)
        if count:
            next_[:count] = [token for token, _ in followers]
            weights[:count] = [weight for _, weight in followers]
        _checked(self._library.dspark_phrases_add(self.pointer, given, known, next_, weights, count))

    def add_text(self, tokens: Sequence[int]) -> None:
        """Count each token of a text but the first, with weight 1."""
        ids = np.asarray(tokens, np.uint32)
        _checked(self._library.dspark_phrases_add_text(self.pointer, ids.ctypes.data, len(ids)))

    def packed(self) -> PackedPhrases:
        """A copy of everything that is known."""
        contexts, followers = len(self), int(self._library.dspark_phrases_followers(self.pointer))
        keys = np.zeros(contexts, np.uint64)
        totals, counts = np.zeros(contexts, np.int64), np.zeros(contexts, np.int64)
        tokens, weights = np.zeros(followers, np.int64), np.zeros(followers, np.int64)
        arrays = (keys, totals, counts, tokens, weights)
        self._library.dspark_phrases_dump(self.pointer, *(array.ctypes.data for array in arrays))
        order = np.argsort(keys)
        first = np.cumsum(counts) - counts
        starts = np.zeros(contexts + 1, np.uint32)
        np.cumsum(counts[order], out=starts[1:])
        moved = np.arange(followers) + np.repeat(first[order] - starts[:-1], counts[order])
        return PackedPhrases.narrowed(keys[order], starts, totals[order], tokens[moved], weights[moved])

    def load(self, packed: PackedPhrases) -> None:
        """Add what ``packed`` knows, as far as there is room; contexts that are known already are left as they are."""
        _checked(self._library.dspark_phrases_load(self.pointer, *_addresses(packed), len(packed)))


class CompiledStore:
    """See :class:`dspark_runtime.phrases.tables.StoredPhrases`."""

    def __init__(self, library: ctypes.PyDLL, packed: PackedPhrases) -> None:
        self._packed = packed  # the library reads its arrays
        self.pointer = _made(library.dspark_phrases_stored(*_addresses(packed), len(packed)))
        weakref.finalize(self, library.dspark_phrases_free_stored, self.pointer)

    def find(self, key: int) -> tuple[int, Sequence[Follower]] | None:
        """Total weight and followers of a context; None if it was never seen."""
        return StoredPhrases(self._packed).find(key)


def _grow(
    library: ctypes.PyDLL,
    sources: Sequence[Phrases | None],
    rates: Sequence[float],
    context: Sequence[int],
    shape: Shape,
) -> Grown:
    ends = context[-LONGEST:]
    if len(rates) != CLASSES or not ends:
        raise ValueError(f"{len(rates)} rates for {CLASSES} classes, and a context of {len(ends)} tokens")
    pointers = [None if source is None else source.pointer for source in sources]  # type: ignore[attr-defined]
    tokens, parents, classes = _Outputs(), _Places(), _Places()
    nodes = library.dspark_phrases_grow(
        *pointers,
        rates,
        _Context(*ends),
        len(ends),
        min(shape.nodes, MOST_NODES),
        shape.depth,
        shape.width,
        shape.least,
        tokens,
        parents,
        classes,
    )
    _checked(nodes)
    return Grown(tokens[:nodes], parents[:nodes], classes[:nodes])


def _addresses(packed: PackedPhrases) -> tuple[int, ...]:
    arrays = [getattr(packed, name) for name, _ in PackedPhrases.FIELDS]
    if not all(array.flags.c_contiguous for array in arrays):
        raise ValueError("the arrays of a store are not contiguous")
    return tuple(array.ctypes.data for array in arrays)


def _made(pointer: int | None) -> int:
    if not pointer:
        raise MemoryError("no memory for phrases")
    return pointer


def _checked(result: int) -> None:
    if result < 0:
        raise MemoryError("no memory for phrases")


@functools.cache
def _library(path: Path) -> ctypes.PyDLL | None:
    """The library's functions; None where it has none of them.

    The interpreter's lock is kept during a call: each takes microseconds.
    """
    library = ctypes.PyDLL(str(path))
    if not hasattr(library, "dspark_phrases_grow"):
        return None
    pointer, number, small = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    signatures: dict[str, tuple[list[Any], Any]] = {
        "new": ([small, number], pointer),
        "free": ([pointer], None),
        "contexts": ([pointer], number),
        "followers": ([pointer], number),
        "add": ([pointer, pointer, small, pointer, pointer, small], small),
        "add_text": ([pointer, pointer, number], small),
        "dump": ([pointer] * 6, None),
        "load": ([pointer] * 6 + [number], small),
        "stored": ([pointer] * 5 + [number], pointer),
        "free_stored": ([pointer], None),
        "grow": ([pointer] * 5 + [small] * 4 + [ctypes.c_double] + [pointer] * 3, small),
    }
    for name, (arguments, result) in signatures.items():
        function = getattr(library, f"dspark_phrases_{name}")
        function.argtypes, function.restype = arguments, result
    return library
