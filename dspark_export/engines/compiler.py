"""Runs the compiler's process for one graph and follows its progress."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dspark_export.engines.failures import crashed, explain
from dspark_export.engines.options import CompileOptions
from dspark_export.engines.plugin_forms import INLINED, Plugins
from dspark_export.engines.prepare import PreparedGraph

Progress = Callable[[str, int, int], None]
_WORKER = "dspark_export.engines.worker"


class CompilerSaid(Exception):
    """Everything the compiler said about a failure: the cause of the error that explains it."""


def compile_graph(
    graph: PreparedGraph,
    options: CompileOptions,
    plan: Path,
    log: Path,
    on_progress: Progress,
    plugins: Plugins = INLINED,
) -> dict[str, Any]:
    """Write the plan and the log of ``graph``, prepared for ``plugins``; returns the compiler's answer.

    ``on_progress`` hears phase, step and number of steps. An interruption ends the compiler as well.

    Raises:
        CompilerMissing: the flavour is not installed.
        EngineBuildError: it does not compile the graph; see :mod:`dspark_export.engines.failures`.
    """
    request = {
        **options.settings(),
        "onnx": str(graph.path),
        "plan": str(plan),
        "log": str(log),
        "shapes": list(graph.shapes.values()),
        "plugins": plugins.request(graph.plugins),
    }
    environment = {**os.environ, "POLYGRAPHY_USE_TENSORRT_RTX": "1" if options.flavour == "tensorrt-rtx" else "0"}
    answer: dict[str, Any] | None = None
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", _WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=environment,
        )
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(request))
            process.stdin.close()
            for line in process.stdout:
                event = json.loads(line)
                if event["event"] == "progress":
                    on_progress(event["phase"], event["step"], event["steps"])
                else:
                    answer = event
            code = process.wait()
        except BrokenPipeError:
            code = process.wait()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        stderr.seek(0)
        said = stderr.read()
    if answer is None:
        raise crashed(graph, options.flavour, code, said)
    if answer["event"] == "failed":
        raise explain(graph, options.flavour, answer) from CompilerSaid(answer["message"])
    return answer
