"""A resolved and checked checkpoint: everything a build needs from it."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dspark_export.checkpoints.config import declared_end_ids
from dspark_export.checkpoints.fit import explain_report, load_from, targets_of
from dspark_export.checkpoints.gguf_blocks import READERS
from dspark_export.checkpoints.gguf_file import GgufFile
from dspark_export.checkpoints.recipes import Recipe, open_weights, read_grid
from dspark_export.checkpoints.tokenizer import TokenizerFiles, eos_token_ids
from dspark_export.checkpoints.trust import Trust
from dspark_export.checkpoints.weights import WeightFiles, check_finite, read_headers, read_pickles
from dspark_runtime.bundle.files import sha256_of
from dspark_runtime.bundle.manifest import Source
from dspark_runtime.errors import UsageError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

    from dspark_export.passes.kept_weights import KeptWeights

Kind = Literal["hub", "local", "gguf"]
_DIGESTED = (".json", ".jinja", ".txt", ".model", ".py")


@dataclass(frozen=True)
class Checkpoint:
    """``id`` is what the user named, ``revision`` a hub commit; exactly one of ``weights`` and ``gguf`` is set.

    ``taken``: what the model is made of, from the tensors of ``weights``. ``unread``: tensors and settings that rightly
    stay unused, numbers in names replaced by ``*``, with the reason.
    """

    kind: Kind
    id: str
    revision: str | None
    config: PretrainedConfig
    tokenizer: TokenizerFiles | None
    trust: Trust
    weights: WeightFiles | None = None
    gguf: GgufFile | None = None
    taken: Mapping[str, Recipe] = field(default_factory=dict)
    unread: Mapping[str, str] = field(default_factory=dict)

    @property
    def directory(self) -> Path | None:
        """The checkpoint folder; None for a GGUF file."""
        return self.weights.folder if self.weights else None

    @property
    def gguf_file(self) -> Path | None:
        """The GGUF file; None for a folder."""
        return self.gguf.path if self.gguf else None

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding, which may exceed the tokenizer's vocabulary by padding."""
        return int(self.config.get_text_config().vocab_size)

    @property
    def eos_token_ids(self) -> list[int]:
        """Every id that ends a text, ascending."""
        if self.tokenizer is None:
            assert self.directory is not None
            declared = declared_end_ids(self.directory, self.config, self.id)
            return sorted({token for token in declared if 0 <= token < self.vocab_size})
        return eos_token_ids(self.tokenizer, self.vocab_size)

    @property
    def bos_token_id(self) -> int | None:
        """Id of the token that begins a text; None if the model has none."""
        return self._id("bos_token")

    @property
    def pad_token_id(self) -> int | None:
        """Id of the padding token; None if the model has none."""
        return self._id("pad_token")

    def _id(self, role: str) -> int | None:
        declared = getattr(self.config.get_text_config(), f"{role}_id", None)
        if isinstance(declared, int) and declared >= 0:
            return declared
        return None if self.tokenizer is None else self.tokenizer.id_of(role)

    def source(self) -> Source:
        """Provenance for the manifest, with the SHA-256 of every file that was used; reads all of them once."""
        if self.gguf:
            files = {self.gguf.path.name: sha256_of(self.gguf.path.resolve())}
            return Source(kind="gguf", id=self.id, files=files, unread=dict(self.unread))
        assert self.weights is not None
        folder = self.weights.folder
        small = [path.name for path in sorted(folder.iterdir()) if path.suffix in _DIGESTED and path.is_file()]
        files = {name: sha256_of((folder / name).resolve()) for name in (*small, *self.weights.names)}
        return Source(kind=self.kind, id=self.id, revision=self.revision, files=files, unread=dict(self.unread))

    def load_model(self, dtype: torch.dtype) -> PreTrainedModel:
        """The model with its weights in ``dtype``, in evaluation mode, without gradients; one copy in memory.

        Raises InvalidWeights for weights that are missing, do not fit, or hold NaN or infinity.
        """
        # torch: only when a model is loaded
        from dspark_export.tracing.rotary import make_rope_static

        model, report = load_from(self._state(dtype), self.config, self.id, self.trust, dtype=dtype)
        explain_report(report, self.id, self.config.model_type)
        check_finite(model, self.id)
        return make_rope_static(model).eval().requires_grad_(False)

    def kept_weights(self, model: PreTrainedModel, *, minima: bool) -> KeptWeights:
        """The integers that the weights of ``model`` are stored as; ``minima``: graphs may have blocks with a minimum.

        Raises UsageError if there are none.
        """
        # onnx_ir: only when weights are kept
        from dspark_export.passes.kept_weights import KeptWeights

        self.require_integers()
        if self.gguf:
            sources = self.gguf.grids(self.config)
        else:
            assert self.weights is not None
            found = read_headers(self.weights, self.id)
            stored = {name: recipe for name, recipe in self.taken.items() if recipe.grid is not None}
            targets = targets_of(model, stored)
            sources = {
                name if targets[name][1] else targets[name][0]: partial(read_grid, recipe, found)
                for name, recipe in stored.items()
            }
        return KeptWeights(sources, _other_names(model, sources), minima)

    def require_integers(self) -> None:
        """UsageError if no weight is stored as integers, so that there are none to keep."""
        if self.gguf:
            kinds = sorted(set(self.gguf.kinds.values()))
            there = any(kind in READERS for kind in kinds)
            what = f"stores {', '.join(kinds)}"
        else:
            there = any(recipe.grid is not None for recipe in self.taken.values())
            what = "stores floats" + (" of 8 bits or less" if "quantization_config" in self.unread else "")
        if not there:
            raise UsageError(
                f"--precision keep stores the integers of a quantized checkpoint, and {self.id} {what}; choose "
                "--precision fp32, which keeps all numbers, or int8 or int4"
            )

    def _state(self, dtype: torch.dtype) -> Mapping[str, Any]:
        """The weights by name, read when transformers asks for them where the file allows it."""
        if self.gguf:
            return self.gguf.state_dict(self.config, dtype)
        assert self.weights is not None
        if self.weights.pickled:
            tensors = read_pickles(self.weights, self.id, self.trust)
            return {name: recipe.made_of(tensors) for name, recipe in self.taken.items()}
        return open_weights(self.taken, read_headers(self.weights, self.id))

    def save_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer, if there is one, so that the runtime can use it without transformers."""
        if self.tokenizer is not None:
            self.tokenizer.save(folder)


def _other_names(model: PreTrainedModel, names: Container[str]) -> dict[str, str]:
    """Names of weights that are the very ones under ``names``: of tied embeddings."""
    together: dict[int, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        together.setdefault(id(weight), []).append(name)
    found: dict[str, str] = {}
    for group in together.values():
        known = [name for name in group if name in names]
        found |= {name: known[0] for name in group if known and name not in names}
    return found
