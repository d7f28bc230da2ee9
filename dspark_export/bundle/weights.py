"""Stores all graphs of one model beside one data file that holds every weight once.

The data file is written as a stream: tensors one after another at 4 KiB boundaries, so that a runtime can map them,
and so that saving needs memory for one tensor, not for the model. The ``.onnx`` files hold the graph only; shapes,
indices and other small constants stay inside them, because ONNX Runtime needs them while loading.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import onnx
import onnx_ir as ir
import torch

from dspark_export.passes.match import tensor_identity

ALIGNMENT = 4096
INLINE_BYTES = 1024
PIECE_BYTES = 1 << 24


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
        identity = tensor_identity(tensor)
        if identity not in self._by_identity:
            # The tensor is kept alive with its key: an id may be reused once its object is gone.
            self._by_identity[identity] = (self._write(tensor), tensor)
        place = self._by_identity[identity][0]
        return ir.ExternalTensor(
            self.path.name,
            place.offset,
            place.length,
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=name,
            base_dir=str(self.path.parent),
        )

    def _write(self, tensor: ir.TensorProtocol) -> _Place:
        """Append ``tensor``; if its bytes turn out to be in the file already, take it back and use those."""
        end = self._file.tell()
        offset = -(-end // ALIGNMENT) * ALIGNMENT
        self._file.seek(offset)
        digest, length = hashlib.blake2b(), 0
        for part in _bytes_of(tensor):
            digest.update(part)
            self._file.write(part)
            length += part.nbytes
        content = (tensor.dtype.name, tuple(tensor.shape.numpy()), digest.digest())
        if content in self._by_content:
            self._file.seek(end)
            self._file.truncate()
        return self._by_content.setdefault(content, _Place(offset, length))


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


def _bytes_of(tensor: ir.TensorProtocol) -> Iterator[memoryview]:
    """The little-endian bytes of ``tensor`` in order. A transposed weight is turned around piece by piece."""
    raw = getattr(tensor, "raw", None)
    if not isinstance(raw, torch.Tensor):
        yield memoryview(tensor.tobytes())
        return
    raw = raw.detach()
    row_bytes = raw[0].numel() * raw.element_size() if raw.dim() else raw.element_size()
    rows = max(1, PIECE_BYTES // max(1, row_bytes))
    for part in torch.split(raw, rows) if raw.dim() else (raw,):
        yield memoryview(part.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
