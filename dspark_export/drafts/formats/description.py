"""What a format's reader says about a draft before its weights are looked at, and the tensors that follow from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dspark_export.drafts.formats.draft import BlockConfig, EagleConfig, TapsRule

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
D2T, T2D = "d2t", "t2d"
MAPS = (D2T, T2D)

Shape = tuple[int, ...]


def _same(name: str) -> str:
    return name


@dataclass(frozen=True)
class Description:
    """A draft as its config describes it.

    ``rename`` turns a stored name into DeepSpec's. ``trained_embedding``, ``trained_head``: if stored they are the
    draft's own by design, not copies of the target's. ``maps``: the format has ``d2t`` and ``t2d``. ``target_layers``:
    depth of the target it was trained for, if the config has it. ``taps_rule``: where its taps come from, and
    ``taps_count`` how many they are.
    ``rope_copied``: its rotary settings are a copy of the target's, so that others are a mistake.
    """

    format: str
    config: BlockConfig | EagleConfig
    rename: Callable[[str], str] = _same
    trained_embedding: bool = False
    trained_head: bool = False
    maps: bool = False
    target_layers: int | None = None
    taps_rule: TapsRule = "given"
    taps_count: int | None = None
    rope_copied: bool = False


def expected_tensors(description: Description) -> Iterator[tuple[str, Shape]]:
    """Every tensor the draft needs under DeepSpec's names, without copies of the target's and vocabulary maps."""
    config = description.config
    layers, hidden = config.layers, config.layers.hidden_size
    taps = description.taps_count or len(config.taps)
    yield "fc.weight", (hidden, taps * hidden)
    yield "norm.weight", (hidden,)
    if isinstance(config, EagleConfig):
        if config.fc_bias:
            yield "fc.bias", (hidden,)
        yield "layers.0.hidden_norm.weight", (hidden,)
        yield from _layer(config, 0, 2 * hidden, config.qk_norm)
        return
    yield "hidden_norm.weight", (hidden,)
    for i in range(layers.count):
        yield from _layer(config, i, hidden, True)
    yield from _heads(config, hidden)


def _layer(config: BlockConfig | EagleConfig, number: int, width: int, qk_norm: bool) -> Iterator[tuple[str, Shape]]:
    layers, p = config.layers, f"layers.{number}."
    hidden, inner, head = layers.hidden_size, layers.intermediate_size, layers.head_dim
    norms = ["input_layernorm", "post_attention_layernorm"]
    if layers.family == "gemma4":
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        yield f"{p}layer_scalar", (1,)
    for name in norms:
        yield f"{p}{name}.weight", (hidden,)
    for name in ("q", "k") if qk_norm else ():
        yield f"{p}self_attn.{name}_norm.weight", (head,)
    projections = {"q": layers.heads * head, "k": layers.kv_heads * head}
    if not layers.k_eq_v:
        projections["v"] = layers.kv_heads * head
    shapes = {name: (rows, width) for name, rows in projections.items()} | {"o": (hidden, layers.heads * head)}
    for name, shape in shapes.items():
        yield f"{p}self_attn.{name}_proj.weight", shape
        if layers.attention_bias:
            yield f"{p}self_attn.{name}_proj.bias", shape[:1]
    yield f"{p}mlp.gate_proj.weight", (inner, hidden)
    yield f"{p}mlp.up_proj.weight", (inner, hidden)
    yield f"{p}mlp.down_proj.weight", (hidden, inner)


def _heads(config: BlockConfig, hidden: int) -> Iterator[tuple[str, Shape]]:
    rank = config.markov_rank
    if config.markov != "none":
        yield "markov_head.markov_w1.weight", (config.vocab_size, rank)
        yield "markov_head.markov_w2.weight", (config.draft_vocab_size, rank)
    if config.markov == "gated":
        yield "markov_head.gate_proj.weight", (rank, hidden + rank)
        yield "markov_head.gate_proj.bias", (rank,)
    if config.markov == "rnn":
        yield "markov_head.joint_proj.weight", (3 * rank, 2 * rank + hidden)
        yield "markov_head.joint_proj.bias", (3 * rank,)
    if config.confidence:
        yield "confidence_head.proj.weight", (1, hidden + (rank if config.confidence_with_markov else 0))
        yield "confidence_head.proj.bias", (1,)
