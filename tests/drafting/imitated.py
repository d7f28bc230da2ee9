"""A bundle on a GPU that is imitated in host memory, see tests/engines/host_cuda.py."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from dspark_export.bench.spans import SpannedCuda, SpannedPlan
from dspark_export.engines.options import Ranges
from dspark_export.engines.prepare import PROFILES, has_cache
from dspark_export.passes.draw_for_all import DrawForAll
from dspark_export.passes.equal_attention_widths import EqualAttentionWidths
from dspark_export.passes.pin_capacity import PinCapacity
from dspark_runtime import Bundle
from dspark_runtime.backends.opening import DeviceBackend
from dspark_runtime.backends.plugin_launches import Launch
from dspark_runtime.backends.tensorrt_check import DeviceFacts
from dspark_runtime.bundle.engine_entry import EngineBuild, EngineEntry, EngineInspection, EngineProfile
from dspark_runtime.bundle.files import BundleFiles
from dspark_runtime.bundle.manifest import GraphEntry
from tests.engines.host_cuda import HostCuda, HostPlan, host_plan
from tests.plugins.launched import Imitated

RANGES = Ranges(batch=3, max_length=256, verify_rows=16, chunk=24)
ADA = DeviceFacts("8.9", "NVIDIA L4", 13000)
PROMPTS = [[5, 6, 7, 8, 5, 6, 7, 8, 5, 6], list(range(3, 60)), [9, 9, 4, 9, 9, 4, 9]]


def entry_of(graph: GraphEntry) -> EngineEntry:
    """What the manifest would say of an engine of ``graph``."""
    dims = {p: {d: b for d, b in RANGES.dims(p).items() if any(d in i.shape for i in graph.inputs)} for p in PROFILES}
    if not {"tokens", "features"} & set(dims["prefill"]):
        del dims["prefill"]
    return EngineEntry(
        graph=graph.name,
        flavour="tensorrt",
        version="10.13",
        targets=("8.9",),
        file=f"engines/{graph.name}.plan",
        log=f"engines/{graph.name}.log",
        graph_sha256="0" * 64,
        dtype=graph.dtype,
        capacity=RANGES.max_length,
        profiles=tuple(EngineProfile(name=name, dims=sizes) for name, sizes in dims.items()),
        inspection=EngineInspection(attention=0, softmax=0, aliased=0, layers=()),
        build=EngineBuild(seconds=0, peak_memory=0, plan=0, onnx=0, scratch=0),
    )


class Captured:
    """The imitated device's kernels, which are captured with the rest of a pass."""

    processors = 2

    def __init__(self, kernels: Imitated, cuda: HostCuda) -> None:
        self._kernels, self._cuda, self.launches = kernels, cuda, 0

    def run(self, launches: Iterable[Launch], stream: int) -> None:
        self._cuda.do(lambda: self._launch(launches), stream)

    def _launch(self, launches: Iterable[Launch]) -> None:
        self.launches += 1
        self._kernels.run(launches)


class Opened:
    """A bundle on the imitated GPU; ``kernels`` verify there, without any the host does. ``watched`` goes around
    ``cuda`` and times what is enqueued."""

    def __init__(
        self,
        source: Path,
        folder: Path,
        kernels: Imitated | None = None,
        overlap: bool = True,
        cuda: HostCuda | None = None,
        watched: SpannedCuda | None = None,
    ) -> None:
        shutil.copytree(source, folder)
        files = BundleFiles.open(folder)
        decoders = [g for g in files.manifest.graphs if g.variant == "standard" and has_cache(g)]
        for graph in decoders:
            model = ir.load(folder / graph.file)
            ir.passes.Sequential(DrawForAll(), EqualAttentionWidths(), PinCapacity(RANGES.max_length))(model)
            onnx.save_model(ir.to_proto(model), folder / graph.file)
        engines = tuple(entry_of(graph) for graph in decoders)
        files = dataclasses.replace(files, manifest=files.manifest.model_copy(update={"engines": engines}))
        self.cuda, self.plans = cuda or HostCuda(), list[HostPlan]()
        make = host_plan(files)

        def plan(*args: Any) -> Any:
            self.plans.append(make(*args))
            return self.plans[-1] if watched is None else SpannedPlan(self.plans[-1], watched)

        cpu = Bundle.open(source, threads=1)
        options = dataclasses.replace(cpu.engine_options, overlap=overlap)
        self.verifier = None if kernels is None else Captured(kernels, self.cuda)
        backend = DeviceBackend(
            files,
            "tensorrt",
            options,
            cuda=lambda number: self.cuda if watched is None else watched,
            plan=plan,
            device=lambda number: ADA,
            kernels=lambda number: self.verifier,
        )
        self.bundle = Bundle(files, options, cpu.exact, None, backend)
