"""The order of what the TensorRT backend enqueues. No GPU: who reads and writes what is recorded, nothing computed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_runtime import errors
from dspark_runtime.backends.cuda import COMPACT_NAME, COMPACT_SOURCE
from dspark_runtime.backends.device import DeviceEngine, DeviceRunner, Plan
from dspark_runtime.backends.device_cache import DeviceCache
from dspark_runtime.backends.device_graph import _stored
from dspark_runtime.backends.device_layout import to_float32
from dspark_runtime.backends.device_shapes import pass_shape
from dspark_runtime.bundle.engine_entry import EngineEntry
from dspark_runtime.bundle.files import BundleFiles
from dspark_runtime.speculation.kv_cache import KvCache
from tests.engines.recorded_cuda import RecordedCuda, RecordedPlan


@pytest.fixture
def files(compiled: Path) -> BundleFiles:
    return BundleFiles.open(compiled)


def engine_of(files: BundleFiles, cuda: RecordedCuda, name: str = "target", **options: Any) -> DeviceEngine:
    graph = files.graph(name)
    entry = next(engine for engine in files.manifest.engines if engine.graph == name)
    plan = RecordedPlan(cuda, {"logits": 64})
    return DeviceEngine(files, graph, entry, cuda, cast(Plan, plan), **options)


def one_pass(runner: DeviceRunner, cuda: RecordedCuda, tokens: int, kv_len: int, rows: int | None = None) -> None:
    """What the loop does: prepare, fill, run, read."""
    buffers = runner.prepare(tokens, tokens if rows is None else rows, kv_len)
    for array in (buffers.input_ids, buffers.position_ids, buffers.write_indices, buffers.attention_mask):
        cuda.host(array, writes=True)
    runner.run()
    cuda.host(buffers.logits, writes=False)


def rounds(files: BundleFiles, cuda: RecordedCuda) -> None:
    """Prefill, then rounds of self-draft, verify and compaction over one cache memory."""
    target, draft = engine_of(files, cuda), engine_of(files, cuda, "self_draft")
    memory = target.allocate(2, 64)
    cache, verifier, drafter = KvCache(memory, 128), target.open(memory), draft.open(memory)
    for row in range(2):
        verifier.select(row, 1)
        one_pass(verifier, cuda, 20, 20, rows=1)
        cache.commit(row, range(20))
    for number in range(6):
        for step in range(3):
            drafter.select(0, 2)
            one_pass(drafter, cuda, 1, 21 + 2 * number + step, rows=1)
        verifier.select(0, 2)
        one_pass(verifier, cuda, 5, 25 + 2 * number)
        for row in range(2):
            cache.commit(row, [0, 2 + number % 2])
    cache.replace(0, 1)


def test_everything_waits_for_what_it_reads(files: BundleFiles) -> None:
    cuda = RecordedCuda()
    rounds(files, cuda)
    assert cuda.races == []
    assert cuda.calls["compact"] == 12 and cuda.calls["copy_rows"] == 4 and cuda.calls["launch"] > 0


def test_a_missing_wait_is_found(files: BundleFiles) -> None:
    cuda = RecordedCuda(forget=frozenset({"host"}))
    rounds(files, cuda)
    assert any("the host (host) does not wait for copy_out (copy)" in race for race in cuda.races)
    assert any("the host (host) does not wait for copy_in (target)" in race for race in cuda.races)


def test_lists_of_rows_wait_only_where_no_pass_was_waited_for(files: BundleFiles) -> None:
    cuda = RecordedCuda()
    engine = engine_of(files, cuda)
    memory = engine.allocate(2, 64)
    runner = engine.open(memory)
    for _ in range(6):
        one_pass(runner, cuda, 5, 25)
        for row in range(2):
            memory.gather(row, [22, 24], 21)
    assert cuda.calls["synchronize"] == 6  # those of the passes
    for _ in range(2):  # with those of the last round there are four lists on their way, and no more
        memory.gather(0, [22, 24], 21)
    assert cuda.calls["synchronize"] == 6
    memory.gather(0, [22, 24], 21)
    assert cuda.calls["synchronize"] == 7


def test_engines_of_one_model_share_a_stream(files: BundleFiles) -> None:
    cuda = RecordedCuda()
    target, draft = engine_of(files, cuda), engine_of(files, cuda, "self_draft")
    memory = target.allocate(1, 64)
    before = cuda._handles
    target.open(memory), draft.open(memory)
    assert not [handle for handle in cuda._clocks if handle > before]


def test_a_round_waits_once_and_a_known_shape_is_one_launch(files: BundleFiles) -> None:
    cuda = RecordedCuda()
    engine = engine_of(files, cuda)
    runner = engine.open(engine.allocate(1, 64))
    plan = cast(RecordedPlan, engine.plan)
    for number in range(5):
        calls = cuda.calls.copy()
        one_pass(runner, cuda, 4, 30 + number)
        made = cuda.calls - calls
        assert made["synchronize"] == 1
        if number == 0:
            assert (made["launch"], made["pass"]) == (0, 1)
        elif number == 1:  # once to settle the shape, once while capturing
            assert (made["launch"], made["pass"], len(plan.contexts)) == (1, 2, 2)
        else:
            assert made == {"launch": 1, "wait": 1, "copy_out": 1, "synchronize": 1, "record": 3}
    one_pass(runner, cuda, 3, 40)  # the same shape after padding
    assert len(plan.contexts) == 2 and cuda.races == []


def test_without_replay_passes_are_enqueued(files: BundleFiles) -> None:
    cuda = RecordedCuda()
    engine = engine_of(files, cuda, replay=False)
    runner = engine.open(engine.allocate(1, 64))
    for number in range(4):
        one_pass(runner, cuda, 4, 30 + number)
    assert cuda.calls["launch"] == 0 and len(cast(RecordedPlan, engine.plan).contexts) == 1


def test_bindings(files: BundleFiles) -> None:
    """Past and present are one address, shifted to the first sequence; shapes stay inside their profile."""
    cuda = RecordedCuda()
    engine = engine_of(files, cuda)
    memory = engine.allocate(2, 64)
    runner, plan = engine.open(memory), cast(RecordedPlan, engine.plan)
    runner.select(1, 1)
    one_pass(runner, cuda, 30, 30, rows=1)
    runner.select(0, 2)
    one_pass(runner, cuda, 3, 40)
    for first, (profile, shapes, addresses) in zip((1, 0), plan.passes, strict=True):
        dims = engine.entry.profiles[profile].dims
        for spec in files.graph("target").inputs:
            for dim, size in zip(spec.shape, shapes[spec.name], strict=True):
                low, _, high = dims[dim] if isinstance(dim, str) else (dim, dim, dim)
                assert low <= size <= high, spec.name
        for layer in engine.layers:
            for part in ("key", "value"):
                past, present = addresses[f"past_key_values.{layer}.{part}"], addresses[f"present.{layer}.{part}"]
                assert past == present == memory.cache.tensor(layer, part, first)
    assert [profile for profile, _, _ in plan.passes] == [1, 0]
    heads, width = engine.cache[0].kv_heads, engine.cache[0].key_dim
    assert memory.cache.tensor(0, "key", 1) - memory.cache.tensor(0, "key", 0) == heads * 128 * width * 2


def test_padding_sees_one_slot_and_is_seen_by_none(files: BundleFiles) -> None:
    cuda = RecordedCuda()
    engine = engine_of(files, cuda)
    runner = engine.open(engine.allocate(2, 64))
    runner._inputs.host.fill(255)  # what an earlier pass may have left
    buffers = runner.prepare(3, 3, 40)
    buffers.attention_mask[:] = True
    shape = runner._shape
    assert shape is not None and (shape.tokens, shape.rows, shape.kv_len) == (4, 4, 64)
    ids, _, _, logit_rows, mask, _ = runner._views[shape]
    assert mask[:, :, :3, :40].all() and not mask[:, :, :, 40:].any()
    assert mask[:, :, 3, 0].all() and not mask[:, :, 3, 1:].any()
    assert not ids[:, 3:].any() and not logit_rows[:, 3:].any()
    assert buffers.logits.shape == (2, 3, engine.vocab_size)


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_shapes_cover_the_pass_and_stay_inside_the_engine(data: st.DataObject, compiled: Path) -> None:
    entry = BundleFiles.open(compiled, verify=False).manifest.engines[0]
    batch, start = data.draw(st.integers(1, 2)), data.draw(st.integers(0, 127))
    tokens = data.draw(st.integers(1, min(32, 128 - start)))
    rows = data.draw(st.sampled_from([1, tokens] if tokens <= 8 else [1, 8]))
    shape = pass_shape(entry, batch, tokens, rows, start + tokens)
    dims = entry.profiles[shape.profile].dims
    assert shape.tokens >= tokens and shape.rows >= rows and shape.kv_len >= start + shape.tokens
    assert start + shape.tokens <= entry.capacity
    for name in ("batch", "tokens", "rows", "kv_len"):
        assert dims[name][0] <= getattr(shape, name) <= dims[name][2]


@pytest.mark.parametrize("sizes", [(3, 1, 1, 1), (1, 33, 1, 33), (1, 9, 9, 9), (1, 1, 1, 129)])
def test_passes_beyond_the_engine_are_refused(files: BundleFiles, sizes: tuple[int, int, int, int]) -> None:
    with pytest.raises(errors.EngineRangeExceeded, match="--verify-rows"):
        pass_shape(files.manifest.engines[0], *sizes)


def test_memory_beyond_the_engine_is_refused(files: BundleFiles) -> None:
    engine = engine_of(files, RecordedCuda())
    with pytest.raises(errors.EngineRangeExceeded, match="--batch"):
        engine.allocate(3, 64)
    with pytest.raises(errors.CapacityError, match="--max-length"):
        engine.allocate(1, 192)
    memory = engine.allocate(1, 64)
    assert memory.capacity == 128
    with pytest.raises(errors.CapacityError):
        memory.resize(129, 0)
    with pytest.raises(ValueError, match="do not rise"):
        memory.gather(0, [5, 4], 2)


def test_memory_of_another_backend_is_refused(files: BundleFiles) -> None:
    from dspark_runtime.backends.ort import HostCache

    engine, cuda = engine_of(files, RecordedCuda()), RecordedCuda()
    with pytest.raises(errors.BackendError, match="cannot use a HostCache"):
        engine.open(HostCache(files.manifest.model.cache, "float16", 1, 128))
    with pytest.raises(errors.BackendError, match="share 64"):
        engine.open(DeviceCache(cuda, files.manifest.model.cache, 1, 64, "float16"))


def test_bfloat16_is_rounded_to_nearest_even() -> None:
    numbers = np.array([1.0, 1.00390625, 1.01171875, -3.1415927, 0.0, 65504.0], np.float32)
    bits = _stored(numbers, "bfloat16")
    assert bits.tolist() == [0x3F80, 0x3F80, 0x3F82, 0xC049, 0x0000, 0x4780]
    assert to_float32(bits, "bfloat16")[3] == np.float32(-3.140625)
    half = np.array([0.5, -2.0], np.float16)
    assert to_float32(half.view(np.uint16), "float16").tolist() == [0.5, -2.0]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc to compile the kernel; running it needs a GPU")
def test_the_compaction_kernel_compiles(tmp_path: Path) -> None:
    (tmp_path / "compact.cu").write_text(COMPACT_SOURCE, encoding="utf-8")
    command = ["nvcc", "-cubin", "-arch=sm_80", "-o", str(tmp_path / "compact.cubin"), str(tmp_path / "compact.cu")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert COMPACT_NAME.encode() in (tmp_path / "compact.cubin").read_bytes()


def test_entries_say_what_was_compiled(files: BundleFiles) -> None:
    entry: EngineEntry = files.manifest.engines[0]
    assert engine_of(files, RecordedCuda()).largest == {
        "batch": 2,
        "tokens": 32,
        "rows": 8,
        "kv_len": 128,
        "capacity": entry.capacity,
    }
