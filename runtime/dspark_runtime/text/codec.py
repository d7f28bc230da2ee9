"""Prompts to token ids: the tokenizer's files, chat conversations, and special tokens that users typed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from dspark_runtime.errors import ChatTemplateError, DamagedBundle, UsageError
from dspark_runtime.text.chat_template import ChatTemplate, Message

# Mark special tokens in what users typed while the template is rendered; private use: they mean nothing to anyone else.
_BEGIN, _SPLIT, _END = "\ue0d5", "\ue0d6", "\ue0d7"
_MARKS = str.maketrans("", "", _BEGIN + _SPLIT + _END)
_TYPED = re.compile(f"{_BEGIN}(.){_SPLIT}([^{_BEGIN}{_END}]*){_END}", re.DOTALL)
_NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


class TextCodec:
    """Tokenizer and chat template of one bundle.

    Args:
        directory: holds ``tokenizer.json`` and, where the model has them, ``tokenizer_config.json`` and
            ``chat_template.jinja``.

    Raises:
        DamagedBundle: a file is missing or unreadable.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.tokenizer = _load_tokenizer(directory / "tokenizer.json")
        self._config = _load_json(directory / "tokenizer_config.json")
        self._plain: Tokenizer | None = None
        self._template: ChatTemplate | None = None
        added = self.tokenizer.get_added_tokens_decoder().values()
        special = sorted((token.content for token in added if token.special and token.content), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, special))) if special else None

    def encode(self, prompt: str | bytes) -> list[int]:
        """Token ids of a raw prompt; special tokens in it are meant. Raises UsageError for invalid text."""
        return list(self.tokenizer.encode(_checked_text(prompt)).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True)

    def encode_chat(self, messages: Sequence[Message], **variables: Any) -> list[int]:
        """Token ids of a conversation up to where the assistant's answer begins.

        Special tokens in the messages are plain text: a user cannot end a turn by typing its token.

        Raises:
            UsageError: no messages, or one without role and content.
            ChatTemplateError: the bundle has no template, or it fails.
        """
        rendered = self.template.render([self._marked(message) for message in _checked(messages)], **variables)
        return self._encode_marked(rendered)

    def render_chat(self, messages: Sequence[Message], **variables: Any) -> str:
        """The conversation as the template writes it."""
        return self.template.render(_checked(messages), **variables)

    @property
    def template(self) -> ChatTemplate:
        """The chat template; ChatTemplateError if the model has none."""
        if self._template is None:
            self._template = ChatTemplate(self._template_source(), self._named_tokens())
        return self._template

    def _template_source(self) -> str:
        file = self._directory / "chat_template.jinja"
        if file.is_file():
            return file.read_text(encoding="utf-8")
        source = self._config.get("chat_template")
        if isinstance(source, list):  # several named templates
            named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
            source = named.get("default")
        if not isinstance(source, str):
            raise ChatTemplateError("this model has no chat template; give a plain prompt instead of messages")
        return source

    def _named_tokens(self) -> dict[str, str]:
        tokens = {}
        for name in _NAMED_TOKENS:
            value = self._config.get(name)
            if isinstance(value, dict):
                value = value.get("content")
            if isinstance(value, str):
                tokens[name] = value
        return tokens

    def _marked(self, message: Message) -> dict[str, Any]:
        return {key: self._mark(value) if key != "role" else value for key, value in message.items()}

    def _mark(self, value: Any) -> Any:
        if isinstance(value, str):
            if self._special is None:
                return value
            return self._special.sub(lambda found: f"{_BEGIN}{found[0][0]}{_SPLIT}{found[0][1:]}{_END}", value)
        if isinstance(value, Mapping):
            return {key: self._mark(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self._mark(inner) for inner in value]
        return value

    def _encode_marked(self, text: str) -> list[int]:
        ids: list[int] = []
        pieces = _TYPED.split(text)  # trusted text, then the two halves of a typed special token, and so on
        for place, piece in enumerate(pieces):
            clean = piece.translate(_MARKS)  # marks a template tore apart mean nothing
            if place % 3 == 0:
                ids += self.tokenizer.encode(clean, add_special_tokens=False).ids
            elif place % 3 == 1:
                typed = clean + pieces[place + 1].translate(_MARKS)
                ids += self._plain_tokenizer().encode(typed, add_special_tokens=False).ids
        return ids

    def _plain_tokenizer(self) -> Tokenizer:
        if self._plain is None:
            self._plain = _load_tokenizer(self._directory / "tokenizer.json")
            self._plain.encode_special_tokens = True
        return self._plain


def _load_tokenizer(path: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:
        raise DamagedBundle(f"{path} cannot be read as a tokenizer ({error}); build the bundle again") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _load_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedBundle(f"{path} is not valid JSON ({error}); build the bundle again") from error
    return value if isinstance(value, dict) else {}


def _checked_text(text: object) -> str:
    if isinstance(text, bytes | bytearray):
        try:
            return bytes(text).decode("utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(f"the prompt is not valid UTF-8: {error.reason} at byte {error.start}") from error
    if not isinstance(text, str):
        raise UsageError(f"a prompt is text or token ids, not {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(f"the prompt holds half a character (a lone surrogate) at place {error.start}") from error
    return text


def _checked(messages: Sequence[Message]) -> list[dict[str, Any]]:
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence) or not messages:
        raise UsageError("messages are a non-empty list of {'role': ..., 'content': ...}")
    result = []
    for place, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
            raise UsageError(f"message {place} is not a mapping with a role and a content")
        clean = dict(message)
        for key, value in message.items():
            if isinstance(value, str | bytes):
                clean[key] = _checked_text(value).translate(_MARKS)
        result.append(clean)
    return result
