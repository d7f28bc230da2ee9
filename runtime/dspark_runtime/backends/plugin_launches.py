"""The kernels of ``dspark.fatbin`` that a verification, a draft or a compaction launches: grid, block and arguments.

The contract is plugins/include/dspark/kernels.h, the counterpart for C++ plugins/kernels/launch.cu; docs/plugins.md
gives the tensors. Nothing here touches a device.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal, cast

import numpy as np

from dspark_runtime.bundle.contract import LOGITS, VERIFY_CHAIN_INPUTS, VERIFY_INPUTS, VERIFY_OUTPUTS, TensorSpec
from dspark_runtime.errors import BackendError

Element = Literal["float32", "float16", "bfloat16", "int64", "bool"]
Markov = Literal["none", "vanilla", "gated", "rnn"]
Grid = tuple[int, int, int]

BLOCK_THREADS, DRAFT_THREADS, COMPACT_THREADS = 512, 256, 128
MAX_BATCH, MAX_ROWS, MAX_VOCAB, MAX_RANK = 256, 128, 262_144, 1024
MAX_TILES = 1024
DRAFT_SEQUENCES = 8  # of one block of a draft step
ROW_VERDICT_BYTES, DRAWN_FROM_BYTES, CACHE_TENSOR_BYTES = 40, 28, 16
MAX_CACHE_TENSORS = 160
_GROUP = 8  # logits a thread reads together
_TOKENS = 4  # rows of w2 a warp takes together
_KINDS: tuple[Markov, ...] = ("none", "vanilla", "gated", "rnn")
_SUFFIX = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "bool": 1}


@dataclass(frozen=True)
class DeviceTensor:
    """A contiguous tensor in device memory."""

    address: int
    shape: tuple[int, ...]
    dtype: Element

    @property
    def nbytes(self) -> int:
        """Bytes it takes."""
        return prod(self.shape) * _BYTES[self.dtype]


Tensors = Mapping[str, DeviceTensor]
Argument = int | np.int32
Wanted = dict[str, tuple[Element, tuple[int, ...]]]


@dataclass(frozen=True)
class Launch:
    """One kernel: addresses are ``int``, numbers ``np.int32``; a block has one dimension, no dynamic shared memory."""

    kernel: str
    grid: Grid
    threads: int
    arguments: tuple[Argument, ...]


def sized(specs: Iterable[TensorSpec], **sizes: int) -> Wanted:
    """Type and dims of every tensor, with the ``sizes`` of its symbolic dims."""
    return {
        spec.name: (
            cast("Element", spec.dtype),
            tuple(dim if isinstance(dim, int) else sizes[dim] for dim in spec.shape),
        )
        for spec in specs
    }


def verify_workspace(batch: int, rows: int) -> int:
    """Bytes of workspace of :func:`verify_tree` and :func:`verify_chain`, zeroed once: a launch leaves it zeroed."""
    each = batch * rows
    return _aligned(each * 8) + _aligned(each * ROW_VERDICT_BYTES) + _aligned(each * 4) + _aligned(batch * 4)


def draft_workspace(batch: int, drafts: int, rank: int) -> int:
    """Bytes of workspace of :func:`draft_block`; what they hold does not matter."""
    drawn = _aligned(batch * drafts * DRAWN_FROM_BYTES)
    return drawn + 3 * _aligned(batch * rank * 4) + _aligned(batch * MAX_TILES * 8)


def verify_tree(inputs: Tensors, outputs: Tensors, workspace: int, processors: int) -> tuple[Launch, ...]:
    """``VerifyTree`` of a pass.

    Args:
        inputs: logits float32, float16 or bfloat16 [batch, rows, vocab], tokens int64 [batch, rows], ancestors bool
            [batch, rows, rows], uniforms float32 [batch, rows], and temperature, top_k, top_p, min_p [batch].
        outputs: path and emitted int64 [batch, rows], accepted int64 [batch].
        workspace: address of :func:`verify_workspace` bytes; 0: one block walks each sequence, slower but without.
        processors: multiprocessors of the device.

    Raises:
        BackendError: a tensor is missing, of another type or shape, or too large.
    """
    return _verify("tree", VERIFY_INPUTS, inputs, outputs, workspace, processors)


def verify_chain(inputs: Tensors, outputs: Tensors, workspace: int, processors: int) -> tuple[Launch, ...]:
    """``VerifyChain`` of a pass: rejection sampling against what the drafter drew from.

    Args and errors are those of :func:`verify_tree`; instead of ancestors and uniforms the inputs have draft_probs
    float32 [batch, rows - 1, vocab], drafted int64 [batch], accept_uniforms float32 [batch, rows - 1] and draw_uniforms
    float32 [batch, rows].
    """
    return _verify("chain", VERIFY_CHAIN_INPUTS, inputs, outputs, workspace, processors)


def draft_block(kind: Markov, inputs: Tensors, outputs: Tensors, workspace: int, processors: int) -> tuple[Launch, ...]:
    """``DraftBlock``: every slot of a block, drawn one after the other on the device.

    Args:
        kind: the Markov head.
        inputs: base_logits [batch, drafts, vocab] and hidden_rows [batch, drafts, hidden] of one float type, anchors
            int64 [batch], temperature float32 [batch], uniforms float32 [batch, drafts]; of the same float type, where
            the head has them, w1 [embeddings, rank], w2 [vocab, rank], mix, mix_bias, confidence [hidden or hidden +
            rank] and confidence_bias [1]; token_map int64 [vocab], where draft ids are not the target's.
        outputs: tokens int64 [batch, drafts], probs float32 [batch, drafts, vocab], and confidences float32
            [batch, drafts] (logits) with a confidence head.
        workspace: address of :func:`draft_workspace` bytes.
        processors: multiprocessors of the device.

    Raises:
        BackendError: a tensor is missing, of another type or shape, or too large.
    """
    logits = _float_tensor("DraftBlock", inputs, "base_logits")
    batch, drafts, vocab = logits.shape
    hidden = _float_tensor("DraftBlock", inputs, "hidden_rows").shape[-1]
    dtype = logits.dtype
    uses_token = "confidence" in inputs and prod(inputs["confidence"].shape) > hidden
    embeddings, rank = _float_tensor("DraftBlock", inputs, "w1", 2).shape if kind != "none" or uses_token else (0, 0)
    _within("DraftBlock", {"batch": (batch, MAX_BATCH), "drafts": (drafts, MAX_ROWS), "vocab": (vocab, MAX_VOCAB),
                           "rank": (rank, MAX_RANK)})  # fmt: skip
    wanted: Wanted = {
        "hidden_rows": (dtype, (batch, drafts, hidden)),
        "anchors": ("int64", (batch,)),
        "temperature": ("float32", (batch,)),
        "uniforms": ("float32", (batch, drafts)),
    }
    if kind != "none":
        wanted |= {"w1": (dtype, (embeddings, rank)), "w2": (dtype, (vocab, rank))}
    if kind == "gated":
        wanted |= {"mix": (dtype, (rank, hidden + rank)), "mix_bias": (dtype, (rank,))}
    if kind == "rnn":
        wanted |= {"mix": (dtype, (3 * rank, 2 * rank + hidden)), "mix_bias": (dtype, (3 * rank,))}
    if "confidence" in inputs:
        wanted |= {
            "confidence": (dtype, (hidden + rank * uses_token,)),
            "confidence_bias": (dtype, (1,)),
        }
    if "token_map" in inputs:
        wanted |= {"token_map": ("int64", (vocab,))}
    _require("DraftBlock", inputs, wanted)
    results: Wanted = {
        "tokens": ("int64", (batch, drafts)),
        "probs": ("float32", (batch, drafts, vocab)),
    }
    if "confidence" in inputs:
        results |= {"confidences": ("float32", (batch, drafts))}
    _require("DraftBlock", outputs, results)

    def at(*names: str) -> tuple[Argument, ...]:
        found = [inputs.get(name, outputs.get(name)) for name in names]
        return tuple(0 if tensor is None else tensor.address for tensor in found)

    suffix, warps, code = _SUFFIX[dtype], DRAFT_THREADS // 32, _KINDS.index(kind)
    tiles = min(3 * processors, MAX_TILES, -(-vocab // (warps * _TOKENS)))
    launches = []
    for slot in range(drafts):
        if kind in ("gated", "rnn"):
            sizes = _numbers(code, rank, hidden, embeddings, drafts, slot)
            tensors = at("hidden_rows", "anchors", "tokens", "w1", "mix", "mix_bias")
            grid = (-(-rank // warps), batch, 1)
            launches.append(Launch(f"dspark_draft_mix_{suffix}", grid, DRAFT_THREADS, (*sizes, *tensors, workspace)))
        sizes = _numbers(code, rank, vocab, embeddings, drafts, slot, batch)
        tensors = at("base_logits", "anchors", "tokens", "w1", "w2", "probs")
        grid = (tiles, -(-batch // DRAFT_SEQUENCES), 1)
        launches.append(Launch(f"dspark_draft_step_{suffix}", grid, DRAFT_THREADS, (*sizes, *tensors, workspace)))
        sizes = _numbers(drafts, slot, vocab, tiles, rank)
        tensors = at("temperature", "uniforms", "token_map", "probs", "tokens")
        launches.append(Launch("dspark_draft_draw", (batch, 1, 1), BLOCK_THREADS, (*sizes, *tensors, workspace)))
    sizes = _numbers(rank, hidden, vocab, embeddings, drafts, uses_token)
    tensors = at("hidden_rows", "anchors", "tokens", "w1", "confidence", "confidence_bias", "confidences", "probs")
    grid = (min(-(-vocab // DRAFT_THREADS), 16) + 1, drafts, batch)
    launches.append(Launch(f"dspark_draft_finish_{suffix}", grid, DRAFT_THREADS, (*sizes, *tensors, workspace)))
    return tuple(launches)


@dataclass(frozen=True)
class CacheTable:
    """The cache tensors of a model, as the compacting kernel reads them from device memory.

    ``data`` are the bytes to put there, ``columns`` those of the widest tensor, ``unit`` the bytes moved at once.
    """

    data: bytes
    tensors: int
    columns: int
    unit: int
    batch: int
    capacity: int


def cache_table(caches: tuple[DeviceTensor, ...]) -> CacheTable:
    """The table of ``caches`` [batch, heads, capacity, head_dim], which share batch and capacity.

    Raises:
        BackendError: there are none or too many, or they differ in batch or capacity.
    """
    if not 1 <= len(caches) <= MAX_CACHE_TENSORS:
        raise BackendError(f"CompactCache takes 1 to {MAX_CACHE_TENSORS} cache tensors, not {len(caches)}")
    batch, _, capacity, _ = caches[0].shape
    if any((cache.shape[0], cache.shape[2]) != (batch, capacity) for cache in caches):
        raise BackendError("CompactCache takes cache tensors of one batch and one capacity")
    rows = [cache.shape[3] * _BYTES[cache.dtype] for cache in caches]
    wide = all(row % 16 == 0 and cache.address % 16 == 0 for row, cache in zip(rows, caches, strict=True))
    unit = 16 if wide else 1
    entry = np.dtype([("data", np.uint64), ("heads", np.int32), ("row_units", np.int32)])
    table = np.zeros(MAX_CACHE_TENSORS, entry)
    for i, (cache, row) in enumerate(zip(caches, rows, strict=True)):
        table[i] = (cache.address, cache.shape[1], row // unit)
    columns = max(cache.shape[1] * row // unit for cache, row in zip(caches, rows, strict=True))
    count = np.array([len(caches), 0], np.int32)  # padded to the struct's alignment
    return CacheTable(table.tobytes() + count.tobytes(), len(caches), columns, unit, batch, capacity)


def compact_cache(table: CacheTable, address: int, inputs: Tensors) -> tuple[Launch, ...]:
    """``CompactCache``: the accepted rows of a pass move together in every cache tensor, in place.

    Args:
        table: of the cache tensors, whose ``data`` lies at ``address``.
        address: in device memory.
        inputs: path int64 [batch, rows], accepted int64 [batch], starts int64 [batch]: slot of a pass's first row.

    Raises:
        BackendError: a tensor is missing, of another type or shape, or too large.
    """
    if "path" not in inputs or len(inputs["path"].shape) != 2:
        raise BackendError("CompactCache needs a path [batch, rows]")
    rows = inputs["path"].shape[1]
    _within("CompactCache", {"batch": (table.batch, MAX_BATCH), "rows": (rows, MAX_ROWS)})
    _require("CompactCache", inputs, {"path": ("int64", (table.batch, rows)), "accepted": ("int64", (table.batch,)),
                                      "starts": ("int64", (table.batch,))})  # fmt: skip
    if rows == 1:
        return ()
    pointers = _addresses(inputs, ("path", "accepted", "starts"))
    arguments = (address, *pointers, *_numbers(rows, table.capacity))
    grid = (-(-table.columns // COMPACT_THREADS), table.batch, table.tensors)
    return (Launch(f"dspark_compact_cache_table_{table.unit}", grid, COMPACT_THREADS, arguments),)


def _verify(
    family: str,
    wanted: Sequence[TensorSpec],
    inputs: Tensors,
    outputs: Tensors,
    workspace: int,
    processors: int,
) -> tuple[Launch, ...]:
    plugin = f"Verify{family.title()}"
    batch, rows, vocab = _verify_sizes(inputs)
    beside = [spec for spec in wanted if spec.name != LOGITS]  # they may be of any float type
    _require(plugin, inputs, sized(beside, batch=batch, rows=rows, drafts=rows - 1, vocab=vocab))
    _require(plugin, outputs, sized(VERIFY_OUTPUTS, batch=batch, rows=rows))
    suffix = _SUFFIX[inputs[LOGITS].dtype]
    given, results = (tuple(spec.name for spec in specs) for specs in (wanted, VERIFY_OUTPUTS))
    arguments = (*_addresses(inputs, given), *_numbers(rows, vocab), *_addresses(outputs, results))
    if not workspace:
        return (Launch(f"dspark_walk_{family}_{suffix}", (batch, 1, 1), BLOCK_THREADS, arguments),)
    # Blocks that share a row: enough for the whole device, none without work.
    most = -(-vocab // (BLOCK_THREADS * _GROUP))
    slices = min(max(-(-4 * processors // (batch * rows)), 1), most)
    grid = (slices, rows, batch)
    return (Launch(f"dspark_verify_{family}_{suffix}", grid, BLOCK_THREADS, (*arguments, workspace)),)


def _verify_sizes(inputs: Tensors) -> tuple[int, int, int]:
    batch, rows, vocab = _float_tensor("verification", inputs, LOGITS).shape
    limits = {"batch": (batch, MAX_BATCH), "rows": (rows, MAX_ROWS), "vocab": (vocab, MAX_VOCAB)}
    _within("verification", limits)
    return batch, rows, vocab


def _float_tensor(plugin: str, tensors: Tensors, name: str, rank: int = 3) -> DeviceTensor:
    found = tensors.get(name)
    if found is None or found.dtype not in _SUFFIX or len(found.shape) != rank:
        raise BackendError(f"{plugin} needs {name} with {rank} dimensions in {', '.join(_SUFFIX)}, given is {found}")
    return found


def _within(plugin: str, sizes: Mapping[str, tuple[int, int]]) -> None:
    for name, (size, limit) in sizes.items():
        if size > limit or (size < 1 and name != "rank"):
            raise BackendError(f"{plugin} takes 1 to {limit} for {name}, not {size}; split the pass")


def _require(plugin: str, tensors: Tensors, wanted: Wanted) -> None:
    for name, (dtype, shape) in wanted.items():
        found = tensors.get(name)
        if found is None or (found.dtype, found.shape) != (dtype, shape):
            have = "nothing" if found is None else f"{found.dtype} {list(found.shape)}"
            raise BackendError(f"{plugin} needs {name} as {dtype} {list(shape)}, given is {have}")


def _numbers(*values: int) -> tuple[Argument, ...]:
    return tuple(np.int32(value) for value in values)


def _addresses(tensors: Tensors, names: tuple[str, ...]) -> tuple[Argument, ...]:
    return tuple(tensors[name].address for name in names)


def _aligned(size: int) -> int:
    return (size + 15) // 16 * 16
