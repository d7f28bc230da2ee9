"""What the documentation names exists, and its tables say what the code says."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from pydantic import BaseModel

import dspark_runtime
from dspark_export.build.pipeline import Stage
from dspark_export.cli import main as command_line
from dspark_export.cli.validate import FAILED as VALIDATION_FAILED
from dspark_runtime import (
    Bundle,
    Chunk,
    Drafter,
    DraftOptions,
    Generation,
    SamplingParams,
    ServiceOptions,
    Statistics,
    errors,
)
from dspark_runtime.bundle import contract, engine_entry, manifest
from dspark_runtime.decoding.options import DEFAULTS, DRAFT_FIELDS, SAMPLING_FIELDS, GenerateOptions
from dspark_runtime.decoding.statistics import DrafterCounts

ROOT = Path(__file__).resolve().parents[2]
DOCS = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
TEXTS = DOCS | {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in (
        "README.md",
        "CONTRIBUTING.md",
        "samples/README.md",
        "benchmarks/README.md",
        "benchmarks/peers/README.md",
    )
}
FOLDERS = ("dspark_export", "runtime", "tests", "samples", "benchmarks", "docs", "scripts")


def rows(text: str, heading: str = "") -> list[list[str]]:
    """Cells of the first table below ``heading`` (all tables without one), without head and rule."""
    if heading:
        found = re.search(rf"^#+ {re.escape(heading)}$(.*?)(?=^#|\Z)", text, re.MULTILINE | re.DOTALL)
        assert found, heading
        text = found[1]
    lines = re.findall(r"^\|(.*)\|$", text, re.MULTILINE)
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)] for line in lines]
    return [row for i, row in enumerate(cells) if not _rule(row) and not (i + 1 < len(cells) and _rule(cells[i + 1]))]


def _rule(row: list[str]) -> bool:
    return all(re.fullmatch(r":?-+:?", cell) for cell in row)


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def spans(text: str) -> list[str]:
    """What is in backticks, without commands of other programs."""
    others = "ruff|mypy|pip|git|pytest|polygraphy|cmake|trtexec|tritonserver"
    return [span for span in code(text) if not re.match(rf"(?:bash\n)?(?:{others}) ", span)]


def all_errors(base: type[errors.DsparkError] = errors.DsparkError) -> set[type[errors.DsparkError]]:
    return {base}.union(*(all_errors(derived) for derived in base.__subclasses__()))


def import_everything() -> None:
    for module in pkgutil.walk_packages(dspark_runtime.__path__, "dspark_runtime."):
        importlib.import_module(module.name)


# Names


@pytest.mark.parametrize("name", TEXTS)
def test_every_path_in_backticks_exists(name: str) -> None:
    paths = [t for t in code(TEXTS[name]) if re.fullmatch(rf"(?:{'|'.join(FOLDERS)})/[\w./-]*", t)]
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_every_option_in_backticks_exists() -> None:
    group: Any = typer.main.get_command(command_line.app)
    known = {option for param in group.params for option in param.opts}
    for command in group.commands.values():
        known |= {option for param in command.params for option in (*param.opts, *param.secondary_opts)}
    for script in (*ROOT.glob("benchmarks/**/*.py"), ROOT / "tests" / "conftest.py"):
        known |= set(re.findall(r'"(--[a-z-]+)"', script.read_text(encoding="utf-8")))
    named = {
        o for text in TEXTS.values() for span in spans(text) for o in re.findall(r"(?<![\w-])--[a-z][a-z-]+", span)
    }
    assert len(named) > 10
    unknown = sorted(named - known - {"--no-deps", "--help", "--nproc-per-node"})  # of pip, typer and torchrun
    assert unknown == []


def test_every_page_is_reached_from_the_readme() -> None:
    assert not [name for name in DOCS if f"docs/{name}" not in TEXTS["README.md"]]


# Errors and exit codes


def test_the_error_table_lists_every_error() -> None:
    import_everything()
    importlib.import_module("dspark_export.build.pipeline")
    expected = {
        (e.__name__, e.__base__.__name__, str(e.exit_code))
        for e in all_errors()
        if e.__base__ and "test" not in e.__module__
    }
    found = rows(DOCS["errors-and-exit-codes.md"])
    assert {(code(row[0])[0], code(row[1])[0], row[2]) for row in found if row[0].startswith("`")} == expected


def test_the_exit_code_table_is_complete() -> None:
    documented = {int(row[0]) for row in rows(DOCS["errors-and-exit-codes.md"]) if row[0].isdigit()}
    assert documented == {error.exit_code for error in all_errors()} | {0, VALIDATION_FAILED, 70, 130, 143}


# Bundle and contract


def test_the_manifest_fields_are_those_of_the_models() -> None:
    described = {heading: None for heading in re.findall(r"^### `(\w+)`$", DOCS["bundle.md"], re.MULTILINE)}
    models = {
        name: model
        for name, model in {**vars(engine_entry), **vars(manifest)}.items()
        if isinstance(model, type) and issubclass(model, BaseModel) and not name.startswith("_")
    }
    models |= {"CacheLayer": contract.CacheLayer, "TensorSpec": contract.TensorSpec}
    del models["Record"]
    assert set(described) == set(models)
    for name in described:
        model = models[name]
        fields = (
            [f.name for f in dataclasses.fields(model)] if dataclasses.is_dataclass(model) else [*model.model_fields]
        )
        assert [code(row[0])[0] for row in rows(DOCS["bundle.md"], f"`{name}`")] == fields, name


def test_the_graph_contract_is_that_of_the_code() -> None:
    expected = contract.decoder_contract("target", [contract.CacheLayer(1, 2, 2)], 8, "float32", taps_width=4)
    tables = [code(row[0])[0] for row in rows(DOCS["graph-contract.md"], "`target`")]
    shape = [re.sub(r"\.0\.", ".{i}.", spec.name) for spec in (*expected.inputs, *expected.outputs)]
    assert tables == [name for name in shape if not name.endswith(".value")]


def test_the_verify_graph_is_that_of_the_code() -> None:
    from dspark_export.graphs.verify import build_verify_model

    graph = build_verify_model().graph
    names = [name for row in rows(DOCS["graph-contract.md"], "`verify`") for name in code(row[0])]
    assert set(names) == {value.name for value in (*graph.inputs, *graph.outputs)}


def test_the_variants_are_those_of_the_manifest() -> None:
    found = {code(row[0])[0] for row in rows(DOCS["graph-contract.md"], "Variants")}
    assert found == set(get_args(manifest.Variant))


# Architecture


def test_the_stages_of_a_build_are_those_of_the_code() -> None:
    steps = DOCS["architecture.md"].partition("## The life of a build\n")[2].partition("\n## ")[0]
    assert tuple(name.lower() for name in re.findall(r"^\d+\. \*\*(.+?)\.\*\*", steps, re.MULTILINE)) == get_args(Stage)


def test_every_pass_is_listed() -> None:
    listed = {code(row[0])[0] for row in rows(DOCS["architecture.md"], "Passes over a graph")}
    files = {str(p.relative_to(ROOT)) for p in (ROOT / "dspark_export" / "passes").glob("*.py")}
    assert listed == {f for f in files if Path(f).stem not in ("__init__", "match", "precision")}


# Python API


@pytest.mark.parametrize("function", ["open", "generate"])
def test_arguments_and_defaults_are_those_of_the_code(function: str) -> None:
    heading = {"open": "`Bundle.open(path, ...)`", "generate": "`bundle.generate(prompt, params, ...)`"}[function]
    documented = {code(r[0])[0]: r[1].strip("`") for r in rows(DOCS["python-api.md"], heading) if len(r) == 3}
    parameters = inspect.signature(getattr(Bundle, function)).parameters.values()
    real = {p.name: p.default for p in parameters if p.default is not p.empty}
    if function == "generate":
        keywords: dict[str, Any] = {**DEFAULTS}
        for settings, fields in ((SamplingParams(), SAMPLING_FIELDS), (DraftOptions(), DRAFT_FIELDS)):
            assert {*fields.values()} <= {field.name for field in dataclasses.fields(settings)}
            keywords |= {name: getattr(settings, field) for name, field in fields.items()}
        assert keywords.keys() == GenerateOptions.__annotations__.keys()
        real |= keywords
    assert documented == {name: f'"{v}"' if isinstance(v, str) else str(v) for name, v in real.items()}


def test_the_settings_are_those_of_the_code() -> None:
    for heading, settings, elsewhere in (
        ("`SamplingParams`", SamplingParams(), SAMPLING_FIELDS),
        ("`bundle.serve(options, observer)`", ServiceOptions(), {}),
    ):
        documented = {code(r[0])[0]: r[1].strip("`") for r in rows(DOCS["python-api.md"], heading)}
        real = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings) if f.name not in elsewhere}
        shown = {n: f'"{v}"' if isinstance(v, str) else re.sub(r"\(.+\)", "()", str(v)) for n, v in real.items()}
        assert documented == shown


def test_attributes_of_the_results_exist() -> None:
    table = [row for row in rows(DOCS["python-api.md"], "`bundle.generate(prompt, params, ...)`") if len(row) == 2]
    assert [code(row[0])[0] for row in table] == [f.name for f in dataclasses.fields(Generation)]
    text = DOCS["python-api.md"].split("## Streaming")[1].split("\n## ")[0]
    assert all(f"`{field.name}`" in text for field in dataclasses.fields(Chunk))


def test_the_statistics_are_those_of_the_code() -> None:
    names = {code(row[0])[0] for row in rows(DOCS["speculation.md"], "Statistics")}
    real = {k for k in Statistics().to_dict() if k not in ("seconds", "sequences")}
    of_drafters = {"conditional_acceptance", "prefix_survival", "calibration_error"}
    assert of_drafters <= set(Statistics(per_drafter={"x": DrafterCounts()}).to_dict()["per_drafter"]["x"])
    assert names == real | of_drafters | {f"seconds.{phase}" for phase in ("prefill", "draft", "verify", "host")}


def test_the_modes_are_those_of_the_code() -> None:
    modes = [code(row[0])[0] for row in rows(DOCS["speculation.md"], "Drafters")]
    assert set(modes[:-1]) == set(dspark_runtime.SPECULATION_MODES) and modes[-1] == "Drafter"


def test_the_methods_of_a_drafter_exist() -> None:
    for row in rows(DOCS["python-api.md"], "A drafter of your own"):
        name, arguments = re.fullmatch(r"(\w+)\((.*)\)", code(row[0])[0]).groups()  # type: ignore[union-attr]
        assert [*inspect.signature(getattr(Drafter, name)).parameters][1:] == arguments.split(", ")


def test_the_benchmark_of_peers_explains_itself() -> None:
    command = [sys.executable, "-m", "benchmarks.peers", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "--model" in done.stdout, done.stderr
