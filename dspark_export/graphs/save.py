"""All graphs of one model beside one data file in which every weight lies once.

The data file is written as a stream: tensors one after another at 4 KiB boundaries, so that a runtime can map them,
and so that saving needs memory for one tensor, not for the model. The ``.onnx`` files hold the graph only; shapes,
indices and other small constants stay inside them, because ONNX Runtime must know those while it loads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import onnx
import onnx_ir as ir
import torch

ALIGNMENT = 4096
INLINE_BYTES = 1024


@dataclass(frozen=True)
class _Place:
    offset: int
    length: int


class WeightFile:
    """Appends tensors to one file and remembers where they are, by identity and by content."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self._file = path, file
        self._by_identity: dict[object, tuple[_Place, object]] = {}
        self._by_content: dict[tuple[str, tuple[int, ...], bytes], _Place] = {}

    def store(self, name: str, tensor: ir.TensorProtocol) -> ir.ExternalTensor:
        """Where ``tensor`` lies in the file; written only if no equal tensor has been."""
        identity = _identity(tensor)
        if identity not in self._by_identity:
            # The tensor is kept alive with its key: an id may be reused once its object is gone.
            self._by_identity[identity] = (self._write(tensor), tensor)
        place = self._by_identity[identity][0]
        return ir.ExternalTensor(
            self.path.name,
            place.offset,
            place.length,
            tensor.dtype,
            shape=ir.Shape(tuple(tensor.shape)),
            name=name,
            base_dir=str(self.path.parent),
        )

    def _write(self, tensor: ir.TensorProtocol) -> _Place:
        data = _bytes_of(tensor)
        content = (tensor.dtype.name, tuple(int(d) for d in tensor.shape), hashlib.blake2b(data).digest())
        if content not in self._by_content:
            offset = -(-self._file.tell() // ALIGNMENT) * ALIGNMENT
            self._file.seek(offset)
            self._file.write(data)
            self._by_content[content] = _Place(offset, data.nbytes)
        return self._by_content[content]


def save_graphs(graphs: Mapping[str, ir.Model], directory: Path, data_file: str = "weights.data") -> dict[str, Path]:
    """Write ``<name>.onnx`` for every graph and their shared ``data_file`` into ``directory``.

    The models are left as they were. Returns the path of each graph by name.

    Raises:
        OSError: the directory cannot be written or the disk is full; what was written so far stays behind.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    paths: dict[str, Path] = {}
    with (directory / data_file).open("wb") as file:
        weights = WeightFile(directory / data_file, file)
        for name, model in graphs.items():
            paths[name] = directory / f"{name}.onnx"
            _save_graph(model, paths[name], weights)
    return paths


def _save_graph(model: ir.Model, path: Path, weights: WeightFile) -> None:
    held = {value: value.const_value for value in model.graph.initializers.values()}
    try:
        for value, tensor in held.items():
            if tensor is not None and tensor.nbytes > INLINE_BYTES:
                value.const_value = weights.store(value.name or "", tensor)
        onnx.save_model(ir.to_proto(model), path)
    finally:
        for value, tensor in held.items():
            value.const_value = tensor


def _identity(tensor: ir.TensorProtocol) -> object:
    raw = getattr(tensor, "raw", None)
    if isinstance(raw, torch.Tensor):
        return (raw.data_ptr(), tuple(raw.shape), raw.stride(), raw.dtype)
    return id(tensor)


def _bytes_of(tensor: ir.TensorProtocol) -> memoryview:
    """The little-endian bytes of ``tensor``, without a copy where its memory already is in that order."""
    raw = getattr(tensor, "raw", None)
    if isinstance(raw, torch.Tensor):
        return memoryview(raw.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return memoryview(tensor.tobytes())
