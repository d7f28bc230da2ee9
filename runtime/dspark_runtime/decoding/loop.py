"""The decoding loop: propose, verify, commit. Sequences join and leave while it runs.

Between steps this holds for every running sequence, and nothing else is remembered but statistics:

* ``tokens`` is the committed text and the only truth; its last token, the anchor, has not been in a pass yet;
* the cache holds exactly the other tokens: ``cache.lengths[row] == len(tokens) - 1``;
* rows are as :mod:`dspark_runtime.decoding.batch` says.

======== ==================================================== ========================================================
phase    does                                                 leaves
======== ==================================================== ========================================================
prompt   one chunk of one prompt; the last draws a token      the invariant above, one token emitted
propose  drafters give trees, the schedule cuts them          a tree per sequence, its anchor at row 0
verify   one pass over all trees after the committed text    verdicts or logits; scratch rows in the cache
commit   follows the target's draws, keeps the accepted rows  1 to accepted + 1 tokens committed; the invariant
retire   drops finished sequences, moves the last row down    the invariant for the others
settle   makes text and statistics of what was committed      a chunk per sequence, given to the caller
======== ==================================================== ========================================================

A *step* is a chunk of one prompt, or a *round* (propose to settle) of all running sequences. No text depends on what
else is in the batch, on when it joined or left, or on the order of steps, wherever passes compute a row alike whatever
runs beside it (see docs/exactness.md).

The next pass depends on everything except settling and what the caller does with the chunks. Where passes run
beside the host, a step ends with the next pass in flight and settles the previous round while it runs; elsewhere a step
is a whole round. Nothing else differs: a pass in flight when its text is cancelled is waited for and dropped.

A pass that fails or is dropped leaves only scratch rows behind.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from tokenizers import Tokenizer

from dspark_runtime.arrays import AnyArray, FloatArray
from dspark_runtime.backends.protocol import MOST_ROWS, Engine, TreeVerdicts
from dspark_runtime.decoding.batch import Batch
from dspark_runtime.decoding.device_verdicts import read_verdicts, tree_check
from dspark_runtime.decoding.fill import fill_prompt, fill_trees
from dspark_runtime.decoding.observer import Observer
from dspark_runtime.decoding.propose import Proposer
from dspark_runtime.decoding.request import Request
from dspark_runtime.decoding.round import Accepted, Flight
from dspark_runtime.decoding.schedule import Schedule
from dspark_runtime.decoding.sequence import Chunk, SequenceState
from dspark_runtime.decoding.taps import TapReader
from dspark_runtime.drafters.base import Drafter
from dspark_runtime.drafters.proposal import Proposal
from dspark_runtime.errors import BackendError, CapacityError
from dspark_runtime.speculation.kv_cache import KvCache, round_up
from dspark_runtime.speculation.top import top_tokens
from dspark_runtime.speculation.tree import TokenTree
from dspark_runtime.speculation.verify import Verdict, verify_chain, verify_tree

_clock = time.perf_counter


@dataclass(frozen=True)
class LoopOptions:
    """How passes are cut.

    ``prefill_chunk``: prompt tokens per pass. ``min_rows``: never run fewer rows of a sequence (2 avoids kernels made
    for a single row, whose rounding may differ). ``most_drafts``: draft tokens of one sequence in one pass.
    ``first_slots``: cache slots beyond a prompt to begin with; memory is only committed once it is written to.
    ``reuse_prefixes``: keep the context of texts that have ended for prompts that begin alike.
    """

    prefill_chunk: int = 512
    min_rows: int = 1
    most_drafts: int = 31
    first_slots: int = 2048
    reuse_prefixes: bool = False


class DecodingLoop:
    """Generates for up to ``rows`` requests at a time; knows no queue and no thread.

        sequence = loop.admit(request)  # whenever loop.free
        while loop.busy:
            for chunk in loop.step():
                ...
        sequence.generation()

    Args:
        engine: the target.
        schedule: how much is drafted and verified.
        drafters: may be none. They serve this loop until it is closed.
        rows: sequences there is room for.
        limit: most tokens of prompt and text of one sequence.
        tokenizer: for text; None gives token ids only.
        options: how passes are cut.
        observer: hears what happens.

    Raises:
        CapacityError: no memory for the cache.
        IncompatibleBundle: a drafter reads features that this target does not give.
    """

    def __init__(
        self,
        engine: Engine,
        schedule: Schedule,
        drafters: Sequence[Drafter],
        rows: int,
        limit: int,
        tokenizer: Tokenizer | None = None,
        options: LoopOptions | None = None,
        observer: Observer | None = None,
    ) -> None:
        self.options = options or LoopOptions()
        self.observer = observer or Observer()
        self.schedule = schedule
        self.drafters = list(drafters)
        self.limit = limit
        most = round_up(limit + MOST_ROWS)  # rows of a pass that are not accepted need slots too
        self.cache = KvCache(engine.allocate(rows, min(most, round_up(self.options.first_slots))), most)
        self.runner = engine.open(self.cache.memory)
        self.batch = Batch(self.cache, self.drafters, self.options.reuse_prefixes)
        self._proposer = Proposer(self.drafters, schedule, self.options.most_drafts, engine.vocab_size)
        self._tokenizer = tokenizer
        self._numbers = itertools.count()
        self._readers = [TapReader.of(engine, drafter) for drafter in self.drafters if drafter.taps]
        self._wants_top = any(drafter.wants_top for drafter in self.drafters)
        self._flight: Flight | None = None
        self._unsettled: list[Accepted] = []
        self._failure: tuple[Exception, list[SequenceState], bool] | None = None
        self.failing: list[SequenceState] = []
        self.sound = True
        self.prompt_tokens = 0
        self._left = 0.0  # when the caller was given the loop back
        for drafter in self.drafters:
            drafter.attach(self.cache)
        self.runner.taps_wanted = not all(reader.drafter.resident for reader in self._readers)

    # Coming and going ----------------------------------------------------------------------------------------------

    @property
    def free(self) -> int:
        """Requests that can be admitted now."""
        return self.batch.free

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return len(self.batch) > 0 or self._flight is not None or self._failure is not None

    @property
    def running(self) -> int:
        """Sequences that take part in the next round."""
        return len(self.batch.running)

    @property
    def prompts(self) -> int:
        """Sequences whose first token is to come."""
        return len(self.batch) - len(self.batch.running)

    def admit(self, request: Request) -> SequenceState:
        """Let a request in, between any two steps. Its prompt waits for its turn; indices count the requests from 0.

        Raises:
            UsageError: all rows are taken.
            CapacityError: the request is longer than the loop's limit.
        """
        longest = len(request.prompt) + request.max_new_tokens
        if longest > self.limit:
            raise CapacityError(
                f"a request of {longest} tokens, prompt and text together, and the limit is {self.limit}; shorten it"
            )
        sequence = SequenceState(next(self._numbers), request, self._tokenizer)
        self.batch.admit(sequence)
        return sequence

    def not_admitted(self, request: Request) -> SequenceState:
        """The sequence of a request that is given up before it was admitted; it has ended."""
        sequence = SequenceState(next(self._numbers), request, None)
        sequence.cancel()
        return sequence

    def cancel(self, sequence: SequenceState) -> Chunk:
        """End one text where it is now, between two steps; its last chunk. ValueError if it has ended already."""
        if sequence.finished:
            raise ValueError(f"sequence {sequence.index} has ended already")
        chunk = sequence.cancel()
        if self._flight is None:
            self._retire()  # otherwise when the pass is over: rows stay where they are as long as it runs
        return chunk

    def close(self) -> None:
        """Leave the loop in the middle: waits for a pass on its way, and forgets all sequences."""
        flight, self._flight = self._flight, None
        if flight is not None:  # its buffers must not be used while it runs
            with suppress(BackendError):
                self.runner.finish()
        for sequence in [*self.batch.running, *self.batch.waiting, self.batch.filling]:
            if sequence is not None and not sequence.finished:
                sequence.cancel()
        self._retire()
        self._unsettled, self._failure = [], None

    # Steps ---------------------------------------------------------------------------------------------------------

    def step(self, rounds_first: bool = False, chunk: int | None = None) -> list[Chunk]:
        """Run one chunk of one prompt, or one round of all running sequences; the new text.

        Prompts come first, in the order they were admitted, so that as many sequences as possible share a round. With
        ``rounds_first`` prompts wait as long as anything runs: alternate it with the other to bound what a prompt
        adds to the others' time, and give the most tokens of such a chunk. ``prompt_tokens`` is how many it had
        afterwards, 0 for a round.

        Raises:
            BackendError: a pass failed. Sequences are as they were before: go on, cancel them or close the loop. What
                was committed before is given out first; the step after it raises. ``failing`` has the sequences
                concerned; ``sound`` is whether the pass went through and only their logits were NaN, so that all
                others were served.
        """
        if self._failure is not None:
            (failure, self.failing, self.sound), self._failure = self._failure, None
            raise failure
        if self._flight is not None:
            self._flight.away += _clock() - self._left
        try:
            self.failing, self.sound, self.prompt_tokens = [], True, 0
            chunks = self._advance(rounds_first, chunk or self.options.prefill_chunk)
        except Exception as error:
            chunks = self._settle()
            if not chunks:
                raise
            self._failure = (error, self.failing, self.sound)
        self._left = _clock()
        return chunks

    def _advance(self, rounds_first: bool, chunk: int) -> list[Chunk]:
        if self._flight is not None:
            self._land()
        prompts = self.batch.filling is not None or self.batch.waiting
        first: list[Chunk] = []
        if prompts and not (rounds_first and self.batch.running):
            first = self._prompt(min(chunk, self.options.prefill_chunk))
        elif self.batch.running:
            self._begin()
            if not self.runner.overlaps:
                return self._land()
        return [*self._settle(), *first]

    @contextmanager
    def _failing_with(self, sequences: Sequence[SequenceState], sound: bool = False) -> Iterator[None]:
        """What fails inside concerns these sequences; ``sound``: the pass itself went through."""
        try:
            yield
        except Exception:
            self.failing, self.sound = list(sequences), sound
            raise

    # A round -------------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Propose, fill and start the pass."""
        began = _clock()
        running = list(self.batch.running)
        with self._failing_with(running):
            proposals = self._proposer.propose(running)
            trees = self.schedule.choose(proposals, len(running))
            drafted = _clock()
            buffers = fill_trees(self.runner, self.cache, trees, self.options.min_rows)
            verified_there = self.runner.verifies and all(map(_needs_no_logits, running, proposals))
            check = tree_check(trees, running) if verified_there else None
            flight = Flight(running, proposals, trees, buffers, began, drafted, _clock(), check is not None)
            self.runner.start(check)
        flight.started = _clock()
        self._flight = flight
        self.observer.started(flight)

    def _land(self) -> list[Chunk]:
        """Wait for the pass and commit; chunks, unless they are better made beside the next pass."""
        flight, self._flight = self._flight, None
        assert flight is not None
        flight.waited = _clock()
        with self._failing_with(flight.sequences):
            found = self.runner.finish()
        flight.verified = _clock()
        if not all(sequence.finished for sequence in flight.sequences):  # cancelled since the pass began
            self._commit_all(flight, found)
            flight.committed = _clock()
            self.observer.finished(flight)
        emitted = sum(len(part.tokens) for part in self._unsettled)
        chunks = [] if self.runner.overlaps else self._settle()
        if emitted:
            self._account(flight, emitted)
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

    # Prompts -------------------------------------------------------------------------------------------------------

    def _prompt(self, most: int) -> list[Chunk]:
        """One chunk of a prompt, of at most ``most`` tokens; the first token after its last one."""
        began = _clock()
        sequence = self.batch.next_prompt()
        assert sequence is not None
        with self._failing_with([sequence]):
            logits = self._read_prompt(sequence, most)
        chunks = []
        if self.cache.lengths[sequence.row] == len(sequence.request.prompt):
            with self._failing_with([sequence], sound=True):
                chunks.append(self._first_token(sequence, logits))
            self.batch.filled()
        sequence.stats.seconds.prefill += _clock() - began
        self._retire()
        return chunks

    def _read_prompt(self, sequence: SequenceState, most: int) -> FloatArray:
        """Make the next ``most`` tokens of a prompt context; logits [1, vocab] of the last one."""
        prompt, row = sequence.request.prompt, sequence.row
        start = self.cache.lengths[row]
        if start == 0 and len(prompt) + self.options.min_rows > self.cache.memory.capacity:
            self.cache.reserve(min(self.cache.limit, round_up(len(prompt) + self.options.first_slots)))
        part = prompt[start : start + most]
        rows = range(len(part))
        self.prompt_tokens = len(part)
        buffers = fill_prompt(self.runner, self.cache, row, start, part, self.options.min_rows)
        self.runner.start()
        self.cache.commit(row, rows)
        try:
            self._collect(sequence, 0, rows)
            self.runner.finish()
        except Exception:
            self.cache.rollback(row, start)
            raise
        self._show(sequence, buffers.taps, 0, rows)
        logits: FloatArray = buffers.logits[0]
        return logits

    def _first_token(self, sequence: SequenceState, logits: FloatArray) -> Chunk:
        kept = sequence.append([sequence.choice.draw(logits[0], len(sequence.request.prompt))])
        sequence.report(Verdict([0], kept), logits, 1)
        chunk = sequence.chunk(kept)
        self._show_top(sequence, logits, [0])
        for drafter in self.drafters:
            drafter.commit(sequence.index, chunk.tokens)
        return chunk

    def _show(self, sequence: SequenceState, taps: AnyArray | None, batch_row: int, rows: Sequence[int]) -> None:
        """Hand the features of rows that became context to the drafters that read them in host memory."""
        for reader in self._readers:
            if not reader.drafter.resident:
                assert taps is not None  # they are wanted
                reader.drafter.observe(sequence.index, sequence.row, taps[batch_row][rows][:, reader.columns])

    def _show_top(self, sequence: SequenceState, logits: FloatArray, rows: Sequence[int]) -> None:
        """Tell drafters that want to know what was likely in ``rows`` of ``logits`` [rows, vocab]."""
        if self._wants_top:
            top = [top_tokens(logits[row]) for row in rows]
            for drafter in self.drafters:
                if drafter.wants_top:
                    drafter.observe_top(sequence.index, top)

    def _collect(self, sequence: SequenceState, batch_row: int, rows: Sequence[int]) -> None:
        """The same for drafters that take them from the device; the pass may still be on its way."""
        for reader in self._readers:
            if reader.drafter.resident:
                assert self.runner.resident is not None  # the drafter has seen the cache it comes with
                taps = self.runner.resident
                reader.drafter.collect(sequence.index, sequence.row, taps, batch_row, rows, reader.runs)

    # Commit --------------------------------------------------------------------------------------------------------

    def _commit_all(self, flight: Flight, found: TreeVerdicts | None) -> None:
        """Commit every sequence's part; one whose logits are NaN does not affect the others."""
        verdicts = [None] * len(flight.trees) if found is None else read_verdicts(found)
        failing: list[SequenceState] = []
        for parts in zip(flight.sequences, flight.proposals, flight.trees, verdicts, strict=True):
            if parts[0].finished:
                continue
            try:
                self._unsettled.append(self._commit(*parts, flight))
            except BackendError as error:
                failing.append(parts[0])
                self._failure = (error, failing, True)

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
        if sequence.reads_logits:
            sequence.report(verdict, buffers.logits[row], len(tokens))
        if not flight.verified_there:
            self._show_top(sequence, buffers.logits[row], verdict.path[: len(tokens)])
        self.schedule.learn(proposal, tokens)  # what is verified next depends on it
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
        return verify_tree(tree, logits, sequence.choice.draw, start)

    def _account(self, flight: Flight, emitted: int) -> None:
        done = _clock()
        pass_s = self.runner.pass_ms / 1e3 or flight.verified - flight.filled
        drafting = flight.drafted - flight.began
        passing = max(pass_s, flight.verified - flight.filled - flight.away)
        host = (flight.filled - flight.drafted) + (done - flight.verified)
        for sequence in flight.sequences:
            sequence.stats.seconds.add(draft=drafting, verify=passing, host=host)
        batch, rows = flight.buffers.input_ids.shape
        context = flight.buffers.attention_mask.shape[-1]
        self.schedule.observe(batch, rows, emitted, pass_s * 1e3, (drafting + passing + host) * 1e3, context)

    # Retire --------------------------------------------------------------------------------------------------------

    def _retire(self) -> None:
        for sequence in self.batch.retire():
            self.schedule.acceptance.forget(sequence.index)
            for drafter in self.drafters:
                drafter.end(sequence.index)


def drawn_from(sequence: SequenceState, proposal: Proposal) -> FloatArray | None:
    """What a draft that rejection sampling verifies was drawn from; None for all others.

    Where logits depend on the text before them, the target's own draws are followed whatever was drafted.
    """
    sampled = proposal.sampled
    follows = sequence.request.params.greedy or sequence.choice.adjusted
    return None if sampled is None or follows else sampled.probs


def _needs_no_logits(sequence: SequenceState, proposal: Proposal) -> bool:
    return drawn_from(sequence, proposal) is None and not sequence.reads_logits
