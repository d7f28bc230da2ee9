"""Checks a draft's widths, depths, taps, positions and rotation against its target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dspark_export.checkpoints.config import positions_of
from dspark_export.drafts.formats.draft import BlockConfig, DraftCheckpoint
from dspark_export.drafts.formats.speculators import eagle3_taps
from dspark_export.drafts.formats.zlab import zlab_taps
from dspark_export.drafts.pair_check.report import Finding, passed
from dspark_runtime.errors import BlockSizeMismatch, HiddenSizeMismatch, RopeMismatch, TapsMismatch

if TYPE_CHECKING:
    from dspark_export.checkpoints import Checkpoint

_OTHER = "use a draft trained for this model"
_FULL = "full_attention"


def depth(target: Checkpoint) -> int:
    """Decoder layers of the target."""
    return int(target.config.get_text_config().num_hidden_layers)


def check_width(target: Checkpoint, draft: DraftCheckpoint) -> list[Finding]:
    """Hidden size; the width of heads may differ."""
    config, layers = target.config.get_text_config(), draft.config.layers
    ours, theirs = int(config.hidden_size), layers.hidden_size
    asked = "the draft reads features as wide as the model's hidden rows"
    if ours != theirs:
        found = f"the model's are {ours} wide, the draft takes {theirs}"
        findings = [Finding("hidden_size", "error", asked, found, _OTHER, HiddenSizeMismatch)]
    else:
        findings = [passed("hidden_size", asked, str(ours))]
    if layers.family == "gemma4" or not draft.rope_copied:
        return findings  # the layers of Gemma 4 differ in the width of their heads: there is no single one to compare
    head = getattr(config, "head_dim", None)
    if isinstance(head, int) and head != layers.head_dim:
        found = f"{head} in the model, {layers.head_dim} in the draft"
        findings.append(Finding("head_dim", "warning", "drafts usually have heads as wide as the model's", found))
    return findings


def derived_taps(target: Checkpoint, draft: DraftCheckpoint) -> tuple[int, ...]:
    """The layers the draft reads, by its format's rule if its files do not name them."""
    if draft.config.taps or draft.taps_rule == "given":
        return draft.config.taps
    if draft.taps_rule == "zlab":
        return zlab_taps(depth(target), draft.config.layers.count)
    return eagle3_taps(depth(target))


def check_taps(target: Checkpoint, draft: DraftCheckpoint) -> list[Finding]:
    """Depth of the target the draft was made for, and the layers it reads."""
    count, findings = depth(target), []
    if draft.target_layers is not None and draft.target_layers != count:
        found = f"it was trained for a model of {draft.target_layers} layers, this one has {count}"
        asked = "the draft has to be made for a model of this depth"
        findings.append(Finding("depth", "error", asked, found, _OTHER, TapsMismatch))
    asked = f"the draft may read the embedding (-1) and the outputs of layers 0 to {count - 2}"
    taps = derived_taps(target, draft)
    wide = draft.tensors["fc.weight"].shape[1] // draft.config.layers.hidden_size
    wrong = [tap for tap in taps if not -1 <= tap <= count - 2]
    if count - 1 in wrong:
        found = f"it reads layer {count - 1}, the last one, whose output no draft is trained on"
        findings.append(Finding("taps", "error", asked, found, _OTHER, TapsMismatch))
    elif wrong:
        findings.append(Finding("taps", "error", asked, f"it reads {_listed(wrong)}", _OTHER, TapsMismatch))
    elif len(taps) != wide or list(taps) != sorted(set(taps)):
        found = f"its config names no layers, and the usual {_listed(taps)} are not the {wide} its fc.weight takes"
        findings.append(
            Finding("taps", "error", asked, found, f"name them in its config.json, or {_OTHER}", TapsMismatch)
        )
    else:
        rule = "" if draft.config.taps else ", derived from the model's depth"
        findings.append(passed("taps", asked, _listed(taps) + rule))
    return findings


def _listed(numbers: tuple[int, ...] | list[int]) -> str:
    return ", ".join(map(str, numbers))


def check_block(draft: DraftCheckpoint, drafts: int | None) -> list[Finding]:
    """Tokens per round: ``drafts`` if given, otherwise as many as it was trained for."""
    config = draft.config
    can = config.drafts
    asked = f"the draft has to draft {drafts or 'at least 1'} tokens per round"
    if can < (drafts or 1):
        if isinstance(config, BlockConfig):
            found = f"its blocks of {config.block} give {can}; longer ones would be guesses it was never trained for"
            fix = f"ask for at most {can}, or use a draft with longer blocks"
            return [Finding("block_size", "error", asked, found, fix, BlockSizeMismatch)]
        found = f"it was trained for {can} in a row; later ones are rarely right"
        return [Finding("block_size", "warning", asked, found)]
    return [passed("block_size", asked, f"it drafts {can}")]


def check_positions(target: Checkpoint, draft: DraftCheckpoint | Checkpoint) -> list[Finding]:
    """Positions of the draft; beyond the last one it drafts nothing."""
    ours = positions_of(target.config)
    theirs = draft.config.layers.max_positions if isinstance(draft, DraftCheckpoint) else positions_of(draft.config)
    asked = "the draft should reach as far as the model"
    if ours is not None and theirs is not None and theirs < ours:
        found = f"its positions end at {theirs}, the model's at {ours}; it drafts nothing beyond the last one"
        return [Finding("positions", "warning", asked, found)]
    return [passed("positions", asked, f"{theirs} positions")]


def check_rope(target: Checkpoint, draft: DraftCheckpoint) -> list[Finding]:
    """Rotary settings: base, type and its parameters.

    Others are an error for formats that copy the target's, and another base for every block draft: it caches keys of
    the target's features at the target's positions. EAGLE-3 drafts were often trained with a base of their own.
    """
    asked = "draft and model have to rotate positions alike"
    ours, theirs = _rope(target), _settings(draft.config.layers.rope.parameters or {})
    if ours is None:
        return [Finding("rope", "warning", asked, "the model has no rotary settings to compare")]
    wrong = sorted(key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key))
    if not wrong:
        return [passed("rope", asked, f"{theirs['rope_type']}, base {theirs['rope_theta']:g}")]
    found = "; ".join(f"{key} is {ours.get(key)} in the model and {theirs.get(key)} in the draft" for key in wrong)
    if draft.rope_copied or (isinstance(draft.config, BlockConfig) and "rope_theta" in wrong):
        return [Finding("rope", "error", asked, found, _OTHER, RopeMismatch)]
    return [Finding("rope", "warning", asked, found, "which is fine if it was trained like this")]


def _rope(target: Checkpoint) -> dict[str, Any] | None:
    found = getattr(target.config.get_text_config(), "rope_parameters", None)
    if isinstance(found, dict) and any(isinstance(value, dict) for value in found.values()):
        found = found.get(_FULL) or next(value for value in found.values() if isinstance(value, dict))
    return _settings(found) if isinstance(found, dict) and found.get("rope_theta") is not None else None


def _settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Comparable settings: no nulls, numbers as floats, no factors of 1."""
    kind = str(given.get("rope_type", given.get("type", "default")))
    clean = {
        key: float(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
        for key, value in given.items()
        if value is not None and key not in ("type", "rope_type")
    }
    return {key: value for key, value in clean.items() if (key, value) != ("partial_rotary_factor", 1.0)} | {
        "rope_type": kind
    }
