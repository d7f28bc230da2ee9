"""How far a quantized bundle is from its fp32 bundle."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import quantization_cost
from dspark_export.build.options import BuildOptions
from dspark_export.build.pipeline import build
from dspark_export.build.row_noise import distances
from tests import tiny_models


@settings(max_examples=50, deadline=None)
@given(positions=st.integers(1, 6), vocab=st.integers(2, 30), seed=st.integers(0, 2**32 - 1))
def test_distances(positions: int, vocab: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    wanted, found = random.standard_normal((2, positions, vocab)) * 5
    itself = distances(wanted, wanted + 3.0)  # a shift of all logits is not a difference
    np.testing.assert_allclose(itself, np.tile([0.0, 1.0], (positions, 1)), atol=1e-9)
    divergence, same = distances(wanted, found).T
    p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (wanted, found))
    np.testing.assert_allclose(divergence, (p * np.log(p / q)).sum(1), rtol=1e-6, atol=1e-9)
    assert (divergence >= 0).all() and (same == (wanted.argmax(1) == found.argmax(1))).all()


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_models.save_checkpoint("llama", tmp_path / "model")
    bundles = [str(tmp_path / precision) for precision in ("fp32", "w8a8")]
    for path, precision in zip(bundles, ("fp32", "w8a8"), strict=True):
        build(BuildOptions(str(model), Path(path), precision=precision, self_draft="none", threads=1))  # type: ignore[arg-type]
    (tmp_path / "prompts.txt").write_text("one two three\nfour five six seven\n")
    given = [bundles[0], bundles[1], "--prompts", str(tmp_path / "prompts.txt"), "--max-new-tokens", "12"]
    command = ["quantization_cost.py", bundles[0], *given, "--threads", "1"]
    monkeypatch.setattr(sys, "argv", [*command, "--json"])
    assert quantization_cost.main() == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["bundle"], row["of"]) for row in rows] == [(b, of) for b in bundles for of in ("prompts", "responses")]
    itself, quantized = rows[1], rows[3]
    assert itself["same_token"] == 1 and itself["kl"] < 1e-6
    assert quantized["positions"] == itself["positions"] == 24 and 0 < quantized["kl"] < 1

    monkeypatch.setattr(sys, "argv", command)
    assert quantization_cost.main() == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[:3] for line in lines] == [[row["bundle"], row["of"], str(row["positions"])] for row in rows]
