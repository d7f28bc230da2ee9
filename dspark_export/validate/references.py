"""Polygraphy runners of a decoder: ONNX Runtime on one of its forms, and the untouched PyTorch model.

Both give ``logits``, ``hidden_taps`` where the graph has them, and of every ``present`` tensor the rows of the pass.
The PyTorch runner has no cache and no mask: it runs every path of a tree alone, from the first token on.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort
import torch
from polygraphy.backend.base import BaseRunner
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.common import TensorMetadata
from transformers import DynamicCache

from dspark_export.graphs.decoder import EMBEDDING, decoder_layers
from dspark_export.validate.activations import Pass
from dspark_runtime.arrays import AnyArray
from dspark_runtime.bundle.contract import HIDDEN_TAPS, INPUT_IDS, LOGITS, PRESENT, WRITE_INDICES, present_name
from dspark_runtime.processors import default_threads

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Outputs = dict[str, AnyArray]


def session(path: Path, threads: int | None, optimized: bool = True, accuracy_level: int = 0) -> ort.InferenceSession:
    """An ONNX Runtime session on the CPU."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or default_threads()
    options.log_severity_level = 3
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if accuracy_level:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(accuracy_level))
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


class GraphRunner(OnnxrtRunner):  # type: ignore[misc]
    """ONNX Runtime on one form of a graph. Whole caches: :meth:`whole`; Polygraphy sees the rows of the pass only."""

    def __init__(self, path: Path, name: str, threads: int | None, optimized: bool = True, level: int = 0) -> None:
        super().__init__(lambda: session(path, threads, optimized, level), name=name)

    def whole(self, feeds: Outputs) -> Outputs:
        """Every output of a pass, caches as long as they are."""
        found: Outputs = dict(super().infer_impl(feeds))
        return found

    def infer_impl(self, feed_dict: Outputs) -> OrderedDict[str, AnyArray]:
        """Polygraphy's hook."""
        start, count = int(feed_dict[WRITE_INDICES][0]), feed_dict[INPUT_IDS].shape[1]
        return OrderedDict(
            (name, array[:, :, start : start + count] if name.startswith(PRESENT) else array)
            for name, array in self.whole(feed_dict).items()
        )


@contextmanager
def cut_down(model: PreTrainedModel, layers: Sequence[int]) -> Iterator[None]:
    """While this lasts, ``model`` has only ``layers``, renumbered, as a shallower model would."""
    stack, config = decoder_layers(model), model.config.get_text_config()
    whole, types, depth = list(stack), getattr(config, "layer_types", None), config.num_hidden_layers
    if list(layers) == list(range(len(whole))):
        yield
        return

    def arrange(kept: Sequence[int]) -> None:
        del stack[:]
        stack.extend(whole[n] for n in kept)
        for number, n in enumerate(kept):
            for module in whole[n].modules():
                if hasattr(module, "layer_idx"):
                    setattr(module, "layer_idx", number)  # noqa: B010
        config.num_hidden_layers = len(kept)
        if types:
            config.layer_types = [types[n] for n in kept]

    arrange(layers)
    try:
        yield
    finally:
        config.num_hidden_layers = depth
        arrange(range(len(whole)))


class ModelRunner(BaseRunner):  # type: ignore[misc]
    """The PyTorch model over ``passes``, in their order.

    ``layers``: the decoder layers it has. ``taps``: those whose outputs are given, -1 for the embedding's.
    """

    def __init__(
        self, model: PreTrainedModel, passes: Sequence[Pass], layers: Sequence[int], taps: Sequence[int] = ()
    ) -> None:
        super().__init__(name="pytorch")
        self._model, self._passes, self._layers, self._taps = model, passes, layers, taps

    def get_input_metadata_impl(self) -> TensorMetadata:
        """Polygraphy's hook."""
        metadata = TensorMetadata()
        for name, array in self._passes[0].feeds.items():
            metadata.add(name, dtype=array.dtype, shape=[None] * array.ndim)
        return metadata

    def activate_impl(self) -> None:
        """Polygraphy's hook."""
        self._at = 0

    def deactivate_impl(self) -> None:
        """Polygraphy's hook."""

    @torch.inference_mode()
    def infer_impl(self, feed_dict: Outputs) -> OrderedDict[str, AnyArray]:
        """Polygraphy's hook: the next pass, whose inputs are those of ``feed_dict``."""
        one = self._passes[self._at]
        self._at += 1
        rows: list[dict[str, AnyArray]] = [{} for _ in one.tokens]
        with cut_down(self._model, self._layers):
            for leaf in set(range(len(one.tokens))) - set(one.parents):
                path = one.path(leaf)
                found = self._run([*one.history, *(one.tokens[row] for row in path)], len(path))
                for depth, row in enumerate(path):
                    rows[row] = {name: array[..., depth, :] for name, array in found.items()}
        self.inference_time = 0.0
        return OrderedDict((name, np.stack([row[name] for row in rows], -2)) for name in rows[0])

    @torch.inference_mode()
    def features(self, ids: Sequence[int]) -> AnyArray:
        """Outputs of the tapped layers [tokens, taps * hidden] over a text."""
        found: AnyArray = self._run(ids, len(ids))[HIDDEN_TAPS][0]
        return found

    @torch.inference_mode()
    def logits(self, ids: Sequence[int]) -> AnyArray:
        """Logits [tokens, vocab] over a text."""
        found: AnyArray = self._run(ids, len(ids))[LOGITS][0]
        return found

    def _run(self, ids: Sequence[int], last: int) -> Outputs:
        caught: dict[int, torch.Tensor] = {}
        stack = decoder_layers(self._model)

        def entering(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            caught[EMBEDDING] = args[0]

        def leaving(number: int) -> torch.utils.hooks.RemovableHandle:
            return stack[number].register_forward_hook(
                lambda _module, _args, out: caught.update({number: out[0] if isinstance(out, tuple) else out})
            )

        hooks = [stack[0].register_forward_pre_hook(entering), *(leaving(tap) for tap in self._taps if tap >= 0)]
        try:
            # Without a configuration no layer of the cache forgets what its window has passed.
            result = self._model(torch.tensor([list(ids)]), past_key_values=DynamicCache(), use_cache=True)
        finally:
            for hook in hooks:
                hook.remove()
        found = {LOGITS: result.logits[:, -last:].float().numpy()}
        if self._taps:
            found[HIDDEN_TAPS] = torch.cat([caught[tap][:, -last:] for tap in self._taps], -1).float().numpy()
        for number, layer in enumerate(self._layers):
            kept = result.past_key_values.layers[number]
            for part, tensor in (("key", kept.keys), ("value", kept.values)):
                found[present_name(layer, part)] = tensor[:, :, -last:].float().numpy()
        return found
