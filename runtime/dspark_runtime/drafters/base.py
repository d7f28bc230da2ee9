"""What a drafter is: something that proposes tokens after a committed text.

A custom drafter derives from :class:`Drafter`, sets ``name`` and implements :meth:`Drafter.draft`. Nothing it proposes
can change the generated text; wrong proposals only cost time. The schedule watches how often proposals of each *class*
are accepted and cuts those that do not pay, so give certain and uncertain proposals different classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from dspark_runtime.arrays import AnyArray, FloatArray, Runs
from dspark_runtime.backends.protocol import ResidentTaps
from dspark_runtime.errors import BackendError
from dspark_runtime.speculation.sampling import Sampler
from dspark_runtime.speculation.tree import TokenTree

if TYPE_CHECKING:
    from dspark_runtime.speculation.kv_cache import KvCache

Rate = Callable[[Hashable], float]
TopTokens = tuple[Sequence[int], Sequence[float]]
"""The likeliest tokens of one row of the target, and their probabilities, about 1 together."""
Part = TypeVar("Part")


def _unknown(_: Hashable) -> float:
    return 0.5


@dataclass(slots=True)
class DraftRequest:
    """One sequence that wants drafts.

    ``request``: identity of the sequence, the same from :meth:`Drafter.begin` to :meth:`Drafter.end`.
    ``row``: its row in the cache. ``tokens``: committed text; the last one is the anchor. Not to be changed.
    ``limit``: most draft tokens that can be used. ``floor``: a token whose chance to be reached and accepted is below
    this does not pay for drafting it. ``rate``: estimated acceptance of a class, given that its parent is accepted.
    ``sampler``: how the request draws its tokens; None for greedy ones. ``forced``: gives the tokens that its guide
    leaves no choice about; None where it has no guide. ``scope``: whose texts may help to draft for it, see
    :class:`dspark_runtime.decoding.request.Request`.
    """

    request: int
    row: int
    tokens: list[int]
    limit: int
    floor: float = 0.0
    rate: Rate = _unknown
    sampler: Sampler | None = None
    forced: Callable[[], list[int]] | None = None
    scope: str = ""

    @property
    def temperature(self) -> float:
        """Temperature of the request, 0 for greedy."""
        return 0.0 if self.sampler is None or self.sampler.params.greedy else self.sampler.params.temperature


@dataclass(slots=True)
class Draft:
    """A proposal: a tree whose anchor is the last committed token.

    ``classes``: class of each row but the anchor, or empty for one class per depth. ``probs``: only for a chain whose
    tokens were *drawn at random*: float32 [drafts, vocab], exactly the distributions they were drawn from; leave it
    None for tokens that follow from the text. ``confidences``: the drafter's own estimate for each token of its main
    chain that it is accepted if those before it are; for statistics, empty where it makes none.
    """

    tree: TokenTree
    classes: Sequence[Hashable] = ()
    probs: FloatArray | None = None
    confidences: Sequence[float] = ()

    def within(self, vocab_size: int) -> Draft | None:
        """The draft without tokens outside the target's vocabulary and what follows them; None if none is left."""
        tokens, parents = self.tree.tokens, self.tree.parents
        if min(tokens) >= 0 and max(tokens) < vocab_size:
            return self
        kept = [0]
        for row in range(1, len(tokens)):
            if parents[row] in kept and 0 <= tokens[row] < vocab_size:
                kept.append(row)
        return self.part(kept)

    def part(self, kept: Sequence[int]) -> Draft | None:
        """The draft of the given rows only, ascending, the anchor and the parents of all among them; None if only the
        anchor is left."""
        if len(kept) == len(self.tree.tokens):
            return self
        if len(kept) == 1:
            return None
        classes = [self.classes[row - 1] for row in kept[1:]] if self.classes else ()
        probs = None if self.probs is None else self.probs[: len(kept) - 1]
        return Draft(self.tree.subtree(kept), classes, probs, self.confidences[: len(kept) - 1])


class Drafter(ABC):
    """Base of all drafters; see the module's text. One instance serves one loop at a time."""

    name: str = "custom"
    #: Milliseconds of one pass of the drafter's own engine for the whole batch, 0 where proposing is almost free.
    pass_ms: float = 0.0
    #: Layers of the target whose outputs it reads, ascending, -1 for the embedding; empty for none.
    taps: tuple[int, ...] = ()
    #: Its proposals are drawn at random and verified by rejection sampling: what is drafted and verified must then not
    #: depend on measured times, or the text of a seed would.
    steady: bool = False
    #: Features come through :meth:`collect`, from the device that computed them; known after :meth:`attach`.
    resident: bool = False
    #: Wants the likeliest tokens of every row that became context, through :meth:`observe_top`.
    wants_top: bool = False

    def draft_ms(self, tokens: int) -> float:
        """Milliseconds it takes to draft this many tokens: one pass each, unless a drafter makes them in one pass."""
        return tokens * self.pass_ms

    def attach(self, cache: KvCache) -> None:
        """Called once per loop, before any sequence begins; drafters with an engine open it over the cache here."""
        return None

    def attached(self, part: Part | None) -> Part:
        """What :meth:`attach` makes; BackendError before it."""
        if part is None:
            raise BackendError(f"drafter {self.name} is not attached to a cache; call attach() first")
        return part

    def select(self, count: int) -> None:
        """The following proposals are for the cache rows 0 to ``count - 1``."""
        return None

    def begin(self, request: int, prompt: Sequence[int]) -> None:
        """A sequence starts."""
        return None

    def observe(self, request: int, row: int, features: AnyArray) -> None:
        """Rows of the target that became context: [rows, taps * hidden], in order, outputs of :attr:`taps`.

        ``row`` is the sequence's row in the cache. The array is the caller's: copy what is to be kept.
        """
        return None

    def collect(
        self, request: int, row: int, taps: ResidentTaps, batch_row: int, rows: Sequence[int], columns: Runs
    ) -> None:
        """:meth:`observe` without the host: ``rows`` and ``columns`` of one sequence of the target's last pass."""
        return None

    def reset(self, row: int) -> None:
        """Another sequence begins in cache row ``row``: whatever is known or waits there belongs to an earlier one."""
        return None

    def keep(self, row: int, length: int) -> int:
        """Only the first ``length`` context rows of cache row ``row`` stay: a text begins there like the one before.

        The two texts have their first ``length + 1`` tokens in common. Returns how many of these rows the drafter can
        do without having them shown again; the caller shows all rows behind the smallest number of all drafters.
        """
        return length

    def copy(self, source: int, target: int, length: int) -> int:
        """The same, with the context that row ``source`` has, for a sequence in row ``target``; ``source`` stays."""
        return length

    def move(self, source: int, target: int) -> None:
        """The sequence in cache row ``source`` goes to row ``target``, whose sequence has ended."""
        return None

    def observe_top(self, request: int, rows: Sequence[TopTokens]) -> None:
        """What the target held likely where each of the tokens stands that :meth:`commit` gives next.

        It is left out where logits do not come to the host.
        """
        return None

    def commit(self, request: int, tokens: Sequence[int]) -> None:
        """``tokens`` were appended to the committed text of a sequence."""
        return None

    def end(self, request: int) -> None:
        """A sequence is finished, cancelled or failed; forget it."""
        return None

    def prior(self, kind: Hashable) -> float:
        """Expected acceptance of a class before anything was seen."""
        return 0.5

    def propose(self, requests: Sequence[DraftRequest]) -> list[Draft | None]:
        """One proposal per request; None where there is nothing to propose. Override it to draft a batch at once."""
        return [self._one(request) if request.limit > 0 else None for request in requests]

    def _one(self, request: DraftRequest) -> Draft | None:
        proposal = self.draft(request)
        if proposal is None or isinstance(proposal, Draft):
            return proposal
        tokens = [int(token) for token in proposal][: request.limit]
        return Draft(TokenTree.chain(request.tokens[-1], tokens)) if tokens else None

    @abstractmethod
    def draft(self, request: DraftRequest) -> Draft | Sequence[int] | None:
        """Propose for one sequence: a chain of token ids, a :class:`Draft` with a tree, or None."""
