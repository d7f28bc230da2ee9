"""One export per architecture, shared by all tests of a run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from dspark_export.bundle.weights import save_graphs
from dspark_export.graphs.self_draft import export_self_draft
from dspark_export.graphs.target import export_target
from tests.traced import traced

DRAFT_LAYERS = (1, 2)
TAPS = (-1, 0, 2)


@dataclass(frozen=True)
class Exported:
    """A model, untouched, and its graphs on disk."""

    model: PreTrainedModel
    target: Path
    self_draft: Path


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    @functools.cache
    def export(arch: str) -> Exported:
        model, trace = traced(arch)
        graphs = {"target": export_target(trace, taps=TAPS), "self_draft": export_self_draft(trace, DRAFT_LAYERS)}
        paths = save_graphs(graphs, tmp_path_factory.mktemp(arch))
        return Exported(model, paths["target"], paths["self_draft"])

    return export
