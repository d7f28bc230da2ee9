"""GGUF checkpoints: what the file says about itself, and its model through transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspark_export.checkpoints.library_calls import first_line, quiet
from dspark_runtime.errors import InvalidConfig, InvalidWeights, UnsupportedArchitecture

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MAGIC = b"GGUF"
_EMBEDDING = "token_embd.weight"


@dataclass(frozen=True)
class GgufFile:
    """Metadata of a GGUF file by key, and the shapes of its tensors (outermost dimension first)."""

    path: Path
    fields: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def read(cls, path: Path) -> GgufFile:
        """Read all metadata and check it; InvalidWeights for a damaged file, UnsupportedArchitecture for its kind."""
        from gguf import GGUFReader

        if not path.is_file():
            raise InvalidWeights(f"{path} is not a regular file; pass a .gguf file")
        with path.open("rb") as file:
            if file.read(4) != MAGIC:
                raise InvalidWeights(f"{path} is no GGUF file (it does not start with {MAGIC!r}); download it again")
        try:
            reader = GGUFReader(path)
            fields = {key: entry.contents() for key, entry in reader.fields.items()}
            shapes = {tensor.name: tuple(int(dim) for dim in reversed(tensor.shape)) for tensor in reader.tensors}
        except Exception as cause:  # the reader indexes into a memory map: any exception means damage
            raise InvalidWeights(f"{path} is damaged or cut short: {first_line(cause)}; download it again") from cause
        found = cls(path, fields, shapes)
        found._check()
        return found

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture."""
        return str(self.fields.get("general.architecture", ""))

    def _check(self) -> None:
        from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

        if not self.architecture:
            raise InvalidConfig(f"{self.path} does not say its general.architecture; download it again")
        if self.architecture not in GGUF_SUPPORTED_ARCHITECTURES:
            raise UnsupportedArchitecture(
                f"transformers cannot read GGUF files of architecture {self.architecture!r}; use its safetensors "
                f"checkpoint (readable are: {', '.join(sorted(GGUF_SUPPORTED_ARCHITECTURES))})"
            )
        if "split.count" in self.fields and int(self.fields["split.count"]) > 1:
            raise UnsupportedArchitecture(f"{self.path} is one part of a split GGUF; merge it with gguf-split first")
        for key in ("block_count", "embedding_length", "attention.head_count", "context_length"):
            value = self.fields.get(f"{self.architecture}.{key}")
            numbers = value if isinstance(value, list) else [value]
            if not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in numbers):
                raise InvalidConfig(
                    f"{self.path}: {self.architecture}.{key} must be a positive number, it is {value!r}"
                )
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

    def load_config(self) -> PretrainedConfig:
        """The transformers config that the metadata describes; ids of special tokens included."""
        from transformers import AutoConfig

        try:
            with quiet():
                config = AutoConfig.from_pretrained(self.path.parent, gguf_file=self.path.name, local_files_only=True)
        except Exception as cause:  # transformers raises anything here
            raise InvalidConfig(f"transformers refuses the metadata of {self.path}: {first_line(cause)}") from cause
        if config.vocab_size != self.shapes[_EMBEDDING][0]:
            config.vocab_size = self.shapes[_EMBEDDING][0]
        return config
