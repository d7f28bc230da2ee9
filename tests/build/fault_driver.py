"""Runs one build per fault, each in a forked child, so that importing and tracing is done only once.

``python -m tests.build.fault_driver MODEL FOLDER`` writes one JSON line per fault: its name, how the child ended, and
what was left in the child's folder. The child does to itself, when the wanted stage begins, what the fault is.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

import dspark_export.build.pipeline as building
from dspark_export.build.options import BuildOptions
from dspark_export.build.pipeline import Stage, build
from dspark_export.checkpoints import resolve
from dspark_runtime.errors import DsparkError
from tests.shared import traces

STAGES: tuple[Stage, ...] = (
    "check",
    "load",
    "self-draft",
    "trace",
    "optimize",
    "save",
    "tokenizer",
    "measure",
    "phrases",
    "commit",
)
NOBODY = 65534


def at(stage: Stage, action: Callable[[], None]) -> Callable[[Stage], None]:
    """A listener that acts when ``stage`` begins."""
    return lambda now: action() if now == stage else None


def kill() -> None:
    """What the kernel does to a process out of memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt() -> None:
    """Ctrl-C."""
    os.kill(os.getpid(), signal.SIGINT)


def small_files() -> None:
    """No file may grow beyond 30 kB from now on: writing the weights fails half-way."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))


def full_disk() -> None:
    """Every write by Python fails from now on as on a full disk."""
    import builtins

    original = builtins.open

    def failing(file: object, mode: str = "r", *args: object, **kwargs: object) -> object:
        if isinstance(file, str | os.PathLike) and any(letter in mode for letter in "wax+"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        return original(file, mode, *args, **kwargs)  # type: ignore[call-overload]

    builtins.open = failing  # type: ignore[assignment]
    Path.open = lambda self, mode="r", *a, **k: failing(self, mode, *a, **k)  # type: ignore[method-assign,assignment]


def run(model: str, out: Path, listener: Callable[[Stage], None], user: int | None) -> int:
    """Build in a forked child; its exit code, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if user is not None:
                os.setuid(user)
            build(BuildOptions(model=model, out=out, self_draft="none", threads=1, phrases=1), listener)
            code = 0
        except DsparkError as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            code = error.exit_code
        except KeyboardInterrupt:
            code = 130
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def trace_once(model: str) -> None:
    """Trace here what every child would trace again; the graphs are not what the faults are about."""
    traces.share()
    graphs = building._trace(resolve(model).load_model(torch.float32), None, ())
    building._trace = lambda model, layers, taps: graphs


def main(model: str, folder: Path) -> None:
    """All faults, then one undisturbed build into a folder that a killed build left dirty."""
    trace_once(model)

    def report(name: str, code: int, out: Path) -> None:
        left = sorted(path.name for path in out.parent.iterdir())
        complete = (out / "manifest.json").exists()
        print(json.dumps({"fault": name, "code": code, "left": left, "complete": complete}), flush=True)

    def fault(name: str, listener: Callable[[Stage], None], user: int | None = None, mode: int = 0o755) -> Path:
        out = folder / name / "bundle"
        out.parent.mkdir(mode=mode)
        report(name, run(model, out, listener, user), out)
        return out

    for stage in STAGES:
        out = fault(f"kill-{stage}", at(stage, kill))
        report(f"rerun-{stage}", run(f"{model}-missing", out, lambda stage: None, None), out)
        fault(f"interrupt-{stage}", at(stage, interrupt))
    fault("small-files", at("save", small_files))
    fault("full-disk-save", at("save", full_disk))
    fault("full-disk-tokenizer", at("tokenizer", full_disk))
    fault("full-disk-commit", at("commit", full_disk))
    if os.geteuid() == 0:
        fault("read-only", lambda stage: None, user=NOBODY)
    else:
        fault("read-only", lambda stage: None, mode=0o555)
    report("undisturbed", run(model, folder / "kill-save" / "bundle", lambda stage: None, None), out)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
