"""The command line: build and inspect, exit codes, what goes to stdout and what to stderr."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from contextlib import chdir
from pathlib import Path
from typing import Any, get_args

import pytest
from typer.testing import CliRunner

from dspark_export.cli import main
from dspark_export.cli.build import default_out
from dspark_export.cli.main import app
from dspark_export.engines.options import PluginsOption
from dspark_export.train.options import Arithmetic, Markov, Optimizer
from dspark_export.validate.extent import Against, Level
from dspark_runtime.bundle.engine_names import Flavour, HardwareCompatibility
from dspark_runtime.bundle.files import BundleFiles
from dspark_runtime.bundle.manifest import Manifest
from dspark_runtime.bundle.precisions import Activations, Weights
from dspark_runtime.errors import DsparkError, IncompatibleBundle
from tests.checkpoints.checkpoint_samples import edit_config, write_checkpoint
from tests.runtime.bundle.test_bundle import flipped
from tests.runtime.bundle.test_bundle import write_bundle as write_fake_bundle


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    write_checkpoint(folder / "model")
    arguments = ["build", str(folder / "model"), "--self-draft", "layers=0", "--phrases", "0"]
    with chdir(folder):
        result = CliRunner().invoke(app, [*arguments, "--precision", "int8", "--threads", "1", "--progress", "json"])
    assert result.exit_code == 0, result.output
    assert "the bundle goes to model.dspark; --out" in result.stderr
    assert f"built {folder / 'model.dspark'}" in result.stdout
    stages = [json.loads(line)["stage"] for line in result.stderr.splitlines() if line.startswith("{")]
    assert stages[0] == "check" and stages[-1] == "commit"
    return folder / "model.dspark"


def test_a_built_bundle_opens_and_tells_what_it_is(built: Path) -> None:
    manifest = BundleFiles.open(built).manifest
    assert manifest.precision.weights == "int8" and manifest.precision.block_size == 64
    assert manifest.model.eos_token_ids == (257, 258)
    assert {(graph.name, graph.variant) for graph in manifest.graphs} >= {
        ("target", "standard"),
        ("target", "onnxruntime-cpu"),
        ("self_draft", "standard"),
        ("verify", "standard"),
    }
    draft = next(drafter for drafter in manifest.drafters if drafter.kind == "self_draft")
    assert draft.agreement is not None and draft.settings["layers"] == [0]
    assert manifest.costs is not None and manifest.costs.threads == 1
    assert manifest.source.kind == "local" and "config.json" in manifest.source.files


def test_inspect_shows_everything(built: Path) -> None:
    result = CliRunner().invoke(app, ["inspect", str(built), "--operators"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    for text in (
        "LlamaForCausalLM",
        "int8, blocks of 64",
        "self_draft",
        "DequantizeLinear",
        "digests verified",
        "weights.data",
    ):
        assert text in result.stdout
    assert result.stderr == ""


def test_inspect_json_round_trips(built: Path) -> None:
    result = CliRunner().invoke(app, ["inspect", str(built), "--json", "--no-verify"])
    facts: dict[str, Any] = json.loads(result.stdout)
    assert facts["digests_verified"] is False
    assert facts["operators"]["onnx/target.onnx"]["TensorScatter"] == 4
    assert Manifest.parse(json.dumps(facts["manifest"]).encode()) == BundleFiles.open(built).manifest


def test_inspect_lists_the_nodes_without_a_kernel(built: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(built, tmp_path / "bundle")
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert "without a sequence kernel" not in run("inspect", str(bundle)).stdout
    nodes = {"target": {"Attention": 2, "MatMul": 31}, "self_draft": {}}
    for graph in manifest["graphs"]:
        if graph["variant"] == "onnxruntime-cpu":
            graph |= {"variant": "sequence-kernels", "standard_nodes": nodes[graph["name"]]}
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    shown = run("inspect", str(bundle)).stdout.split("nodes without a sequence kernel")[1].split("drafters")[0]
    assert re.findall(r"(target|self_draft)\W+(\w+)\W+(\d+)", shown) == [
        (name, operator, str(count))
        for name, found in nodes.items()
        for operator, count in (found or {"none": 0}).items()
    ]
    facts = json.loads(run("inspect", str(bundle), "--json").stdout)
    listed = {g["name"]: g["standard_nodes"] for g in facts["manifest"]["graphs"] if g["variant"] == "sequence-kernels"}
    assert listed == nodes


def test_inspect_finds_damage(tmp_path: Path) -> None:
    root = write_fake_bundle(tmp_path / "bundle")
    flipped(root)
    result = CliRunner().invoke(app, ["inspect", str(root)])
    assert result.exit_code == 7 and "altered" in result.stderr and result.stdout == ""


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, [*arguments])


def test_errors_are_one_line_on_stderr_with_their_code(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    out = str(tmp_path / "bundle")
    cases = [
        (("build", str(tmp_path / "none"), "--out", out), 3, "hub id"),
        (("build", str(folder), "--out", out, "--revision", "main"), 2, "--revision"),
        (("build", str(folder), "--out", out, "--block-size", "32"), 2, "--block-size"),
        (("build", str(folder), "--out", out, "--precision", "int4", "--block-size", "31"), 2, "31"),
        (("build", str(folder), "--out", out, "--precision", "w8a8", "--block-size", "32"), 2, "--block-size"),
        (("build", str(folder), "--out", out, "--precision", "w8a8", "--activations", "fp16"), 2, "8-bit"),
        (("build", str(folder), "--out", out, "--precision", "w8a8", "--backend", "tensorrt-rtx"), 2, "for the CPU"),
        (("build", str(folder), "--out", out, "--self-draft", "some"), 2, "--self-draft"),
        (("build", str(folder), "--out", out, "--self-draft", "layers=9"), 2, "layers"),
        (("build", str(folder), "--out", out, "--threads", "0"), 2, "--threads"),
        (("build", str(folder), "--out", "/"), 7, "new folder"),
        (("inspect", str(folder)), 7, "manifest.json"),
        (("inspect", str(tmp_path / "none")), 7, "does not exist"),
    ]
    for arguments, code, says in cases:
        result = run(*arguments)
        assert result.exit_code == code, (arguments, result.output)
        assert says in result.stderr and "Traceback" not in result.stderr
        assert result.stdout == ""
    edit_config(folder, model_type="bert")
    assert run("build", str(folder), "--out", out).exit_code == 5
    edit_config(folder, model_type="mine", auto_map={"AutoConfig": "m.C"})
    assert run("build", str(folder), "--out", out).exit_code == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_wrong_options_are_usage_errors() -> None:
    assert run("build").exit_code == 2
    assert run("nonsense").exit_code == 2


@pytest.mark.parametrize(
    ("command", "option", "known"),
    [
        ("build x", "--precision", get_args(Weights)),
        ("build x", "--activations", get_args(Activations)),
        ("build x", "--backend", get_args(Flavour)),
        ("build x", "--plugins", get_args(PluginsOption)),
        ("build x", "--progress", ("auto", "json", "off")),
        ("compile x", "--backend", get_args(Flavour)),
        ("compile x", "--plugins", get_args(PluginsOption)),
        ("compile x", "--hardware-compatible", get_args(HardwareCompatibility)),
        ("train-drafter x --out y", "--markov", get_args(Markov)),
        ("train-drafter x --out y", "--optimizer", get_args(Optimizer)),
        ("train-drafter x --out y", "--dtype", get_args(Arithmetic)),
        ("validate x", "--against", get_args(Against)),
        ("validate x", "--level", get_args(Level)),
    ],
)
def test_a_wrong_word_is_refused_with_those_there_are(command: str, option: str, known: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, [*command.split(), option, "nothing"], env={"COLUMNS": "300"})
    assert result.exit_code == 2
    assert option in result.stderr
    assert all(f"'{word}'" in result.stderr for word in known)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("Qwen/Qwen3-0.6B", "Qwen3-0.6B.dspark"),
        ("gpt2", "gpt2.dspark"),
        ("models/Tiny.Q4_1.gguf", "Tiny.Q4_1.dspark"),
        ("./models/tiny/", "tiny.dspark"),
    ],
)
def test_a_bundle_has_the_name_of_its_model(model: str, name: str) -> None:
    assert default_out(model) == Path(name)


def test_a_bundle_of_this_folder_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert default_out(".") == Path(f"{tmp_path.name}.dspark")


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = run("--debug", "inspect", str(tmp_path / "none"))
    assert result.exit_code == 7 and "Traceback" in result.stderr and "does not exist" in result.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [(ZeroDivisionError("bug"), 70), (KeyboardInterrupt(), 130), (IncompatibleBundle("new"), 7), (DsparkError("x"), 1)],
)
def test_every_error_has_its_code(monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(BundleFiles, "open", fail)
    result = run("inspect", "somewhere")
    assert result.exit_code == code and "Traceback" not in result.stderr


def test_the_documented_codes_are_the_real_ones() -> None:
    def subclasses(kind: type[DsparkError]) -> set[int]:
        return {kind.exit_code}.union(*(subclasses(child) for child in kind.__subclasses__()))

    documented = {
        int(cell)
        for line in (main.__doc__ or "").splitlines()
        for cell in line.split("|")[1:2]
        if cell.strip().isdigit()
    }
    assert subclasses(DsparkError) - {1} <= documented


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from dspark_export.cli.main import app\n"
        "try: app(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'onnx', 'onnxruntime', 'numpy', 'pydantic'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - began
    assert "build" in done.stdout and "inspect" in done.stdout
    assert done.stderr.strip() == "[]"
    assert seconds < 5, "loaded machines included; it takes a third of a second"
