"""Muon's steps: orthogonal, of AdamW's size, and the same arithmetic as PyTorch's own where that can run."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_export.train.optimizer import DrafterOptimizer, Muon, nearest_orthogonal, orthogonalized
from dspark_export.train.options import TrainOptions


@given(st.integers(2, 24), st.integers(2, 24), st.integers(0, 10**6), st.sampled_from([1e-6, 1.0, 1e6]))
@settings(max_examples=40, deadline=None)
def test_directions_stay_and_sizes_become_alike(rows: int, columns: int, seed: int, size: float) -> None:
    """U and V are those of the matrix; singular values that are not tiny beside the largest end near 1."""
    random = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=random) * size
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    turned = left.T @ nearest_orthogonal(matrix) @ right.T
    diagonal = turned.diagonal()
    assert turned.shape == (min(rows, columns),) * 2
    assert float((turned - torch.diag(diagonal)).abs().max()) < 2e-2
    large = values > 0.05 * values.norm()
    assert float(diagonal[large].min()) > 0.6 and float(diagonal.max()) < 1.3


def test_no_gradient_and_no_direction() -> None:
    assert not nearest_orthogonal(torch.zeros(3, 5)).any()
    parameter = torch.nn.Parameter(torch.ones(3, 5))
    Muon([parameter], 0.1).step()
    assert torch.equal(parameter, torch.ones(3, 5))


@pytest.mark.parametrize("shape", [(6, 6), (4, 16), (16, 4)])
def test_steps_are_those_of_torch_but_for_its_rounding(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    start = torch.randn(shape)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    mine = Muon([ours], 0.02)
    torchs = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        gradient = torch.randn(shape)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        mine.step()
        torchs.step()
    moved = float((theirs - start).norm())
    assert float((ours - theirs).detach().norm()) < 0.03 * moved  # theirs is bfloat16
    assert float((ours - start).detach().norm()) == pytest.approx(moved, rel=0.02)


def test_tables_and_norms_go_faster_beside_muon_and_no_faster_without() -> None:
    def moved(optimizer: str) -> tuple[float, float]:
        matrix, norm = torch.nn.Parameter(torch.zeros(4, 4)), torch.nn.Parameter(torch.zeros(4))
        named = {"fc.weight": matrix, "norm.weight": norm}
        assert orthogonalized("fc.weight", matrix) and not orthogonalized("norm.weight", norm)
        made = DrafterOptimizer(named, TrainOptions(optimizer=optimizer))  # type: ignore[arg-type]
        matrix.grad, norm.grad = torch.eye(4), torch.ones(4)
        made.step(0.01)
        return float(matrix.detach().pow(2).mean().sqrt()), float(norm.detach().abs().mean())

    both, alone = moved("muon"), moved("adamw")
    assert alone == pytest.approx((0.005, 0.01), rel=1e-3)
    assert both[1] == pytest.approx(0.05, rel=1e-3)
    assert both[0] == pytest.approx(0.002, rel=0.35)  # 0.2 of AdamW's size


def test_the_usual_rate_is_the_optimizers() -> None:
    assert TrainOptions().peak_rate > TrainOptions(optimizer="adamw").peak_rate > 0
    assert TrainOptions(rate=0.0).peak_rate == 0.0
