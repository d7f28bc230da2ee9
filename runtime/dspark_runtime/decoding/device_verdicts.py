"""Converts trees for backends that verify on the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dspark_runtime.backends.protocol import TreeCheck, TreeVerdicts
from dspark_runtime.decoding.sequence import SequenceState
from dspark_runtime.errors import BackendError
from dspark_runtime.speculation.tree import TokenTree
from dspark_runtime.speculation.verify import Verdict


def tree_check(trees: Sequence[TokenTree], sequences: Sequence[SequenceState]) -> TreeCheck:
    """Trees, sampling parameters and the random number of every row: that of the position the row draws for."""
    batch, rows = len(trees), max(len(tree) for tree in trees)
    check = TreeCheck(
        tokens=np.zeros((batch, rows), np.int64),
        ancestors=np.zeros((batch, rows, rows), np.bool_),
        uniforms=np.zeros((batch, rows), np.float32),
        temperature=np.zeros(batch, np.float32),
        top_k=np.zeros(batch, np.int64),
        top_p=np.ones(batch, np.float32),
        min_p=np.zeros(batch, np.float32),
    )
    for i, (tree, sequence) in enumerate(zip(trees, sequences, strict=True)):
        count, params = len(tree), sequence.request.params
        check.tokens[i, :count] = tree.tokens
        check.ancestors[i, :count, :count] = tree.ancestors()
        if params.greedy:
            continue
        start = len(sequence.tokens) - 1
        check.uniforms[i, :count] = [sequence.sampler.uniform_at(start + 1 + depth) for depth in tree.depths]
        check.temperature[i], check.top_k[i] = params.temperature, params.top_k
        check.top_p[i], check.min_p[i] = params.top_p, params.min_p
    return check


def read_verdicts(found: TreeVerdicts) -> list[Verdict | None]:
    """A verdict for each sequence; BackendError if logits were no numbers."""
    verdicts: list[Verdict | None] = []
    paths, tokens = found.path.tolist(), found.emitted.tolist()
    for path, emitted, accepted in zip(paths, tokens, found.accepted.tolist(), strict=True):
        count = accepted + 1
        if -1 in emitted[:count]:
            raise BackendError("the model gave logits that are not finite; its weights or its precision are damaged")
        verdicts.append(Verdict(path[:count], emitted[:count]))
    return verdicts
