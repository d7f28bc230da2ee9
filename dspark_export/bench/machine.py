"""Facts about this machine that a figure is worthless without."""

from __future__ import annotations

import platform
from dataclasses import dataclass

from dspark_runtime.processors import allowed_processors, described_processors, physical_cores

_NOTABLE = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm")


@dataclass(frozen=True)
class Machine:
    """The processor: its name, the cores this process may use, and the instructions that matter for inference."""

    cpu: str
    physical_cores: int
    logical_cores: int
    instructions: tuple[str, ...]


def this_machine() -> Machine:
    """What the operating system says of the processors this process may use."""
    mine = described_processors()
    first = mine[0] if mine else {}
    flags = set((first.get("flags") or first.get("Features") or "").split())
    return Machine(
        cpu=first.get("model name", platform.processor() or platform.machine()),
        physical_cores=physical_cores(),
        logical_cores=len(allowed_processors()),
        instructions=tuple(flag for flag in _NOTABLE if flag in flags),
    )
