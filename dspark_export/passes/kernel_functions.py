"""The sequence kernels as ONNX functions in the domain ``dspark``, with bodies of standard operators.

A graph with kernels stays a valid ONNX model of opset 24, and a runtime without the library inlines the bodies. They
give the kernels' numbers up to rounding, not bit for bit, and are slow: they unpack weights, which ONNX Runtime
folds into constants when it loads the graph. Products of weights in blocks multiply in float32 here, as the standard
graph does, where the kernels round activations to 8 bits: so a check of a graph's wiring can be tight.
"""

from __future__ import annotations

import functools
from typing import cast

import onnx
import onnx.parser
import onnx_ir as ir
from onnxscript import script
from onnxscript.values import Opset

from dspark_export.passes.kernel_draft import PLAIN, WITH_MARKOV
from dspark_runtime.backends.ort_kernels import DOMAIN
from dspark_runtime.bundle.contract import OPSET

op = Opset("", OPSET)
dspark = Opset(DOMAIN, 1)

_FORMATS: dict[str, tuple[str, ...]] = {
    "Float32": ("weight",),
    "Float16": ("weight",),
    "BFloat16": ("weight",),
    "Int8": ("weight", "scale"),
    "Int8Minimum": ("weight", "scale", "minimum"),
    "Int4": ("weight", "scale"),
    "Int4Minimum": ("weight", "scale", "minimum"),
}
"""Formats with products, experts and lookups, and the inputs of their weights."""


@script(dspark, default_opset=op)
def JoinDepth(x):
    """[G, ..., columns] as [G, depth, columns]."""
    last = op.Constant(value_ints=[-1])
    return op.Reshape(x, op.Concat(op.Shape(x, start=0, end=1), last, op.Shape(x, start=-1), axis=0))


@script(dspark, default_opset=op)
def WeightFloat32(weight):
    """[G, tiles, depth, 16] as [G, depth, columns of all tiles]; so the functions below."""
    return op.Reshape(op.Transpose(weight, perm=[0, 2, 1, 3]), op.Constant(value_ints=[0, 0, -1]))


@script(dspark, default_opset=op)
def WeightFloat16(weight):
    return dspark.WeightFloat32(op.Cast(weight, to=1))


@script(dspark, default_opset=op)
def WeightBFloat16(weight):
    turned = op.Transpose(op.Cast(weight, to=1), perm=[0, 2, 4, 1, 3])
    return dspark.JoinDepth(op.Reshape(turned, op.Constant(value_ints=[0, 0, 0, -1])))


@script(dspark, default_opset=op)
def BlockColumns(x):
    """Scales or minima [G, tiles, blocks, 16] as [G, blocks, columns of all tiles]."""
    return op.Reshape(op.Transpose(op.Cast(x, to=1), perm=[0, 2, 1, 3]), op.Constant(value_ints=[0, 0, -1]))


@script(dspark, default_opset=op)
def ByteColumns(weight):
    """[G, tiles, blocks, block / 4, 16, 4] as floats [G, blocks, block, columns of all tiles]."""
    turned = op.Transpose(op.Cast(weight, to=1), perm=[0, 2, 3, 5, 1, 4])
    flat = op.Reshape(turned, op.Constant(value_ints=[0, 0, 0, 0, -1]))
    return op.Reshape(
        flat,
        op.Concat(op.Shape(flat, start=0, end=2), op.Constant(value_ints=[-1]), op.Shape(flat, start=-1), axis=0),
    )


@script(dspark, default_opset=op)
def NibbleColumns(weight):
    """[G, tiles, blocks, block / 8, 16, 4] of two nibbles as floats [G, blocks, block, columns of all tiles]."""
    axis = op.Constant(value_ints=[4])
    low = op.BitwiseAnd(weight, op.Cast(op.Constant(value_int=15), to=2))
    high = op.BitShift(weight, op.Cast(op.Constant(value_int=4), to=2), direction="RIGHT")
    both = op.Cast(op.Concat(op.Unsqueeze(low, axis), op.Unsqueeze(high, axis), axis=4), to=1)
    flat = op.Reshape(op.Transpose(both, perm=[0, 2, 3, 4, 6, 1, 5]), op.Constant(value_ints=[0, 0, 0, 0, 0, -1]))
    return op.Reshape(
        flat,
        op.Concat(op.Shape(flat, start=0, end=2), op.Constant(value_ints=[-1]), op.Shape(flat, start=-1), axis=0),
    )


@script(dspark, default_opset=op)
def Scaled(q, scale):
    """Steps [G, blocks, block, columns] times scales."""
    return dspark.JoinDepth(op.Mul(q, op.Unsqueeze(dspark.BlockColumns(scale), op.Constant(value_ints=[2]))))


@script(dspark, default_opset=op)
def ScaledAbove(q, scale, minimum):
    """Steps times scales, plus minima."""
    axis = op.Constant(value_ints=[2])
    scaled = op.Mul(q, op.Unsqueeze(dspark.BlockColumns(scale), axis))
    return dspark.JoinDepth(op.Add(scaled, op.Unsqueeze(dspark.BlockColumns(minimum), axis)))


@script(dspark, default_opset=op)
def WeightInt8(weight, scale):
    return dspark.Scaled(op.Sub(dspark.ByteColumns(weight), 128.0), scale)


@script(dspark, default_opset=op)
def WeightInt8Minimum(weight, scale, minimum):
    return dspark.ScaledAbove(dspark.ByteColumns(weight), scale, minimum)


@script(dspark, default_opset=op)
def WeightInt4(weight, scale):
    return dspark.Scaled(op.Sub(dspark.NibbleColumns(weight), 8.0), scale)


@script(dspark, default_opset=op)
def WeightInt4Minimum(weight, scale, minimum):
    return dspark.ScaledAbove(dspark.NibbleColumns(weight), scale, minimum)


@script(dspark, default_opset=op)
def RoundTo(x, m):
    """``x`` in 127 steps of which ``m`` is the last; 0 where ``m`` is next to nothing."""
    small = m < 7.888609052210118e-31
    steps = op.Clip(op.Round(x * (127.0 / op.Where(small, 1.0, m))), -127.0, 127.0)
    return steps * op.Where(small, 0.0, m / 127.0)


@script(dspark, default_opset=op)
def ProductW8A8(x, weight, scale, N: int, range: float = 0.0):
    last = op.Constant(value_ints=[-1])
    m = op.Where(op.Constant(value_float=range) > 0.0, op.Constant(value_float=range), op.ReduceMax(op.Abs(x), last))
    steps = op.Transpose(op.Cast(weight, to=1) - 128.0, perm=[1, 3, 0, 2])
    flat = op.Reshape(steps, op.Concat(last, op.Shape(op.Reshape(scale, last)), axis=0))
    w = op.Mul(flat, op.Reshape(scale, last))
    end = op.Concat(op.Shape(x, start=-1), op.Reshape(op.Constant(value_int=N), last), axis=0)
    return op.MatMul(dspark.RoundTo(x, m), op.Slice(w, op.Constant(value_ints=[0, 0]), end))


@script(dspark, default_opset=op)
def Heads(x, heads, width, offset):
    """Columns of ``heads`` heads of ``width`` from ``offset`` on, as [batch, heads, tokens, width]."""
    flat = op.Reshape(x, op.Constant(value_ints=[0, 0, -1]))
    part = op.Slice(flat, offset, offset + heads * width, op.Constant(value_ints=[2]))
    split = op.Reshape(part, op.Concat(op.Constant(value_ints=[0, 0]), heads, width, axis=0))
    return op.Transpose(split, perm=[0, 2, 1, 3])


@script(dspark, default_opset=op)
def TurnHalves(x, c, s):
    """Rotary embedding over columns (i, i + R / 2) of ``x`` [..., R]; ``c``, ``s`` [..., R / 2]."""
    a, b = op.Split(x, axis=-1, num_outputs=2)
    return op.Concat(a * c - b * s, b * c + a * s, axis=-1)


@script(dspark, default_opset=op)
def TurnPairs(x, c, s):
    """Rotary embedding over neighbouring columns."""
    last = op.Constant(value_ints=[-1])
    shape = op.Shape(x)
    pairs = op.Reshape(x, op.Concat(op.Shape(c), op.Constant(value_ints=[2]), axis=0))
    a = op.Gather(pairs, 0, axis=-1)
    b = op.Gather(pairs, 1, axis=-1)
    turned = op.Concat(op.Unsqueeze(a * c - b * s, last), op.Unsqueeze(b * c + a * s, last), axis=-1)
    return op.Reshape(turned, shape)


@script(dspark, default_opset=op)
def Turn(x, cos, sin, position_ids, interleaved: int):
    """``x`` [batch, heads, tokens, width] with its first columns turned; ``cos`` by row, or a table of positions."""
    last = op.Constant(value_ints=[-1])
    one = op.Constant(value_ints=[1])
    half = op.Shape(cos, start=-1)
    ids = op.Shape(position_ids)
    added = op.Shape(position_ids, start=1)
    first = added - op.Shape(x, start=2, end=3)  # of the rows that ask, which are the last
    if op.Squeeze(op.Shape(op.Shape(cos))) == 2:
        c3 = op.Gather(cos, position_ids)
        s3 = op.Gather(sin, position_ids)
    else:
        c3 = op.Reshape(cos, op.Concat(ids, half, axis=0))
        s3 = op.Reshape(sin, op.Concat(ids, half, axis=0))
    heads = op.Concat(op.Shape(x, start=0, end=3), half, axis=0)
    c = op.Expand(op.Unsqueeze(op.Slice(c3, first, added, one), one), heads)
    s = op.Expand(op.Unsqueeze(op.Slice(s3, first, added, one), one), heads)
    end = half * 2
    head = op.Slice(x, op.Constant(value_ints=[0]), end, last)
    rest = op.Slice(x, end, op.Shape(x, start=-1), last)
    if op.Constant(value_int=interleaved) == 1:  # noqa: SIM108  # a branch of the graph
        turned = dspark.TurnPairs(head, c, s)
    else:
        turned = dspark.TurnHalves(head, c, s)
    return op.Concat(turned, rest, axis=-1)


@script(dspark, default_opset=op)
def CachedAttention(q, k, v, past_key, past_value, attention_mask, write_indices, scale: float, softcap: float):
    """Update of the cache, then attention over the slots that the mask speaks of."""
    present_key = op.TensorScatter(past_key, k, write_indices, axis=2)
    present_value = op.TensorScatter(past_value, v, write_indices, axis=2)
    zero, two = op.Constant(value_ints=[0]), op.Constant(value_ints=[2])
    length = op.Shape(attention_mask, start=3)
    keys = op.Slice(present_key, zero, length, two)
    values = op.Slice(present_value, zero, length, two)
    out = op.Attention(q, keys, values, attention_mask, scale=scale, softcap=softcap)
    y = op.Reshape(op.Transpose(out, perm=[0, 2, 1, 3]), op.Constant(value_ints=[0, 0, -1]))
    return y, present_key, present_value


@script(dspark, default_opset=op)
def SinkScores(q, k, v, past_key, past_value, attention_mask, write_indices, sinks, scale: float, softcap: float):
    """The same with one more score a head, which has no value."""
    present_key = op.TensorScatter(past_key, k, write_indices, axis=2)
    present_value = op.TensorScatter(past_value, v, write_indices, axis=2)
    zero, two, last = op.Constant(value_ints=[0]), op.Constant(value_ints=[2]), op.Constant(value_ints=[-1])
    length = op.Shape(attention_mask, start=3)
    one = op.Constant(value_ints=[1])
    # Heads that share keys, side by side: [batch, kv_heads, group, tokens, width].
    group = op.Shape(q, start=1, end=2) / op.Shape(k, start=1, end=2)
    cut = op.Concat(op.Shape(k, start=0, end=2), group, op.Shape(q, start=2), axis=0)
    keys = op.Unsqueeze(op.Slice(present_key, zero, length, two), two)
    values = op.Unsqueeze(op.Slice(present_value, zero, length, two), two)
    raw = op.MatMul(op.Reshape(q, cut) * scale, op.Transpose(keys, perm=[0, 1, 2, 4, 3]))
    if op.Constant(value_float=softcap) > 0.0:  # noqa: SIM108
        capped = op.Tanh(raw / softcap) * softcap
    else:
        capped = op.Identity(raw)
    allowed = op.Unsqueeze(attention_mask, one)
    scores = op.Where(allowed, capped, -1e30)
    by_head = op.Concat(one, op.Shape(k, start=1, end=2), group, one, one, axis=0)
    sink = op.Reshape(sinks, by_head)
    m = op.Max(op.ReduceMax(scores, last), sink)
    weights = op.Where(allowed, op.Exp(scores - m), 0.0)
    out = op.MatMul(weights, values) / (op.ReduceSum(weights, last) + op.Exp(sink - m))
    back = op.Concat(op.Shape(q, start=0, end=3), last, axis=0)
    y = op.Reshape(op.Transpose(op.Reshape(out, back), perm=[0, 2, 1, 3]), op.Constant(value_ints=[0, 0, -1]))
    return y, present_key, present_value


@script(dspark, default_opset=op)
def RMSNorm(x, weight, epsilon: float = 1e-5):
    return op.RMSNormalization(x, weight, axis=-1, epsilon=epsilon)


@script(dspark, default_opset=op)
def SkipRMSNorm(x, skip, weight, epsilon: float = 1e-5):
    total = op.Add(x, skip)
    y = op.RMSNormalization(total, weight, axis=-1, epsilon=epsilon)
    return y, total


@script(dspark, default_opset=op)
def LayerNorm(x, weight, bias, epsilon: float = 1e-5):
    return op.LayerNormalization(x, weight, bias, axis=-1, epsilon=epsilon)


@script(dspark, default_opset=op)
def Silu(x):
    return op.Mul(x, op.Sigmoid(x))


@script(dspark, default_opset=op)
def Gelu(x):
    return op.Gelu(x)


@script(dspark, default_opset=op)
def GeluTanh(x):
    return op.Gelu(x, approximate="tanh")


@script(dspark, default_opset=op)
def Sigmoid(x):
    return op.Sigmoid(x)


@script(dspark, default_opset=op)
def Tanh(x):
    return op.Tanh(x)


@script(dspark, default_opset=op)
def Softcap(x, cap: float):
    return op.Mul(op.Tanh(x / cap), cap)


_SCRIPTS = {
    function.name: function
    for function in (
        JoinDepth, WeightFloat32, WeightFloat16, WeightBFloat16, BlockColumns, ByteColumns, NibbleColumns, Scaled,
        ScaledAbove, WeightInt8, WeightInt8Minimum, WeightInt4, WeightInt4Minimum, RoundTo,  ProductW8A8,
        Heads, TurnHalves, TurnPairs, Turn, CachedAttention, SinkScores, RMSNorm, SkipRMSNorm, LayerNorm, Silu, Gelu,
        GeluTanh, Sigmoid, Tanh, Softcap,
    )
}  # fmt: skip

_HEADER = f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}, "{DOMAIN}" : 1]>\n'
_PRODUCT = """
{kind}{format} <N> (x, {inputs}) => (y) {{
    zero = Constant <value_ints = [0]> ()
    last = Constant <value_ints = [-1]> ()
    {grouped}
    w = dspark.Weight{format} ({groups})
    start = Constant <value_ints = [0, 0]> ()
    axes = Constant <value_ints = [1, 2]> ()
    depth = Shape <start = -1> (x)
    n = Constant <value_int: int = @N> ()
    width = Reshape (n, last)
    end = Concat <axis = 0> (depth, width)
    cut = Slice (w, start, end, axes)
    {product}
}}"""
_LOOKUP = """
Lookup{format} <{attributes}> (ids, {inputs}) => (y) {{
    zero = Constant <value_ints = [0]> ()
    last = Constant <value_ints = [-1]> ()
    {grouped}
    w = dspark.Weight{format} ({groups})
    {depth}
    end = Reshape (k, last)
    columns = Squeeze (w, zero)
    cut = Slice (columns, zero, end, zero)
    rows = Transpose <perm = [1, 0]> (cut)
    y = Gather (rows, ids)
}}"""
_ATTENTION = """
{name} <heads, query_offset, key_offset, value_offset, interleaved, scale, softcap>
    (query, key, value, past_key, past_value, attention_mask, write_indices, position_ids{extra})
    => (y, present_key, present_value) {{
    last = Constant <value_ints = [-1]> ()
    h = Constant <value_int: int = @heads> ()
    head_count = Reshape (h, last)
    kv_heads = Shape <start = 1, end = 2> (past_key)
    width = Shape <start = 3> (past_key)
    value_width = Shape <start = 3> (past_value)
    qo = Constant <value_int: int = @query_offset> ()
    ko = Constant <value_int: int = @key_offset> ()
    vo = Constant <value_int: int = @value_offset> ()
    query_start = Reshape (qo, last)
    key_start = Reshape (ko, last)
    value_start = Reshape (vo, last)
    q0 = dspark.Heads (query, head_count, width, query_start)
    k0 = dspark.Heads (key, kv_heads, width, key_start)
    v = dspark.Heads (value, kv_heads, value_width, value_start)
    {turned}
    y, present_key, present_value = dspark.{inner} <scale: float = @scale, softcap: float = @softcap>
        (q, k, v, past_key, past_value, attention_mask, write_indices{sinks})
}}"""
_GATE = """
{act}Gate (x) => (y) {{
    gate, up = Split <axis = -1, num_outputs = 2> (x)
    acted = dspark.{act} (gate)
    y = Mul (acted, up)
}}"""
_GATED = """
{act}Product (gate, up) => (y) {{
    acted = dspark.{act} (gate)
    y = Mul (acted, up)
}}"""


def _texts() -> list[str]:
    texts = []
    for name, parts in _FORMATS.items():
        inputs, groups = ", ".join(parts), ", ".join(f"g_{part}" for part in parts)
        facts = {"format": name, "inputs": inputs, "groups": groups}
        plain = "\n    ".join(f"g_{part} = Unsqueeze ({part}, zero)" for part in parts)
        chosen = "\n    ".join(f"g_{part} = Gather ({part}, expert)" for part in parts)
        by_expert = "one = Constant <value_ints = [1]> ()\n    single = Unsqueeze (x, one)\n    "
        by_expert += "out = MatMul (single, cut)\n    y = Squeeze (out, one)"
        by_row = "flat = Squeeze (cut, zero)\n    y = MatMul (x, flat)"
        texts.append(_PRODUCT.format(**facts, kind="Product", grouped=plain, product=by_row))
        facts_of_experts = {**facts, "inputs": f"expert, {inputs}"}
        texts.append(_PRODUCT.format(**facts_of_experts, kind="Experts", grouped=chosen, product=by_expert))
        depth = "k = Constant <value_int: int = @K> ()" if name == "BFloat16" else "k = Shape <start = 1, end = 2> (w)"
        attributes = "N, K" if name == "BFloat16" else "N"
        texts.append(_LOOKUP.format(**facts, grouped=plain, depth=depth, attributes=attributes))
    for name, rotary, sink in (
        ("SequenceAttention", False, False),
        ("RotaryAttention", True, False),
        ("SinkAttention", False, True),
        ("RotarySinkAttention", True, True),
    ):
        turn = "{0} = dspark.Turn <interleaved: int = @interleaved> ({0}0, cos, sin, position_ids)"
        keep = "{0} = Identity ({0}0)"
        turned = "\n    ".join((turn if rotary else keep).format(part) for part in "qk")
        extra = (", cos, sin" if rotary else "") + (", sinks" if sink else "")
        inner, sinks = ("SinkScores", ", sinks") if sink else ("CachedAttention", "")
        texts.append(_ATTENTION.format(name=name, extra=extra, turned=turned, inner=inner, sinks=sinks))
    for act in ("Silu", "Gelu", "GeluTanh"):
        texts += [_GATE.format(act=act), _GATED.format(act=act)]
    return texts


@functools.cache
def _functions() -> dict[str, onnx.FunctionProto]:
    made = {name: function.to_function_proto() for name, function in _SCRIPTS.items()}
    for text in _texts():
        function = onnx.parser.parse_function(_HEADER + text)
        made[function.name] = function
    return made


def kernel_names() -> frozenset[str]:
    """Operators with a kernel; the other functions are parts of their bodies."""
    drafts = {PLAIN, *(f"{WITH_MARKOV}{form}" for form in (*_FORMATS, "W8A8"))}  # each graph has a body of its own
    parts = set(_SCRIPTS) - {"ProductW8A8", "RMSNorm", "SkipRMSNorm", "LayerNorm", "Silu", "Gelu", "GeluTanh"}
    return (frozenset(_functions()) | drafts) - (parts - {"Sigmoid", "Tanh", "Softcap"})


def add_kernel_functions(model: ir.Model) -> ir.Model:
    """Give ``model`` the functions of every kernel it calls, and those that they call. Returns ``model``."""
    graphs = [*model.graphs(), *(function.graph for function in model.functions.values())]
    wanted = [node.op_type for graph in graphs for node in graph if node.domain == DOMAIN]
    known = _functions()
    added: set[str] = set()
    while wanted:
        name = wanted.pop()
        if name in added or name not in known:
            continue
        added.add(name)
        wanted += _called(known[name].node)
    for name in sorted(added):
        function = cast("ir.Function", ir.from_proto(known[name]))
        function.opset_imports[DOMAIN] = 1
        model.functions[function.identifier()] = function
    return model


def _called(nodes: object) -> list[str]:
    names = []
    for node in nodes:  # type: ignore[attr-defined]  # a repeated field
        if node.domain == DOMAIN:
            names.append(node.op_type)
        for attribute in node.attribute:
            if attribute.HasField("g"):
                names += _called(attribute.g.node)
    return names
