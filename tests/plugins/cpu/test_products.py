"""Products against float64 of the same quantized numbers, on every instruction set, and the law of their rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.plugins.cpu.library import Kernels
from tests.plugins.cpu.packing import BLOCKS, FLOATS, FORMATS, Packed, random_weights, rounded_rows

Array = np.ndarray[Any, Any]

several = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
shapes = st.fixed_dictionaries(
    {
        "rows": st.integers(1, 20),
        "blocks": st.integers(1, 4),
        "block": st.sampled_from([16, 32, 48, 64, 128]),
        "odd": st.integers(0, 3),  # k beyond a multiple of four, where the format allows it
        "columns": st.integers(1, 100),
        "half": st.booleans(),
        "seed": st.integers(0, 1 << 20),
    }
)


def close(y: Array, x: Array, matrix: Array) -> None:
    """Within float32 rounding of a sum of as many products."""
    allowed = (np.abs(x) @ np.abs(matrix)) * 2.0**-23 * (4 + np.sqrt(len(matrix)))
    assert (np.abs(y - x @ matrix) <= allowed + 1e-30).all()


@pytest.mark.parametrize("form", FORMATS)
@several
@given(shape=shapes)
def test_a_product_on_every_set(every_set: list[Kernels], form: str, shape: dict[str, Any]) -> None:
    rng = np.random.default_rng(shape["seed"])
    k = shape["blocks"] * shape["block"] - (shape["odd"] if form in (*FLOATS, "W8A8") else 0)
    packed = random_weights(rng, form, k, shape["columns"], shape["block"], shape["half"])
    x = (rng.standard_normal((shape["rows"], k)) * 10.0 ** rng.integers(-3, 4)).astype(np.float32)
    results = [s.run(f"Product{form}", {"x": x} | packed.inputs, N=shape["columns"])[0] for s in every_set]
    close(results[-1], rounded_rows(form, x, shape["block"]), packed.matrix)
    for mine, result in zip(every_set, results, strict=True):
        assert np.array_equal(result, results[-1]), mine.name


@pytest.mark.parametrize("form", FORMATS)
def test_a_row_does_not_see_the_others(best: Kernels, form: str) -> None:
    rng = np.random.default_rng(1)
    packed = random_weights(rng, form, 192, 147)
    x = rng.standard_normal((33, 192)).astype(np.float32)
    sessions = [best.session(f"Product{form}", {"x": x} | packed.inputs, threads=n, N=147) for n in (1, 2, 4)]
    fed = {name: a for name, a in packed.inputs.items() if form != "BFloat16"}
    alone = np.concatenate([sessions[0].run(None, {"x": row[None]} | fed)[0] for row in x])
    for rows in range(1, 34):
        got = sessions[rows % 3].run(None, {"x": x[:rows]} | fed)[0]
        assert np.array_equal(got, alone[:rows]), rows
    (batched,) = best.run(f"Product{form}", {"x": x.reshape(3, 11, 192)} | packed.inputs, N=147)
    assert np.array_equal(batched.reshape(33, -1), alone)


@pytest.mark.parametrize("form", ("Float16", "BFloat16"))
def test_16_bit_weights_give_the_bits_of_the_widened_ones(best: Kernels, form: str) -> None:
    rng = np.random.default_rng(2)
    packed = random_weights(rng, form, 77, 50)
    x = rng.standard_normal((5, 77)).astype(np.float32)
    (mine,) = best.run(f"Product{form}", {"x": x} | packed.inputs, N=50)
    wide = np.pad(packed.matrix.astype(np.float32), [(0, 0), (0, 14)]).reshape(77, 4, 16).transpose(1, 0, 2)
    (theirs,) = best.run("ProductFloat32", {"x": x, "weight": np.ascontiguousarray(wide)}, N=50)
    assert np.array_equal(mine, theirs)


def test_a_fixed_range_cuts_larger_activations(every_set: list[Kernels]) -> None:
    rng = np.random.default_rng(3)
    packed = random_weights(rng, "W8A8", 64, 20)
    x = rng.standard_normal((4, 64)).astype(np.float32) * 3
    for mine in every_set:
        (y,) = mine.run("ProductW8A8", {"x": x} | packed.inputs, N=20, range=2.0)
        close(y, rounded_rows("W8A8", x, 0, 2.0), packed.matrix)


@pytest.mark.parametrize("form", FORMATS)
def test_extreme_activations_stay_in_their_row(every_set: list[Kernels], form: str) -> None:
    rng = np.random.default_rng(4)
    packed = random_weights(rng, form, 64, 20)
    x = rng.standard_normal((6, 64)).astype(np.float32)
    x[1], x[3], x[4, 7], x[5, 8] = 0, 1e-40, np.nan, np.inf
    for mine in every_set:
        (y,) = mine.run(f"Product{form}", {"x": x} | packed.inputs, N=20)
        close(y[:3], rounded_rows(form, x[:3], 32), packed.matrix)
        assert (np.abs(y[3]) < 1e-30).all()
        assert not np.isfinite(y[4:]).any()


@pytest.mark.parametrize("form", [f for f in FORMATS if f != "W8A8"])
def test_experts_multiply_as_their_own_products_do(best: Kernels, form: str) -> None:
    rng = np.random.default_rng(5)
    matrices = [random_weights(rng, form, 64, 24) for _ in range(5)]
    x = rng.standard_normal((23, 64)).astype(np.float32)
    expert = rng.choice([0, 3, 4], 23)
    stacked = {name: np.stack([m.inputs[name] for m in matrices]) for name in matrices[0].inputs}
    for unused in (1, 2):  # never read
        for a in stacked.values():
            a[unused] = 255 if a.dtype == np.uint8 else np.nan
    for threads in (1, 3):
        (y,) = best.run(f"Experts{form}", {"x": x, "expert": expert} | stacked, threads=threads, N=24)
        for e in (0, 3, 4):
            (wanted,) = best.run(f"Product{form}", {"x": x[expert == e]} | matrices[e].inputs, N=24)
            assert np.array_equal(y[expert == e], wanted)


@pytest.mark.parametrize("form", [f for f in FORMATS if f != "W8A8"])
def test_a_lookup_reads_columns(every_set: list[Kernels], form: str) -> None:
    rng = np.random.default_rng(6)
    packed = random_weights(rng, form, 96, 50, half=True)
    ids = rng.integers(0, 50, (2, 3))
    extra = {"K": 96} if form == "BFloat16" else {}
    for mine in every_set:
        (y,) = mine.run(f"Lookup{form}", {"ids": ids} | packed.inputs, N=50, **extra)
        assert np.array_equal(y, packed.matrix.T[ids].astype(np.float32))


@pytest.mark.parametrize("form", BLOCKS)
def test_wrong_shapes_are_refused_in_words(best: Kernels, form: str) -> None:
    rng = np.random.default_rng(7)
    packed = random_weights(rng, form, 64, 20)
    x = np.zeros((2, 64), np.float32)

    def refused(match: str, x: Array = x, packed: Packed = packed, **changed: Array) -> None:
        with pytest.raises(Exception, match=match):
            best.run(f"Product{form}", {"x": x} | packed.inputs | changed, N=20)

    refused("not a multiple of the block 32", x[:, :40])
    refused(r"does not fit K = 96.*needed is \[2, 3, .*\]", np.zeros((2, 96), np.float32))
    refused(r"scale float32 \[1, 2, 16\] does not fit", scale=packed.inputs["scale"][:1])
    refused("must be float32 or float16", scale=packed.inputs["scale"].astype(np.int64))
    with pytest.raises(Exception, match="attribute N"):
        best.run(f"Product{form}", {"x": x} | packed.inputs)
