"""Loads an engine: runs every check first, then loads the plan with host code disallowed."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from dspark_runtime.backends.cuda import Cuda
from dspark_runtime.backends.plugin_files import LIBRARY, plugin_file
from dspark_runtime.backends.tensorrt_check import (
    DeviceFacts,
    checked_plan,
    require_device,
    require_plugins,
    require_version,
)
from dspark_runtime.backends.tensorrt_device import MODULES, installed_version, this_device
from dspark_runtime.backends.tensorrt_plugins import load_plugins
from dspark_runtime.bundle.engine_entry import EngineEntry
from dspark_runtime.bundle.engine_names import Flavour
from dspark_runtime.bundle.files import BundleFiles
from dspark_runtime.errors import BackendError, EngineRefused, IncompatibleBundle


class LoadedPlan:
    """An engine in TensorRT's runtime. Contexts share one piece of scratch memory: they run one after another.

    Args:
        files: the bundle.
        entry: which of its engines.
        cuda: where scratch memory comes from.
        device: asks for the GPU that will run it.
        library: gives TensorRT's module.
        version: gives the installed version of a flavour.
        plugins: finds the plugin library; None: there is none.

    Raises:
        PlanDamaged, EngineRefused: before the plan reaches TensorRT, see :mod:`dspark_runtime.backends.tensorrt_check`.
    """

    def __init__(
        self,
        files: BundleFiles,
        entry: EngineEntry,
        cuda: Cuda,
        *,
        device: Callable[[], DeviceFacts | None] = this_device,
        library: Callable[[Flavour], Any] = lambda flavour: import_module(MODULES[flavour]),
        version: Callable[[Flavour], str | None] = installed_version,
        plugins: Callable[[], Path | None] = lambda: plugin_file(LIBRARY),
    ) -> None:
        if entry.stripped:
            raise EngineRefused(
                f"the engine of {entry.graph} has no weights (--strip-weights); compile it again without that option"
            )
        plan = checked_plan(files, entry)
        require_version(entry, version(entry.flavour))
        require_plugins(entry, plugins())
        require_device(entry, device())
        self.entry, self._trt = entry, library(entry.flavour)
        self.stream: int | None = None  # any will do
        if entry.plugin_form == "library":
            load_plugins(self._trt, plugins(), entry.plugins)
        self._runtime = self._trt.Runtime(self._trt.Logger(self._trt.Logger.ERROR))
        self._runtime.engine_host_code_allowed = False
        self.engine = self._runtime.deserialize_cuda_engine(plan)
        if self.engine is None:
            raise EngineRefused(
                f"{entry.flavour} {entry.version} refused the engine of {entry.graph} though it is undamaged; compile "
                "the bundle again on this machine"
            )
        self._scratch_size = int(self.engine.device_memory_size_v2)
        self._scratch = cuda.allocate(self._scratch_size)
        # Kernels of TensorRT-RTX are made when a context first runs a shape; contexts share what was made.
        self._settings = self._shared_kernels() if entry.flavour == "tensorrt-rtx" else None

    def _shared_kernels(self) -> Any:
        settings = self.engine.create_runtime_config()
        settings.set_execution_context_allocation_strategy(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        settings.set_runtime_cache(settings.create_runtime_cache())
        return settings

    def tensors(self) -> tuple[set[str], set[str]]:
        """Names of inputs and of outputs."""
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        inputs = {name for name in names if self.engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT}
        return inputs, set(names) - inputs

    def require_tensors(self, inputs: set[str], outputs: set[str]) -> None:
        """Raise IncompatibleBundle unless the engine has exactly these."""
        have_in, have_out = self.tensors()
        if wrong := (inputs ^ have_in) | (outputs ^ have_out):
            raise IncompatibleBundle(
                f"the engine of {self.entry.graph} does not have the inputs and outputs of this runtime's contract "
                f"(differing: {', '.join(sorted(wrong)[:6])}); build and compile the bundle again with this version"
            )

    def context(self, profile: int, stream: int) -> Any:
        """A new execution context for passes of ``profile``."""
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self.engine.create_execution_context(strategy if self._settings is None else self._settings)
        if context is None or not context.set_optimization_profile_async(profile, stream):
            raise BackendError(f"no execution context for the engine of {self.entry.graph}; is the GPU out of memory?")
        context.set_device_memory(self._scratch, self._scratch_size)
        return context

    def enqueue(self, context: Any, stream: int) -> None:
        """Run ``context`` on ``stream``; BackendError if TensorRT does not take it."""
        if not context.execute_async_v3(stream):
            raise BackendError(f"TensorRT could not run the engine of {self.entry.graph}; open the bundle again")
