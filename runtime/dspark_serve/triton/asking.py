"""From the tensors of one inference request to a request of the service.

| tensor | type | |
|---|---|---|
| ``text_input`` | BYTES [1] | the prompt; special tokens in it are meant |
| ``messages`` | BYTES [1] | a conversation instead, as JSON: ``[{"role": "user", "content": "Hello"}]`` |
| ``input_ids`` | INT32 [-1] | token ids instead |
| ``stream`` | BOOL [1] | a response for every step; otherwise exactly one |
| ``max_tokens`` | INT32 [1] | most new tokens |
| ``stop_words`` | BYTES [-1] | texts that end the answer; empty ones are left out |
| ``temperature``, ``top_p``, ``min_p`` | FP32 [1] | without a temperature the text is greedy |
| ``frequency_penalty``, ``presence_penalty``, ``repetition_penalty`` | FP32 [1] | |
| ``top_k`` | INT32 [1] | |
| ``seed`` | UINT64 [1] | of the random numbers; without one every request has its own |
| ``ignore_eos`` | BOOL [1] | go on after an end-of-text token |
| ``return_num_input_tokens``, ``return_num_output_tokens`` | BOOL [1] | whether the last response has these counts |

Most names are those of TensorRT-LLM's model with scheduling in Python, for Triton's own OpenAI front end. Every shape
has a batch dimension of 1 before what the table says.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dspark_runtime.arguments import whole
from dspark_runtime.decoding.request import Request
from dspark_runtime.errors import UsageError
from dspark_runtime.serving.service import Service
from dspark_runtime.speculation.sampling import SamplingParams
from dspark_runtime.text.codec import TextCodec

INPUTS: Mapping[str, tuple[str, int]] = {
    "text_input": ("TYPE_STRING", 1),
    "messages": ("TYPE_STRING", 1),
    "input_ids": ("TYPE_INT32", -1),
    "stream": ("TYPE_BOOL", 1),
    "max_tokens": ("TYPE_INT32", 1),
    "stop_words": ("TYPE_STRING", -1),
    "temperature": ("TYPE_FP32", 1),
    "top_p": ("TYPE_FP32", 1),
    "min_p": ("TYPE_FP32", 1),
    "top_k": ("TYPE_INT32", 1),
    "frequency_penalty": ("TYPE_FP32", 1),
    "presence_penalty": ("TYPE_FP32", 1),
    "repetition_penalty": ("TYPE_FP32", 1),
    "seed": ("TYPE_UINT64", 1),
    "ignore_eos": ("TYPE_BOOL", 1),
    "return_num_input_tokens": ("TYPE_BOOL", 1),
    "return_num_output_tokens": ("TYPE_BOOL", 1),
}
"""Type and length of every input; all are optional for Triton, and exactly one of the prompts must be there."""

OUTPUTS: Mapping[str, tuple[str, int]] = {
    "text_output": ("TYPE_STRING", 1),
    "token_ids": ("TYPE_INT32", -1),
    "finish_reason": ("TYPE_STRING", 1),
    "num_input_tokens": ("TYPE_INT32", 1),
    "num_output_tokens": ("TYPE_INT32", 1),
}
"""Type and length of every output. A response of a stream has the new text and tokens; the last one has the rest."""

MOST_BYTES = 8 * 2**20
"""Of one text: it is encoded before anything else is taken."""

_PROMPTS = ("text_input", "messages", "input_ids")
_SAMPLING = ("temperature", "top_p", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty")

Tensors = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Ask:
    """A checked request, and how it wants to be answered."""

    request: Request
    stream: bool
    counts: tuple[bool, bool]


def read(tensors: Tensors, service: Service, codec: TextCodec | None) -> Ask:
    """What the tensors that were sent ask for; ``codec`` is None where a bundle has no tokenizer.

    Raises:
        UsageError: no prompt or several, a malformed value, or one outside its range.
        CapacityError: prompt and text are longer than the service's capacity.
    """
    given = {name: float(str(np.float32(_scalar(tensors, name)))) for name in _SAMPLING if name in tensors}
    if "top_k" in tensors:
        given["top_k"] = int(_scalar(tensors, "top_k"))
    request = service.request(
        _prompt(tensors, codec),
        SamplingParams(**given),  # type: ignore[arg-type]
        max_new_tokens=int(_scalar(tensors, "max_tokens")) if "max_tokens" in tensors else None,
        seed=int(_scalar(tensors, "seed")) if "seed" in tensors else secrets.randbits(63),
        stop=[text for text in _texts(tensors, "stop_words") if text],
        ignore_eos=_flag(tensors, "ignore_eos", False),
    )
    counts = tuple(_flag(tensors, f"return_num_{kind}_tokens", True) for kind in ("input", "output"))
    return Ask(request, _flag(tensors, "stream", False), (counts[0], counts[1]))


def deadline_of(parameters: Mapping[str, Any], microseconds: int) -> float | None:
    """Seconds a request may take, by Triton's own field or the parameter ``timeout``, both in microseconds.

    Raises:
        UsageError: another parameter, such as a misspelt tensor of ``/generate``, or a timeout that is not a number.
    """
    unknown = [name for name in parameters if name != "timeout" and not name.startswith("triton_")]
    if unknown:
        raise UsageError(f"{', '.join(unknown)} is not an input of this model; inputs are {', '.join(INPUTS)}")
    limit = whole("timeout", parameters.get("timeout") or microseconds, 0)
    return limit / 1e6 or None


def _prompt(tensors: Tensors, codec: TextCodec | None) -> Sequence[int]:
    named = [name for name in _PROMPTS if name in tensors]
    if len(named) != 1:
        raise UsageError(f"give exactly one of {', '.join(_PROMPTS)}, not {' and '.join(named) or 'none'}")
    if named == ["input_ids"]:
        return [int(token) for token in tensors["input_ids"].reshape(-1)]
    if codec is None:
        raise UsageError(f"{named[0]}: the bundle has no tokenizer; give input_ids")
    texts = _texts(tensors, named[0])
    if len(texts) != 1:
        raise UsageError(f"{named[0]} holds {len(texts)} texts; a request has one prompt")
    return codec.encode(texts[0]) if named == ["text_input"] else codec.encode_chat(_messages(texts[0]))


def _messages(text: str) -> list[dict[str, Any]]:
    try:
        messages = json.loads(text)
    except ValueError as error:
        raise UsageError(f"messages is not JSON: {error}") from error
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise UsageError('messages is not a JSON list of objects such as {"role": "user", "content": "Hello"}')
    return [message | {"content": _content(message.get("content", ""))} for message in messages]


def _content(content: Any) -> Any:
    """The text of a message whose content comes in parts, as OpenAI's clients write it."""
    if not isinstance(content, list):
        return content
    if not all(isinstance(part, dict) and part.get("type") == "text" and "text" in part for part in content):
        raise UsageError("messages: a part of a content is not text, and this server takes nothing else")
    return "\n".join(str(part["text"]) for part in content)


def _scalar(tensors: Tensors, name: str) -> Any:
    values = tensors[name].reshape(-1)
    if len(values) != 1:
        raise UsageError(f"{name} holds {len(values)} values; give one")
    return values[0]


def _flag(tensors: Tensors, name: str, default: bool) -> bool:
    return bool(_scalar(tensors, name)) if name in tensors else default


def _texts(tensors: Tensors, name: str) -> list[str]:
    found = [bytes(value) for value in tensors.get(name, np.empty(0, object)).reshape(-1)]
    if sum(map(len, found)) > MOST_BYTES:
        raise UsageError(f"{name} has more than {MOST_BYTES} bytes")
    try:
        return [value.decode() for value in found]
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is not valid UTF-8: {error}") from error
