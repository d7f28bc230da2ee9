"""Damages built bundles on purpose: the files change and the manifest is made to agree, as a faulty build would be."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx

from dspark_runtime.bundle.files import sha256_of
from dspark_runtime.bundle.manifest import MANIFEST, FileEntry, Manifest


def copied(bundle: Path, to: Path) -> Path:
    """A copy that may be damaged."""
    shutil.copytree(bundle, to)
    return to


def sign(bundle: Path) -> None:
    """Make the manifest agree with the files."""
    manifest = Manifest.parse((bundle / MANIFEST).read_bytes())
    files = {
        name: FileEntry(sha256=sha256_of(bundle / name), size=(bundle / name).stat().st_size) for name in manifest.files
    }
    (bundle / MANIFEST).write_text(manifest.model_copy(update={"files": files}).model_dump_json(), "utf-8")


def edit(bundle: Path, graph: str, change: Callable[[onnx.GraphProto], int]) -> None:
    """Apply ``change`` to every form of ``graph``; it tells how many places it changed, and there must be one."""
    changed = 0
    for path in sorted((bundle / "onnx").glob(f"{graph}.*onnx")) or [bundle / "onnx" / f"{graph}.onnx"]:
        model = onnx.load(path, load_external_data=False)
        changed += change(model.graph)
        onnx.save(model, path)
    assert changed
    sign(bundle)


def scale_weight(bundle: Path, graph: str, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Replace the stored bytes of an initializer, in place, by those of ``change`` of its numbers."""
    model = onnx.load(bundle / "onnx" / f"{graph}.onnx", load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.name == name)
    place = {entry.key: entry.value for entry in tensor.external_data}
    kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    path = bundle / "onnx" / place["location"]
    data = bytearray(path.read_bytes())
    start, length = int(place.get("offset", 0)), int(place["length"])
    old = np.frombuffer(
        bytes(data[start : start + length]), kind if kind.itemsize * np.prod(tensor.dims) == length else np.uint8
    )
    data[start : start + length] = change(old.copy()).astype(old.dtype).tobytes()
    path.write_bytes(data)
    sign(bundle)
