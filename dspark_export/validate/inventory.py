"""Is everything the checkpoint's files store in the graph, and nothing else? By content, without the loader's names.

Every other comparison is with a model that the loader made: what it drops, takes twice or turns the wrong way is the
same on both sides. Here each stored weight is looked for among the weights of its layer in the target graph, in either
orientation: whole, put together with others (packed projections, experts) or taken apart. Floats must be the same to
the last bit of the graph's type; integers may be off by the step of their blocks. Then each large weight of the graph
must have been found so. For GGUF files the graph must have the rotary frequencies that the settings give.

Which of several weights of a layer is the query and which the key is not asked here.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from dspark_export.passes.match import SMOOTHED
from dspark_export.passes.packed_weights import load_plain
from dspark_export.validate.checks import Check
from dspark_export.validate.file_rotary import rotary_frequencies
from dspark_export.validate.file_tensors import FileTensor, file_tensors, weight_files
from dspark_export.validate.graph_weights import GraphWeights, Matrix, Vector, graph_weights
from dspark_export.validate.rows import Rows, rounded, same_layer
from dspark_runtime.bundle.files import BundleFiles

Tensor = npt.NDArray[Any]
_LARGE = 1024
"""Elements from which on a weight of the graph must be one of the file."""
_SHOWN = 4
_SMALL = 1 << 16
"""Elements up to which a weight may have other dimensions in the graph."""
_TRIES = 64
_FREQUENCIES = 1e-5

_READS_MEDIA = "reads images or sound"
_BESIDE: tuple[tuple[str, str], ...] = (
    (r"(^|\.)mtp\w*\.|\.nextn\.", "predicts further tokens"),
    (r"(^|\.)(vision|visual|vit|audio|image|mm_|multi_modal|modality|patch_merger|embed_vision)", _READS_MEDIA),
    (r"^(v|mm|a)\.|(^|\.)connector\.", _READS_MEDIA),
    (r"(inv_freq|rotary_emb\.(cos|sin)_cached|attn_rot_embd(\.weight)?|position_ids)$", "follows from the settings"),
    (r"^(v|value)_head\.", "a value head of reinforcement learning"),
    (r"[._]([kvq]|kv|input|output|activation)_(global_)?(scale|zero_point)(_ub)?$", "of quantized activations"),
    (r"\.post_mlp_layernorm\.weight$", "a norm behind experts, in layers without any"),
)
"""Names of tensors that have no part in the logits of a text, and why. Written apart from the loader's rules."""

_IN_LAYER = re.compile(r"\b(?:layers|blocks|h|blk)\.\d+\.")
_ROTARY = re.compile(r"^rope_(freqs|factors_long|factors_short)\.weight$")


@dataclass(frozen=True)
class Compared:
    """``lost``: tensors of files that are not in the graph. ``extra``: large weights of the graph that are of no file.
    ``unread``: what rightly is not there. Each by name, with the reason. ``count``: tensors of the files."""

    count: int
    lost: dict[str, str]
    extra: dict[str, str]
    unread: dict[str, str]


def check_inventory(files: BundleFiles, source: Path) -> Check:
    """The weights of the files of ``source``, a folder or a GGUF file, against those of the bundle's target graph."""
    began = time.perf_counter()
    asked = Check(
        id="numerics.inventory",
        family="numerics",
        title="The graph holds the file's weights, and no others",
        status="skipped",
        message="Pickled weights are not read a second time.",
    )
    if not weight_files(source):
        return asked
    graph = load_plain(files.path(files.graph("target").file))
    found = compare(graph, source, exact=files.manifest.precision.kind.kept)
    wrong, message = {**found.lost, **found.extra}, ""
    if found.lost:
        message = f"{len(found.lost)} of {found.count} tensors of the file are not in the graph: {_some(found.lost)}. "
    if found.extra:
        message += f"{len(found.extra)} weights of the graph are not in the file: {_some(found.extra)}. "
    if message:
        message += "Build the bundle again; if this stays, the checkpoint is misread: do not use the bundle."
    return asked.model_copy(
        update={
            "status": "failed" if wrong else "passed",
            "measured": float(len(wrong)),
            "limit": 0.0,
            "unit": "tensors",
            "where": next(iter(wrong), ""),
            "message": message,
            "seconds": time.perf_counter() - began,
            "data": asdict(found),
        }
    )


def compare(graph: ir.Model, source: Path, *, exact: bool) -> Compared:
    """``graph``, with plain initializers, against the files of ``source``.

    ``exact``: integers of the graph stand for the very numbers of the files, not for rounded ones.
    """
    weights, stored = graph_weights(graph, exact=exact), file_tensors(source)
    smoothed = json.loads(graph.metadata_props.get(SMOOTHED, "[]"))
    search = Search(weights, smoothed, whole_gains=source.is_file())
    extra = search.run(stored)
    beside = _beside([tensor.name for tensor in stored])
    lost = {name: why for name, why in search.lost.items() if name not in beside and not _ROTARY.match(name)}
    if source.is_file():
        lost |= _wrong_frequencies(source, weights.vectors)
    return Compared(len(stored), lost, extra, {name: beside[name] for name in search.lost if name in beside})


def _some(found: Mapping[str, str]) -> str:
    shown = [f"{name} ({why})" for name, why in list(found.items())[:_SHOWN]]
    return ", ".join(shown) + (f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")


def _beside(names: list[str]) -> dict[str, str]:
    """Tensors that may be left out of the graph, with the reason."""
    before_layers = {name: _IN_LAYER.split(name, maxsplit=1)[0] for name in names}  # nothing in one reads media
    found = {
        name: why
        for name in names
        for pattern, why in _BESIDE
        if re.search(pattern, before_layers[name] if why == _READS_MEDIA else name)
    }
    parts = re.compile(r"^(.*\blayers\.\d+\.)(eh_proj|enorm|hnorm|shared_head)\.")
    predicting = {match[1] for name in names if (match := parts.match(name))}
    for name in names:
        if name.startswith(tuple(predicting)):
            found.setdefault(name, "predicts further tokens")
    return found


def _wrong_frequencies(source: Path, vectors: tuple[Vector, ...]) -> dict[str, str]:
    found = {}
    for name, possible in rotary_frequencies(source).items():
        there = [vector.values for vector in vectors if vector.values.shape == possible[0].shape]
        if not any(np.allclose(one, wanted, rtol=_FREQUENCIES, atol=0) for one in there for wanted in possible):
            found[name] = "no rotary frequencies of the graph are those that the settings give"
    return found


class Search:
    """Looks for the tensors of files in a graph.

    ``lost``: what is not there, with the reason. ``smoothed``: names of gains that may differ by powers of two, which
    the products after them have taken over. ``whole_gains``: files store gains with the 1 that the graph adds.
    """

    def __init__(self, weights: GraphWeights, smoothed: Sequence[str], *, whole_gains: bool) -> None:
        self.lost: dict[str, str] = {}
        self._whole_gains = whole_gains
        self._weights, self._smoothed = weights, set(smoothed)
        self._factors: dict[str, Tensor] = {}

    def run(self, stored: Sequence[FileTensor]) -> dict[str, str]:
        """Look for all of ``stored``; returns the large weights of the graph that are none of them, with the reason."""
        for tensor in stored:
            if tensor.flat:
                self._look_for_vector(tensor.name, tensor.read().reshape(-1))
        rows = Rows([self._unsmoothed(matrix) for matrix in self._weights.matrices])
        for tensor in stored:
            if not tensor.flat:
                self._look_for_matrices(tensor, rows)
        return {name: f"{count} of its rows" for name, count in rows.uncovered(_LARGE).items()}

    def _look_for_vector(self, name: str, values: Tensor) -> None:
        vectors = [one for one in self._weights.vectors if same_layer(name, one.name)]
        if not len(values) or any(self._is_part(values, vector) for vector in vectors):
            return
        if len(values) > 1 and any(self._same(values, matrix) for matrix in self._weights.matrices):
            return
        if name.endswith("bias") and (len(values) == 1 or not values.any()):
            return  # a causal mask's fill, or a bias that adds nothing
        self.lost[name] = "its numbers are nowhere"

    def _is_part(self, values: Tensor, vector: Vector) -> bool:
        """Whether ``vector`` holds ``values`` in one piece, or but for powers of two."""
        if vector.plus_one and self._whole_gains:
            values = values - np.float32(1)
        mine, there, count = vector.values, rounded(values, vector), len(values)
        if len(mine) < count:
            return False
        starts = np.flatnonzero(mine[: len(mine) - count + 1] == there[0])
        if any(np.array_equal(mine[at : at + count], there) for at in starts[:_TRIES]):
            return True
        if count == len(mine) and vector.name in self._smoothed:
            with np.errstate(all="ignore"):
                exponents = np.log2(there / mine)
            if (np.isfinite(exponents) & (exponents == np.rint(exponents)))[there != 0].all():
                self._note_factors(vector.name, np.nan_to_num(exponents, posinf=0, neginf=0))
                return True
        return False

    def _note_factors(self, gain: str, exponents: Tensor) -> None:
        self._factors |= dict.fromkeys(self._weights.gains.get(gain, ()), np.exp2(exponents))

    def _unsmoothed(self, matrix: Matrix) -> Matrix:
        factors = self._factors.get(matrix.name)
        if factors is None:
            return matrix
        by_input = factors.astype(np.float32)[:, None]
        steps = matrix.steps
        return replace(
            matrix,
            read=lambda: matrix.read() / by_input,
            steps=None if steps is None else lambda: steps() / by_input,
        )

    def _same(self, values: Tensor, matrix: Matrix) -> bool:
        """Whether ``matrix``, a small one, holds ``values`` in another shape."""
        small = matrix.steps is None and len(values) == math.prod(matrix.shape) < _SMALL
        return small and np.array_equal(matrix.read().reshape(-1), rounded(values, matrix))

    def _look_for_matrices(self, tensor: FileTensor, rows: Rows) -> None:
        whole = tensor.read()
        whole = whole.reshape([size for size in whole.shape if size != 1])
        if whole.ndim < 2:
            self._look_for_vector(tensor.name, whole.reshape(-1))
            return
        if whole.size < _SMALL and any(self._is_part(whole.reshape(-1), one) for one in self._weights.vectors):
            return
        missing = total = 0
        for index in np.ndindex(*whole.shape[:-2]):
            found = rows.find(whole[index], tensor.name)
            missing, total = missing + int((~found).sum()), total + len(found)
        if missing and not _is_mask(tensor.name, whole):
            self.lost[tensor.name] = f"{missing} of its {total} rows"


def _is_mask(name: str, values: Tensor) -> bool:
    """Whether a "bias" is a causal mask, as old checkpoints store it."""
    return name.endswith("bias") and values.shape[-1] == values.shape[-2] and len(np.unique(values)) <= 2
