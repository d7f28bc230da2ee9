"""What waits for what while a loop runs on streams. No GPU: calls are recorded (tests/engines/recorded_cuda.py).

Nothing is computed, so that every logit is zero and every token 0; drafts of zeros are accepted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pytest

from dspark_runtime.backends.device import DeviceEngine, DeviceRunner, Plan
from dspark_runtime.backends.device_graph import DeviceGraphEngine, DeviceGraphRunner
from dspark_runtime.backends.device_shapes import largest_sizes
from dspark_runtime.backends.protocol import StepBuffers, TreeCheck, TreeVerdicts
from dspark_runtime.bundle.files import BundleFiles
from dspark_runtime.decoding.loop import DecodingLoop, LoopOptions
from dspark_runtime.decoding.request import Limits, make_requests
from dspark_runtime.decoding.round import Accepted
from dspark_runtime.decoding.schedule import Schedule
from dspark_runtime.decoding.stream import Stream
from dspark_runtime.drafters.base import Draft, Drafter, DraftRequest
from dspark_runtime.drafters.choice import DrafterChoice
from dspark_runtime.drafters.parts import DraftOptions
from dspark_runtime.phrases.store import PhraseStore
from dspark_runtime.speculation.costs import PassCosts
from dspark_runtime.speculation.tree import TokenTree
from tests.drafting.conftest import Pairs
from tests.drafting.imitated import entry_of
from tests.engines.recorded_cuda import RecordedCuda, RecordedKernels, RecordedPlan

LONG = [list(range(3, 60)), [7] * 40]  # prompts of several chunks
LANES = ("copy", "draft", "target", "host")


class Branching(Drafter):
    """Proposes a wrong token, and after it the right one: rows 0 and 2 of the pass are accepted."""

    name = "branching"

    def draft(self, request: DraftRequest) -> Draft:
        return Draft(TokenTree([request.tokens[-1], 5, 0], [-1, 0, 0]))


class Watched:
    """A runner whose arrays the loop writes before a pass and reads after it."""

    def __init__(self, runner: DeviceRunner, cuda: RecordedCuda) -> None:
        self._runner, self._cuda = runner, cuda
        self._buffers: StepBuffers | None = None
        self.trees = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def prepare(self, tokens: int, rows: int, kv_len: int) -> StepBuffers:
        buffers = self._buffers = self._runner.prepare(tokens, rows, kv_len)
        for array in (buffers.input_ids, buffers.position_ids, buffers.write_indices, buffers.attention_mask):
            self._cuda.host(array, writes=True)
        return buffers

    def finish(self) -> TreeVerdicts | None:
        found = self._runner.finish()
        assert self._buffers is not None
        for array in (self._buffers.logits,) if found is None else (found.path, found.emitted, found.accepted):
            self._cuda.host(array, writes=False)
        return found


def _drafting(name: str) -> DraftOptions:
    """Chains from block drafters: nodes that are all zeros are not a tree."""
    return DraftOptions(branches=1) if name == "dspark" else DraftOptions()


class Recorded:
    """Engines of a bundle over recorded calls."""

    def __init__(self, files: BundleFiles, kernels: bool = False, overlap: bool = True, forget: str = "") -> None:
        self.files, self.overlap = files, overlap
        self.opened: list[DecodingLoop] = []
        self.cuda = RecordedCuda(forget=frozenset({forget}))
        self.kernels = RecordedKernels(self.cuda) if kernels else None

    def engine(self, name: str, batched: bool = False) -> DeviceEngine:
        graph = self.files.graph(name)
        entry = entry_of(graph)
        most = largest_sizes(entry)
        taps = next(int(s.shape[-1]) for s in graph.outputs if s.name == "hidden_taps")
        plan = RecordedPlan(self.cuda, {"logits": 64, "hidden_taps": 4 * most["batch"] * most["tokens"] * taps})
        options: dict[str, Any] = {"overlap": self.overlap, "kernels": self.kernels}
        return DeviceEngine(self.files, graph, entry, self.cuda, cast(Plan, plan), **options)

    def graph_engine(self, name: str, batched: bool = False) -> DeviceGraphEngine:
        graph = self.files.graph(name)
        names = [spec.name for spec in graph.outputs if not spec.name.startswith("present")]
        plan = cast(Plan, RecordedPlan(self.cuda, dict.fromkeys(names, 64)))
        return DeviceGraphEngine(self.files, graph, entry_of(graph), self.cuda, plan, overlap=self.overlap)

    def stream(self, drafters: Sequence[Drafter | str], prompts: Sequence[Sequence[int]], tokens: int) -> Stream:
        phrases = PhraseStore(self.files.manifest.model.vocab_size)
        choice = DrafterChoice(self.files, PassCosts(), phrases, self.engine, self.graph_engine)
        chosen = [
            drafter if isinstance(drafter, Drafter) else choice.make(drafter, True, _drafting(drafter))[0]
            for drafter in drafters
        ]
        requests = make_requests(prompts, Limits(self.files.manifest.model.vocab_size, 192), max_new_tokens=tokens)
        schedule = Schedule(PassCosts(), fixed=3)
        options = LoopOptions(prefill_chunk=24, most_drafts=15)

        def opened() -> DecodingLoop:
            limit = max(len(prompt) for prompt in prompts) + tokens
            loop = DecodingLoop(self.engine("target"), schedule, chosen, len(prompts), limit, None, options)
            loop.runner = cast(Any, Watched(cast(DeviceRunner, loop.runner), self.cuda))
            self.opened.append(loop)
            return loop

        return Stream(opened, requests)

    def run(self, *drafters: Drafter | str, prompts: Sequence[Sequence[int]] = LONG, tokens: int = 12) -> list[int]:
        stream = self.stream(drafters, prompts, tokens)
        for _ in stream:
            self.cuda.log.append("caller")
        return [generation.stats.rounds for generation in stream.generations]


@pytest.fixture
def files(pairs: Pairs, monkeypatch: pytest.MonkeyPatch) -> BundleFiles:
    """The bundle; its drafters' page-locked arrays are watched too."""
    fill, result = DeviceGraphRunner._fill, DeviceGraphRunner._result

    def filling(self: DeviceGraphRunner, spec: Any, dims: Any, given: Any) -> None:
        if isinstance(given, np.ndarray):
            cast(RecordedCuda, self._cuda).host(self._part(spec, dims), writes=True)
        fill(self, spec, dims, given)

    def resulting(self: DeviceGraphRunner, spec: Any, sizes: Any, inputs: Any) -> Any:
        cast(RecordedCuda, self._cuda).host(self._part(spec, _dims_of(spec, sizes)), writes=False)
        return result(self, spec, sizes, inputs)

    monkeypatch.setattr(DeviceGraphRunner, "_fill", filling)
    monkeypatch.setattr(DeviceGraphRunner, "_result", resulting)
    return pairs.bundle.files


def _dims_of(spec: Any, sizes: dict[str, int]) -> tuple[int, ...]:
    return tuple(dim if isinstance(dim, int) else sizes.get(dim, sizes["batch"]) for dim in spec.shape)


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("drafters", [(), ("ngram",), ("dspark",), ("eagle3",), ("draft-model",), ("ngram", "dspark")])
def test_every_access_is_ordered(files: BundleFiles, drafters: tuple[str, ...], kernels: bool, overlap: bool) -> None:
    recorded = Recorded(files, kernels, overlap)
    recorded.run(*drafters, Branching())
    assert recorded.cuda.races == []
    assert ("copy" in recorded.cuda.lanes.values()) == overlap


@pytest.mark.parametrize("lane", LANES)
def test_every_kind_of_wait_is_needed(files: BundleFiles, lane: str) -> None:
    recorded = Recorded(files, forget=lane)
    recorded.run("dspark", Branching())
    expected = {
        "copy": "copy_out (copy) does not wait for pass (target)",
        "draft": "copy_rows (draft) does not wait for pass (target)",
        "target": "pass (target) does not wait for copy_rows (draft)",
        "host": "the host (host) does not wait for copy_out (copy)",
    }
    assert expected[lane] in recorded.cuda.races


def test_context_is_taken_in_without_waiting(files: BundleFiles) -> None:
    """A long prompt takes the drafter three passes; what comes to the host is what the last one drafts."""
    recorded = Recorded(files)
    recorded.run("dspark", prompts=LONG[:1], tokens=4)
    log = recorded.cuda.log
    drafting = log[log.index("caller") : len(log) - log[::-1].index("pass target")]
    assert drafting.count("pass draft") == 3
    engine = recorded.graph_engine("dspark")
    assert drafting.count("copy_out copy") == len(engine.outputs)


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("drafters", [(), ("ngram",)])
def test_one_wait_a_round_and_the_host_works_beside_it(
    files: BundleFiles, monkeypatch: pytest.MonkeyPatch, drafters: tuple[str, ...], kernels: bool
) -> None:
    recorded = Recorded(files, kernels)
    watch_settling(recorded.cuda, monkeypatch)
    (rounds,) = recorded.run(*drafters, prompts=LONG[1:], tokens=40)
    own = [e for e in recorded.cuda.log if e in ("settle", "caller", "synchronize host", "record copy")]
    assert own[:5] == ["record copy", "synchronize host"] * 2 + ["caller"]  # two chunks of the prompt
    # In a round: the copy of its results is enqueued, the round before is settled and given out, then the host waits.
    first, *others = _rounds(own[5:])
    assert first == ["record copy", "synchronize host"]
    assert others == [["record copy", "settle", "caller", "synchronize host"]] * (rounds - 1) + [["settle", "caller"]]
    if kernels:  # what comes out are three arrays of integers
        assert max(recorded.cuda.copied[-rounds:]) <= 3 * 256


def watch_settling(cuda: RecordedCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    settle = Accepted.settle

    def settling(self: Accepted) -> Any:
        cuda.log.append("settle")
        return settle(self)

    monkeypatch.setattr(Accepted, "settle", settling)


def _rounds(entries: list[str]) -> list[list[str]]:
    groups: list[list[str]] = []
    for entry in entries:
        if not groups or groups[-1][-1] == "synchronize host":
            groups.append([])
        groups[-1].append(entry)
    return groups


def test_waiting_at_once_settles_before_the_next_round(files: BundleFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = Recorded(files, overlap=False)
    watch_settling(recorded.cuda, monkeypatch)
    recorded.run(prompts=LONG[1:], tokens=10)
    own = [entry for entry in recorded.cuda.log if entry in ("settle", "caller", "synchronize host")]
    assert own[3:] == ["synchronize host", "settle", "caller"] * 9


def test_a_dropped_pass_is_waited_for(files: BundleFiles) -> None:
    recorded = Recorded(files)
    stream = recorded.stream(["ngram"], LONG[1:], 40)
    for number, _ in enumerate(stream):
        if number == 5:
            stream.cancel()
    assert recorded.cuda.calls["synchronize"] == 2 + 5 + 1  # chunks, rounds, and the pass on its way
    assert stream.generations[0].finish_reason == "cancelled"
    waits = recorded.cuda.calls["synchronize"]
    cast(Any, recorded.opened[0].runner).prepare(1, 1, 60)
    assert recorded.cuda.calls["synchronize"] == waits and recorded.cuda.races == []


def test_a_pass_nobody_waited_for_is_waited_for_by_the_next(files: BundleFiles) -> None:
    recorded = Recorded(files)
    engine = recorded.engine("target")
    runner = engine.open(engine.allocate(1, 64))
    for _ in range(2):
        buffers = runner.prepare(1, 1, 20)
        recorded.cuda.host(buffers.input_ids, writes=True)
        runner.start()
    assert recorded.cuda.races == [] and recorded.cuda.calls["synchronize"] == 1
    with pytest.raises(Exception, match="verifies nothing on the GPU"):
        runner.start(cast(TreeCheck, object()))
