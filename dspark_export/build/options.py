"""Options of a build."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from dspark_export.checkpoints.trust import Trust
from dspark_export.drafts.opened import DraftSettings
from dspark_export.engines.options import PluginsOption
from dspark_runtime.backends.ort_kernels import kernel_library
from dspark_runtime.bundle.engine_names import Flavour
from dspark_runtime.bundle.precisions import (
    BLOCKED,
    FLOAT_TYPES,
    HALF,
    PRECISIONS,
    Activations,
    FloatType,
    PrecisionKind,
    Weights,
    listed,
)
from dspark_runtime.errors import UsageError

BLOCK_SIZES = (16, 32, 64, 128, 256)
AUTO, NONE, LAYERS = "auto", "none", "layers="


@dataclass(frozen=True)
class BuildOptions:
    """One build.

    ``drafts`` are models that draft for the target; ``draft_vocab`` a file of the ids they may draft, ``markov_topk``
    the candidates per slot a Markov head corrects, None for all; ``allow_own_embeddings`` uses embeddings of a draft
    that differ from the target's. ``exact`` None: exact but for int8 and int4 without drafts, where it costs much.
    ``self_draft`` is ``auto``, ``none`` or ``layers=...``. ``threads`` None: as many as there are cores. ``backend``:
    compile engines of that flavour, with default ranges, and verification by ``plugins``.
    ``quantize_embedding`` None: unless the graph computes in half precision. ``activations``: what int8 and int4 graphs
    compute in, None for fp32, or fp16 where engines are compiled. ``kernels``: a form for the sequence kernels, whose
    packed weights all forms read then; None: where no engines are compiled and this installation has the kernels.
    ``phrases``: prompts of its own that the target answers for the corpus of the ``store`` drafter; None: as many as
    it does in two minutes.

    Raises UsageError for combinations that make no sense.
    """

    model: str
    out: Path
    revision: str | None = None
    precision: Weights = "fp32"
    quantize_head: bool = True
    quantize_embedding: bool | None = None
    block_size: int | None = None
    exact: bool | None = None
    self_draft: str = AUTO
    drafts: tuple[str, ...] = ()
    draft_vocab: Path | None = None
    markov_topk: int | None = None
    allow_own_embeddings: bool = False
    threads: int | None = None
    overwrite: bool = False
    trust: Trust = field(default_factory=Trust.closed)
    allow_untested: bool = False
    backend: Flavour | None = None
    plugins: PluginsOption = "auto"
    activations: Activations | None = None
    kernels: bool | None = None
    phrases: int | None = 0

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise UsageError(f"--precision {self.precision} is unknown; choose {', '.join(PRECISIONS)}")
        if self.block_size is not None and not self.kind.blocked:
            raise UsageError(f"--block-size applies to {listed(BLOCKED, 'and')}, not to {self.precision}; leave it out")
        if self.block_size is not None and self.block_size not in BLOCK_SIZES:
            raise UsageError(f"--block-size {self.block_size} is not one of {', '.join(map(str, BLOCK_SIZES))}")
        if self.self_draft not in (AUTO, NONE) and not self.self_draft.startswith(LAYERS):
            raise UsageError(f"--self-draft {self.self_draft} is unknown; choose auto, none, or layers=0-9,20")
        if not self.drafts and (self.draft_vocab or self.markov_topk or self.allow_own_embeddings):
            raise UsageError("--draft-vocab, --markov-topk and --allow-own-embeddings are about a --draft; give one")
        if self.markov_topk is not None and self.markov_topk < 1:
            raise UsageError(f"--markov-topk {self.markov_topk} is not positive; leave it out to correct every token")
        if self.activations is not None and self.activations not in FLOAT_TYPES:
            raise UsageError(f"--activations {self.activations} is unknown; choose {', '.join(FLOAT_TYPES)}")
        if self.activations is not None and not self.kind.blocked:
            computes = "with 8-bit activations" if self.quantized else "in that"
            raise UsageError(
                f"--activations applies to {listed(BLOCKED, 'and')}; graphs in {self.precision} compute {computes}"
            )
        if self.backend is not None and (self.kind.integer_products or self.kind.kept):
            raise UsageError(
                f"--precision {self.precision} is for the CPU; for --backend {self.backend} choose "
                f"{listed((*HALF, *BLOCKED))}"
            )
        if self.backend is not None and self.dtype == "float32":
            raise UsageError(
                f"--backend {self.backend} compiles graphs that compute in half precision, not in fp32; "
                f"add --precision {listed(HALF)}, or {listed(BLOCKED)} without --activations fp32"
            )
        if self.backend is None and self.plugins != "auto":
            raise UsageError(f"--plugins {self.plugins} is about engines; add --backend tensorrt or tensorrt-rtx")
        if self.phrases is not None and self.phrases < 0:
            raise UsageError(f"--phrases {self.phrases} is negative; give 0 for none, or leave it out")
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"--threads {self.threads} is not positive; leave it out for one per core")

    @property
    def kind(self) -> PrecisionKind:
        """What follows from ``precision``."""
        return PRECISIONS[self.precision]

    @property
    def quantized(self) -> bool:
        """Whether weights are stored as integers."""
        return self.kind.quantized

    @property
    def embedding_too(self) -> bool:
        """Whether the embedding is quantized; TensorRT cannot look up rows of a quantized table."""
        return self.dtype == "float32" if self.quantize_embedding is None else self.quantize_embedding

    @property
    def exact_text(self) -> bool:
        """Whether the bundle's own setting is that speculative text always equals plain text."""
        if self.exact is not None:
            return self.exact
        return self.kind.exact_by_default or bool(self.drafts)

    @property
    def with_kernels(self) -> bool:
        """Whether graphs get a form for the sequence kernels.

        What a build measures is measured on the operators it ships for. So by default this follows the installation.

        Raises:
            BackendError: the library of kernels cannot be loaded.
        """
        if self.kernels is not None:
            return self.kernels
        return self.backend is None and kernel_library() is not None

    @property
    def chains_only(self) -> bool:
        """Whether drafts must be chains, because branches of a tree would not be exact: see docs/exactness.md."""
        rounded = self.quantized and self.dtype == "float32" and not self.with_kernels
        return rounded and (self.kind.integer_products or self.exact_text)

    @property
    def draft_settings(self) -> DraftSettings:
        """What is said here about drafts."""
        return DraftSettings(
            dtype=self.dtype,
            chains_only=self.chains_only,
            vocabulary=self.draft_vocab,
            markov_topk=self.markov_topk,
            allow_own_embeddings=self.allow_own_embeddings,
            trust=self.trust,
        )

    @property
    def block(self) -> int | None:
        """Most weights per scale, None where it is not by blocks."""
        return self.block_size or self.kind.block

    @property
    def dtype(self) -> FloatType:
        """What the graph computes in: quantized weights are expanded to it."""
        return self.kind.computes_in(self.activations or ("fp32" if self.backend is None else "fp16"))
