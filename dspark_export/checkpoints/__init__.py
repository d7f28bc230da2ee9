"""Finding, checking and opening the model to build from; the one trust gate."""

from dspark_export.checkpoints.checkpoint import Checkpoint
from dspark_export.checkpoints.resolve import resolve
from dspark_export.checkpoints.trust import Trust

__all__ = ["Checkpoint", "Trust", "resolve"]
