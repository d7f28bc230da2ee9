"""Verification on the device: trees go in through page-locked memory, accepted rows and their tokens come out."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dspark_runtime.backends.cuda import Bytes, Cuda
from dspark_runtime.backends.plugin_launches import DeviceTensor, Element, Launch, sized, verify_tree, verify_workspace
from dspark_runtime.backends.protocol import TreeCheck, TreeVerdicts
from dspark_runtime.bundle.contract import LOGITS, VERIFY_INPUTS, VERIFY_OUTPUTS

_ALIGNMENT = 256
_INPUTS = tuple(spec for spec in VERIFY_INPUTS if spec.name != LOGITS)  # logits are there already
Places = dict[str, tuple[int, tuple[int, ...], Element]]


class Kernels(Protocol):
    """The plugins' kernels, see :class:`dspark_runtime.backends.plugin_kernels.PluginKernels`."""

    processors: int

    def run(self, launches: Iterable[Launch], stream: int) -> None:
        """Enqueue ``launches``."""


class Staging:
    """Page-locked host memory and the device memory it is copied to or from."""

    def __init__(self, cuda: Cuda, size: int) -> None:
        self.host: Bytes = cuda.pinned(size)
        self.device = cuda.allocate(size)


class Verifier:
    """``VerifyTree`` after a pass of up to ``batch`` sequences and ``rows`` rows."""

    def __init__(self, cuda: Cuda, kernels: Kernels, batch: int, rows: int) -> None:
        self._cuda, self._kernels = cuda, kernels
        self._inputs = Staging(cuda, _layout(True, batch, rows)[1])
        self._outputs = Staging(cuda, _layout(False, batch, rows)[1])
        self._workspace = cuda.allocate(verify_workspace(batch, rows))  # zeroed once, left zeroed by every launch
        self._sizes = batch, rows
        self._known: dict[tuple[int, int], tuple[list[npt.NDArray[Any]], list[npt.NDArray[Any]]]] = {}

    def fill(self, check: TreeCheck, batch: int, rows: int) -> None:
        """Write the trees of a pass of ``batch`` x ``rows``; rows beyond those of ``check`` see nothing."""
        self._sizes = batch, rows
        tokens, ancestors, uniforms, *sampling = self._views(batch, rows)[0]
        count = check.tokens.shape[1]
        if count < rows:
            tokens[:, count:] = 0
            ancestors[...] = False
            uniforms[:, count:] = 0
        tokens[:, :count], uniforms[:, :count] = check.tokens, check.uniforms
        ancestors[:, :count, :count] = check.ancestors
        for view, given in zip(sampling, (check.temperature, check.top_k, check.top_p, check.min_p), strict=True):
            view[...] = given

    def enqueue(self, logits: DeviceTensor, stream: int) -> None:
        """Verify ``logits`` float32 [batch, rows, vocab] against what was filled in."""
        batch, rows, _ = logits.shape
        inputs, size = _layout(True, batch, rows)
        outputs, _ = _layout(False, batch, rows)
        self._cuda.copy_in(self._inputs.device, self._inputs.host[:size], stream)
        launches = verify_tree(
            {"logits": logits, **_tensors(self._inputs.device, inputs)},
            _tensors(self._outputs.device, outputs),
            self._workspace,
            self._kernels.processors,
        )
        self._kernels.run(launches, stream)

    def fetch(self, stream: int) -> None:
        """Copy the verdicts to the host."""
        returned = _layout(False, *self._sizes)[1]
        self._cuda.copy_out(self._outputs.host[:returned], self._outputs.device, stream)

    def verdicts(self, rows: int) -> TreeVerdicts:
        """What came back, without padding: valid until the next pass."""
        path, emitted, accepted = self._views(*self._sizes)[1]
        return TreeVerdicts(path[:, :rows], emitted[:, :rows], accepted)

    def _views(self, batch: int, rows: int) -> tuple[list[npt.NDArray[Any]], list[npt.NDArray[Any]]]:
        """Inputs and outputs of a size in page-locked memory."""
        found = self._known.get((batch, rows))
        if found is None:
            inputs = [_view(self._inputs.host, place) for place in _layout(True, batch, rows)[0].values()]
            outputs = [_view(self._outputs.host, place) for place in _layout(False, batch, rows)[0].values()]
            found = self._known[batch, rows] = inputs, outputs
        return found


@cache
def _layout(inputs: bool, batch: int, rows: int) -> tuple[Places, int]:
    """Offset, dims and type of every input or output in its staging memory, and the bytes of all."""
    places: Places = {}
    end = 0
    for name, (dtype, dims) in sized(_INPUTS if inputs else VERIFY_OUTPUTS, batch=batch, rows=rows).items():
        places[name] = end, dims, dtype
        end += -(-int(np.prod(dims)) * np.dtype(dtype).itemsize // _ALIGNMENT) * _ALIGNMENT
    return places, end


def _view(host: Bytes, place: tuple[int, tuple[int, ...], Element]) -> npt.NDArray[Any]:
    offset, dims, dtype = place
    size = int(np.prod(dims)) * np.dtype(dtype).itemsize
    return host[offset : offset + size].view(dtype).reshape(dims)


def _tensors(device: int, places: Places) -> dict[str, DeviceTensor]:
    return {name: DeviceTensor(device + offset, dims, dtype) for name, (offset, dims, dtype) in places.items()}
