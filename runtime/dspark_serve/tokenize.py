"""``POST /tokenize`` and ``POST /detokenize``, as vLLM has them."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from dspark_runtime.errors import DsparkError
from dspark_serve.conversations import encoded
from dspark_serve.errors import ApiError, from_runtime
from dspark_serve.routes import ANSWERS, StrictRoute, served_by
from dspark_serve.schemas import DetokenizeAnswer, DetokenizeRequest, TokenizeAnswer, TokenizeRequest

router = APIRouter(route_class=StrictRoute, responses=ANSWERS)


@router.post("/tokenize", response_model=TokenizeAnswer)
async def tokenize(body: TokenizeRequest, request: Request) -> dict[str, Any]:
    """Token ids of a text or a conversation."""
    served = served_by(request)
    served.check_model(body.model or served.name)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "give either prompt or messages", param="prompt")
    if body.messages is not None:
        tokens = await encoded(served, body.messages, body.chat_template_kwargs)
    else:
        text = body.prompt or ""
        tokens = await served.on_text_thread(lambda: served.codec.encode(text))
    tokenizer = served.codec.tokenizer
    strings = [tokenizer.id_to_token(token) or "" for token in tokens] if body.return_token_strs else None
    return {"count": len(tokens), "max_model_len": served.capacity, "tokens": tokens, "token_strs": strings}


@router.post("/detokenize", response_model=DetokenizeAnswer)
async def detokenize(body: DetokenizeRequest, request: Request) -> dict[str, Any]:
    """The text of token ids."""
    served = served_by(request)
    served.check_model(body.model or served.name)
    try:
        return {"prompt": await served.on_text_thread(lambda: served.codec.decode(body.tokens))}
    except DsparkError as error:
        raise from_runtime(error, default_param="tokens") from error
