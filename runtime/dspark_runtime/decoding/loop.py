"""The decoding loop: propose, verify, commit.

Between rounds this holds for every active sequence, and nothing else is remembered but statistics:

* ``tokens`` is the committed text and the only truth; its last token, the anchor, has been in no pass yet;
* the cache holds exactly the other tokens: ``cache.lengths[row] == len(tokens) - 1``;
* the active sequences occupy the cache rows ``0 .. active - 1``.

======== ==================================================== ========================================================
phase    does                                                 leaves
======== ==================================================== ========================================================
prefill  runs the prompt in chunks, draws the first token     the invariant above, one token emitted
propose  drafters give trees, the schedule cuts them          a tree per sequence, its anchor at row 0
verify   one pass over all trees behind the committed text    verdicts or logits; scratch rows in the cache
commit   follows the target's draws, keeps the accepted rows  1 to accepted + 1 tokens committed; the invariant
retire   drops finished sequences, moves the last row down    the invariant for the others
settle   makes text and statistics of what was committed      a chunk per sequence, given to the caller
======== ==================================================== ========================================================

Settling, and what the caller does with the chunks, is all that the next pass does not depend on. Where passes run
beside the host, it comes between the start of the next pass and the wait for it; elsewhere right after the commit,
before retiring. Nothing else differs: a pass on its way when the text is cancelled is waited for and dropped.

A pass that fails or is dropped leaves only scratch rows behind. A loop is used once; its cache goes with it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from tokenizers import Tokenizer

from dspark_runtime.backends.protocol import MOST_ROWS, AnyArray, Engine, FloatArray, TreeVerdicts
from dspark_runtime.decoding.device_verdicts import read_verdicts, tree_check
from dspark_runtime.decoding.fill import fill_prompt, fill_trees
from dspark_runtime.decoding.observer import Observer
from dspark_runtime.decoding.request import Request
from dspark_runtime.decoding.round import Accepted, Flight
from dspark_runtime.decoding.schedule import Schedule
from dspark_runtime.decoding.sequence import Chunk, Generation, SequenceState
from dspark_runtime.decoding.statistics import Seconds
from dspark_runtime.decoding.taps import TapReader
from dspark_runtime.drafters.base import Drafter, DraftRequest
from dspark_runtime.drafters.proposal import Proposal
from dspark_runtime.errors import BackendError
from dspark_runtime.speculation.kv_cache import KvCache, round_up
from dspark_runtime.speculation.tree import TokenTree
from dspark_runtime.speculation.verify import Verdict, verify_chain, verify_tree

_FIRST_SLOTS = 2048  # slots beyond the prompt to begin with; memory is only committed once it is written to
_clock = time.perf_counter


@dataclass(frozen=True)
class LoopOptions:
    """How passes are cut.

    ``prefill_chunk``: prompt tokens per pass. ``min_rows``: never run fewer rows of a sequence (2 avoids kernels made
    for a single row, whose rounding may differ). ``most_drafts``: draft tokens of one sequence in one pass.
    """

    prefill_chunk: int = 512
    min_rows: int = 1
    most_drafts: int = 31


class DecodingLoop:
    """Generates for one batch of requests; iterate over it for chunks, then read :meth:`generations`."""

    def __init__(
        self,
        engine: Engine,
        schedule: Schedule,
        drafters: Sequence[Drafter],
        requests: Sequence[Request],
        tokenizer: Tokenizer | None = None,
        options: LoopOptions | None = None,
        observer: Observer | None = None,
    ) -> None:
        self.options = options or LoopOptions()
        self.observer = observer or Observer()
        self.schedule = schedule
        self.drafters = list(drafters)
        self.sequences = [SequenceState(i, request, tokenizer) for i, request in enumerate(requests)]
        self.active = list(self.sequences)
        self.seconds = Seconds()
        longest = max(len(r.prompt) + r.max_new_tokens for r in requests)
        prompt = max(len(r.prompt) for r in requests)
        most = round_up(longest + MOST_ROWS)  # rows of a pass that are not accepted need slots too
        self.cache = KvCache(engine.allocate(len(requests), min(most, round_up(prompt + _FIRST_SLOTS))), most)
        self.runner = engine.open(self.cache.memory)
        self._vocab_size = engine.vocab_size
        self._drawing = not all(request.params.greedy for request in requests)
        self._readers = [TapReader.of(engine, drafter) for drafter in self.drafters if drafter.taps]
        self._flight: Flight | None = None
        self._unsettled: list[Accepted] = []
        self._cancelled = False

    def cancel(self) -> None:
        """End all sequences before the next round is committed; may be called from another thread."""
        self._cancelled = True

    def generations(self) -> list[Generation]:
        """The results, in the order of the requests."""
        return [sequence.generation() for sequence in self.sequences]

    def __iter__(self) -> Iterator[Chunk]:
        try:
            for drafter in self.drafters:
                drafter.attach(self.cache)
            self.runner.taps_wanted = not all(reader.drafter.resident for reader in self._readers)
            for sequence in self.sequences:
                if not self._cancelled:
                    yield self._prefill(sequence)
            self._retire()
            while self.active and not self._cancelled:
                try:
                    self._begin()
                finally:  # what is committed is given out also where the next pass cannot begin
                    yield from self._given(self._settle())
                if not (self._cancelled and self.runner.overlaps):
                    yield from self._end()
            yield from self._settle()
            for sequence in self.active:
                yield sequence.cancel()
        finally:
            self._drop()
            for sequence in self.active:
                self._forget(sequence)

    # A round -------------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Propose, fill and start the pass."""
        began = _clock()
        proposals = self._propose()
        trees = self.schedule.choose(proposals, len(self.active))
        drafted = _clock()
        buffers = fill_trees(self.runner, self.cache, trees, self.options.min_rows)
        check = tree_check(trees, self.active) if self._verified_there(proposals) else None
        flight = Flight(proposals, trees, buffers, began, drafted, filled=_clock())
        self.runner.start(check)
        flight.started = _clock()
        self._flight = flight
        self.observer.started(flight)

    def _end(self) -> list[Chunk]:
        """Wait for the pass and commit; chunks, unless they are better made beside the next pass."""
        flight, self._flight = self._flight, None
        assert flight is not None
        flight.waited = _clock()
        found = self.runner.finish()
        flight.verified = _clock()
        parts = self._unsettled = self._commit_all(flight, found)
        flight.committed = _clock()
        self.observer.finished(flight)
        chunks = [] if self.runner.overlaps else self._settle()
        self._account(flight, sum(len(part.tokens) for part in parts))
        if any(sequence.finished for sequence in self.active):
            self._retire()
        return chunks

    def _settle(self) -> list[Chunk]:
        """Text and statistics of what was committed last."""
        parts, self._unsettled = self._unsettled, []
        if not parts:
            return []
        began = _clock()
        chunks = [part.settle() for part in parts]
        self.observer.settled(chunks, began, _clock())
        return chunks

    def _given(self, chunks: Sequence[Chunk]) -> Iterator[Chunk]:
        """Chunks, and how long the caller has them while a pass runs."""
        for chunk in chunks:
            left = _clock()
            yield chunk
            if self._flight is not None:
                self._flight.away += _clock() - left

    def _drop(self) -> None:
        """Wait for a pass whose results nobody wants: its buffers must not be used while it runs."""
        flight, self._flight = self._flight, None
        if flight is not None:
            with suppress(BackendError):
                self.runner.finish()

    # Prefill -------------------------------------------------------------------------------------------------------

    def _prefill(self, sequence: SequenceState) -> Chunk:
        began = _clock()
        prompt, row = sequence.request.prompt, sequence.row
        for drafter in self.drafters:
            drafter.begin(sequence.index, prompt)
        for start in range(0, len(prompt), self.options.prefill_chunk):
            part = prompt[start : start + self.options.prefill_chunk]
            buffers, rows = (
                fill_prompt(self.runner, self.cache, row, start, part, self.options.min_rows),
                range(len(part)),
            )
            self.runner.start()
            self.cache.commit(row, rows)
            self._collect(sequence, 0, rows)
            self.runner.finish()
            self._show(sequence, buffers.taps, 0, rows)
        first = sequence.sampler.draw(buffers.logits[0, 0], len(prompt))
        chunk = sequence.chunk(sequence.append([first]))
        for drafter in self.drafters:
            drafter.commit(sequence.index, chunk.tokens)
        took = _clock() - began
        self.seconds.prefill += took
        sequence.stats.seconds = Seconds(prefill=took)
        return chunk

    def _show(self, sequence: SequenceState, taps: AnyArray | None, batch_row: int, rows: Sequence[int]) -> None:
        """Hand the features of rows that became context to the drafters that read them in host memory."""
        for reader in self._readers:
            if not reader.drafter.resident:
                assert taps is not None  # they are wanted
                reader.drafter.observe(sequence.index, sequence.row, taps[batch_row][rows][:, reader.columns])

    def _collect(self, sequence: SequenceState, batch_row: int, rows: Sequence[int]) -> None:
        """The same for drafters that take them from the device; the pass may still be on its way."""
        for reader in self._readers:
            if reader.drafter.resident:
                assert self.runner.resident is not None  # the drafter has seen the cache it comes with
                taps = self.runner.resident
                reader.drafter.collect(sequence.index, sequence.row, taps, batch_row, rows, reader.runs)

    # Propose -------------------------------------------------------------------------------------------------------

    def _propose(self) -> list[Proposal]:
        batch, most = len(self.active), self.options.most_drafts
        proposals = [Proposal.empty(s.index, s.tokens[-1]) for s in self.active]
        for drafter in self.drafters:
            requests = [
                DraftRequest(s.index, s.row, s.tokens, min(most, s.remaining - 1), sampler=s.sampler)
                for s in self.active
            ]
            if drafter.pass_ms and not (drafter.steady and self._drawing):
                self._weigh(drafter, requests, proposals)
                if not any(request.limit for request in requests):
                    continue
            drafter.select(batch)
            for proposal, draft in zip(proposals, drafter.propose(requests), strict=True):
                within = None if draft is None else draft.within(self._vocab_size)
                if within is not None:
                    proposal.add(drafter, within)
        return proposals

    def _weigh(self, drafter: Drafter, requests: Sequence[DraftRequest], proposals: Sequence[Proposal]) -> None:
        """Let a drafter that costs passes of its own draft only as far as it pays."""
        batch = len(requests)
        floor = self.schedule.floor(drafter, batch)
        for request, proposal in zip(requests, proposals, strict=True):
            request.limit = self.schedule.worth_drafting(drafter, request.request, proposal, request.limit, batch)
            request.floor = floor
            request.rate = self.schedule.acceptance.rates(drafter, request.request)

    # Verify --------------------------------------------------------------------------------------------------------

    def _verified_there(self, proposals: Sequence[Proposal]) -> bool:
        """Whether the backend verifies this round; else verdicts follow from the logits."""
        return self.runner.verifies and all(
            drawn_from(*each) is None for each in zip(self.active, proposals, strict=True)
        )

    # Commit --------------------------------------------------------------------------------------------------------

    def _commit_all(self, flight: Flight, found: TreeVerdicts | None) -> list[Accepted]:
        verdicts = [None] * len(self.active) if found is None else read_verdicts(found)
        each = zip(self.active, flight.proposals, flight.trees, verdicts, strict=True)
        return [self._commit(*parts, flight) for parts in each]

    def _commit(
        self,
        sequence: SequenceState,
        proposal: Proposal,
        tree: TokenTree,
        verdict: Verdict | None,
        flight: Flight,
    ) -> Accepted:
        row, buffers = sequence.row, flight.buffers
        if verdict is None:
            verdict = self._verdict(sequence, proposal, tree, buffers.logits[row])
        self.cache.commit(row, verdict.path)
        self._collect(sequence, row, verdict.path)
        self._show(sequence, buffers.taps, row, verdict.path)
        tokens = sequence.append(verdict.tokens)
        for part in proposal.parts:  # what is verified next depends on it
            self.schedule.acceptance.learn(part.drafter, part.draft, tokens, sequence.index)
        for drafter in self.drafters:
            drafter.commit(sequence.index, tokens)
        accepted = Accepted(sequence, row, proposal, tree, verdict, tokens)
        self.observer.committed(accepted, flight)
        return accepted

    def _verdict(self, sequence: SequenceState, proposal: Proposal, tree: TokenTree, logits: FloatArray) -> Verdict:
        start = len(sequence.tokens) - 1
        probs = drawn_from(sequence, proposal)
        if probs is not None:
            return verify_chain(tree.tokens[1:], probs, logits, sequence.sampler, start)
        return verify_tree(tree, logits, sequence.sampler.draw, start)

    def _account(self, flight: Flight, emitted: int) -> None:
        done = _clock()
        pass_s = self.runner.pass_ms / 1e3 or flight.verified - flight.filled
        drafting = flight.drafted - flight.began
        passing = max(pass_s, flight.verified - flight.filled - flight.away)
        host = (flight.filled - flight.drafted) + (done - flight.verified)
        self.seconds.draft += drafting
        self.seconds.verify += passing
        self.seconds.host += host
        batch, rows = flight.buffers.input_ids.shape
        self.schedule.observe(batch, rows, emitted, pass_s * 1e3, (drafting + passing + host) * 1e3)

    # Retire --------------------------------------------------------------------------------------------------------

    def _retire(self) -> None:
        """Drop finished sequences; the last active one takes the cache row of each."""
        for row in range(len(self.active) - 1, -1, -1):
            gone = self.active[row]
            if not gone.finished:
                continue
            prefill = gone.stats.seconds.prefill
            gone.stats.seconds = replace(self.seconds, prefill=prefill)
            self._forget(gone)
            last = self.active.pop()
            if last is not gone:
                self.cache.replace(row, last.row)
                for drafter in self.drafters:
                    drafter.move(last.row, row)
                last.row = row
                self.active[row] = last

    def _forget(self, sequence: SequenceState) -> None:
        self.schedule.acceptance.forget(sequence.index)
        for drafter in self.drafters:
            drafter.end(sequence.index)


def drawn_from(sequence: SequenceState, proposal: Proposal) -> FloatArray | None:
    """What a draft that rejection sampling verifies was drawn from; None for all others."""
    sampled = proposal.sampled
    return None if sampled is None or sequence.request.params.greedy else sampled.probs
