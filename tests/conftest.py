"""Which tests run in one worker: those that share what is slow to make, such as a bundle or a traced architecture."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parent
SHARING = ("real_model", "validate", "drafting", "engines", "plugins", "cli", "runtime")
"""Folders whose files share such things. They come first, the slowest of them before the others, for an even end."""


def _group(item: pytest.Item) -> str:
    path = item.path.relative_to(ROOT)
    if path.parts[0] in SHARING:
        return path.parts[0]
    arch = getattr(item, "callspec", None) and item.callspec.params.get("arch")  # type: ignore[attr-defined]
    return f"{arch}" if isinstance(arch, str) else path.with_suffix("").as_posix()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(SHARING)}
    items.sort(key=lambda item: places.get(item.path.relative_to(ROOT).parts[0], len(SHARING)))
    for item in items:
        item.add_marker(pytest.mark.xdist_group(_group(item)))
