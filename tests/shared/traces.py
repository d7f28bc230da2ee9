"""``torch.onnx.export``, run once for everything that is equal: it takes most of the time of most tests.

Only what torch does is shared. The graph it returns is stored without weights, before any code of this project reads
it, and each test's own tensors are bound to it; what the project makes of that graph is made anew every time.
"""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import torch
from torch.onnx._internal.exporter._core import TorchTensor

from tests.shared.digests import Digest, NoDigest
from tests.shared.folders import shared_folder

GRAPH, CONSTANTS, SECONDS = "graph.onnx", "constants.pt", "seconds"
_export = torch.onnx.export


def share() -> None:
    """From now on, :func:`torch.onnx.export` of this process looks for an equal one first."""
    torch.onnx.export = shared_export  # type: ignore[assignment]


def shared_export(module: torch.nn.Module, args: tuple[Any, ...], **settings: Any) -> Any:
    """As :func:`torch.onnx.export`; of the program returned there is only the ``model``."""
    digest = Digest()
    try:
        for part in (module, args, settings):
            digest.add(part)
    except NoDigest:
        return _export(module, args, **settings)
    folder = shared_folder("traces", digest.hexdigest(), lambda folder: _store(module, args, settings, folder))
    return SimpleNamespace(model=_load(module, folder))


def _state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    parameters = module.named_parameters(remove_duplicate=False)
    return {**dict(parameters), **dict(module.named_buffers(remove_duplicate=False))}


def _store(module: torch.nn.Module, args: tuple[Any, ...], settings: dict[str, Any], folder: Path) -> None:
    began = time.process_time()
    program = _export(module, args, **settings)
    assert program is not None
    state, constants = _state(module), {}
    for name, value in program.model.graph.initializers.items():
        tensor = value.const_value
        assert isinstance(tensor, TorchTensor), (name, type(tensor))
        known = state.get(name)
        if known is None or (known.data_ptr(), known.shape) != (tensor.raw.data_ptr(), tensor.raw.shape):
            constants[name] = tensor.raw.detach().clone()
        value.const_value = ir.ExternalTensor("elsewhere", 0, 0, tensor.dtype, shape=ir.Shape(tensor.shape), name=name)
    ir.save(program.model, folder / GRAPH)
    torch.save(constants, folder / CONSTANTS)
    (folder / SECONDS).write_text(f"{time.process_time() - began:.3f}", encoding="utf-8")


def _load(module: torch.nn.Module, folder: Path) -> ir.Model:
    model = ir.load(folder / GRAPH)
    state, constants = _state(module), torch.load(folder / CONSTANTS)
    for name, value in model.graph.initializers.items():
        raw = constants[name] if name in constants else state[name]
        value.const_value = TorchTensor(raw, name=name)
    return model
