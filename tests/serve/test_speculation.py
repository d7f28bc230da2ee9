"""What a client may ask about drafting, and what it is told."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from openai import OpenAI

from dspark_runtime import Bundle, ServiceOptions
from dspark_runtime.bundle.manifest import DrafterEntry
from dspark_runtime.decoding.request import Limits, make_request
from dspark_serve.asking import speculation_of
from dspark_serve.splitting import Splitter
from tests.serve.running import NAME, Running, running

LOOPING: Any = {"model": NAME, "prompt": "a b a b a b a b", "max_tokens": 40, "temperature": 0, "ignore_eos": True}
HEADER = "x-dspark-speculation"


def test_a_request_may_switch_it_off(server: Running) -> None:
    answers = {
        mode: httpx.post(f"{server.url}/v1/completions", json=LOOPING | {"speculate": mode}, timeout=60)
        for mode in ("auto", "off")
    }
    texts = {mode: answer.json()["choices"][0]["text"] for mode, answer in answers.items()}
    assert texts["auto"] == texts["off"]
    details = {mode: answer.json()["usage"]["completion_tokens_details"] for mode, answer in answers.items()}
    assert details["off"]["accepted_prediction_tokens"] == details["off"]["rejected_prediction_tokens"] == 0
    assert answers["auto"].headers[HEADER] == "auto"
    assert answers["off"].headers[HEADER] == "off; request"
    assert 'dspark_speculation_total{state="off"}' in httpx.get(f"{server.url}/metrics").text


def test_a_server_without_drafters_says_so(opened: Bundle) -> None:
    with running(opened, ServiceOptions(rows=1, capacity=64, speculate="off")) as server:
        answer = httpx.post(f"{server.url}/v1/completions", json=LOOPING | {"stream": True}, timeout=60)
        assert answer.headers[HEADER] == "off; server"


def test_a_draft_that_reaches_less_far_is_named() -> None:
    entries = [
        DrafterEntry(name="short", kind="eagle3", max_positions=50),
        DrafterEntry(name="idle", kind="eagle3", max_positions=5),
        DrafterEntry(name="ngram", kind="ngram"),
    ]
    limits = Limits(100, 1000)
    fits, longer = (make_request([1] * 10, limits, max_new_tokens=most) for most in (40, 41))
    assert str(speculation_of(["ngram", "short"], entries, [fits])) == "auto"
    assert str(speculation_of(["ngram", "short"], entries, [fits, longer])) == "partial; short up to 50 tokens"


@pytest.mark.parametrize("stop", [None, "zzz"])
def test_an_event_may_hold_one_token(client: OpenAI, stop: str | None) -> None:
    asked: Any = {k: v for k, v in LOOPING.items() if k != "ignore_eos"} | {"stream": True, "stop": stop}

    def texts(**options: Any) -> list[tuple[str, list[str]]]:
        body = {"ignore_eos": True, "stream_options": {"include_drafters": True, **options}}
        chunks = client.completions.create(**asked, extra_body=body)
        found = [chunk.choices[0] for chunk in chunks if chunk.choices and chunk.choices[0].finish_reason is None]
        return [(choice.text, getattr(choice, "token_texts", [])) for choice in found]

    rounds, tokens = texts(), texts(token_by_token=True)
    assert "".join(text for text, _ in rounds) == "".join(text for text, _ in tokens)
    assert [piece for _, pieces in rounds for piece in pieces] == [piece for _, pieces in tokens for piece in pieces]
    assert {len(pieces) for _, pieces in tokens} == {1}
    assert len(tokens) == 40


def test_a_chat_gives_one_token_an_event_too(server: Running) -> None:
    asked = {"messages": [{"role": "user", "content": "a b a b"}], "stream_options": {"token_by_token": True}}
    body = LOOPING | asked | {"stream": True, "logprobs": True, "speculate": "auto"}
    del body["prompt"]
    lines = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).text.splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    counts = [len(event["choices"][0]["logprobs"]["content"]) for event in events if event["choices"][0]["logprobs"]]
    assert counts == [1] * 40


def test_parts_add_up_whatever_was_held_back(opened: Bundle) -> None:
    request = make_request(opened.codec.encode("x"), opened.limits, max_new_tokens=40, stop=["q q q"])
    splitter = Splitter(opened.codec.tokenizer, request)
    longest = 0
    for chunk in opened.generate("x", max_new_tokens=40, ignore_eos=True, stop=["q q q"], stream=True, draft_length=3):
        parts = splitter.split(chunk)
        assert "".join(part.text for part in parts) == chunk.text
        assert [token for part in parts for token in part.tokens] == chunk.tokens
        assert parts[-1].finish_reason == chunk.finish_reason
        longest = max(longest, len(parts))
    assert longest > 1
