"""``dspark-export check``: findings, exit codes and JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Invoke
from tests.drafts.writers import (
    Sizes,
    target_tables,
    write_classic_eagle3,
    write_deepspec,
    write_target,
    write_zlab,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target."""
    return write_target(tmp_path_factory.mktemp("check") / "model")


def test_a_pair_that_fits(model: Path, tmp_path: Path, invoke: Invoke) -> None:
    draft = write_deepspec(tmp_path / "draft", tables=target_tables(model)).folder
    result = invoke("check", model, draft)
    assert result.exit_code == 0, result.output
    assert "draft (DeepSpec DSpark (qwen3)) for model" in result.stdout
    assert "fits, 1 warnings" in result.stdout and "without tokenizer files" in result.stdout


def test_a_pair_that_does_not(model: Path, tmp_path: Path, invoke: Invoke) -> None:
    draft = write_zlab(tmp_path / "draft", sizes=Sizes(theta=5e5), num_target_layers=36).folder
    result = invoke("check", model, draft)
    assert result.exit_code == 9
    assert "does not fit: 2 errors" in result.stdout
    assert "ERROR   rope" in result.stdout and "ERROR   depth" in result.stdout


def test_json_has_every_finding(model: Path, tmp_path: Path, invoke: Invoke) -> None:
    draft = write_zlab(tmp_path / "draft").folder
    fits = invoke("check", model, draft, "--json")
    assert fits.exit_code == 0
    content = json.loads(fits.stdout)
    assert content["ok"] and content["format"] == "z-lab DFlash" and content["target"] == "model"
    asked = invoke("check", model, draft, "--json", "--drafts", "15")
    assert asked.exit_code == 9
    content = json.loads(asked.stdout)
    (error,) = (finding for finding in content["findings"] if finding["severity"] == "error")
    assert not content["ok"] and (error["id"], error["error"]) == ("block_size", "BlockSizeMismatch")
    assert error["fix"] and "15" in error["asked"]


def test_own_embeddings_have_to_be_allowed(model: Path, tmp_path: Path, invoke: Invoke) -> None:
    draft = write_deepspec(tmp_path / "draft").folder
    refused = invoke("check", model, draft)
    assert refused.exit_code == 9 and "--allow-own-embeddings" in refused.stdout
    assert invoke("check", model, draft, "--allow-own-embeddings").exit_code == 0


def test_damaged_and_unsafe_drafts_end_with_their_own_codes(model: Path, tmp_path: Path, invoke: Invoke) -> None:
    damaged = write_zlab(tmp_path / "damaged", hidden_size=...).folder
    result = invoke("check", model, damaged)
    assert result.exit_code == 3 and "hidden_size is missing" in result.stderr and result.stdout == ""
    pickled = write_classic_eagle3(tmp_path / "pickled", pickled=True).folder
    assert invoke("check", model, pickled).exit_code == 4
    assert invoke("check", model, pickled, "--allow-unsafe-checkpoint").exit_code == 0
    assert invoke("check", model, tmp_path / "nothing").exit_code == 3
    assert invoke("check", model, damaged, "--drafts", "0").exit_code == 2
