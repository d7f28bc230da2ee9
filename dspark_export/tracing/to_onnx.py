"""A seamed module -> an ``onnx_ir`` graph that carries the contract's names and the checkpoint's weight names."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import onnx_ir as ir
import torch

from dspark_export.tracing.operators import FUNCTIONS, TRANSLATION
from dspark_export.tracing.tidy import tidy
from dspark_runtime.bundle.contract import OPSET, GraphContract
from dspark_runtime.errors import ExportError

_MAX_DIM = 1 << 24
_WRAPPER = "model."


def trace(module: torch.nn.Module, contract: GraphContract, example: Sequence[torch.Tensor]) -> ir.Model:
    """Trace ``module`` called with ``example`` (positional, the contract's inputs in order).

    Symbolic dims of the contract become dynamic dims. Weights are referenced, not copied: the returned model's
    initializers wrap the module's own tensors and have the names of the wrapped model's ``state_dict``.

    Raises:
        ExportError: torch could not trace the module or translate an operator.
    """
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            program = torch.onnx.export(
                module,
                tuple(example),
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=(dynamic_shapes(contract),),
                custom_translation_table=TRANSLATION,
                input_names=[spec.name for spec in contract.inputs],
                output_names=[spec.name for spec in contract.outputs],
                optimize=False,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            raise ExportError(f"{contract.name}: torch cannot trace this model: {_root_cause(error)}") from error
    assert program is not None
    model = program.model
    _name_weights(model)
    _define_functions(model)
    match_contract(model, contract)
    tidy(model)
    return model


def dynamic_shapes(contract: GraphContract) -> tuple[dict[int, torch.export.Dim], ...]:
    """For every input, the axes that are symbolic in the contract; equal names are one dimension."""
    dims: dict[str, torch.export.Dim] = {}

    def dim(name: str) -> torch.export.Dim:
        return dims.setdefault(name, torch.export.Dim(name, max=_MAX_DIM))

    return tuple(
        {axis: dim(size) for axis, size in enumerate(spec.shape) if isinstance(size, str)} for spec in contract.inputs
    )


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"


def _define_functions(model: ir.Model) -> None:
    """Give the internal operators that need one a body, for ``tidy`` to inline."""
    for script in FUNCTIONS:
        function = ir.serde.deserialize_function(script.to_function_proto())
        model.functions[function.identifier()] = function


def _name_weights(model: ir.Model) -> None:
    """Drop the wrapper module's prefix, so that weights are called what the checkpoint calls them."""
    for value in list(model.graph.initializers.values()):
        if value.name and value.name.startswith(_WRAPPER):
            value.name = value.name.removeprefix(_WRAPPER)


def match_contract(model: ir.Model, contract: GraphContract) -> None:
    """Check the names of inputs and outputs, in order, and give them the contract's shapes.

    Raises:
        ExportError: a name is missing, too many or out of order.
    """
    for kind, values, specs in (
        ("inputs", model.graph.inputs, contract.inputs),
        ("outputs", model.graph.outputs, contract.outputs),
    ):
        found, wanted = [v.name for v in values], [s.name for s in specs]
        if found != wanted:
            raise ExportError(f"{contract.name}: the traced graph has {kind} {found}, the contract wants {wanted}")
        for value, spec in zip(values, specs, strict=True):
            value.shape = ir.Shape(spec.shape)
