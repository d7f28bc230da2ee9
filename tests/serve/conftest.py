"""One tiny bundle and one server of it for all tests of the HTTP interface."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI

from dspark_runtime import Bundle
from tests import tiny_models
from tests.serve.running import Running, running


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A built llama with random weights, float32, with a self-draft."""
    from typer.testing import CliRunner

    from dspark_export.cli.main import app

    folder = tmp_path_factory.mktemp("serve")
    tiny_models.save_checkpoint("llama", folder / "model")
    arguments = ["build", str(folder / "model"), "--out", str(folder / "bundle"), "--self-draft", "layers=0,2"]
    result = CliRunner().invoke(app, [*arguments, "--precision", "fp32", "--threads", "1"])
    assert result.exit_code == 0, result.output
    return folder / "bundle"


@pytest.fixture(scope="session")
def opened(bundle: Path) -> Bundle:
    """The same, opened."""
    return Bundle.open(bundle, threads=1)


@pytest.fixture(scope="session")
def server(opened: Bundle) -> Iterator[Running]:
    """A server of it, for tests that leave it as they find it."""
    with running(opened) as it:
        yield it


@pytest.fixture(scope="session")
def client(server: Running) -> OpenAI:
    """OpenAI's client of that server."""
    return server.client()
