"""Writing a bundle: complete or not there, whatever goes wrong on the way."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from dspark_export.bundle.writer import BundleWriter
from dspark_runtime.bundle.files import BundleFiles
from dspark_runtime.bundle.manifest import Manifest
from dspark_runtime.errors import BundleBusy, BundleError, BundleNotWritten, DamagedBundle
from tests.runtime.bundle.test_bundle import manifest_dict


def manifest() -> Manifest:
    return Manifest.model_validate(manifest_dict() | {"files": {}})


def write_graph(folder: Path, location: str = "weights.data", offset: int = 0) -> None:
    """onnx/target.onnx with one external tensor of 64 bytes, and its data."""
    (folder / "onnx").mkdir(parents=True, exist_ok=True)
    (folder / "onnx" / "weights.data").write_bytes(bytes(64))
    tensor = ir.ExternalTensor(
        location, offset, 64, ir.DataType.FLOAT, shape=ir.Shape([16]), name="w", base_dir=str(folder / "onnx")
    )
    weight = ir.Value(name="w", const_value=tensor, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([16]))
    given = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([16]))
    node = ir.node("Add", [given, weight], num_outputs=1)
    graph = ir.Graph([given], node.outputs, nodes=[node], initializers=[weight], opset_imports={"": 24}, name="g")
    ir.save(ir.Model(graph, ir_version=11), folder / "onnx" / "target.onnx")


def write_bundle(out: Path, overwrite: bool = False, note: str = "first") -> Manifest:
    with BundleWriter(out, overwrite) as writer:
        write_graph(writer.dir)
        writer.add("reports/note.txt", note)
        return writer.commit(manifest())


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_commit_makes_a_bundle_that_opens(tmp_path: Path) -> None:
    written = write_bundle(tmp_path / "bundle")
    opened = BundleFiles.open(tmp_path / "bundle")
    assert opened.manifest == written
    assert set(written.files) == {"onnx/target.onnx", "onnx/weights.data", "reports/note.txt"}
    assert names(tmp_path) == {"bundle"}


def test_parents_are_made_and_an_empty_folder_is_fine(tmp_path: Path) -> None:
    write_bundle(tmp_path / "a" / "b" / "bundle")
    (tmp_path / "empty").mkdir()
    write_bundle(tmp_path / "empty")
    assert BundleFiles.open(tmp_path / "empty").manifest.files


def test_preview_can_be_opened_and_changed_before_commit(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "bundle") as writer:
        write_graph(writer.dir)
        writer.preview(manifest())
        assert BundleFiles.open(writer.dir).manifest.files
        writer.add("reports/late.txt", "late")
        writer.commit(manifest())
    assert "reports/late.txt" in BundleFiles.open(tmp_path / "bundle").manifest.files


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(1), BundleError("x")])
def test_an_error_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), BundleWriter(tmp_path / "deep" / "bundle") as writer:
        write_graph(writer.dir)
        raise error
    assert names(tmp_path) == set()


def test_leaving_without_commit_leaves_nothing(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "bundle") as writer:
        write_graph(writer.dir)
    assert names(tmp_path) == set()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS])
@pytest.mark.parametrize("native", [False, True])
def test_a_failed_write_is_typed_and_leaves_nothing(tmp_path: Path, code: int, native: bool) -> None:
    """``native``: as the Rust libraries report it, by text only."""
    error = Exception(f"{os.strerror(code)} (os error {code})") if native else OSError(code, os.strerror(code), "x")
    with pytest.raises(BundleNotWritten, match=r"choose another"), BundleWriter(tmp_path / "bundle") as writer:
        write_graph(writer.dir)
        raise RuntimeError("saving failed") from error
    assert names(tmp_path) == set()


def test_permission_errors_elsewhere_are_not_blamed_on_the_bundle(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), BundleWriter(tmp_path / "bundle"):
        raise PermissionError(errno.EACCES, "no", "/somewhere/else")


@pytest.mark.parametrize("at", ["rename", "fsync"])
def test_a_failing_commit_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    with pytest.raises(BundleNotWritten), BundleWriter(tmp_path / "bundle") as writer:
        write_graph(writer.dir)
        monkeypatch.setattr(os, at, fail)
        writer.commit(manifest())
    assert names(tmp_path) == set()


def test_an_existing_bundle_is_kept_unless_asked(tmp_path: Path) -> None:
    write_bundle(tmp_path / "bundle")
    with pytest.raises(BundleNotWritten, match="--overwrite"):
        write_bundle(tmp_path / "bundle", note="second")
    assert (tmp_path / "bundle/reports/note.txt").read_text() == "first"
    write_bundle(tmp_path / "bundle", overwrite=True, note="second")
    assert (tmp_path / "bundle/reports/note.txt").read_text() == "second"
    assert names(tmp_path) == {"bundle"}


def test_a_failed_overwrite_keeps_the_old_bundle(tmp_path: Path) -> None:
    write_bundle(tmp_path / "bundle")
    with pytest.raises(ValueError), BundleWriter(tmp_path / "bundle", overwrite=True) as writer:
        write_graph(writer.dir)
        raise ValueError
    assert BundleFiles.open(tmp_path / "bundle")
    assert names(tmp_path) == {"bundle"}


def a_file(out: Path) -> None:
    out.write_text("precious")


def a_symlink(out: Path) -> None:
    out.symlink_to(out.parent)


def a_folder_with_other_things(out: Path) -> None:
    out.mkdir()
    (out / "thesis.tex").write_text("precious")


def a_file_as_parent(out: Path) -> None:
    out.parent.rmdir()
    out.parent.write_text("precious")


@pytest.mark.parametrize("there", [a_file, a_symlink, a_folder_with_other_things, a_file_as_parent])
def test_nothing_but_a_bundle_is_ever_replaced(tmp_path: Path, there: Callable[[Path], None]) -> None:
    (tmp_path / "parent").mkdir()
    out = tmp_path / "parent" / "bundle"
    there(out)
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    with pytest.raises(BundleNotWritten):
        write_bundle(out, overwrite=True)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_a_second_build_is_refused(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "bundle") as writer:
        with pytest.raises(BundleBusy, match="another build"):
            write_bundle(tmp_path / "bundle")
        assert writer.dir.is_dir(), "the second build must not clean up after the first"
        write_graph(writer.dir)
        writer.commit(manifest())
    write_bundle(tmp_path / "bundle", overwrite=True)


def test_another_process_is_refused(tmp_path: Path) -> None:
    code = (
        "import sys; from dspark_export.bundle.writer import BundleWriter\n"
        "with BundleWriter(sys.argv[1]):\n print('in', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "bundle")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "in\n"
        with pytest.raises(BundleBusy):
            write_bundle(tmp_path / "bundle")
        other.kill()
    assert names(tmp_path) != set(), "a killed build leaves litter"
    write_bundle(tmp_path / "bundle")
    assert names(tmp_path) == {"bundle"}, "which the next one removes"


def test_leftovers_of_other_bundles_are_kept(tmp_path: Path) -> None:
    (tmp_path / ".other.partial-1").mkdir()
    (tmp_path / ".bundle.partial-notes").mkdir()
    (tmp_path / ".bundle.partial-1").mkdir()
    write_bundle(tmp_path / "bundle")
    assert names(tmp_path) == {"bundle", ".other.partial-1", ".bundle.partial-notes"}


def test_a_build_killed_between_the_renames_of_an_overwrite_loses_nothing(tmp_path: Path) -> None:
    write_bundle(tmp_path / "bundle")
    (tmp_path / "bundle").rename(tmp_path / ".bundle.replaced")
    with BundleWriter(tmp_path / "bundle", overwrite=True):
        assert BundleFiles.open(tmp_path / "bundle")
    assert names(tmp_path) == {"bundle"}


def symlink(folder: Path) -> None:
    (folder / "onnx/link").symlink_to("/etc/passwd")


def hard_link(folder: Path) -> None:
    os.link(folder / "onnx/weights.data", folder / "onnx/again.data")


def outside(folder: Path) -> None:
    write_graph(folder, "../../outside.data")


def absolute(folder: Path) -> None:
    write_graph(folder, "/etc/passwd")


def unlisted(folder: Path) -> None:
    write_graph(folder, "other.data")


def past_the_end(folder: Path) -> None:
    write_graph(folder, offset=1)


@pytest.mark.parametrize("damage", [symlink, hard_link, outside, absolute, unlisted, past_the_end])
def test_what_could_not_be_opened_is_not_committed(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    with pytest.raises(DamagedBundle), BundleWriter(tmp_path / "bundle") as writer:
        write_graph(writer.dir)
        damage(writer.dir)
        writer.commit(manifest())
    assert names(tmp_path) == set()


def test_a_manifest_that_names_missing_files_is_not_committed(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="did not write"), BundleWriter(tmp_path / "bundle") as writer:
        writer.commit(manifest())
    assert names(tmp_path) == set()


def test_the_manifest_is_readable_json(tmp_path: Path) -> None:
    write_bundle(tmp_path / "bundle")
    values = json.loads((tmp_path / "bundle/manifest.json").read_text())
    assert values["schema_version"] == 1 and values["files"]["onnx/weights.data"]["size"] == 64
    assert np.frombuffer((tmp_path / "bundle/onnx/weights.data").read_bytes(), np.float32).shape == (16,)
