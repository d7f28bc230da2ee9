"""What this machine offers engines: the installed TensorRT and the first GPU. Works without either."""

from __future__ import annotations

import ctypes
import platform
from importlib import import_module
from importlib.util import find_spec

from dspark_runtime.backends.tensorrt_check import DeviceFacts
from dspark_runtime.bundle.engine_names import Flavour
from dspark_runtime.errors import BackendError

MODULES: dict[Flavour, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
_NAME_BYTES = 256


def installed_version(flavour: Flavour) -> str | None:
    """Version of the installed TensorRT of ``flavour``; None if there is none that can be imported."""
    if find_spec(MODULES[flavour]) is None:
        return None
    try:
        return str(import_module(MODULES[flavour]).__version__)
    except (ImportError, OSError, AttributeError):
        return None


def driver_version_and_devices() -> tuple[int, int]:
    """CUDA version of the driver, such as 13000, and the number of GPUs. Raises BackendError without a driver."""
    cuda, version, count = _driver(), ctypes.c_int(), ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(version))
    cuda.cuDeviceGetCount(ctypes.byref(count))
    return version.value, count.value


def this_device(number: int = 0) -> DeviceFacts | None:
    """GPU ``number`` of this machine, as the driver reports it; None if there is no driver or no such GPU."""
    try:
        cuda = _driver()
    except BackendError:
        return None
    device, driver, name = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(_NAME_BYTES)
    if cuda.cuDeviceGet(ctypes.byref(device), number):
        return None
    numbers = []
    for attribute in (_MAJOR, _MINOR):
        value = ctypes.c_int()
        if cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
            return None
        numbers.append(value.value)
    cuda.cuDriverGetVersion(ctypes.byref(driver))
    cuda.cuDeviceGetName(name, _NAME_BYTES, device)
    return DeviceFacts(f"{numbers[0]}.{numbers[1]}", name.value.decode(errors="replace"), driver.value)


def _driver() -> ctypes.CDLL:
    """The library of the CUDA driver, initialized. Raises BackendError."""
    try:
        cuda = ctypes.CDLL("nvcuda.dll" if platform.system() == "Windows" else "libcuda.so.1")
    except OSError as error:
        raise BackendError("the CUDA driver library is not on this machine") from error
    if status := cuda.cuInit(0):
        raise BackendError(f"the driver is installed, but cuInit failed with status {status}")
    return cuda
