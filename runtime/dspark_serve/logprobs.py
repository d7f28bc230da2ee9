"""Log probabilities in OpenAI's two forms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dspark_runtime.decoding.choice import TokenLogprob
from dspark_runtime.decoding.sequence import FinishReason

TokenBytes = Callable[[int], bytes]


def spoken_logprobs(found: Sequence[TokenLogprob], reason: FinishReason | None) -> Sequence[TokenLogprob]:
    """Those of tokens that are part of the text: not of the one that only ended it."""
    return found[:-1] if reason == "eos" else found


def token_name(data: bytes) -> str:
    """A token's text; of half a character its bytes, as OpenAI writes them."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def chat_logprobs(found: Sequence[TokenLogprob], token_bytes: TokenBytes) -> dict[str, Any]:
    """For a choice of a chat."""
    return {
        "content": [
            _token(entry.token, entry.logprob, token_bytes)
            | {"top_logprobs": [_token(token, logprob, token_bytes) for token, logprob in entry.top]}
            for entry in found
        ],
        "refusal": None,
    }


def completion_logprobs(found: Sequence[TokenLogprob], token_bytes: TokenBytes, offset: int) -> dict[str, Any]:
    """For a choice of a completion, whose text before had ``offset`` characters."""
    names = [token_name(token_bytes(entry.token)) for entry in found]
    offsets = []
    for entry in found:
        offsets.append(offset)
        offset += len(token_bytes(entry.token).decode("utf-8", "ignore"))
    return {
        "tokens": names,
        "token_logprobs": [_finite(entry.logprob) for entry in found],
        "top_logprobs": [
            {token_name(token_bytes(token)): _finite(logprob) for token, logprob in entry.top} for entry in found
        ],
        "text_offset": offsets,
    }


def _token(token: int, logprob: float, token_bytes: TokenBytes) -> dict[str, Any]:
    data = token_bytes(token)
    return {"token": token_name(data), "logprob": _finite(logprob), "bytes": list(data)}


def _finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI writes -9999 for what is as good as impossible."""
    return max(logprob, -9999.0)
