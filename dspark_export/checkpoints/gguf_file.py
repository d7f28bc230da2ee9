"""GGUF checkpoints: what the file says about itself, and the transformers model it describes.

transformers' own reader skips settings and tensors it does not know; here each is used, harmless or refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspark_export.checkpoints.gguf_families import FAMILIES, Facts, Family
from dspark_export.checkpoints.gguf_keys import Keys
from dspark_export.checkpoints.gguf_rope import ROPE_FREQS, ROPE_LONG, ROPE_SHORT, RopeFactors, rope_parameters
from dspark_export.checkpoints.gguf_weights import Plan, grids, load_weights, plan_weights
from dspark_export.checkpoints.library_calls import first_line, quiet
from dspark_runtime.errors import InvalidConfig, InvalidWeights, UnsupportedArchitecture

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader
    from transformers import PretrainedConfig

    from dspark_export.grids import Grid

MAGIC = b"GGUF"
_EMBEDDING = "token_embd.weight"


@dataclass(frozen=True)
class GgufFile:
    """Metadata of a GGUF file by key, and of its tensors the shapes (outermost dimension first) and types."""

    path: Path
    fields: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    kinds: Mapping[str, str]

    @classmethod
    def read(cls, path: Path) -> GgufFile:
        """Read all metadata and check it; InvalidWeights for a damaged file, UnsupportedArchitecture for its kind."""
        from gguf import GGUFReader

        if not path.is_file():
            raise InvalidWeights(f"{path} is not a regular file; pass a .gguf file")
        with path.open("rb") as file:
            if file.read(4) != MAGIC:
                raise InvalidWeights(f"{path} is not a GGUF file (it does not start with {MAGIC!r}); download it again")
        try:
            reader = GGUFReader(path)
            fields = {key: entry.contents() for key, entry in reader.fields.items()}
            shapes = {tensor.name: tuple(int(dim) for dim in reversed(tensor.shape)) for tensor in reader.tensors}
            kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
        except Exception as cause:  # the reader indexes into a memory map: any exception means damage
            raise InvalidWeights(f"{path} is damaged or cut short: {first_line(cause)}; download it again") from cause
        found = cls(path, fields, shapes, kinds)
        found._check()
        return found

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture."""
        return str(self.fields.get("general.architecture", ""))

    def _check(self) -> None:
        if not self.architecture:
            raise InvalidConfig(f"{self.path} does not say its general.architecture; download it again")
        if self.fields.get("general.type", "model") != "model":
            raise UnsupportedArchitecture(
                f"{self.path} holds a GGUF {self.fields['general.type']!r}, not a model; pass the model's file"
            )
        if self.architecture not in FAMILIES:
            raise UnsupportedArchitecture(
                f"GGUF files of architecture {self.architecture!r} cannot be read; use the model's safetensors "
                f"checkpoint (readable are: {', '.join(sorted(FAMILIES))})"
            )
        if "split.count" in self.fields and int(self.fields["split.count"]) > 1:
            raise UnsupportedArchitecture(f"{self.path} is one part of a split GGUF; merge it with gguf-split first")
        if unknown := sorted(kind for kind in self.kinds.values() if kind not in readable_kinds()):
            raise UnsupportedArchitecture(
                f"{self.path} stores tensors as {unknown[0]}, which cannot be read; use another quantization"
            )
        keys = Keys(self.path, self.architecture, self.fields)
        for key in ("block_count", "embedding_length", "context_length"):
            keys.count(key)
        keys.count_of_all_layers("attention.head_count")
        self._check_tensors()

    def _check_tensors(self) -> None:
        blocks = {
            int(name.split(".")[1]) for name in self.shapes if name.startswith("blk.") and name.split(".")[1].isdigit()
        }
        wanted = int(self.fields[f"{self.architecture}.block_count"])
        if blocks != set(range(wanted)):
            raise InvalidWeights(f"{self.path} has {len(blocks)} of the {wanted} layers it declares; download it again")
        if _EMBEDDING not in self.shapes:
            raise InvalidWeights(f"{self.path} has no {_EMBEDDING}; download it again")
        width = int(self.fields[f"{self.architecture}.embedding_length"])
        if self.shapes[_EMBEDDING][-1] != width:
            raise InvalidWeights(
                f"{self.path}: {_EMBEDDING} has shape {list(self.shapes[_EMBEDDING])}, its metadata says width {width}"
            )

    @property
    def family(self) -> Family:
        """How its architecture is read."""
        return FAMILIES[self.architecture]

    def load_config(self) -> tuple[PretrainedConfig, dict[str, str]]:
        """The transformers config of the model, ids of special tokens included, and settings left unread, with why.

        Raises InvalidConfig for settings that contradict each other, UnsupportedArchitecture for those that would
        change the model's numbers and cannot be honoured.
        """
        from transformers import CONFIG_MAPPING

        keys = Keys(self.path, self.architecture, self.fields)
        facts, values = self._common(keys)
        values |= self.family.reads(keys, facts)
        if "rope_parameters" in values and values["rope_parameters"] is None:
            values["rope_parameters"] = dict(facts.rope)
        unread = keys.close() | self._unread_elsewhere()
        try:
            with quiet():
                config = CONFIG_MAPPING[values.pop("model_type", self.family.model_type)](**values)
        except Exception as cause:  # transformers raises anything here
            raise InvalidConfig(f"transformers refuses the metadata of {self.path}: {first_line(cause)}") from cause
        return config, unread

    def _common(self, keys: Keys) -> tuple[Facts, dict[str, Any]]:
        layers, width = keys.count("block_count"), keys.count("embedding_length")
        heads = keys.count_of_all_layers("attention.head_count")
        kv_heads = keys.count_of_all_layers("attention.head_count_kv", heads)
        head, context = keys.count("attention.key_length", width // heads), keys.count("context_length")
        if keys.count("attention.value_length", head) != head:
            keys.refuse("attention.value_length", f"keys have {head} dimensions, and both must be alike")
        rotary = keys.count("rope.dimension_count", head)
        if rotary > head or rotary % 2 or (rotary < head and not self.family.partial_rotary):
            keys.refuse("rope.dimension_count", f"{head} dimensions of a head are rotated in this architecture")
        rows = self.shapes[_EMBEDDING][0]
        if keys.count("vocab_size", rows) > rows:
            raise InvalidWeights(
                f"{self.path}: {_EMBEDDING} has {rows} rows, its metadata says more; download it again"
            )
        rope = rope_parameters(keys, rotary, head, context, self._rope_factors())
        facts = Facts(layers, width, heads, kv_heads, head, rope, self.shapes)
        values = {
            "vocab_size": rows,
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head,
            "max_position_embeddings": context,
            "tie_word_embeddings": "output.weight" not in self.shapes,
            **{f"{role}_token_id": self._special(role) for role in ("bos", "eos")},
            "pad_token_id": self._special("padding"),
        }
        if "feed_forward_length" in keys:
            values["intermediate_size"] = keys.count_of_all_layers("feed_forward_length")
        return facts, values

    def _special(self, role: str) -> int | None:
        value = self.fields.get(f"tokenizer.ggml.{role}_token_id")
        return value if isinstance(value, int) and 0 <= value < self.shapes[_EMBEDDING][0] else None

    def _rope_factors(self) -> RopeFactors:
        wanted = [name for name in (ROPE_FREQS, ROPE_LONG, ROPE_SHORT) if name in self.shapes]
        if not wanted:
            return RopeFactors()
        stored = {tensor.name: tensor for tensor in self._reader().tensors}
        values = {name: stored[name].data.astype(float).reshape(-1).tolist() for name in wanted}
        return RopeFactors(values.get(ROPE_FREQS), values.get(ROPE_LONG), values.get(ROPE_SHORT))

    def _unread_elsewhere(self) -> dict[str, str]:
        """Keys of no part of a model: llama.cpp reads nothing else into its numbers."""
        known = ("general.", "tokenizer.", "split.", "GGUF.", f"{self.architecture}.")
        return {key: "describes the file, not the model" for key in self.fields if not key.startswith(known)}

    def _reader(self) -> GGUFReader:
        from gguf import GGUFReader

        return GGUFReader(self.path)

    def plan(self, config: PretrainedConfig) -> Plan:
        """Where every weight comes from; InvalidWeights for what is missing, left over or of another shape."""
        return plan_weights(self.family, self.architecture, config, self.shapes, str(self.path))

    def state_dict(self, config: PretrainedConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The weights under transformers' names, dequantized, in ``dtype``."""
        return dict(load_weights(self.plan(config), self._reader(), self.family, config, dtype))

    def grids(self, config: PretrainedConfig) -> dict[str, Callable[[], Grid]]:
        """What reads the integers of the weights that are stored as such, under transformers' names."""
        return grids(self.plan(config), self._reader(), self.family, config)


def readable_kinds() -> frozenset[str]:
    """Names of the types of tensors that can be dequantized."""
    from gguf.quants import _type_traits

    return frozenset({"F32", "F16", *(kind.name for kind in _type_traits)})
