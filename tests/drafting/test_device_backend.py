"""The device backend generates what the CPU backend generates: same bundle, same prompts, every way of drafting.

Its passes are carried out by ONNX Runtime in host memory, from the graphs as engines are compiled from them: profiles,
padding, captured passes, fixed caches and their compaction are those of a GPU. What a GPU computes is for tests/gpu.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from dspark_export.build.options import BuildOptions
from dspark_export.build.pipeline import build
from dspark_runtime import Bundle, errors
from dspark_runtime.backends.opening import DeviceBackend, HostBackend, open_backend
from dspark_runtime.decoding.sequence import Generation
from tests import tiny_models
from tests.drafting.conftest import Pairs
from tests.drafting.imitated import PROMPTS, Opened
from tests.plugins.launched import Imitated


@pytest.fixture(scope="module")
def opened(pairs: Pairs, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return Opened(pairs.bundle.files.root, tmp_path_factory.mktemp("device") / "bundle")


@pytest.fixture(scope="module")
def self_drafting(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Opened]:
    folder = tmp_path_factory.mktemp("self")
    model = tiny_models.save_checkpoint("llama", folder / "model", head_dim=16, num_hidden_layers=3)
    build(BuildOptions(str(model), folder / "bundle", self_draft="layers=0,2"))
    return Bundle.open(folder / "bundle", threads=1), Opened(folder / "bundle", folder / "device")


def counts(generation: Generation) -> dict[str, Any]:
    """What was drafted, verified and accepted, without times."""
    stats = dataclasses.asdict(generation.stats)
    del stats["seconds"]
    return stats


def tokens(bundle: Bundle, prompts: list[list[int]], **options: Any) -> Iterator[list[int]]:
    found = bundle.generate(prompts, ignore_eos=True, **{"max_new_tokens": 40, **options})
    return (generation.tokens for generation in found)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("place", range(13))
def test_it_generates_what_the_cpu_generates(
    pairs: Pairs, opened: Opened, place: int, batch_size: int, temperature: float
) -> None:
    modes = [mode for mode in pairs.bundle.speculation_modes() if mode != "auto"]
    if place >= len(modes):
        pytest.skip(f"the bundle has {len(modes)} modes")
    options = {"speculate": modes[place], "batch_size": batch_size, "temperature": temperature, "seed": 3}
    drafts = {} if modes[place] == "off" else {"draft_length": 6}
    both = [
        bundle.generate(PROMPTS, ignore_eos=True, max_new_tokens=40, **options, **drafts)
        for bundle in (pairs.bundle, opened.bundle)
    ]
    expected, found = ([(g.tokens, g.stats.verified, g.stats.accepted) for g in each] for each in both)
    if "store" in modes[place]:  # what was likely beside the tokens stays on a device that verifies there
        assert [one[0] for one in found] == [one[0] for one in expected]
        assert temperature or sum(one[2] for one in found) > 0
    else:
        assert found == expected  # accepted ones too: features that go astray on their way to a drafter change them


@pytest.mark.parametrize("mode", ["off", "ngram", "self-draft", "ngram+self-draft"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_so_does_a_self_draft(self_drafting: tuple[Bundle, Opened], mode: str, batch_size: int) -> None:
    cpu, device = self_drafting
    for draft_length in (3, 9, None) if mode != "off" else (None,):
        options = {"speculate": mode, "batch_size": batch_size, "draft_length": draft_length}
        assert list(tokens(device.bundle, PROMPTS, **options)) == list(tokens(cpu, PROMPTS, **options))


def test_graphs_are_replayed_and_memory_is_made_once(self_drafting: tuple[Bundle, Opened]) -> None:
    _, device = self_drafting
    list(tokens(device.bundle, PROMPTS, speculate="ngram", batch_size=3, draft_length=4))
    allocated, launched, contexts = device.cuda.allocated, device.cuda.launched, [len(p.profiles) for p in device.plans]
    list(tokens(device.bundle, PROMPTS, speculate="ngram", batch_size=3, draft_length=4))
    assert device.cuda.allocated == allocated
    assert device.cuda.launched > launched + 10
    assert [len(p.profiles) for p in device.plans] == contexts


def test_threads_share_an_engine(self_drafting: tuple[Bundle, Opened]) -> None:
    cpu, device = self_drafting
    options: dict[str, Any] = {"speculate": "ngram", "draft_length": 4}
    expected = [list(tokens(cpu, [prompt], **options)) for prompt in PROMPTS]
    with ThreadPoolExecutor(3) as pool:
        jobs = [
            pool.submit(lambda p: list(tokens(device.bundle.with_fresh_schedule(), [p], **options)), prompt)
            for _ in range(4)
            for prompt in PROMPTS
        ]
        assert [job.result() for job in jobs] == expected * 4


def test_memory_goes_back_with_its_bundle(self_drafting: tuple[Bundle, Opened]) -> None:
    folder = self_drafting[1].bundle.files.root.parent
    other = Opened(folder / "bundle", folder / "freed")
    list(tokens(other.bundle, PROMPTS, speculate="ngram"))
    cuda, before = other.cuda, len(other.cuda._memory)
    del other
    gc.collect()
    assert len(cuda._memory) <= before - 2 * 3  # key and value of every layer, and more


def test_trees_move_rows_on_the_device(opened: Opened, pairs: Pairs) -> None:
    before = opened.cuda.compacted
    modes = [mode for mode in pairs.bundle.speculation_modes() if mode not in ("auto", "off", "ngram")]
    for mode in modes:
        list(tokens(opened.bundle, PROMPTS, speculate=mode, draft_length=8))
    assert opened.cuda.compacted > before


@pytest.fixture(scope="module")
def verifying(pairs: Pairs, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    folder = tmp_path_factory.mktemp("verifying")
    return Opened(pairs.bundle.files.root, folder / "bundle", Imitated.make(folder))


SAMPLING: tuple[dict[str, Any], ...] = (
    {"temperature": 0.9, "seed": 4},
    {"temperature": 1.1, "top_k": 30, "top_p": 0.9, "min_p": 0.01},
)


@pytest.fixture(scope="module")
def drawn_plainly(verifying: Opened) -> Callable[[int, int], list[list[int]]]:
    """Texts of plain decoding on the device, by size of the batch and number of the sampling."""

    @functools.cache
    def drawn(batch_size: int, number: int) -> list[list[int]]:
        options = {"speculate": "off", "batch_size": batch_size, "max_new_tokens": 20, **SAMPLING[number]}
        return list(tokens(verifying.bundle, PROMPTS, **options))

    return drawn


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("mode", ["off", "ngram", "dspark", "eagle3", "ngram+dspark"])
def test_trees_are_verified_on_the_device(
    pairs: Pairs,
    verifying: Opened,
    drawn_plainly: Callable[[int, int], list[list[int]]],
    mode: str,
    batch_size: int,
) -> None:
    """Greedy text is the CPU's. With a temperature the kernel adds up weights in another order than the host, so the
    text is compared with plain decoding on the device."""
    assert verifying.verifier is not None
    before = verifying.verifier.launches
    options: dict[str, Any] = {"speculate": mode, "batch_size": batch_size, "max_new_tokens": 20}
    drafts = {} if mode == "off" else {"draft_length": 5}
    assert list(tokens(verifying.bundle, PROMPTS, **options, **drafts)) == list(
        tokens(pairs.bundle, PROMPTS, **options)
    )
    assert verifying.verifier.launches > before
    for number, sampling in enumerate(SAMPLING):
        found = list(tokens(verifying.bundle, PROMPTS, **options, **drafts, **sampling))
        assert found == drawn_plainly(batch_size, number)


def test_random_drafts_are_still_verified_by_rejection(verifying: Opened) -> None:
    assert verifying.verifier is not None
    options: dict[str, Any] = {"speculate": "dspark", "temperature": 1.0, "draft_sampling": "rejection"}
    found = verifying.bundle.generate(PROMPTS[0], max_new_tokens=12, ignore_eos=True, **options)
    assert len(found.tokens) == 12


def test_limits_are_those_of_the_engine(opened: Opened) -> None:
    limits = opened.bundle._backend.limits
    assert (limits.slots, limits.batch, limits.rows, limits.chunk) == (256, 3, 16, 24)
    assert opened.bundle.limits.positions == limits.positions == 192
    with pytest.raises(errors.CapacityError):
        opened.bundle.generate([1] * 190, max_new_tokens=10)
    assert len(list(tokens(opened.bundle, [[1, 2, 3]] * 5, batch_size=8, speculate="off"))) == 5


def test_a_pass_that_cannot_be_captured_is_enqueued(self_drafting: tuple[Bundle, Opened]) -> None:
    cpu, device = self_drafting
    device.cuda.captures = False
    other = Opened(device.bundle.files.root.parent / "bundle", device.bundle.files.root.parent / "uncaptured")
    other.cuda.captures = False
    assert list(tokens(other.bundle, PROMPTS, speculate="ngram")) == list(tokens(cpu, PROMPTS, speculate="ngram"))
    assert other.cuda.launched == 0


def test_what_cannot_be_opened_is_refused(pairs: Pairs) -> None:
    files, options = pairs.bundle.files, pairs.bundle.engine_options
    assert isinstance(open_backend(files, "onnxruntime", options), HostBackend)
    with pytest.raises(errors.UsageError, match=r"backend 'cuda' is unknown; choose onnxruntime, onnxruntime-cuda"):
        open_backend(files, "cuda", options)
    with pytest.raises(errors.UsageError, match="device=-1: give the number of a GPU"):
        open_backend(files, "tensorrt", options, -1)
    with pytest.raises(errors.IncompatibleBundle, match=r"no tensorrt-rtx engine of target; run `dspark-export"):
        open_backend(files, "tensorrt-rtx", options)
    backend = DeviceBackend(files, "onnxruntime-cuda", options, device=lambda number: None)
    with pytest.raises(errors.EngineWithoutDevice, match="there is no GPU 0; leave out --backend"):
        backend.engine("target", False)


def test_without_a_gpu_an_engine_is_refused(opened: Opened) -> None:
    files, options = opened.bundle.files, opened.bundle.engine_options
    backend = DeviceBackend(files, "tensorrt", options, device=lambda number: None)
    with pytest.raises(errors.EngineWithoutDevice, match=r"needs an NVIDIA GPU of compute capability 8\.9"):
        backend.engine("target", False)
