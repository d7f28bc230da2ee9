"""What callers give as prompts and numbers, converted to plain Python, or refused with a message that says what is
accepted."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Protocol

from dspark_runtime.errors import UsageError

Text = str | bytes | bytearray
Ids = list[int]

Prompt = str | bytes | Sequence[int]
"""Text, UTF-8 bytes or token ids."""


class TokenArray(Protocol):
    """A numpy array or a torch tensor of token ids: one prompt if it has one dimension, one per row if two."""

    @property
    def ndim(self) -> int:
        """Number of dimensions."""

    def tolist(self) -> object:
        """The ids as plain Python."""


_TAKEN = "a prompt is text, UTF-8 bytes or token ids (a list, an array or a tensor), or a list of those"


def plain_prompts(prompt: object, padding: int | None = None) -> tuple[list[Text | Ids], bool]:
    """The prompts of a call, and whether it is a single one.

    Arrays and tensors of one dimension are a prompt's ids, those of two a prompt a row; ``padding`` is the id that no
    row may begin or end with then. Raises UsageError for anything that is not a prompt.
    """
    rows = _rows_of_array(prompt, padding)
    if rows is not None:
        return rows
    if isinstance(prompt, Text):
        return [prompt], True
    _refuse(prompt)
    items = list(prompt)  # type: ignore[call-overload]  # a sequence, or _refuse had raised
    if not items or not any(isinstance(item, Text) or hasattr(item, "__len__") for item in map(_shaped, items)):
        return [_ids(items)], True
    return [_one(item) for item in items], False


def whole(name: str, value: object, low: int, high: int | None = None, what: str = "a whole number") -> int:
    """``value`` as an int, whatever kind of whole number it is; UsageError outside ``low`` to ``high``."""
    number = _index(value)
    if number is None or number < low or (high is not None and number > high):
        bounds = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise UsageError(f"{name}={value!r}: give {what} {bounds}")
    return number


def real(value: object) -> float | None:
    """``value`` as a float if it is a number of any kind, but a bool or text; else None."""
    if isinstance(value, bool | str | bytes | bytearray) or not hasattr(value, "__float__"):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None


def by_name(name: str, value: object) -> dict[str, object]:
    """``value`` as a dict if it is a mapping from names, empty for None; UsageError otherwise."""
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise UsageError(f"{name}={value!r:.60}: give a mapping from names to values")
    return dict(value)


def refuse_unknown(call: str, unknown: Mapping[str, object], known: Sequence[str]) -> None:
    """UsageError for options that ``call`` does not have; template variables are the likely mistake."""
    if not unknown:
        return
    name, value = next(iter(unknown.items()))
    if isinstance(value, Mapping):  # as other programs name it: chat_template_kwargs
        raise UsageError(
            f"{call} has no option {name!r}; variables of the chat template are template_variables={value!r}"
        )
    close = get_close_matches(name, known, 1)
    advice = f"did you mean {close[0]}?" if close else f"it takes {', '.join(known)}."
    raise UsageError(
        f"{call} has no option {name!r}; {advice} Variables of the chat template go into "
        f"template_variables={{{name!r}: {value!r}}}"
    )


def _one(item: object) -> Text | Ids:
    if isinstance(item, Text):
        return item
    prompts, single = plain_prompts(item)
    if not single or isinstance(prompts[0], Text):
        raise UsageError(f"{_TAKEN}; the lists here are nested one level too deep")
    return prompts[0]


def _refuse(prompt: object) -> None:
    kind = type(prompt).__name__
    if isinstance(prompt, Mapping):
        advice = "give its input_ids" if "input_ids" in prompt else "give messages to chat()"
        raise UsageError(f"{_TAKEN}, not a {kind}; {advice}")
    if isinstance(prompt, set | frozenset):
        raise UsageError(f"{_TAKEN}, not a {kind}, which has no order")
    if not hasattr(prompt, "__iter__") or not hasattr(prompt, "__len__"):
        advice = "; make a list of it" if hasattr(prompt, "__iter__") else ""
        raise UsageError(f"{_TAKEN}, not {prompt!r:.40} ({kind}){advice}")
    for item in prompt:
        if isinstance(item, Mapping) and "role" in item:
            raise UsageError(f"{_TAKEN}, not a list of messages; give those to chat()")
        break


def _ids(items: list[Any]) -> Ids:
    found = []
    for place, item in enumerate(items):
        number = _index(item)
        if number is None:
            raise UsageError(f"prompt token {place} is {item!r}, not a token id")
        found.append(number)
    return found


def _index(value: object) -> int | None:
    """An int of anything that is one; None for bools and everything else."""
    value = _shaped(value)
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        return None


def _shaped(value: object) -> object:
    """A number of an array without dimensions, as iterating over a tensor gives them; else ``value``."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return value.item()
    return value


def _rows_of_array(value: object, padding: int | None) -> tuple[list[Text | Ids], bool] | None:
    """:func:`plain_prompts` of a numpy array, a torch tensor or what else has dimensions; None for all others."""
    dimensions = getattr(value, "ndim", None)
    if not isinstance(dimensions, int) or not hasattr(value, "tolist"):
        return None
    kind = f"{type(value).__name__} of {dimensions} dimensions and dtype {getattr(value, 'dtype', 'unknown')}"
    if dimensions not in (1, 2):
        raise UsageError(f"{_TAKEN}, not this {kind}")
    rows = value.tolist() if dimensions == 2 else [value.tolist()]
    for row in rows:
        if any(isinstance(item, bool) or not isinstance(item, int) for item in row):
            raise UsageError(f"{_TAKEN}; token ids are whole numbers, this is a {kind}")
    if len(rows) > 1 and padding is not None and any(row and padding in (row[0], row[-1]) for row in rows):
        raise UsageError(
            f"rows of this {kind} begin or end with the padding id {padding}; give a list of unpadded rows"
        )
    return rows, dimensions == 1
