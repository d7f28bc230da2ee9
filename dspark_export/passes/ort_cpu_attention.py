"""ONNX Runtime CPU: one ``GroupQueryAttention`` in place of scatter, slice, rotary embedding and attention.

The standard form copies the used part of the cache (``Slice``) every layer and every step; this kernel reads the cache
in place and applies the rotary embedding itself. It is causal by slot, which a tree mask always is (a row sees only
earlier rows), so the mask becomes an additive bias: 0 where a row may attend, minus infinity elsewhere.

Limits of the kernel, which is why this is a variant for one backend and not the graph itself: batch 1 whenever a pass
has more than one token, and equal key and value widths. A layer that does not fit keeps the standard form.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from dspark_export.passes import match
from dspark_runtime.bundle import contract
from dspark_runtime.errors import ExportError

DOMAIN = "com.microsoft"
MAX_TABLE_ROWS = 131072
_HEADROOM = 512  # the runtime rounds kv_len up; the kernel wants a table row for every slot


class OrtCpuAttention(ir.passes.InPlacePass):
    """Rewrites each cached attention into ``com.microsoft::GroupQueryAttention``."""

    def __init__(self, max_positions: int) -> None:
        """``max_positions``: longest sequence of the model; the rotary tables get a row for each position."""
        super().__init__()
        self._rows = max_positions + _HEADROOM

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Return the same model and whether a layer was rewritten."""
        self._graph = model.graph
        self._inputs = {v.name: v for v in model.graph.inputs}
        self._biases: dict[int, ir.Value] = {}
        self._tables: dict[int, ir.Value | None] = {}
        self._lengths: tuple[ir.Value, ir.Value] | None = None
        fused = sum(self._fuse(node) for node in list(model.graph) if node.op_type == "Attention")
        if fused:
            model.opset_imports[DOMAIN] = 1
            match.remove_unused(model)
        return ir.passes.PassResult(model, modified=fused > 0)

    def _fuse(self, attention: ir.Node) -> bool:
        query, keys, values, mask = attention.inputs[:4]
        cached_key, cached_value = cache_update(keys), cache_update(values)
        if mask is None or query is None or cached_key is None or cached_value is None:
            return False
        heads, width = query.shape[1], match.last_dim(query)
        kv_heads = cached_key.inputs[0].shape[1]
        if not all(isinstance(d, int) for d in (heads, kv_heads, width)) or width % 16:
            return False
        if match.last_dim(cached_value.inputs[0]) != width or heads % kv_heads:
            return False
        new_key, new_value = cached_key.inputs[1], cached_value.inputs[1]
        tables, query_in, key_in = self._rotary(query, new_key)
        anchor = attention
        packed = _packed_source(query_in, key_in, new_value)
        sources = (
            [packed, None, None]
            if packed is not None
            else [self._flat(v, anchor) for v in (query_in, key_in, new_value)]
        )
        seqlens, total = self._sequence_lengths(anchor)
        positions = self._inputs[contract.POSITION_IDS] if tables is not None else None
        cos, sin = tables if tables is not None else (None, None)
        node = ir.node(
            "GroupQueryAttention",
            [
                *sources,
                cached_key.inputs[0],
                cached_value.inputs[0],
                seqlens,
                total,
                cos,
                sin,
                positions,
                self._bias(mask),
            ],
            attributes={
                "num_heads": heads,
                "kv_num_heads": kv_heads,
                "scale": float_attribute(attention, "scale", width**-0.5),
                "softcap": float_attribute(attention, "softcap", 0.0),
                "do_rotary": int(tables is not None),
                "local_window_size": -1,
            },
            domain=DOMAIN,
            num_outputs=3,
            name=attention.name,
        )
        output, present_key, present_value = node.outputs
        batch, tokens = query.shape[0], query.shape[2]
        output.shape, output.type = ir.Shape([batch, tokens, heads * width]), query.type
        match.insert_before(anchor, [node])
        for old, new in ((cached_key.outputs[0], present_key), (cached_value.outputs[0], present_value)):
            match.replace_value(old, new)
        self._replace_output(attention, output, heads, width)
        return True

    def _replace_output(self, attention: ir.Node, output: ir.Value, heads: int, width: int) -> None:
        """The kernel's output is already [batch, tokens, heads * width]: skip the transpose and reshape after it."""
        transpose = match.only_consumer(attention.outputs[0], "Transpose")
        reshape = match.only_consumer(transpose.outputs[0], "Reshape") if transpose is not None else None
        if (
            reshape is not None
            and match.last_dim(reshape.outputs[0]) == heads * width
            and match.rank(reshape.outputs[0]) == 3
        ):
            match.replace_value(reshape.outputs[0], output)
            return
        shape = match.int64_constant(self._graph, [0, 0, heads, width])
        split = ir.node("Reshape", [output, shape], num_outputs=1)
        back = ir.node("Transpose", [split.outputs[0]], attributes={"perm": [0, 2, 1, 3]}, num_outputs=1)
        match.insert_before(attention, [split, back])
        match.replace_value(attention.outputs[0], back.outputs[0])

    def _rotary(self, query: ir.Value, key: ir.Value) -> tuple[tuple[ir.Value, ir.Value] | None, ir.Value, ir.Value]:
        """(cos and sin tables, query and key before rotation), or no tables and both as they are."""
        on_query, on_key = match.producer(query, "RotaryEmbedding"), match.producer(key, "RotaryEmbedding")
        if on_query is None or on_key is None or list(on_query.inputs[1:3]) != list(on_key.inputs[1:3]):
            return None, query, key
        if any(n.attributes.get("interleaved") and n.attributes["interleaved"].as_int() for n in (on_query, on_key)):
            return None, query, key
        cos, sin = (self._table(v) for v in on_query.inputs[1:3])
        if cos is None or sin is None:
            return None, query, key
        return (cos, sin), on_query.inputs[0], on_key.inputs[0]

    def _table(self, value: ir.Value) -> ir.Value | None:
        """``value`` evaluated at every position, as an initializer; None when it depends on more than positions."""
        if id(value) not in self._tables:
            self._tables[id(value)] = self._tabulate(value) if self._rows <= MAX_TABLE_ROWS + _HEADROOM else None
        return self._tables[id(value)]

    def _tabulate(self, value: ir.Value) -> ir.Value | None:
        array = tabulate_positions(value, self._inputs[contract.POSITION_IDS], self._rows)
        if array is None or array.shape[1] % 8:
            return None
        name = f"{value.name}.table"
        return match.add_initializer(self._graph, name, ir.tensor(array, name=name))

    def _flat(self, value: ir.Value, anchor: ir.Node) -> ir.Value:
        """[batch, heads, tokens, width] as [batch, tokens, heads * width]."""
        heads, width = value.shape[1], match.last_dim(value)
        transpose = match.producer(value, "Transpose")
        reshape = match.producer(transpose.inputs[0], "Reshape") if transpose is not None else None
        if reshape is not None and match.rank(reshape.inputs[0]) == 3:
            return reshape.inputs[0]
        back = ir.node("Transpose", [value], attributes={"perm": [0, 2, 1, 3]}, num_outputs=1)
        shape = match.int64_constant(self._graph, [0, 0, heads * width])
        flat = ir.node("Reshape", [back.outputs[0], shape], num_outputs=1)
        match.insert_before(anchor, [back, flat])
        flat.outputs[0].shape = ir.Shape([value.shape[0], value.shape[2], heads * width])
        flat.outputs[0].type = value.type
        return flat.outputs[0]

    def _bias(self, mask: ir.Value) -> ir.Value:
        """0 where the mask is true, minus infinity elsewhere; made once per mask."""
        if id(mask) not in self._biases:
            zero, blocked = (
                match.add_initializer(self._graph, n, ir.tensor(np.array(v, dtype=np.float32), name=n))
                for n, v in (("attention_bias_allowed", 0.0), ("attention_bias_blocked", -np.inf))
            )
            where = ir.node("Where", [mask, zero, blocked], num_outputs=1, name=f"{mask.name}/bias")
            where.outputs[0].shape, where.outputs[0].type = mask.shape, ir.TensorType(ir.DataType.FLOAT)
            self._insert_after_value(mask, [where])
            self._biases[id(mask)] = where.outputs[0]
        return self._biases[id(mask)]

    def _insert_after_value(self, value: ir.Value, nodes: list[ir.Node]) -> None:
        maker = value.producer()
        if maker is not None:
            self._graph.insert_after(maker, nodes)
        else:
            self._graph.insert_before(self._graph[0], nodes)

    def _sequence_lengths(self, anchor: ir.Node) -> tuple[ir.Value, ir.Value]:
        """(index of each sequence's last slot after this pass [batch], kv_len), both int32."""
        if self._lengths is None:
            ids, mask = self._inputs[contract.INPUT_IDS], self._inputs[contract.ATTENTION_MASK]
            one = match.int64_constant(self._graph, [1])
            tokens = ir.node("Shape", [ids], attributes={"start": 1, "end": 2}, num_outputs=1)
            last = ir.node("Sub", [tokens.outputs[0], one], num_outputs=1)
            slot = ir.node("Add", [self._inputs[contract.WRITE_INDICES], last.outputs[0]], num_outputs=1)
            seqlens = ir.node("Cast", [slot.outputs[0]], attributes={"to": ir.DataType.INT32}, num_outputs=1)
            length = ir.node("Shape", [mask], attributes={"start": 3, "end": 4}, num_outputs=1)
            total = ir.node("Cast", [length.outputs[0]], attributes={"to": ir.DataType.INT32}, num_outputs=1)
            self._graph.insert_before(self._graph[0], [tokens, last, slot, seqlens, length, total])
            self._lengths = seqlens.outputs[0], total.outputs[0]
        return self._lengths


def float_attribute(node: ir.Node, name: str, default: float) -> float:
    """A float attribute of ``node``, or what it is where it is left out."""
    return node.attributes[name].as_float() if name in node.attributes else default


def cache_update(value: ir.Value | None) -> ir.Node | None:
    """The ``TensorScatter`` on a graph input behind ``value``, through the slice to kv_len."""
    node = match.producer(value, "Slice", "TensorScatter")
    if node is not None and node.op_type == "Slice":
        node = match.producer(node.inputs[0], "TensorScatter")
    if node is None or node.inputs[0] is None or not node.inputs[0].is_graph_input():
        return None
    return node


def _packed_source(query: ir.Value, key: ir.Value, value: ir.Value) -> ir.Value | None:
    """The packed projection when query, key and value are its three parts and nothing else touched them."""
    parts = []
    for tensor in (query, key, value):
        transpose = match.producer(tensor, "Transpose")
        reshape = match.producer(transpose.inputs[0], "Reshape") if transpose is not None else None
        if reshape is None or reshape.inputs[0] is None:
            return None
        parts.append(reshape.inputs[0])
    split = match.producer(parts[0], "Split")
    return split.inputs[0] if split is not None and list(split.outputs) == parts else None


def tabulate_positions(value: ir.Value, position_ids: ir.Value, rows: int) -> np.ndarray | None:
    """Evaluate ``value`` [batch, tokens, width], a function of ``position_ids`` alone, at positions 0..rows-1.

    Returns float32 [rows, width], or None when it depends on other inputs. Raises ExportError if it has another shape.
    """
    from onnx.reference import ReferenceEvaluator

    needed: set[ir.Node] = set()
    constants: dict[str, ir.Value] = {}
    pending = [value]
    while pending:
        current = pending.pop()
        if current is position_ids:
            continue
        if current.is_initializer():
            constants[current.name] = current
            continue
        node = current.producer()
        if node is None:
            return None
        if node not in needed:
            needed.add(node)
            pending.extend(i for i in node.inputs if i is not None)
    graph = value.producer().graph
    ordered = [n for n in graph if n in needed]
    cloned = _clone_subgraph(ordered, constants, position_ids, value)
    evaluator = ReferenceEvaluator(ir.to_proto(cloned))
    (table,) = evaluator.run(None, {position_ids.name: np.arange(rows, dtype=np.int64)[None]})
    if table.ndim != 3 or table.shape[:2] != (1, rows):
        raise ExportError(f"the rotary table {value.name} has shape {table.shape}, expected (1, {rows}, width)")
    return np.ascontiguousarray(table[0], dtype=np.float32)


def _clone_subgraph(
    nodes: list[ir.Node], constants: dict[str, ir.Value], position_ids: ir.Value, output: ir.Value
) -> ir.Model:
    feed = ir.Value(name=position_ids.name, type=position_ids.type, shape=ir.Shape(["batch", "tokens"]))
    mapped: dict[ir.Value, ir.Value] = {position_ids: feed}
    for original in constants.values():
        mapped[original] = ir.Value(
            name=original.name, type=original.type, shape=original.shape, const_value=original.const_value
        )
    copies = []
    for node in nodes:
        copy = ir.Node(
            node.domain,
            node.op_type,
            [mapped[i] if i is not None else None for i in node.inputs],
            attributes=list(node.attributes.values()),
            num_outputs=len(node.outputs),
        )
        for old, new in zip(node.outputs, copy.outputs, strict=True):
            new.name, new.type, new.shape = old.name, old.type, old.shape
            mapped[old] = new
        copies.append(copy)
    initializers = [v for k, v in mapped.items() if k in constants.values()]
    graph = ir.Graph(
        [feed], [mapped[output]], nodes=copies, initializers=initializers, opset_imports={"": contract.OPSET}
    )
    return ir.Model(graph, ir_version=11)
