"""Verification as ONNX functions in the domain ``dspark``, made of standard operators only.

They do exactly what :mod:`dspark_runtime.speculation.verify` and :mod:`dspark_runtime.speculation.sampling` do, and
can stand alone (the ``verify`` graph) or be called inside a target graph, so that only a few integers leave the device.

``VerifyTree``: deterministic drafts, any tree.

| input | dtype, shape | |
|---|---|---|
| logits | float32 [batch, rows, vocab] | of the verify pass |
| tokens | int64 [batch, rows] | ``input_ids`` of the pass: anchor, drafts, padding |
| ancestors | bool [batch, rows, rows] | the tree's block of the attention mask; a padding row sees itself only |
| uniforms | float32 [batch, rows] | in [0, 1): the random number of the position after each row |
| temperature, top_p, min_p | float32 [batch] | 0, 1, 0 switch them off |
| top_k | int64 [batch] | 0 switches it off |

| output | dtype, shape | |
|---|---|---|
| path | int64 [batch, rows] | accepted rows, the anchor first, then -1 |
| emitted | int64 [batch, rows] | emitted tokens, the correction or bonus token last, then -1 |
| accepted | int64 [batch] | accepted drafts; one more token is emitted |

``VerifyChain``: a chain drawn at random. Instead of ``ancestors`` it takes ``draft_probs`` float32 [batch, rows - 1,
vocab], ``drafted`` int64 [batch] (drafts of each sequence; the rows after them are padding) and ``accept_uniforms``
float32 [batch, rows - 1].

Absent on purpose: state, random number generation (the caller owns the counter), penalties and grammars.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnxscript import script
from onnxscript.values import Opset

from dspark_runtime.bundle.contract import (
    OPSET,
    VERIFY,
    VERIFY_CHAIN_INPUTS,
    VERIFY_INPUTS,
    VERIFY_OUTPUTS,
    TensorSpec,
)
from dspark_runtime.bundle.engine_names import NAMESPACE
from dspark_runtime.speculation.sampling import GREEDY_BELOW
from dspark_runtime.speculation.verify import MIN_RESIDUAL

op = Opset("", OPSET)
dspark = Opset(NAMESPACE, 1)


@script(dspark, default_opset=op)
def FilterWeights(weights, top_k, top_p, min_p):
    """``weights`` [batch, rows, vocab] with 0 where a filter drops a token."""
    vocab = op.Shape(weights, start=2)
    wide = op.Constant(value_ints=[1, 2])
    last = op.Constant(value_ints=[-1])
    # Largest first, ties by the lower id: all filters keep a prefix of this order.
    ordered, ids = op.TopK(weights, vocab, axis=-1, largest=1, sorted=1)
    rank = op.Range(0, op.Squeeze(vocab), 1)
    k = op.Unsqueeze(top_k, wide)
    inside = op.Where(op.Or(k <= 0, rank < k), ordered, 0.0)
    before = op.CumSum(inside, -1, exclusive=1)
    p = op.Unsqueeze(top_p, wide)
    nucleus = op.Or(p >= 1.0, before < p * op.ReduceSum(inside, last, keepdims=1))
    likely = ordered >= op.Unsqueeze(min_p, wide) * op.ReduceMax(ordered, last, keepdims=1)
    passed = op.Where(op.And(nucleus, likely), inside, 0.0)
    return op.ScatterElements(op.Mul(weights, 0.0), ids, passed, axis=-1)


@script(dspark, default_opset=op)
def TargetWeights(logits, temperature, top_k, top_p, min_p):
    """Unnormalized weights [batch, rows, vocab] of the filtered target distribution; one-hot at temperature 0."""
    last = op.Constant(value_ints=[-1])
    t = op.Unsqueeze(temperature, op.Constant(value_ints=[1, 2]))
    greedy = t < GREEDY_BELOW
    weights = op.Exp((logits - op.ReduceMax(logits, last, keepdims=1)) / op.Where(greedy, 1.0, t))
    # Sorting a vocabulary is the most expensive step, so it is done only where some sequence filters.
    wanted = op.Or(op.Or(top_k > 0, top_p < 1.0), min_p > 0.0)
    if op.ReduceMax(op.Cast(wanted, to=7), keepdims=0) > 0:
        kept = dspark.FilterWeights(weights, top_k, top_p, min_p)
    else:
        kept = op.Identity(weights)
    ids = op.Range(0, op.Squeeze(op.Shape(logits, start=2)), 1)
    one_hot = op.Cast(op.Equal(ids, op.ArgMax(logits, axis=-1, keepdims=1)), to=1)
    return op.Where(greedy, one_hot, kept)


@script(dspark, default_opset=op)
def InverseCdf(weights, uniforms):
    """First id at which the cumulative weight [..., vocab] passes ``uniforms`` [...] times the total."""
    last = op.Constant(value_ints=[-1])
    cumulative = op.CumSum(weights, -1)
    total = op.ReduceMax(cumulative, last, keepdims=1)
    goal = op.Unsqueeze(uniforms, last) * total
    passed = op.ReduceSum(op.Cast(cumulative <= goal, to=7), last, keepdims=0)
    ids = op.Range(0, op.Squeeze(op.Shape(weights, start=-1)), 1)
    final = op.ReduceMax(op.Where(weights > 0.0, ids, 0), last, keepdims=0)
    return op.Min(passed, final)


@script(dspark, default_opset=op)
def FollowTree(drawn, tokens, ancestors):
    """Path, emitted tokens and accepted drafts, given the target's draw after every row [batch, rows]."""
    last = op.Constant(value_ints=[-1])
    middle = op.Constant(value_ints=[1])
    rows = op.Shape(tokens, start=1)
    row_ids = op.Range(0, op.Squeeze(rows), 1)
    column = op.Unsqueeze(row_ids, last)
    depth = op.ReduceSum(op.Cast(ancestors, to=7), last, keepdims=0)
    # The parent is the deepest row a row sees besides itself.
    above = op.And(ancestors, op.Not(op.Equal(row_ids, column)))
    parent = op.ArgMax(op.Where(above, op.Unsqueeze(depth, middle), 0), axis=-1, keepdims=0)
    expected = op.GatherElements(drawn, parent, axis=1)
    anchor = op.Equal(row_ids, 0)
    agrees = op.Or(anchor, op.And(op.Equal(tokens, expected), depth > 1))
    # A row is accepted when it and all rows above it agree with the draw before them.
    misses = op.And(ancestors, op.Unsqueeze(op.Not(agrees), middle))
    accepted_rows = op.Equal(op.ReduceSum(op.Cast(misses, to=7), last, keepdims=0), 0)
    accepted = op.ReduceSum(op.Cast(accepted_rows, to=7), last, keepdims=0) - 1
    # Siblings differ, so each depth holds at most one accepted row.
    here = op.And(op.Unsqueeze(accepted_rows, middle), op.Equal(op.Unsqueeze(depth, middle), column + 1))
    path = op.ReduceMax(op.Where(here, row_ids, -1), last, keepdims=0)
    emitted = op.Where(path >= 0, op.GatherElements(drawn, op.Max(path, 0), axis=1), -1)
    return path, emitted, accepted


@script(dspark, default_opset=op)
def VerifyTree(logits, tokens, ancestors, uniforms, temperature, top_k, top_p, min_p):
    """See the module's text."""
    weights = dspark.TargetWeights(logits, temperature, top_k, top_p, min_p)
    drawn = dspark.InverseCdf(weights, uniforms)
    path, emitted, accepted = dspark.FollowTree(drawn, tokens, ancestors)
    return path, emitted, accepted


@script(dspark, default_opset=op)
def VerifyChain(logits, tokens, draft_probs, drafted, accept_uniforms, draw_uniforms, temperature, top_k, top_p, min_p):
    """See the module's text."""
    last = op.Constant(value_ints=[-1])
    middle = op.Constant(value_ints=[1])
    weights = dspark.TargetWeights(logits, temperature, top_k, top_p, min_p)
    target = weights / op.ReduceSum(weights, last, keepdims=1)
    rows = op.Shape(tokens, start=1)
    row_ids = op.Range(0, op.Squeeze(rows), 1)
    drafts = op.Unsqueeze(op.Slice(tokens, [1], rows, [1]), last)
    q = op.Squeeze(op.GatherElements(draft_probs, drafts, axis=2), last)
    p = op.Squeeze(op.GatherElements(op.Slice(target, [0], rows - 1, [1]), drafts, axis=2), last)
    real = op.Slice(row_ids, [0], rows - 1) < op.Unsqueeze(drafted, middle)
    rejected = op.Not(op.And(accept_uniforms * q < p, real))
    # Leading acceptances: before the first rejection the running count of rejections is 0.
    standing = op.Equal(op.CumSum(op.Cast(rejected, to=7), 1), 0)
    accepted = op.ReduceSum(op.Cast(standing, to=7), last, keepdims=0)
    # The row after the accepted ones: what remains of the target there, or all of it after the last draft.
    at = op.Unsqueeze(op.Unsqueeze(accepted, middle), last)
    vocab = op.Shape(logits, start=2)
    index = op.Expand(at, op.Concat(op.Shape(at, end=2), vocab, axis=0))
    target_here = op.Squeeze(op.GatherElements(target, index, axis=1), middle)
    padded = op.Concat(draft_probs, op.Mul(op.Slice(target, [0], [1], [1]), 0.0), axis=1)
    draft_here = op.Squeeze(op.GatherElements(padded, index, axis=1), middle)
    refused = op.Unsqueeze(accepted < drafted, middle)
    residual = op.Max(target_here - op.Where(refused, draft_here, 0.0), 0.0)
    enough = op.ReduceSum(residual, last, keepdims=1) > MIN_RESIDUAL
    rest = op.Where(enough, residual, target_here)
    uniform = op.Squeeze(op.GatherElements(draw_uniforms, op.Unsqueeze(accepted, middle), axis=1), middle)
    final = op.Unsqueeze(dspark.InverseCdf(rest, uniform), middle)
    count = op.Unsqueeze(accepted, middle)
    shifted = op.Concat(op.Slice(tokens, [1], rows, [1]), op.Slice(tokens, [0], [1], [1]), axis=1)
    emitted = op.Where(row_ids < count, shifted, op.Where(op.Equal(row_ids, count), final, -1))
    path = op.Where(row_ids <= count, row_ids, -1)
    return path, emitted, accepted


def verify_functions() -> list[ir.Function]:
    """All functions of the domain ``dspark``, to be added to a model that calls one of them."""
    scripts = (FilterWeights, TargetWeights, InverseCdf, FollowTree, VerifyTree, VerifyChain)
    functions = [ir.from_proto(function.to_function_proto()) for function in scripts]
    for function in functions:
        function.opset_imports[NAMESPACE] = 1  # not detected automatically where only a branch calls another function
    return functions


def build_verify_model() -> ir.Model:
    """The ``verify`` graph: ``VerifyTree`` as a separate model, all dimensions dynamic."""
    return _model(VERIFY, "VerifyTree", VERIFY_INPUTS)


def build_verify_chain_model() -> ir.Model:
    """``VerifyChain`` as a separate model, all dimensions dynamic; ``drafts`` is ``rows`` - 1."""
    return _model("verify_chain", "VerifyChain", VERIFY_CHAIN_INPUTS)


def _model(name: str, function: str, inputs: Sequence[TensorSpec]) -> ir.Model:
    ins, outs = [_value(spec) for spec in inputs], [_value(spec) for spec in VERIFY_OUTPUTS]
    call = ir.Node(NAMESPACE, function, inputs=ins, outputs=outs, name=function)
    graph = ir.Graph(ins, outs, nodes=[call], name=name, opset_imports={"": OPSET, NAMESPACE: 1})
    return ir.Model(graph, ir_version=11, functions=verify_functions(), producer_name="dspark-export")


def _value(spec: TensorSpec) -> ir.Value:
    dtype = ir.DataType.from_numpy(np.dtype(spec.dtype))
    return ir.Value(name=spec.name, type=ir.TensorType(dtype), shape=ir.Shape(spec.shape))
