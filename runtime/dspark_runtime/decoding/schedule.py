"""Decides before every pass how much to draft and verify, from measured costs and measured acceptance.

A pass over n rows costs ``cost(n)`` milliseconds. Row j of a proposal is reached and accepted with probability s_j, the
product of the acceptance of the classes on its path. Rows are taken in order of decreasing s_j as long as
``(1 + sum of s) / cost`` grows: this is the scheduler of DSpark (paper, algorithm 1) for one pass, with trees. Where no
proposal beats plain decoding by the margin, the pass is plain.

A plain pass runs now and then even where speculation pays, so that its saving stays measured. Estimates can still be
wrong, so a ledger bounds what that may cost: it adds up the time speculative rounds took beyond what
plain decoding would have taken for the same tokens. While it exceeds 1.5% of all decode time, rounds are plain.
Proposals are compared with the emitted text even when they were not verified, so a drafter that starts to be right is
noticed without paying for a try.

No choice made here can change the text, only its speed. Proposals *drawn at random* are verified whole: a cut that
depended on which token was drawn would bias the output, and one that depended on time would make a seed's text depend
on time. Their drafter cuts them, by confidences that do not depend on the token they rate.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from dspark_runtime.backends.protocol import MOST_ROWS
from dspark_runtime.drafters.base import Draft, Drafter
from dspark_runtime.drafters.proposal import Proposal
from dspark_runtime.speculation.costs import PassCosts
from dspark_runtime.speculation.tree import TokenTree

MARGIN = 1.02  # a proposal must promise this much more speed than plain decoding
ALLOWANCE = 0.015  # share of decode time that wrong estimates may cost
HOST_MS = 0.1  # host time of a round, whatever its rows

PLAIN_EVERY = 64  # at least one round in this many is plain
_ANY: Hashable = "any"  # class of a place: whether one of the tokens proposed for it was right


class Acceptance:
    """Acceptance of drafters by class: a running estimate over all requests, refined within each request."""

    _PRIOR_WEIGHT = 6.0
    _SHARED_WEIGHT = 8.0

    def __init__(self) -> None:
        self._shared: dict[tuple[str, Hashable], list[float]] = {}
        self._own: dict[int, dict[tuple[str, Hashable], list[float]]] = {}

    def rate(self, drafter: Drafter, kind: Hashable, request: int) -> float:
        """Probability that a row of this class is accepted, given that its parent is."""
        key = (drafter.name, kind)
        shared = self._shared.get(key)
        if shared is None:
            rate = drafter.prior(kind)
        else:
            rate = (shared[0] + self._PRIOR_WEIGHT * drafter.prior(kind)) / (shared[1] + self._PRIOR_WEIGHT)
        own = self._own.get(request)
        counts = own.get(key) if own else None
        if counts is None:
            return rate
        return (counts[0] + self._SHARED_WEIGHT * rate) / (counts[1] + self._SHARED_WEIGHT)

    def rates(self, drafter: Drafter, request: int) -> Callable[[Hashable], float]:
        """:meth:`rate` of one drafter and request, as a function of the class."""
        return lambda kind: self.rate(drafter, kind, request)

    def learn(self, drafter: Drafter, draft: Draft, emitted: Sequence[int], request: int) -> None:
        """Compare a proposal, verified or not, with the tokens that really came."""
        tree, row = draft.tree, 0
        for token in emitted:
            following, asked = -1, False
            for candidate in range(row + 1, len(tree.tokens)):
                if tree.parents[candidate] == row:
                    hit = tree.tokens[candidate] == token
                    self._count(drafter.name, kind_of(draft, candidate), request, hit)
                    asked = True
                    if hit:
                        following = candidate
                elif tree.is_chain:
                    break
            if asked:  # once, however many tokens were proposed for this place
                self._count(drafter.name, _ANY, request, following >= 0)
            if following < 0:
                return
            row = following

    def forget(self, request: int) -> None:
        """Drop what was learned for a finished request only."""
        self._own.pop(request, None)

    def _count(self, name: str, kind: Hashable, request: int, hit: bool) -> None:
        own = self._own.setdefault(request, {})
        for table, most in ((self._shared, 400.0), (own, 40.0)):
            counts = table.setdefault((name, kind), [0.0, 0.0])
            if counts[1] >= most:
                counts[0] *= 0.5
                counts[1] *= 0.5
            counts[0] += hit
            counts[1] += 1.0


def kind_of(draft: Draft, row: int) -> Hashable:
    """Class of one row of a draft; the depth where the drafter gave none, or where the tokens were drawn at random."""
    return draft.classes[row - 1] if draft.classes and draft.probs is None else draft.tree.depths[row]


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
        self._since_plain: dict[int, int] = {}  # speculative rounds since the last plain one, by batch

    def round_ms(self, batch: int, rows: int = 1) -> float:
        """Expected milliseconds of a round in which each of ``batch`` sequences has ``rows`` rows; 1 is plain."""
        return self.costs.ms(batch * max(rows, self.min_rows)) + HOST_MS

    @property
    def throttled(self) -> bool:
        """Whether speculation has lost more than it may."""
        return self._lost_ms > ALLOWANCE * self._all_ms + self.round_ms(1)

    def choose(self, proposals: Sequence[Proposal], batch: int) -> list[TokenTree]:
        """The tree to verify for each sequence: the best part of its proposal, or only its anchor."""
        if not any(proposal.parts for proposal in proposals):
            return [proposal.tree for proposal in proposals]
        drawn = max((len(p.tree) - 1 for p in proposals if p.sampled), default=0)  # verified whole, see the module
        ranked = [([], []) if proposal.sampled else self._ranked(proposal) for proposal in proposals]
        longest = min(max(len(order) for order, _ in ranked), self.most_rows - 1)
        if self.fixed is not None:
            rows = min(longest, self.fixed)
        elif longest == 0 or self.throttled or self._plain_due(batch):
            rows = 0
        else:
            rows = self._best_rows([values for _, values in ranked], longest, batch)
        rows = max(rows, drawn)  # all have as many rows in the pass as the longest
        return [
            proposal.tree if proposal.sampled else _cut(proposal, order[:rows])
            for proposal, (order, _) in zip(proposals, ranked, strict=True)
        ]

    def _plain_due(self, batch: int) -> bool:
        return self._since_plain.get(batch, PLAIN_EVERY) >= PLAIN_EVERY

    def _best_rows(self, values: Sequence[Sequence[float]], longest: int, batch: int) -> int:
        gain = float(batch)
        best, best_rows = gain / self.round_ms(batch) * MARGIN, 0
        for rows in range(1, longest + 1):
            gain += sum(v[rows - 1] for v in values if rows <= len(v))
            speed = gain / self.round_ms(batch, rows + 1)
            if speed > best:
                best, best_rows = speed, rows
        return best_rows

    def _ranked(self, proposal: Proposal) -> tuple[list[int], list[float]]:
        """Rows by falling probability of being accepted, and these probabilities; parents always come first."""
        tree = proposal.tree
        reach = [1.0] * len(tree)
        for row in range(1, len(tree)):
            rates = (self._rate(proposal, drafter, draft, own) for drafter, draft, own in proposal.sources(row))
            reach[row] = reach[tree.parents[row]] * max(rates)
        order = list(range(1, len(tree)))
        if self.chains and not tree.is_chain:
            order = _best_chain(tree, reach)
        elif not tree.is_chain:
            order.sort(key=lambda row: (-reach[row], row))
        return order, [reach[row] for row in order]

    def _rate(self, proposal: Proposal, drafter: Drafter, draft: Draft, row: int) -> float:
        return min(self.acceptance.rate(drafter, kind_of(draft, row), proposal.request), 0.995)

    def worth_drafting(self, drafter: Drafter, request: int, proposal: Proposal, limit: int, batch: int) -> int:
        """Tokens a drafter with its own engine should draft now; 0 where it does not pay.

        Its chain is valued by its mean acceptance, against plain decoding and against what is proposed already. Where
        more tokens cost no more time, all of them are wanted: what is verified is chosen when they are known.
        """
        if self.fixed is not None:
            return min(limit, self.fixed)
        if self.throttled or self._plain_due(batch):
            return 0
        _, values = self._ranked(proposal)
        rows = self._best_rows([values], len(values), batch) if values else 0
        speed = (1.0 + sum(values[:rows])) / self.round_ms(batch, rows + 1)
        rate = self.acceptance.rate(drafter, _ANY, request)
        best, best_length, gain, reach = speed * MARGIN, 0, 1.0, 1.0
        for length in range(1, limit + 1):
            reach *= rate
            gain += reach
            own = gain / (self.round_ms(batch, length + 1) + drafter.draft_ms(length))
            if own > best:
                best, best_length = own, length
        return limit if best_length and drafter.draft_ms(limit) <= drafter.draft_ms(1) else best_length

    def floor(self, drafter: Drafter, batch: int) -> float:
        """Chance of being accepted below which one more token of ``drafter`` costs more than it brings."""
        if self.fixed is not None:
            return 0.0
        row_ms = (self.costs.ms(4 * batch) - self.costs.ms(2 * batch)) / 2
        return min((drafter.pass_ms + row_ms) / self.round_ms(batch), 1.0)

    def observe(self, batch: int, rows: int, emitted: int, pass_ms: float, round_ms: float) -> None:
        """Account for one round.

        Args:
            batch: sequences in the pass.
            rows: rows of each, padding included.
            emitted: tokens of all sequences together.
            pass_ms: time of the pass alone.
            round_ms: time of the whole round, drafting included.
        """
        expected = self.costs.ms(batch * rows)
        is_plain = rows <= self.min_rows
        self.costs.observe(batch * rows, pass_ms, is_plain)
        self._all_ms += round_ms
        if is_plain:
            self._since_plain[batch] = 0
            return
        self._since_plain[batch] = self._since_plain.get(batch, PLAIN_EVERY) + 1
        spent = min(round_ms, (round_ms - pass_ms) + 2 * expected)  # a hiccup is not the drafter's fault
        plain = emitted / batch * self.round_ms(batch)
        # Gains are remembered up to a point: they must not pay for a long stretch of losses.
        self._lost_ms = max(self._lost_ms + spent - plain, -5.0 * plain)


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
