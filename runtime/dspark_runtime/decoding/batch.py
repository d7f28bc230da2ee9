"""Assigns sequences to cache rows.

A sequence waits, then its prompt is filled, then it runs until its text ends. At all times

* the running sequences occupy the cache rows ``0 .. running - 1``, so that a pass over all of them covers
  contiguous rows;
* the one whose prompt is being filled, if any, occupies the next row;
* waiting sequences have no row yet, but one is kept free for each.

A row given to a sequence is clean: neither the cache nor a drafter knows anything about its previous owner, except
where prefixes are reused and the two texts begin alike: see :mod:`dspark_runtime.decoding.prefixes`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from dspark_runtime.decoding.prefixes import LEAST, KeptTexts, common_prefix
from dspark_runtime.decoding.sequence import SequenceState
from dspark_runtime.drafters.base import Drafter
from dspark_runtime.errors import UsageError
from dspark_runtime.speculation.kv_cache import KvCache


class Batch:
    """See the module's text.

    Args:
        cache: of the target, with a row for every sequence there may be.
        drafters: are told which sequences begin, and what rows they go to.
        reuse: keep the context of texts that have ended, and let prompts begin with what they share with another text.
    """

    def __init__(self, cache: KvCache, drafters: Sequence[Drafter], reuse: bool = False) -> None:
        self.running: list[SequenceState] = []
        self.filling: SequenceState | None = None
        self.waiting: deque[SequenceState] = deque()
        self.kept = KeptTexts()
        self._cache, self._drafters, self._reuse = cache, drafters, reuse

    def __len__(self) -> int:
        return len(self.running) + (self.filling is not None) + len(self.waiting)

    @property
    def free(self) -> int:
        """Rows that another sequence can have."""
        return len(self._cache.lengths) - len(self)

    def admit(self, sequence: SequenceState) -> None:
        """Let a sequence wait for its turn; UsageError if all rows are taken."""
        if not self.free:
            raise UsageError(
                f"all {len(self._cache.lengths)} rows are taken; admit a request when a sequence has ended, or open "
                "the loop with more rows"
            )
        self.waiting.append(sequence)

    def next_prompt(self) -> SequenceState | None:
        """The sequence whose prompt is to be filled, first come first served; None if there is none."""
        if self.filling is None and self.waiting:
            sequence = self.filling = self.waiting.popleft()
            sequence.row = len(self.running)
            sequence.cached = self._begin_row(sequence)
            for drafter in self._drafters:
                drafter.begin(sequence.index, sequence.request.prompt)
        return self.filling

    def filled(self) -> None:
        """The prompt is in the cache and the first token is drawn: the sequence runs from now on."""
        if self.filling is not None:
            self.running.append(self.filling)
            self.filling = None

    def retire(self) -> list[SequenceState]:
        """Drop the sequences that have ended; the last running one takes the row of each. Those that had a row."""
        ended = [sequence for sequence in self.running if sequence.finished]
        gone = list(ended)
        if self.filling is not None and self.filling.finished:
            gone.append(self.filling)
            self._keep(self.filling)
            self.filling = None
        for sequence in reversed(ended):
            last = self.running[-1]
            self._keep(sequence, stays=last is sequence)
            self.running.pop()
            if last is not sequence:
                self._move(last, sequence.row)
                self.running[last.row] = last
        if self.filling is not None and self.filling.row != len(self.running):
            self._move(self.filling, len(self.running))
        if any(sequence.finished for sequence in self.waiting):
            self.waiting = deque(sequence for sequence in self.waiting if not sequence.finished)
        return gone

    def _move(self, sequence: SequenceState, row: int) -> None:
        self._put_aside(row)
        self._cache.replace(row, sequence.row)
        for drafter in self._drafters:
            drafter.move(sequence.row, row)
        sequence.row = row

    # Prefixes ------------------------------------------------------------------------------------------------------

    def _free_rows(self) -> list[int]:
        taken = {sequence.row for sequence in self.running}
        if self.filling is not None:
            taken.add(self.filling.row)
        return [row for row in range(len(self._cache.lengths)) if row not in taken]

    def _begin_row(self, sequence: SequenceState) -> int:
        """Give the row of ``sequence`` what its prompt shares with another text; how many tokens that is."""
        row = sequence.row
        source, shared = self._best_source(sequence)
        if source != row or not shared:
            self._put_aside(row, needed=source)
        self.kept.drop(row)
        if not shared:
            self._cache.clear(row)
            for drafter in self._drafters:
                drafter.reset(row)
            return 0
        self._cache.copy(source, row, shared)
        held = [shared]
        for drafter in self._drafters:
            held.append(drafter.keep(row, shared) if source == row else drafter.copy(source, row, shared))
        shared = min(held)
        self._cache.rollback(row, shared)
        for drafter in self._drafters:
            drafter.keep(row, shared)
        return shared

    def _best_source(self, sequence: SequenceState) -> tuple[int, int]:
        """The row whose text has the longest prefix in common with the prompt, and its length; 0 if it is too short.

        The last token of a prompt is always computed: its logits are wanted.
        """
        if not self._reuse:
            return sequence.row, 0
        prompt, scope = sequence.request.prompt[:-1], sequence.request.scope
        texts = [(s.row, s.tokens[: self._cache.lengths[s.row]]) for s in self.running if s.request.scope == scope]
        best = self.kept.best(prompt, scope)
        for row, tokens in texts:
            shared = common_prefix(prompt, tokens)
            if shared > best[1]:
                best = (row, shared)
        return best if best[1] >= LEAST else (sequence.row, 0)

    def _keep(self, sequence: SequenceState, stays: bool = True) -> None:
        """Remember the context of a text that has ended, in its row if it ``stays`` there, or else in a free one."""
        if not self._reuse:
            return
        row = sequence.row
        held = min(self._cache.lengths[row], len(sequence.tokens) - 1)
        if held < LEAST:
            return
        self._cache.rollback(row, held)
        self.kept.add(row, sequence.tokens[:held], sequence.request.scope)
        if not stays:
            self._put_aside(row)

    def _put_aside(self, row: int, needed: int = -1) -> None:
        """Take the kept text, if any, out of a row that is wanted for something else.

        It goes to a free row: an empty one, or that of the oldest text, but not to ``needed``; it is lost if there is
        none.
        """
        if row not in self.kept:
            return
        tokens, scope = self.kept.text(row)
        self.kept.drop(row)
        free = [place for place in self._free_rows() if place not in (row, needed)]
        target = next((place for place in free if place not in self.kept), None)
        target = self.kept.oldest(free) if target is None else target
        if target is None:
            return
        self._cache.copy(row, target, len(tokens))
        for drafter in self._drafters:
            drafter.copy(row, target, len(tokens))
        self.kept.add(target, tokens, scope)
