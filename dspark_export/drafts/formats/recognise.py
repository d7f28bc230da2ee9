"""Resolves what the user calls a draft to a checked one: config.json tells its format."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspark_export.checkpoints.config import CONFIG, INDEX, read_json
from dspark_export.checkpoints.files import checked_file
from dspark_export.checkpoints.hub import HubSnapshot, is_hub_id
from dspark_export.checkpoints.resolve import resolve
from dspark_export.checkpoints.tokenizer import has_tokenizer
from dspark_export.checkpoints.trust import Trust
from dspark_export.checkpoints.weights import SINGLE, WeightFiles, find_weights, shard_names
from dspark_export.drafts.formats import classic_eagle3, deepspec, speculators, zlab
from dspark_export.drafts.formats.description import Description
from dspark_export.drafts.formats.draft import DraftCheckpoint
from dspark_export.drafts.formats.tensors import Header, check_tensors, read_stored
from dspark_runtime.bundle.files import sha256_of
from dspark_runtime.errors import InvalidConfig, UnsupportedArchitecture, UsageError

if TYPE_CHECKING:
    from dspark_export.checkpoints.architectures import Trial
    from dspark_export.checkpoints.checkpoint import Checkpoint

_LOOKS_LIKE_A_DRAFT = ("dspark", "dflash", "eagle", "speculator", "medusa", "hydra", "mlpspeculator", "mtpmodel")
_FIELDS_OF_DRAFTS = ("target_layer_ids", "num_target_layers", "markov_rank", "ttt_length", "aux_hidden_state_layer_ids")


def recognise(
    draft: str, *, revision: str | None = None, trust: Trust | None = None, trial: Trial | None = None
) -> DraftCheckpoint | Checkpoint:
    """Open and check ``draft``: a folder or hub id of a trained drafter, or any causal language model.

    Fields and tensors are read strictly and weights are looked through once for NaN and infinity. Modules that come
    with the checkpoint do not run for trained drafters, whatever ``trust`` says. Raises a CheckpointError that names
    everything that is wrong with the draft itself; whether it fits a target is up to the pair check.
    """
    trust = trust or Trust.closed()
    path = Path(draft).expanduser()
    if draft and path.is_dir() and (path / CONFIG).exists():
        if revision is not None:
            raise UsageError(f"a revision applies to hub models, {draft} is a local path; leave {revision} out")
        raw = read_json(checked_file(path, CONFIG, InvalidConfig), InvalidConfig)
        if _is_trained(raw, draft):
            return _open(raw, find_weights(path, draft, trust), draft, path.resolve().name, trust)
    elif not path.exists() and is_hub_id(draft):
        snapshot = HubSnapshot.fetch(draft, revision)
        folder = snapshot.directory
        raw = (
            read_json(checked_file(folder, CONFIG, InvalidConfig), InvalidConfig) if (folder / CONFIG).exists() else {}
        )
        if _is_trained(raw, draft):
            return _open(raw, _fetched(snapshot, draft, trust), draft, draft, trust, snapshot.commit)
    return resolve(draft, revision, trust, trial)


def _fetched(snapshot: HubSnapshot, draft: str, trust: Trust) -> WeightFiles:
    folder = snapshot.directory
    snapshot.fetch_files([SINGLE] if not (folder / INDEX).exists() else shard_names(folder, draft))
    weights = find_weights(folder, draft, trust, snapshot.remote_names)
    if weights.pickled:
        snapshot.fetch_files(list(weights.names))
    return weights


def _architecture(raw: dict[str, Any]) -> str:
    names = raw.get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""


def _is_trained(raw: dict[str, Any], draft: str) -> bool:
    """Whether this is a drafter of one of the known formats; UnsupportedArchitecture for one of another format."""
    architecture = _architecture(raw)
    kind = raw.get(speculators.MARK)
    if kind is not None:
        if kind not in speculators.KINDS:
            raise UnsupportedArchitecture(
                f"{draft} is a speculators draft of type {kind!r}; {', '.join(speculators.KINDS)} are supported"
            )
        return True
    known = (*deepspec.ARCHITECTURES, *zlab.ARCHITECTURES, *classic_eagle3.ARCHITECTURES)
    if architecture in known or zlab.INNER in raw or "draft_vocab_size" in raw:
        return True
    fields = [field for field in _FIELDS_OF_DRAFTS if field in raw]
    if fields or any(word in architecture.lower() for word in _LOOKS_LIKE_A_DRAFT):
        seen = f" (it has {fields[0]})" if fields else ""
        raise UnsupportedArchitecture(
            f"{draft} is a draft of architecture {architecture!r}{seen}; supported are {', '.join(known)}, "
            f"speculators' {', '.join(speculators.KINDS)}, and causal language models"
        )
    return False


def _describe(raw: dict[str, Any], where: str, header: Header) -> Description:
    architecture = _architecture(raw)
    if speculators.MARK in raw:
        return speculators.read_speculators(raw, where, raw[speculators.MARK])
    if architecture in deepspec.ARCHITECTURES:
        return deepspec.read_deepspec(raw, where, architecture)
    if architecture in zlab.ARCHITECTURES or zlab.INNER in raw:
        return zlab.read_zlab(raw, where, architecture)
    return classic_eagle3.read_classic_eagle3(raw, where, list(header.shapes))


def _open(
    raw: dict[str, Any], files: WeightFiles, draft: str, name: str, trust: Trust, revision: str | None = None
) -> DraftCheckpoint:
    header = read_stored(files, draft, trust)
    description = _describe(raw, f"{draft}: {CONFIG}", header)
    weights = check_tensors(header, description, draft)
    digests = {file: sha256_of((files.folder / file).resolve()) for file in (CONFIG, *files.names)}
    return DraftCheckpoint(
        id=name,
        format=description.format,
        directory=files.folder,
        config=description.config,
        tensors=weights.own,
        target_ids=weights.target_ids,
        own_embedding=weights.own_embedding,
        own_head=weights.own_head,
        has_tokenizer=has_tokenizer(files.folder),
        files=digests,
        copies=weights.copies,
        target_layers=description.target_layers,
        taps_rule=description.taps_rule,
        rope_copied=description.rope_copied,
        revision=revision,
        odd_map=weights.odd_map,
    )
