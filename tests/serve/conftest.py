"""One tiny bundle and one server of it for all tests of the HTTP interface."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI

from dspark_runtime import Bundle
from tests.serve.running import Running, running
from tests.shared.bundles import built_llama


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A built llama with random weights, float32, with a self-draft."""
    return built_llama(tmp_path_factory.mktemp("serve"))


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
