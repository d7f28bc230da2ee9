"""The one gate for checkpoints that bring code: pickled weights and Python modules beside the config.

No other module decides about either, names the options of transformers that allow them, or unpickles anything; a test
searches the code base to make sure.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspark_runtime.errors import InvalidWeights, UntrustedCheckpoint

if TYPE_CHECKING:
    import torch

FLAG = "--allow-unsafe-checkpoint"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True)
class Trust:
    """Whether code that comes with a checkpoint may run. Closed unless the user opened it for this one build."""

    allow_unsafe: bool = False

    @classmethod
    def closed(cls) -> Trust:
        """Only data is read: safetensors or GGUF weights, architectures that transformers itself implements."""
        return cls(False)

    @classmethod
    def opened(cls) -> Trust:
        """The user vouches for the checkpoint: its pickles are loaded and its modules are imported."""
        return cls(True)

    def require_for_pickle(self, model: str, files: list[str]) -> None:
        """UntrustedCheckpoint unless the gate is open; ``files`` are the pickled weights that would be loaded."""
        if not self.allow_unsafe:
            raise UntrustedCheckpoint(
                f"{model} has its weights only as pickle files ({', '.join(files[:3])}), and a pickle can run any "
                f"code; convert them to safetensors, pick a revision with such, or pass {FLAG} if you trust the source"
            )

    def require_for_code(self, model: str, model_type: str, modules: list[str]) -> None:
        """UntrustedCheckpoint unless the gate is open; ``modules`` are the classes its config wants to import."""
        if not self.allow_unsafe:
            raise UntrustedCheckpoint(
                f"{model} is of type {model_type!r}, which transformers does not implement; it brings Python code "
                f"({', '.join(modules[:3])}), which does not run by default; use a checkpoint that needs none, or read "
                f"the code and pass {FLAG}"
            )

    def code_options(self) -> dict[str, Any]:
        """Keyword arguments for transformers' ``from_pretrained`` of configs and tokenizers."""
        return {"trust_remote_code": self.allow_unsafe}

    def unpickle(self, path: Path, model: str, device: str = "cpu") -> dict[str, torch.Tensor]:
        """The tensors of a pickled state dict by name, read by torch's restricted unpickler, the gate being open."""
        import torch

        self.require_for_pickle(model, [path.name])
        try:
            loaded = torch.load(path, map_location=device, weights_only=True)
        except (MemoryError, KeyboardInterrupt):
            raise
        except Exception as cause:  # torch and pickle raise anything here
            reason = " ".join(str(cause).split())[:200]
            raise InvalidWeights(
                f"{path.name} of {model} cannot be read: {reason}; get the checkpoint again"
            ) from cause
        if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
            raise InvalidWeights(f"{path.name} of {model} holds no tensors by name; get the checkpoint again")
        return {str(name): tensor for name, tensor in loaded.items()}
