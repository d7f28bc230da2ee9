"""What a drafter learns from: features of the target at every position, and its most likely next tokens.

Computed once per response by the frozen target and kept in flat files that are mapped into memory, so that later epochs
only run the drafter. Tapped layers are read raw, before the final norm.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dspark_export.graphs.decoder import decoder_layers
from dspark_export.prompts.answers import Response

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_INDEX = "index.jsonl"


class Taps:
    """Catches the raw outputs of target layers ``layers`` (-1: of the embedding) as passes go by."""

    def __init__(self, model: PreTrainedModel, layers: Sequence[int]) -> None:
        self.layers = tuple(layers)
        self._caught: dict[int, Tensor] = {}
        self._hooks: list[Any] = []
        decoder = decoder_layers(model)
        for layer in self.layers:
            module = model.get_input_embeddings() if layer < 0 else decoder[layer]
            self._hooks.append(module.register_forward_hook(self._catcher(layer)))

    def _catcher(self, layer: int) -> Callable[..., None]:
        def keep(module: Any, inputs: Any, output: Any) -> None:
            self._caught[layer] = output[0] if isinstance(output, tuple) else output

        return keep

    def read(self) -> Tensor:
        """Features [batch, tokens, taps * hidden] of the last pass, bfloat16."""
        return torch.cat([self._caught[layer].to(torch.bfloat16) for layer in self.layers], -1)

    def release(self) -> None:
        """Leave the model as it was."""
        for hook in self._hooks:
            hook.remove()
        self._caught.clear()


def most_likely(logits: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Ids (int32) and probabilities (float16) [..., top] of the most likely tokens of ``logits`` [..., vocab]."""
    values, places = logits.topk(min(top, logits.shape[-1]), -1)
    probs = (values - logits.logsumexp(-1, keepdim=True)).exp()
    return places.to(torch.int32), probs.to(torch.float16)


@dataclass(frozen=True)
class Rows:
    """What a drafter learns from of one text: ``features`` bfloat16 [length, taps * hidden], ``top_ids`` int32 and
    ``top_probs`` float16 [length, top] of the token after each row; zeros in rows of the prompt."""

    features: Tensor
    top_ids: Tensor
    top_probs: Tensor


class TappedTarget:
    """The frozen target, reading whole texts."""

    def __init__(self, model: PreTrainedModel, taps: Sequence[int]) -> None:
        self._model, self._taps = model, Taps(model, taps)

    def release(self) -> None:
        """Leave the model as it was."""
        self._taps.release()

    @torch.inference_mode()
    def __call__(self, ids: Sequence[int], start: int, top: int) -> Rows:
        """The rows of a text whose response begins at ``start``."""
        device = next(self._model.parameters()).device
        given = torch.tensor([list(ids)], device=device)
        taught = max(1, len(ids) - start)
        logits = self._model(given, use_cache=False, logits_to_keep=taught).logits[0].float()
        features = self._taps.read()[0]
        before = len(ids) - len(logits)
        return Rows(features, *(functional.pad(part, (0, 0, before, 0)) for part in most_likely(logits, top)))


@dataclass(frozen=True)
class Sample:
    """One text. ``features`` [length, width]; ``top_ids``, ``top_probs`` [length, top]: of the token after each row.

    ``start``: position of the first token of the response.
    """

    ids: np.ndarray
    start: int
    features: np.ndarray
    top_ids: np.ndarray
    top_probs: np.ndarray


class FeatureStore:
    """Samples in flat files under ``folder``: bfloat16 features as their bits, ids, probabilities.

    A kill in the middle loses the sample that was being written, nothing else. ``read_only`` leaves the files alone.
    """

    def __init__(self, folder: Path, width: int, top: int, read_only: bool = False) -> None:
        self._folder, self._width, self._top = folder, width, top
        folder.mkdir(parents=True, exist_ok=True)
        self._spans: list[tuple[int, int, int]] = []  # first row, rows, start of the response
        index = folder / _INDEX
        if index.exists():
            self._spans = [tuple(json.loads(line)) for line in index.read_text("utf-8").split("\n")[:-1]]
        self._rows = sum(span[1] for span in self._spans)
        self._maps: list[np.ndarray] | None = None
        if not read_only:
            self._keep()

    def _sizes(self) -> dict[Path, int]:
        names = (("ids", 4), ("features", 2 * self._width), ("top_ids", 4 * self._top), ("top_probs", 2 * self._top))
        return {self._folder / f"{name}.bin": size for name, size in names}

    def __len__(self) -> int:
        return len(self._spans)

    @property
    def tokens(self) -> int:
        """Tokens of all samples, prompts included."""
        return self._rows

    def begins(self, texts: Iterable[Sequence[int]]) -> bool:
        """Whether the samples are the first of ``texts``, token ids each."""
        return all(np.array_equal(self[place].ids, ids) for place, ids in zip(range(len(self)), texts, strict=False))

    def add(self, ids: Sequence[int], start: int, rows: Rows) -> None:
        """Write one sample: a text, where its response begins, and its rows."""
        parts = (
            np.asarray(ids, np.int32),
            rows.features.cpu().contiguous().view(torch.int16).numpy(),
            rows.top_ids.cpu().numpy(),
            rows.top_probs.cpu().numpy(),
        )
        for path, part in zip(self._sizes(), parts, strict=True):
            with path.open("ab") as file:
                file.write(part.tobytes())
        with (self._folder / _INDEX).open("a", encoding="utf-8") as file:
            file.write(json.dumps([self._rows, len(ids), start]) + "\n")
        self._spans.append((self._rows, len(ids), start))
        self._rows += len(ids)
        self._maps = None

    def _keep(self) -> None:
        """Cut whatever follows the known samples off every file."""
        lines = (json.dumps(span) + "\n" for span in self._spans)
        (self._folder / _INDEX).write_text("".join(lines), "utf-8")
        for path, size in self._sizes().items():
            with path.open("ab") as file:
                file.truncate(self._rows * size)

    def __getitem__(self, place: int) -> Sample:
        if self._maps is None:
            kinds = ((np.int32, ()), (np.int16, (self._width,)), (np.int32, (self._top,)), (np.float16, (self._top,)))
            self._maps = [
                np.memmap(path, kind, "r", shape=(self._rows, *shape))
                for path, (kind, shape) in zip(self._sizes(), kinds, strict=True)
            ]
        first, count, start = self._spans[place]
        ids, features, top_ids, top_probs = (part[first : first + count] for part in self._maps)
        return Sample(ids, start, features, top_ids, top_probs)


def fill(
    store: FeatureStore,
    target: Callable[[Sequence[int], int, int], Rows],
    responses: Sequence[Response],
    max_length: int,
    top: int,
    on_step: Callable[[int], None] = lambda _: None,
) -> None:
    """Add the samples of ``responses`` that ``store`` does not have yet; it holds them in the same order.

    ``target`` gives the rows of (token ids, where the response begins, ``top``).
    """
    for place in range(len(store), len(responses)):
        ids, start = responses[place].span(max_length)
        store.add(ids, start, target(ids, start, top))
        on_step(place + 1)


@dataclass(frozen=True)
class Batch:
    """Padded samples: ``ids`` [batch, length], ``features`` [batch, length, width], ``lengths``, ``starts`` [batch],
    and of the token after each row ``top_ids``, ``top_probs`` [batch, length, top]."""

    ids: Tensor
    features: Tensor
    lengths: Tensor
    starts: Tensor
    top_ids: Tensor
    top_probs: Tensor


def collate(samples: Sequence[Sample], dtype: torch.dtype, device: torch.device) -> Batch:
    """Samples of different lengths as one batch, padded with zeros."""

    def padded(arrays: Sequence[np.ndarray]) -> Tensor:
        tensors = [torch.from_numpy(np.array(array)) for array in arrays]
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True).to(device)

    return Batch(
        padded([s.ids for s in samples]).long(),
        padded([s.features for s in samples]).view(torch.bfloat16).to(dtype),
        torch.tensor([len(s.ids) for s in samples], device=device),
        torch.tensor([s.start for s in samples], device=device),
        padded([s.top_ids for s in samples]).long(),
        padded([s.top_probs for s in samples]).float(),
    )
