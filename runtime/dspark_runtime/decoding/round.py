"""One round of the loop: what is in flight, what came of it, and the work that can wait until the next pass runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dspark_runtime.backends.protocol import StepBuffers
from dspark_runtime.decoding.sequence import Chunk, SequenceState
from dspark_runtime.decoding.statistics import DrafterCounts
from dspark_runtime.drafters.proposal import Proposal
from dspark_runtime.speculation.tree import TokenTree
from dspark_runtime.speculation.verify import Verdict


@dataclass(slots=True)
class Flight:
    """A pass on its way over one tree for each of ``sequences``, and when it got how far (seconds of the host's clock).

    Proposing began at ``began`` and ended at ``drafted``; the buffers were filled at ``filled``, the pass was started
    by ``started``; the host began to wait at ``waited`` and had the results at ``verified``; they were committed at
    ``committed``. ``verified_there``: on the device, so that there are no logits. ``away`` is how long the caller has
    kept the loop waiting since.
    """

    sequences: Sequence[SequenceState]
    proposals: Sequence[Proposal]
    trees: Sequence[TokenTree]
    buffers: StepBuffers
    began: float
    drafted: float
    filled: float
    verified_there: bool = False
    started: float = 0.0
    waited: float = 0.0
    verified: float = 0.0
    committed: float = 0.0
    away: float = 0.0


@dataclass(frozen=True, slots=True)
class Accepted:
    """What a pass gave the sequence in batch row ``row``: ``tokens`` are committed, the last of ``verdict`` may be
    beyond the text's end."""

    sequence: SequenceState
    row: int
    proposal: Proposal
    tree: TokenTree
    verdict: Verdict
    tokens: list[int]

    def settle(self) -> Chunk:
        """Text and statistics. No pass depends on them: only the tokens had to be known for the next one."""
        return self.sequence.chunk(self.tokens, self._count())

    def _count(self) -> tuple[tuple[str, ...], ...]:
        """Enter this round into the statistics; for each of ``tokens`` the names of the drafters that proposed it."""
        names: list[tuple[str, ...]] = [()] * len(self.tokens)
        stats, tree, proposal = self.sequence.stats, self.tree, self.proposal
        stats.rounds += 1
        stats.drafted += len(proposal.tree.tokens) - 1
        if len(tree) == 1:
            return tuple(names)
        accepted = min(len(self.verdict.path) - 1, len(self.tokens))
        stats.verified += len(tree) - 1
        stats.accepted += accepted
        # Every drafter is credited for what it proposed of the verified rows, shared ones included.
        for part in proposal.parts:
            counts = stats.per_drafter.setdefault(part.drafter.name, DrafterCounts())
            drafted, hits = proposal.credit(part, tree, self.verdict.tokens[:accepted])
            counts.drafted += drafted
            counts.accepted += hits
            for place in range(hits):  # what a part proposed of an accepted path is its beginning
                names[place] += (part.drafter.name,)
            chain = proposal.main_chain(part, tree, self.verdict.tokens[:accepted])
            counts.count_chain(*chain, part.draft.confidences)
        return tuple(names)
