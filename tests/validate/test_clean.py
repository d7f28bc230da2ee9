"""No false alarms: clean builds of several architectures and precisions pass. See also `benchmarks/clean_builds.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.clean_builds import clean_build


@pytest.mark.parametrize(
    ("arch", "precision"),
    [
        ("llama", "int4"),
        ("gemma3_text", "bf16"),
        ("deepseek_v2", "fp32"),
        ("gpt2", "int8"),
        ("qwen3", "w8a8"),
        ("llama", "keep"),
    ],
)
def test_a_clean_build_passes(arch: str, precision: str, tmp_path: Path) -> None:
    report = clean_build(arch, precision, tmp_path)
    assert report.passed, [(c.id, c.measured, c.limit, c.message) for c in report.failures()]
