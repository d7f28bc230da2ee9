"""Resolves what the user calls a model to a checked checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
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
from dspark_export.checkpoints.recipes import Found, Recipe, Recipes, as_stored, open_weights
from dspark_export.checkpoints.rotary import end_at_original_length
from dspark_export.checkpoints.text_part import text_part, text_weights, unread_parts
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


@dataclass(frozen=True)
class _Opened:
    """A checked config: of the text part, where a checkpoint has others too (``left_out``: those, with the reason)."""

    config: PretrainedConfig
    left_out: Mapping[str, str] | None
    quantization: Mapping[str, Any] | None

    @classmethod
    def read(cls, folder: Path, name: str, trust: Trust, trial: Trial | None) -> _Opened:
        whole = load_config(folder, name, trust)
        config = text_part(whole, any_wrapper=trial is not None)
        quantization = read_settings(folder, getattr(config, "quantization_config", None))
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # transformers must see plain floats
        end_at_original_length(config, name)
        _check_supported(config, trial)
        if quantization:
            check_method(quantization, name)
        return cls(config, unread_parts(whole) if config is not whole else None, quantization)


def _from_folder(folder: Path, name: str, trust: Trust, trial: Trial | None) -> Checkpoint:
    opened = _Opened.read(folder, name, trust, trial)
    return _with_weights("local", find_weights(folder, name, trust), opened, name, None, trust)


def _from_hub(model: str, revision: str | None, trust: Trust, trial: Trial | None) -> Checkpoint:
    snapshot = HubSnapshot.fetch(model, revision)
    opened = _Opened.read(snapshot.directory, model, trust, trial)
    snapshot.fetch_files(
        [SINGLE] if not (snapshot.directory / INDEX).exists() else shard_names(snapshot.directory, model)
    )
    weights = find_weights(snapshot.directory, model, trust, snapshot.remote_names)
    if weights.pickled:
        snapshot.fetch_files(list(weights.names))
    return _with_weights("hub", weights, opened, model, snapshot.commit, trust)


def _recipes(weights: WeightFiles, opened: _Opened, name: str, trust: Trust) -> tuple[Recipes, Mapping[str, str]]:
    """What the model is made of, and what stays unread."""
    found: Found = {}
    if not weights.pickled:
        found = read_headers(weights, name)
        recipes = _dequantized(found, opened.quantization, name) if opened.quantization else as_stored(found)
    elif opened.quantization:
        raise UnsupportedArchitecture(f"{name} has quantized weights in pickle files; convert them to safetensors")
    else:
        shapes = {tensor: tuple(value.shape) for tensor, value in read_pickles(weights, name, trust, "meta").items()}
        recipes = Recipes({tensor: Recipe(shape, {"weight": tensor}) for tensor, shape in shapes.items()}, {})
    if opened.left_out is not None:
        recipes = text_weights(recipes, opened.config, name)
    made = recipes.weights

    def is_zero(weight: str) -> bool:
        return not weights.pickled and not open_weights({weight: made[weight]}, found)[weight][...].any()

    fitted = fit({weight: recipe.shape for weight, recipe in made.items()}, opened.config, name, trust, is_zero)
    taken = {weight: made[weight] for weight in fitted.taken}
    if not weights.pickled:
        plain = [recipe.parts["weight"] for recipe in taken.values() if recipe.make is None]
        check_dtypes({tensor: found[tensor] for tensor in plain}, name)
        check_tying({tensor: found[tensor] for tensor in plain}, opened.config, name)
    unread = {**(opened.left_out or {}), **{generic(tensor): reason for tensor, reason in recipes.excused.items()}}
    if opened.quantization:
        method = opened.quantization["quant_method"]
        unread["quantization_config"] = f"{method}: says which numbers the stored ones stand for"
    return Recipes(taken, {}), {**unread, **fitted.unread}


def _with_weights(
    kind: Kind, weights: WeightFiles, opened: _Opened, name: str, revision: str | None, trust: Trust
) -> Checkpoint:
    config = opened.config
    recipes, unread = _recipes(weights, opened, name, trust)
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
    source = weights.folder.name if kind == "local" else name
    return Checkpoint(
        kind, source, revision, config, tokenizer, trust, weights=weights, taken=recipes.weights, unread=unread
    )


def _dequantized(found: Found, quantization: Mapping[str, Any], name: str) -> Recipes:
    # torch: only for checkpoints that are quantized
    from dspark_export.checkpoints.quantized.plan import plan

    return plan(found, quantization, name)


def _check_supported(config: PretrainedConfig, trial: Trial | None) -> None:
    # transformers: only when a model is opened
    from dspark_export.checkpoints.architectures import check_supported

    check_supported(config, trial=trial)
