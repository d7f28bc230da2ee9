"""The bundle on disk: its manifest and the safe way to open it.

A bundle is a folder with ``manifest.json`` and the files listed there, each with size and SHA-256. Opening it checks,
before any byte reaches an inference library:

* the manifest is strict JSON of a known schema version, without unknown keys;
* every listed path stays inside the bundle and is a regular file (no symlink on the way, no hard link);
* sizes, and digests unless switched off, match;
* ``onnx/`` holds nothing that is not listed, so an external-data reference of a graph can only reach a checked file.

Digests find damage and mix-ups. They are no signature: whoever can write the bundle can write the manifest too.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import pydantic_core
from pydantic import BaseModel, Field, JsonValue, ValidationError, model_validator

from dspark_runtime.contract import CacheLayer, TensorSpec
from dspark_runtime.engine_facts import EngineBuild as EngineBuild
from dspark_runtime.engine_facts import EngineEntry as EngineEntry
from dspark_runtime.engine_facts import EngineInspection as EngineInspection
from dspark_runtime.engine_facts import EngineProfile as EngineProfile
from dspark_runtime.errors import BundleError, DamagedBundle, IncompatibleBundle
from dspark_runtime.manifest_types import RECORD, Count, GraphName, Positive, RelativePath, Sha256, safe_relative_path

SCHEMA_VERSION: Literal[1] = 1
MANIFEST = "manifest.json"
TOKENIZER_DIR = "tokenizer"
GRAPH_DIR = "onnx"
ENGINE_DIR = "engines"
MANIFEST_MAX_BYTES = 16 * 2**20
_HASH_BLOCK = 4 * 2**20

Weights = Literal["fp32", "fp16", "bf16", "w8a8", "int8", "int4"]
QUANTIZED: tuple[Weights, ...] = ("w8a8", "int8", "int4")
Variant = Literal["standard", "onnxruntime-cpu", "onnxruntime-cpu-batch"]


class _Record(BaseModel):
    model_config = RECORD


class FileEntry(_Record):
    """Size in bytes and digest of one file."""

    sha256: Sha256
    size: Count


class Source(_Record):
    """Where the model came from. ``revision`` is a hub commit; ``files`` are the SHA-256 of the checkpoint's files."""

    kind: Literal["hub", "local", "gguf"]
    id: str
    revision: str | None = None
    files: dict[str, Sha256] = {}


class ModelFacts(_Record):
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


class GraphEntry(_Record):
    """One ONNX file. ``layers`` are the decoder layers it runs (None: all, or not a decoder).

    ``taps`` are the layers whose outputs ``hidden_taps`` joins, ascending, -1 for the embedding. ``cache`` is the
    geometry of a draft's own cache; None for graphs over the model's cache, or over none.
    """

    name: GraphName
    variant: Variant = "standard"
    file: RelativePath
    data_files: tuple[RelativePath, ...] = ()
    dtype: Literal["float32", "float16", "bfloat16"]
    layers: tuple[Count, ...] | None = None
    taps: tuple[Annotated[int, Field(ge=-1)], ...] = ()
    cache: tuple[CacheLayer, ...] | None = None
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class BlockFacts(_Record):
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


class EagleFacts(_Record):
    """An EAGLE-3 drafter: its ``taps``, most steps of a chain, and ``vocab_map`` as in :class:`BlockFacts`."""

    taps: tuple[Annotated[int, Field(ge=-1)], ...]
    steps: Positive
    vocab_map: RelativePath | None = None


class DrafterEntry(_Record):
    """One way of drafting. ``agreement`` is the share of positions whose top token equals the target's, in [0, 1].

    ``graph`` is the drafter's graph (of an ``eagle3`` drafter the one that ends in ``-extend``). ``block`` and
    ``eagle3`` hold the fixed facts of those kinds, ``source`` where a trained draft came from, ``max_positions`` how
    long a text it was made for.
    """

    name: str
    kind: Literal["ngram", "self_draft", "block", "eagle3", "draft_model"]
    graph: GraphName | None = None
    settings: dict[str, JsonValue] = {}
    agreement: Annotated[float, Field(ge=0, le=1)] | None = None
    max_positions: Positive | None = None
    block: BlockFacts | None = None
    eagle3: EagleFacts | None = None
    source: Source | None = None


class RowNoise(_Record):
    """How far logits move with the number of rows of a pass, seen over ``positions`` of a text and ``rows``.

    ``max_abs_logit_diff`` is the largest difference between a pass over one row and one over more;
    ``without_single_rows`` that among passes over two rows and more, which is all that the exact setting runs.
    """

    max_abs_logit_diff: Annotated[float, Field(ge=0)]
    without_single_rows: Annotated[float, Field(ge=0)]
    rows: tuple[Positive, ...]
    positions: Positive


class Precision(_Record):
    """Weight storage. ``block_size`` applies to int8 and int4 only, ``head`` and ``embedding`` to w8a8 as well."""

    weights: Weights
    block_size: Positive | None = None
    head: bool = False
    embedding: bool = False
    exact: bool = True
    accuracy_level: Count | None = None
    row_noise: RowNoise | None = None

    @property
    def quantized(self) -> bool:
        """Whether weights are stored as integers."""
        return self.weights in QUANTIZED

    @property
    def integer_products(self) -> bool:
        """Whether the CPU's forms of the graphs multiply integers, and so round activations whatever is asked for."""
        return self.weights == "w8a8"


class StepCosts(_Record):
    """Milliseconds of one pass: ``ms[graph][rows]``, measured with ``context`` committed tokens in the cache."""

    threads: Positive
    device: str
    context: Count
    ms: dict[str, dict[Annotated[str, Field(pattern="^[1-9][0-9]*$")], Annotated[float, Field(ge=0)]]]


class Manifest(_Record):
    """``manifest.json``. ``files`` lists every file of the bundle but the manifest; the writer fills it at commit."""

    schema_version: Literal[1] = SCHEMA_VERSION
    created_by: str
    created_at: str
    tools: dict[str, str] = {}
    source: Source
    model: ModelFacts
    graphs: tuple[GraphEntry, ...]
    drafters: tuple[DrafterEntry, ...] = ()
    precision: Precision
    costs: StepCosts | None = None
    engines: tuple[EngineEntry, ...] = ()
    files: dict[RelativePath, FileEntry] = {}
    validation: dict[str, JsonValue] = {}

    def missing_references(self) -> list[str]:
        """What graphs and drafters refer to and the manifest does not list; empty for a complete manifest."""
        names = {graph.name for graph in self.graphs}
        missing = [f"graph {d.graph} of drafter {d.name}" for d in self.drafters if d.graph and d.graph not in names]
        if ("target", "standard") not in {(g.name, g.variant) for g in self.graphs}:
            missing.append("the standard target graph")
        for drafter in self.drafters:
            facts = drafter.block or drafter.eagle3
            if facts is not None and facts.vocab_map is not None and facts.vocab_map not in self.files:
                missing.append(f"{facts.vocab_map} of drafter {drafter.name}")
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


def sha256_of(path: Path) -> str:
    """Hex digest of a file, streamed; a symlink is not followed where the system allows to say so."""
    digest = hashlib.sha256()
    with open(os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)), "rb") as file:
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def check_regular_file(root: Path, relative: str) -> os.stat_result:
    """lstat of ``root/relative``; DamagedBundle unless it is a regular, singly linked file reached without symlinks."""
    try:
        safe_relative_path(relative)
    except ValueError as error:
        raise DamagedBundle(str(error)) from error
    current = root
    parts = PurePosixPath(relative).parts
    for depth, part in enumerate(parts):
        current = current / part
        try:
            info = current.lstat()
        except OSError as error:
            raise DamagedBundle(f"{relative} is missing from the bundle {root}; build or copy it again") from error
        if stat.S_ISLNK(info.st_mode):
            raise DamagedBundle(f"{relative} of the bundle {root} is a symlink; copy the file itself into the bundle")
        if depth < len(parts) - 1 and not stat.S_ISDIR(info.st_mode):
            raise DamagedBundle(f"{relative} is missing from the bundle {root}; build or copy it again")
    if not stat.S_ISREG(info.st_mode):
        raise DamagedBundle(f"{relative} of the bundle {root} is not a regular file")
    if info.st_nlink > 1:
        raise DamagedBundle(
            f"{relative} of the bundle {root} is a hard link to a file elsewhere; copy it without links"
        )
    return info


def walk_files(root: Path) -> Iterator[str]:
    """Relative paths, sorted, of everything below ``root`` that is not a folder; symlinks are not entered."""
    for folder, folders, files in os.walk(root, followlinks=False):
        folders.sort()
        linked = [name for name in folders if (Path(folder) / name).is_symlink()]
        for name in sorted(files + linked):
            yield (Path(folder) / name).relative_to(root).as_posix()


@dataclass(frozen=True)
class BundleFiles:
    """An opened, checked bundle folder: its manifest and its paths."""

    root: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | os.PathLike[str], verify: bool = True) -> BundleFiles:
        """Read and check the bundle at ``path``; ``verify=False`` skips the digests, never the other checks.

        Raises BundleError if there is no bundle, DamagedBundle or IncompatibleBundle if it must not be used.
        """
        root = Path(path)
        if not root.is_dir():
            what = "is not a folder" if root.exists() else "does not exist"
            raise BundleError(f"bundle {root} {what}; make one with `dspark-export build MODEL --out {root}`")
        root = root.resolve()
        if not (root / MANIFEST).exists():
            raise BundleError(f"{root} has no {MANIFEST}, so it is no bundle; make one with `dspark-export build`")
        if check_regular_file(root, MANIFEST).st_size > MANIFEST_MAX_BYTES:
            raise DamagedBundle(f"{root / MANIFEST} is larger than {MANIFEST_MAX_BYTES} bytes; build the bundle again")
        files = cls(root, Manifest.parse((root / MANIFEST).read_bytes(), str(root / MANIFEST)))
        files._check(verify)
        return files

    def _check(self, verify: bool) -> None:
        for relative, entry in self.manifest.files.items():
            size = check_regular_file(self.root, relative).st_size
            if size != entry.size:
                raise self._mismatch(relative, f"has {size} bytes, the manifest says {entry.size}")
        for name in walk_files(self.root / GRAPH_DIR):
            if f"{GRAPH_DIR}/{name}" not in self.manifest.files:
                raise DamagedBundle(f"{GRAPH_DIR}/{name} of the bundle {self.root} is not in its manifest; remove it")
        if verify:
            for relative, entry in self.manifest.files.items():
                if sha256_of(self.root / relative) != entry.sha256:
                    raise self._mismatch(relative, "was altered: its SHA-256 is not the manifest's")

    def _mismatch(self, relative: str, how: str) -> DamagedBundle:
        if all(relative != engine.file for engine in self.manifest.engines):
            return DamagedBundle(f"{relative} of the bundle {self.root} {how}; copy or build it again")
        from dspark_runtime.engine_check import plan_error  # it knows about engines, and imports this module

        entry, path = self.manifest.files[relative], self.root / relative
        return plan_error(relative, entry, path.stat().st_size, sha256_of(path), self.manifest)

    def path(self, relative: str) -> Path:
        """Absolute path of a listed file; DamagedBundle if the manifest does not list it."""
        if relative not in self.manifest.files:
            raise DamagedBundle(f"the bundle {self.root} has no file {relative}")
        return self.root / relative

    @property
    def tokenizer_dir(self) -> Path:
        """Folder with tokenizer.json and its companions."""
        return self.root / TOKENIZER_DIR

    def graph(self, name: str, prefer: Sequence[Variant] = ()) -> GraphEntry:
        """The graph ``name`` in the first variant of ``prefer`` there is, else the standard one.

        Raises IncompatibleBundle if there is none.
        """
        variants = {graph.variant: graph for graph in self.manifest.graphs if graph.name == name}
        for variant in (*prefer, "standard"):
            if variant in variants:
                return variants[variant]
        have = ", ".join(sorted({graph.name for graph in self.manifest.graphs}))
        raise IncompatibleBundle(
            f"the bundle {self.root} has no graph {name!r} (it has {have}); build it again with that graph"
        )

    def has_graph(self, name: str) -> bool:
        """Whether any variant of graph ``name`` is in the bundle."""
        return any(graph.name == name for graph in self.manifest.graphs)
