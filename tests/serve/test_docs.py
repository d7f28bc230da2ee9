"""docs/serving.md says what the server does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import typer

from dspark_export.cli import main as command_line
from dspark_runtime import Bundle, ServiceOptions
from dspark_serve import errors
from dspark_serve.app import make_app
from dspark_serve.metrics import Metrics
from dspark_serve.schemas import IGNORED, ChatRequest, CompletionRequest
from dspark_serve.serving import Served

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")


def rows(text: str, heading: str) -> list[list[str]]:
    """Cells of the table below a heading, without its head and rule."""
    part = text.split(f"# {heading}\n", 1)[1].split("\n#", 1)[0]
    lines = [line.strip("|").split("|") for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line] for line in lines[2:]]


def code(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def test_options() -> None:
    group: Any = typer.main.get_command(command_line.app)
    options = {p.opts[0]: p.default for p in group.commands["serve"].params if p.opts[0].startswith("--")}
    documented = {code(name)[0]: default for name, default, _ in rows(TEXT, "Options")}
    assert set(documented) == set(options) - {"--help"}
    numbers = {name: default for name, default in options.items() if isinstance(default, int | float) and default}
    assert {name: documented[name] for name in numbers if not isinstance(numbers[name], bool)} == {
        name: f"{value:g}" for name, value in numbers.items() if not isinstance(value, bool)
    }


def test_routes_and_fields(opened: Bundle) -> None:
    served = Served.start(opened, ServiceOptions(rows=1, capacity=64), "x")
    with served.service:
        described = make_app(served).openapi()["paths"]
    routes = {f"{method.upper()} {path}" for path, methods in described.items() for method in methods}
    documented = {route for names, _ in rows(TEXT, "Routes") for route in code(names)}
    assert documented == routes | {"GET /openapi.json", "GET /"}  # of which the description says nothing
    fields = {field for model in (ChatRequest, CompletionRequest) for field in model.model_fields}
    named = {name for names, _ in rows(TEXT, "Fields of a request") for name in code(names)}
    refused = {"audio", "modalities", "function_call", "functions", "reasoning_effort", "verbosity", "echo", "suffix"}
    assert named == fields - set(IGNORED) - refused - {"web_search_options", "best_of"}
    assert all(f"`{name}`" in TEXT for name in IGNORED)


def test_errors() -> None:
    described = [line.strip("|").split("|") for line in (errors.__doc__ or "").splitlines() if line.startswith("| ")]
    known = {tuple(cell.strip().strip("`") for cell in line[:3]) for line in described[1:]}
    assert {tuple(row[:3]) for row in rows(TEXT, "Errors")} == known


def test_metrics(opened: Bundle) -> None:
    metrics = Metrics()
    with Served.start(opened, ServiceOptions(rows=1, capacity=64), "x", metrics).service:
        text = metrics.text().decode()
    kinds = dict(re.findall(r"^# TYPE (dspark_\w+) (\w+)$", text, re.MULTILINE))
    names = {name for name, kind in kinds.items() if not name.endswith("_created")}
    documented = {name for names, _, _ in rows(TEXT, "Metrics") for name in code(names)}
    assert documented == names
