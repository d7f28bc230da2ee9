"""Turns ``speculate`` and what the bundle holds into the drafter objects a call uses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dspark_runtime.backends.protocol import GraphEngine
from dspark_runtime.bundle.files import BundleFiles
from dspark_runtime.bundle.manifest import DrafterEntry
from dspark_runtime.drafters.base import Drafter
from dspark_runtime.drafters.block import BlockDrafter
from dspark_runtime.drafters.draft_model import DraftModelDrafter
from dspark_runtime.drafters.eagle3 import Eagle3Drafter
from dspark_runtime.drafters.ngram import NgramDrafter
from dspark_runtime.drafters.parts import DrafterParts, DraftOptions
from dspark_runtime.drafters.self_draft import SelfDrafter
from dspark_runtime.drafters.store import StoreDrafter
from dspark_runtime.errors import IncompatibleBundle, UsageError
from dspark_runtime.phrases.store import PhraseStore

if TYPE_CHECKING:
    from dspark_runtime.backends.protocol import Engine
    from dspark_runtime.speculation.costs import PassCosts

AUTO, OFF, NGRAM, STORE, SELF_DRAFT = "auto", "off", "ngram", "store", "self-draft"
SPECULATION_MODES = (AUTO, OFF, NGRAM, STORE, SELF_DRAFT, f"{STORE}+{SELF_DRAFT}")
"""Modes every bundle knows; trained drafters add their names, alone or joined with ``+``."""

_TRAINED: dict[str, Callable[[DrafterEntry, DrafterParts], Drafter]] = {
    "block": BlockDrafter.from_entry,
    "eagle3": Eagle3Drafter.from_entry,
    "draft_model": DraftModelDrafter.from_entry,
}


@dataclass(frozen=True)
class DrafterChoice:
    """Makes the drafters of one bundle.

    ``engine`` loads a graph over the target's cache, ``graph_engine`` one with its own cache; both take the
    graph's name and whether several sequences share a pass.
    """

    files: BundleFiles
    costs: PassCosts
    phrases: PhraseStore
    engine: Callable[[str, bool], Engine]
    graph_engine: Callable[[str, bool], GraphEngine]

    def modes(self) -> list[str]:
        """Every mode this bundle has graphs for, plain decoding first."""
        trained = [entry.name for entry in self._entries() if entry.trained]
        own = [SELF_DRAFT, f"{STORE}+{SELF_DRAFT}"] if self.files.has_graph("self_draft") else []
        return [OFF, AUTO, NGRAM, STORE, *own, *trained, *(f"{STORE}+{name}" for name in trained)]

    def make(self, speculate: object, batched: bool, options: DraftOptions) -> list[Drafter]:
        """The drafters of a call. ``speculate`` False is ``off``, True and None are ``auto``.

        Raises:
            UsageError: ``speculate`` names nothing this bundle has.
            IncompatibleBundle: a self-draft is requested and the bundle has none.
        """
        if isinstance(speculate, Drafter):
            return [speculate]
        if isinstance(speculate, list | tuple):
            chosen = list(speculate)
            if not all(isinstance(drafter, Drafter) for drafter in chosen):
                raise UsageError("speculate: a list may hold Drafter objects only")
            return chosen
        if speculate is False or speculate == OFF:
            return []
        names = self._auto() if speculate is None or speculate is True or speculate == AUTO else self._parsed(speculate)
        return [self._one(name, batched, options) for name in names]

    def _entries(self) -> Sequence[DrafterEntry]:
        return self.files.manifest.drafters

    def _parsed(self, speculate: object) -> list[str]:
        known = {NGRAM, STORE, SELF_DRAFT, *(entry.name for entry in self._entries())}
        names = speculate.split("+") if isinstance(speculate, str) else []
        if not names or len(set(names)) < len(names) or not set(names) <= known:
            raise UsageError(
                f"speculate={speculate!r} is unknown; choose {AUTO}, {OFF}, {', '.join(sorted(known))}, several of "
                "these joined with +, or give a Drafter"
            )
        return names

    def _auto(self) -> list[str]:
        """n-gram with the first trained drafter; without one n-gram, the store, and the self-draft if it may pay.

        Beside a trained drafter the store did not pay where it was measured, see docs/performance.md.
        """
        trained = next((entry.name for entry in self._entries() if entry.trained), None)
        if trained is not None:
            return [NGRAM, trained]
        return [NGRAM, STORE, SELF_DRAFT] if self._self_draft_may_pay() else [NGRAM, STORE]

    def _one(self, name: str, batched: bool, options: DraftOptions) -> Drafter:
        if name == NGRAM:
            return NgramDrafter()
        if name == STORE:
            return StoreDrafter(self.phrases)
        if name == SELF_DRAFT:
            return self._self_drafter(batched)
        entry = next(entry for entry in self._entries() if entry.name == name)
        return _TRAINED[entry.kind](entry, self._parts(batched, options))

    def _parts(self, batched: bool, options: DraftOptions) -> DrafterParts:
        return DrafterParts(self.files, self.costs, lambda graph: self.graph_engine(graph, batched), options)

    # Self-draft ----------------------------------------------------------------------------------------------------

    def _self_draft_facts(self) -> tuple[float, float] | None:
        """(agreement, milliseconds of a step) as far as the bundle knows; None without a self-draft graph."""
        if not self.files.has_graph("self_draft"):
            return None
        entry = next((entry for entry in self._entries() if entry.kind == "self_draft"), None)
        agreement = 0.5 if entry is None or entry.agreement is None else entry.agreement
        measured = self._parts(False, DraftOptions()).pass_ms("self_draft")
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
