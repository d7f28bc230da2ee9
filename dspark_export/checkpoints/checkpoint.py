"""A resolved and checked checkpoint: everything a build needs from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dspark_export.checkpoints.config import declared_end_ids
from dspark_export.checkpoints.gguf_file import GgufFile
from dspark_export.checkpoints.library_calls import first_line, quiet
from dspark_export.checkpoints.tokenizer import TokenizerFiles, eos_token_ids
from dspark_export.checkpoints.trust import Trust
from dspark_export.checkpoints.weights import WeightFiles, check_finite, explain_report
from dspark_runtime.bundle.files import sha256_of
from dspark_runtime.bundle.manifest import Source
from dspark_runtime.errors import InvalidWeights

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

Kind = Literal["hub", "local", "gguf"]
_DIGESTED = (".json", ".jinja", ".txt", ".model", ".py")


@dataclass(frozen=True)
class Checkpoint:
    """``id`` is what the user named, ``revision`` a hub commit; exactly one of ``weights`` and ``gguf`` is set.

    ``unread``: tensors and settings that rightly stay unused, numbers in names replaced by ``*``, with the reason.
    """

    kind: Kind
    id: str
    revision: str | None
    config: PretrainedConfig
    tokenizer: TokenizerFiles | None
    trust: Trust
    weights: WeightFiles | None = None
    gguf: GgufFile | None = None
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
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

        # torch: only when a model is loaded
        from dspark_export.tracing.rotary import make_rope_static

        options = {"config": self.config, "dtype": dtype, "local_files_only": True, "output_loading_info": True}
        try:
            with quiet():
                if self.gguf:
                    weights = self.gguf.state_dict(self.config, dtype)
                    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(self.config)]
                    model, report = kind.from_pretrained(None, state_dict=weights, **options)
                else:
                    assert self.weights is not None
                    options |= self.trust.weight_options(self.weights.pickled)
                    model, report = AutoModelForCausalLM.from_pretrained(self.weights.folder, **options)
        except (MemoryError, KeyboardInterrupt):
            raise
        except Exception as cause:  # transformers raises anything here
            raise InvalidWeights(f"the weights of {self.id} cannot be loaded: {first_line(cause)}") from cause
        explain_report(report, self.id)
        check_finite(model, self.id)
        return make_rope_static(model).eval().requires_grad_(False)

    def save_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer, if there is one, so that the runtime can use it without transformers."""
        if self.tokenizer is not None:
            self.tokenizer.save(folder)
