"""Trees from the likely texts that the graph of a block drafter gives: its outputs ``beam_*``."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from dspark_runtime.arrays import FloatArray, IntArray


@dataclass(frozen=True)
class BeamTree:
    """Chosen nodes in the order of their slots. Row 0 of the tree is the anchor: ``parents`` and ``main`` (the rows of
    the main chain, the most likely child of each) count it, ``tokens`` and ``probs`` (given the nodes above) do not."""

    tokens: list[int]
    parents: list[int]
    probs: list[float]
    main: list[int]


class BeamLayout:
    """Where the nodes of a graph with these sizes stand: ``candidates`` of the first slot, then ``candidates`` of each
    of ``beams`` texts for every other one of ``drafts`` slots."""

    def __init__(self, drafts: int, beams: int, candidates: int) -> None:
        each = min(beams, candidates) * candidates
        starts = [0, *range(candidates, candidates + (drafts - 1) * each + 1, each)]
        self._slots = [slice(first, behind) for first, behind in pairwise(starts)]
        self._place_among_siblings = np.arange(starts[-1]) % candidates

    def reach(self, probs: FloatArray, parents: IntArray) -> FloatArray:
        """How likely each node is together with all above it, float32 [nodes]."""
        reach = np.array(probs, np.float32)
        for slot in self._slots[1:]:
            reach[slot] *= reach[parents[slot]]
        return reach

    def tree(
        self,
        tokens: IntArray,
        probs: FloatArray,
        parents: IntArray,
        *,
        most: int,
        depth: int,
        children: int,
        least: float,
    ) -> BeamTree:
        """The main chain, and with it up to ``most`` of the most likely nodes, at most ``depth`` below the anchor,
        with at most ``children`` of each parent.

        Nodes that are reached with a chance below ``least`` are left out; the main chain is not, however unlikely.
        Arguments are arrays [nodes] of one sequence, see :func:`dspark_runtime.bundle.draft_contract.block_contract`.
        """
        reach = self.reach(probs, parents)
        kept = (reach >= least) & (self._place_among_siblings < children)
        chain = self._main_chain(parents, depth)
        kept[chain] = True
        for slot in self._slots[1:depth]:
            kept[slot] &= kept[parents[slot]]
        for slot in self._slots[depth:]:
            kept[slot] = False
        places = np.flatnonzero(kept)
        if len(places) > most:  # a parent is as likely as its children or more, and comes before them
            reach[chain] = 2.0
            places = np.sort(places[np.argsort(-reach[places], kind="stable")[: max(most, len(chain))]])
        row_of = {-1: 0} | {place: row for row, place in enumerate(places.tolist(), 1)}
        above = [row_of[place] for place in parents[places].tolist()]
        return BeamTree(tokens[places].tolist(), above, probs[places].tolist(), [row_of[place] for place in chain])

    def _main_chain(self, parents: IntArray, depth: int) -> list[int]:
        """Places of the most likely first token, its most likely follower and so on, as far as that text is
        followed."""
        chain = [0]
        for slot in self._slots[1:depth]:
            below = np.flatnonzero(parents[slot] == chain[-1])
            if not len(below):
                break
            chain.append(slot.start + int(below[0]))
        return chain
