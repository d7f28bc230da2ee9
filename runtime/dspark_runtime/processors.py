"""The processors this process may use, how many threads run one operator on them, and how to describe them."""

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


def allowed_processors() -> set[int]:
    """Numbers of the logical processors that the operating system gives to this process."""
    return set(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def described_processors() -> list[dict[str, str]]:
    """What /proc/cpuinfo says of every allowed processor; nothing where there is no such file."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return []
    allowed = allowed_processors()
    blocks = [
        dict(re.findall(r"^(.*?)\s*:\s*(.*)$", block, re.MULTILINE)) for block in re.split(r"\n\s*\n", text.strip())
    ]
    return [block for block in blocks if int(block.get("processor", -1)) in allowed]


def physical_cores() -> int:
    """Cores this process may use; logical processors where the operating system does not tell them apart."""
    cores = {(p.get("physical id"), p["core id"]) for p in described_processors() if "core id" in p}
    return len(cores) or len(allowed_processors())


def default_threads() -> int:
    """Threads per operator if no number was requested: ``OMP_NUM_THREADS``, otherwise one per physical core."""
    wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # a list is one number per level of nesting
    return min(int(wanted), 1024) if wanted.isdecimal() and int(wanted) > 0 else physical_cores()


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
