"""Damages built bundles on purpose: the files change and the manifest is made to agree, as a faulty build would be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx

from dspark_export.passes.packed_weights import LAYOUT, layout_of
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
    """Replace the stored bytes of a weight, in place, by those of ``change`` of its numbers; packed or not."""
    model = onnx.load(bundle / "onnx" / f"{graph}.onnx", load_external_data=False)
    layouts = [json.loads(p.value) for n in model.graph.node for p in n.metadata_props if p.key == LAYOUT]
    facts = next((facts for facts in layouts if facts["weight"] == name), None)
    stored = name if facts is None else facts["source"]
    tensor = next(t for t in model.graph.initializer if t.name == stored)
    place = {entry.key: entry.value for entry in tensor.external_data}
    kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    path = bundle / "onnx" / place["location"]
    data = bytearray(path.read_bytes())
    start, length = int(place.get("offset", 0)), int(place["length"])
    old = np.frombuffer(
        bytes(data[start : start + length]), kind if kind.itemsize * np.prod(tensor.dims) == length else np.uint8
    )
    if facts is None:
        new = change(old.copy()).astype(old.dtype)
    else:
        layout = layout_of(facts)
        plain = layout.unpack(old.reshape(tensor.dims))
        new = layout.pack(change(plain.copy()).astype(plain.dtype))
    data[start : start + length] = new.tobytes()
    path.write_bytes(data)
    sign(bundle)
