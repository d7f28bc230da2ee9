"""``torch.onnx.export``, run once for everything that is equal: it takes most of the time of most tests.

Only what torch does is shared. The graph it returns is stored without weights, before any code of this project reads
it, and each test's own tensors are bound to it; what the project makes of that graph is made anew every time.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import torch
import torch._dynamo.config
from torch.onnx._internal.exporter._core import TorchTensor
from torch.onnx._internal.exporter._registration import ONNXRegistry

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


@contextmanager
def _quicker() -> Iterator[None]:
    """Traces take a tenth to a fifth less time, and give the same bytes.

    torch reads the source of its 500 translations again for each trace, and its cache of what operators return costs
    more than it saves where sizes are symbols.
    """
    real = vars(ONNXRegistry)["from_torchlib"]
    ONNXRegistry.from_torchlib = classmethod(_registry)  # type: ignore[assignment]
    try:
        with torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
            yield
    finally:
        ONNXRegistry.from_torchlib = real


_read_registry = functools.cache(ONNXRegistry.from_torchlib)


def _registry(kind: type[ONNXRegistry], opset_version: int) -> ONNXRegistry:
    """A registry of its own, since an export adds to it."""
    read, made = _read_registry(opset_version), kind()
    made._opset_version = read.opset_version
    made.functions = {target: list(metas) for target, metas in read.functions.items()}
    return made


def _state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    parameters = module.named_parameters(remove_duplicate=False)
    return {**dict(parameters), **dict(module.named_buffers(remove_duplicate=False))}


def _store(module: torch.nn.Module, args: tuple[Any, ...], settings: dict[str, Any], folder: Path) -> None:
    began = time.process_time()
    with _quicker():
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
