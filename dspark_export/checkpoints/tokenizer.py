"""The tokenizer of a checkpoint: opened, checked against the model, saved so that `tokenizers` and jinja2 suffice."""

from __future__ import annotations

import importlib.util
import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspark_export.checkpoints.config import declared_end_ids
from dspark_export.checkpoints.files import checked_file
from dspark_export.checkpoints.library_calls import first_line, heard
from dspark_export.checkpoints.trust import Trust
from dspark_runtime.errors import InvalidTokenizer
from dspark_runtime.text.chat_template import ChatTemplate
from dspark_runtime.text.codec import TOOL_TEMPLATE

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PretrainedConfig

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tekken.json")
PROBES = (
    "Hello, world!",
    "a\n\n123 4567",
    "  two  spaces\ttab\r\n",
    "naïve café 東京 🙂👩‍👩‍👧",
    "cafe\u0301 \u00c5ngstro\u0308m \ufb01n \u2460",
    "def f(x):\n    return x['k'] != 0x1F  # it's",
)
_MODEL = "tokenizer.model"
_MARK = "Qzx7marker"


_WRONG_DIGITS = "fix_mistral_regex"  # in what transformers says of tokenizers it suspects


class TokenizerWarning(UserWarning):
    """What a library says about a tokenizer, or what was corrected in it."""


class MissingTokenizer(UserWarning):
    """A checkpoint folder without a tokenizer: its bundle works with token ids."""


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer and what belongs to it.

    ``tool_template`` is the chat template for conversations with tools, where a model has one.
    ``special`` maps ``bos_token``, ``eos_token``, ... to their texts.
    """

    backend: Tokenizer
    chat_template: str | None = None
    tool_template: str | None = None
    special: dict[str, str] = field(default_factory=dict)
    stop_ids: tuple[int, ...] = ()

    def id_of(self, role: str) -> int | None:
        """Id of the special token ``role`` (``bos_token``, ...), None if there is none."""
        text = self.special.get(role)
        return None if text is None else self.backend.token_to_id(text)

    def save(self, folder: Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and, for chat models, the templates under transformers' names."""
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(folder / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **self.special}
        (folder / "tokenizer_config.json").write_text(
            json.dumps(settings, indent=1, ensure_ascii=False) + "\n", "utf-8"
        )
        if self.chat_template is not None:
            (folder / "chat_template.jinja").write_text(self.chat_template, "utf-8")
        if self.tool_template is not None:
            (folder / TOOL_TEMPLATE).parent.mkdir(exist_ok=True)
            (folder / TOOL_TEMPLATE).write_text(self.tool_template, "utf-8")

    def check(self, rows: int, name: str) -> None:
        """InvalidTokenizer unless every token has one of the ``rows`` of the embedding and text survives encoding."""
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise InvalidTokenizer(f"the tokenizer of {name} has no tokens; get the checkpoint again")
        text, largest = max(vocabulary.items(), key=lambda item: item[1])
        if largest >= rows:
            raise InvalidTokenizer(
                f"the tokenizer of {name} gives token {text!r} the id {largest}, the model has {rows} embedding rows; "
                "they do not belong together: use the tokenizer the model was trained with"
            )
        try:
            encoded = [self.backend.encode(probe).ids for probe in PROBES]
        except Exception as cause:  # the tokenizers library raises plain Exception
            raise InvalidTokenizer(f"the tokenizer of {name} cannot encode text: {first_line(cause)}") from cause
        if not any(encoded):
            raise InvalidTokenizer(f"the tokenizer of {name} encodes every text to nothing; get the checkpoint again")


def has_tokenizer(folder: Path) -> bool:
    """Whether any file of a tokenizer lies in ``folder``."""
    return any((folder / file).exists() or (folder / file).is_symlink() for file in FILES)


def load_tokenizer(folder: Path, config: PretrainedConfig, name: str, trust: Trust) -> TokenizerFiles:
    """The tokenizer of a checkpoint folder, checked; InvalidTokenizer says what is wrong with it."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    present = [file for file in FILES if (folder / file).exists() or (folder / file).is_symlink()]
    if not present:
        raise InvalidTokenizer(
            f"{name} has no tokenizer ({', '.join(FILES[:3])}); put the model's tokenizer files into it"
        )
    for file in (*present, "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "merges.txt"):
        if (folder / file).exists() or (folder / file).is_symlink():
            checked_file(folder, file, InvalidTokenizer)
    try:
        with heard() as said:
            options = {"config": config, "local_files_only": True, **trust.code_options()}
            wrapper = AutoTokenizer.from_pretrained(folder, **options)
            if any(_WRONG_DIGITS in text for text in said) and _splits_digits_in_threes(wrapper):
                wrapper = AutoTokenizer.from_pretrained(folder, fix_mistral_regex=True, **options)
                said.append("it splits digits in threes, which is a known mistake of its file; corrected in the bundle")
    except Exception as cause:  # transformers and tokenizers raise anything here
        why = _what_the_model_file_needs(folder, name) if present == [_MODEL] else None
        raise InvalidTokenizer(why or f"the tokenizer of {name} cannot be loaded: {first_line(cause)}") from cause
    for text in said:
        if _WRONG_DIGITS not in text:
            warnings.warn(f"the tokenizer of {name}: {' '.join(text.split())[:600]}", TokenizerWarning, stacklevel=2)
    backend = getattr(wrapper, "backend_tokenizer", None)
    if backend is None:
        raise InvalidTokenizer(f"the tokenizer of {name} exists only in Python; it needs a tokenizer.json")
    backend = Tokenizer.from_str(backend.to_str())
    backend.no_padding()
    backend.no_truncation()
    for probe in PROBES:
        if backend.encode(probe).ids != wrapper(probe)["input_ids"]:
            raise InvalidTokenizer(
                f"the tokenizer of {name} needs Python code beside its tokenizer.json to split {probe!r}"
            )
    if present == [_MODEL]:
        _check_conversion(folder, backend, name)
    templates = wrapper.chat_template
    if not isinstance(templates, dict):
        templates = {"default": templates}
    special = {role: str(text) for role, text in wrapper.special_tokens_map.items() if isinstance(text, str)}
    ends = tuple(declared_end_ids(folder, config, name))
    files = TokenizerFiles(backend, templates.get("default"), templates.get("tool_use"), special, ends)
    files.check(config.get_text_config().vocab_size, name)
    return files


def _what_the_model_file_needs(folder: Path, name: str) -> str:
    """Advice for a folder with a tokenizer.model alone, which is one of two formats."""
    with (folder / _MODEL).open("rb") as file:
        sentencepiece = file.read(1) == b"\n"  # the first field of a protobuf message; tiktoken's lines are base64
    kind, packages = ("SentencePiece", "sentencepiece protobuf") if sentencepiece else ("tiktoken", "tiktoken")
    return (
        f"{name} has only a {_MODEL} ({kind}) and no tokenizer.json; put the tokenizer.json and tokenizer_config.json "
        f"of its family into the folder, or `pip install {packages}` to convert it"
    )


def _check_conversion(folder: Path, backend: Tokenizer, name: str) -> None:
    """InvalidTokenizer if what was made of a tokenizer.model splits plain words unlike SentencePiece itself.

    It does where no tokenizer_config.json names a class; odd texts (runs of spaces) differ in good conversions too.
    """
    if importlib.util.find_spec("sentencepiece") is None:
        return
    try:
        original = importlib.import_module("sentencepiece").SentencePieceProcessor(model_file=str(folder / _MODEL))
    except (RuntimeError, OSError):
        return  # tiktoken's format
    if backend.encode(PROBES[0], add_special_tokens=False).ids != original.encode(PROBES[0]):
        raise InvalidTokenizer(
            f"the {_MODEL} of {name} is converted to a tokenizer that splits {PROBES[0]!r} differently; add the "
            "tokenizer_config.json of its family, which names its class, or its tokenizer.json"
        )


def _splits_digits_in_threes(wrapper: Any) -> bool:
    """Whether a tokenizer of Mistral has the rules of its faulty files: transformers suspects every older one."""
    rules = json.loads(wrapper.backend_tokenizer.to_str()).get("pre_tokenizer")
    return "p{N}{1,3}" in json.dumps(rules)


def eos_token_ids(tokenizer: TokenizerFiles, vocab: int) -> list[int]:
    """Every id that ends a text: declared ones, the tokenizer's, and what the chat template puts after an answer."""
    candidates = [*tokenizer.stop_ids, tokenizer.id_of("eos_token"), end_of_turn(tokenizer)]
    return sorted({token for token in candidates if token is not None and 0 <= token < vocab})


def end_of_turn(tokenizer: TokenizerFiles) -> int | None:
    """The special token the chat template writes after an assistant's message; None without one."""
    if tokenizer.chat_template is None:
        return None

    try:
        text = ChatTemplate(tokenizer.chat_template, tokenizer.special).render(
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": _MARK}], add_generation_prompt=False
        )
    except Exception:  # a template that refuses this conversation tells nothing about the end of a turn
        return None
    _, found, rest = text.partition(_MARK)
    added = {
        token.content: index for index, token in tokenizer.backend.get_added_tokens_decoder().items() if token.special
    }
    following = [content for content in added if rest.lstrip().startswith(content)]
    return added[max(following, key=len)] if found and following else None
