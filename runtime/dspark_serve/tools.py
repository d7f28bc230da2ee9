"""Tool calls: how a model writes them, and how they are read while they are written.

| format | models | a call |
|---|---|---|
| hermes | Hermes, Qwen, SmolLM | `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, any number, text around |
| mistral | Mistral | `[TOOL_CALLS][{"name": ..., "arguments": {...}}]`, or `[TOOL_CALLS]name{...}` |
| llama3 | Llama 3 | the whole answer is `{"name": ..., "parameters": {...}}`, several joined by `;` |

Which one a model writes is seen from what its chat template makes of a tool. A reader takes one character after
another, or a special token of the format as a whole, so it does not matter how many tokens a round gave.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tokenizers import Tokenizer

from dspark_runtime.decoding.request import Request
from dspark_runtime.decoding.sequence import FinishReason
from dspark_runtime.text.codec import TextCodec
from dspark_runtime.text.stream import TextStream
from dspark_serve.errors import ApiError
from dspark_serve.guides import WHITESPACE, Grammar

ToolFormat = Literal["hermes", "mistral", "llama3"]
MOST_CALLS = 8
"""Of an answer that has to call."""

MARKS: Mapping[ToolFormat, tuple[str, ...]] = {
    "hermes": ("<tool_call>", "</tool_call>"),
    "mistral": ("[TOOL_CALLS]", "[ARGS]"),
    "llama3": ("<|python_tag|>",),
}
"""Texts that may be special tokens, which decoding leaves out."""

_PROBE = "probe_of_the_template"
_SPACE = " \n\t\r"
_ARGUMENTS = ("arguments", "parameters")
_MISTRAL_ID = 9  # characters, or Mistral's templates refuse the next turn
_LONGEST_NAME = 256


def tool_format(codec: TextCodec) -> ToolFormat | None:
    """How the model calls tools; None if its chat template has no place for them, or another form of a call."""
    tool = {"type": "function", "function": {"name": _PROBE, "description": "", "parameters": {"type": "object"}}}
    text = codec.render_chat([{"role": "user", "content": "x"}], tools=[tool])
    if _PROBE not in text or "<function=" in text:
        return None
    if "<tool_call>" in text:
        return "hermes"
    return "mistral" if "[AVAILABLE_TOOLS]" in text or "[TOOL_CALLS]" in text else "llama3"


@dataclass(frozen=True, slots=True)
class Content:
    """Text of the answer itself."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call began."""

    index: int
    identity: str
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """More of the JSON text of a call's arguments."""

    index: int
    text: str


Piece = Content | CallStart | Arguments
Parsing = Generator[None, str, None]
Reading = Generator[None, str, str]


class ToolReader:
    """Reads one answer. What turns out to be no call comes out as content.

    The formats are parsers that are sent one character after another. While it is open whether a text is a call, it is
    kept in ``_open``; a call begins once its name is known.
    """

    def __init__(self, form: ToolFormat) -> None:
        self.calls = 0
        self._form = form
        self._pieces: list[Piece] = []
        self._space = ""  # that belongs to the content if more of it comes
        self._held = ""  # the beginning of a mark, perhaps
        self._open: list[str] | None = None
        parsers: dict[ToolFormat, Callable[[], Parsing]] = {
            "hermes": self._hermes,
            "mistral": self._mistral,
            "llama3": self._llama3,
        }
        self._parsing = parsers[form]()
        next(self._parsing)

    def push(self, text: str) -> None:
        """More of the answer."""
        for character in text:
            self._parsing.send(character)

    def mark(self, text: str) -> None:
        """A special token of the format, by its text."""
        self._parsing.send(text)

    def finish(self) -> None:
        """The answer is over."""
        self._content(self._held)
        self._give_up()
        if not self.calls and self._space:
            self._pieces.append(Content(self._space))
        self._held = self._space = ""

    def take(self) -> list[Piece]:
        """What became certain since the last time; neighbours of one kind joined."""
        joined: list[Piece] = []
        for piece in self._pieces:
            last = joined[-1] if joined else None
            if isinstance(piece, Content) and isinstance(last, Content):
                joined[-1] = Content(last.text + piece.text)
            elif isinstance(piece, Arguments) and isinstance(last, Arguments) and piece.index == last.index:
                joined[-1] = Arguments(piece.index, last.text + piece.text)
            else:
                joined.append(piece)
        self._pieces = []
        return joined

    # Formats -------------------------------------------------------------------------------------------------------

    def _hermes(self) -> Parsing:
        while True:
            yield from self._content_until("<tool_call>")
            self._open = ["<tool_call>"]
            if (yield from self._beyond_space()) == "{" and (yield from self._call()):
                yield from self._skip_until("</tool_call>")
            else:
                self._give_up()

    def _mistral(self) -> Parsing:
        while True:
            yield from self._content_until("[TOOL_CALLS]")
            self._open = ["[TOOL_CALLS]"]
            character = yield from self._beyond_space()
            if character == "[":
                character = yield from self._beyond_space()
                while character == "{" and (yield from self._call()):
                    character = yield from self._beyond_space()
                    if character == ",":
                        self._open = []
                        character = yield from self._beyond_space()
            elif re.match(r"\w", character):
                yield from self._named_call(character)
            self._give_up()

    def _llama3(self) -> Parsing:
        self._open = []
        character = yield from self._beyond_space()
        while character in ("{", ";", "<|python_tag|>"):
            if character == "{" and not (yield from self._call()):
                break
            self._open = self._open or []
            character = yield from self._beyond_space()
        self._give_up()
        while True:
            self._content((yield))

    # Parts ---------------------------------------------------------------------------------------------------------

    def _next(self) -> Reading:
        """The next character, noted as long as it is open what the text is."""
        character = yield
        if self._open is not None:
            self._open.append(character)
        return character

    def _beyond_space(self) -> Reading:
        """The next character that is not a space."""
        while (character := (yield from self._next())) in _SPACE:
            pass
        return character

    def _content_until(self, mark: str) -> Parsing:
        """Pass text on up to ``mark``."""
        while (character := (yield)) != mark:
            self._held += character
            while self._held and not mark.startswith(self._held):
                self._content(self._held[0])
                self._held = self._held[1:]
            if self._held == mark:
                self._held = ""
                return
        self._content(self._held)
        self._held = ""

    def _skip_until(self, mark: str) -> Parsing:
        held = ""
        while not held.endswith(mark):
            held = (held + (yield))[-len(mark) :]

    def _named_call(self, name: str) -> Parsing:
        """``name{...}``, behind the first character of the name."""
        while (character := (yield from self._beyond_space())) != "{":
            if character != "[ARGS]":
                name += character
            if len(name) > _LONGEST_NAME:
                return
        yield from self._value("{", self._argue(self._start(name.removesuffix("[ARGS]"))))

    def _call(self) -> Generator[None, str, bool]:
        """A JSON object with a name and arguments, behind its brace; whether it was one."""
        index, early, argued = -1, "", False
        character = yield from self._beyond_space()
        while character == '"':
            key, _ = yield from self._whole_value('"')
            if key not in ("name", "type", "id", *_ARGUMENTS) or (yield from self._beyond_space()) != ":":
                break
            first = yield from self._beyond_space()
            if key in _ARGUMENTS and index >= 0:
                after = yield from self._value(first, self._argue(index))
                argued = True
            else:
                found: list[str] = []
                after = yield from self._value(first, found.append)
                name = _parsed("".join(found))
                if key in _ARGUMENTS:
                    early = "".join(found)
                elif key == "name" and index < 0 and isinstance(name, str) and name:
                    index = self._start(name)
                    self._argue(index)(early)
                    argued = bool(early)
            character = after if after.strip() else (yield from self._beyond_space())
            if character == "}" and index >= 0:
                self._argue(index)("" if argued else "{}")
                return True
            if character != ",":
                break
            character = yield from self._beyond_space()
        return False

    def _whole_value(self, first: str) -> Generator[None, str, tuple[Any, str]]:
        found: list[str] = []
        after = yield from self._value(first, found.append)
        return _parsed("".join(found)), after

    def _value(self, first: str, out: Callable[[str], None]) -> Reading:
        """One JSON value, given to ``out`` as it comes; the character behind a number or a word, else nothing."""
        out(first)
        if first not in ('"', "{", "["):
            while (character := (yield from self._next())) not in (",", "}", "]", *_SPACE):
                out(character)
            return character
        depth, quoted, escaped = int(first != '"'), first == '"', False
        while depth or quoted:
            character = yield from self._next()
            out(character)
            if quoted:
                quoted = escaped or character != '"'
                escaped = character == "\\" and not escaped
            elif character == '"':
                quoted = True
            else:
                depth += (character in "{[") - (character in "}]")
        return ""

    def _argue(self, index: int) -> Callable[[str], None]:
        def more(text: str) -> None:
            if text:
                self._pieces.append(Arguments(index, text))

        return more

    def _content(self, text: str) -> None:
        whole = self._space + text
        bare = whole.rstrip(_SPACE)
        self._space = whole[len(bare) :]
        if bare:
            self._pieces.append(Content(bare))

    def _give_up(self) -> None:
        """It was no call."""
        if self._open is not None:
            self._content("".join(self._open))
        self._open = None

    def _start(self, name: str) -> int:
        self._space, self._open = "", None
        self.calls += 1
        self._pieces.append(CallStart(self.calls - 1, self._identity(), name))
        return self.calls - 1

    def _identity(self) -> str:
        if self._form == "mistral":
            return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(_MISTRAL_ID))
        return f"call_{secrets.token_hex(12)}"


class ToolText:
    """The answer of one request that may call tools, token by token."""

    def __init__(self, form: ToolFormat, request: Request, tokenizer: Tokenizer) -> None:
        self._reader = ToolReader(form)
        self._stream = TextStream(tokenizer, request.prompt, request.stops)
        ids = {tokenizer.token_to_id(mark): mark for mark in MARKS[form]}
        self._marks = {
            token: mark for token, mark in ids.items() if token is not None and not tokenizer.decode([token])
        }

    @property
    def called(self) -> bool:
        """Whether a tool was called."""
        return self._reader.calls > 0

    def read(self, tokens: Sequence[int], reason: FinishReason | None) -> list[Piece]:
        """What ``tokens`` add; ``reason`` if they are the last."""
        for token in tokens[:-1] if reason == "eos" else tokens:
            self._reader.push(self._stream.push(token))
            if token in self._marks:
                self._reader.mark(self._marks[token])
        if reason is not None:
            self._reader.push(self._stream.finish())
            self._reader.finish()
        return self._reader.take()


def forced_calls(
    form: ToolFormat, functions: Sequence[Mapping[str, Any]], several: bool, tokenizer: Tokenizer
) -> Grammar:
    """A grammar of answers that call one of ``functions``, or more of them one after another if ``several``."""
    key = "parameters" if form == "llama3" else "arguments"
    lines = []
    for number, function in enumerate(functions):
        head = f'{{"name": {json.dumps(function["name"])}, "{key}": '
        how = {"lenient": not function.get("strict"), "whitespace_pattern": WHITESPACE}
        schema = {"type": "object", **(function.get("parameters") or {}), "x-guidance": how}
        lines += [f'call_{number}: {json.dumps(head)} arguments_{number} "}}"']
        lines += [f"arguments_{number}: %json {json.dumps(schema)}"]
    one = " | ".join(f"call_{number}" for number in range(len(functions)))
    more = f"{{0,{MOST_CALLS - 1}}}"
    starts = {
        "hermes": "start: tagged" + (f' ("\\n" tagged){more}' if several else ""),
        "mistral": f'start: {_mark("[TOOL_CALLS]", tokenizer)} "[" one'
        + (f' (", " one){more}' if several else "")
        + ' "]"',
        "llama3": "start: one" + (f' ("; " one){more}' if several else ""),
    }
    if form == "hermes":
        lines.append('tagged: "<tool_call>\\n" one "\\n</tool_call>"')
    return Grammar("grammar", "\n".join([starts[form], f"one: {one}", *lines]), "tools")


def _mark(text: str, tokenizer: Tokenizer) -> str:
    """A special token in a grammar; its text if there is no such token."""
    token = tokenizer.token_to_id(text)
    return json.dumps(text) if token is None else f"<[{token}]>"


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def as_delta(piece: Piece) -> dict[str, Any]:
    """A piece as the ``delta`` of a streamed chunk."""
    if isinstance(piece, Content):
        return {"content": piece.text}
    if isinstance(piece, Arguments):
        return {"tool_calls": [{"index": piece.index, "function": {"arguments": piece.text}}]}
    function = {"name": piece.name, "arguments": ""}
    return {"tool_calls": [{"index": piece.index, "id": piece.identity, "type": "function", "function": function}]}


def as_message(pieces: Sequence[Piece]) -> dict[str, Any]:
    """All pieces of an answer as its message."""
    content = "".join(piece.text for piece in pieces if isinstance(piece, Content))
    calls: list[dict[str, Any]] = []
    for piece in pieces:
        if isinstance(piece, CallStart):
            calls.append({"id": piece.identity, "type": "function", "function": {"name": piece.name, "arguments": ""}})
        elif isinstance(piece, Arguments):
            calls[piece.index]["function"]["arguments"] += piece.text
    message: dict[str, Any] = {"role": "assistant", "content": content or (None if calls else ""), "refusal": None}
    return message | ({"tool_calls": calls} if calls else {})


def no_tools() -> ApiError:
    """The refusal of tools."""
    return ApiError(
        400, "this model's chat template has no place for tools, or calls them in an unknown form", param="tools"
    )
