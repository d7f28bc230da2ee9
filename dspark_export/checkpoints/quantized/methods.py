"""What ``quantization_config`` may say: which methods and variants are read, and why others are not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dspark_export.checkpoints.config import read_json
from dspark_export.checkpoints.files import checked_file
from dspark_runtime.errors import InvalidConfig, UnsupportedArchitecture

Settings = Mapping[str, Any]
_OWN_FILES = {"hf_quant_config.json": "modelopt", "quantize_config.json": "gptq", "quant_config.json": "awq"}
_FORMATS = (
    *("int-quantized", "float-quantized", "naive-quantized", "pack-quantized"),
    *("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mixed-precision", "dense"),
)


def read_settings(folder: Path, declared: Any) -> Settings | None:
    """How the weights in ``folder`` are quantized: ``declared`` in the config, or in a file of the tool that did it."""
    if declared:
        return dict(declared if isinstance(declared, Mapping) else declared.to_dict())
    for file, method in _OWN_FILES.items():
        if not (folder / file).exists():
            continue
        found = read_json(checked_file(folder, file, InvalidConfig), InvalidConfig)
        if method != "modelopt":
            return {"quant_method": method, **found}
        own = found.get("quantization")
        return {"quant_method": method, **own} if isinstance(own, dict) and own.get("quant_algo") else None
    return None


def check_method(settings: Settings, name: str) -> str:
    """The method, if its weights can be read; UnsupportedArchitecture with the reason otherwise."""
    method = str(settings.get("quant_method", "")).replace("_", "-").lower()
    if method not in _VARIANTS:
        raise UnsupportedArchitecture(
            f"{name} is quantized by {method or 'an unnamed method'}, which is not read; read are "
            f"{', '.join(sorted(_VARIANTS))}: take one of those, or the full-precision checkpoint with --precision"
        )
    for problem in _VARIANTS[method](settings):
        raise UnsupportedArchitecture(
            f"{name} is quantized by {method} with {problem}, which is not read; take another variant, or the "
            "full-precision checkpoint with --precision"
        )
    return method


def _awq(settings: Settings) -> Iterator[str]:
    bits, version = settings.get("bits", settings.get("w_bit", 4)), str(settings.get("version", "gemm")).lower()
    if bits != 4:
        yield f"{bits} bits"
    if version != "gemm":
        yield f"the layout of version {version}"
    if settings.get("backend", "autoawq") == "llm-awq":
        yield "the layout of backend llm-awq"


def _gptq(settings: Settings) -> Iterator[str]:
    layout = settings.get("checkpoint_format") or "gptq"
    if layout not in ("gptq", "gptq_v2") or settings.get("is_marlin_format"):
        yield f"the layout {layout if layout != 'gptq' else 'marlin'}"
    if settings.get("bits") not in (2, 3, 4, 8):
        yield f"{settings.get('bits')} bits"


def _fp8(settings: Settings) -> Iterator[str]:
    block = settings.get("weight_block_size")
    if block is not None and not (
        isinstance(block, list) and len(block) == 2 and all(isinstance(n, int) for n in block)
    ):
        yield f"weight_block_size {block!r}"


def _compressed(settings: Settings) -> Iterator[str]:
    layout = settings.get("format", "dense")
    if layout not in _FORMATS:
        yield f"the format {layout}"
    sparse = settings.get("sparsity_config") or {}
    if sparse.get("format", "dense") != "dense":
        yield f"the sparse format {sparse['format']}"
    if settings.get("transform_config"):
        yield "a transform_config (rotations of activations)"
    for group in groups_of(settings):
        if group.get("format", layout) not in _FORMATS:
            yield f"the format {group['format']}"
        if (group.get("weights") or {}).get("num_bits") not in (None, 2, 4, 8):
            yield f"weights of {group['weights']['num_bits']} bits"


def _modelopt(settings: Settings) -> Iterator[str]:
    algorithm = settings.get("quant_algo")
    if algorithm not in ("FP8", "NVFP4"):
        yield f"quant_algo {algorithm}"


def groups_of(settings: Settings) -> list[dict[str, Any]]:
    """The groups of layers of a compressed-tensors config."""
    groups = settings.get("config_groups") or {}
    return [group for group in groups.values() if isinstance(group, dict)]


def _any(settings: Settings) -> Iterator[str]:
    yield from ()


_VARIANTS: dict[str, Callable[[Settings], Iterator[str]]] = {
    "awq": _awq,
    "compressed-tensors": _compressed,
    "fbgemm-fp8": _any,
    "fp8": _fp8,
    "gptq": _gptq,
    "modelopt": _modelopt,
    "mxfp4": _any,
}
