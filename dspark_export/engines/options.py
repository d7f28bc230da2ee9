"""Options of a compilation."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from dspark_runtime.bundle.engine_names import Flavour, HardwareCompatibility
from dspark_runtime.errors import UsageError

DEFAULT_LENGTH = 4096
RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
"""Compute capabilities TensorRT-RTX 1.7 supports; by default it compiles for all of them except 7.5."""

Profile = Literal["decode", "prefill"]
PluginsOption = Literal["auto", "library", "aot", "none"]
Bounds = tuple[int, int, int]


@dataclass(frozen=True)
class Ranges:
    """Largest shapes an engine takes.

    ``batch``: sequences of a pass. ``max_length``: cache slots of a sequence, prompt, text and the rows of one verify
    pass together. ``verify_rows``: rows of a decode or verify pass. ``chunk``: tokens of a prefill pass.

    Raises:
        UsageError: a number outside its range, or a pass that is longer than the cache.
    """

    batch: int = 1
    max_length: int = DEFAULT_LENGTH
    verify_rows: int = 32  # what the runtime's schedule verifies at most
    chunk: int = 512  # what its loop prefills at once

    def __post_init__(self) -> None:
        limits = {"batch": 4096, "max_length": 2**24, "verify_rows": 1024, "chunk": 2**16}
        for name, limit in limits.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
                raise UsageError(f"{_option(name)} {value!r}: give a number from 1 to {limit}")
        for name in ("verify_rows", "chunk"):
            if getattr(self, name) > self.max_length:
                raise UsageError(
                    f"{_option(name)} {getattr(self, name)} does not fit a cache of --max-length {self.max_length}; "
                    "lower the one or raise the other"
                )

    @classmethod
    def fitting(
        cls,
        positions: int,
        batch: int | None = None,
        max_length: int | None = None,
        verify_rows: int | None = None,
        chunk: int | None = None,
    ) -> Ranges:
        """Ranges for a model of this many ``positions``; None for a default, which is lowered to what fits.

        Raises:
            UsageError: as for the class, and a ``max_length`` beyond the positions.
        """
        length = min(positions, DEFAULT_LENGTH) if max_length is None else max_length
        if length > positions:
            raise UsageError(f"--max-length {length} is more than the {positions} positions of the model; lower it")
        rows = min(cls.verify_rows, length) if verify_rows is None else verify_rows
        return cls(
            cls.batch if batch is None else batch, length, rows, min(cls.chunk, length) if chunk is None else chunk
        )

    def dims(self, profile: Profile) -> dict[str, Bounds]:
        """Smallest, typical and largest size of every symbolic dimension in ``profile``."""
        new = self.verify_rows if profile == "decode" else self.chunk
        likely = min(8, new) if profile == "decode" else new
        return {
            "batch": (1, 1, self.batch),
            "tokens": (1, likely, new),
            "features": (1, likely, new),
            "rows": (1, likely if profile == "decode" else 1, self.verify_rows),
            "kv_len": (1, max(1, self.max_length // 2), self.max_length),
            "capacity": (self.max_length, self.max_length, self.max_length),
        }


@dataclass(frozen=True)
class CompileOptions:
    """One compilation.

    ``graphs``: names of the graphs, None for all of the bundle. ``compute_capabilities``: TensorRT-RTX only, GPUs to
    compile for, empty for its default. ``version_compatible``: later versions may run the engine;
    ``hardware_compatible``: TensorRT only, other GPUs may. ``refittable``: weights can be replaced later;
    ``strip_weights``: and are left out of the plan. ``timing_cache``: TensorRT only, file that is read and extended.
    ``plugins``: the form of verification in the engine, see :mod:`dspark_export.engines.plugins`.

    Raises:
        UsageError: an option the flavour does not have.
    """

    flavour: Flavour = "tensorrt-rtx"
    ranges: Ranges = field(default_factory=Ranges)
    graphs: tuple[str, ...] | None = None
    compute_capabilities: tuple[str, ...] = ()
    version_compatible: bool = False
    hardware_compatible: HardwareCompatibility = "none"
    refittable: bool = False
    strip_weights: bool = False
    timing_cache: Path | None = None
    plugins: PluginsOption = "auto"

    def __post_init__(self) -> None:
        if self.flavour not in get_args(Flavour):
            raise UsageError(f"--backend {self.flavour} is unknown; choose {' or '.join(get_args(Flavour))}")
        if self.hardware_compatible not in get_args(HardwareCompatibility):
            choices = ", ".join(get_args(HardwareCompatibility))
            raise UsageError(f"--hardware-compatible {self.hardware_compatible} is unknown; choose {choices}")
        if self.plugins not in get_args(PluginsOption):
            raise UsageError(f"--plugins {self.plugins} is unknown; choose {', '.join(get_args(PluginsOption))}")
        if self.flavour == "tensorrt-rtx":
            self._check_rtx()
        elif self.compute_capabilities:
            raise UsageError(
                "--compute-capability is for tensorrt-rtx; tensorrt compiles for the GPU of this machine "
                "(--hardware-compatible widens that)"
            )

    def _check_rtx(self) -> None:
        for given in self.compute_capabilities:
            if not re.fullmatch(r"\d+\.\d", given) or given not in RTX_CAPABILITIES:
                raise UsageError(
                    f"--compute-capability {given} is not one that TensorRT-RTX compiles for; choose "
                    f"{', '.join(RTX_CAPABILITIES)} (data-centre GPUs of 9.0 and 10.0 are for --backend tensorrt)"
                )
        if len(set(self.compute_capabilities)) < len(self.compute_capabilities):
            raise UsageError("--compute-capability names one capability twice; give each once")
        for option, is_given in {
            "--hardware-compatible": self.hardware_compatible != "none",
            "--version-compatible": self.version_compatible,
            "--timing-cache": self.timing_cache is not None,
            "--plugins aot": self.plugins == "aot",
        }.items():
            if is_given:
                raise UsageError(
                    f"{option} is for tensorrt; a tensorrt-rtx engine holds no kernels: they are made on the machine "
                    "that runs it"
                )

    @property
    def targets(self) -> str:
        """The last part of the folder's name."""
        return "-".join(f"sm{c.replace('.', '')}" for c in self.compute_capabilities) or "default"

    def settings(self) -> dict[str, Any]:
        """What the compiler's process has to know, as JSON values."""
        return {
            "flavour": self.flavour,
            "compute_capabilities": list(self.compute_capabilities),
            "version_compatible": self.version_compatible,
            "hardware_compatible": self.hardware_compatible,
            "refittable": self.refittable or self.strip_weights,
            "strip_weights": self.strip_weights,
            "timing_cache": None if self.timing_cache is None else str(self.timing_cache),
        }


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
