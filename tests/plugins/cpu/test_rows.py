"""Norms, gates and activations: against float64, equal on every set, blind to other rows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from tests.plugins.cpu.library import Kernels

Array = np.ndarray[Any, Any]

_erf = np.vectorize(math.erf)
ACTIVATIONS: dict[str, Any] = {
    "Silu": lambda x: x / (1 + np.exp(-x)),
    "Gelu": lambda x: 0.5 * x * (1 + _erf(x / math.sqrt(2))),
    "GeluTanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "Sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "Tanh": np.tanh,
    "Softcap": lambda x: 30 * np.tanh(x / 30),
}


def numbers(*shape: int, size: float = 1.0) -> Array:
    return (np.random.default_rng(sum(shape)).standard_normal(shape) * size).astype(np.float32)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(every_set: list[Kernels], name: str) -> None:
    x = np.concatenate(
        [numbers(5000, size=3), np.linspace(-20, 20, 4001, dtype=np.float32), np.float32([0, 1e-30, 90])]
    )
    extra = {"cap": 30.0} if name == "Softcap" else {}
    wanted = ACTIVATIONS[name](x.astype(np.float64))
    results = [kernels.run(name, {"x": x}, **extra)[0] for kernels in every_set]
    assert (np.abs(results[0] - wanted) <= 4e-7 * np.maximum(np.abs(wanted), np.minimum(1, np.abs(x)))).all()
    for kernels, result in zip(every_set, results, strict=True):
        assert np.array_equal(result, results[-1]), kernels.name
    beyond = every_set[0].run(name, {"x": np.float32([np.nan, -300, 300])}, **extra)[0]
    limits = {"Silu": 300, "Gelu": 300, "GeluTanh": 300, "Softcap": 30}
    assert np.isnan(beyond[0]) and np.isclose(beyond[2], limits.get(name, 1), rtol=1e-4) and np.isfinite(beyond[1])


@pytest.mark.parametrize("name", ("Silu", "Gelu", "GeluTanh"))
def test_gates(every_set: list[Kernels], name: str) -> None:
    gate, up = numbers(7, 3, 45), numbers(7, 3, 45, size=2)
    wanted = ACTIVATIONS[name](gate.astype(np.float64)) * up
    for kernels in every_set:
        (packed,) = kernels.run(f"{name}Gate", {"x": np.concatenate([gate, up], axis=-1)})
        (apart,) = kernels.run(f"{name}Product", {"gate": gate, "up": up})
        assert np.abs(packed - wanted).max() < 2e-6
        assert np.array_equal(packed, apart)


@pytest.mark.parametrize("width", (1, 7, 48, 64, 100, 576))
def test_norms(every_set: list[Kernels], width: int) -> None:
    x, skip, weight, bias = (numbers(*shape) for shape in ((9, width), (9, width), (width,), (width,)))
    x += 3
    total = x.astype(np.float64) + skip

    def rms(v: Array) -> Array:
        return v / np.sqrt((v**2).mean(-1, keepdims=True) + 1e-6) * weight

    centred = x - x.astype(np.float64).mean(-1, keepdims=True)
    cases = {
        "RMSNorm": ({"x": x, "weight": weight}, [rms(x.astype(np.float64))]),
        "SkipRMSNorm": ({"x": x, "skip": skip, "weight": weight}, [rms(total), total]),
        "LayerNorm": (
            {"x": x, "weight": weight, "bias": bias},
            [centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * weight + bias],
        ),
    }
    for name, (inputs, wanted) in cases.items():
        results = [k.run(name, inputs, len(wanted), threads=2, epsilon=1e-6) for k in every_set]
        for mine, theirs in zip(results[0], wanted, strict=True):
            assert np.abs(mine - theirs).max() < (2e-3 if name == "LayerNorm" and width == 1 else 3e-6) * (
                1 + np.abs(theirs).max()
            )
        for kernels, result in zip(every_set, results, strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(result, results[-1], strict=True)), kernels.name
        whole = every_set[0].run(name, inputs, len(wanted), epsilon=1e-6)
        for row in range(9):
            one = {n: a[row : row + 1] if a.ndim == 2 else a for n, a in inputs.items()}
            for mine, theirs in zip(every_set[0].run(name, one, len(wanted), epsilon=1e-6), whole, strict=True):
                assert np.array_equal(mine[0], theirs[row])


def test_shapes_that_do_not_fit(best: Kernels) -> None:
    x = numbers(2, 5)
    for operator, inputs, reason in (
        ("RMSNorm", {"x": x, "weight": numbers(4)}, r"needed is \[5\]"),
        ("SkipRMSNorm", {"x": x, "skip": numbers(1, 5), "weight": numbers(5)}, "must have the shape of x"),
        ("SiluGate", {"x": x}, "even number of columns"),
        ("SiluProduct", {"gate": x, "up": numbers(2, 4)}, "must have the shape of gate"),
    ):
        with pytest.raises(Exception, match=reason):
            best.run(operator, inputs, 2 if operator == "SkipRMSNorm" else 1)
    for operator in ("RMSNorm", "Silu"):
        inputs = {"x": np.zeros((0, 5), np.float32)} | ({"weight": numbers(5)} if operator == "RMSNorm" else {})
        assert best.run(operator, inputs)[0].shape == (0, 5)
