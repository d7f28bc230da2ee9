"""Everything a GPU can show of a bundle, in one report.

    python benchmarks/gpu_report.py BUNDLE --out report [--backends tensorrt-rtx,onnxruntime-cuda] [--limit 2]

For every backend that can be opened here: are its logits those of the CPU backend, is speculative text equal to plain
text, how fast is it against one read of the weights, what does a pass cost by its rows, what does the host do in a
round, what do CUDA graphs gain, what does overlapping host work with a pass gain over waiting for it, and pictures of
some rounds: host, target, draft and copies on one time axis. With a GPU, also the tests of tests/gpu and the bandwidth
of the plugins' kernels. Writes report.json, report.md and pictures to --out. ``--backends onnxruntime`` runs the same
on the CPU.

Exit codes: 0; 1 if a test failed, a token of the logits differs, or a text of an exact bundle; 8 if no backend can be
opened.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import numpy as np

from dspark_export.bench.bandwidth import bytes_per_token, measure_bandwidth
from dspark_export.bench.runner import run
from dspark_export.bench.spans import HostSpans, Span, SpannedCuda, SpannedPlan
from dspark_export.bench.timeline import draw_timeline, host_microseconds, last_rounds
from dspark_export.build.row_noise import row_logits
from dspark_export.prompts.sets import load_sets
from dspark_export.prompts.texts import encode
from dspark_runtime import Bundle
from dspark_runtime.backends.cuda import CudaBindings
from dspark_runtime.backends.device import DeviceEngine, Plan
from dspark_runtime.backends.opening import BackendName, DeviceBackend
from dspark_runtime.backends.tensorrt_device import this_device
from dspark_runtime.errors import BackendError, DsparkError
from dspark_runtime.processors import this_machine
from dspark_runtime.speculation.costs import measure_pass_ms

ROOT = Path(__file__).resolve().parent.parent
BACKENDS = ("tensorrt-rtx", "tensorrt", "onnxruntime-cuda")
ROWS = (1, 2, 4, 8)
PICTURED = 6  # rounds
CONTEXT = 128
NEW_TOKENS = 96
PACKAGES = ("onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx-cu13", "cuda-core", "cuda-bindings", "torch")


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
    host = HostSpans(isinstance(target, DeviceEngine))
    bundle.with_fresh_schedule().with_observer(host).generate(ids[0], speculate="ngram", **generated(options))
    work, beside = host_microseconds(host.spans)
    figures: dict[str, Any] = {
        "logits": logits,
        "exact": bundle.exact,
        "differing_texts": len(result.divergences),
        "modes": [asdict(summary) for summary in found],
        "weight_bytes_per_token": read,
        "pass_ms": measure_pass_ms(target, ROWS, context=CONTEXT),
        "host_us_per_round": work,
        "host_us_beside_a_pass": beside,
        "verifies_on_device": target.open(target.allocate(1, 256)).verifies,
    }
    if isinstance(target, DeviceEngine):
        figures |= overlapped_and_serial(name, options, ids[0])
    else:
        draw_timeline(last_rounds(host.spans, PICTURED), options.out / f"timeline-{name}.png", f"{name}: n-gram drafts")
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
    """Largest difference of logits, and rows whose most likely token differs by more than the difference explains."""
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


def generated(options: argparse.Namespace) -> dict[str, Any]:
    """How the texts are generated whose rounds are looked at."""
    return {"max_new_tokens": options.tokens, "draft_length": 4, "ignore_eos": True}


class WatchedBackend(DeviceBackend):
    """A device backend that times its streams."""

    def _plan(self, *args: Any) -> Plan:
        return cast(Plan, SpannedPlan(super()._plan(*args), args[-1]))


def overlapped_and_serial(name: str, options: argparse.Namespace, ids: Sequence[int]) -> dict[str, Any]:
    """Speed with overlapped host work and with waiting at once, and a picture of both, timed by events."""
    figures: dict[str, Any] = {}
    for overlap, label in ((True, "overlapped"), (False, "serial")):
        bundle, _ = on_device(name, options, overlap, watched=False)
        for mode in ("ngram", "auto"):
            for _ in range(2):  # the first one captures graphs
                found = bundle.with_fresh_schedule().generate(ids, speculate=mode, **generated(options))
            figures[f"tokens_per_second_{label}_{mode}"] = found.stats.tokens_per_second
        watched, cuda = on_device(name, options, overlap, watched=True)
        spans = spans_of(watched, cuda, ids, options)
        draw_timeline(
            last_rounds(spans, PICTURED),
            options.out / f"timeline-{name}{'' if overlap else '-serial'}.png",
            f"{name}: the last {PICTURED} rounds, {label}",
        )
    return figures


def spans_of(bundle: Bundle, cuda: SpannedCuda, ids: Sequence[int], options: argparse.Namespace) -> list[Span]:
    """Spans of the host and of all streams for one text, after one that captures graphs."""
    bundle.with_fresh_schedule().generate(ids, speculate="auto", **generated(options))
    cuda.spans()
    host = HostSpans(device=True)
    bundle.with_fresh_schedule().with_observer(host).generate(ids, speculate="auto", **generated(options))
    return [*host.spans, *cuda.spans()]


def on_device(name: str, options: argparse.Namespace, overlap: bool, watched: bool) -> tuple[Bundle, SpannedCuda]:
    """The bundle on a separate device backend; ``watched``: everything it enqueues is timed."""
    plain = Bundle.open(options.bundle, verify_digests=False)
    settings = replace(plain.engine_options, overlap=overlap)
    cuda = SpannedCuda(CudaBindings(options.device))
    kind, given = (WatchedBackend, {"cuda": lambda number: cuda}) if watched else (DeviceBackend, {})
    backend = kind(plain.files, cast(BackendName, name), settings, options.device, **cast(Any, given))
    return Bundle(plain.files, settings, plain.exact, None, backend), cuda


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
            f"{logits['differing_tokens']} of {logits['rows']} rows have another top token that this does not explain",
            *([f"* one read of the weights a token would be {limit:.0f} tokens/s"] if limit else []),
            "* a pass takes "
            + ", ".join(f"{ms:.3f} ms for {rows} rows" for rows, ms in passes.items())
            + f"; 8 rows are {passes[8] / passes[1]:.2f}x of one",
            f"* the host works {found['host_us_per_round']:.0f} us in a round, "
            f"{found['host_us_beside_a_pass']:.0f} of them on text and chunks",
            f"* trees are verified on {'the device' if found['verifies_on_device'] else 'the host'}",
            *overlap_lines(found),
        ]
        if "tokens_per_second_with_graphs" in found:
            lines.append(
                f"* CUDA graphs: {found['tokens_per_second_with_graphs']:.1f} tokens/s with, "
                f"{found['tokens_per_second_without_graphs']:.1f} without"
            )
        lines += ["", f"![rounds](timeline-{name}.png)", ""]
        if "tokens_per_second_serial_ngram" in found:
            lines += [f"![rounds, waiting at once](timeline-{name}-serial.png)", ""]
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


def overlap_lines(found: dict[str, Any]) -> list[str]:
    """Overlapping host work with a pass against waiting at once."""
    return [
        f"* {mode}: {found[f'tokens_per_second_overlapped_{mode}']:.1f} tokens/s with work beside passes, "
        f"{found[f'tokens_per_second_serial_{mode}']:.1f} waiting at once"
        for mode in ("ngram", "auto")
        if f"tokens_per_second_serial_{mode}" in found
    ]


if __name__ == "__main__":
    sys.exit(main())
