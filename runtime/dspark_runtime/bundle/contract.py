"""Names, shapes and dtypes of every graph tensor: the single source for export and runtime.

Symbolic dimensions: ``batch``, ``tokens`` (new rows of one pass), ``kv_len`` (cache slots a pass looks at),
``capacity`` (cache slots allocated), ``rows`` (rows whose logits are wanted).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

OPSET = 24

PAST, PRESENT = "past_key_values.", "present."
"""How names of cache inputs and outputs begin."""

VERIFY = "verify"
"""Name of the graph that is ``VerifyTree`` alone."""

INPUT_IDS = "input_ids"
POSITION_IDS = "position_ids"
ATTENTION_MASK = "attention_mask"
WRITE_INDICES = "write_indices"
LOGIT_ROWS = "logit_rows"
LOGITS = "logits"
HIDDEN_TAPS = "hidden_taps"

Dim = int | str


def past_name(layer: int, part: str) -> str:
    """Input name of one cache tensor; ``part`` is ``key`` or ``value``."""
    return f"{PAST}{layer}.{part}"


def present_name(layer: int, part: str) -> str:
    """Output name of one cache tensor: the same memory as :func:`past_name`."""
    return f"{PRESENT}{layer}.{part}"


@dataclass(frozen=True)
class TensorSpec:
    """One graph tensor: name, ONNX element type in numpy spelling (``int64``, ``bool``, ``float32``, ...), dims."""

    name: str
    dtype: str
    shape: tuple[Dim, ...]


_SAMPLING = (
    TensorSpec("temperature", "float32", ("batch",)),
    TensorSpec("top_k", "int64", ("batch",)),
    TensorSpec("top_p", "float32", ("batch",)),
    TensorSpec("min_p", "float32", ("batch",)),
)
_VERIFIED = (
    TensorSpec(LOGITS, "float32", ("batch", "rows", "vocab")),
    TensorSpec("tokens", "int64", ("batch", "rows")),
)
VERIFY_INPUTS = (
    *_VERIFIED,
    TensorSpec("ancestors", "bool", ("batch", "rows", "rows")),
    TensorSpec("uniforms", "float32", ("batch", "rows")),
    *_SAMPLING,
)
"""Of ``VerifyTree``, in order; docs/plugins.md says what they mean. Plugins also read half-precision logits."""

VERIFY_CHAIN_INPUTS = (
    *_VERIFIED,
    TensorSpec("draft_probs", "float32", ("batch", "drafts", "vocab")),
    TensorSpec("drafted", "int64", ("batch",)),
    TensorSpec("accept_uniforms", "float32", ("batch", "drafts")),
    TensorSpec("draw_uniforms", "float32", ("batch", "rows")),
    *_SAMPLING,
)
"""Of ``VerifyChain``; ``drafts`` is ``rows`` - 1."""

VERIFY_OUTPUTS = (
    TensorSpec("path", "int64", ("batch", "rows")),
    TensorSpec("emitted", "int64", ("batch", "rows")),
    TensorSpec("accepted", "int64", ("batch",)),
)
"""Of both."""


@dataclass(frozen=True)
class CacheLayer:
    """Geometry of one layer's cache. ``window`` is the sliding window in tokens, or None for full attention."""

    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None


@dataclass(frozen=True)
class GraphContract:
    """What goes into and comes out of one graph, in order."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def decoder_contract(
    name: str,
    cache: Sequence[CacheLayer],
    vocab_size: int,
    dtype: str,
    *,
    layers: Sequence[int] | None = None,
    taps_width: int = 0,
) -> GraphContract:
    """Contract of ``target`` and ``self_draft``.

    ``layers`` are the decoder layers the graph runs (all by default); cache tensors keep the target's layer numbers.
    ``taps_width`` is taps x hidden size, 0 for no ``hidden_taps`` output.
    """
    used = tuple(range(len(cache))) if layers is None else tuple(layers)
    past: list[TensorSpec] = []
    present: list[TensorSpec] = []
    for i in used:
        for part, width in (("key", cache[i].key_dim), ("value", cache[i].value_dim)):
            shape: tuple[Dim, ...] = ("batch", cache[i].kv_heads, "capacity", width)
            past.append(TensorSpec(past_name(i, part), dtype, shape))
            present.append(TensorSpec(present_name(i, part), dtype, shape))
    inputs = (
        TensorSpec(INPUT_IDS, "int64", ("batch", "tokens")),
        TensorSpec(POSITION_IDS, "int64", ("batch", "tokens")),
        TensorSpec(ATTENTION_MASK, "bool", ("batch", 1, "tokens", "kv_len")),
        TensorSpec(WRITE_INDICES, "int64", ("batch",)),
        TensorSpec(LOGIT_ROWS, "int64", ("batch", "rows")),
        *past,
    )
    taps = (TensorSpec(HIDDEN_TAPS, dtype, ("batch", "tokens", taps_width)),) if taps_width else ()
    outputs = (TensorSpec(LOGITS, "float32", ("batch", "rows", vocab_size)), *taps, *present)
    return GraphContract(name, inputs, outputs)
