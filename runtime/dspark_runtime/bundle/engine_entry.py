"""What the manifest says about TensorRT engines."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dspark_runtime.bundle.engine_names import Flavour, HardwareCompatibility, PluginForm
from dspark_runtime.bundle.records import Count, GraphName, Positive, Record, RelativePath, Sha256


class EngineProfile(Record):
    """Shapes an engine takes: ``dims`` gives smallest, typical and largest size of every symbolic dimension."""

    name: Literal["decode", "prefill"]
    dims: dict[str, tuple[Positive, Positive, Positive]]

    @model_validator(mode="after")
    def _ascending(self) -> EngineProfile:
        if bad := [name for name, (low, likely, high) in self.dims.items() if not low <= likely <= high]:
            raise ValueError(f"the sizes of {', '.join(bad)} do not ascend")
        return self


class EngineInspection(Record):
    """What the compiler itself reports of a finished engine.

    ``attention``: fused attention kernels per profile; ``softmax``: softmax layers outside of them (routers of experts
    have some); ``aliased``: cache outputs that are the memory of their input; ``layers``: layers per profile.
    """

    attention: Count
    softmax: Count
    aliased: Count
    layers: tuple[Count, ...]


class EngineBuild(Record):
    """Cost of compiling: ``seconds``, ``peak_memory`` (bytes of the compiler's process), sizes of the plan and of graph
    and weights in ONNX, and ``scratch`` device memory that a pass needs, all in bytes."""

    seconds: Annotated[float, Field(ge=0)]
    peak_memory: Count
    plan: Count
    onnx: Count
    scratch: Count


class EngineEntry(Record):
    """One TensorRT engine of the graph ``graph``, compiled from the file with digest ``graph_sha256``.

    ``targets`` are compute capabilities such as ``8.6``; empty: every GPU the flavour supports by default.
    ``capacity`` is the cache slots of a sequence, a constant of the engine. ``log`` is what the
    compiler said. A ``stripped`` plan has no weights and must be refitted. ``plugins`` are the versions of the plugins
    in it by name, ``plugin_form`` is where their code is: in a library that has to be loaded, or in the plan (``aot``).
    """

    graph: GraphName
    flavour: Flavour
    version: Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)+$")]
    cuda: str | None = None
    targets: tuple[Annotated[str, Field(pattern=r"^[0-9]+\.[0-9]$")], ...] = ()
    file: RelativePath
    log: RelativePath
    graph_sha256: Sha256
    dtype: Literal["float16", "bfloat16", "float32"]
    capacity: Positive
    profiles: Annotated[tuple[EngineProfile, ...], Field(min_length=1)]
    version_compatible: bool = False
    hardware_compatible: HardwareCompatibility = "none"
    refittable: bool = False
    stripped: bool = False
    plugins: dict[str, str] = Field(default_factory=dict)
    plugin_form: PluginForm = "none"
    inspection: EngineInspection
    build: EngineBuild
