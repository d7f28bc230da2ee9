"""What a trace follows from, as a digest: the module, the arguments, the source code, the versions of the tools."""

from __future__ import annotations

import ast
import dataclasses
import enum
import functools
import hashlib
import sys
import types
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig

from tests.shared.folders import ROOT

TOOLS = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript")
PACKAGES = {"dspark_export": ROOT, "tests": ROOT, "dspark_runtime": ROOT / "runtime"}
ALWAYS_READ = (*sorted((ROOT / "dspark_export" / "tracing").glob("*.py")), Path(__file__))
LEFT_OUT = frozenset(
    {
        *("_name_or_path", "name_or_path", "_commit_hash", "architectures", "model_type", "transformers_version"),
        *("_weight_conversions", "generation_config"),
    }
)
"""Attributes of models and configurations that say where they come from, or what only saving or ``generate`` reads."""
_HEAP_TYPE = 1 << 9
"""Py_TPFLAGS_HEAPTYPE: the class was made by a ``class`` statement."""


class NoDigest(Exception):
    """The value holds something whose content cannot be read, so nothing is known to equal it."""


class Digest:
    """Collects values; :meth:`hexdigest` is the same for the same values in the same order.

    Parameters and buffers of modules count by name, type, shape, strides and storage, not by their numbers: torch
    traces with tensors that have none. All other tensors become constants of a trace and count by their numbers.
    """

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._seen: dict[int, int] = {}
        self._alive: list[Any] = []  # an id is a name only as long as the object lives
        self._storages: dict[int, int] = {}
        self.files: set[Path] = set()

    def hexdigest(self) -> str:
        sources = hashlib.sha256(self._hash.digest())
        for file in sorted(closure(self.files.union(ALWAYS_READ))):
            sources.update(f"{_place(file)} {_hash_of(file)}\n".encode())
        for tool in TOOLS:
            sources.update(f"{tool} {version(tool)}\n".encode())
        sources.update(f"{sys.version} {torch.get_default_dtype()}".encode())
        return sources.hexdigest()

    def add(self, value: Any) -> None:
        """Raises :class:`NoDigest` for what cannot be read."""
        if value is None or isinstance(
            value, bool | int | float | complex | str | bytes | enum.Enum | torch.dtype | torch.device | torch.Size
        ):
            return self._put(type(value).__name__, repr(value))
        if id(value) in self._seen:
            return self._put("again", self._seen[id(value)])
        self._seen[id(value)] = len(self._seen)
        self._alive.append(value)
        if isinstance(value, torch.Tensor):
            return self._tensor(value, with_numbers=True)
        if isinstance(value, np.ndarray):
            return self._put("array", value.dtype, value.shape, value.tobytes())
        if isinstance(value, torch.nn.Module):
            return self._module(value)
        if isinstance(value, Mapping):
            self._put("mapping", type(value).__qualname__, len(value))
            return self._all(part for pair in value.items() for part in pair)
        if isinstance(value, list | tuple):
            self._put("sequence", type(value).__qualname__, len(value))
            return self._all(value)
        if isinstance(value, set | frozenset):
            self._put("set", *sorted(repr(part) for part in value))
            return self._simple_only(value)
        return self._code_or_object(value)

    def _code_or_object(self, value: Any) -> None:
        if isinstance(value, type):
            return self._type(value)
        if isinstance(value, types.MethodType):
            self._put("method")
            return self._all((value.__func__, value.__self__))
        if isinstance(value, types.FunctionType):
            self._put("function", value.__module__, value.__qualname__)
            self._file_of(value.__module__)
            cells = [cell.cell_contents for cell in value.__closure__ or ()]
            return self._all((value.__defaults__, value.__kwdefaults__, cells))
        if isinstance(value, types.BuiltinFunctionType | torch._ops.OpOverload):
            return self._put("builtin", value)
        if isinstance(value, functools.partial):
            self._put("partial")
            return self._all((value.func, value.args, value.keywords))
        if isinstance(value, PretrainedConfig):
            self._type(type(value))
            return self.add(_by_name({name: part for name, part in vars(value).items() if name not in LEFT_OUT}))
        if dataclasses.is_dataclass(value):
            self._type(type(value))
            return self._all(getattr(value, field.name) for field in dataclasses.fields(value))
        if hasattr(value, "__dict__") and _plain(type(value)):
            self._type(type(value))
            return self.add(vars(value))
        raise NoDigest(f"{type(value).__qualname__} is not known")

    def _module(self, module: torch.nn.Module) -> None:
        self._type(type(module))
        for kind in ("_parameters", "_buffers"):
            for name, tensor in getattr(module, kind).items():
                self._put(kind, name)
                if tensor is not None:
                    self._tensor(tensor, with_numbers=False)
        rest = {name: part for name, part in vars(module).items() if name not in {"_parameters", "_buffers", *LEFT_OUT}}
        if rest.get("_use_kernels") is False:  # what a loaded model says and a new one does not
            del rest["_use_kernels"]
        self.add(rest)

    def _tensor(self, tensor: torch.Tensor, *, with_numbers: bool) -> None:
        storage = tensor.untyped_storage().data_ptr() if tensor.device.type == "cpu" else id(tensor)
        number = self._storages.setdefault(storage, len(self._storages))
        self._put(type(tensor).__qualname__, tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.device)
        self._put(number, tensor.storage_offset(), tensor.requires_grad)
        if with_numbers:
            flat = tensor.detach().contiguous().reshape(-1)
            self._hash.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")

    def _type(self, kind: type) -> None:
        for base in kind.__mro__:
            self._put("type", base.__module__, base.__qualname__)
            self._file_of(base.__module__)

    def _file_of(self, module: str | None) -> None:
        """Remember the file, unless the version of an installed package says enough."""
        file = getattr(sys.modules.get(module or ""), "__file__", None)
        if file and "site-packages" not in file and not file.startswith(sys.base_prefix):
            self.files.add(Path(file).resolve())

    def _all(self, values: Iterable[Any]) -> None:
        for value in values:
            self.add(value)

    def _simple_only(self, values: Iterable[Any]) -> None:
        if not all(isinstance(value, str | int | float | bool | torch.dtype | type | None) for value in values):
            raise NoDigest("a set of other things than names and numbers")

    def _put(self, *parts: Any) -> None:
        for part in parts:
            text = part if isinstance(part, bytes) else str(part).encode()
            self._hash.update(b"%d:" % len(text) + text)


def _by_name(value: Any) -> Any:
    """Mappings in the order of their names, as a configuration has them once it was saved."""
    if type(value) is not dict or not all(isinstance(name, str) for name in value):
        return value
    return {name: _by_name(value[name]) for name in sorted(value)}


def _plain(kind: type) -> bool:
    """Whether attributes are all an instance consists of: no base is written in C or says itself how it is stored."""
    told = {"__slots__", "__getstate__", "__reduce__", "__reduce_ex__"}
    return all(base.__flags__ & _HEAP_TYPE and not told & set(vars(base)) for base in kind.__mro__[:-1])


def closure(files: Iterable[Path]) -> set[Path]:
    """``files`` and all files of this repository that they import, directly or not."""
    found: set[Path] = set()
    pending = list(files)
    while pending:
        file = pending.pop()
        if file not in found:
            found.add(file)
            pending += _imports(file)
    return found


@functools.cache
def _imports(file: Path) -> tuple[Path, ...]:
    named: set[str] = set()
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            named |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return tuple(path for name in named for path in _files_called(name))


def _files_called(name: str) -> list[Path]:
    root = PACKAGES.get(name.partition(".")[0])
    if root is None:
        return []
    path = root.joinpath(*name.split("."))
    return [file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()]


@functools.cache
def _hash_of(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _place(file: Path) -> str:
    """The path inside the repository: another checkout of the same content shares what it made."""
    return str(file.relative_to(ROOT)) if file.is_relative_to(ROOT) else file.name
