"""The weights of a draft: names and shapes against its config, finite values, vocabulary maps, read on request."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dspark_export.checkpoints.safetensors_file import FLOAT_DTYPES
from dspark_export.checkpoints.trust import Trust
from dspark_export.checkpoints.weights import WeightFiles, check_dtypes, read_headers, read_pickles
from dspark_export.drafts.formats.description import (
    D2T,
    EMBEDDING,
    HEAD,
    MAPS,
    T2D,
    Description,
    expected_tensors,
)
from dspark_export.drafts.formats.draft import Shape
from dspark_runtime.errors import InvalidVocabMap, InvalidWeights

if TYPE_CHECKING:
    import torch

_LISTED = 12


class StoredTensors(Mapping[str, "torch.Tensor"]):
    """Tensors of safetensors files by name, each read on request and not kept."""

    def __init__(self, places: Mapping[str, tuple[Path, str]]) -> None:
        self._places = dict(places)

    def __getitem__(self, name: str) -> torch.Tensor:
        from safetensors import safe_open

        path, stored = self._places[name]
        with safe_open(path, "pt") as file:
            tensor: torch.Tensor = file.get_tensor(stored)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def renamed(self, stored: Mapping[str, str]) -> StoredTensors:
        """The tensors ``stored`` (new name to name here), under their new names."""
        return StoredTensors({key: self._places[name] for key, name in stored.items()})

    def shape(self, name: str) -> Shape:
        """Shape of a tensor, from the header alone."""
        from safetensors import safe_open

        path, stored = self._places[name]
        with safe_open(path, "pt") as file:
            return tuple(file.get_slice(stored).get_shape())

    def rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Some rows of a matrix without reading the others; ``rows`` int64, ascending."""
        from safetensors import safe_open

        path, stored = self._places[name]
        with safe_open(path, "pt") as file:
            part = file.get_slice(stored)
            if len(rows) == part.get_shape()[0]:
                whole: torch.Tensor = part[:]
                return whole
            import torch

            return torch.cat([part[row : row + 1] for row in rows.tolist()])


@dataclass(frozen=True)
class Header:
    """Names, shapes and dtypes (safetensors' words) of what is stored, and how to read it."""

    shapes: Mapping[str, Shape]
    dtypes: Mapping[str, str]
    tensors: Mapping[str, torch.Tensor]


def read_stored(files: WeightFiles, name: str, trust: Trust) -> Header:
    """What the weight files of a draft hold, by stored name; InvalidWeights for damaged files."""
    if files.pickled:
        return _unpickled(files, name, trust)
    found = read_headers(files, name)
    check_dtypes(found, name, MAPS)
    return Header(
        {key: stored.shape for key, (_, stored) in found.items()},
        {key: stored.dtype for key, (_, stored) in found.items()},
        StoredTensors({key: (path, key) for key, (path, _) in found.items()}),
    )


def _unpickled(files: WeightFiles, name: str, trust: Trust) -> Header:
    tensors = read_pickles(files, name, trust)
    words = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16", "torch.float64": "F64"}
    return Header(
        {key: tuple(tensor.shape) for key, tensor in tensors.items()},
        {key: words.get(str(tensor.dtype), str(tensor.dtype)) for key, tensor in tensors.items()},
        tensors,
    )


@dataclass(frozen=True)
class DraftWeights:
    """Weights under DeepSpec's names: the draft's own, and copies of the target's embedding and head.

    ``odd_map``: what a user should know about how the vocabulary map was read, empty for nothing.
    """

    own: Mapping[str, torch.Tensor]
    copies: Mapping[str, torch.Tensor]
    target_ids: torch.Tensor | None
    own_embedding: bool
    own_head: bool
    odd_map: str = ""


def check_tensors(header: Header, description: Description, name: str) -> DraftWeights:
    """Only the weights that ``description`` asks for.

    Raises InvalidWeights with all missing and unknown names and all wrong shapes, for NaN and infinity, and
    InvalidVocabMap for maps that contradict themselves.
    """
    stored = {description.rename(key): key for key in header.shapes}
    if len(stored) != len(header.shapes):
        raise InvalidWeights(f"{name} stores a tensor under two names; get the checkpoint again")
    config = description.config
    shapes = dict(expected_tensors(description))
    table = (config.vocab_size, config.layers.hidden_size)
    copied = {EMBEDDING: table, HEAD: (config.draft_vocab_size, config.layers.hidden_size)}
    shapes |= {key: shape for key, shape in copied.items() if key in stored}
    if description.maps:
        lengths = {D2T: (config.draft_vocab_size,), T2D: (config.vocab_size,)}
        _check_maps(stored, header, lengths, name)
        shapes |= {key: shape for key, shape in lengths.items() if key in stored}
    _check_names(stored, shapes, description, name)
    _check_shapes(header, stored, shapes, name)
    _check_dtypes(header, stored, name)
    tensors = _renamed(header.tensors, stored)
    _check_finite(tensors, name)
    ids, odd = _target_ids(tensors, config.vocab_size, config.draft_vocab_size, name)
    own_embedding = description.trained_embedding and EMBEDDING in stored
    own_head = description.trained_head and HEAD in stored
    kept = {EMBEDDING: own_embedding, HEAD: own_head}
    own = {key: stored[key] for key in shapes if kept.get(key, True) and key not in MAPS}
    copies = {key: stored[key] for key in shapes if not kept.get(key, True)}
    stored_own, stored_copies = _renamed(header.tensors, own), _renamed(header.tensors, copies)
    return DraftWeights(stored_own, stored_copies, ids, own_embedding, own_head, odd)


def _renamed(tensors: Mapping[str, torch.Tensor], stored: Mapping[str, str]) -> Mapping[str, torch.Tensor]:
    if isinstance(tensors, StoredTensors):
        return tensors.renamed(stored)
    return {key: tensors[name] for key, name in stored.items()}


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _check_names(stored: Mapping[str, str], shapes: Mapping[str, Shape], description: Description, name: str) -> None:
    missing = sorted(set(shapes) - set(stored))
    unknown = sorted(stored[key] for key in set(stored) - set(shapes))
    parts = []
    if missing:
        parts.append(f"lacks {_some(missing)}")
    if unknown:
        parts.append(f"has {_some(unknown)}, which a {description.format} draft of its config does not have")
    if parts:
        raise InvalidWeights(f"{name} {'; it '.join(parts)}; its weights and its config.json do not belong together")


def _check_shapes(header: Header, stored: Mapping[str, str], shapes: Mapping[str, Shape], name: str) -> None:
    wrong = [
        f"{stored[key]} is {list(header.shapes[stored[key]])} instead of {list(shape)}"
        for key, shape in shapes.items()
        if tuple(header.shapes[stored[key]]) != shape
    ]
    if wrong:
        raise InvalidWeights(f"{name}: {'; '.join(wrong[:_LISTED])}; its weights do not fit its config.json")


def _check_dtypes(header: Header, stored: Mapping[str, str], name: str) -> None:
    wrong = [
        f"{key} is {header.dtypes[old]}" for key, old in stored.items() if not _dtype_fits(key, header.dtypes[old])
    ]
    if wrong:
        raise InvalidWeights(
            f"{name}: {_some(wrong)}; weights must be {', '.join(FLOAT_DTYPES)}, {D2T} whole numbers, {T2D} booleans"
        )


def _dtype_fits(key: str, dtype: str) -> bool:
    word = dtype.removeprefix("torch.").upper()
    if key == D2T:
        return word in ("I64", "I32", "INT64", "INT32")
    return word == "BOOL" if key == T2D else dtype in FLOAT_DTYPES


def _check_finite(tensors: Mapping[str, torch.Tensor], name: str) -> None:
    import torch

    bad = []
    for key in tensors:
        tensor = tensors[key]
        if tensor.is_floating_point():
            low, high = torch.aminmax(tensor)
            if not (torch.isfinite(low) and torch.isfinite(high)):
                bad.append(f"{key} has {'NaN' if torch.isnan(low) else 'infinite values'}")
    if bad:
        raise InvalidWeights(f"{name}: {_some(bad)}; the checkpoint is damaged or its training diverged")


def _check_maps(stored: Mapping[str, str], header: Header, lengths: Mapping[str, Shape], name: str) -> None:
    (draft,), (full,) = lengths[D2T], lengths[T2D]
    if D2T not in stored and draft != full:
        raise InvalidVocabMap(
            f"{name} drafts from {draft} of {full} tokens and has no {D2T}, so nothing says which; use the checkpoint "
            "with its map, or a draft of the whole vocabulary"
        )
    for key, shape in lengths.items():
        if key in stored and tuple(header.shapes[stored[key]]) != shape:
            raise InvalidVocabMap(
                f"{name}: {key} is {list(header.shapes[stored[key]])} instead of {list(shape)}, one entry for each of "
                f"the {shape[0]} {'draft' if key == D2T else 'target'} tokens; get the checkpoint again"
            )


def _target_ids(
    tensors: Mapping[str, torch.Tensor], vocab: int, draft_vocab: int, name: str
) -> tuple[torch.Tensor | None, str]:
    """int64 [draft_vocab] from d2t, None where draft and target ids are the same; and what is odd about the map.

    d2t holds offsets from draft ids to target ids. Some tools write the target ids themselves.
    """
    import torch

    if D2T not in tensors:
        if T2D in tensors and bool(tensors[T2D].any()) and not bool(tensors[T2D].all()):
            raise InvalidVocabMap(f"{name} has {T2D} that leaves tokens out, and no {D2T}; get the checkpoint again")
        return None, ""
    own, stored = torch.arange(draft_vocab), tensors[D2T].to(torch.int64)
    members = tensors.get(T2D)
    if members is not None and not bool(members.any()):
        members = None  # never filled in
    if draft_vocab == vocab and not bool(stored.any()):
        return None, ""  # the whole vocabulary: no map is needed, whatever t2d says
    if not bool(stored.any()) and members is None:
        raise InvalidVocabMap(
            f"{name} drafts from {draft_vocab} of {vocab} tokens, and its {D2T} is all zeros: the map was never filled "
            f"in, and nothing says which tokens it drafts; get the checkpoint with its map (or, if they really are the "
            f"first {draft_vocab}, mark those in {T2D})"
        )
    offsets, absolute = _fault(own + stored, vocab, members), _fault(stored, vocab, members)
    if offsets and not absolute:
        return stored, f"its {D2T} holds the model's ids themselves, not offsets to them, and was read like that"
    if offsets:
        raise InvalidVocabMap(
            f"{name}: {offsets}; its entries are offsets from draft ids to target ids: get the checkpoint again"
        )
    odd = ""
    if not absolute and members is None and draft_vocab > 2:
        odd = (
            f"its {D2T} could hold offsets or the model's ids themselves, there is no {T2D} to tell, and it was read "
            "as offsets; if hardly any draft is accepted, it holds ids"
        )
    ids = own + stored
    return (None if torch.equal(ids, own) and draft_vocab == vocab else ids), odd


def _fault(ids: torch.Tensor, vocab: int, members: torch.Tensor | None) -> str:
    """What is wrong with ``ids`` as target ids of a draft's tokens, whose members t2d marks; empty if nothing is."""
    import torch

    if outside := ids[(ids < 0) | (ids >= vocab)].tolist():
        return f"{D2T} leads to {len(outside)} ids outside the vocabulary of {vocab}, e.g. {outside[0]}"
    values, counts = torch.unique(ids, return_counts=True)
    if len(values) != len(ids):
        return f"{D2T} leads to target id {int(values[counts > 1][0])} twice"
    if members is not None:
        reached = torch.zeros(vocab, dtype=torch.bool)
        reached[ids] = True
        if wrong := torch.nonzero(reached != members)[:, 0].tolist():
            return f"{T2D} and {D2T} disagree about {len(wrong)} tokens, e.g. {wrong[0]}"
    return ""
