"""Facts about this machine that a figure is worthless without."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

_NOTABLE = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm")


@dataclass(frozen=True)
class Machine:
    """The processor: its name, the cores this process may use, and the instructions that matter for inference."""

    cpu: str
    physical_cores: int
    logical_cores: int
    instructions: tuple[str, ...]


def this_machine() -> Machine:
    """Read from /proc/cpuinfo where there is one, otherwise what Python knows."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    fallback = platform.processor() or platform.machine()
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return Machine(fallback, len(allowed), len(allowed), ())
    processors = [
        dict(re.findall(r"^(.*?)\s*:\s*(.*)$", block, re.MULTILINE)) for block in re.split(r"\n\s*\n", text.strip())
    ]
    mine = [p for p in processors if int(p.get("processor", -1)) in allowed]
    cores = {(p.get("physical id"), p["core id"]) for p in mine if "core id" in p}
    flags = set((mine[0].get("flags") or mine[0].get("Features") or "").split()) if mine else set()
    return Machine(
        cpu=mine[0].get("model name", fallback) if mine else fallback,
        physical_cores=len(cores) or len(allowed),
        logical_cores=len(allowed),
        instructions=tuple(flag for flag in _NOTABLE if flag in flags),
    )
