"""What restricts the tokens of a text: a grammar, a schema, a list of choices. Nothing here knows how it does so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt


class GuideState(Protocol):
    """Where one text is within its grammar. It only ever moves forward, by tokens that were drawn."""

    @property
    def stopped(self) -> bool:
        """The grammar is complete and nothing may follow."""

    def allowed(self) -> npt.NDArray[np.bool_]:
        """The tokens that may come next, bool [vocab]; valid until the next call of this or of :meth:`advance`.

        None at all where the grammar has a dead end, or cannot be followed further: the text then ends.
        """

    def advance(self, token: int) -> None:
        """``token`` came; it was allowed."""

    def accepts(self, tokens: Sequence[int]) -> int:
        """How many of ``tokens``, one after another, may follow here. Changes nothing."""

    def forced(self) -> list[int]:
        """Tokens that follow whatever the model wants, as far as there is no choice; empty where there is one."""


class Guide(Protocol):
    """A compiled grammar. It may be used by any number of requests at the same time."""

    def start(self) -> GuideState:
        """A state at the beginning of a text."""
