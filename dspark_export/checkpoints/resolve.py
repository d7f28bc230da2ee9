"""From what the user calls a model to a checked checkpoint."""

from __future__ import annotations

from pathlib import Path

from dspark_export.checkpoints.checkpoint import Checkpoint, Kind
from dspark_export.checkpoints.config import load_config
from dspark_export.checkpoints.gguf_file import GgufFile
from dspark_export.checkpoints.gguf_tokenizer import load_gguf_tokenizer
from dspark_export.checkpoints.hub import HubSnapshot, is_hub_id
from dspark_export.checkpoints.tokenizer import load_tokenizer
from dspark_export.checkpoints.trust import Trust
from dspark_export.checkpoints.weights import (
    INDEX,
    SINGLE,
    WeightFiles,
    check_against_config,
    check_tying,
    find_weights,
    read_headers,
    shard_names,
)
from dspark_runtime.errors import ModelNotFound, UsageError


def resolve(model: str, revision: str | None = None, trust: Trust | None = None) -> Checkpoint:
    """Find and check ``model``: a GGUF file, a local folder, or a hub id at ``revision``.

    Config, architecture, weight headers and tokenizer are checked, in that order; no weights are read, and those of a
    hub model are downloaded only after its config was accepted. Raises a CheckpointError that says what is wrong.
    """
    trust = trust or Trust.closed()
    path = Path(model).expanduser()
    if model and (path.is_dir() or path.is_file()):
        if revision is not None:
            raise UsageError(f"--revision {revision} applies to hub models, {model} is a local path; leave it out")
        return _from_gguf(path) if path.is_file() else _from_folder("local", path, model, None, trust)
    if _looks_local(model) or not is_hub_id(model):
        raise ModelNotFound(
            f"no file or folder {model!r}; pass a hub id (owner/name), a folder with config.json, or a .gguf file"
        )
    return _from_hub(model, revision, trust)


def _looks_local(model: str) -> bool:
    return model.startswith(("/", ".", "~")) or model.endswith(".gguf") or "\\" in model


def _from_gguf(path: Path) -> Checkpoint:
    if path.suffix != ".gguf":
        raise ModelNotFound(f"{path} is a file but no .gguf; pass a hub id, a folder with config.json, or a .gguf file")
    file = GgufFile.read(path)
    config = file.load_config()
    _check_supported(config)
    tokenizer = load_gguf_tokenizer(file)
    tokenizer.check(config.vocab_size, str(path))
    return Checkpoint("gguf", path.name, None, config, tokenizer, Trust.closed(), gguf=file)


def _from_folder(kind: Kind, folder: Path, name: str, revision: str | None, trust: Trust) -> Checkpoint:
    config = load_config(folder, name, trust)
    _check_supported(config)
    return _with_weights(kind, find_weights(folder, name, trust), config, name, revision, trust)


def _from_hub(model: str, revision: str | None, trust: Trust) -> Checkpoint:
    snapshot = HubSnapshot.fetch(model, revision)
    config = load_config(snapshot.directory, model, trust)
    _check_supported(config)
    snapshot.fetch_files(
        [SINGLE] if not (snapshot.directory / INDEX).exists() else shard_names(snapshot.directory, model)
    )
    weights = find_weights(snapshot.directory, model, trust, snapshot.remote_names)
    if weights.pickled:
        snapshot.fetch_files(list(weights.names))
    return _with_weights("hub", weights, config, model, snapshot.commit, trust)


def _with_weights(
    kind: Kind, weights: WeightFiles, config: object, name: str, revision: str | None, trust: Trust
) -> Checkpoint:
    from transformers import PretrainedConfig

    assert isinstance(config, PretrainedConfig)
    if not weights.pickled:
        tensors = read_headers(weights, name)
        check_against_config(weights, config, name, trust)
        check_tying(tensors, config, name)
    tokenizer = load_tokenizer(weights.folder, config, name, trust)
    source = weights.folder.name if kind == "local" else name
    return Checkpoint(kind, source, revision, config, tokenizer, trust, weights=weights)


def _check_supported(config: object) -> None:
    from dspark_export.graphs.support import check_supported

    check_supported(config)
