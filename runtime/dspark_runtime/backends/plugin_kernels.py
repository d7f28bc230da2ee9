"""Launches the plugins' kernels without TensorRT: ``dspark.fatbin`` through NVIDIA's ``cuda-core``.

    kernels = PluginKernels()
    kernels.run(verify_tree(inputs, outputs, workspace, kernels.processors), stream)

Launches are enqueued on a stream and can be captured in a CUDA graph; nothing waits.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dspark_runtime.backends.plugin_files import FATBIN, how_to_build, plugin_file
from dspark_runtime.backends.plugin_launches import Launch
from dspark_runtime.errors import BackendError, EngineWithoutDevice


class PluginKernels:
    """The kernels, loaded on one GPU.

    Args:
        device: number of the GPU.
        fatbin: the compiled kernels; None: ``dspark.fatbin`` of
            :func:`dspark_runtime.backends.plugin_files.plugin_folder`.

    Raises:
        BackendError: ``cuda-core`` is not installed, the kernels are not there or have no code for this GPU.
        EngineWithoutDevice: there is no such GPU.
    """

    def __init__(self, device: int = 0, fatbin: Path | None = None) -> None:
        if find_spec("cuda") is None or find_spec("cuda.core") is None:
            raise BackendError(
                "the kernels are launched by cuda-core, which is not installed; run `pip install cuda-core[cu13]`"
            )
        file = plugin_file(FATBIN) if fatbin is None else fatbin
        if file is None or not file.is_file():
            raise BackendError(f"there is no {file or FATBIN}; {how_to_build(FATBIN)}")
        self._core: Any = import_module("cuda.core")
        try:
            self.device: Any = self._core.Device(device)
            self.device.set_current()
            self.processors = int(self.device.properties.multiprocessor_count)
        except Exception as error:  # cuda-core has no common type for a missing driver, device or context
            raise EngineWithoutDevice(f"GPU {device} cannot be used ({error}); see `dspark-export doctor`") from error
        self._code: Any = self._core.ObjectCode.from_fatbin(str(file))
        self._kernels: dict[str, Any] = {}

    def run(self, launches: Iterable[Launch], stream: Any) -> None:
        """Enqueue ``launches`` on ``stream``, a stream of cuda-core or the number of a CUDA stream.

        Raises:
            BackendError: the kernels have no code for this GPU, or CUDA refuses a launch.
        """
        if isinstance(stream, int):
            stream = self._core.Stream.from_handle(stream)
        try:
            for launch in launches:
                config = self._core.LaunchConfig(grid=launch.grid, block=launch.threads)
                self._core.launch(stream, config, self._kernel(launch.kernel), *launch.arguments)
        except Exception as error:
            raise BackendError(f"the kernels cannot be launched ({error}); build {FATBIN} for this GPU") from error

    def _kernel(self, name: str) -> Any:
        if name not in self._kernels:
            self._kernels[name] = self._code.get_kernel(name)
        return self._kernels[name]
