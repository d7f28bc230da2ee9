"""Registers, shared memory and spills of every kernel, as ptxas reports them; fails where one spills.

    python plugins/resources.py                         all architectures, writes plugins/resources.json
    python plugins/resources.py --architectures 90      one, checked only

Exit code 0; 1 if a kernel spills; 2 if nvcc is missing or fails. Needs no package.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
_ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\d+)a?'")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:.*?, (\d+) bytes smem)?")


class CompilerError(RuntimeError):
    """nvcc is not there or refuses the kernels."""


@dataclass(frozen=True)
class Resources:
    """Of one kernel: registers a thread; static shared memory of a block, stack and spills of a thread in bytes."""

    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_bytes: int


def parse(text: str) -> dict[str, Resources]:
    """Kernels in what ``nvcc -Xptxas -v`` writes.

    Raises:
        CompilerError: a kernel without its figures; ptxas has changed its words.
    """
    found: dict[str, Resources] = {}
    parts = _ENTRY.split(text)
    for name, body in zip(parts[1::3], parts[3::3], strict=True):
        spills, used = _SPILLS.search(body), _USED.search(body)
        if spills is None or used is None:
            raise CompilerError(f"no figures for kernel {name} in what ptxas wrote; this script reads CUDA 13's words")
        stack, stored, loaded = (int(number) for number in spills.groups())
        found[name] = Resources(int(used[1]), int(used[2] or 0), stack, stored + loaded)
    return found


def compile_kernels(nvcc: str, architecture: int) -> dict[str, Resources]:
    """Compiles all kernels for ``sm_<architecture>`` and returns what each takes.

    Raises:
        CompilerError: nvcc cannot be run, or fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, "-std=c++17", "-O3", "-fmad=false", f"-arch=sm_{architecture}", "-cubin", "-Xptxas", "-v"]
        command += [f"-I{HERE / 'include'}", str(HERE / "kernels" / "all.cu"), "-o", str(Path(folder) / "all.cubin")]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise CompilerError(f"{nvcc} cannot be run: {error}; give nvcc's path with --nvcc") from error
    if done.returncode != 0:
        raise CompilerError(f"nvcc failed for sm_{architecture}:\n{done.stderr}")
    return parse(done.stdout + done.stderr)


def spilling(found: dict[str, Resources]) -> list[str]:
    """Names of kernels that spill registers, with their bytes."""
    return [f"{name} ({r.spill_bytes} bytes)" for name, r in sorted(found.items()) if r.spill_bytes]


def main() -> int:
    parser = argparse.ArgumentParser(description="Registers, shared memory and spills of every kernel.")
    parser.add_argument("--nvcc", default=shutil.which("nvcc") or "nvcc")
    parser.add_argument("--architectures", nargs="+", type=int, default=None, help="compute capabilities, such as 90")
    parser.add_argument(
        "--report", type=Path, default=None, help="file to write; with all architectures resources.json"
    )
    options = parser.parse_args()
    architectures = options.architectures or ARCHITECTURES
    report = options.report or (HERE / "resources.json" if options.architectures is None else None)
    try:
        kernels = {f"sm_{number}": compile_kernels(options.nvcc, number) for number in architectures}
    except CompilerError as error:
        print(error, file=sys.stderr)
        return 2
    if report is not None:
        written = {arch: {name: asdict(r) for name, r in sorted(of.items())} for arch, of in kernels.items()}
        report.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    bad = [f"{arch}: {name}" for arch, of in kernels.items() for name in spilling(of)]
    for line in bad:
        print(f"spills registers: {line}", file=sys.stderr)
    print(f"{sum(map(len, kernels.values()))} kernels for {', '.join(kernels)}: {len(bad)} spill")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
