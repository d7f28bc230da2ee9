"""Drafts from the hub, and builds that refuse a draft before they write anything."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dspark_export.checkpoints import Trust
from dspark_export.drafts.formats import DraftCheckpoint, recognise
from dspark_runtime.errors import (
    DsparkError,
    EmbeddingsMismatch,
    InvalidConfig,
    InvalidVocabMap,
    InvalidWeights,
    ModelNotFound,
    TapsMismatch,
    UntrustedCheckpoint,
)
from tests.checkpoints.checkpoint_samples import edit_config, refusal
from tests.checkpoints.hub_server import COMMIT, Hub
from tests.checkpoints.test_hub import hub  # noqa: F401  (a fixture)
from tests.checkpoints.test_weights import shards
from tests.drafts.conftest import Target, change
from tests.drafts.writers import Sizes, Written, write_classic_eagle3, write_deepspec, write_zlab


def opened(name: str, **options: Any) -> DraftCheckpoint:
    draft = recognise(name, **options)
    assert isinstance(draft, DraftCheckpoint)
    return draft


@pytest.mark.parametrize("sharded", [False, True])
def test_a_draft_is_fetched_and_pinned(hub: Hub, tmp_path: Path, sharded: bool) -> None:  # noqa: F811
    written = write_deepspec(tmp_path / "remote-draft")
    if sharded:
        shards(written.folder)
    hub.repos["owner/draft"] = written.folder
    draft = opened("owner/draft")
    assert (draft.id, draft.revision) == ("owner/draft", COMMIT)
    assert torch.equal(draft.tensors["fc.weight"], written.tensors["fc.weight"])
    assert opened("owner/draft", revision="main").revision == COMMIT


def test_weights_are_not_fetched_for_a_kind_of_draft_nobody_knows(hub: Hub, tmp_path: Path) -> None:  # noqa: F811
    folder = write_deepspec(tmp_path / "remote-draft", architectures=["MedusaModel"]).folder
    hub.repos["owner/draft"] = folder
    with pytest.raises(DsparkError, match="MedusaModel"):
        recognise("owner/draft")
    assert not [path for path in hub.requests if path.endswith(".safetensors")]


def test_pickles_on_the_hub(hub: Hub, tmp_path: Path) -> None:  # noqa: F811
    hub.repos["owner/draft"] = write_classic_eagle3(tmp_path / "remote-draft", pickled=True).folder
    with pytest.raises(UntrustedCheckpoint, match=r"pytorch_model\.bin"):
        recognise("owner/draft")
    assert not [path for path in hub.requests if path.endswith(".bin")]
    assert opened("owner/draft", trust=Trust.opened()).format == "EAGLE-3"


def test_a_draft_that_is_not_there(hub: Hub) -> None:  # noqa: F811
    with pytest.raises(ModelNotFound, match="no model 'owner/none'"):
        recognise("owner/none")


def without(folder: Path, name: str) -> Path:
    change(folder, lambda loaded: loaded.pop(name))
    return folder


REFUSED: dict[str, tuple[Callable[[Path], Written | Path], type[DsparkError]]] = {
    "field": (lambda folder: write_deepspec(folder, hidden_size=...), InvalidConfig),
    "tensor": (lambda folder: without(write_deepspec(folder).folder, "fc.weight"), InvalidWeights),
    "map": (lambda folder: without(write_classic_eagle3(folder).folder, "d2t"), InvalidVocabMap),
    "pickle": (lambda folder: write_classic_eagle3(folder, pickled=True), UntrustedCheckpoint),
    "taps": (lambda folder: write_zlab(folder, sizes=Sizes(taps=(1, 2, 7))), TapsMismatch),
    "embeddings": (write_deepspec, EmbeddingsMismatch),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_build_refuses_it_and_leaves_nothing(tmp_path: Path, target: Target, case: str) -> None:
    write, kind = REFUSED[case]
    write(tmp_path / "draft")
    error = refusal(str(target.folder), tmp_path / "out" / "bundle", drafts=(str(tmp_path / "draft"),))
    assert type(error) is kind and "draft" in str(error)


def test_the_second_of_two_drafts_is_checked_too(tmp_path: Path, target: Target) -> None:
    good = write_zlab(tmp_path / "good").folder
    bad = write_zlab(tmp_path / "bad").folder
    edit_config(bad, num_target_layers=36)
    error = refusal(str(target.folder), tmp_path / "out" / "bundle", drafts=(str(good), str(bad)))
    assert type(error) is TapsMismatch and "bad cannot draft for target" in str(error)
