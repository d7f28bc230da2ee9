"""``dspark-export deploy``: what it writes, and what it refuses before it writes anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dspark_export.cli.main import app
from dspark_runtime import Bundle
from dspark_runtime.errors import UsageError
from dspark_serve.triton.settings import Settings


def deploy(*arguments: object) -> Any:
    result = CliRunner().invoke(app, ["deploy", *map(str, arguments)])
    assert "Traceback" not in result.output
    return result


def test_every_parameter_comes_back_from_the_configuration() -> None:
    settings = Settings(rows=3, max_length=99, exact=False, backend="tensorrt", device=1, speculate="ngram", threads=2)
    config = {"parameters": {name: {"string_value": text} for name, text in settings.parameters().items()}}

    assert Settings.parse(json.dumps(config)) == settings


@pytest.mark.parametrize(
    ("name", "value"), [("rows", "many"), ("row", "3"), ("backend", "cpu"), ("exact", "perhaps"), ("threads", "1.5")]
)
def test_parameters_are_checked(name: str, value: str) -> None:
    with pytest.raises(UsageError, match=f"^{name}='{value}'"):
        Settings.checked(**{name: value})


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--rows", 0], 2, "rows=0"),
        (["--name", "../x"], 2, "--name '../x'"),
        (["--backend", "cpu"], 2, "backend='cpu'"),
        (["--backend", "tensorrt"], 2, "has no engines for tensorrt; `dspark-export compile --backend tensorrt`"),
        (["--out", "taken"], 7, "exists already"),
        (["--out", "file/below"], 7, "cannot write"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[object], code: int, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "something").touch()
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    result = deploy(bundle, "--target", "triton", "--out", "new", *arguments)
    assert (result.exit_code, message in result.output) == (code, True), result.output
    assert sorted(tmp_path.rglob("*")) == before


def test_what_was_written_is_started_and_asked(
    bundle: Path, triton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSPARK_CACHE", str(triton.parent))
    arguments = [bundle, "--target", "triton", "--out", tmp_path / "new", "--rows", "2", "--threads", "1", "--check"]
    result = deploy(*arguments)
    alone = Bundle.open(bundle, threads=1).generate("Once upon a time", max_new_tokens=8)
    assert result.exit_code == 0, result.output
    assert f"it answers: {json.dumps(alone.text)}" in result.output.splitlines()


def test_a_server_that_does_not_start_says_why(
    bundle: Path, triton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSPARK_CACHE", str(triton.parent))
    arguments = ["--target", "triton", "--out", tmp_path / "new", "--threads", "1", "--check", "--speculate", "eagle3"]
    result = deploy(bundle, *arguments)
    assert result.exit_code == 8
    assert "the server ended with code" in result.output and "UsageError: " in result.output


def test_a_folder_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    result = deploy(tmp_path, "--target", "triton", "--out", tmp_path / "new")
    assert result.exit_code == 7, result.output
    assert not list(tmp_path.iterdir())


def test_the_bundle_may_stay_where_it_is(bundle: Path, tmp_path: Path) -> None:
    assert deploy(bundle, "--target", "triton", "--out", tmp_path / "new", "--no-copy").exit_code == 0
    model = tmp_path / "new" / "models" / "bundle"
    assert f'"bundle" value {{ string_value: "{bundle}" }}' in (model / "config.pbtxt").read_text()
    assert not (model / "1" / "bundle").exists()
    assert f'"{bundle}:{bundle}:ro"' in (tmp_path / "new" / "compose.yaml").read_text()
