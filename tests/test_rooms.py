"""The packages' rooms stand on floors: a module imports from its own room and from floors below, nowhere else."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PLACES = {"dspark_runtime": ROOT / "runtime" / "dspark_runtime", "dspark_export": ROOT / "dspark_export"}
FLOORS = {
    "dspark_runtime": (
        ("names",),
        ("api",),
        ("decoding",),
        ("drafters",),
        ("speculation",),
        ("backends",),
        ("bundle", "text"),
        ("arguments", "processors"),
        ("errors",),
    ),
    "dspark_export": (
        ("cli",),
        ("validate",),
        ("build", "train"),
        ("drafts",),
        ("drafts.graphs",),
        ("drafts.extras", "drafts.opened"),
        ("drafts.modules", "drafts.pair_check"),
        ("drafts.formats",),
        ("bench", "engines", "graphs"),
        ("checkpoints",),
        ("bundle",),
        ("passes", "prompts", "tracing"),
        ("names",),
    ),
}
"""Rooms from the top floor down. A room is a folder, or a module that lies apart from its folder."""


def modules(package: str) -> dict[str, Path]:
    """Files of a package by their name in it; the package itself is ``names``."""
    found = {}
    for path in PLACES[package].rglob("*.py"):
        parts = path.relative_to(PLACES[package]).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "names"] = path
    return found


def room_of(module: str, floors: tuple[tuple[str, ...], ...]) -> str:
    """The room with the longest name that ``module`` is in; empty if there is none."""
    rooms = [room for floor in floors for room in floor if f"{module}.".startswith(f"{room}.")]
    return max(rooms, key=len, default="")


def imported(path: Path, package: str, known: dict[str, Path]) -> set[str]:
    """Modules of ``package`` that a file imports anywhere: at its top, inside functions, for type checkers only."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            first, _, inside = name.partition(".")
            if first == package:
                whole = inside if inside in known else inside.rpartition(".")[0]
                found.add(whole if whole in known else "names")
    return found


@pytest.mark.parametrize("package", FLOORS)
def test_every_module_is_in_a_room(package: str) -> None:
    assert not [name for name in modules(package) if not room_of(name, FLOORS[package])]
    rooms = [room for floor in FLOORS[package] for room in floor]
    assert len(rooms) == len(set(rooms))
    assert {room_of(name, FLOORS[package]) for name in modules(package)} == set(rooms)


@pytest.mark.parametrize("package", FLOORS)
def test_imports_lead_to_floors_below(package: str) -> None:
    known = modules(package)
    height = {room: -number for number, floor in enumerate(FLOORS[package]) for room in floor}
    wrong = []
    for name, path in known.items():
        mine = room_of(name, FLOORS[package])
        for other in imported(path, package, known):
            theirs = room_of(other, FLOORS[package])
            if mine != theirs and height[theirs] >= height[mine]:
                wrong.append(f"{name} ({mine}) imports {other} ({theirs})")
    assert not wrong


def test_an_import_is_found_wherever_it_stands(tmp_path: Path) -> None:
    source = tmp_path / "source.py"
    source.write_text(
        "from typing import TYPE_CHECKING\nimport pkg.a\nif TYPE_CHECKING:\n    from pkg.b import B\n"
        "def f():\n    from pkg import c\n    from pkg.d.e import g\n"
    )
    assert imported(source, "pkg", dict.fromkeys(("a", "b", "c", "d.e"), source)) == {"a", "b", "c", "d.e"}
