"""Proposes what a guide leaves no choice about: the rest of a key, a closing bracket.

Nothing is put into the text: the tokens are verified like any others, and the model may spell the same text with other
tokens. A loop adds this drafter to its others as soon as a request has a guide.
"""

from __future__ import annotations

from collections.abc import Hashable

from dspark_runtime.drafters.base import Draft, Drafter, DraftRequest
from dspark_runtime.speculation.tree import TokenTree


class GrammarDrafter(Drafter):
    """See the module's text. All tokens are of one class."""

    name = "grammar"

    def prior(self, kind: Hashable) -> float:
        """Nearly certain."""
        return 0.97

    def draft(self, request: DraftRequest) -> Draft | None:
        """The tokens that are forced; none without a guide, or where it leaves a choice."""
        tokens = request.forced()[: request.limit] if request.forced is not None else []
        if not tokens:
            return None
        return Draft(TokenTree.chain(request.tokens[-1], tokens), ["forced"] * len(tokens))
