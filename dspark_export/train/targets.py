"""What a drafter takes over from its target: sizes, taps, mask token, and the tokens worth drafting."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from dspark_export.prompts.answers import Response
from dspark_export.train.module import DraftGeometry
from dspark_export.train.options import DrafterShape
from dspark_runtime.errors import UnsupportedArchitecture, UsageError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from dspark_export.checkpoints import Checkpoint


def geometry_for(checkpoint: Checkpoint, shape: DrafterShape) -> DraftGeometry:
    """Sizes of a drafter of ``shape`` for a target.

    Raises:
        UnsupportedArchitecture: the target has no rotary embedding a drafter could share.
        UsageError: taps outside its layers, heads that do not go together, or no token that could be the mask.
    """
    config: PretrainedConfig = checkpoint.config.get_text_config()
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, dict) and any(isinstance(value, dict) for value in rope.values()):
        rope = rope.get("full_attention")
    if not isinstance(rope, dict) or rope.get("rope_theta") is None or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedArchitecture(
            f"{checkpoint.id} ({config.model_type}) has no rotary embedding over whole heads; drafters are trained for "
            "targets that have one"
        )
    depth, heads = int(config.num_hidden_layers), int(config.num_attention_heads)
    taps = shape.taps or default_taps(depth)
    if wrong := [tap for tap in taps if not -1 <= tap <= depth - 2]:
        raise UsageError(f"--taps {wrong[0]}: {checkpoint.id} has layers to tap from -1 (the embedding) to {depth - 2}")
    kv_heads = shape.kv_heads or heads
    if heads % kv_heads:
        raise UsageError(f"--kv-heads {kv_heads}: {checkpoint.id} has {heads} query heads, which it must divide")
    return DraftGeometry(
        hidden=int(config.hidden_size),
        intermediate=shape.intermediate or int(config.intermediate_size),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        vocab=checkpoint.vocab_size,
        layers=shape.layers,
        block=shape.block,
        taps=tuple(taps),
        mask_token=mask_token(checkpoint),
        markov=shape.markov,
        rank=shape.rank,
        confidence=shape.confidence,
        theta=float(rope["rope_theta"]),
        rope={key: value for key, value in rope.items() if value is not None},
        positions=int(config.max_position_embeddings),
        epsilon=float(getattr(config, "rms_norm_eps", 1e-6)),
    )


def default_taps(depth: int) -> tuple[int, ...]:
    """Five layers spread evenly from the second to the third from the end, fewer of a shallow target."""
    if depth < 7:
        return tuple(range(max(1, depth - 1)))
    return tuple(sorted({round(1 + i * (depth - 4) / 4) for i in range(5)}))


def mask_token(checkpoint: Checkpoint) -> int:
    """A token that never occurs in the target's texts: a row beyond the tokenizer's, else the last reserved token."""
    if checkpoint.tokenizer is None:
        return checkpoint.vocab_size - 1
    backend = checkpoint.tokenizer.backend
    known = backend.get_vocab(with_added_tokens=True)
    if len(known) < checkpoint.vocab_size and checkpoint.vocab_size - 1 not in known.values():
        return checkpoint.vocab_size - 1
    template = checkpoint.tokenizer.chat_template or ""
    used = {*checkpoint.eos_token_ids, checkpoint.bos_token_id, checkpoint.pad_token_id}
    special = {id_: token.content for id_, token in backend.get_added_tokens_decoder().items() if token.special}
    free = [id_ for id_, text in special.items() if id_ not in used and text not in template]
    if not free:
        raise UsageError(f"{checkpoint.id} has no unused or reserved token that could stand for a token to be drafted")
    return max(free)


def embedding_and_head(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """The target's embedding as it looks tokens up (scaled where it scales), and its head; [vocab, hidden] each."""
    table = model.get_input_embeddings()
    scale = getattr(table, "embed_scale", None)
    embedding = table.weight if scale is None else table.weight * float(scale)
    return embedding.detach(), model.get_output_embeddings().weight.detach()


def frequent_tokens(
    responses: Iterable[Response], size: int | None, vocab: int, mask_token: int, always: Sequence[int] = ()
) -> torch.Tensor | None:
    """int64 [size], ascending: ``always`` and the tokens responses have most often, filled up with the lowest ids.

    None, for all of them, if ``size`` is None or not below ``vocab``. The mask token is never drafted.
    """
    if size is None or size >= vocab:
        return None
    counts: Counter[int] = Counter()
    for item in responses:
        counts.update(item.response)
    wanted = dict.fromkeys([*always, *(token for token, _ in counts.most_common(size + 1)), *range(size + 1)])
    chosen = [token for token in wanted if token != mask_token][:size]
    return torch.tensor(sorted(chosen), dtype=torch.int64)
