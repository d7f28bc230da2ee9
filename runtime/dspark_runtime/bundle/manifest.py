"""The manifest of a bundle: what is in it, as strict records that name every key they know.

Reading one refuses another schema version, unknown keys and references to files that the manifest does not list.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

import pydantic_core
from pydantic import Field, JsonValue, ValidationError, model_validator

from dspark_runtime.bundle.contract import CacheLayer, TensorSpec
from dspark_runtime.bundle.engine_entry import EngineEntry
from dspark_runtime.bundle.precisions import PRECISIONS, FloatType, PrecisionKind, Weights
from dspark_runtime.bundle.records import Count, GraphName, Positive, Record, RelativePath, Sha256
from dspark_runtime.errors import BundleError, DamagedBundle, IncompatibleBundle

SCHEMA_VERSION: Literal[1] = 1
MANIFEST = "manifest.json"

TrainedKind = Literal["block", "eagle3", "draft_model"]
Variant = Literal["standard", "onnxruntime-cpu", "onnxruntime-cpu-batch", "sequence-kernels"]


class FileEntry(Record):
    """Size in bytes and digest of one file."""

    sha256: Sha256
    size: Count


class Source(Record):
    """Where the model came from. ``revision`` is a hub commit; ``files`` are the SHA-256 of the checkpoint's files.

    ``unread``: tensors and settings of the checkpoint that no graph uses, ``*`` in place of numbers, with the reason.
    """

    kind: Literal["hub", "local", "gguf"]
    id: str
    revision: str | None = None
    files: dict[str, Sha256] = Field(default_factory=dict)
    unread: dict[str, str] = Field(default_factory=dict)


class ModelFacts(Record):
    """What the runtime must know about the model. ``eos_token_ids`` holds every id that ends a text."""

    architecture: str
    model_type: str
    vocab_size: Positive
    hidden_size: Positive
    num_layers: Positive
    max_positions: Positive
    cache: tuple[CacheLayer, ...]
    eos_token_ids: tuple[Count, ...] = ()
    bos_token_id: Count | None = None
    pad_token_id: Count | None = None

    @model_validator(mode="after")
    def _consistent(self) -> ModelFacts:
        if len(self.cache) != self.num_layers:
            raise ValueError(f"{len(self.cache)} cache layers for {self.num_layers} decoder layers")
        special = (*self.eos_token_ids, self.bos_token_id, self.pad_token_id)
        if bad := [i for i in special if i is not None and i >= self.vocab_size]:
            raise ValueError(f"special token ids {bad} are outside the vocabulary of {self.vocab_size}")
        return self


class GraphEntry(Record):
    """One ONNX file. ``layers`` are the decoder layers it runs (None: all, or not a decoder).

    ``taps`` are the layers whose outputs ``hidden_taps`` joins, ascending, -1 for the embedding. ``cache`` is the
    geometry of a draft's own cache; None for graphs over the model's cache, or over none. ``kernels`` are the operators
    it wants of the sequence kernels' library, ``standard_nodes`` how many nodes of each arithmetic operator have none.
    """

    name: GraphName
    variant: Variant = "standard"
    file: RelativePath
    data_files: tuple[RelativePath, ...] = ()
    dtype: FloatType
    layers: tuple[Count, ...] | None = None
    taps: tuple[Annotated[int, Field(ge=-1)], ...] = ()
    cache: tuple[CacheLayer, ...] | None = None
    kernels: tuple[str, ...] = ()
    standard_nodes: dict[str, Positive] = Field(default_factory=dict)
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class BlockFacts(Record):
    """A block drafter (DSpark, DFlash).

    ``taps``: target layers whose outputs it reads, ascending, -1 for the embedding. ``block``: rows of a block, the
    anchor first. ``drafts``: tokens per block. ``mask_token_id``: fills the block. ``candidates``: tokens given per
    slot. ``beams``: texts of a block that are followed from slot to slot, 0 where the graph gives the chain only.
    ``confidence``: whether it has a confidence head; ``confidence_temperatures``: what its logits are divided by,
    per slot (None: 1). ``vocab_map``: int64 .npy with the target's id of every draft token, None for all of them.
    """

    taps: tuple[Annotated[int, Field(ge=-1)], ...]
    block: Positive
    drafts: Positive
    mask_token_id: Count
    candidates: Positive
    beams: Count = 0
    confidence: bool
    confidence_temperatures: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    vocab_map: RelativePath | None = None


class EagleFacts(Record):
    """An EAGLE-3 drafter: its ``taps``, most steps of a chain, and ``vocab_map`` as in :class:`BlockFacts`."""

    taps: tuple[Annotated[int, Field(ge=-1)], ...]
    steps: Positive
    vocab_map: RelativePath | None = None


class PhraseFacts(Record):
    """Phrases of a store drafter: their ``file``, and what they were counted from: ``texts`` that the target wrote, of
    ``tokens`` together, to prompts of ``origin``."""

    file: RelativePath
    contexts: Count
    texts: Count
    tokens: Count
    origin: str


class DrafterEntry(Record):
    """One way of drafting. ``agreement`` is the share of positions whose top token equals the target's, in [0, 1].

    ``graph`` is the drafter's graph (of an ``eagle3`` drafter the one that ends in ``-extend``). ``block`` and
    ``eagle3`` hold the fixed facts of those kinds, ``phrases`` those of a store. ``source``: where a trained draft came
    from; ``max_positions``: how long a text it was made for.
    """

    name: str
    kind: Literal["ngram", "store", "self_draft"] | TrainedKind
    graph: GraphName | None = None
    settings: dict[str, JsonValue] = Field(default_factory=dict)
    agreement: Annotated[float, Field(ge=0, le=1)] | None = None
    max_positions: Positive | None = None
    block: BlockFacts | None = None
    eagle3: EagleFacts | None = None
    phrases: PhraseFacts | None = None
    source: Source | None = None

    @property
    def trained(self) -> bool:
        """Whether it is a separate model that was trained to draft."""
        return self.kind in get_args(TrainedKind)

    @property
    def graph_name(self) -> str:
        """Its graph, or the first of them."""
        return self.graph or self.name

    @property
    def facts(self) -> BlockFacts | EagleFacts | None:
        """The fixed facts of its kind; None for kinds that have none."""
        return self.block or self.eagle3

    @property
    def taps(self) -> tuple[int, ...]:
        """Target layers it reads, ascending, -1 for the embedding."""
        return () if self.facts is None else self.facts.taps

    @property
    def vocab_map(self) -> str | None:
        """File with the target's id of every draft token, None for all of them."""
        return None if self.facts is None else self.facts.vocab_map


class RowNoise(Record):
    """How far logits move with the number of rows of a pass, seen over ``positions`` of a text and ``rows``.

    ``max_abs_logit_diff`` is the largest difference between a pass over one row and one over more;
    ``without_single_rows`` that among passes over two rows and more, which is all that the exact setting runs;
    ``between_batches`` that between a sequence alone and beside others with longer contexts, in the form of the graph
    that takes several. None where that was not measured.
    """

    max_abs_logit_diff: Annotated[float, Field(ge=0)]
    without_single_rows: Annotated[float, Field(ge=0)]
    between_batches: Annotated[float, Field(ge=0)] | None = None
    rows: tuple[Positive, ...]
    positions: Positive


class Precision(Record):
    """Weight storage. ``block_size`` applies to int8 and int4 only, ``head`` and ``embedding`` to w8a8 as well.

    ``in_floats``: weights that the checkpoint has as integers and a bundle that keeps those does not, numbers in names
    replaced by ``*``, with the reason.
    """

    weights: Weights
    block_size: Positive | None = None
    head: bool = False
    embedding: bool = False
    exact: bool = True
    accuracy_level: Count | None = None
    row_noise: RowNoise | None = None
    in_floats: dict[str, str] = Field(default_factory=dict)

    @property
    def kind(self) -> PrecisionKind:
        """What follows from how weights are stored."""
        return PRECISIONS[self.weights]

    @property
    def quantized(self) -> bool:
        """Whether weights are stored as integers."""
        return self.kind.quantized

    @property
    def rows_agree(self) -> bool:
        """Whether passes over two rows and more were measured to be bit-identical."""
        return self.row_noise is not None and self.row_noise.without_single_rows == 0.0

    @property
    def integer_products(self) -> bool:
        """Whether the CPU's forms of the graphs multiply integers, and so round activations whatever is requested."""
        return self.kind.integer_products


class StepCosts(Record):
    """Milliseconds of one pass: ``ms[graph][rows]``, measured with ``context`` committed tokens in the cache."""

    threads: Positive
    device: str
    context: Count
    ms: dict[str, dict[Annotated[str, Field(pattern="^[1-9][0-9]*$")], Annotated[float, Field(ge=0)]]]


class Manifest(Record):
    """``manifest.json``. ``files`` lists every file of the bundle but the manifest; the writer fills it at commit."""

    schema_version: Literal[1] = SCHEMA_VERSION
    created_by: str
    created_at: str
    tools: dict[str, str] = Field(default_factory=dict)
    source: Source
    model: ModelFacts
    graphs: tuple[GraphEntry, ...]
    drafters: tuple[DrafterEntry, ...] = ()
    precision: Precision
    costs: StepCosts | None = None
    engines: tuple[EngineEntry, ...] = ()
    files: dict[RelativePath, FileEntry] = Field(default_factory=dict)
    validation: dict[str, JsonValue] = Field(default_factory=dict)

    def missing_references(self) -> list[str]:
        """What graphs and drafters refer to and the manifest does not list; empty for a complete manifest."""
        names = {graph.name for graph in self.graphs}
        missing = [f"graph {d.graph} of drafter {d.name}" for d in self.drafters if d.graph and d.graph not in names]
        if ("target", "standard") not in {(g.name, g.variant) for g in self.graphs}:
            missing.append("the standard target graph")
        for drafter in self.drafters:
            if drafter.vocab_map is not None and drafter.vocab_map not in self.files:
                missing.append(f"{drafter.vocab_map} of drafter {drafter.name}")
            if drafter.phrases is not None and drafter.phrases.file not in self.files:
                missing.append(f"{drafter.phrases.file} of drafter {drafter.name}")
        for graph in self.graphs:
            paths = (graph.file, *graph.data_files)
            missing += [f"{path} of graph {graph.name}" for path in paths if path not in self.files]
        for engine in self.engines:
            if engine.graph not in names:
                missing.append(f"graph {engine.graph} of its {engine.flavour} engine")
            paths = (engine.file, engine.log)
            missing += [f"{path} of engine {engine.graph}" for path in paths if path not in self.files]
        return missing

    @classmethod
    def parse(cls, text: bytes, where: str = MANIFEST) -> Manifest:
        """Read manifest JSON; IncompatibleBundle for another schema or unknown keys, DamagedBundle for the rest."""
        try:
            raw = pydantic_core.from_json(text, allow_inf_nan=False)
        except ValueError as error:
            raise DamagedBundle(f"{where} is not valid JSON ({error}); build the bundle again") from error
        if not isinstance(raw, dict):
            raise DamagedBundle(f"{where} holds a JSON {type(raw).__name__}, not an object; build the bundle again")
        _check_schema(raw.get("schema_version"), where)
        try:
            manifest = cls.model_validate_json(text, strict=True)
        except ValidationError as error:
            raise _explain(error, where) from error
        if missing := manifest.missing_references():
            raise DamagedBundle(f"{where} does not list {', '.join(missing)}; build the bundle again")
        return manifest


def _check_schema(version: Any, where: str) -> None:
    if isinstance(version, bool) or not isinstance(version, int):
        raise DamagedBundle(f"{where} has no schema_version; is this a dspark bundle?")
    if version > SCHEMA_VERSION:
        raise IncompatibleBundle(
            f"{where} has schema version {version}, this dspark-runtime reads {SCHEMA_VERSION}; "
            "upgrade dspark-export or build the bundle again with this version"
        )
    if version < SCHEMA_VERSION:
        raise IncompatibleBundle(f"{where} has the unknown schema version {version}; build the bundle again")


def _explain(error: ValidationError, where: str) -> BundleError:
    unknown, wrong = [], []
    for item in error.errors(include_url=False, include_input=False):
        place = ".".join(str(part) for part in item["loc"]) or "manifest"
        if item["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            unknown.append(place)
        else:
            wrong.append(f"{place}: {item['msg']}")
    if unknown:
        return IncompatibleBundle(
            f"{where} has keys this dspark-runtime does not know: {', '.join(unknown[:5])}; "
            "it was written by another version: upgrade, or build the bundle again"
        )
    return DamagedBundle(f"{where} is damaged ({'; '.join(wrong[:5])}); build the bundle again")
