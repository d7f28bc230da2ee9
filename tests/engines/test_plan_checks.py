"""Plans that must not reach the deserializer, each with its own error."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dspark_runtime import errors
from dspark_runtime.backends.tensorrt_check import (
    DeviceFacts,
    checked_plan,
    refusals,
    require_device,
    require_version,
)
from dspark_runtime.bundle.engine_entry import EngineEntry
from dspark_runtime.bundle.files import BundleFiles
from dspark_runtime.bundle.manifest import MANIFEST, Manifest

AMPERE = DeviceFacts("8.6", "NVIDIA RTX A4000", 13000)
HOPPER = DeviceFacts("9.0", "NVIDIA H200", 13000)
TURING = DeviceFacts("7.5", "NVIDIA T4", 13000)


@pytest.fixture
def bundle(compiled: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(compiled, tmp_path / "bundle"))


def plan_of(bundle: Path, graph: str = "target") -> Path:
    return bundle / engine_of(bundle, graph).file


def engine_of(bundle: Path, graph: str = "target") -> EngineEntry:
    manifest = Manifest.parse((bundle / MANIFEST).read_bytes())
    return next(engine for engine in manifest.engines if engine.graph == graph)


def flip(bundle: Path) -> None:
    data = bytearray(plan_of(bundle).read_bytes())
    data[len(data) // 2] ^= 1
    plan_of(bundle).write_bytes(data)


def truncate(bundle: Path) -> None:
    plan_of(bundle).write_bytes(plan_of(bundle).read_bytes()[:-1])


def extend(bundle: Path) -> None:
    with plan_of(bundle).open("ab") as file:
        file.write(b"\0")


def empty(bundle: Path) -> None:
    plan_of(bundle).write_bytes(b"")


def swap(bundle: Path) -> None:
    target, draft = (plan_of(bundle, name).read_bytes() for name in ("target", "self_draft"))
    plan_of(bundle, "target").write_bytes(draft)
    plan_of(bundle, "self_draft").write_bytes(target)


def other_digest(bundle: Path) -> None:
    change(bundle, lambda raw: raw["files"][engine_of(bundle).file].update(sha256="0" * 64))


def change(bundle: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    raw = json.loads((bundle / MANIFEST).read_bytes())
    edit(raw)
    (bundle / MANIFEST).write_text(json.dumps(raw), encoding="utf-8")


DAMAGES = [
    (flip, errors.PlanAltered),
    (truncate, errors.PlanTruncated),
    (extend, errors.PlanExtended),
    (empty, errors.PlanEmpty),
    (swap, errors.PlanSwapped),
    (other_digest, errors.PlanAltered),
]


@pytest.mark.parametrize(("damage", "error"), DAMAGES, ids=lambda given: getattr(given, "__name__", ""))
def test_damaged_plans_are_refused(
    bundle: Path, damage: Callable[[Path], None], error: type[errors.PlanDamaged]
) -> None:
    before = BundleFiles.open(bundle)
    damage(bundle)
    after = BundleFiles(before.root, Manifest.parse((bundle / MANIFEST).read_bytes()))
    with pytest.raises(errors.PlanDamaged) as loading:
        checked_plan(after, engine_of(bundle))
    with pytest.raises(errors.PlanDamaged) as opening:
        BundleFiles.open(bundle)
    assert type(loading.value) is type(opening.value) is error
    assert engine_of(bundle).file in str(loading.value) and "again" in str(loading.value)


def test_an_intact_plan_is_given_back(bundle: Path) -> None:
    files = BundleFiles.open(bundle)
    for engine in files.manifest.engines:
        assert checked_plan(files, engine) == (bundle / engine.file).read_bytes()


def test_a_plan_of_another_version_is_refused_though_its_digest_is_right(bundle: Path) -> None:
    plan = bytearray(plan_of(bundle).read_bytes())
    assert plan[24:28] == bytes(int(part) for part in engine_of(bundle).version.split("."))
    plan[25] += 1
    plan_of(bundle).write_bytes(plan)
    digest = hashlib.sha256(plan).hexdigest()
    change(bundle, lambda raw: raw["files"][engine_of(bundle).file].update(sha256=digest))
    with pytest.raises(errors.EngineVersionMismatch, match=r"was made by tensorrt-rtx 1\.8\.1"):
        checked_plan(BundleFiles.open(bundle), engine_of(bundle))


def test_a_file_that_is_no_plan_is_refused_though_its_digest_is_right(bundle: Path) -> None:
    content = b"\x7fELF" + bytes(1000)
    plan_of(bundle).write_bytes(content)
    new = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    change(bundle, lambda raw: raw["files"][engine_of(bundle).file].update(new))
    with pytest.raises(errors.EngineVersionMismatch, match="does not begin like"):
        checked_plan(BundleFiles.open(bundle), engine_of(bundle))


def test_an_engine_of_another_graph_is_refused(bundle: Path) -> None:
    change(bundle, lambda raw: raw["engines"][0].update(graph_sha256="1" * 64))
    with pytest.raises(errors.EngineOutdated, match="another graph"):
        checked_plan(BundleFiles.open(bundle), engine_of(bundle))


def test_a_plan_that_is_a_link_is_refused(bundle: Path, tmp_path: Path) -> None:
    plan_of(bundle).rename(tmp_path / "elsewhere.plan")
    plan_of(bundle).symlink_to(tmp_path / "elsewhere.plan")
    files = BundleFiles(bundle, Manifest.parse((bundle / MANIFEST).read_bytes()))
    with pytest.raises(errors.DamagedBundle, match="symlink"):
        checked_plan(files, engine_of(bundle))


def test_versions(compiled: Path) -> None:
    engine = engine_of(compiled)
    require_version(engine, engine.version)
    for installed in ("1.7.1.117", "1.6.0.1", "2.0.0.0"):
        with pytest.raises(errors.EngineVersionMismatch, match=f"installed is {installed}"):
            require_version(engine, installed)
    with pytest.raises(errors.EngineVersionMismatch, match=f"pip install tensorrt-rtx-cu13=={engine.version}"):
        require_version(engine, None)
    portable = engine.model_copy(update={"flavour": "tensorrt", "version": "10.13.0.35", "version_compatible": True})
    require_version(portable, "10.14.1.48")
    for installed in ("10.12.0.36", "11.0.0.1"):
        with pytest.raises(errors.EngineVersionMismatch):
            require_version(portable, installed)


def test_devices(compiled: Path) -> None:
    engine = engine_of(compiled)
    for device in (AMPERE, DeviceFacts("12.0", "NVIDIA RTX 5090", 13010), DeviceFacts("13.0", "a later GPU", 14000)):
        require_device(engine, device)
    with pytest.raises(errors.EngineDeviceMismatch, match=r"--compute-capability 7\.5"):
        require_device(engine, TURING)
    with pytest.raises(errors.EngineDeviceMismatch, match=r"H200 has 9\.0.*--backend tensorrt"):
        require_device(engine, HOPPER)
    with pytest.raises(errors.EngineWithoutDevice, match="this machine has none"):
        require_device(engine, None)
    with pytest.raises(errors.EngineWithoutDevice, match=r"driver for CUDA 13\.0.*offers 12\.8"):
        require_device(engine, DeviceFacts("8.6", "NVIDIA RTX A4000", 12080))
    narrow = engine.model_copy(update={"targets": ("8.9",)})
    with pytest.raises(errors.EngineDeviceMismatch, match=r"for compute capability 8\.9"):
        require_device(narrow, AMPERE)
    wide = engine.model_copy(update={"flavour": "tensorrt", "targets": ("8.0",), "hardware_compatible": "ampere-plus"})
    require_device(wide, HOPPER)
    with pytest.raises(errors.EngineDeviceMismatch, match="on this machine"):
        require_device(wide, TURING)


def test_every_reason_is_given_at_once(compiled: Path) -> None:
    files = BundleFiles.open(compiled)
    engine = files.manifest.engines[0].model_copy(update={"graph_sha256": "1" * 64})
    engine = engine.model_copy(update={"plugins": {"VerifyTree": "0"}})
    assert len(refusals(engine, files.manifest, "1.0.0.0", TURING, None)) == 4
    assert refusals(files.manifest.engines[0], files.manifest, engine.version, AMPERE, None) == []
