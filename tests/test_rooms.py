"""The packages' rooms stand on floors: a module imports from its own room and from floors below, nowhere else.

An import inside a function says which library it keeps out of the start, so it cannot hide a circle.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import dspark_runtime

ROOT = Path(__file__).resolve().parent.parent
PLACES = {
    "dspark_runtime": ROOT / "runtime" / "dspark_runtime",
    "dspark_serve": ROOT / "runtime" / "dspark_serve",
    "dspark_export": ROOT / "dspark_export",
}
FLOORS = {
    "dspark_runtime": (
        ("names",),
        ("api",),
        ("serving",),
        ("decoding",),
        ("drafters",),
        ("phrases", "speculation"),
        ("backends",),
        ("bundle", "text"),
        ("arguments", "arrays", "processors"),
        ("errors",),
    ),
    "dspark_serve": (
        ("__main__",),
        ("cli",),
        ("replica", "server"),
        ("app", "triton"),
        ("chat", "completions", "models", "page", "tokenize"),
        ("asking", "conversations", "journal", "sse"),
        ("routes",),
        ("serving",),
        ("tools",),
        ("access", "guides", "heads", "logprobs", "splitting", "streams", "tracing"),
        ("metrics",),
        ("errors", "schemas"),
        ("names",),
    ),
    "dspark_export": (
        ("__main__",),
        ("cli",),
        ("validate",),
        ("build", "train"),
        ("drafts",),
        ("drafts.graphs",),
        ("drafts.extras", "drafts.opened"),
        ("drafts.modules", "drafts.pair_check"),
        ("drafts.formats",),
        ("bench", "deploy", "engines", "graphs"),
        ("checkpoints",),
        ("bundle",),
        ("passes", "prompts", "tracing"),
        ("grids",),
        ("names",),
    ),
}
"""Rooms from the top floor down. A room is a folder, or a module that lies apart from its folder."""
BROUGHT_ALONG = {
    "fastapi": {"pydantic", "starlette"},
    "matplotlib": {"numpy"},
    "numpy": set[str](),
    "onnx": {"numpy"},
    "onnx_ir": {"numpy", "onnx"},
    "onnxruntime": {"numpy"},
    "onnxscript": {"numpy", "onnx", "onnx_ir"},
    "polygraphy": set[str](),
    "pydantic": set[str](),
    "starlette": set[str](),
    "torch": {"numpy"},
    "transformers": {"numpy"},
    "typer": set[str](),
}
"""Libraries worth keeping out of the start, and those that each of them loads itself."""
LAZY = {name: f"dspark_runtime.{place}" for name, place in dspark_runtime._PLACES.items()}
REASON = re.compile(r" *# (\w+(?:, \w+)*): \S")


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


def names_in(node: ast.AST) -> list[str]:
    """What an import names, dotted; nothing of other nodes."""
    if isinstance(node, ast.ImportFrom) and node.module and not node.level:
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []


def imported(path: Path, package: str, known: dict[str, Path]) -> set[str]:
    """Modules of ``package`` that a file imports anywhere: at its top, inside functions, for type checkers only."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        for name in names_in(node):
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


def test_the_documentation_shows_these_floors() -> None:
    """A row for each floor, top down; a package's own names need no line."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    heading, rows = r"\|".join(f" `{package}` " for package in FLOORS), r"(?:\|.*\|\n)+"
    (table,) = re.findall(rf"\|{heading}\|\n[|-]+\n({rows})", text)
    columns = zip(*(line.strip("|").split("|") for line in table.splitlines()), strict=True)
    shown = [[tuple(re.findall(r"`([\w.]+)`", cell)) for cell in column] for column in columns]
    for floors, cells in zip(FLOORS.values(), shown, strict=True):
        expected = [floor for floor in floors if floor != ("names",)]
        assert cells == expected + [()] * (len(cells) - len(expected))


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


@cache
def project() -> dict[str, ast.Module]:
    """Every module of the packages by its dotted name."""
    return {
        package if name == "names" else f"{package}.{name}": ast.parse(path.read_text(encoding="utf-8"))
        for package in PLACES
        for name, path in modules(package).items()
    }


@cache
def module_of(name: str) -> str:
    """The project's module that a dotted name leads to; empty for others. A package's lazy names lead to their own."""
    if name in project() or not name:
        return name
    place, _, last = name.rpartition(".")
    return module_of(LAZY.get(last, place) if place == "dspark_runtime" else place)


def at_start(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run when a module is loaded."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        yield node
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield from at_start(getattr(node, "body", []))
        for block in ("orelse", "finalbody"):
            yield from at_start(getattr(node, block, []))
        for handler in getattr(node, "handlers", []):
            yield from at_start(handler.body)


@cache
def started(module: str) -> list[str]:
    """What a module imports when it is loaded."""
    return [name for node in at_start(project()[module].body) for name in names_in(node)]


def libraries(names: list[str]) -> set[str]:
    """Libraries of ``BROUGHT_ALONG`` that are loaded with ``names``, whatever modules lie between."""
    found, seen, waiting = set[str](), set[str](), list(names)
    while waiting:
        name = waiting.pop()
        first, module = name.partition(".")[0], module_of(name)
        if first in BROUGHT_ALONG:
            found |= {first} | BROUGHT_ALONG[first]
        while module and module not in seen:
            seen.add(module)
            waiting += started(module)
            module = module.rpartition(".")[0]
    return found


def local_groups(tree: ast.Module) -> Iterator[tuple[int, list[str]]]:
    """(first line, names) of adjacent imports inside functions, where one is of the project."""
    nodes = {
        node
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    groups: list[tuple[int, int, list[str]]] = []
    for node in sorted(nodes, key=lambda node: node.lineno):
        if groups and groups[-1][1] == node.lineno - 1:
            first, _, names = groups.pop()
            groups.append((first, node.end_lineno or 0, names + names_in(node)))
        else:
            groups.append((node.lineno, node.end_lineno or 0, names_in(node)))
    return ((first, names) for first, _, names in groups if any(module_of(name) for name in names))


@pytest.mark.parametrize("package", PLACES)
def test_a_local_import_says_what_it_keeps_out_of_the_start(package: str) -> None:
    wrong = []
    for name, path in modules(package).items():
        lines = path.read_text(encoding="utf-8").splitlines()
        here = package if name == "names" else f"{package}.{name}"
        for first, names in local_groups(project()[here]):
            reason = REASON.match(lines[first - 2])
            said = set(reason[1].split(", ")) if reason else set()
            saved = libraries(names) - libraries([here])
            if not said or not said <= saved:
                wrong.append(f"{path}:{first} needs '# <library>: <when>' above it, with one of {sorted(saved)}")
    assert not wrong


def test_local_imports_are_grouped_by_adjacent_lines() -> None:
    source = (
        "import dspark_runtime.api\ndef f():\n    from dspark_runtime import (\n        Bundle,\n    )\n"
        "    import torch\n\n    import json\n\n    from dspark_export.build.pipeline import build\n"
    )
    groups = [(3, ["dspark_runtime.Bundle", "torch"]), (10, ["dspark_export.build.pipeline.build"])]
    assert list(local_groups(ast.parse(source))) == groups
    assert module_of("dspark_runtime.Bundle") == "dspark_runtime.api"
    assert libraries(["dspark_runtime.errors"]) == set() and "pydantic" in libraries(["dspark_runtime.Bundle"])
