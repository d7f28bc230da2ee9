"""What a format's reader says about a draft before its weights are looked at, and the tensors that follow from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dspark_export.drafts.formats.draft import DraftConfig, Shape, TapsRule

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
D2T, T2D = "d2t", "t2d"
MAPS = (D2T, T2D)


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
    config: DraftConfig
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
    hidden, taps = config.layers.hidden_size, description.taps_count or len(config.taps)
    yield "fc.weight", (hidden, taps * hidden)
    yield "norm.weight", (hidden,)
    yield from config.tensors()
