"""A draft as a build uses it, with everything that depends on the target filled in."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from dspark_export.drafts.formats.description import EMBEDDING, HEAD
from dspark_export.drafts.formats.draft import DraftCheckpoint
from dspark_export.drafts.pair_check.geometry import derived_taps
from dspark_export.drafts.pair_check.vocabulary import token_count

if TYPE_CHECKING:
    import torch

    from dspark_export.checkpoints import Checkpoint

_BY_TOKEN = (EMBEDDING, "markov_head.markov_w1.weight")


class FittedTensors(Mapping[str, "torch.Tensor"]):
    """Tensors of a draft and its copies; tables looked up by token have at least ``rows`` rows, the last ones zeros."""

    def __init__(self, own: Mapping[str, torch.Tensor], copies: Mapping[str, torch.Tensor], rows: int) -> None:
        self._own, self._copies, self._rows = own, copies, rows

    def __getitem__(self, name: str) -> torch.Tensor:
        import torch

        tensor = self._own[name] if name in self._own else self._copies[name]
        missing = self._rows - tensor.shape[0] if name in _BY_TOKEN else 0
        if missing <= 0:
            return tensor
        return torch.cat([tensor, tensor.new_zeros(missing, tensor.shape[1])])

    def __iter__(self) -> Iterator[str]:
        yield from self._own
        yield from (name for name in self._copies if name not in self._own)

    def __len__(self) -> int:
        return len(set(self._own) | set(self._copies))


def fit(target: Checkpoint, draft: DraftCheckpoint, own: Collection[str]) -> DraftCheckpoint:
    """``draft`` for ``target``: taps derived, padding rows not drafted, ``own`` copies (by name) used instead of the
    target's tables.

    A vocabulary with other padding than the target's becomes a reduced one that has exactly the tokenizer's tokens.
    """
    import torch

    ids, tokens = draft.target_ids, token_count(target)
    if ids is None and draft.config.vocab_size != target.vocab_size and tokens is not None:
        ids = torch.arange(tokens)
    copies = {name: draft.copies[name] for name in own}
    return replace(
        draft,
        config=replace(draft.config, taps=derived_taps(target, draft)),
        tensors=FittedTensors(draft.tensors, copies, target.vocab_size),
        target_ids=ids,
        own_embedding=draft.own_embedding or EMBEDDING in own,
        own_head=draft.own_head or HEAD in own,
    )
