"""Attention in sequence order: against float64, and the law over rows, chunks, trees, batches and threads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.plugins.cpu.library import Kernels

Array = np.ndarray[Any, Any]

VOCAB, POSITIONS, CAPACITY = 50, 700, 640
several = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@dataclass(frozen=True)
class Shape:
    """One attention layer whose queries, keys and values are a table of tokens."""

    heads: int = 6
    kv_heads: int = 2
    width: int = 32
    value_width: int = 32
    turned: int = 32
    softcap: float = 0.0
    window: int = 0
    sinks: bool = False
    interleaved: int = 0

    @property
    def columns(self) -> int:
        return (self.heads + self.kv_heads) * self.width + self.kv_heads * self.value_width

    @property
    def attributes(self) -> dict[str, Any]:
        return {
            "heads": self.heads,
            "scale": self.width**-0.5,
            "softcap": self.softcap,
            "interleaved": self.interleaved,
            "key_offset": self.heads * self.width,
            "value_offset": (self.heads + self.kv_heads) * self.width,
        }


class Layer:
    """``shape`` with random numbers, run by one library; caches are bound in place."""

    def __init__(self, kernels: Kernels, shape: Shape, threads: int = 1, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.shape = shape
        self.table = rng.standard_normal((VOCAB, shape.columns)).astype(np.float32)
        angles = np.arange(POSITIONS)[:, None] / 100.0 ** (np.arange(shape.turned // 2) / max(1, shape.turned // 2))
        self.cos, self.sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        self.sinks = rng.standard_normal(shape.heads).astype(np.float32)
        caches = [np.zeros((1, shape.kv_heads, CAPACITY, w), np.float32) for w in (shape.width, shape.value_width)]
        inputs = self.inputs(np.zeros((1, 1), np.int64), np.zeros((1, 1), np.int64), np.ones((1, 1, 1, 1), bool), [0])
        names = ("query", "key", "value", "past_key", "past_value", "attention_mask", "write_indices", "position_ids")
        known = inputs | {"past_key": caches[0], "past_value": caches[1]}
        order = {name: known[name] for name in (*names, "cos", "sin", "sinks") if name in known}
        operator = {(False, False): "SequenceAttention", (True, False): "RotaryAttention"}
        operator |= {(False, True): "SinkAttention", (True, True): "RotarySinkAttention"}
        kind = operator[shape.turned > 0, shape.sinks]
        self.session = kernels.session(kind, order, 3, threads=threads, **shape.attributes)

    def inputs(self, tokens: Array, positions: Array, mask: Array, starts: list[int]) -> dict[str, Array]:
        x = self.table[tokens]
        given = {"query": x, "key": x, "value": x, "attention_mask": mask, "position_ids": positions}
        given["write_indices"] = np.array(starts, np.int64)
        if self.shape.turned:
            given |= {"cos": self.cos, "sin": self.sin}
        return given | ({"sinks": self.sinks} if self.shape.sinks else {})

    def cache(self, batch: int = 1, rubbish: float = np.nan) -> list[ort.OrtValue]:
        s = self.shape
        arrays = [np.full((batch, s.kv_heads, CAPACITY, w), rubbish, np.float32) for w in (s.width, s.value_width)]
        return [ort.OrtValue.ortvalue_from_numpy(a) for a in arrays]

    def run(self, cache: list[ort.OrtValue], tokens: Array, positions: Array, mask: Array, starts: list[int]) -> Array:
        """One pass [batch, tokens] in place; y [batch, tokens, columns]."""
        binding = self.session.io_binding()
        for name, array in self.inputs(tokens, positions, mask, starts).items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        binding.bind_output("out0")
        for i, (name, value) in enumerate(zip(("past_key", "past_value"), cache, strict=True)):
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(f"out{i + 1}", value)
        self.session.run_with_iobinding(binding)
        y: Array = binding.copy_outputs_to_cpu()[0]
        return y

    def seen(self, positions: Array, ancestors: Array, start: int, kv_len: int) -> Array:
        """A mask [tokens, kv_len] of rows after ``start`` committed tokens, with the layer's window."""
        mask = np.zeros((len(positions), kv_len), bool)
        mask[:, :start] = True
        mask[:, start : start + len(positions)] = ancestors
        if self.shape.window:
            places = np.arange(kv_len)
            places[start : start + len(positions)] = positions
            mask &= positions[:, None] - places < self.shape.window
        return mask

    def chain(self, cache: list[ort.OrtValue], text: Array, cuts: list[int], extra: int = 0) -> Array:
        """``text`` in passes that end at ``cuts``; y [len(text), columns]."""
        out, at = [], 0
        for end in [*cuts, len(text)]:
            n = end - at
            if n <= 0:
                continue
            positions = np.arange(at, end)
            mask = self.seen(positions, np.tri(n, dtype=bool), at, min(CAPACITY, end + extra))
            out.append(self.run(cache, text[None, at:end], positions[None], mask[None, None], [at])[0])
            at = end
        return np.concatenate(out)

    def plain(self, text: Array) -> Array:
        """One row at a time."""
        return self.chain(self.cache(), text, list(range(1, len(text))))

    def wanted(self, text: Array) -> Array:
        """The same in float64, all rows at once."""
        s, n = self.shape, len(text)
        x = self.table[text].astype(np.float64)
        q = x[:, : s.heads * s.width].reshape(n, s.heads, s.width)
        k = x[:, s.heads * s.width : (s.heads + s.kv_heads) * s.width].reshape(n, s.kv_heads, s.width)
        v = x[:, -s.kv_heads * s.value_width :].reshape(n, s.kv_heads, s.value_width)
        q, k = self._turned(q), self._turned(k)
        k, v = (np.repeat(a, s.heads // s.kv_heads, axis=1) for a in (k, v))
        scores = np.einsum("ihd,jhd->hij", q, k) * s.width**-0.5
        if s.softcap:
            scores = s.softcap * np.tanh(scores / s.softcap)
        distance = np.arange(n)[:, None] - np.arange(n)
        hidden = (distance < 0) | ((distance >= s.window) if s.window else False)
        scores = np.where(hidden, -np.inf, scores)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        extra = np.exp(self.sinks[:, None] - scores.max(-1)) if s.sinks else 0.0
        weights /= (weights.sum(-1) + extra)[..., None]
        return np.einsum("hij,jhd->ihd", weights, v).reshape(n, -1)

    def _turned(self, x: Array) -> Array:
        n, half = len(x), self.shape.turned // 2
        if not half:
            return x
        c, s = self.cos[:n, None].astype(np.float64), self.sin[:n, None].astype(np.float64)
        y = x.copy()
        if self.shape.interleaved:
            a, b = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
            y[..., 0 : 2 * half : 2], y[..., 1 : 2 * half : 2] = a * c - b * s, b * c + a * s
        else:
            a, b = x[..., :half], x[..., half : 2 * half]
            y[..., :half], y[..., half : 2 * half] = a * c - b * s, b * c + a * s
        return y


SHAPES = {
    "llama": Shape(),
    "wide": Shape(heads=2, kv_heads=1, width=256, value_width=256, turned=256),
    "gemma": Shape(softcap=30.0, window=40),
    "sinks": Shape(sinks=True, window=300),
    "latent": Shape(heads=3, kv_heads=3, width=48, value_width=20, turned=16, interleaved=1),
    "odd": Shape(heads=4, kv_heads=1, width=9, value_width=7, turned=6),
    "unturned": Shape(turned=0, sinks=True),
}


def text_of(length: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, VOCAB, length)


@pytest.mark.parametrize("name", SHAPES)
def test_against_float64_on_every_set(every_set: list[Kernels], name: str) -> None:
    text = text_of(300)
    results = []
    for kernels in every_set:
        layer = Layer(kernels, SHAPES[name])
        results.append(layer.chain(layer.cache(), text, [100, 290]))
        assert np.abs(results[-1] - layer.wanted(text)).max() < 2e-5
        assert np.array_equal(results[-1], results[0]), kernels.name


@pytest.mark.parametrize("name", SHAPES)
def test_rows_chunks_threads_and_rubbish_change_no_bit(best: Kernels, name: str) -> None:
    text = text_of(530)
    wanted = Layer(best, SHAPES[name]).plain(text)
    for threads, cuts, rubbish, extra in (
        (1, [], np.nan, 0),
        (2, [1, 3, 6, 14, 46, 255, 256, 257, 513], 1e4, 100),
        (4, list(range(8, 530, 8)), np.nan, 64),
        (3, [500], -np.inf, 1000),
    ):
        layer = Layer(best, SHAPES[name], threads)
        got = layer.chain(layer.cache(rubbish=rubbish), text, cuts, extra)
        assert np.array_equal(got, wanted), (threads, cuts)


def random_tree(rng: np.random.Generator, nodes: int) -> tuple[Array, Array]:
    """Ancestors [nodes, nodes] with the node itself, and depths."""
    ancestors = np.eye(nodes, dtype=bool)
    for node in range(1, nodes):
        ancestors[node] |= ancestors[rng.integers(0, node)]
    return ancestors, ancestors.sum(1) - 1


@pytest.mark.parametrize("name", SHAPES)
@several
@given(prefix=st.integers(0, 530), nodes=st.integers(2, 40), seed=st.integers(0, 1 << 20))
def test_a_tree_has_the_bits_of_plain_decoding(best: Kernels, name: str, prefix: int, nodes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    layer = Layer(best, SHAPES[name], threads=2)
    text, tokens = text_of(prefix, seed), rng.integers(0, VOCAB, nodes)
    ancestors, depths = random_tree(rng, nodes)
    cache = layer.cache()
    if prefix:
        layer.chain(cache, text, [])
    positions = prefix + depths
    mask = layer.seen(positions, ancestors, prefix, prefix + nodes + int(rng.integers(0, 40)))
    tree = layer.run(cache, tokens[None], positions[None], mask[None, None], [prefix])[0]
    for leaf in rng.choice(nodes, min(nodes, 4), replace=False):
        way = tokens[np.flatnonzero(ancestors[leaf])]
        alone = layer.cache()
        whole = np.concatenate([text, way])
        cuts = [prefix, *range(prefix + 1, len(whole))]
        assert np.array_equal(layer.chain(alone, whole, cuts)[-1], tree[leaf])


def test_a_ragged_batch_has_the_bits_of_its_sequences(best: Kernels) -> None:
    for shape in (SHAPES["llama"], SHAPES["gemma"]):
        layer = Layer(best, shape, threads=2)
        rng = np.random.default_rng(3)
        starts, rows, kv_len = [300, 0, 17, 256], 9, 320
        texts = [text_of(start, i) for i, start in enumerate(starts)]
        alone, new, trees = [], rng.integers(0, VOCAB, (4, rows)), [random_tree(rng, rows) for _ in starts]
        views = [np.full((4, 2, CAPACITY, 32), np.nan, np.float32) for _ in range(2)]
        masks, positions = np.zeros((4, 1, rows, kv_len), bool), np.zeros((4, rows), np.int64)
        for b, (start, (ancestors, depths)) in enumerate(zip(starts, trees, strict=True)):
            cache = layer.cache()
            if start:
                layer.chain(cache, texts[b], [])
            for view, value in zip(views, cache, strict=True):
                view[b] = value.numpy()[0]
            positions[b] = start + depths
            mask = layer.seen(positions[b], ancestors, start, kv_len)
            masks[b, 0] = mask
            alone.append(layer.run(cache, new[b : b + 1], positions[b : b + 1], mask[None, None], [start])[0])
        together = [ort.OrtValue.ortvalue_from_numpy(view) for view in views]
        assert np.array_equal(layer.run(together, new, positions, masks, starts), np.stack(alone))


def test_rows_that_only_see_themselves_or_nothing(best: Kernels) -> None:
    layer = Layer(best, SHAPES["llama"])
    cache = layer.cache()
    layer.chain(cache, text_of(20), [])
    mask = np.zeros((1, 1, 3, 40), bool)
    mask[0, 0, 0, :21] = True
    mask[0, 0, 1, 21] = True  # padding
    y = layer.run(cache, np.array([[5, 0, 0]]), np.array([[20, 0, 0]]), mask, [20])[0]
    value = layer.table[0, -64:].reshape(2, 32)
    assert np.allclose(y[1].reshape(6, 32), np.repeat(value, 3, axis=0), rtol=1e-6)
    assert (y[2] == 0).all()


def test_a_cache_bound_elsewhere_is_copied(best: Kernels) -> None:
    layer = Layer(best, SHAPES["llama"])
    cache = layer.cache(rubbish=0.5)
    inputs = layer.inputs(np.array([[3]]), np.array([[4]]), np.ones((1, 1, 1, 5), bool), [4])
    past = {name: value.numpy() for name, value in zip(("past_key", "past_value"), cache, strict=True)}
    y, key, value = layer.session.run(None, inputs | past)
    assert np.isfinite(y).all()
    assert (past["past_key"] == 0.5).all() and (np.delete(key, 4, axis=2) == 0.5).all()
    assert np.array_equal(value[0, :, 4], layer.table[3, -64:].reshape(2, 32))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"write_indices": np.array([8])}, "do not fit kv_len"),
        ({"write_indices": np.array([-1])}, "do not fit kv_len"),
        ({"write_indices": np.array([0, 0])}, r"must be \[1\]"),
        ({"attention_mask": np.ones((1, 1, 3, 10), bool)}, "must be .* kv_len"),
        ({"attention_mask": np.ones((1, 1, 2, 800), bool)}, "longer than the capacity"),
        ({"position_ids": np.array([[0, 900]])}, "outside the rotary tables"),
        ({"past_value": np.zeros((1, 2, 9, 32), np.float32)}, "equal but for the width"),
        ({"past_key": np.zeros((1, 4, CAPACITY, 32), np.float32)}, "equal but for the width"),
        ({"value": np.zeros((1, 2, 10), np.float32)}, "has no columns"),
        (
            {"cos": np.zeros((9, 40), np.float32), "sin": np.zeros((9, 40), np.float32)},
            "turns 80 columns of a head of 32",
        ),
    ],
)
def test_refusals_say_what_is_wrong(best: Kernels, change: dict[str, Array], reason: str) -> None:
    layer = Layer(best, SHAPES["llama"])
    inputs = layer.inputs(np.array([[1, 2]]), np.array([[0, 1]]), np.ones((1, 1, 2, 9), bool), [0])
    past = {name: value.numpy() for name, value in zip(("past_key", "past_value"), layer.cache(), strict=True)}
    with pytest.raises(Exception, match=reason):
        layer.session.run(None, inputs | past | change)
