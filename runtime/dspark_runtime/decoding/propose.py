"""Asks drafters what to verify next: a tree for every running sequence."""

from __future__ import annotations

from collections.abc import Sequence

from dspark_runtime.decoding.schedule import Schedule
from dspark_runtime.decoding.sequence import SequenceState
from dspark_runtime.drafters.base import Drafter, DraftRequest
from dspark_runtime.drafters.grammar import GrammarDrafter
from dspark_runtime.drafters.proposal import Proposal


class Proposer:
    """Joins what several drafters propose into one tree for each sequence.

    Args:
        drafters: are asked in this order.
        schedule: says which of them are worth their passes, and how far.
        most: draft tokens of one sequence.
        vocab_size: of the target; drafts of other tokens are cut.
    """

    def __init__(self, drafters: Sequence[Drafter], schedule: Schedule, most: int, vocab_size: int) -> None:
        self._drafters, self._schedule = drafters, schedule
        self._most, self._vocab_size = most, vocab_size
        self._grammar = GrammarDrafter()

    def propose(self, running: Sequence[SequenceState]) -> list[Proposal]:
        """A proposal for each sequence; empty where nothing is drafted."""
        batch = len(running)
        proposals = [Proposal.empty(s.index, s.tokens[-1]) for s in running]
        guided = any(s.choice.guided for s in running)
        # Rejection sampling follows drafts: whether there is one must not depend on measured times.
        if self._schedule.resting(batch) and not guided and not any(drafter.steady for drafter in self._drafters):
            return proposals
        for drafter in [self._grammar, *self._drafters] if guided and self._drafters else self._drafters:
            requests = [self._request(s) for s in running]
            drafter.select(batch)
            floor = self._schedule.floor(drafter, batch)
            for request in requests:
                request.floor = 0.0 if drafter.steady else floor
            if drafter.pass_ms:
                self._weigh(drafter, requests, proposals, floor)
                if not any(request.limit for request in requests):
                    continue
            drafts = drafter.propose(requests)
            for sequence, proposal, draft in zip(running, proposals, drafts, strict=True):
                within = None if draft is None else draft.within(self._vocab_size)
                if within is not None and guided:
                    within = sequence.choice.allowed_part(within)
                if within is not None:
                    proposal.add(drafter, within)
        return proposals

    def _request(self, sequence: SequenceState) -> DraftRequest:
        return DraftRequest(
            sequence.index,
            sequence.row,
            sequence.tokens,
            min(self._most, sequence.remaining - 1) if sequence.request.speculate else 0,
            sampler=sequence.sampler,
            forced=sequence.choice.forced if sequence.choice.guided else None,
            scope=sequence.request.scope,
        )

    def _weigh(
        self, drafter: Drafter, requests: Sequence[DraftRequest], proposals: Sequence[Proposal], floor: float
    ) -> None:
        """Let a drafter that needs its own passes draft only as far as it pays for all sequences together."""
        # The text of a request with a temperature would otherwise depend on measured times.
        free = [i for i, request in enumerate(requests) if not (drafter.steady and request.temperature)]
        limits = self._schedule.worth_drafting(
            drafter,
            [requests[i].request for i in free],
            [proposals[i] for i in free],
            [requests[i].limit for i in free],
            len(requests),
        )
        for i, limit in zip(free, limits, strict=True):
            request = requests[i]
            request.limit, request.floor = limit, floor
            request.rate = self._schedule.acceptance.rates(drafter, request.request)
