"""Measures for ``w8a8``, on a few texts, how large the activations are that matrix products read.

Two things follow. Channels of norms that only products read are scaled to similar magnitudes, by powers of two that
the weights take over (:mod:`dspark_export.passes.smooth_norms`). And where all input rows of a product have similar
magnitudes, they are rounded with one scale, known when the graph is made, instead of one scale per row: the largest
magnitude of all is the last step, and anything larger is clipped. That saves three small operators, plus one for each
product. A self-draft's rows have other magnitudes, because it skips layers: they keep their own scales.

Both are stored where they act: exponents in gains and weights, ranges with the graph (:data:`RANGES`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers.pytorch_utils import Conv1D

from dspark_export.checkpoints.config import positions_of
from dspark_export.passes.match import RANGES, SMOOTHED
from dspark_export.passes.pack_projections import GROUPS
from dspark_export.passes.smooth_norms import SmoothNorms, norms_of_products
from dspark_export.prompts.sets import SHIPPED, load_sets

if TYPE_CHECKING:
    import onnx_ir as ir
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel

_PROMPTS_OF_A_SET, _TOKENS = 8, 128
_SHARE = 0.6
"""How much of a channel's size the weights take over: activations**share / weights**(1 - share) in SmoothQuant. A bit
more than half, since the activations have the coarser scale."""
_WORST = 0.003
"""Square error of rounding, relative to the square of a row, up to which all rows share one scale. In SmolLM2-135M
norms stay below 0.0017 and attention's outputs mostly below this; what down projections read, with few rows a hundred
times as large as others, reaches 1, and quadrupled the error of the whole model when it was rounded so."""
_STEPS = 127
_MOST = 12  # exponents stay within this, whatever a channel that is always 0 asks for


@dataclass(frozen=True)
class Calibration:
    """``exponents``: int8 [channels] by the name of a norm's gain. ``ranges``: the magnitude of the last step of what
    is rounded in front of a product, by the name of its weight."""

    exponents: Mapping[str, np.ndarray]
    ranges: Mapping[str, float]

    def apply(self, graphs: Mapping[str, ir.Model]) -> None:
        """Smooth the norms of a model's graphs, in place, and note the ranges with its ``target``."""
        for name, graph in graphs.items():
            SmoothNorms(self.exponents)(graph)
            graph.metadata_props[SMOOTHED] = json.dumps(sorted(self.exponents))
            graph.metadata_props[RANGES] = json.dumps(dict(self.ranges) if name == "target" else {}, sort_keys=True)


def calibrate(model: PreTrainedModel, tokenizer: Tokenizer, graph: ir.Model) -> Calibration:
    """Run ``model`` over the shipped prompts; ``graph`` is its optimized target graph, with weights in float.

    Products whose module cannot be found by the name of their weight keep a scale for every row, and so does the head.
    """
    readers = _readers(model, graph)
    room = min(_TOKENS, positions_of(model.config) or _TOKENS)
    texts = [tokenizer.encode(item.text).ids[:room] for item in load_sets(list(SHIPPED), _PROMPTS_OF_A_SET)]
    texts = [ids for ids in texts if ids]
    if not readers or not texts:
        return Calibration({}, {})
    norms = {gain: names for gain, names in norms_of_products(graph).items() if readers.keys() & set(names)}
    watched = {gain: next(name for name in names if name in readers) for gain, names in norms.items()}
    largest: dict[str, torch.Tensor] = {}

    def by_channel(weight: str, rows: torch.Tensor) -> None:
        found = rows.abs().amax(0)
        largest[weight] = torch.maximum(largest.get(weight, found), found)

    with _watching({weight: readers[weight] for weight in watched.values()}, by_channel):
        _run(model, texts)
    exponents, smooth = {}, {}
    for gain, names in norms.items():
        tensors = [graph.graph.initializers[name].const_value for name in names]
        sizes = np.max([np.abs(tensor.numpy()).max(axis=1) for tensor in tensors if tensor is not None], axis=0)
        exponents[gain] = smoothing(largest[watched[gain]].numpy(), sizes)
        smooth[watched[gain]] = torch.from_numpy(np.exp2(-exponents[gain].astype(np.float32)))
    seen: dict[str, list[torch.Tensor]] = {weight: [] for weight in readers}

    def by_row(weight: str, rows: torch.Tensor) -> None:
        rows = rows * smooth[weight] if weight in smooth else rows
        seen[weight].append(torch.stack((rows.abs().amax(1), rows.square().mean(1))))

    with _watching(readers, by_row):
        _run(model, texts)
    known = {weight: shared_range(*torch.cat(parts, 1).double().numpy()) for weight, parts in seen.items() if parts}
    alike = _alike(graph)
    return Calibration(
        exponents, {name: size for weight, size in known.items() if size is not None for name in alike[weight]}
    )


def shared_range(largest: np.ndarray, squares: np.ndarray) -> float | None:
    """Magnitude of the last step for all rows, from the ``largest`` magnitude and the mean square of each [rows].

    None where rows differ too much for one scale: rounded numbers are off by a step / sqrt(12), but by no more than
    their own size.
    """
    if not np.isfinite(largest).all() or not np.isfinite(squares).all():
        return None
    size = float(largest.max())
    if size <= 0:
        return None
    there = squares > 0
    errors = np.minimum((size / _STEPS) ** 2 / 12 / squares[there], 1.0)
    return size if errors.mean() <= _WORST else None


def stored_calibration(stored: ir.Model, fresh: ir.Model) -> Calibration | None:
    """The calibration of a bundle's target graph, None if it has none; ``fresh``: the same graph before any.

    Exponents follow from how far the stored gains are from the model's. A gain that is not a power of two away from it
    is damaged, and will differ from what this gives.
    """
    if RANGES not in stored.metadata_props:
        return None
    ranges: dict[str, float] = json.loads(stored.metadata_props[RANGES])
    exponents = {}
    for gain in json.loads(stored.metadata_props[SMOOTHED]):
        pair = [graph.graph.initializers.get(gain) for graph in (fresh, stored)]
        clean, kept = (
            None if value is None or value.const_value is None else value.const_value.numpy() for value in pair
        )
        if clean is None or kept is None or clean.shape != kept.shape:
            continue
        with np.errstate(all="ignore"):
            ratio = np.log2(np.abs(clean.astype(np.float64) / kept.astype(np.float64)))
        exponents[gain] = np.clip(np.rint(np.nan_to_num(ratio, posinf=0, neginf=0)), -_MOST, _MOST).astype(np.int8)
    return Calibration(exponents, ranges)


def smoothing(activations: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Exponents, int8 [channels], from the largest magnitudes of every channel of both sides; their mean is near 0."""
    known = (activations > 0) & (weights > 0) & np.isfinite(activations) & np.isfinite(weights)
    if not known.any():
        return np.zeros(len(activations), np.int8)
    a, w = (np.log2(np.where(known, side, 1).astype(np.float64)) for side in (activations, weights))
    wanted = np.where(known, _SHARE * a - (1 - _SHARE) * w, 0.0)
    wanted[known] -= wanted[known].mean()
    return np.clip(np.rint(wanted), -_MOST, _MOST).astype(np.int8)


def _alike(graph: ir.Model) -> dict[str, tuple[str, ...]]:
    """Weights [channels, outputs] of products by the first of those that read the same activations."""
    found: dict[ir.Value | None, list[str]] = {}
    for node in graph.graph:
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        if weight is not None and weight.is_initializer() and weight.shape is not None and len(weight.shape) == 2:
            found.setdefault(node.inputs[0], []).append(str(weight.name))
    return {names[0]: tuple(names) for names in found.values()}


def _readers(model: PreTrainedModel, graph: ir.Model) -> dict[str, torch.nn.Module]:
    """The module that reads each of the graph's activations, by the name of its weight in the graph."""
    found = {weight: _linear(model, weight) for weight in _alike(graph)}
    head = model.get_output_embeddings()
    return {weight: module for weight, module in found.items() if module is not None and module is not head}


def _linear(model: PreTrainedModel, weight: str) -> torch.nn.Module | None:
    """The linear module that ``weight`` belongs to; the first of those it was packed from."""
    packed = [weight.replace(f".{name}.", f".{parts[0]}.") for name, parts in GROUPS.items() if f".{name}." in weight]
    for name in (weight, *packed):
        try:
            module = model.get_submodule(name.removesuffix(".weight"))
        except AttributeError:
            continue
        if isinstance(module, torch.nn.Linear | Conv1D):
            return module
    return None


@contextmanager
def _watching(readers: Mapping[str, torch.nn.Module], note: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Give ``note`` what the modules read, [rows, channels], and the name they go by."""

    def hook(name: str) -> Callable[..., None]:
        def noted(_: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
            note(name, given[0].detach().float().flatten(0, -2))

        return noted

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in readers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def _run(model: PreTrainedModel, texts: Sequence[Sequence[int]]) -> None:
    for ids in texts:
        model(input_ids=torch.tensor([ids]), use_cache=False, logits_to_keep=1)
