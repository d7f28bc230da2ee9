"""Checks the weight files of a checkpoint folder against each other and against the model its config describes."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dspark_export.checkpoints.config import INDEX, read_json
from dspark_export.checkpoints.files import checked_file
from dspark_export.checkpoints.safetensors_file import FLOAT_DTYPES, StoredTensor, read_header
from dspark_export.checkpoints.trust import PICKLE_SUFFIXES, Trust
from dspark_runtime.errors import InvalidConfig, InvalidWeights

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

SINGLE = "model.safetensors"
ADAPTER = "adapter_config.json"
MAIN_PICKLE = "pytorch_model"
"""How the names of pickled weights begin, where a folder has other pickles too."""

INDEX_MAX_BYTES = 64 * 2**20
_COMPARE_ROWS = 4096


@dataclass(frozen=True)
class WeightFiles:
    """The files to load: ``names`` relative to the folder, ``pickled`` only behind an open trust gate."""

    folder: Path
    names: tuple[str, ...]
    pickled: bool = False


def shard_names(folder: Path, name: str) -> list[str]:
    """File names the shard index refers to, in order; empty if there is no index."""
    return list(dict.fromkeys(_weight_map(folder, name).values()))


def _weight_map(folder: Path, name: str) -> dict[str, str]:
    if not (folder / INDEX).exists() and not (folder / INDEX).is_symlink():
        return {}
    index = read_json(checked_file(folder, INDEX, InvalidWeights), InvalidWeights, INDEX_MAX_BYTES)
    mapping = index.get("weight_map")
    if not isinstance(mapping, dict) or not mapping or not all(isinstance(file, str) for file in mapping.values()):
        raise InvalidWeights(f"{name}: weight_map in {INDEX} must map tensor names to file names")
    for file in set(mapping.values()):
        if "/" in file or "\\" in file or file in ("", ".", "..") or not file.endswith(".safetensors"):
            raise InvalidWeights(f"{name}: {INDEX} names {file!r}, which is not a safetensors file of the same folder")
    return mapping


def find_weights(folder: Path, name: str, trust: Trust, listing: Callable[[], list[str]] | None = None) -> WeightFiles:
    """The weight files of ``folder``; ``listing`` gives all names a hub repository has, downloaded or not.

    Raises InvalidWeights if there are none and UntrustedCheckpoint if there are only pickles and the gate is closed.
    """
    shards = shard_names(folder, name)
    if (folder / ADAPTER).exists() and (shards or (folder / SINGLE).exists()):
        raise InvalidWeights(
            f"{name} has an adapter beside its weights ({ADAPTER}); merge it into them (peft's merge_and_unload) and "
            "build from the result, or move it elsewhere to build without it"
        )
    if (folder / SINGLE).exists() or (folder / SINGLE).is_symlink():
        if shards and SINGLE not in shards:
            raise InvalidWeights(
                f"{name} has {SINGLE} beside the shards of {INDEX}, and they may be two models; remove {SINGLE} to use "
                f"the {len(shards)} shards, or {INDEX} to use the single file"
            )
        if not shards:
            return WeightFiles(folder, (SINGLE,))
    if shards:
        return WeightFiles(folder, tuple(shards))
    present = listing() if listing is not None else sorted(path.name for path in folder.iterdir())
    if pickles := [file for file in present if file.endswith(PICKLE_SUFFIXES) and "/" not in file]:
        trust.require_for_pickle(name, pickles)
        return WeightFiles(folder, tuple(pickles), pickled=True)
    others = [file for file in present if file.endswith(".safetensors")]
    hint = f"; it has {', '.join(others[:3])}: an adapter or another format?" if others else ""
    raise InvalidWeights(f"{name} has neither {SINGLE} nor {INDEX}{hint}; get a full checkpoint in safetensors")


def read_headers(files: WeightFiles, name: str) -> dict[str, tuple[Path, StoredTensor]]:
    """Every stored tensor with its file, from the headers alone; InvalidWeights for damage and contradictions."""
    mapping = _weight_map(files.folder, name)
    found: dict[str, tuple[Path, StoredTensor]] = {}
    for file in files.names:
        path = checked_file(files.folder, file, InvalidWeights)
        for tensor, stored in read_header(path).items():
            if tensor in found:
                raise InvalidWeights(f"{name} stores {tensor!r} twice, in {found[tensor][0].name} and {file}")
            found[tensor] = (path, stored)
    for tensor, file in mapping.items():
        if tensor not in found or found[tensor][0].name != file:
            raise InvalidWeights(f"{name}: {INDEX} expects {tensor!r} in {file}, it is not there; download it again")
    return found


def check_dtypes(found: Mapping[str, tuple[Path, StoredTensor]], name: str, integers: Container[str] = ()) -> None:
    """InvalidWeights for a tensor that is not made of floats; ``integers`` may hold whole numbers or truth values."""
    for tensor, (_, stored) in found.items():
        if stored.dtype not in FLOAT_DTYPES and tensor not in integers:
            raise InvalidWeights(
                f"{name} stores {tensor!r} as {stored.dtype}, weights must be one of {', '.join(FLOAT_DTYPES)}; "
                "is a quantization_config missing in its config?"
            )


def read_pickles(files: WeightFiles, name: str, trust: Trust, device: str = "cpu") -> dict[str, torch.Tensor]:
    """All pickled tensors by name, the gate being open; InvalidWeights for one that is stored twice.

    ``device`` "meta" gives shapes without payload.
    """
    main = [file for file in files.names if file.startswith(MAIN_PICKLE)] or list(files.names)
    tensors: dict[str, torch.Tensor] = {}
    for file in main:
        loaded = trust.unpickle(checked_file(files.folder, file, InvalidWeights), name, device)
        if twice := sorted(set(tensors) & set(loaded)):
            raise InvalidWeights(f"{name} stores {twice[0]!r} twice, the second time in {file}")
        tensors |= loaded
    return tensors


def check_tying(tensors: dict[str, tuple[Path, StoredTensor]], config: PretrainedConfig, name: str) -> None:
    """InvalidConfig if embedding and head are declared one tensor and the file holds two different ones."""
    from safetensors import safe_open

    if not config.get_text_config().tie_word_embeddings:
        return
    heads = [key for key in tensors if key.endswith("lm_head.weight")]
    embeddings = [key for key in tensors if key.endswith(("embed_tokens.weight", "wte.weight"))]
    if not heads or not embeddings:
        return
    (head_path, head), (embedding_path, embedding) = tensors[heads[0]], tensors[embeddings[0]]
    same = head.shape == embedding.shape and head.dtype == embedding.dtype
    if same:
        with safe_open(head_path, "pt") as left, safe_open(embedding_path, "pt") as right:
            one, two = left.get_slice(heads[0]), right.get_slice(embeddings[0])
            rows = range(0, head.shape[0], _COMPARE_ROWS)
            same = all(one[row : row + _COMPARE_ROWS].equal(two[row : row + _COMPARE_ROWS]) for row in rows)
    if not same:
        raise InvalidConfig(
            f"{name}: its config ties the embedding and the head (tie_word_embeddings), but {heads[0]!r} differs from "
            f"{embeddings[0]!r}; set tie_word_embeddings to false, or remove the head from the weights"
        )


def check_finite(model: PreTrainedModel, name: str) -> None:
    """InvalidWeights if a loaded weight has NaN or infinity. One pass, no copies."""
    import torch

    for key, tensor in model.named_parameters():
        if tensor.is_meta or not tensor.is_floating_point():
            continue
        low, high = torch.aminmax(tensor)
        if not (torch.isfinite(low) and torch.isfinite(high)):
            kind = "NaN" if torch.isnan(low) else "infinite values"
            hint = " (half precision overflows above 65504: try bf16)" if tensor.dtype == torch.float16 else ""
            raise InvalidWeights(
                f"{name}: {key!r} has {kind}{hint}; the checkpoint is damaged or its training diverged"
            )
