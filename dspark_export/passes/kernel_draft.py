"""Sequence kernels: one operator in place of everything a block drafter does after its logits.

Slot by slot it adds the Markov head's correction, takes the most likely tokens or draws one, and follows the most
likely texts: about 150 small operators. The operator is a function whose body is those operators, as they were traced.
What :mod:`dspark_export.drafts.graphs.block` says of the graph in :data:`match.DRAFTS` decides whether there is a
kernel for it: for a head without a state of its own, and for no head at all.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from dspark_export.passes import match
from dspark_export.passes.inner_values import hide_inner_values
from dspark_runtime.backends.ort_kernels import DOMAIN
from dspark_runtime.bundle import draft_contract as names
from dspark_runtime.bundle.contract import OPSET

PLAIN, WITH_MARKOV = "BlockDraft", "MarkovDraft"
_OUTPUTS = (
    names.DRAFT_TOKENS,
    names.DRAFT_PROBS,
    names.CANDIDATE_TOKENS,
    names.CANDIDATE_PROBS,
    names.BEAM_TOKENS,
    names.BEAM_PROBS,
    names.BEAM_PARENTS,
)
_OFTEN_ABSENT = {
    names.BEAM_TOKENS: ir.DataType.INT64,
    names.BEAM_PROBS: ir.DataType.FLOAT,
    names.BEAM_PARENTS: ir.DataType.INT64,
}
_INPUTS = (names.ANCHOR_IDS, names.TEMPERATURE, names.UNIFORMS)
_MOST_CANDIDATES = 64
_SMALL = 1 << 12  # elements of a constant that a body may have
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


class KernelDraft(ir.passes.InPlacePass):
    """Rewrites what follows ``base_logits`` into ``BlockDraft`` or ``MarkovDraft...``; runs after the other passes."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Return the same model and whether it was rewritten. Inner values of a drafter's graph are hidden."""
        kind = model.metadata_props.get(match.DRAFTS)
        outputs = {value.name: value for value in model.graph.outputs}
        if names.BASE_LOGITS not in outputs:
            return ir.passes.PassResult(model, modified=False)
        facts = _facts(model.graph, outputs, kind == "vanilla") if kind in ("none", "vanilla") else None
        hide_inner_values(model)
        if facts is not None:
            _replace(model, facts)
        match.remove_unused(model)
        return ir.passes.PassResult(model, modified=True)


@dataclass
class _Facts:
    """``inputs``: of the operator, by the name its body gives them, None for those that there are not.

    ``region``: nodes of the body in order; ``constants``: small ones they read; ``batch``: values that are the number
    of sequences, which the body takes from the anchors; ``results``: the operator's outputs.
    """

    operator: str
    inputs: dict[str, ir.Value | None]
    results: list[ir.Value | None]
    candidates: int
    beams: int
    region: list[ir.Node] = field(default_factory=list)
    constants: list[ir.Value] = field(default_factory=list)
    batch: list[ir.Value] = field(default_factory=list)


def _facts(graph: ir.Graph, outputs: dict[str | None, ir.Value], markov: bool) -> _Facts | None:
    results = [outputs.get(name) for name in _OUTPUTS]
    results.append(_markov_rows(graph, outputs) if markov else None)
    candidates, slots = match.last_dim(outputs[names.CANDIDATE_TOKENS]), outputs[names.CANDIDATE_TOKENS].shape[1]
    if not isinstance(candidates, int) or not isinstance(slots, int) or candidates > _MOST_CANDIDATES:
        return None
    beams = outputs.get(names.BEAM_TOKENS)
    nodes = 0 if beams is None else match.last_dim(beams)
    width = 0 if nodes == 0 else 1 if slots == 1 else (nodes - candidates) // ((slots - 1) * candidates)
    given = {value.name: value for value in graph.inputs}
    inputs: dict[str, ir.Value | None] = {"base_logits": outputs[names.BASE_LOGITS]}
    inputs |= {name: given[name] for name in _INPUTS}
    facts = _Facts(PLAIN, inputs, results, candidates, width)
    if not _walk(graph, facts):
        return None
    return facts if _roles(facts, markov) else None


def _markov_rows(graph: ir.Graph, outputs: dict[str | None, ir.Value]) -> ir.Value | None:
    """What the confidences take from the Markov head, if they do: rows of its table."""
    hidden = outputs.get(names.BLOCK_HIDDEN)
    for use in hidden.uses() if hidden is not None else ():
        node = use.node
        if node.op_type == "Concat" and len(node.inputs) == 2 and node.inputs[0] is hidden:
            return node.inputs[1]
    return None


def _walk(graph: ir.Graph, facts: _Facts) -> bool:
    """Find the nodes between the inputs and the results; False where they read anything else."""
    known = {id(value) for value in facts.inputs.values()}
    pending = [value for value in facts.results if value is not None]
    nodes: set[ir.Node] = set()
    seen: set[int] = set()
    while pending:
        value = pending.pop()
        if id(value) in known or id(value) in seen:
            continue
        seen.add(id(value))
        if value.is_initializer():
            facts.constants.append(value)
            continue
        node = value.producer()
        if node is None:
            return False
        if _counts_sequences(node):
            facts.batch.append(value)
            continue
        if node not in nodes:
            nodes.add(node)
            pending.extend(v for v in node.inputs if v is not None)
    facts.region = [node for node in graph if node in nodes]
    return True


def _counts_sequences(node: ir.Node) -> bool:
    """Whether ``node`` is the first dimension of some input of the graph."""
    first = node.attributes.get_int("start", 0) == 0 and node.attributes.get_int("end", 0) == 1
    return node.op_type == "Shape" and first and node.inputs[0] is not None and node.inputs[0].is_graph_input()


def _roles(facts: _Facts, markov: bool) -> bool:
    """Say which constants are the operator's inputs; False where some are that no kernel knows."""
    constants = {id(value): value for value in facts.constants}

    def take(name: str, value: ir.Value | None) -> None:
        facts.inputs[name] = value
        if value is not None:
            constants.pop(id(value), None)

    logits = facts.inputs["base_logits"]
    vocab = match.last_dim(logits) if logits is not None else None
    never = [v for v in facts.constants if v.dtype == ir.DataType.FLOAT and _is(v, (vocab,))]
    ids = [
        v for v in facts.constants if v.dtype == ir.DataType.INT64 and _is(v, (vocab, 1)) and _in_domain(v, "Gather")
    ]
    if not isinstance(vocab, int) or len(never) > 1 or len(ids) > 1:
        return False
    take("forbidden", next(iter(never), None))
    take("target_ids", next(iter(ids), None))
    if markov:
        tables = [node for node in facts.region if node.op_type == "Gather" and _is_table(node.inputs[0])]
        products = [node for node in facts.region if node.domain == DOMAIN and node.op_type.startswith("Product")]
        anchors = [n.inputs[0] for n in tables if _is_anchor(n.inputs[1], facts)]
        drafted = [n.inputs[0] for n in tables if not _is_anchor(n.inputs[1], facts)] or anchors
        weights = {tuple(id(v) for v in node.inputs[1:]) for node in products}
        if len({id(v) for v in anchors}) != 1 or len({id(v) for v in drafted}) != 1 or len(weights) != 1:
            return False
        take("anchor_rows", anchors[0])
        take("drafted_rows", drafted[0])
        for name, value in zip(("weight", "scale", "minimum"), products[0].inputs[1:], strict=False):
            take(name, value)
        facts.operator = products[0].op_type.replace("Product", WITH_MARKOV)
    facts.constants = list(constants.values())
    return all(v.const_value is not None and v.const_value.size <= _SMALL for v in facts.constants)


def _is(value: ir.Value, shape: tuple[int | None, ...]) -> bool:
    return value.shape is not None and tuple(value.shape) == shape


def _in_domain(value: ir.Value, op_type: str) -> bool:
    return any(use.node.op_type == op_type and use.idx == 0 for use in value.uses())


def _is_table(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer() and match.rank(value) == 2 and value.dtype in _FLOATS


def _is_anchor(value: ir.Value | None, facts: _Facts) -> bool:
    unsqueeze = match.producer(value, "Unsqueeze")
    return unsqueeze is not None and unsqueeze.inputs[0] is facts.inputs[names.ANCHOR_IDS]


def _replace(model: ir.Model, facts: _Facts) -> None:
    graph = model.graph
    model.functions[(DOMAIN, facts.operator, "")] = _function(facts)
    empty = {
        name: match.add_initializer(graph, f"no_{name}", ir.tensor(np.zeros(0, dtype), name=f"no_{name}"))
        for name, dtype in (("forbidden", np.float32), ("target_ids", np.int64))
        if facts.inputs[name] is None
    }
    inputs = [empty[name] if value is None else value for name, value in facts.inputs.items()]
    attributes = {"candidates": facts.candidates, "beams": facts.beams}
    made = ir.node(
        facts.operator,
        inputs,
        attributes=attributes,
        domain=DOMAIN,
        num_outputs=len(facts.results),
        name=facts.operator,
    )
    last = max((v.producer() for v in facts.results if v is not None), key=list(graph).index)
    match.insert_before(last, [made])
    for old, new in zip(facts.results, made.outputs, strict=True):
        if old is not None:
            new.shape, new.type = old.shape, old.type
            match.replace_value(old, new)
    graph.sort()
    model.opset_imports[DOMAIN] = 1


def _function(facts: _Facts) -> ir.Function:
    """The operators of the region as the body of a function."""
    inner: dict[int, ir.Value] = {}
    inputs = []
    for name, value in facts.inputs.items():
        inputs.append(ir.Value(name=name))
        if value is not None:
            inner.setdefault(id(value), inputs[-1])
    made: list[ir.Node] = []
    for number, value in enumerate(facts.constants):
        tensor = ir.tensor(value.const_value.numpy(), name=f"constant_{number}")
        made.append(ir.node("Constant", [], attributes={"value": tensor}, num_outputs=1))
        inner[id(value)] = made[-1].outputs[0]
    for value in facts.batch:
        anchors = inner[id(facts.inputs[names.ANCHOR_IDS])]
        made.append(ir.node("Shape", [anchors], attributes={"start": 0, "end": 1}, num_outputs=1))
        inner[id(value)] = made[-1].outputs[0]
    for node in facts.region:
        copied = ir.Node(
            node.domain,
            node.op_type,
            [None if v is None else inner[id(v)] for v in node.inputs],
            attributes=list(node.attributes.values()),
            num_outputs=len(node.outputs),
        )
        made.append(copied)
        inner |= {id(old): new for old, new in zip(node.outputs, copied.outputs, strict=True)}
    outputs = []
    for name, value in zip((*_OUTPUTS, "markov_rows"), facts.results, strict=True):
        if value is None:
            nothing = ir.tensor(np.zeros(0, _OFTEN_ABSENT.get(name, ir.DataType.FLOAT).numpy()))
            made.append(ir.node("Constant", [], attributes={"value": nothing}, num_outputs=1))
        outputs.append(made[-1].outputs[0] if value is None else inner[id(value)])
    names_of = (f"v{i}" for i in range(1 << 20))
    for node in made:
        for value in node.outputs:
            value.name = next(names_of)
    graph = ir.Graph(inputs, outputs, nodes=made, opset_imports={"": OPSET, DOMAIN: 1}, name=facts.operator)
    attributes = [ir.Attr(name, ir.AttributeType.INT, None) for name in ("candidates", "beams")]
    return ir.Function(DOMAIN, facts.operator, graph=graph, attributes=attributes)
