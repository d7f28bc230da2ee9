"""Decides before every pass how much to draft and verify, from measured costs and measured acceptance.

A pass over n rows costs ``cost(n)`` milliseconds. Row j of a proposal is reached and accepted with probability s_j, the
product of the acceptance of the classes on its path. Rows are taken in order of decreasing s_j as long as
``(1 + sum of s) / cost`` grows: this is the scheduler of DSpark (paper, algorithm 1) for one pass, with trees. Where no
proposal beats plain decoding by the margin, the pass is plain.

A plain pass runs now and then even where speculation pays, so that its saving stays measured. Estimates can still be
wrong, so a ledger bounds what that may cost: it adds up the time speculative rounds took beyond what
plain decoding would have taken for the same tokens. While it exceeds 1.5% of all decode time, rounds are plain.
Proposals are compared with the emitted text even when they were not verified, so a drafter that starts to be right is
noticed without paying for a try. One with its own engine makes such proposals now and then.

No choice made here can change the text, only its speed. Proposals *drawn at random* are verified whole: a cut that
depended on which token was drawn would bias the output, and one that depended on time would make a seed's text depend
on time. Their drafter cuts them, by confidences that do not depend on the token they rate.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Hashable, Sequence

from dspark_runtime.backends.protocol import MOST_ROWS
from dspark_runtime.decoding.acceptance import ANY, MOST_RATE, OTHER, SILENT, Acceptance, kind_of, word
from dspark_runtime.drafters.base import Drafter
from dspark_runtime.drafters.proposal import Part, Proposal
from dspark_runtime.speculation.costs import PassCosts
from dspark_runtime.speculation.tree import TokenTree

MARGIN = 1.02  # a proposal must promise this much more speed than plain decoding
ALLOWANCE = 0.015  # share of decode time that wrong estimates may cost
HOST_MS = 0.1  # host time of a round before any was seen

PLAIN_EVERY = 64  # at least one round in this many is plain
REST_AFTER = 16  # plain rounds of several sequences after which their drafters are asked less often
REST_EVERY = 4  # asked once in this many rounds then
PROPOSED = (1.05, 1.2, 1.5, 2.0, 2.8)  # speed over plain decoding's of what is proposed before a drafter is asked
_GUESS_WEIGHT, _MOST_SEEN = 4.0, 100.0  # of what a drafter is expected to add, against what it added
PROBE_SHARE = 0.005  # share of decode time for drafts of a drafter that does not pay, to see whether it would by now


class Schedule:
    """Chooses the rows of each pass and keeps the ledger. One per opened bundle; it learns over all requests.

    ``fixed``: verify that many drafts whatever they promise (for tests and measurements), None to choose.
    ``min_rows``: rows every sequence has in every pass, so that the first drafts may cost nothing. ``chains``: verify
    only the best chain of a tree. A row of a branch occupies another cache slot than plain decoding would give it, so
    its attention sums in another order; where activations are rounded to integers, that is enough to change a token.
    ``most_rows``: rows of one sequence that the backend takes in one pass.
    """

    def __init__(
        self,
        costs: PassCosts,
        fixed: int | None = None,
        min_rows: int = 1,
        chains: bool = False,
        most_rows: int = MOST_ROWS,
    ) -> None:
        self.most_rows = most_rows
        self.costs = costs
        self.min_rows = min_rows
        self.chains = chains
        self.acceptance = Acceptance()
        self.fixed = fixed
        self._lost_ms = 0.0
        self._all_ms = 0.0
        self._since_plain = PLAIN_EVERY  # rounds since the last plain one, whatever the batch
        self._host_ms = HOST_MS
        self._asked: dict[str, float] = {}  # milliseconds of the passes of drafters that draft for the coming round
        self._beside: dict[tuple[str, int], float] = {}  # what drafting takes, in such passes, by drafter and batch
        self._tries: dict[tuple[str, int], int] = {}
        self._gains: dict[tuple[str, int, int], list[float]] = {}  # sum and count, by drafter, batch and PROPOSED
        self._without: dict[str, tuple[int, float, float]] = {}  # of those asked: PROPOSED, speed without, ms
        self._idle: dict[int, int] = {}  # plain rounds in a row, by their sequences
        self._unprobed_ms: dict[str, float] = {}  # decode time since a drafter drafted last

    def round_ms(self, batch: int, rows: int = 1) -> float:
        """Expected milliseconds of a round in which each of ``batch`` sequences has ``rows`` rows; 1 is plain."""
        return self.costs.ms(batch * max(rows, self.min_rows), batch) + self._host_ms

    @property
    def throttled(self) -> bool:
        """Whether speculation has lost more than it may."""
        return self._lost_ms > ALLOWANCE * self._all_ms + self.round_ms(1)

    @property
    def lost_ms(self) -> float:
        """Milliseconds that speculation has lost; below 0 where it gained, which is remembered up to a point."""
        return self._lost_ms

    def resting(self, batch: int) -> bool:
        """Whether drafters are not even asked in the coming round of ``batch`` sequences.

        Proposing, ranking and comparing take the host a few tenths of a millisecond a sequence. Where nothing of it was
        worth verifying for long, that would be all that speculation does: a tenth of a round of 8 in a small model.
        """
        idle = self._idle.get(batch, 0)
        return self.fixed is None and batch > 1 and idle >= REST_AFTER and idle % REST_EVERY > 0

    def choose(self, proposals: Sequence[Proposal], batch: int) -> list[TokenTree]:
        """The tree to verify for each sequence: the best part of its proposal, or only its anchor."""
        if not any(proposal.parts for proposal in proposals):
            self._learn_gains([float(batch)], batch)
            return [proposal.tree for proposal in proposals]
        drawn = max((len(p.tree) - 1 for p in proposals if p.sampled), default=0)  # verified whole, see the module
        ranked = [([], []) if proposal.sampled else self._ranked(proposal) for proposal in proposals]
        longest = min(max(len(order) for order, _ in ranked), self.most_rows - 1)
        tokens = _expected([values for _, values in ranked], longest, batch)
        self._learn_gains(tokens, batch)
        if self.fixed is not None:
            rows = min(longest, self.fixed)
        elif longest == 0 or self.throttled or self._plain_due(batch):
            rows = 0
        else:
            rows = self._best_rows(tokens, batch)
        rows = max(rows, drawn)  # all have as many rows in the pass as the longest
        return [
            proposal.tree if proposal.sampled else _cut(proposal, order[:rows])
            for proposal, (order, _) in zip(proposals, ranked, strict=True)
        ]

    def _plain_due(self, batch: int) -> bool:
        """Whether the next round has to be plain: none was for long, or never with this many sequences."""
        return self._since_plain >= PLAIN_EVERY or not self.costs.knows(batch)

    def _best_rows(self, tokens: Sequence[float], batch: int) -> int:
        best, best_rows = tokens[0] / self.round_ms(batch) * MARGIN, 0
        for rows in range(1, len(tokens)):
            speed = tokens[rows] / self.round_ms(batch, rows + 1)
            if speed > best:
                best, best_rows = speed, rows
        return best_rows

    def _ranked(self, proposal: Proposal) -> tuple[list[int], list[float]]:
        """Rows by falling probability of being accepted, and these probabilities; parents always come first."""
        tree = proposal.tree
        reach = self._chances(proposal)
        for row in range(1, len(tree)):
            reach[row] *= reach[tree.parents[row]]
        order = list(range(1, len(tree)))
        if self.chains and not tree.is_chain:
            order = _best_chain(tree, reach)
        elif not tree.is_chain:
            order.sort(key=lambda row: (-reach[row], row))
        return order, [reach[row] for row in order]

    def _chances(self, proposal: Proposal) -> list[float]:
        """For each row the probability that it is accepted, given that its parent is.

        What the drafters say of each row is noted in the proposal, where they are several: how sure each is of it, that
        it proposes another token for the place, or nothing.
        """
        tree, parts = proposal.tree, proposal.parts
        if len(parts) == 1:
            return [1.0, *self._rates(parts[0], proposal.request)]
        surest = [0.0] * len(tree)
        said: list[list[int]] = [[SILENT] * len(parts) for _ in surest]
        for number, part in enumerate(parts):
            places = part.places
            asked = {places[parent] for parent in part.draft.tree.parents[1:]}
            for row in range(1, len(tree)):
                if tree.parents[row] in asked:
                    said[row][number] = OTHER
            for place, rate in zip(places[1:], self._rates(part, proposal.request), strict=True):
                said[place][number] = word(rate)
                surest[place] = max(surest[place], rate)
        proposal.said, proposal.surest = said, surest
        names = [part.drafter.name for part in parts]
        together = self.acceptance.together
        return [1.0, *(together(names, words, best) for words, best in zip(said[1:], surest[1:], strict=True))]

    def _rates(self, part: Part, request: int) -> list[float]:
        """What one drafter's rows are worth, by their classes alone; of its tree without the anchor."""
        known: dict[Hashable, float] = {}
        rates = []
        for row in range(1, len(part.draft.tree)):
            kind = kind_of(part.draft, row)
            if kind not in known:
                known[kind] = min(self.acceptance.rate(part.drafter, kind, request), MOST_RATE)
            rates.append(known[kind])
        return rates

    def learn(self, proposal: Proposal, emitted: Sequence[int]) -> None:
        """Compare what was proposed for a request, verified or not, with the tokens that came."""
        for part in proposal.parts:
            self.acceptance.learn(part.drafter, part.draft, emitted, proposal.request)
        self.acceptance.learn_together(proposal, emitted)

    def worth_drafting(
        self,
        drafter: Drafter,
        requests: Sequence[int],
        proposals: Sequence[Proposal],
        limits: Sequence[int],
        batch: int,
    ) -> list[int]:
        """Tokens a drafter with its own engine should draft for each request now; 0 for all where it does not pay.

        Its pass and the rows of the target's are shared by all sequences of the batch, so it is one decision: whether
        all of them together gain more per millisecond than with plain decoding and with what is proposed already. The
        better that is, the less a drafter adds, as it knows much of the same: how much it added is remembered by how
        much was promised without it. Before anything is known, its chain is valued by its mean acceptance, request by
        request. Where more tokens cost no more time, all of them are wanted: what is verified is chosen when they are
        known. Where it has not paid for long, it drafts once all the same: only a draft shows whether it would pay by
        now.

        Args:
            drafter: the drafter.
            requests: those it may draft for; others of the batch take part in the pass with what they have.
            proposals: what is proposed for each of them already.
            limits: most tokens for each.
            batch: sequences in the pass.
        """
        if self.fixed is not None:
            return [min(limit, self.fixed) for limit in limits]
        if self.throttled or self._plain_due(batch) or not any(limits):
            return [0] * len(limits)
        beside = self._beside.get((drafter.name, batch), 1.0)
        values = [self._ranked(proposal)[1] for proposal in proposals]
        rates = [self.acceptance.rate(drafter, ANY, request) for request in requests]
        most = max(limits)
        longest = min(max(most, *map(len, values)), self.most_rows - 1)
        had = [0.0] * len(values)  # expected tokens of what is proposed already, by sequence
        known, own = [float(batch)], [float(batch)]  # expected tokens of a round, by the rows of a sequence
        for rows in range(1, longest + 1):
            had = [
                sum_ + (value[rows - 1] if rows <= len(value) else 0.0) for sum_, value in zip(had, values, strict=True)
            ]
            new = [_chain(rate, min(rows, limit)) for rate, limit in zip(rates, limits, strict=True)]
            known.append(batch + sum(had))
            own.append(batch + sum(map(max, had, new)))
        without = max(gain / self.round_ms(batch, rows + 1) for rows, gain in enumerate(known))
        best, length = 0.0, 0
        for rows in range(1, min(most, longest) + 1):
            speed = own[rows] / (self.round_ms(batch, rows + 1) + beside * drafter.draft_ms(rows))
            if speed > best:
                best, length = speed, rows
        proposed = bisect_right(PROPOSED, without * self.round_ms(batch) / batch)
        seen, count = self._gains.get((drafter.name, batch, proposed), (0.0, 0.0))
        if seen + _GUESS_WEIGHT * best / without < MARGIN * (count + _GUESS_WEIGHT):
            length = 1 if self._may_probe(drafter, batch) else 0
        if length:
            self._unprobed_ms[drafter.name] = 0.0
        if length and drafter.draft_ms(most) <= drafter.draft_ms(1):
            length = most
        if length:
            self._asked[drafter.name] = drafter.draft_ms(length)
            self._without[drafter.name] = proposed, without, beside * drafter.draft_ms(length)
        return [min(limit, length) for limit in limits]

    def _learn_gains(self, tokens: Sequence[float], batch: int) -> None:
        """How much faster the round promises to be with each drafter that was asked than it did without.

        ``tokens``: see :func:`_expected`.
        """
        asked, self._without = self._without, {}
        if not asked:
            return
        times = [self.round_ms(batch, rows + 1) for rows in range(len(tokens))]
        for name, (proposed, without, ms) in asked.items():
            speed = max(gain / (time + ms) for gain, time in zip(tokens, times, strict=True))
            counts = self._gains.setdefault((name, batch, proposed), [0.0, 0.0])
            if counts[1] >= _MOST_SEEN:
                counts[:] = counts[0] / 2, counts[1] / 2
            counts[0] += speed / without
            counts[1] += 1.0

    def _may_probe(self, drafter: Drafter, batch: int) -> bool:
        """Whether a drafter that does not pay has been idle for so long that a try is within its share, as the first
        one is."""
        waited = self._unprobed_ms.get(drafter.name, math.inf) + self.round_ms(batch)
        self._unprobed_ms[drafter.name] = waited
        return self._beside.get((drafter.name, batch), 1.0) * drafter.draft_ms(1) <= PROBE_SHARE * waited

    def floor(self, drafter: Drafter, batch: int) -> float:
        """Chance of being accepted below which one more token of ``drafter`` costs more than it brings."""
        if self.fixed is not None:
            return 0.0
        row_ms = (self.costs.ms(4 * batch, batch) - self.costs.ms(2 * batch, batch)) / 2
        return min((drafter.pass_ms + row_ms) / self.round_ms(batch), 1.0)

    def observe(
        self, batch: int, rows: int, emitted: int, pass_ms: float, round_ms: float, context: int | None = None
    ) -> None:
        """Account for one round.

        Args:
            batch: sequences in the pass.
            rows: rows of each, padding included.
            emitted: tokens of all sequences together.
            pass_ms: time of the pass alone.
            round_ms: time of the whole round, drafting included.
            context: cache slots of each sequence that the pass read, where known.
        """
        expected = self.costs.ms(batch * rows, batch)
        is_plain = rows <= self.min_rows
        self.costs.observe(batch * rows, pass_ms, is_plain, batch, context)
        self._learn_rest(round_ms - pass_ms, batch)
        self._all_ms += round_ms
        self._idle[batch] = self._idle.get(batch, 0) + 1 if is_plain else 0
        if is_plain:
            self._since_plain = 0
            return
        self._since_plain += 1
        spent = min(round_ms, (round_ms - pass_ms) + 2 * expected)  # a hiccup is not the drafter's fault
        plain = emitted / batch * self.round_ms(batch)
        # Gains are remembered up to a point: they must not pay for a long stretch of losses.
        self._lost_ms = max(self._lost_ms + spent - plain, -5.0 * plain)

    def _learn_rest(self, ms: float, batch: int) -> None:
        """What a round takes beside its pass: the host's work, and drafting, which is more than the drafters' passes
        say. Context that is new to them is read first: all of it, where they have not drafted for long."""
        asked, self._asked = self._asked, {}
        if not asked:
            self._host_ms += 0.05 * (min(max(ms, 0.0), 4 * self._host_ms) - self._host_ms)
            return
        passes = sum(asked.values())
        if passes > 0:
            found = min(max((ms - self._host_ms) / passes, 1.0), 64.0)
            for name in asked:
                key = (name, batch)
                tries = self._tries[key] = self._tries.get(key, 0) + 1
                known = self._beside.get(key, 1.0)
                self._beside[key] = known + max(0.05, 1 / tries) * (found - known)


def _expected(values: Sequence[Sequence[float]], longest: int, batch: int) -> list[float]:
    """Expected tokens of a round in which every sequence verifies its best 0, 1, ... ``longest`` rows."""
    tokens = [float(batch)]
    for rows in range(1, longest + 1):
        tokens.append(tokens[-1] + sum(v[rows - 1] for v in values if rows <= len(v)))
    return tokens


def _chain(rate: float, length: int) -> float:
    """Expected accepted tokens of a chain whose tokens are each right with probability ``rate`` after a right one."""
    return float(length) if rate >= 1 else rate * (1 - rate**length) / (1 - rate)


def _best_chain(tree: TokenTree, reach: Sequence[float]) -> list[int]:
    """Rows of the path that goes on with the most likely child."""
    path: list[int] = []
    row = 0
    while True:
        children = [i for i in range(row + 1, len(tree)) if tree.parents[i] == row]
        if not children:
            return path
        row = max(children, key=lambda child: (reach[child], -child))
        path.append(row)


def _cut(proposal: Proposal, rows: Sequence[int]) -> TokenTree:
    tree = proposal.tree
    if len(rows) + 1 == len(tree):
        return tree
    if tree.is_chain:
        return TokenTree.chain(tree.tokens[0], tree.tokens[1 : len(rows) + 1])
    return tree.subtree([0, *sorted(rows)])
