"""Rebuilds a tokenizer from a GGUF file's own vocabulary.

transformers reads vocabulary and merges but not ``tokenizer.ggml.pre``, the name of the rule that splits text before
the merges, so it splits digits and white space wrongly for most models. This module builds the rule from its name, as
llama.cpp defines it, and the special tokens from the token types.
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from dspark_export.checkpoints.gguf_file import GgufFile
from dspark_export.checkpoints.tokenizer import TokenizerFiles
from dspark_runtime.errors import InvalidTokenizer

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS: dict[str, tuple[str, ...]] = {
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": (_CL100K % "{1,3}",),
    "qwen2": (_CL100K % "",),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
}
_SAME_AS = {
    **dict.fromkeys(("phi-2", "jina-es", "jina-de", "mpt", "olmo", "jais", "gigachat", "roberta-bpe"), "gpt-2"),
    **dict.fromkeys(("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), "smollm"),
    **dict.fromkeys(("llama3", "llama-v3", "dbrx", "smaug-bpe", "falcon3", "pixtral"), "llama-bpe"),
    **dict.fromkeys(("stablelm2", "deepseek-r1-qwen", "hunyuan", "megrez"), "qwen2"),
}
_WHOLE_TOKENS_FIRST = ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral")
_BOS_BY_DEFAULT = ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral")
_ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def load_gguf_tokenizer(file: GgufFile) -> TokenizerFiles:
    """The tokenizer of a GGUF file with its chat template; InvalidTokenizer if missing, broken or unknown here."""
    fields, name = file.fields, str(file.path)
    tokens = fields.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise InvalidTokenizer(f"{name} has no tokenizer.ggml.tokens; use a GGUF file with its tokenizer")
    if len(set(tokens)) != len(tokens):
        raise InvalidTokenizer(f"{name} has the same token twice in its vocabulary; download it again")
    types = fields.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise InvalidTokenizer(f"{name} has {len(tokens)} tokens and {len(types)} token types; download it again")
    kind = fields.get("tokenizer.ggml.model")
    if kind == "gpt2":
        backend, bos_by_default = _byte_level(fields, tokens, name), fields.get("tokenizer.ggml.pre") in _BOS_BY_DEFAULT
    elif kind == "llama":
        backend, bos_by_default = _sentencepiece(fields, tokens, types, name), True
    else:
        raise InvalidTokenizer(f"{name} has a tokenizer of kind {kind!r}; known are gpt2 (byte BPE) and llama (SPM)")
    special = [
        AddedToken(token, special=type_ != _USER_DEFINED, normalized=False)
        for token, type_ in zip(tokens, types, strict=True)
        if type_ in (_CONTROL, _USER_DEFINED) or (type_ == _UNKNOWN and kind == "gpt2")
    ]
    backend.add_tokens(special)
    roles = {
        role: tokens[index]
        for role, key in _ROLES.items()
        if (index := _special_id(fields, key, tokens, name)) is not None
    }
    _add_ends(backend, fields, roles, bos_by_default)
    ends = (_special_id(fields, key, tokens, name) for key in ("eos", "eot", "eom"))
    templates = [fields.get(f"tokenizer.chat_template{kind}") for kind in ("", ".tool_use")]
    template, for_tools = (text if isinstance(text, str) else None for text in templates)
    files = TokenizerFiles(backend, template, for_tools, roles, tuple(end for end in ends if end is not None))
    files.check(len(tokens), name)
    return files


def _special_id(fields: Any, key: str, tokens: list[str], name: str) -> int | None:
    value = fields.get(f"tokenizer.ggml.{key}_token_id")
    if value is None or value == 2**32 - 1:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(tokens):
        raise InvalidTokenizer(f"{name}: tokenizer.ggml.{key}_token_id {value!r} is not an id of {len(tokens)} tokens")
    return value


def _byte_level(fields: Any, tokens: list[str], name: str) -> Tokenizer:
    pre = str(fields.get("tokenizer.ggml.pre", "default"))
    rule = _SAME_AS.get(pre, pre)
    if rule not in _SPLITS:
        known = ", ".join(sorted((*_SPLITS, *_SAME_AS)))
        raise InvalidTokenizer(
            f"{name} splits text by the rule {pre!r} (tokenizer.ggml.pre), known are {known}; "
            "use the model's safetensors checkpoint"
        )
    merges = [tuple(merge.split(" ")) for merge in fields.get("tokenizer.ggml.merges") or ()]
    if not merges or not all(len(merge) == 2 for merge in merges):
        raise InvalidTokenizer(f"{name} has no usable tokenizer.ggml.merges; download it again")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    try:
        model = models.BPE(vocabulary, merges, ignore_merges=pre in _WHOLE_TOKENS_FIRST)
    except Exception as cause:  # the tokenizers library raises plain Exception
        raise InvalidTokenizer(f"{name}: its merges do not fit its vocabulary: {cause}") from cause
    backend = Tokenizer(model)
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _SPLITS[rule]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(fields: Any, tokens: list[str], types: list[int], name: str) -> Tokenizer:
    """BPE with byte fallback that joins pieces in the order of their scores, as SentencePiece does."""
    scores = fields.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise InvalidTokenizer(f"{name} has no score for every token (tokenizer.ggml.scores); download it again")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    joinable = {token for token, type_ in zip(tokens, types, strict=True) if type_ in (_NORMAL, _USER_DEFINED)}
    merges = [
        (token[:cut], token[cut:])
        for token in sorted(joinable, key=lambda token: (-scores[vocabulary[token]], vocabulary[token]))
        for cut in range(1, len(token))
        if token[:cut] in joinable and token[cut:] in joinable
    ]
    unknown = next((token for token, type_ in zip(tokens, types, strict=True) if type_ == _UNKNOWN), None)
    fallback = sum(type_ == _BYTE for type_ in types) == 256
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=fallback))
    space = [normalizers.Replace(" ", "▁")]
    prefix = [normalizers.Prepend("▁")] if fields.get("tokenizer.ggml.add_space_prefix", True) else []
    backend.normalizer = normalizers.Sequence([*prefix, *space])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return backend


def _add_ends(backend: Tokenizer, fields: Any, roles: dict[str, str], bos_by_default: bool) -> None:
    """Put the begin and end tokens around every text where the file asks for it."""
    first = roles.get("bos_token") if fields.get("tokenizer.ggml.add_bos_token", bos_by_default) else None
    last = roles.get("eos_token") if fields.get("tokenizer.ggml.add_eos_token", False) else None
    around = [token for token in (first, last) if token is not None]
    if not around:
        return
    template = " ".join(filter(None, (first and f"{first}:0", "$A:0", last and f"{last}:0")))
    ids = [(token, backend.token_to_id(token)) for token in dict.fromkeys(around)]
    backend.post_processor = processors.TemplateProcessing(single=template, pair=f"{template} $B:1", special_tokens=ids)
