"""One target for all pairs, and a way to damage drafts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dspark_export.checkpoints import Checkpoint, resolve
from tests.drafts.writers import target_tables, write_target


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Edit the tensors of a folder and store them properly."""
    file = folder / "model.safetensors"
    loaded = {name: tensor.clone() for name, tensor in load_file(file).items()}
    edit(loaded)
    save_file(loaded, file)


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
