"""Traces a model once and cuts its graphs from that trace.

Tracing runs the model's own forward through the seams, with a marker at the output of every decoder layer. A graph
contract then says which layers run, whose outputs are tapped and which cache tensors go in and out; cutting the trace
down to it is rewiring at the markers, so a second graph of the same model costs no second trace.
"""

from __future__ import annotations

import copy
from collections.abc import MutableSequence

import onnx_ir as ir
import onnx_ir.passes.common as common
import torch
from transformers import PretrainedConfig, PreTrainedModel

from dspark_export.tracing.example import example_inputs
from dspark_export.tracing.experts import TRACE_DOMAIN
from dspark_export.tracing.geometry import probe, skeleton
from dspark_export.tracing.operators import LAYER_NUMBER, LAYER_OUTPUT
from dspark_export.tracing.seams import CacheSeam, Pass, pairs, seamed
from dspark_export.tracing.tidy import remove_unreachable_nodes
from dspark_export.tracing.to_onnx import dynamic_shapes, match_contract, trace
from dspark_runtime.bundle.contract import HIDDEN_TAPS, GraphContract, decoder_contract
from dspark_runtime.errors import DsparkError, ExportError, UnsupportedArchitecture

EMBEDDING = -1
"""The tap number of the embedding's output, which is what layer 0 reads."""


class DecoderTrace:
    """The traced decoder of ``model``; weights are referenced, not copied.

    ``cache`` is the geometry of every layer's cache, ``dtype`` the model's in the contract's spelling, ``vocab_size``
    the rows of the output head (which may exceed the tokenizer's vocabulary).

    Raises:
        UnsupportedArchitecture: the model's attention or cache does not fit the contract.
        ExportError: torch cannot trace the model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.cache = probe(model.config)
        self.dtype = str(model.dtype).removeprefix("torch.")
        self.vocab_size = int(model.get_output_embeddings().weight.shape[0])
        self.hidden_size = int(model.config.get_text_config().hidden_size)
        contract = decoder_contract("decoder", self.cache, self.vocab_size, self.dtype)
        with seamed(model):
            self._trace = trace(_SeamedDecoder(model), contract, example_inputs(contract))

    @classmethod
    def of(cls, source: PreTrainedModel | DecoderTrace) -> DecoderTrace:
        """``source`` if it is a trace, its trace if it is a model."""
        return source if isinstance(source, cls) else cls(source)

    def cut(self, contract: GraphContract, layers: tuple[int, ...], taps: tuple[int, ...] = ()) -> ir.Model:
        """The graph that runs only ``layers`` and returns the outputs of ``taps`` (both ascending)."""
        model = self._trace.clone()
        model.graph.name = contract.name
        outputs = _rewire(model.graph, frozenset(layers))
        if taps:
            _add_taps(model.graph, [outputs[n] for n in taps])
        wanted = {spec.name for spec in contract.outputs}
        model.graph.outputs[:] = [value for value in model.graph.outputs if value.name in wanted]
        remove_unreachable_nodes(model.graph)
        _keep_inputs(model.graph.inputs, [spec.name for spec in contract.inputs])
        ir.passes.Sequential(common.RemoveUnusedOpsetsPass(), common.NameFixPass())(model)
        match_contract(model, contract)
        return model


class _SeamedDecoder(torch.nn.Module):
    """One pass of ``model``: the contract's inputs and outputs as flat positional tensors, all layers, no taps."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        input_ids, position_ids, attention_mask, write_indices, logit_rows, *past = inputs
        step = Pass(attention_mask, position_ids, write_indices)
        cache = CacheSeam(pairs(past, range(len(past) // 2)), step)
        hooks = [*self._mark_layers(), self._gather_before_head(logit_rows)]
        try:
            with step.active():
                out = self.model(input_ids=input_ids, position_ids=position_ids, past_key_values=cache, use_cache=True)
        finally:
            for hook in hooks:
                hook.remove()
        present = [tensor for layer in sorted(cache.present) for tensor in cache.present[layer]]
        return (out.logits.float(), *present)

    def _mark_layers(self) -> list[torch.utils.hooks.RemovableHandle]:
        mark = torch.ops.dspark.layer_output
        layers = decoder_layers(self.model)

        def entering(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            return (mark(args[0], EMBEDDING), *args[1:])

        def leaving(number: int) -> torch.utils.hooks.RemovableHandle:
            return layers[number].register_forward_hook(lambda module, args, output: mark(output, number))

        return [layers[0].register_forward_pre_hook(entering), *(leaving(n) for n in range(len(layers)))]

    def _gather_before_head(self, rows: torch.Tensor) -> torch.utils.hooks.RemovableHandle:
        """The head runs only on the wanted rows; what the model does to logits afterwards stays its own."""

        def gather(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
            (hidden,) = args
            return (torch.ops.dspark.gather_rows(hidden, rows),)

        head: torch.nn.Module = self.model.get_output_embeddings()
        return head.register_forward_pre_hook(gather)


def trace_skeleton(config: PretrainedConfig) -> None:
    """Trace the architecture of ``config`` without weights, to find out whether it can be; torch's errors pass."""
    model = skeleton(config)
    contract = decoder_contract("decoder", probe(config), config.get_text_config().vocab_size, "float32")
    with torch.device("meta"), seamed(model), torch.no_grad():
        example = tuple(tensor.to("meta") for tensor in example_inputs(contract))
        torch.export.export(_SeamedDecoder(model), example, dynamic_shapes=(dynamic_shapes(contract),), strict=False)


def trace_without_weights(config: PretrainedConfig) -> None:
    """Run and trace the first layers of the architecture on the meta device, to find out whether that can be done.

    Raises:
        UnsupportedArchitecture: it cannot.
    """
    small = copy.deepcopy(config)
    text = small.get_text_config()
    text.num_hidden_layers = min(2, text.num_hidden_layers)
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[: text.num_hidden_layers]
    try:
        probe(config)
        trace_skeleton(small)
    except DsparkError:
        raise
    except Exception as error:  # an architecture nobody tested may raise anything
        first_line = str(error).strip().split("\n", 1)[0]
        raise UnsupportedArchitecture(
            f"{config.model_type}: transformers' code for it cannot be traced ({type(error).__name__}: {first_line})"
        ) from error


def decoder_layers(model: PreTrainedModel) -> torch.nn.ModuleList:
    """The list of decoder layers, wherever the architecture keeps it."""
    wanted = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == wanted:
            return module
    raise ExportError(f"{model.config.model_type}: no list of {wanted} decoder layers was found in the model")


def _rewire(graph: ir.Graph, layers: frozenset[int]) -> dict[int, ir.Value]:
    """Take the markers out, and with them every layer not in ``layers``. Returns what each layer leaves behind."""
    markers = {
        node.attributes[LAYER_NUMBER].as_int(): node
        for node in graph
        if (node.domain, node.op_type) == (TRACE_DOMAIN, LAYER_OUTPUT)
    }
    outputs: dict[int, ir.Value] = {}
    for number in sorted(markers):
        node = markers[number]
        hidden = node.inputs[0] if number == EMBEDDING or number in layers else outputs[number - 1]
        assert hidden is not None
        outputs[number] = hidden
        node.outputs[0].replace_all_uses_with(hidden)
        graph.remove(node, safe=True)
    return outputs


def _add_taps(graph: ir.Graph, tapped: list[ir.Value]) -> None:
    node = ir.node("Concat", tapped, attributes={"axis": -1}, name="node_hidden_taps")
    node.outputs[0].name, node.outputs[0].type = HIDDEN_TAPS, tapped[0].type
    graph.append(node)
    graph.outputs.insert(1, node.outputs[0])


def _keep_inputs(values: MutableSequence[ir.Value], names: list[str]) -> None:
    for value in values:
        if value.name not in names and value.uses():
            raise ExportError(f"the graph still reads {value.name}, which its contract does not have")
    values[:] = [value for value in values if value.name in names]
