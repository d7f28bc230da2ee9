"""A graph in ONNX Runtime over memory given by address: its CUDA provider behind the interface of TensorRT's plans.

The standard graph runs unchanged; caches, inputs and outputs stay where the device backend put them. All passes go to
one stream, which the session is given when it loads. Not yet run on a GPU, see docs/engines.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspark_runtime.bundle.engine_entry import EngineProfile
from dspark_runtime.bundle.manifest import GraphEntry
from dspark_runtime.errors import BackendError, IncompatibleBundle

try:
    import onnxruntime as ort
except ImportError as error:  # pragma: no cover - depends on the installation
    raise BackendError("onnxruntime is not installed; run `pip install dspark-runtime[gpu]`") from error

_TYPES = {"float32": 1, "int64": 7, "bool": 9, "float16": 10, "bfloat16": 16}  # numbers of onnx.TensorProto
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


@dataclass(frozen=True)
class ChosenRanges:
    """Passes a graph is used for. Nothing is compiled for them, but buffers and caches are made for the largest."""

    graph: str
    dtype: str
    capacity: int
    profiles: tuple[EngineProfile, ...]

    @classmethod
    def of(cls, graph: GraphEntry, capacity: int, batch: int, rows: int, chunk: int) -> ChosenRanges:
        """Decode passes of up to ``rows`` rows and prefill passes of up to ``chunk`` tokens of ``batch`` sequences."""
        slots = (1, capacity, capacity)
        decode = {"batch": (1, 1, batch), "tokens": (1, 1, rows), "rows": (1, 1, rows), "kv_len": slots}
        prefill = decode | {"tokens": (1, chunk, chunk)}
        profiles = (EngineProfile(name="decode", dims=decode), EngineProfile(name="prefill", dims=prefill))
        return cls(graph.name, graph.dtype, capacity, profiles)


class OrtPlan:
    """See :class:`dspark_runtime.backends.device.Plan`.

    Args:
        path: the ONNX file; external data lies beside it.
        graph: its inputs and outputs.
        device: ``cuda``, or ``cpu`` where addresses are those of host memory.
        number: of the GPU.
        stream: where passes are enqueued; 0 on the CPU.

    Raises:
        BackendError: ONNX Runtime cannot load the graph, or has no such provider.
    """

    def __init__(self, path: Path, graph: GraphEntry, device: str, number: int, stream: int) -> None:
        provider = _PROVIDERS[device]
        if provider not in ort.get_available_providers():
            raise BackendError(
                f"the installed onnxruntime has no {provider}; run `pip install dspark-runtime[gpu]` (and uninstall "
                "onnxruntime, whose files it shares)"
            )
        settings = ort.SessionOptions()
        settings.log_severity_level = 3
        options = {"device_id": str(number), "user_compute_stream": str(stream)} if device == "cuda" else {}
        try:
            self._session = ort.InferenceSession(str(path), settings, providers=[(provider, options)])
        except Exception as error:
            raise BackendError(
                f"ONNX Runtime {ort.__version__} cannot load the graph {graph.name} ({path}) on {device}: {error}"
            ) from error
        if provider not in self._session.get_providers():
            raise BackendError(
                f"ONNX Runtime did not start {provider} for {graph.name}: CUDA and cuDNN of the versions that "
                f"onnxruntime {ort.__version__} wants have to be installed"
            )
        self.stream: int | None = stream
        self._graph, self._place = graph, (device, number)

    def require_tensors(self, inputs: set[str], outputs: set[str]) -> None:
        """Raise IncompatibleBundle unless the graph has exactly these."""
        have = {item.name for item in (*self._session.get_inputs(), *self._session.get_outputs())}
        if wrong := (inputs | outputs) ^ have:
            raise IncompatibleBundle(
                f"graph {self._graph.name} does not have the inputs and outputs of the manifest "
                f"(differing: {', '.join(sorted(wrong)[:6])}); build the bundle again with this version"
            )

    def context(self, profile: int, stream: int) -> OrtContext:
        """A new binding; every profile runs the same graph."""
        return OrtContext(self._session.io_binding(), self._graph, self._place)

    def enqueue(self, context: OrtContext, stream: int) -> None:
        """Run a pass on the stream of the session; BackendError if ONNX Runtime fails."""
        try:
            self._session.run_with_iobinding(context.bound())
        except Exception as error:
            raise BackendError(f"ONNX Runtime failed in {self._graph.name}: {error}") from error


class OrtContext:
    """Shapes and addresses of one pass. Only what changed since the last one is bound again."""

    def __init__(self, binding: Any, graph: GraphEntry, place: tuple[str, int]) -> None:
        self._binding, self._graph, self._place = binding, graph, place
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._bound: dict[str, tuple[tuple[int, ...], int]] = {}

    def set_input_shape(self, name: str, dims: Sequence[int]) -> None:
        """Shape of an input in the next pass."""
        self._shapes[name] = tuple(int(dim) for dim in dims)

    def set_tensor_address(self, name: str, address: int) -> None:
        """Where an input or output of the next pass lies."""
        self._addresses[name] = address

    def bound(self) -> Any:
        """ONNX Runtime's binding of all tensors; outputs get the sizes that the inputs' give them."""
        sizes: dict[str, int] = {}
        for spec in self._graph.inputs:
            sizes |= {
                dim: size for dim, size in zip(spec.shape, self._shapes[spec.name], strict=True) if isinstance(dim, str)
            }
            self._bind(self._binding.bind_input, spec.name, spec.dtype, self._shapes[spec.name])
        for spec in self._graph.outputs:
            dims = tuple(dim if isinstance(dim, int) else sizes[dim] for dim in spec.shape)
            self._bind(self._binding.bind_output, spec.name, spec.dtype, dims)
        return self._binding

    def _bind(self, bind: Any, name: str, dtype: str, dims: tuple[int, ...]) -> None:
        state = dims, self._addresses[name]
        if self._bound.get(name) != state:
            bind(name, *self._place, _TYPES[dtype], dims, state[1])
            self._bound[name] = state
