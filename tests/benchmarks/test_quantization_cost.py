"""What a quantized bundle is away from its fp32 bundle."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import quantization_cost
from dspark_export.build import build
from dspark_export.build_options import BuildOptions
from tests import tiny_models


@settings(max_examples=50, deadline=None)
@given(positions=st.integers(1, 6), vocab=st.integers(2, 30), seed=st.integers(0, 2**32 - 1))
def test_distances(positions: int, vocab: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    wanted, found = random.standard_normal((2, positions, vocab)) * 5
    itself = quantization_cost.distances(wanted, wanted + 3.0)  # a shift of all logits is no difference
    np.testing.assert_allclose(itself, np.tile([0.0, 1.0], (positions, 1)), atol=1e-9)
    divergence, same = quantization_cost.distances(wanted, found).T
    p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (wanted, found))
    np.testing.assert_allclose(divergence, (p * np.log(p / q)).sum(1), rtol=1e-6, atol=1e-9)
    assert (divergence >= 0).all() and (same == (wanted.argmax(1) == found.argmax(1))).all()


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_models.save_checkpoint("llama", tmp_path / "model")
    bundles = [str(tmp_path / precision) for precision in ("fp32", "w8a8")]
    for path, precision in zip(bundles, ("fp32", "w8a8"), strict=True):
        build(BuildOptions(str(model), Path(path), precision=precision, self_draft="none", threads=1))  # type: ignore[arg-type]
    (tmp_path / "prompts.txt").write_text("one two three\nfour five six seven\n")
    given_ = [bundles[0], bundles[0], bundles[1], "--prompts", str(tmp_path / "prompts.txt"), "--max-new-tokens", "12"]
    monkeypatch.setattr(sys, "argv", ["quantization_cost.py", *given_, "--threads", "1"])
    assert quantization_cost.main() == 0
    itself, quantized = capsys.readouterr().out.splitlines()[-2:]
    assert itself.split()[-1] == "100.0%" and float(itself.split()[-2]) < 1e-6
    assert quantized.split()[-3] == "24" and 0 < float(quantized.split()[-2]) < 1
