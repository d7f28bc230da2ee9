"""One tiny bundle for all tests of the verbs that run models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dspark_export.cli.main import app
from dspark_runtime import Bundle
from tests.shared.bundles import built_llama

Invoke = Callable[..., Any]  # gives typer.testing's result


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A built llama with random weights, float32, with a self-draft."""
    return built_llama(tmp_path_factory.mktemp("cli"))


@pytest.fixture(scope="session")
def opened(bundle: Path) -> Bundle:
    """The same, opened."""
    return Bundle.open(bundle, threads=1)


@pytest.fixture(scope="session")
def invoke() -> Invoke:
    """Run the command line; nothing may ever end in a traceback or as a bug."""

    def run(*arguments: object, stdin: str | bytes | None = None) -> Any:
        result = CliRunner().invoke(app, [str(a) for a in arguments], input=stdin)
        assert "Traceback" not in result.output
        assert result.exit_code != 70, result.output
        return result

    return run


def json_lines(text: str) -> list[dict[str, Any]]:
    """Every line of ``text`` as an object."""
    return [json.loads(line) for line in text.splitlines()]
