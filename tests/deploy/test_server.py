"""The HTTP server written for a container, and what KServe is told of it."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from dspark_runtime import Bundle
from tests.deploy.test_command import deploy
from tests.distributions import ROOT, built_wheel

CRDS = Path(__file__).with_name("crds")
KSERVE = ["--target", "kserve", "--image", "registry.example/models/tiny:1"]


def closed(schema: Any) -> Any:
    """The schema with every object that lists its fields closed: Kubernetes drops unknown fields without a word."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found = {name: closed(part) for name, part in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        found.setdefault("additionalProperties", False)
    return found


def validator(kind: str) -> jsonschema.Draft202012Validator:
    schema = closed(json.loads((CRDS / f"{kind}.json").read_text()))
    schema["properties"]["metadata"].pop("additionalProperties", None)
    return jsonschema.Draft202012Validator(schema)


def written(folder: Path) -> dict[str, Any]:
    """The objects for Kubernetes by their kind."""
    return {found["kind"]: found for found in yaml.safe_load_all((folder / "kserve.yaml").read_text())}


@pytest.mark.parametrize(
    "more", [[], ["--storage-uri", "pvc://models/tiny"], ["--name", "Tiny_Model.1", "--threads", 2]]
)
def test_kserves_objects_are_valid(bundle: Path, tmp_path: Path, more: list[object]) -> None:
    result = deploy(bundle, "--out", tmp_path / "new", *KSERVE, *more)
    assert result.exit_code == 0, result.output
    objects = written(tmp_path / "new")
    assert set(objects) == {"ServingRuntime", "InferenceService"}
    for kind, found in objects.items():
        validator(kind).validate(found)
    runtime, service = objects["ServingRuntime"], objects["InferenceService"]["spec"]["predictor"]
    assert service["model"]["runtime"] == runtime["metadata"]["name"]
    assert service["model"]["modelFormat"]["name"] in [f["name"] for f in runtime["spec"]["supportedModelFormats"]]
    (container,) = runtime["spec"]["containers"]
    assert container["image"] == KSERVE[-1]
    from_storage = "storageUri" in service["model"]
    assert (tmp_path / "new" / "bundle").exists() != from_storage
    assert ({"name": "DSPARK_BUNDLE", "value": "/mnt/models"} in container["env"]) == from_storage


def test_a_wrong_field_is_noticed(bundle: Path, tmp_path: Path) -> None:
    deploy(bundle, "--out", tmp_path / "new", *KSERVE)
    found = written(tmp_path / "new")["InferenceService"]
    found["spec"]["predictor"]["model"]["storageURI"] = "pvc://models/tiny"
    with pytest.raises(jsonschema.ValidationError, match="storageURI"):
        validator("InferenceService").validate(found)


def test_pods_have_time_to_drain(bundle: Path, tmp_path: Path) -> None:
    deploy(bundle, "--out", tmp_path / "new", *KSERVE)
    objects = written(tmp_path / "new")
    words = (tmp_path / "new" / "start.sh").read_text().split()
    drain = float(words[words.index("--drain") + 1])
    (container,) = objects["ServingRuntime"]["spec"]["containers"]
    before = float(container["lifecycle"]["preStop"]["exec"]["command"][-1])
    assert objects["InferenceService"]["spec"]["predictor"]["terminationGracePeriodSeconds"] > drain + before


def test_it_scales_by_figures_the_server_has(bundle: Path, tmp_path: Path) -> None:
    deploy(bundle, "--out", tmp_path / "new", *KSERVE, "--rows", 3)
    objects = written(tmp_path / "new")
    (metric,) = objects["InferenceService"]["spec"]["predictor"]["autoScaling"]["metrics"]
    assert metric["external"]["target"]["value"] == "3"
    query = metric["external"]["metric"]["query"]
    with Bundle.open(bundle, threads=1).serve() as service:
        from dspark_serve.metrics import Metrics

        metrics = Metrics()
        metrics.watch(service, "", "", "")
        known = metrics.text().decode()
    for name in ("dspark_waiting", "dspark_running"):
        assert f"{name}{{pod" in query and f"\n{name} " in known


def test_what_was_written_serves(bundle: Path, tmp_path: Path) -> None:
    sizes = ["--rows", 2, "--threads", 1, "--max-length", 64]
    result = deploy(bundle, "--target", "docker", "--out", tmp_path / "new", *sizes, "--check")
    alone = Bundle.open(bundle, threads=1).generate("Once upon a time", max_new_tokens=8)
    assert result.exit_code == 0, result.output
    assert f"it answers: {json.dumps(alone.text)}" in result.output.splitlines()


def test_the_container_installs_what_the_server_needs(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(built_wheel(ROOT / "runtime", tmp_path / "wheel", CXX="/bin/false")) as wheel:
        wheel.extractall(tmp_path / "installed", [name for name in wheel.namelist() if ".dist-info/" in name])
    monkeypatch.syspath_prepend(tmp_path / "installed")  # what an environment made today would say it needs
    deploy(bundle, "--target", "docker", "--out", tmp_path / "new")
    needed = (tmp_path / "new" / "requirements.txt").read_text()
    assert {"fastapi", "uvicorn", "onnxruntime", "numpy", "tokenizers"} <= {
        line.split("=")[0].split(">")[0].split("[")[0] for line in needed.splitlines()
    }


@pytest.mark.parametrize("arguments", [["--image", "a b"], ["--storage-uri", "models"]])
def test_names_of_other_places_are_checked(bundle: Path, tmp_path: Path, arguments: list[str]) -> None:
    result = deploy(bundle, "--target", "kserve", "--out", tmp_path / "new", *arguments)
    assert result.exit_code == 2 and arguments[0] in result.output
