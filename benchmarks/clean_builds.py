"""Does validation raise false alarms? Builds tiny random models of many architectures and validates each.

    python -m benchmarks.clean_builds [--threads 1]

Prints a line per build and exits with 1 if a clean one fails.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from dspark_export.build.options import BuildOptions
from dspark_export.build.pipeline import build
from dspark_export.validate.checks import Report
from dspark_export.validate.options import ValidateOptions
from dspark_export.validate.run import validate
from dspark_runtime.bundle.precisions import PRECISIONS, Weights
from tests import tiny_models
from tests.checkpoints import quantized_samples

BUILDS: tuple[tuple[str, Weights], ...] = (
    *(("llama", weights) for weights in PRECISIONS),
    ("mistral", "fp32"),
    ("mistral", "int4"),
    ("qwen2", "int8"),
    ("qwen3", "bf16"),
    ("qwen3", "w8a8"),
    ("qwen3", "int4"),
    ("phi3", "fp32"),
    ("gemma2", "fp32"),
    ("gemma2", "int8"),
    ("gemma2", "w8a8"),
    ("gemma3_text", "bf16"),
    ("gemma3_text", "int4"),
    ("qwen3_moe", "int8"),
    ("mixtral", "fp32"),
    ("deepseek_v2", "w8a8"),
    ("deepseek_v2", "int8"),
    ("deepseek_v3", "fp32"),
    ("deepseek_v3", "fp16"),
    ("gpt2", "int8"),
    ("gpt2", "w8a8"),
    ("smollm3", "fp16"),
    ("olmo2", "int4"),
)


def clean_build(arch: str, precision: Weights, folder: Path, threads: int = 1) -> Report:
    """Build and validate one, against PyTorch."""
    tiny_models.save_checkpoint(arch, folder / "model")
    if PRECISIONS[precision].kept:
        quantized_samples.quantize(folder / "model", *quantized_samples.CASES["gptq 4 bits"])
    model, bundle = str(folder / "model"), folder / "bundle"
    build(BuildOptions(model=model, out=bundle, precision=precision, self_draft="layers=0,2", threads=threads))
    return validate(ValidateOptions(bundle, model=model, threads=threads, against="torch"))


def main() -> int:
    """0 if no clean build fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    threads = parser.parse_args().threads
    failed = 0
    for arch, precision in BUILDS:
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            report = clean_build(arch, precision, Path(folder), threads)
        failed += not report.passed
        wrong = "; ".join(f"{c.id} {c.measured} (limit {c.limit}) {c.message}" for c in report.failures())
        verdict = "passed" if report.passed else f"FAILED {wrong}"
        print(f"{arch:<12} {precision:<5} {len(report.checks)} checks, {time.perf_counter() - began:.0f} s: {verdict}")
    print(f"{failed} of {len(BUILDS)} clean builds failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
