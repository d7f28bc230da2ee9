"""One target for all pairs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from dspark_export.checkpoints import Checkpoint, resolve
from tests.export.drafts.writers import target_tables, write_target


@dataclass(frozen=True)
class Target:
    """A target of 8 layers, opened, with its embedding and head."""

    folder: Path
    checkpoint: Checkpoint
    tables: tuple[torch.Tensor, torch.Tensor]


@pytest.fixture(scope="session")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    """See :class:`Target`."""
    folder = write_target(tmp_path_factory.mktemp("drafts") / "target")
    return Target(folder, resolve(str(folder)), target_tables(folder))
