"""Verification in engines: inlined, by the plugin library, or embedded, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import onnx_ir as ir
import pytest
from typer.testing import CliRunner

from dspark_export.cli.main import app
from dspark_export.engines import plugins as found_here
from dspark_export.engines.aot_plugins import PLUGINS as EMBEDDED
from dspark_export.engines.compile import compile_bundle, vocab_of
from dspark_export.engines.compiler import compile_graph
from dspark_export.engines.options import CompileOptions, Ranges
from dspark_export.engines.plugin_forms import INLINED, Plugins, apply_plugins
from dspark_export.engines.plugins import LIMITS, find_plugins, require_limits
from dspark_export.engines.prepare import prepare
from dspark_export.graphs.verify import build_verify_chain_model, build_verify_model
from dspark_runtime import errors
from dspark_runtime.backends import plugin_files
from dspark_runtime.backends.tensorrt_check import DeviceFacts, require_plugins
from dspark_runtime.backends.tensorrt_plan import LoadedPlan
from dspark_runtime.backends.tensorrt_plugins import load_plugins
from dspark_runtime.bundle import engine_names as names
from dspark_runtime.bundle.engine_entry import EngineEntry
from dspark_runtime.bundle.files import BundleFiles
from tests.engines.graphs import OPTIONS, Saved, save
from tests.engines.recorded_cuda import RecordedCuda
from tests.plugins.conftest import PLUGINS as SOURCES

VOCAB = 512
ADA = DeviceFacts("8.9", "NVIDIA L4", 13000)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder where compiled plugins are looked for; there is no nvcc."""
    monkeypatch.setenv(plugin_files.FOLDER_VARIABLE, str(tmp_path / "plugins"))
    monkeypatch.setattr(found_here.shutil, "which", lambda name: None)
    (tmp_path / "plugins").mkdir()
    return tmp_path / "plugins"


@pytest.fixture
def verify(tmp_path: Path) -> Saved:
    return save(tmp_path / "verify", {"verify": build_verify_model()}, "float32")


def test_names_versions_and_limits_are_those_of_the_sources() -> None:
    headers = "".join(path.read_text(encoding="utf-8") for path in SOURCES.rglob("*.h"))
    assert re.findall(r'DSPARK_PLUGIN_VERSION "(.*)"', headers) == [names.VERSION]
    assert re.findall(r'DSPARK_PLUGIN_NAMESPACE "(.*)"', headers) == [names.NAMESPACE]
    assert sorted(re.findall(r'kName = "(\w+)"', headers)) == sorted(names.NAMES)
    assert {each.name for each in EMBEDDED} < set(names.NAMES)
    constants = {"batch": "kMaxBatch", "rows": "kMaxVerifyRows", "vocab": "kMaxVocab"}
    for dim, constant in constants.items():
        (found,) = re.findall(rf"constexpr \w+ {constant} = ([^;]+);", headers)
        assert eval(found) == LIMITS[dim]
    cmake = (SOURCES / "CMakeLists.txt").read_text(encoding="utf-8")
    assert plugin_files.FATBIN in cmake and plugin_files.PTX in cmake and "dspark_plugins SHARED" in cmake


@pytest.mark.parametrize("model", [build_verify_model, build_verify_chain_model])
def test_the_forms_are_interchangeable(model: Any) -> None:
    whole, plugin, inlined = model(), model(), model()
    (call,) = whole.graph
    assert apply_plugins(plugin, "library") == {call.op_type: names.VERSION}
    assert apply_plugins(inlined, "none") == {}
    for each in (plugin, inlined):
        assert [value.name for value in each.graph.inputs] == [value.name for value in whole.graph.inputs]
        assert [value.name for value in each.graph.outputs] == [value.name for value in whole.graph.outputs]
        assert not each.functions
    (node,) = plugin.graph
    assert (node.domain, node.op_type) == (names.NAMESPACE, call.op_type)
    assert {key: value.value for key, value in node.attributes.items()} == {
        "plugin_version": names.VERSION,
        "plugin_namespace": names.NAMESPACE,
    }
    assert {node.domain for node in inlined.graph.all_nodes()} == {""}
    onnx.checker.check_model(ir.to_proto(inlined))


CREATOR = """
import sys
import tensorrt_rtx as trt

class Creator(trt.IPluginCreatorV3One):
    def __init__(self, version):
        super().__init__()
        self.name, self.plugin_version, self.plugin_namespace = "VerifyTree", version, "dspark"
        self.field_names = trt.PluginFieldCollection([])

    def create_plugin(self, name, fields, phase):
        print("asked for", name, len(fields), flush=True)
        raise SystemExit  # far enough: the parser found the creator of this node

logger = trt.Logger(trt.Logger.ERROR)
creator = Creator(sys.argv[2])
assert trt.get_plugin_registry().register_creator(creator, "dspark")
builder = trt.Builder(logger)
network = builder.create_network(0)
parser = trt.OnnxParser(network, logger)
if not parser.parse_from_file(sys.argv[1]):
    print("refused", parser.get_error(0).node_name(), parser.get_error(0).desc())
"""


@pytest.mark.parametrize(("version", "answer"), [("1", "asked for VerifyTree 0"), ("0", "refused VerifyTree")])
def test_the_parser_finds_a_plugin_of_that_name_and_version(verify: Saved, version: str, answer: str) -> None:
    file = verify.folder / "onnx" / "prepared.onnx"
    prepared = prepare(
        verify.graphs["verify"], verify.folder, OPTIONS.ranges, file, plugins=Plugins("library"), vocab=VOCAB
    )
    assert prepared.plugins == {"VerifyTree": names.VERSION} and list(prepared.shapes) == ["decode"]
    assert prepared.shapes["decode"]["logits"] == [[1, 1, VOCAB], [1, 8, VOCAB], [2, 8, VOCAB]]
    command = [sys.executable, "-c", CREATOR, str(file), version]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer in done.stdout, done.stderr


def test_inlined_it_compiles_for_a_small_vocabulary(compiled: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(compiled, tmp_path / "bundle"))
    command = ["compile", str(bundle), "--plugins", "none", "--graph", "verify", "--verify-rows", "8", "--json"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    (engine,) = (EngineEntry.model_validate_json(json.dumps(e)) for e in json.loads(result.stdout)["engines"])
    assert (engine.graph, engine.dtype, engine.plugins, engine.plugin_form) == ("verify", "float32", {}, "none")
    (profile,) = engine.profiles
    vocab = vocab_of(BundleFiles.open(bundle).manifest)
    assert profile.dims == {"batch": (1, 1, 1), "rows": (1, 8, 8), "vocab": (vocab, vocab, vocab)}
    assert [e.graph for e in BundleFiles.open(bundle).manifest.engines] == ["target", "self_draft", "verify"]


def test_inlined_it_does_not_sort_a_large_vocabulary(verify: Saved) -> None:
    file = verify.folder / "onnx" / "prepared.onnx"
    prepared = prepare(verify.graphs["verify"], verify.folder, OPTIONS.ranges, file, plugins=INLINED, vocab=49152)
    with pytest.raises(errors.EngineBuildError, match=r"\(TopK, .*K exceeds the maximum .* --plugins library or aot"):
        compile_graph(prepared, OPTIONS, verify.folder / "plan", verify.folder / "log", lambda *_: None)


def test_auto_takes_the_library_then_the_kernels_then_nothing(folder: Path) -> None:
    options = CompileOptions(flavour="tensorrt")
    assert find_plugins(options) is None
    (folder / plugin_files.PTX).write_text("// ptx", encoding="utf-8")
    assert find_plugins(options) == Plugins("aot", ptx="// ptx")
    (folder / plugin_files.LIBRARY).write_bytes(b"")
    assert find_plugins(options) == Plugins("library", folder / plugin_files.LIBRARY)
    assert find_plugins(CompileOptions(flavour="tensorrt", plugins="none")) == INLINED
    assert find_plugins(CompileOptions(flavour="tensorrt-rtx")) is None


@pytest.mark.parametrize(("form", "words"), [("library", "has no libdspark_plugins.so"), ("aot", "there is no nvcc")])
def test_a_form_that_cannot_be_had_is_refused(folder: Path, form: Any, words: str) -> None:
    with pytest.raises(errors.UsageError, match=words):
        find_plugins(CompileOptions(flavour="tensorrt", plugins=form))


def test_unknown_forms_and_sizes_are_refused() -> None:
    with pytest.raises(errors.UsageError, match="--plugins some is unknown; choose auto, library, aot, none"):
        CompileOptions(plugins="some")  # type: ignore[arg-type]
    require_limits(CompileOptions(), 262_144)
    with pytest.raises(errors.UsageError, match=r"--verify-rows 129 is more than the 128"):
        require_limits(CompileOptions(ranges=Ranges(verify_rows=129)), VOCAB)
    with pytest.raises(errors.UsageError, match=r"a vocabulary of 262145 is more"):
        require_limits(CompileOptions(), 262_145)


def test_a_library_tensorrt_cannot_load_is_named(compiled: Path, tmp_path: Path, folder: Path) -> None:
    bundle = Path(shutil.copytree(compiled, tmp_path / "bundle"))
    (folder / plugin_files.LIBRARY).write_bytes(b"no library")
    options = CompileOptions(ranges=OPTIONS.ranges, graphs=("verify",), plugins="library")
    with pytest.raises(errors.EngineBuildError, match=r"graph verify cannot get its plugins: .*cannot be loaded"):
        compile_bundle(bundle, options)
    assert len(BundleFiles.open(bundle).manifest.engines) == 2


class Registry:
    """TensorRT's registry: what is loaded, and what a library brings."""

    def __init__(self, brings: dict[str, str], loads: bool = True) -> None:
        self.known: dict[str, str] = {}
        self.brings, self.loads, self.loaded = brings, loads, list[str]()

    def get_creator(self, name: str, version: str, namespace: str) -> object | None:
        return object() if namespace == "dspark" and self.known.get(name) == version else None

    def load_library(self, path: str) -> object | None:
        self.loaded.append(path)
        self.known.update(self.brings if self.loads else {})
        return object() if self.loads else None


def trt_of(registry: Registry) -> SimpleNamespace:
    return SimpleNamespace(get_plugin_registry=lambda: registry, __version__="10.13")


def test_the_library_is_loaded_once_and_its_version_counts(tmp_path: Path) -> None:
    library = tmp_path / plugin_files.LIBRARY
    registry = Registry({"VerifyTree": "1"})
    for _ in range(2):
        load_plugins(trt_of(registry), library, {"VerifyTree": "1"})
    assert registry.loaded == [str(library)]
    with pytest.raises(errors.EnginePluginMismatch, match=r"no plugin dspark::VerifyTree version 2"):
        load_plugins(trt_of(registry), library, {"VerifyTree": "2"})
    with pytest.raises(errors.EngineRefused, match=r"cannot be loaded .* headers of that version"):
        load_plugins(trt_of(Registry({}, loads=False)), library, {"VerifyTree": "1"})
    with pytest.raises(errors.EngineRefused, match="set DSPARK_PLUGINS"):
        load_plugins(trt_of(Registry({})), None, {"VerifyTree": "1"})


def test_an_engine_with_other_plugins_is_refused(compiled: Path, tmp_path: Path) -> None:
    files = BundleFiles.open(compiled)
    engine = files.manifest.engines[0]
    require_plugins(engine, None)
    other = engine.model_copy(update={"plugins": {"VerifyTree": "7"}, "plugin_form": "aot"})
    with pytest.raises(errors.EnginePluginMismatch, match=r"plugin VerifyTree of version 7, this runtime's is 1"):
        require_plugins(other, None)
    same = engine.model_copy(update={"plugins": {"VerifyTree": "1"}, "plugin_form": "library"})
    require_plugins(same, tmp_path)
    with pytest.raises(errors.EnginePluginMismatch, match=r"was not found; .* or compile the bundle again"):
        require_plugins(same, None)


def test_no_plan_reaches_tensorrt_before_its_plugins_are_there(compiled: Path, tmp_path: Path) -> None:
    files = BundleFiles.open(compiled)
    entry = files.manifest.engines[0]
    entry = entry.model_copy(update={"plugins": {"VerifyTree": "1"}, "plugin_form": "library"})
    registry, order = Registry({"VerifyTree": "1"}), list[str]()

    class Runtime:
        engine_host_code_allowed = True

        def __init__(self, logger: object) -> None:
            order.append("runtime")

        def deserialize_cuda_engine(self, plan: bytes) -> None:
            assert not self.engine_host_code_allowed
            order.append("deserialize")

    trt = trt_of(registry)
    trt.Runtime, trt.Logger = Runtime, type("Logger", (), {"ERROR": 0, "__init__": lambda self, level: None})

    def load(library: Path | None) -> LoadedPlan:
        return LoadedPlan(
            files,
            entry,
            RecordedCuda(),
            device=lambda: ADA,
            library=lambda flavour: trt,
            version=lambda flavour: entry.version,
            plugins=lambda: library,
        )

    with pytest.raises(errors.EnginePluginMismatch):
        load(None)
    registry.brings = {"VerifyTree": "0"}
    with pytest.raises(errors.EnginePluginMismatch, match="no plugin dspark::VerifyTree version 1"):
        load(tmp_path / "lib.so")
    assert order == []
    registry.brings = {"VerifyTree": "1"}
    with pytest.raises(errors.EngineRefused, match="refused the engine of target though it is undamaged"):
        load(tmp_path / "lib.so")
    assert order == ["runtime", "deserialize"]
