"""Resolves what the user calls a model to a checked checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspark_export.checkpoints.checkpoint import Checkpoint, Kind
from dspark_export.checkpoints.config import INDEX, load_config
from dspark_export.checkpoints.fit import fit
from dspark_export.checkpoints.gguf_file import GgufFile
from dspark_export.checkpoints.gguf_tokenizer import load_gguf_tokenizer
from dspark_export.checkpoints.hub import HubSnapshot, is_hub_id
from dspark_export.checkpoints.inventory import generic
from dspark_export.checkpoints.quantized.methods import check_method, read_settings
from dspark_export.checkpoints.recipes import Found, Recipe, Recipes, as_stored
from dspark_export.checkpoints.rotary import end_at_original_length
from dspark_export.checkpoints.tokenizer import FILES as TOKENIZER_FILES
from dspark_export.checkpoints.tokenizer import MissingTokenizer, has_tokenizer, load_tokenizer
from dspark_export.checkpoints.trust import Trust
from dspark_export.checkpoints.weights import (
    SINGLE,
    WeightFiles,
    check_dtypes,
    check_tying,
    find_weights,
    read_headers,
    read_pickles,
    shard_names,
)
from dspark_runtime.errors import ModelNotFound, UnsupportedArchitecture, UsageError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from dspark_export.checkpoints.architectures import Trial


def resolve(
    model: str, revision: str | None = None, trust: Trust | None = None, trial: Trial | None = None
) -> Checkpoint:
    """Find and check ``model``: a GGUF file, a local folder, or a hub id at ``revision``.

    ``trial`` decides about architectures without a parity test; None refuses them.

    Config, architecture, weight headers and tokenizer are checked, in that order; no weights are read, and those of a
    hub model are downloaded only after its config was accepted. Raises a CheckpointError that says what is wrong.
    """
    trust = trust or Trust.closed()
    path = Path(model).expanduser()
    if model and (path.is_dir() or path.is_file()):
        if revision is not None:
            raise UsageError(f"--revision {revision} applies to hub models, {model} is a local path; leave it out")
        if path.is_file():
            return _from_gguf(path, trial)
        return _from_folder(path, model, trust, trial)
    if _looks_local(model) or not is_hub_id(model):
        raise ModelNotFound(
            f"no file or folder {model!r}; pass a hub id (owner/name), a folder with config.json, or a .gguf file"
        )
    return _from_hub(model, revision, trust, trial)


def _looks_local(model: str) -> bool:
    return model.startswith(("/", ".", "~")) or model.endswith(".gguf") or "\\" in model


def _from_gguf(path: Path, trial: Trial | None) -> Checkpoint:
    if path.suffix != ".gguf":
        raise ModelNotFound(f"{path} is a file but no .gguf; pass a hub id, a folder with config.json, or a .gguf file")
    file = GgufFile.read(path)
    config, unread = file.load_config()
    end_at_original_length(config, str(path))
    _check_supported(config, trial)
    unread |= file.plan(config).unread
    tokenizer = load_gguf_tokenizer(file)
    tokenizer.check(config.vocab_size, str(path))
    return Checkpoint("gguf", path.name, None, config, tokenizer, Trust.closed(), gguf=file, unread=unread)


def _from_folder(folder: Path, name: str, trust: Trust, trial: Trial | None) -> Checkpoint:
    config = load_config(folder, name, trust)
    quantization = _take_quantization(config, folder, name)
    end_at_original_length(config, name)
    _check_supported(config, trial)
    return _with_weights("local", find_weights(folder, name, trust), config, quantization, name, None, trust)


def _from_hub(model: str, revision: str | None, trust: Trust, trial: Trial | None) -> Checkpoint:
    snapshot = HubSnapshot.fetch(model, revision)
    config = load_config(snapshot.directory, model, trust)
    quantization = _take_quantization(config, snapshot.directory, model)
    end_at_original_length(config, model)
    _check_supported(config, trial)
    snapshot.fetch_files(
        [SINGLE] if not (snapshot.directory / INDEX).exists() else shard_names(snapshot.directory, model)
    )
    weights = find_weights(snapshot.directory, model, trust, snapshot.remote_names)
    if weights.pickled:
        snapshot.fetch_files(list(weights.names))
    return _with_weights("hub", weights, config, quantization, model, snapshot.commit, trust)


def _take_quantization(config: PretrainedConfig, folder: Path, name: str) -> Mapping[str, Any] | None:
    """How the weights are quantized, which is checked and goes out of ``config``: transformers shall not see it."""
    settings = read_settings(folder, getattr(config, "quantization_config", None))
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if settings:
        check_method(settings, name)
    return settings


def _with_weights(
    kind: Kind,
    weights: WeightFiles,
    config: PretrainedConfig,
    quantization: Mapping[str, Any] | None,
    name: str,
    revision: str | None,
    trust: Trust,
) -> Checkpoint:
    if weights.pickled:
        if quantization:
            raise UnsupportedArchitecture(f"{name} has quantized weights in pickle files; convert them to safetensors")
        shapes = {tensor: tuple(value.shape) for tensor, value in read_pickles(weights, name, trust, "meta").items()}
        recipes = Recipes({tensor: Recipe(shape, {"weight": tensor}) for tensor, shape in shapes.items()}, {})
    else:
        found = read_headers(weights, name)
        recipes = _dequantized(found, quantization, name) if quantization else as_stored(found)
    fitted = fit({weight: recipe.shape for weight, recipe in recipes.weights.items()}, config, name, trust)
    taken = {weight: recipes.weights[weight] for weight in fitted.taken}
    if not weights.pickled:
        plain = {weight: found[weight] for weight, recipe in taken.items() if recipe.make is None}
        check_dtypes(plain, name)
        check_tying(plain, config, name)
    tokenizer = None
    if kind == "local" and not has_tokenizer(weights.folder):
        warnings.warn(
            f"{name} has no tokenizer ({', '.join(TOKENIZER_FILES[:3])}): the bundle will take token ids only; put the "
            "model's tokenizer files into it to generate from text",
            MissingTokenizer,
            stacklevel=2,
        )
    else:
        tokenizer = load_tokenizer(weights.folder, config, name, trust)
    unread = {**fitted.unread, **{generic(tensor): reason for tensor, reason in recipes.excused.items()}}
    if quantization:
        unread["quantization_config"] = f"{quantization['quant_method']}: weights become the floats they stand for"
    source = weights.folder.name if kind == "local" else name
    return Checkpoint(kind, source, revision, config, tokenizer, trust, weights=weights, taken=taken, unread=unread)


def _dequantized(found: Found, quantization: Mapping[str, Any], name: str) -> Recipes:
    # torch: only for checkpoints that are quantized
    from dspark_export.checkpoints.quantized.plan import plan

    return plan(found, quantization, name)


def _check_supported(config: PretrainedConfig, trial: Trial | None) -> None:
    # transformers: only when a model is opened
    from dspark_export.checkpoints.architectures import check_supported

    check_supported(config, trial=trial)
