"""What the library tells an ONNX Runtime that registers it."""

from __future__ import annotations

import ctypes
from pathlib import Path

_API = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)
_VERSION = ctypes.CFUNCTYPE(ctypes.c_void_p)


def test_an_onnxruntime_that_is_too_old_is_told_so(library: Path) -> None:
    said: list[bytes] = []

    def create_status(code: int, text: bytes) -> int:
        said.append(text)
        return 1

    made = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)(create_status)
    table = (ctypes.c_void_p * 320)(ctypes.cast(made, ctypes.c_void_p))
    get_api = _API(lambda version: ctypes.addressof(table) if version <= 16 else None)
    version = ctypes.create_string_buffer(b"1.16.3")
    get_version = _VERSION(lambda: ctypes.addressof(version))
    base = (ctypes.c_void_p * 2)(ctypes.cast(get_api, ctypes.c_void_p), ctypes.cast(get_version, ctypes.c_void_p))
    register = ctypes.CDLL(str(library)).RegisterCustomOps
    register.restype, register.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_void_p]
    assert register(None, ctypes.addressof(base)) == 1
    assert said == [b"the sequence kernels: ONNX Runtime 1.16.3 is too old for them; install 1.17 or later"]
