"""Prompts to token ids: the tokenizer's files, chat conversations, and special tokens that users typed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from dspark_runtime.arguments import plain_prompts
from dspark_runtime.errors import ChatTemplateError, DamagedBundle, UsageError
from dspark_runtime.text.chat_template import ChatTemplate, Message
from dspark_runtime.text.template_data import plain_messages, plain_variables
from dspark_runtime.text.typed_tokens import TypedTokens

TOOL_TEMPLATE = Path("additional_chat_templates", "tool_use.jinja")
"""Where a tokenizer's folder has the chat template for conversations with tools, as transformers writes it."""

_RESERVED = ("messages",)


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
        self._templates: dict[str, ChatTemplate] = {}
        added = self.tokenizer.get_added_tokens_decoder().values()
        self._typed = TypedTokens(token.content for token in added if token.special)

    def encode(self, prompt: str | bytes | bytearray) -> list[int]:
        """Token ids of a raw prompt; special tokens in it are meant. Raises UsageError for invalid text."""
        return list(self.tokenizer.encode(_checked_text(prompt)).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids (a list, an array or a tensor), special tokens left out; UsageError for anything else."""
        prompts, single = plain_prompts(tokens)
        if not single or not isinstance(prompts[0], list) or any(not 0 <= token < 2**32 for token in prompts[0]):
            raise UsageError(f"decode() takes the token ids of one text, not {tokens!r:.60}")
        return self.tokenizer.decode(prompts[0], skip_special_tokens=True)

    def encode_chat(self, messages: Sequence[Message], /, **variables: Any) -> list[int]:
        """Token ids of a conversation up to where the assistant's answer begins.

        Special tokens in the messages and variables are plain text: a user cannot end a turn by typing its token.

        Args:
            messages: mappings with a ``role`` and, mostly, a ``content``.
            variables: of the template: ``tools``, ``documents``, ``enable_thinking`` and whatever else it reads.

        Raises:
            UsageError: no messages, or one without a role.
            ChatTemplateError: the bundle has no template, or it fails.
        """
        marked = [
            {key: value if key == "role" else self._typed.marked(value) for key, value in message.items()}
            for message in checked_messages(messages)
        ]
        given = {name: self._typed.marked(value) for name, value in plain_variables(variables).items()}
        rendered = self.template_for(given).render(marked, **given)
        return self._typed.encode(rendered, self._encode_meant, self._encode_plain)

    def render_chat(self, messages: Sequence[Message], /, **variables: Any) -> str:
        """The conversation as the template writes it; arguments and errors of :meth:`encode_chat`."""
        return self.template_for(variables).render(checked_messages(messages), **variables)

    def template_for(self, variables: Mapping[str, Any]) -> ChatTemplate:
        """The chat template, of several the one for tools if ``variables`` have any; ChatTemplateError for none."""
        if unfit := [name for name in variables if name in _RESERVED]:
            raise UsageError(f"the template variable {unfit[0]!r} is the conversation itself; use another name")
        name = "tool_use" if variables.get("tools") is not None and self._has_template("tool_use") else "default"
        if name not in self._templates:
            self._templates[name] = ChatTemplate(self._template_source(name), self._named_tokens())
        return self._templates[name]

    @property
    def template(self) -> ChatTemplate:
        """The chat template for conversations without tools; ChatTemplateError if the model has none."""
        return self.template_for({})

    def _has_template(self, name: str) -> bool:
        return name in self._named_templates()

    def _named_templates(self) -> dict[str, str]:
        """Every template by its name; a model with a single one calls it ``default``."""
        source = self._config.get("chat_template")
        if isinstance(source, list):  # several named templates
            found = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        else:
            found = {"default": source}
        for name, file in (("default", "chat_template.jinja"), ("tool_use", TOOL_TEMPLATE)):
            if (self._directory / file).is_file():
                found[name] = (self._directory / file).read_text(encoding="utf-8")
        return {name: text for name, text in found.items() if isinstance(name, str) and isinstance(text, str)}

    def _template_source(self, name: str) -> str:
        found = self._named_templates()
        if name not in found:
            raise ChatTemplateError(
                "this model has no chat template; give a plain prompt instead of messages (--raw on the command line)"
            )
        return found[name]

    def _named_tokens(self) -> dict[str, str]:
        tokens = {}
        for name, value in self._config.items():
            if not name.endswith("_token"):
                continue
            if isinstance(value, dict):
                value = value.get("content")
            if isinstance(value, str):
                tokens[name] = value
        return tokens

    def _encode_meant(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def _encode_plain(self, text: str) -> list[int]:
        return list(self._plain_tokenizer().encode(text, add_special_tokens=False).ids)

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


def checked_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as plain data, their texts valid; UsageError for an empty conversation or a message without a role."""
    plain = plain_messages(messages)
    if not plain:
        raise UsageError("there are no messages; give a non-empty list of {'role': ..., 'content': ...}")
    for place, message in enumerate(plain):
        if not isinstance(message.get("role"), str) or len(message) < 2:
            raise UsageError(f"message {place} is not a mapping with a role and a content")
        for value in message.values():
            if isinstance(value, str):
                _checked_text(value)
    return plain
