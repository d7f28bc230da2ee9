"""Opening bundles: what is accepted, and every way a folder can be missing, damaged or of another version."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dspark_runtime.bundle.files import BundleFiles
from dspark_runtime.bundle.manifest import Manifest
from dspark_runtime.errors import BundleError, DamagedBundle, IncompatibleBundle

GRAPH = b"graph bytes"
WEIGHTS = b"weights" * 100
FILES = {"onnx/target.onnx": GRAPH, "onnx/weights.data": WEIGHTS, "tokenizer/tokenizer.json": b"{}"}


def manifest_dict() -> dict[str, Any]:
    return {
        "schema_version": 1,
        "created_by": "dspark-export 0.1.0",
        "created_at": "2026-01-01T00:00:00Z",
        "tools": {"onnx": "1.23.0"},
        "source": {"kind": "local", "id": "model", "revision": None, "files": {}},
        "model": {
            "architecture": "LlamaForCausalLM",
            "model_type": "llama",
            "vocab_size": 100,
            "hidden_size": 8,
            "num_layers": 2,
            "max_positions": 64,
            "cache": [{"kv_heads": 1, "key_dim": 4, "value_dim": 4, "window": None}] * 2,
            "eos_token_ids": [2],
            "bos_token_id": 1,
            "pad_token_id": None,
        },
        "graphs": [
            {
                "name": "target",
                "variant": "standard",
                "file": "onnx/target.onnx",
                "data_files": ["onnx/weights.data"],
                "dtype": "float32",
                "layers": None,
                "inputs": [{"name": "input_ids", "dtype": "int64", "shape": ["batch", "tokens"]}],
                "outputs": [],
            }
        ],
        "drafters": [
            {"name": "ngram", "kind": "ngram", "graph": None, "settings": {"max_ngram": 3}, "agreement": None}
        ],
        "precision": {"weights": "fp32", "head": False, "embedding": False, "exact": True},
        "costs": {"threads": 2, "device": "cpu", "context": 128, "ms": {"target": {"1": 20.5, "2": 21.0}}},
        "files": {
            name: {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
            for name, content in FILES.items()
        },
        "validation": {},
    }


def write_bundle(root: Path, change: Callable[[dict[str, Any]], None] = lambda manifest: None) -> Path:
    for name, content in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    manifest = manifest_dict()
    change(manifest)
    (root / "manifest.json").write_text(json.dumps(manifest))
    return root


def test_open_gives_manifest_and_paths(tmp_path: Path) -> None:
    bundle = BundleFiles.open(write_bundle(tmp_path / "bundle"))
    assert bundle.manifest.model.cache[1].key_dim == 4
    assert bundle.path("onnx/weights.data").read_bytes() == WEIGHTS
    assert bundle.graph("target", prefer=["onnxruntime-cpu"]).variant == "standard"
    assert not bundle.has_graph("self_draft")
    with pytest.raises(IncompatibleBundle, match=r"self_draft.*it has target"):
        bundle.graph("self_draft")
    with pytest.raises(DamagedBundle):
        bundle.path("../other")


def test_preferred_variant_wins(tmp_path: Path) -> None:
    def add_variant(manifest: dict[str, Any]) -> None:
        manifest["graphs"].append(manifest["graphs"][0] | {"variant": "onnxruntime-cpu"})

    bundle = BundleFiles.open(write_bundle(tmp_path / "bundle", add_variant))
    assert bundle.graph("target", prefer=["onnxruntime-cpu"]).variant == "onnxruntime-cpu"
    assert bundle.graph("target").variant == "standard"


def test_manifest_round_trips() -> None:
    manifest = Manifest.parse(json.dumps(manifest_dict()).encode())
    assert Manifest.parse(manifest.model_dump_json().encode()) == manifest


def test_the_bundle_folder_itself_may_be_reached_through_a_symlink(tmp_path: Path) -> None:
    write_bundle(tmp_path / "bundle")
    (tmp_path / "link").symlink_to("bundle")
    assert BundleFiles.open(tmp_path / "link").manifest.model.vocab_size == 100


def edit(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        place: Any = manifest
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return change


ENTRY = {"sha256": "0" * 64, "size": 1}


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        pytest.param(edit("schema_version", value=2), IncompatibleBundle, "upgrade", id="newer schema"),
        pytest.param(edit("schema_version", value=0), IncompatibleBundle, "unknown schema", id="schema 0"),
        pytest.param(edit("schema_version", value="1"), DamagedBundle, "schema_version", id="schema as text"),
        pytest.param(edit("schema_version", value=True), DamagedBundle, "schema_version", id="schema as bool"),
        pytest.param(edit("colour", value=1), IncompatibleBundle, "colour", id="unknown key"),
        pytest.param(edit("model", "colour", value=1), IncompatibleBundle, "model.colour", id="unknown nested key"),
        pytest.param(
            edit("model", "cache", 0, value={"kv_heads": 1, "key_dim": 4, "value_dim": 4, "x": 1}),
            IncompatibleBundle,
            "model.cache.0.x",
            id="unknown cache key",
        ),
        pytest.param(edit("model", "vocab_size", value=True), DamagedBundle, "vocab_size", id="bool dim"),
        pytest.param(edit("model", "vocab_size", value=0), DamagedBundle, "vocab_size", id="zero dim"),
        pytest.param(edit("model", "vocab_size", value=1.5), DamagedBundle, "vocab_size", id="fractional dim"),
        pytest.param(
            edit("model", "num_layers", value=3), DamagedBundle, "2 cache layers for 3", id="layers and cache"
        ),
        pytest.param(
            edit("model", "eos_token_ids", value=[100]), DamagedBundle, "outside the vocabulary", id="eos range"
        ),
        pytest.param(edit("precision", "weights", value="int3"), DamagedBundle, "precision.weights", id="precision"),
        pytest.param(edit("drafters", 0, "agreement", value=1.5), DamagedBundle, "agreement", id="agreement above 1"),
        pytest.param(edit("drafters", 0, "graph", value="self_draft"), DamagedBundle, "self_draft", id="no such graph"),
        pytest.param(edit("graphs", value=[]), DamagedBundle, "standard target", id="no target"),
        pytest.param(
            edit("graphs", 0, "file", value="onnx/other.onnx"), DamagedBundle, "other.onnx", id="unlisted graph"
        ),
        pytest.param(
            edit("graphs", 0, "file", value="../target.onnx"), DamagedBundle, "plain relative", id="graph ../"
        ),
        pytest.param(
            edit("graphs", 0, "data_files", value=["/etc/passwd"]), DamagedBundle, "plain", id="data absolute"
        ),
        pytest.param(edit("files", "../x", value=ENTRY), DamagedBundle, "plain relative", id="file ../"),
        pytest.param(edit("files", "/etc/hostname", value=ENTRY), DamagedBundle, "plain relative", id="file absolute"),
        pytest.param(edit("files", "a\\b", value=ENTRY), DamagedBundle, "plain relative", id="backslash"),
        pytest.param(edit("files", "C:x", value=ENTRY), DamagedBundle, "plain relative", id="drive"),
        pytest.param(edit("files", "a//b", value=ENTRY), DamagedBundle, "plain relative", id="empty part"),
        pytest.param(edit("files", "reports/none", value=ENTRY), DamagedBundle, "missing", id="missing file"),
        pytest.param(edit("files", "onnx/target.onnx", "size", value=1), DamagedBundle, "bytes", id="size differs"),
        pytest.param(
            edit("files", "onnx/target.onnx", "sha256", value="0" * 64), DamagedBundle, "altered", id="digest"
        ),
        pytest.param(edit("files", "onnx/target.onnx", "sha256", value="zz"), DamagedBundle, "sha256", id="no digest"),
        pytest.param(edit("costs", "ms", "target", value={"one": 1.0}), DamagedBundle, "costs", id="rows not a number"),
        pytest.param(edit("costs", "ms", "target", "1", value=float("nan")), DamagedBundle, "JSON", id="NaN"),
    ],
)
def test_wrong_manifest(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], error: type[BundleError], says: str
) -> None:
    with pytest.raises(error) as caught:
        BundleFiles.open(write_bundle(tmp_path / "bundle", change))
    assert type(caught.value) is error
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[]", "JSON list"),
        (b"\xff\xfe", "not valid JSON"),
        (b'{"a":' * 100_000, "not valid JSON"),
        (b" " * (16 * 2**20 + 1), "larger than"),
        (b"{}", "schema_version"),
        (b'{"schema_version": 1}', "Field required"),
    ],
    ids=["empty", "cut", "list", "not utf-8", "deep", "huge", "no schema", "only schema"],
)
def test_unreadable_manifest(tmp_path: Path, text: bytes, says: str) -> None:
    root = write_bundle(tmp_path / "bundle")
    (root / "manifest.json").write_bytes(text)
    with pytest.raises(DamagedBundle) as caught:
        BundleFiles.open(root)
    assert says in str(caught.value)


def symlinked_file(root: Path) -> None:
    outside = root.parent / "outside"
    (root / "onnx/weights.data").rename(outside)
    (root / "onnx/weights.data").symlink_to(outside)


def symlinked_folder(root: Path) -> None:
    (root / "onnx").rename(root.parent / "onnx-outside")
    (root / "onnx").symlink_to(root.parent / "onnx-outside")


def hard_link(root: Path) -> None:
    os.link(root / "onnx/weights.data", root.parent / "outside")


def fifo(root: Path) -> None:
    (root / "onnx/weights.data").unlink()
    os.mkfifo(root / "onnx/weights.data")


def folder_for_file(root: Path) -> None:
    (root / "onnx/weights.data").unlink()
    (root / "onnx/weights.data").mkdir()


def file_for_folder(root: Path) -> None:
    (root / "tokenizer/tokenizer.json").unlink()
    (root / "tokenizer").rmdir()
    (root / "tokenizer").write_bytes(b"")


def truncated(root: Path) -> None:
    (root / "onnx/weights.data").write_bytes(WEIGHTS[:-1])


def flipped(root: Path) -> None:
    (root / "onnx/weights.data").write_bytes(b"W" + WEIGHTS[1:])


def missing(root: Path) -> None:
    (root / "onnx/target.onnx").unlink()


def unlisted(root: Path) -> None:
    (root / "onnx/extra.data").write_bytes(b"x")


def unlisted_symlink(root: Path) -> None:
    (root / "onnx/extra").symlink_to("/etc")


def manifest_symlink(root: Path) -> None:
    (root / "manifest.json").rename(root.parent / "manifest.json")
    (root / "manifest.json").symlink_to(root.parent / "manifest.json")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (symlinked_file, "symlink"),
        (symlinked_folder, "symlink"),
        (hard_link, "hard link"),
        (fifo, "regular file"),
        (folder_for_file, "regular file"),
        (file_for_folder, "missing"),
        (truncated, "bytes"),
        (flipped, "altered"),
        (missing, "missing"),
        (unlisted, "not in its manifest"),
        (unlisted_symlink, "not in its manifest"),
        (manifest_symlink, "symlink"),
    ],
)
def test_damaged_files(tmp_path: Path, damage: Callable[[Path], None], says: str) -> None:
    root = write_bundle(tmp_path / "bundle")
    damage(root)
    with pytest.raises(DamagedBundle) as caught:
        BundleFiles.open(root)
    assert says in str(caught.value)


def test_skipping_digests_still_checks_sizes_and_links(tmp_path: Path) -> None:
    root = write_bundle(tmp_path / "bundle")
    flipped(root)
    assert BundleFiles.open(root, verify=False).root == root
    truncated(root)
    with pytest.raises(DamagedBundle):
        BundleFiles.open(root, verify=False)


def test_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="does not exist"):
        BundleFiles.open(tmp_path / "none")
    with pytest.raises(BundleError, match="no manifest"):
        BundleFiles.open(tmp_path)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(BundleError, match="not a folder"):
        BundleFiles.open(tmp_path / "file")
