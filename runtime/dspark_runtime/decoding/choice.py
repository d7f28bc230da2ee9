"""Chooses the tokens of one sequence: the target's logits, what the request wants of them, and the sampler.

What a request may want depends on its text so far: penalties on what was said, a bias, a guide. Verification asks for
one token after another along the accepted path of a tree, so the text that counts is always the one before the row in
question. In this order, each where the request has it:

* ``logit_bias`` is added;
* ``repetition_penalty`` divides positive logits of tokens in prompt and text, and multiplies negative ones (Keskar et
  al. 2019);
* ``frequency_penalty`` is taken off for each time a token is in the text, ``presence_penalty`` once;
* tokens that the guide forbids go to minus infinity.

The sampler comes after all of them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dspark_runtime.arrays import FloatArray
from dspark_runtime.decoding.request import Request
from dspark_runtime.drafters.base import Draft
from dspark_runtime.speculation.sampling import Sampler


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural logarithms of the probabilities the model itself gave, before temperature, filters, bias and penalties.

    ``top``: the most likely tokens and theirs, most likely first; as many as the request wants.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class TokenChoice:
    """Draws the tokens of one request in the order of its text.

    ``adjusted``: whether logits are changed before a token is drawn; what is drafted must then not be verified
    without them. ``guide_end``: tokens of the text after which the guide allows no other; -1 while there are more to
    come. ``dead_end``: its grammar is not complete there.
    """

    def __init__(self, request: Request) -> None:
        params = request.params
        self.sampler = Sampler(params, request.seed, request.key)
        self._params = params
        self._guide = params.guide.start() if params.guide is not None else None
        self._allowed: npt.NDArray[np.bool_] | None = None  # of the next token, once the last one came
        self.guide_end, self.dead_end = -1, False
        self._counts: Counter[int] = Counter()
        self._seen = set(request.prompt) if params.repetition_penalty != 1 else set[int]()
        bias = params.biases
        self._biased = np.fromiter((token for token, _ in bias), np.int64, len(bias))
        self._bias = np.fromiter((value for _, value in bias), np.float32, len(bias))
        self.adjusted = params.adjusts

    def draw(self, logits: FloatArray, position: int) -> int:
        """Token for ``position``, the next one of the text, from the logits [vocab] of the row before it."""
        if not self.adjusted:
            return self.sampler.draw(logits, position)
        token = self.sampler.draw(self._adjust(logits), position)
        self._counts[token] += 1
        if self._params.repetition_penalty != 1:
            self._seen.add(token)
        if self.guided:
            self._advance(token, len(logits))
        return token

    def _advance(self, token: int, vocab_size: int) -> None:
        """Move the guide on. A text that no token may follow ends here, so that none is drawn from nothing."""
        assert self._guide is not None
        self._guide.advance(token)
        if not self._guide.stopped:
            self._allowed = self._guide.allowed()[:vocab_size]
            self.dead_end = not self._allowed.any()
        if self._guide.stopped or self.dead_end:
            self.guide_end = self._counts.total()

    def logprob(self, logits: FloatArray, token: int) -> TokenLogprob:
        """Log probability of ``token`` and of the most likely ones in one row of logits [vocab]."""
        wanted = self._params.logprobs or 0
        wide = logits.astype(np.float64)
        top = wide.max()
        logs = wide - (top + np.log(np.exp(wide - top).sum()))
        best = np.argpartition(-logs, wanted)[: wanted + 1] if wanted < len(logs) - 1 else np.arange(len(logs))
        best = best[np.lexsort((best, -logs[best]))][:wanted]
        return TokenLogprob(token, float(logs[token]), tuple((int(i), float(logs[i])) for i in best))

    @property
    def guided(self) -> bool:
        """Whether a guide restricts the next token."""
        return self._guide is not None and not self._guide.stopped and not self.dead_end

    def allowed_part(self, draft: Draft) -> Draft | None:
        """``draft`` without the tokens that the guide would refuse, and what follows them; None if none is left."""
        if self._guide is None or not self.guided:
            return draft
        tokens, parents = draft.tree.tokens, draft.tree.parents
        if draft.tree.is_chain:
            return draft.part(range(self._guide.accepts(tokens[1:]) + 1))
        paths: list[list[int]] = [[]]
        kept = [0]
        for row in range(1, len(tokens)):
            paths.append([*paths[parents[row]], tokens[row]])
            if parents[row] in kept and self._guide.accepts(paths[row]) == len(paths[row]):
                kept.append(row)
        return draft.part(kept)

    def forced(self) -> list[int]:
        """Tokens that the guide lets follow and no others; empty where there is a choice or no guide."""
        return self._guide.forced() if self._guide is not None and self.guided else []

    def _adjust(self, logits: FloatArray) -> FloatArray:
        params, logits = self._params, logits.copy()
        if len(self._biased):
            logits[self._biased] += self._bias
        if self._seen:
            seen = np.fromiter(self._seen, np.int64, len(self._seen))
            values, penalty = logits[seen], np.float32(params.repetition_penalty)
            logits[seen] = np.where(values > 0, values / penalty, values * penalty)
        if self._counts and (params.frequency_penalty or params.presence_penalty):
            said = np.fromiter(self._counts, np.int64, len(self._counts))
            times = np.fromiter(self._counts.values(), np.float32, len(self._counts))
            logits[said] -= np.float32(params.frequency_penalty) * times + np.float32(params.presence_penalty)
        if self._guide is not None and self.guided:
            allowed = self._guide.allowed()[: len(logits)] if self._allowed is None else self._allowed
            logits[: len(allowed)][~allowed] = -np.inf
            logits[len(allowed) :] = -np.inf
        return logits
