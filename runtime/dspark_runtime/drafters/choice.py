"""Which drafters a call uses: from ``speculate`` and what the bundle holds to drafter objects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

import numpy as np

from dspark_runtime.backends.protocol import GraphEngine, IntArray
from dspark_runtime.bundle.contract import LOGITS
from dspark_runtime.bundle.draft_contract import EXTEND, STEP
from dspark_runtime.bundle.files import BundleFiles
from dspark_runtime.bundle.manifest import DrafterEntry
from dspark_runtime.drafters.base import Drafter
from dspark_runtime.drafters.block import BlockDrafter, DraftSampling
from dspark_runtime.drafters.draft_model import DraftModelDrafter
from dspark_runtime.drafters.eagle3 import Eagle3Drafter
from dspark_runtime.drafters.ngram import NgramDrafter
from dspark_runtime.drafters.self_draft import SelfDrafter
from dspark_runtime.errors import DamagedBundle, IncompatibleBundle, UsageError

if TYPE_CHECKING:
    from dspark_runtime.backends.protocol import Engine
    from dspark_runtime.speculation.costs import PassCosts

AUTO, OFF, NGRAM, SELF_DRAFT = "auto", "off", "ngram", "self-draft"
SPECULATION_MODES = (AUTO, OFF, NGRAM, SELF_DRAFT, f"{NGRAM}+{SELF_DRAFT}")
"""Modes every bundle knows; trained drafters add their names, alone or joined with ``+``."""

_TRAINED = ("block", "eagle3", "draft_model")


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
        if not isinstance(self.threshold, int | float) or not 0.0 <= self.threshold <= 1.0:
            raise UsageError(f"confidence_threshold={self.threshold!r}: give a number from 0 (keep all drafts) to 1")
        if self.branches is not None and (isinstance(self.branches, bool) or not 1 <= self.branches <= 8):
            raise UsageError(f"draft_branches={self.branches!r}: give a number from 1 (a chain) to 8")


@dataclass(frozen=True)
class DrafterChoice:
    """Makes the drafters of one bundle.

    ``engine`` loads a graph over the target's cache, ``graph_engine`` one with a cache of its own; both take the
    graph's name and whether several sequences share a pass.
    """

    files: BundleFiles
    costs: PassCosts
    engine: Callable[[str, bool], Engine]
    graph_engine: Callable[[str, bool], GraphEngine]

    def modes(self) -> list[str]:
        """Every mode this bundle has graphs for, plain decoding first."""
        trained = [entry.name for entry in self._entries() if entry.kind in _TRAINED]
        own = [SELF_DRAFT, f"{NGRAM}+{SELF_DRAFT}"] if self.files.has_graph("self_draft") else []
        return [OFF, AUTO, NGRAM, *own, *trained, *(f"{NGRAM}+{name}" for name in trained)]

    def make(self, speculate: object, batched: bool, options: DraftOptions) -> list[Drafter]:
        """The drafters of a call.

        Raises:
            UsageError: ``speculate`` names nothing this bundle has.
            IncompatibleBundle: a self-draft is asked for and the bundle has none.
        """
        if isinstance(speculate, Drafter):
            return [speculate]
        if isinstance(speculate, list | tuple):
            chosen = list(speculate)
            if not all(isinstance(drafter, Drafter) for drafter in chosen):
                raise UsageError("speculate: a list may hold Drafter objects only")
            return chosen
        if speculate == OFF:
            return []
        names = self._auto() if speculate == AUTO else self._parsed(speculate)
        return [self._one(name, batched, options) for name in names]

    def _entries(self) -> Sequence[DrafterEntry]:
        return self.files.manifest.drafters

    def _parsed(self, speculate: object) -> list[str]:
        known = {NGRAM, SELF_DRAFT, *(entry.name for entry in self._entries())}
        names = speculate.split("+") if isinstance(speculate, str) else []
        if not names or len(set(names)) < len(names) or not set(names) <= known:
            raise UsageError(
                f"speculate={speculate!r} is unknown; choose {AUTO}, {OFF}, {', '.join(sorted(known))}, several of "
                "these joined with +, or give a Drafter"
            )
        return names

    def _auto(self) -> list[str]:
        """n-gram, with the first trained drafter, or else with the self-draft if that may pay."""
        trained = next((entry.name for entry in self._entries() if entry.kind in _TRAINED), None)
        if trained is not None:
            return [NGRAM, trained]
        return [NGRAM, SELF_DRAFT] if self._self_draft_may_pay() else [NGRAM]

    def _one(self, name: str, batched: bool, options: DraftOptions) -> Drafter:
        if name == NGRAM:
            return NgramDrafter()
        if name == SELF_DRAFT:
            return self._self_drafter(batched)
        entry = next(entry for entry in self._entries() if entry.name == name)
        return self._trained(entry, batched, options)

    # Trained drafters ----------------------------------------------------------------------------------------------

    def _trained(self, entry: DrafterEntry, batched: bool, options: DraftOptions) -> Drafter:
        model, graph = self.files.manifest.model, entry.graph or entry.name
        engine = self.graph_engine(graph, batched)
        positions = min(model.max_positions, entry.max_positions or model.max_positions)
        pass_ms = self._pass_ms(graph)
        if entry.kind == "block" and entry.block is not None:
            return BlockDrafter(
                entry.name,
                engine,
                entry.block,
                vocab_size=model.vocab_size,
                positions=positions,
                target_ids=self._target_ids(entry.block.vocab_map),
                sampling=options.sampling,
                threshold=options.threshold if entry.block.confidence else 0.0,
                branches=options.branches,
                pass_ms=pass_ms,
            )
        if entry.kind == "eagle3" and entry.eagle3 is not None:
            return Eagle3Drafter(
                entry.name,
                engine,
                self.graph_engine(graph.removesuffix(EXTEND) + STEP, batched),
                entry.eagle3,
                vocab_size=model.vocab_size,
                positions=positions,
                target_ids=self._target_ids(entry.eagle3.vocab_map),
                sampling=options.sampling,
                width=options.branches or 2,
                pass_ms=pass_ms,
            )
        if entry.kind == "draft_model":
            return DraftModelDrafter(
                entry.name,
                engine,
                vocab_size=model.vocab_size,
                positions=positions,
                sampling=options.sampling,
                width=options.branches or 1,
                pass_ms=pass_ms,
                readable=self._rows_of(graph),
            )
        raise DamagedBundle(f"drafter {entry.name} of kind {entry.kind} lacks its facts; build the bundle again")

    def _rows_of(self, graph: str) -> int | None:
        """Ids of a language model's own vocabulary: it has one row of logits for each."""
        outputs = {spec.name: spec.shape for spec in self.files.graph(graph).outputs}
        rows = outputs[LOGITS][-1] if LOGITS in outputs else None
        return rows if isinstance(rows, int) else None

    def _target_ids(self, path: str | None) -> IntArray | None:
        if path is None:
            return None
        ids = np.load(self.files.path(path))
        vocab = self.files.manifest.model.vocab_size
        if ids.ndim != 1 or ids.dtype != np.int64 or len(ids) == 0 or ids.min() < 0 or ids.max() >= vocab:
            raise DamagedBundle(f"{path} is no list of token ids below {vocab}; build the bundle again")
        return np.ascontiguousarray(ids)

    def _pass_ms(self, graph: str) -> float | None:
        """Milliseconds of a pass on the scale of this machine, as far as the bundle knows."""
        costs = self.files.manifest.costs
        own = costs.ms.get(graph, {}).get("1") if costs is not None else None
        plain = costs.ms.get("target", {}).get("1") if costs is not None else None
        return own / plain * self.costs.ms(1) if own and plain else None

    # Self-draft ----------------------------------------------------------------------------------------------------

    def _self_draft_facts(self) -> tuple[float, float] | None:
        """(agreement, milliseconds of a step) as far as the bundle knows; None without a self-draft graph."""
        if not self.files.has_graph("self_draft"):
            return None
        entry = next((entry for entry in self._entries() if entry.kind == "self_draft"), None)
        agreement = 0.5 if entry is None or entry.agreement is None else entry.agreement
        measured = self._pass_ms("self_draft")
        if measured is None:
            layers = self.files.graph("self_draft").layers or ()
            measured = (len(layers) + 1) / (self.files.manifest.model.num_layers + 1) * self.costs.ms(1)
        return agreement, measured

    def _self_draft_may_pay(self) -> bool:
        """Whether a chain of the self-draft could beat plain decoding, before loading its graph for a try."""
        known = self._self_draft_facts()
        if known is None:
            return False
        agreement, step_ms = known
        return any(
            sum(agreement**k for k in range(n + 1)) / (self.costs.ms(n + 1) + n * step_ms) > 1.05 / self.costs.ms(1)
            for n in range(1, 9)
        )

    def _self_drafter(self, batched: bool) -> SelfDrafter:
        known = self._self_draft_facts()
        if known is None:
            raise IncompatibleBundle(
                "this bundle has no self-draft graph; build it again with --self-draft, or use speculate='ngram'"
            )
        return SelfDrafter(self.engine("self_draft", batched), known[0], known[1])
