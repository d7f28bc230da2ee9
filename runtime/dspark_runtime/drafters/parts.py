"""What a trained drafter consists of: its options, and what it needs from the bundle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar, get_args

import numpy as np

from dspark_runtime.arguments import real, whole
from dspark_runtime.bundle.contract import LOGITS
from dspark_runtime.drafters.estimates import DraftSampling
from dspark_runtime.errors import DamagedBundle, UsageError

if TYPE_CHECKING:
    from dspark_runtime.arrays import IntArray
    from dspark_runtime.backends.protocol import GraphEngine
    from dspark_runtime.bundle.files import BundleFiles
    from dspark_runtime.bundle.manifest import DrafterEntry
    from dspark_runtime.speculation.costs import PassCosts

Facts = TypeVar("Facts")


@dataclass(frozen=True)
class DraftOptions:
    """How trained drafters draft, see :class:`dspark_runtime.drafters.block.BlockDrafter`.

    ``sampling``: ``greedy``, ``coupled`` or ``rejection``. ``threshold``: least confidence, applied where the drafter
    has a confidence head. ``branches``: most tokens that may follow one, None for the drafter's default.

    Raises:
        UsageError: an unknown sampling or a number outside its range.
    """

    sampling: DraftSampling = "coupled"
    threshold: float = 0.0
    branches: int | None = None

    def __post_init__(self) -> None:
        if self.sampling not in get_args(DraftSampling):
            raise UsageError(
                f"draft_sampling={self.sampling!r} is unknown; choose {', '.join(get_args(DraftSampling))}"
            )
        threshold = real(self.threshold)
        if threshold is None or not 0.0 <= threshold <= 1.0:
            raise UsageError(f"confidence_threshold={self.threshold!r}: give a number from 0 (keep all drafts) to 1")
        object.__setattr__(self, "threshold", threshold)
        if self.branches is not None:
            branches = whole("draft_branches", self.branches, 1, 8, "None or a whole number")
            object.__setattr__(self, "branches", branches)


@dataclass(frozen=True)
class DrafterParts:
    """What ``from_entry`` of a kind of drafter makes one from.

    ``engine`` loads a graph of the drafter, by name. ``costs`` are the target's on this machine.
    """

    files: BundleFiles
    costs: PassCosts
    engine: Callable[[str], GraphEngine]
    options: DraftOptions

    @property
    def vocab_size(self) -> int:
        """Of the target."""
        return self.files.manifest.model.vocab_size

    def positions(self, entry: DrafterEntry) -> int:
        """Positions that both the target and the draft were made for."""
        most = self.files.manifest.model.max_positions
        return min(most, entry.max_positions or most)

    def target_ids(self, entry: DrafterEntry) -> IntArray | None:
        """int64 [draft vocab]: the target's id of every draft token; None where they are the same.

        Raises:
            DamagedBundle: the file holds something else.
        """
        path = entry.vocab_map
        if path is None:
            return None
        ids = np.load(self.files.path(path))
        vocab = self.vocab_size
        if ids.ndim != 1 or ids.dtype != np.int64 or len(ids) == 0 or ids.min() < 0 or ids.max() >= vocab:
            raise DamagedBundle(f"{path} is not a list of token ids below {vocab}; build the bundle again")
        return np.ascontiguousarray(ids)

    def rows_of(self, graph: str) -> int | None:
        """Ids of a language model's own vocabulary: it has one row of logits for each."""
        outputs = {spec.name: spec.shape for spec in self.files.graph(graph).outputs}
        rows = outputs[LOGITS][-1] if LOGITS in outputs else None
        return rows if isinstance(rows, int) else None

    def pass_ms(self, graph: str) -> float | None:
        """Milliseconds of a pass on the scale of this machine, as far as the bundle knows."""
        costs = self.files.manifest.costs
        own = costs.ms.get(graph, {}).get("1") if costs is not None else None
        plain = costs.ms.get("target", {}).get("1") if costs is not None else None
        return own / plain * self.costs.ms(1) if own and plain else None


def required(facts: Facts | None, entry: DrafterEntry) -> Facts:
    """``facts`` of a kind of drafter; DamagedBundle where its entry in the manifest lacks them."""
    if facts is None:
        raise DamagedBundle(f"drafter {entry.name} of kind {entry.kind} lacks its facts; build the bundle again")
    return facts
