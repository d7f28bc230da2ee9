"""Sequence kernels: one operator in place of cache update, slice, rotary embedding and attention.

It writes new keys and values into the cache in place, and adds keys by their place in the sequence, so that a row's
bits do not depend on the slots its ancestors lie in. It takes any mask of the graph contract, several sequences and
widths that differ. In a block drafter, more rows are written than ask: the block's rows after those of the context. An
attention over anything but the cache itself keeps its standard form, such as one over keys that are made of cached
latents in every pass (DeepSeek).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from dspark_export.passes import match
from dspark_export.passes.ort_cpu_attention import MAX_TABLE_ROWS, cache_update, float_attribute, tabulate_positions
from dspark_runtime.backends.ort_kernels import DOMAIN
from dspark_runtime.bundle import contract
from dspark_runtime.bundle.draft_contract import BLOCK_POSITIONS, FEATURE_POSITIONS

_MOST_WIDTH = 512
_TOKENS_FIRST = [0, 2, 1, 3]


class KernelAttention(ir.passes.InPlacePass):
    """Rewrites each cached attention into ``SequenceAttention``, or the operator with rotary embedding or sinks."""

    def __init__(self, max_positions: int) -> None:
        """``max_positions``: longest sequence of the model; the rotary tables get a row for each position."""
        super().__init__()
        self._rows = max_positions

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Return the same model and whether a layer was rewritten."""
        self._graph = model.graph
        self._inputs = {v.name: v for v in model.graph.inputs}
        self._tables: dict[int, ir.Value] = {}
        positions = self._inputs.get(contract.POSITION_IDS) or self._block_positions()
        if positions is None or contract.WRITE_INDICES not in self._inputs:
            return ir.passes.PassResult(model, modified=False)
        self._positions = positions
        fused = sum(self._fuse(node) for node in list(model.graph) if node.op_type == "Attention")
        if fused:
            model.opset_imports[DOMAIN] = 1
            match.remove_unused(model)
        return ir.passes.PassResult(model, modified=fused > 0)

    def _block_positions(self) -> ir.Value | None:
        """Positions of the rows a block drafter writes, those of the context first; None in other graphs."""
        parts = [self._inputs.get(name) for name in (FEATURE_POSITIONS, BLOCK_POSITIONS)]
        joined = (n for n in self._graph if n.op_type == "Concat" and list(n.inputs) == parts)
        found = next(joined, None)
        return None if found is None else found.outputs[0]

    def _fuse(self, attention: ir.Node) -> bool:
        query, keys, values, mask, sinks = _without_sink(attention)
        cached_key, cached_value = cache_update(keys), cache_update(values)
        if mask is None or mask.dtype != ir.DataType.BOOL or cached_key is None or cached_value is None:
            return False
        heads, kv_heads, width = query.shape[1], cached_key.inputs[0].shape[1], match.last_dim(query)
        value_width = match.last_dim(cached_value.inputs[0])
        sizes = (heads, kv_heads, width, value_width)
        if not all(isinstance(d, int) for d in sizes) or heads % kv_heads:
            return False
        if width > _MOST_WIDTH or value_width > _MOST_WIDTH:
            return False
        new_key, new_value = cached_key.inputs[1], cached_value.inputs[1]
        rotary, query_in, key_in, interleaved = self._rotary(query, new_key)
        sources = [self._source(v, attention) for v in (query_in, key_in, new_value)]
        attributes: dict[str, int | float] = {
            "heads": heads,
            "scale": float_attribute(attention, "scale", width**-0.5),
            "softcap": float_attribute(attention, "softcap", 0.0),
            "interleaved": interleaved,
        }
        offsets = ("query_offset", "key_offset", "value_offset")
        attributes |= {name: offset for name, (_, offset) in zip(offsets, sources, strict=True)}
        kinds = {(0, 0): "SequenceAttention", (2, 0): "RotaryAttention", (0, 1): "SinkAttention"}
        node = ir.node(
            kinds.get((len(rotary), len(sinks)), "RotarySinkAttention"),
            [
                *(source for source, _ in sources),
                cached_key.inputs[0],
                cached_value.inputs[0],
                mask,
                self._inputs[contract.WRITE_INDICES],
                self._positions,
                *rotary,
                *sinks,
            ],
            attributes=attributes,
            domain=DOMAIN,
            num_outputs=3,
            name=attention.name,
        )
        output, present_key, present_value = node.outputs
        output.shape = ir.Shape([query.shape[0], query.shape[2], heads * value_width])
        output.type = query.type
        match.insert_before(attention, [node])
        match.replace_value(cached_key.outputs[0], present_key)
        match.replace_value(cached_value.outputs[0], present_value)
        self._replace_output(attention, output, heads, value_width)
        return True

    def _rotary(self, query: ir.Value, key: ir.Value) -> tuple[list[ir.Value], ir.Value, ir.Value, int]:
        """(cos and sin by row, or nothing), query and key before rotation, and whether pairs are neighbours."""
        (on_query, whole_query), (on_key, whole_key) = _turned(query), _turned(key)
        plain: tuple[list[ir.Value], ir.Value, ir.Value, int] = ([], query, key, 0)
        if on_query is None or on_key is None or not self._same_angles(on_query, on_key):
            return plain
        interleaved = {
            n.attributes["interleaved"].as_int() if "interleaved" in n.attributes else 0 for n in (on_query, on_key)
        }
        if len(interleaved) != 1 or len([i for i in on_query.inputs if i is not None]) != 3:
            return plain
        rows = [self._by_row(v) for v in on_key.inputs[1:3]]
        return rows, whole_query, whole_key, interleaved.pop()

    def _same_angles(self, on_query: ir.Node, on_key: ir.Node) -> bool:
        """Whether both turn a position by the same angle. A block's positions are the last of those of all rows."""
        if list(on_query.inputs[1:]) == list(on_key.inputs[1:]):
            return True
        block = self._inputs.get(BLOCK_POSITIONS)
        if block is None or self._rows > MAX_TABLE_ROWS:
            return False
        tables = [
            (tabulate_positions(query, block, self._rows), tabulate_positions(key, self._positions, self._rows))
            for query, key in zip(on_query.inputs[1:3], on_key.inputs[1:3], strict=True)
        ]
        return all(a is not None and b is not None and np.array_equal(a, b) for a, b in tables)

    def _by_row(self, value: ir.Value) -> ir.Value:
        """``value`` [batch, tokens, width] looked up in a table of positions: no cosine, whose rounding may depend on
        the number of rows. As it is where it depends on more than positions, or the table would be too long."""
        if id(value) in self._tables:
            return self._tables[id(value)]
        positions = self._positions
        array = tabulate_positions(value, positions, self._rows) if self._rows <= MAX_TABLE_ROWS else None
        found = value
        if array is not None:
            name = f"{value.name}.positions"
            table = match.add_initializer(self._graph, name, ir.tensor(array, name=name))
            gather = ir.node("Gather", [table, positions], attributes={"axis": 0}, num_outputs=1, name=f"{name}/Gather")
            found = gather.outputs[0]
            found.shape, found.type = value.shape, ir.TensorType(ir.DataType.FLOAT)
            maker = positions.producer()
            if maker is None:
                self._graph.insert_before(self._graph[0], [gather])
            else:
                self._graph.insert_after(maker, [gather])
        self._tables[id(value)] = found
        return found

    def _source(self, value: ir.Value, anchor: ir.Node) -> tuple[ir.Value, int]:
        """[batch, heads, tokens, width] as [batch, tokens, ...] and the column at which its heads begin there."""
        norm = match.producer(value, "RMSNormalization")
        if norm is not None and _over_heads(norm) and _tokens_first(match.producer(norm.inputs[0], "Transpose")):
            return self._normed_before(norm), 0
        transpose = match.producer(value, "Transpose")
        if _tokens_first(transpose):
            return _packed(transpose.inputs[0])
        back = ir.node("Transpose", [value], attributes={"perm": _TOKENS_FIRST}, num_outputs=1)
        back.outputs[0].shape, back.outputs[0].type = ir.Shape([value.shape[i] for i in _TOKENS_FIRST]), value.type
        match.insert_before(anchor, [back])
        return back.outputs[0], 0

    def _normed_before(self, norm: ir.Node) -> ir.Value:
        """The norm of every head before heads and tokens change places, which is not needed then."""
        rows = norm.inputs[0].producer().inputs[0]
        inputs = [rows, *norm.inputs[1:]]
        moved = ir.node(
            "RMSNormalization", inputs, attributes=dict(norm.attributes), num_outputs=1, name=f"{norm.name}_rows"
        )
        moved.outputs[0].shape, moved.outputs[0].type = rows.shape, rows.type
        match.insert_before(norm, [moved])
        return moved.outputs[0]

    def _replace_output(self, attention: ir.Node, output: ir.Value, heads: int, width: int) -> None:
        """The kernel's output is [batch, tokens, heads * width]: skip the transpose and reshape after it."""
        transpose = match.only_consumer(attention.outputs[0], "Transpose")
        reshape = match.only_consumer(transpose.outputs[0], "Reshape") if transpose is not None else None
        flat = reshape is not None and match.rank(reshape.outputs[0]) == 3
        if flat and match.last_dim(reshape.outputs[0]) == heads * width:
            match.replace_value(reshape.outputs[0], output)
            return
        shape = match.int64_constant(self._graph, [0, 0, heads, width])
        split = ir.node("Reshape", [output, shape], num_outputs=1)
        back = ir.node("Transpose", [split.outputs[0]], attributes={"perm": _TOKENS_FIRST}, num_outputs=1)
        match.insert_before(attention, [split, back])
        match.replace_value(attention.outputs[0], back.outputs[0])


def _turned(value: ir.Value) -> tuple[ir.Node | None, ir.Value]:
    """The rotary embedding that ends in ``value`` and what went in, also where the last columns of heads pass by it."""
    node = match.producer(value, "RotaryEmbedding")
    if node is not None:
        return node, node.inputs[0]
    joined = match.producer(value, "Concat")
    if joined is None or len(joined.inputs) != 2 or not match.is_last_axis([joined.attributes["axis"].as_int()], value):
        return None, value
    node = match.producer(joined.inputs[0], "RotaryEmbedding")
    if node is None:
        return None, value
    parts = [node.inputs[0], joined.inputs[1]]
    makers = [match.producer(part, "Split", "Slice") for part in parts]
    if any(maker is None for maker in makers) or makers[0].inputs[0] is not makers[1].inputs[0]:
        return None, value
    whole = makers[0].inputs[0]
    if match.last_dim(whole) != match.last_dim(value):
        return None, value
    if makers[0] is makers[1]:
        return (node, whole) if list(makers[0].outputs) == parts else (None, value)
    cuts = [_columns(maker) for maker in makers]
    first, width = match.last_dim(parts[0]), match.last_dim(whole)
    return (node, whole) if cuts == [(0, first), (first, width)] else (None, value)


def _columns(cut: ir.Node) -> tuple[int, int] | None:
    """Begin and end of a ``Slice`` along the last axis."""
    width = match.last_dim(cut.inputs[0])
    begin, end = match.integers(cut.inputs[1]), match.integers(cut.inputs[2])
    axes = match.integers(cut.inputs[3]) if len(cut.inputs) > 3 else None
    if not begin or not end or not axes or width is None or not match.is_last_axis(axes, cut.inputs[0]):
        return None
    return begin[0], min(end[0], width)


_Inputs = tuple[ir.Value, ir.Value, ir.Value, ir.Value | None, list[ir.Value]]


def _without_sink(attention: ir.Node) -> _Inputs:
    """Query, keys, values and mask, and the scores of sinks [heads] that were a slot of their own (``with_sinks`` of
    ``dspark_export/tracing/operators.py``); everything as it is where there are none."""
    inputs = list(attention.inputs[:4])
    joined = [match.producer(value, "Concat") for value in inputs]
    if any(node is None or len(node.inputs) != 2 for node in joined):
        return (*inputs[:3], inputs[3], [])
    query, keys, values, mask = (node.inputs[0] for node in joined if node is not None)
    wide = match.producer(keys, "Concat")
    sinks = _sinks(joined[0].inputs[1], float_attribute(attention, "scale", 0.0))
    if wide is None or sinks is None or match.last_dim(query) != match.last_dim(wide.inputs[0]):
        return (*inputs[:3], inputs[3], [])
    return query, wide.inputs[0], values, mask, [sinks]


def _sinks(columns: ir.Value | None, scale: float) -> ir.Value | None:
    """The scores [heads] that queries get as further columns, divided by ``scale`` and padded."""
    node = None if columns is None else columns.producer()
    while node is not None and node.op_type in ("Expand", "Pad", "Reshape", "Cast"):
        node = None if node.inputs[0] is None else node.inputs[0].producer()
    if node is None or node.op_type != "Div" or match.rank(node.outputs[0]) != 1:
        return None
    divisor = match.scalar(node.inputs[1])
    return node.inputs[0] if divisor is not None and np.isclose(float(divisor), scale, rtol=1e-6) else None


def _tokens_first(transpose: ir.Node | None) -> bool:
    """Whether heads and tokens change places."""
    return transpose is not None and list(transpose.attributes["perm"].as_ints()) == _TOKENS_FIRST


def _over_heads(norm: ir.Node) -> bool:
    """Whether a norm is over the width of a head."""
    axis = norm.attributes["axis"].as_int() if "axis" in norm.attributes else -1
    return match.is_last_axis([axis], norm.inputs[0])


def _packed(value: ir.Value) -> tuple[ir.Value, int]:
    """``value`` [batch, tokens, heads, width], or the wider projection it is part of, and its first column there."""
    reshape = match.producer(value, "Reshape")
    if reshape is None or match.rank(reshape.inputs[0]) != 3:
        return value, 0
    flat = reshape.inputs[0]
    cut = match.producer(flat, "Slice")
    if cut is not None and match.rank(cut.inputs[0]) == 3:
        starts, _, axes, steps = ([match.integers(v) for v in cut.inputs[1:]] + [None, None])[:4]
        if starts is not None and starts[0] >= 0 and axes in ([-1], [2]) and steps in (None, [1]):
            return cut.inputs[0], starts[0]
    split = match.producer(flat, "Split")
    if split is None or split.inputs[0] is None or match.rank(split.inputs[0]) != 3:
        return flat, 0
    axis = split.attributes["axis"].as_int() if "axis" in split.attributes else 0
    widths = [match.last_dim(v) for v in split.outputs]
    if axis not in (-1, 2) or not all(isinstance(w, int) for w in widths):
        return flat, 0
    return split.inputs[0], sum(widths[: list(split.outputs).index(flat)])
