"""The same weights in every peer's format, made once and reused.

Everything comes from one checkpoint: a GGUF file, a folder or a hub id. Its weights, dequantized, and its tokenizer are
written by this project's own checkpoint code, so that all peers have the same ones.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from benchmarks.peers.protocol import Missing, missing_package
from benchmarks.peers.requantized import requantize

_GENAI_OPTIONS = {"fp32": (), "int4": ("--extra_options", "int4_accuracy_level=4")}


@dataclass(frozen=True)
class SharedModel:
    """``source`` in the formats of all peers, below the folder ``out``; ``draft``: a drafter for this project's own."""

    source: str
    out: Path
    draft: str | None = None

    @property
    def is_gguf(self) -> bool:
        """Whether the checkpoint is a GGUF file."""
        return self.source.endswith(".gguf")

    def bundle(self, precision: str) -> Path:
        """This project's bundle, in its default setting for ``precision``."""

        def build(folder: Path) -> None:
            command = [sys.executable, "-m", "dspark_export.cli.main", "build", self.source, "--out", str(folder)]
            drafted = () if self.draft is None else ("--draft", self.draft, "--phrases", "0")  # auto then has no store
            _run([*command, "--precision", precision, *drafted])

        return self._once(f"bundle-{precision}{'' if self.draft is None else '-drafted'}", build)

    def weights(self) -> Path:
        """A transformers folder: float32 safetensors, config, tokenizer."""
        return self._once("weights-fp32", self._write_weights)

    def genai(self, precision: str) -> Path:
        """A model folder of onnxruntime-genai, made by its own builder."""
        if find_spec("onnxruntime_genai") is None:
            raise missing_package("onnxruntime-genai")

        def build(folder: Path) -> None:
            command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(self.weights())]
            command += ["-o", str(folder), "-p", precision, "-e", "cpu", "-c", str(self.out / "cache")]
            _run([*command, *_GENAI_OPTIONS[precision]])

        return self._once(f"genai-{precision}", build)

    def gguf(self, kind: str) -> Path:
        """The GGUF file with matrices of ``kind``; Missing unless the checkpoint is one."""
        if not self.is_gguf:
            raise Missing("this is not a GGUF file; convert it with llama.cpp's convert_hf_to_gguf.py and pass that")

        def convert(folder: Path) -> None:
            folder.mkdir()
            requantize(Path(self.source), folder / "model.gguf", kind)

        return self._once(f"gguf-{kind}", convert) / "model.gguf"

    def _write_weights(self, folder: Path) -> None:
        import torch
        from safetensors.torch import save_file

        from dspark_export.checkpoints import resolve

        checkpoint = resolve(self.source)
        model = checkpoint.load_model(torch.float32)
        folder.mkdir()
        config = type(model.config).from_dict(
            {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
        )
        config.architectures = [type(model).__name__]
        config.save_pretrained(folder)
        # A tied head is the embedding under a second name: it is written once.
        unique = {tensor.data_ptr(): name for name, tensor in reversed(model.state_dict().items())}
        tensors = {name: t.contiguous() for name, t in model.state_dict().items() if unique[t.data_ptr()] == name}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        checkpoint.save_tokenizer(folder)

    def _once(self, name: str, make: Callable[[Path], None]) -> Path:
        """``out/name``, made under another name first, so that an interrupted run leaves nothing half done."""
        folder, partial = self.out / name, self.out / f".{name}.partial"
        if folder.exists():
            return folder
        self.out.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        print(f"making {folder}", file=sys.stderr)
        try:
            make(partial)
            os.replace(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return folder


def _run(command: Sequence[str]) -> None:
    """Run a program quietly; Missing with the end of its output if it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise Missing(f"`{' '.join(command)}` failed:\n{done.stdout[-2000:]}")
