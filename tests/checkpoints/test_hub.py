"""Hub models: found, resolved to a commit, cached, and every way of not getting one as ModelNotFound."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from dspark_export.checkpoints import Trust, resolve
from dspark_runtime.errors import InvalidWeights, ModelNotFound, UntrustedCheckpoint
from tests.checkpoints.checkpoint_samples import edit_config, refusal, write_checkpoint
from tests.checkpoints.hub_server import COMMIT, Hub, serve
from tests.checkpoints.test_trust import pickled
from tests.checkpoints.test_weights import shards


def point_to(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT does, which huggingface_hub reads only when it is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve(Hub({"owner/model": write_checkpoint(tmp_path / "remote")})) as running:
        point_to(running.url, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield running


def test_a_model_is_fetched_and_pinned(hub: Hub) -> None:
    checkpoint = resolve("owner/model")
    assert (checkpoint.kind, checkpoint.id, checkpoint.revision) == ("hub", "owner/model", COMMIT)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(checkpoint.source().files)
    assert checkpoint.eos_token_ids == [257, 258]


@pytest.mark.parametrize("revision", ["main", COMMIT])
def test_a_revision_is_resolved_to_its_commit(hub: Hub, revision: str) -> None:
    assert resolve("owner/model", revision).revision == COMMIT


def test_the_cache_serves_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve("owner/model")
    count = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve("owner/model").revision == COMMIT
    assert len(hub.requests) == count


def test_the_cache_serves_an_unreachable_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve("owner/model")
    point_to("http://127.0.0.1:9", monkeypatch)
    assert resolve("owner/model").revision == COMMIT


def test_the_token_comes_from_the_environment(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    resolve("owner/model")
    assert "Bearer hf_secret" in hub.tokens


def test_a_renamed_model_is_followed(hub: Hub) -> None:
    hub.renamed["old/name"] = "owner/model"
    assert resolve("old/name").revision == COMMIT


def test_shards_are_fetched_by_the_index(hub: Hub) -> None:
    folder = hub.repos["owner/model"]
    shards(folder)
    (folder / "consolidated.safetensors").write_bytes(b"another copy of the weights")
    assert resolve("owner/model").weights is not None
    assert not any("consolidated" in request for request in hub.requests)


def refuse(hub: Hub, status: int, code: str) -> None:
    hub.refusals["owner/model"] = (status, code)


CASES = {
    "typo": (lambda hub: None, "owner/modle", {}, "spelling"),
    "missing without login": (lambda hub: refuse(hub, 401, "RepoNotFound"), "owner/model", {}, "HF_TOKEN"),
    "gated 401": (lambda hub: refuse(hub, 401, "GatedRepo"), "owner/model", {}, "gated"),
    "gated 403": (lambda hub: refuse(hub, 403, "GatedRepo"), "owner/model", {}, "gated"),
    "forbidden": (lambda hub: refuse(hub, 403, ""), "owner/model", {}, "HF_TOKEN"),
    "disabled": (lambda hub: refuse(hub, 403, "DisabledRepo"), "owner/model", {}, "owner/model"),
    "server error": (lambda hub: refuse(hub, 500, ""), "owner/model", {}, "owner/model"),
    "renamed to nothing": (
        lambda hub: hub.renamed.update({"owner/model": "owner/gone"}),
        "owner/model",
        {},
        "spelling",
    ),
    "no such revision": (lambda hub: None, "owner/model", {"revision": "v9"}, "'v9'"),
    "no such commit": (lambda hub: None, "owner/model", {"revision": "f" * 40}, "f" * 40),
    "bad id": (lambda hub: None, "-owner/model", {}, "hub id"),
    "no config": (lambda hub: (hub.repos["owner/model"] / "config.json").unlink(), "owner/model", {}, "config.json"),
}


@pytest.mark.parametrize("case", CASES)
def test_not_found(hub: Hub, tmp_path: Path, case: str) -> None:
    prepare, model, options, says = CASES[case]
    prepare(hub)
    caught = refusal(model, tmp_path / "out" / "bundle", **options)
    assert type(caught) is ModelNotFound, repr(caught)
    assert says in str(caught)


def test_offline_with_a_cold_cache(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    caught = refusal("owner/model", tmp_path / "out" / "bundle")
    assert type(caught) is ModelNotFound and "HF_HUB_OFFLINE" in str(caught)
    assert not hub.requests


def test_unreachable_with_a_cold_cache(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point_to("http://127.0.0.1:9", monkeypatch)
    caught = refusal("owner/model", tmp_path / "out" / "bundle")
    assert type(caught) is ModelNotFound and "cannot be reached" in str(caught)


def test_weights_are_not_fetched_for_a_refused_config(hub: Hub, tmp_path: Path) -> None:
    edit_config(hub.repos["owner/model"], model_type="bert")
    refusal("owner/model", tmp_path / "out" / "bundle")
    assert not any("safetensors" in request for request in hub.requests)


def test_pickles_are_not_fetched_with_a_closed_gate(hub: Hub, tmp_path: Path) -> None:
    hub.repos["owner/model"] = pickled(tmp_path / "pickled")
    caught = refusal("owner/model", tmp_path / "out" / "bundle")
    assert type(caught) is UntrustedCheckpoint and "pytorch_model.bin" in str(caught)
    assert not any("pytorch_model" in request for request in hub.requests)
    weights = resolve("owner/model", trust=Trust.opened()).weights
    assert weights is not None and weights.pickled


def test_a_missing_shard_on_the_hub(hub: Hub, tmp_path: Path) -> None:
    shards(hub.repos["owner/model"])
    (hub.repos["owner/model"] / "model-00002-of-00002.safetensors").unlink()
    caught = refusal("owner/model", tmp_path / "out" / "bundle")
    assert type(caught) is InvalidWeights and "model-00002" in str(caught)
