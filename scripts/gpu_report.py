"""Everything a GPU can show of a bundle, in one report.

    python scripts/gpu_report.py BUNDLE --out report [--backends tensorrt-rtx,onnxruntime-cuda] [--limit 2]

For every backend that can be opened here: are its logits those of the CPU backend, is speculative text equal to plain
text, how fast is it against one read of the weights, what does a pass cost by its rows, what does the host do in a
round, what do CUDA graphs bring, and a picture of some rounds. With a GPU, also the tests of tests/gpu and the
bandwidth of the plugins' kernels. Writes report.json, report.md and pictures to --out. ``--backends onnxruntime`` runs
the same on the CPU.

Exit codes: 0; 1 if a test failed, a token of the logits differs, or a text of an exact bundle; 8 if no backend can be
opened.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dspark_export.bench.bandwidth import bytes_per_token, measure_bandwidth
from dspark_export.bench.machine import this_machine
from dspark_export.bench.prompts import load_sets
from dspark_export.bench.runner import encode, run
from dspark_export.measure import row_logits
from dspark_runtime import Bundle
from dspark_runtime.backends.device import DeviceEngine
from dspark_runtime.backends.tensorrt_device import this_device
from dspark_runtime.costs import measure_pass_ms
from dspark_runtime.errors import BackendError, DsparkError
from dspark_runtime.loop import DecodingLoop

ROOT = Path(__file__).resolve().parent.parent
BACKENDS = ("tensorrt-rtx", "tensorrt", "onnxruntime-cuda")
ROWS = (1, 2, 4, 8)
PICTURED = 24  # rounds
CONTEXT = 128
NEW_TOKENS = 96
PACKAGES = ("onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx-cu13", "cuda-core", "cuda-bindings", "torch")
Round = tuple[float, float, float, float, float]


def main() -> int:
    """Measure and write; see the module's text for the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--backends", default=",".join(BACKENDS))
    parser.add_argument("--device", type=int, default=0)
    parser.add_argument("--limit", type=int, default=2, help="prompts of each set")
    parser.add_argument("--tokens", type=int, default=NEW_TOKENS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"machine": machine(options.device), "backends": {}, "refused": {}}
    for name in options.backends.split(","):
        try:
            print(f"{name} ...", file=sys.stderr, flush=True)
            report["backends"][name] = of_backend(name, options)
        except DsparkError as error:
            report["refused"][name] = str(error)
    if report["machine"]["gpu"] is not None:
        report["kernels"] = command([sys.executable, str(ROOT / "benchmarks" / "plugin_kernels.py"), "--json"])
        report["tests"] = command([sys.executable, "-m", "pytest", "-q", str(ROOT / "tests" / "gpu"), "-rs"])
    (options.out / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    (options.out / "report.md").write_text(written(report), encoding="utf-8")
    print(options.out / "report.md")
    if not report["backends"]:
        for why in report["refused"].values():
            print(why, file=sys.stderr)
        return BackendError.exit_code
    wrong = any(
        (b["exact"] and b["differing_texts"]) or b["logits"]["differing_tokens"] for b in report["backends"].values()
    )
    return int(wrong or report.get("tests", {}).get("exit_code", 0) != 0)


def machine(number: int) -> dict[str, Any]:
    """What the figures depend on."""
    gpu, found = this_device(number), this_machine()
    return {
        "gpu": None if gpu is None else asdict(gpu),
        "cpu": found.cpu,
        "cores": found.physical_cores,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := installed(name)) is not None},
    }


def installed(name: str) -> str | None:
    """Version of a distribution; None if it is not there."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def of_backend(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one backend."""
    bundle = Bundle.open(options.bundle, backend=name, device=options.device)
    reference = Bundle.open(options.bundle)
    prompts = load_sets(["code", "chat"], options.limit)
    ids = [encode(bundle, item.text)[-CONTEXT:] for item in prompts]
    target = bundle.target
    logits = agreement(target, reference.target, ids)
    modes = ["off", "ngram", "auto"]
    result = run(bundle, prompts, modes, max_new_tokens=options.tokens, repeats=2)
    found = [s for s in result.summaries if s.set == "all"]
    read = bytes_per_token(bundle.files)
    rounds: list[Round] = []
    with recorded(rounds):
        bundle.with_fresh_schedule().generate(ids[0], max_new_tokens=options.tokens, draft_length=4, ignore_eos=True)
    picture(rounds[-PICTURED:], name, options.out / f"timeline-{name}.png")
    host = np.median([(passed - drafted) + (done - ran) for _, drafted, passed, ran, done in rounds])
    figures: dict[str, Any] = {
        "logits": logits,
        "exact": bundle.exact,
        "differing_texts": len(result.divergences),
        "modes": [asdict(summary) for summary in found],
        "weight_bytes_per_token": read,
        "pass_ms": measure_pass_ms(target, ROWS, context=CONTEXT),
        "host_us_per_round": float(host) * 1e6,
        "verifies_on_device": target.open(target.allocate(1, 256)).verifies,
    }
    if isinstance(target, DeviceEngine) and target.replay:
        target.replay = False
        fresh = bundle.with_fresh_schedule().generate(ids[0], max_new_tokens=options.tokens, speculate="off")
        target.replay = True
        replayed = bundle.with_fresh_schedule().generate(ids[0], max_new_tokens=options.tokens, speculate="off")
        figures["tokens_per_second_without_graphs"] = fresh.stats.tokens_per_second
        figures["tokens_per_second_with_graphs"] = replayed.stats.tokens_per_second
    if name == "onnxruntime":
        figures["bandwidth"] = measure_bandwidth(this_machine().physical_cores).read
    return figures


def agreement(engine: Any, reference: Any, prompts: list[list[int]]) -> dict[str, float]:
    """Largest difference of logits, and rows whose likeliest token differs by more than the difference explains."""
    largest, rows, differing = 0.0, 0, 0
    for ids in prompts:
        count = min(8, len(ids) - 2)
        own, other = (row_logits(e, ids, 4, 8)[-count:] for e in (engine, reference))
        delta = np.abs(own - other).max(axis=-1)
        gap = np.take_along_axis(other, other.argmax(-1)[:, None], -1)[:, 0]
        gap = gap - np.take_along_axis(other, own.argmax(-1)[:, None], -1)[:, 0]
        largest, rows = max(largest, float(delta.max())), rows + count
        differing += int((gap > 2 * delta).sum())
    return {"largest_difference": largest, "rows": rows, "differing_tokens": differing}


@contextmanager
def recorded(rounds: list[Round]) -> Iterator[None]:
    """Keep when the phases of every round began, in seconds."""
    original = DecodingLoop._account

    def account(self: DecodingLoop, began: float, drafted: float, passed: float, verified: float, *rest: Any) -> None:
        rounds.append((began, drafted, passed, verified, time.perf_counter()))
        original(self, began, drafted, passed, verified, *rest)

    with patch.object(DecodingLoop, "_account", account):
        yield


def picture(rounds: list[Round], name: str, to: Path) -> None:
    """Draft, host and pass of each round on one line of time."""
    figure = Figure(figsize=(11, 2.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    start = rounds[0][0]
    lanes = {"draft": (0, 1), "fill": (1, 2), "pass": (2, 3), "commit": (3, 4)}
    colours = {"draft": "#4c72b0", "fill": "#8c8c8c", "pass": "#dd8452", "commit": "#55a868"}
    for lane, (label, (a, b)) in enumerate(lanes.items()):
        bars = [((times[a] - start) * 1e3, max(times[b] - times[a], 0) * 1e3) for times in rounds]
        axes.broken_barh(bars, (lane - 0.4, 0.8), color=colours[label])
    axes.set_yticks(range(len(lanes)), list(lanes))
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds")
    axes.set_title(f"{name}: the last {len(rounds)} rounds")
    figure.savefig(to, dpi=130)


def command(line: list[str]) -> dict[str, Any]:
    """What a command said; its output is read as JSON if it is that."""
    done = subprocess.run(line, capture_output=True, text=True, check=False, cwd=ROOT)
    try:
        said: Any = json.loads(done.stdout)
    except ValueError:
        said = (done.stdout + done.stderr)[-4000:]
    return {"exit_code": done.returncode, "said": said}


def written(report: dict[str, Any]) -> str:
    """The report as a page."""
    facts = report["machine"]
    gpu = facts["gpu"]
    where = "no GPU" if gpu is None else f"{gpu['name']}, compute capability {gpu['capability']}"
    packages = ", ".join(f"{name} {version}" for name, version in facts["packages"].items())
    lines = [f"# {where}", "", f"{facts['cpu']}, {facts['cores']} cores; {packages}", ""]
    kernels = report.get("kernels", {}).get("said")
    copied = kernels["copy_gb_per_s"] * 1e9 if isinstance(kernels, dict) else None
    for name, found in report["backends"].items():
        limit = (found.get("bandwidth") or copied or 0) / found["weight_bytes_per_token"]
        logits = found["logits"]
        lines += [
            f"## {name}",
            "",
            "| mode | tokens/s | to plain | accepted length | host ms of a round | texts equal |",
        ]
        lines += ["|---|---|---|---|---|---|"]
        for mode in found["modes"]:
            speed, ratio = mode["tokens_per_second"] or 0, mode["ratio"] or 0
            numbers = f"{speed:.1f} | {ratio:.2f}x | {mode['accepted_length']:.2f} | {mode['host_ms']:.3f}"
            lines.append(f"| {mode['mode']} | {numbers} | {mode['equal']} of {mode['prompts']} |")
        passes = found["pass_ms"]
        lines += [
            "",
            f"* logits differ from the CPU backend's by at most {logits['largest_difference']:.3g}; "
            f"{logits['differing_tokens']} of {logits['rows']} rows have another likeliest token than that explains",
            *([f"* one read of the weights a token would be {limit:.0f} tokens/s"] if limit else []),
            "* a pass takes "
            + ", ".join(f"{ms:.3f} ms for {rows} rows" for rows, ms in passes.items())
            + f"; 8 rows are {passes[8] / passes[1]:.2f}x of one",
            f"* the host works {found['host_us_per_round']:.0f} us in a round, trees are verified on "
            f"{'the device' if found['verifies_on_device'] else 'the host'}",
        ]
        if "tokens_per_second_with_graphs" in found:
            lines.append(
                f"* CUDA graphs: {found['tokens_per_second_with_graphs']:.1f} tokens/s with, "
                f"{found['tokens_per_second_without_graphs']:.1f} without"
            )
        lines += ["", f"![rounds](timeline-{name}.png)", ""]
    for name, why in report["refused"].items():
        lines += [f"## {name}", "", why, ""]
    if isinstance(kernels, dict):
        lines += ["## Kernels", "", f"A copy moves {copied / 1e9 if copied else 0:.0f} GB/s.", ""]
        lines += ["| kernel | us | GB/s | times one read |", "|---|---|---|---|"]
        for row in kernels["kernels"]:
            lines.append(
                f"| {row['kernel']} | {row['microseconds']:.1f} | {row['gb_per_s']:.0f} | {row['ratio']:.2f} |"
            )
    if "tests" in report:
        lines += ["", "## Tests", "", "```", str(report["tests"]["said"]).strip(), "```"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
