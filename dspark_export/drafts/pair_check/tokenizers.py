"""Checks from the content of their tokenizers whether draft and target split and number text alike."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from dspark_export.checkpoints.tokenizer import PROBES, TokenizerFiles, load_tokenizer
from dspark_export.checkpoints.trust import Trust
from dspark_export.drafts.formats.draft import DraftCheckpoint
from dspark_export.drafts.pair_check.report import Finding, passed
from dspark_runtime.errors import InvalidTokenizer, TokenizerMismatch

if TYPE_CHECKING:
    from dspark_export.checkpoints import Checkpoint

_ID = "tokenizer"
_ASKED = "draft and model need the same tokenizer"
_FIX = "use a draft trained for this model, or put this model's tokenizer files beside a draft that was"
_SPLITTING = {"normalizer": "normalizer", "pre_tokenizer": "pre-tokenizer"}
_ROLES = ("bos_token", "eos_token")


def check_tokenizers(target: Checkpoint, draft: DraftCheckpoint | Checkpoint) -> list[Finding]:
    """Findings about the tokenizers: equal, different in named ways, or not there to compare."""
    try:
        own = _tokenizer(target, draft)
    except InvalidTokenizer as error:
        return [Finding(_ID, "error", _ASKED, f"the draft's cannot be used ({error})", _FIX, TokenizerMismatch)]
    for side, files in (("model", target.tokenizer), ("draft", own)):
        if files is None:
            found = f"the {side} comes without tokenizer files, so its token ids are taken to mean the same"
            return [Finding(_ID, "warning", _ASKED, found, f"put them into the {side}'s folder to have this checked")]
    assert target.tokenizer is not None and own is not None
    differences, cautions, notes = compare(target.tokenizer, own)
    if differences:
        return [Finding(_ID, "error", _ASKED, "; ".join(differences), _FIX, TokenizerMismatch)]
    if cautions:
        found = f"ids and merges of texts agree, but {'; '.join(cautions)}"
        return [Finding(_ID, "warning", _ASKED, found, "which costs accepted drafts around such tokens, nothing else")]
    count = target.tokenizer.backend.get_vocab_size(with_added_tokens=True)
    return [passed(_ID, _ASKED, "; ".join((f"equal, {count} tokens", *notes)))]


def _tokenizer(target: Checkpoint, draft: DraftCheckpoint | Checkpoint) -> TokenizerFiles | None:
    if not isinstance(draft, DraftCheckpoint):
        return draft.tokenizer
    if not draft.has_tokenizer:
        return None
    return load_tokenizer(draft.directory, target.config, draft.id, Trust.closed())


def compare(target: TokenizerFiles, draft: TokenizerFiles) -> tuple[list[str], list[str], list[str]]:
    """What differs in the ids of texts, what differs in added tokens alone, and what differs without harm.

    Without harm are tokens that only the draft has, after all of the target's, and rules of splitting that are
    written otherwise and do the same to every probe, as converted files have them.
    """
    ours, theirs = (files.backend.get_vocab(with_added_tokens=True) for files in (target, draft))
    added = {token.content for files in (target, draft) for token in files.backend.get_added_tokens_decoder().values()}
    extra = {text for text in theirs if text not in ours and theirs[text] > max(ours.values(), default=-1)}
    notes = [f"the draft adds {_quoted(sorted(extra, key=theirs.__getitem__))}"] if extra else []
    common = {text: token for text, token in theirs.items() if text not in extra}
    differences = _vocabulary(_without(ours, added), _without(common, added), "tokens")
    cautions = _vocabulary(_only(ours, added), _only(common, added), "added tokens")
    left, right = (json.loads(files.backend.to_str()) for files in (target, draft))
    if left["model"].get("type") != right["model"].get("type"):
        differences.append(f"types {left['model'].get('type')} and {right['model'].get('type')}")
    differences += _merges(left["model"].get("merges"), right["model"].get("merges"))
    cautions += _added(left, right, extra)
    for role in _ROLES:
        one, two = target.id_of(role), draft.id_of(role)
        if one != two and two is not None:
            cautions.append(f"{role} is {one} for the model and {two} for the draft")
    if not differences:
        rules = " and ".join(word for key, word in _SPLITTING.items() if left.get(key) != right.get(key))
        moved = [p for p in PROBES if target.backend.encode(p).ids != draft.backend.encode(p).ids]
        if moved:
            differences.append(f"{f'other {rules}: ' if rules else ''}{_quoted(moved, 1)} split differently")
        elif rules:
            notes.append(f"another spelling of the {rules}, which splits {len(PROBES)} probe texts alike")
    return differences, cautions, notes


def _without(vocabulary: dict[str, int], texts: set[str]) -> dict[str, int]:
    return {text: token for text, token in vocabulary.items() if text not in texts}


def _only(vocabulary: dict[str, int], texts: set[str]) -> dict[str, int]:
    return {text: token for text, token in vocabulary.items() if text in texts}


def _quoted(texts: list[str], most: int = 3) -> str:
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(map(repr, texts[:most])) + more


def _vocabulary(ours: dict[str, int], theirs: dict[str, int], what: str) -> list[str]:
    found = []
    moved = [text for text, token in ours.items() if text in theirs and theirs[text] != token]
    if moved:
        text = min(moved, key=ours.__getitem__)
        found.append(f"{len(moved)} {what} have other ids, e.g. {text!r} {ours[text]} and {theirs[text]}")
    for side, other, name in ((ours, theirs, "model"), (theirs, ours, "draft")):
        if only := sorted(set(side) - set(other), key=side.__getitem__):
            found.append(f"{len(only)} {what} only the {name} has, e.g. {_quoted(only)}")
    return found


def _merges(ours: list[Any] | None, theirs: list[Any] | None) -> list[str]:
    if ours == theirs:
        return []
    ours, theirs = ours or [], theirs or []
    places = [i for i, (one, two) in enumerate(zip(ours, theirs, strict=False)) if one != two]
    first = places[0] if places else min(len(ours), len(theirs))
    return [f"merges differ from number {first} on ({len(ours)} and {len(theirs)} of them)"]


def _added(left: dict[str, Any], right: dict[str, Any], extra: set[str]) -> list[str]:
    ours, theirs = ({token["content"]: token for token in side.get("added_tokens", [])} for side in (left, right))
    changed = [
        text
        for text in sorted(set(ours) | set(theirs))
        if text not in extra and ours.get(text, {}).get("special") != theirs.get(text, {}).get("special")
    ]
    return [f"special tokens differ: {_quoted(changed)}"] if changed else []
