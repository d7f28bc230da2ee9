"""Prompt files: one prompt per line, or JSON lines with ``turns`` (user messages, the first counts) or ``prompt``."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from dspark_runtime.errors import UsageError

SHIPPED = ("repeat", "code", "math", "chat")
"""Prompt sets that come with the package, by name."""


@dataclass(frozen=True)
class PromptItem:
    """One prompt and the set it belongs to."""

    set: str
    text: str


def load_sets(names: list[str], limit: int | None = None) -> list[PromptItem]:
    """The prompts of the named shipped sets or files, at most ``limit`` of each.

    Raises UsageError for a name that is neither, and for a file that holds no prompts.
    """
    items: list[PromptItem] = []
    for name in names:
        path = Path(str(files("dspark_export.prompts") / f"{name}.jsonl")) if name in SHIPPED else Path(name)
        if not path.is_file():
            raise UsageError(f"prompts {name!r}: no such file, and no shipped set; the sets are {', '.join(SHIPPED)}")
        items += read_prompts(path)[:limit]
    return items


def read_responses(path: Path) -> list[tuple[str, str]]:
    """Prompts and responses of a file of JSON lines. Raises UsageError as :func:`read_prompts` does."""
    pairs = []
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            where = f"{path}, line {number}"
            prompt = _from_json(line, where)
            response = json.loads(line).get("response")
            if not isinstance(response, str) or not response:
                raise UsageError(f"{where} has no text `response`")
            pairs.append((prompt, response))
    if not pairs:
        raise UsageError(f"{path} holds no responses; write JSON lines with `prompt` and `response`")
    return pairs


def _lines(path: Path) -> list[str]:
    try:
        # splitlines() would cut at U+2028 too, which JSON may hold
        return io.StringIO(path.read_text(encoding="utf-8")).readlines()
    except OSError as error:
        raise UsageError(f"cannot read the prompts {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text (byte {error.start}); convert it first") from error


def read_prompts(path: Path) -> list[PromptItem]:
    """All prompts of a file. Raises UsageError if it cannot be read, is not UTF-8, or has a line without a prompt."""
    structured = path.suffix in (".jsonl", ".json")
    items = []
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            found = _from_json(line, f"{path}, line {number}") if structured else line.rstrip("\n")
            items.append(PromptItem(path.stem, found))
    if not items:
        raise UsageError(f"{path} holds no prompts; write one per line, or JSON lines with `turns` or `prompt`")
    return items


def _from_json(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(f"{where} is not JSON ({error.msg}); write an object with `turns` or `prompt`") from error
    prompt = record.get("prompt") if isinstance(record, dict) else None
    if isinstance(record, dict) and isinstance(record.get("turns"), list) and record["turns"]:
        prompt = record["turns"][0]
    if not isinstance(prompt, str) or not prompt:
        raise UsageError(f"{where} has neither a text `prompt` nor a list `turns` of texts")
    return prompt
