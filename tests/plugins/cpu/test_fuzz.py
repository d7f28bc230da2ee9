"""Random shapes and types give a status or a result, never a crash."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.plugins.cpu.library import DRAFT_TYPES, Kernels
from tests.plugins.cpu.packing import FORMATS

Array = np.ndarray[Any, Any]

quiet = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
PRODUCTS = [
    f"{kind}{form}"
    for form in FORMATS
    for kind in ("Product", "Experts", "Lookup")
    if kind == "Product" or form != "W8A8"
]
dimension = st.sampled_from([0, 1, 2, 3, 4, 5, 8, 16, 17, 32])


def array(draw: st.DrawFn, dtype: Any, ranks: tuple[int, ...]) -> Array:
    rank = draw(st.sampled_from(ranks))
    shape = (
        draw(st.lists(dimension, min_size=rank, max_size=rank))
        if draw(st.booleans())
        else [1, 2, 4, 16, 4][-rank or 5 :]
    )
    a = np.asarray(np.resize(np.arange(7), shape).astype(dtype))
    return np.asarray(-a) if a.dtype.kind in "fi" and draw(st.booleans()) else a


def attempt(kernels: Kernels, operator: str, inputs: dict[str, Array], outputs: int = 1, **attributes: Any) -> None:
    try:
        kernels.run(operator, inputs, outputs, threads=2, **attributes)
    except Exception as error:
        assert "ONNXRuntimeError" in str(error)


@quiet
@given(data=st.data())
def test_products(best: Kernels, data: st.DataObject) -> None:
    draw = data.draw
    operator = draw(st.sampled_from(PRODUCTS))
    form = operator.removeprefix("Product").removeprefix("Experts").removeprefix("Lookup")
    wide = {"Float32": np.float32, "Float16": np.float16}.get(form, np.uint8)
    if form == "BFloat16":
        return
    inputs = {"x": array(draw, np.int64 if operator.startswith("Lookup") else np.float32, (0, 1, 2, 3))}
    if operator.startswith("Experts"):
        inputs["expert"] = array(draw, np.int64, (1,))
    inputs["weight"] = array(draw, wide, (2, 3, 4, 5, 6))
    if wide is np.uint8:
        inputs["scale"] = array(draw, draw(st.sampled_from([np.float32, np.float16])), (2, 3, 4))
    if form.endswith("Minimum"):
        inputs["minimum"] = array(draw, np.float32, (3, 4))
    attempt(best, operator, inputs, N=draw(st.sampled_from([-1, 0, 1, 15, 16, 17, 40])))


@quiet
@given(data=st.data())
def test_attention(best: Kernels, data: st.DataObject) -> None:
    draw = data.draw
    batch, tokens, capacity = draw(st.integers(0, 2)), draw(st.integers(0, 5)), draw(st.integers(0, 40))
    kv, width, other = draw(st.integers(0, 3)), draw(st.integers(0, 20)), draw(st.integers(0, 20))
    heads = kv * draw(st.integers(0, 3)) or 1
    kv_len = draw(st.integers(0, capacity))
    inputs = {
        "query": np.ones((batch, tokens, heads * width), np.float32),
        "key": np.ones((batch, tokens, kv * width), np.float32),
        "value": np.ones((batch, tokens, kv * other), np.float32),
        "past_key": np.full((batch, kv, capacity, width), np.nan, np.float32),
        "past_value": np.full((batch, kv, capacity, other), np.nan, np.float32),
        "attention_mask": draw(st.sampled_from([np.ones, np.zeros]))((batch, 1, tokens, kv_len)).astype(bool),
        "write_indices": np.array([draw(st.integers(-1, 41)) for _ in range(batch)], np.int64),
        "position_ids": np.array(
            [
                [draw(st.sampled_from([0, 1, 2, 3, 9, -5, 1 << 40, -(1 << 63), (1 << 63) - 1])) for _ in range(tokens)]
                for _ in range(batch)
            ],
            np.int64,
        ).reshape(batch, tokens),
    }
    if draw(st.booleans()):
        name = draw(st.sampled_from(list(inputs)))
        inputs[name] = inputs[name][..., : draw(st.integers(0, 3))]
    operator = "SequenceAttention"
    if draw(st.booleans()):
        operator = "RotaryAttention"
        inputs["cos"] = inputs["sin"] = np.ones(
            draw(st.sampled_from([(10, 3), (batch, tokens, 4), (1, tokens, 2), (0, 0), (3,)])), np.float32
        )
    attempt(
        best, operator, inputs, 3, heads=heads, scale=1.0, query_offset=draw(st.sampled_from([0, 0, 0, 3, 1 << 62]))
    )


@quiet
@given(data=st.data())
def test_drafts(best: Kernels, data: st.DataObject) -> None:
    draw = data.draw
    batch, slots, vocab, rank = (draw(st.integers(0, n)) for n in (2, 3, 40, 4))
    number = st.sampled_from([0.0, 1.0, -1.0, np.nan, np.inf, -np.inf])
    tiles = -(-vocab // 16)
    inputs = {
        "base_logits": np.full((batch, slots, vocab), draw(number), np.float32),
        "anchor_ids": np.array([draw(st.integers(-1, 5)) for _ in range(batch)], np.int64),
        "temperature": np.full(batch, draw(number), np.float32),
        "uniforms": np.full((batch, slots), draw(number), np.float32),
        "forbidden": np.full(draw(st.sampled_from([0, vocab, 3])), draw(number), np.float32),
        "target_ids": np.arange(draw(st.sampled_from([0, vocab, 3]))),
    }
    operator = draw(st.sampled_from(["BlockDraft", "MarkovDraftFloat32", "MarkovDraftFloat16"]))
    if operator != "BlockDraft":
        kind = np.float32 if operator.endswith("32") else np.float16
        inputs["anchor_rows"] = np.ones((5, rank), draw(st.sampled_from([np.float32, np.float16, np.int64])))
        inputs["drafted_rows"] = np.full((max(0, vocab + draw(st.integers(-1, 1))), rank), draw(number), kind)
        inputs["weight"] = np.full((tiles, rank, 16), draw(number), kind)
    if draw(st.booleans()):
        name = draw(st.sampled_from(list(inputs)))
        inputs[name] = inputs[name][..., : draw(st.integers(0, 3))]
    candidates, beams = draw(st.sampled_from([-1, 0, 1, 2, 8, 65])), draw(st.sampled_from([-1, 0, 1, 3, 100]))
    attempt(best, operator, inputs, 8, output_types=DRAFT_TYPES, candidates=candidates, beams=beams)
