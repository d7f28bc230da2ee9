"""Texts that follow a grammar, over the real client; and grammars that cannot be followed."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import httpx
import jsonschema
import numpy as np
import pytest
from openai import OpenAI

from dspark_runtime import Bundle, SamplingParams, ServiceOptions
from dspark_serve.guides import Grammar, Grammars
from tests.serve.running import NAME, Running, running

USER: Any = [{"role": "user", "content": "once upon a time"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["cat", "dog"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "names": {"type": "array", "items": {"type": "string", "maxLength": 4}, "minItems": 1, "maxItems": 2},
    },
    "required": ["kind", "age", "names"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0.0, 1.3])
@pytest.mark.parametrize("stream", [False, True])
def test_a_text_fits_its_schema(client: OpenAI, temperature: float, stream: bool) -> None:
    options: Any = {"model": NAME, "messages": USER, "temperature": temperature, "seed": 1, "n": 2, "max_tokens": 200}
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "pet", "schema": SCHEMA, "strict": True}}
    texts, reasons = ["", ""], set()
    if stream:
        for chunk in client.chat.completions.create(**options, response_format=wanted, stream=True):
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
                reasons.add(choice.finish_reason)
    else:
        answer = client.chat.completions.create(**options, response_format=wanted)
        texts = [choice.message.content or "" for choice in answer.choices]
        reasons = {choice.finish_reason for choice in answer.choices}
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMA)
    assert reasons - {None} == {"stop"}


def test_speculation_changes_no_guided_text(opened: Bundle, client: OpenAI) -> None:
    options: Any = {"model": NAME, "messages": USER, "temperature": 0, "max_tokens": 200}
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "pet", "schema": SCHEMA}}
    text = client.chat.completions.create(**options, response_format=wanted).choices[0].message.content
    with running(opened, ServiceOptions(rows=1, capacity=256, speculate="off")) as plain:
        made = plain.client().chat.completions.create(**options, response_format=wanted)
    assert made.choices[0].message.content == text


def test_json_object_regex_choice_and_grammar(client: OpenAI) -> None:
    def text(**given: Any) -> str:
        options: Any = {"temperature": 1.0, "seed": 3, "max_tokens": 100, "extra_body": given}
        return client.completions.create(model=NAME, prompt="x", **options).choices[0].text

    assert re.fullmatch(r"[a-c]{3}-\d{2}", text(guided_regex=r"[a-c]{3}-\d{2}"))
    assert text(guided_choice=["once", 'twice \n"thrice"']) in ("once", 'twice \n"thrice"')
    assert text(guided_grammar='start: "(" ("a" | "b")* ")" "!"').rstrip("!")[-1] == ")"
    assert json.loads(text(guided_json={"type": "array", "items": {"type": "null"}, "maxItems": 2})) in (
        [], [None], [None, None],
    )  # fmt: skip
    assert text(response_format={"type": "json_object"}).startswith("{")


def test_a_guide_may_end_inside_what_a_round_accepts(opened: Bundle, client: OpenAI) -> None:
    text = client.completions.create(
        model=NAME, prompt="a", temperature=0, max_tokens=100, extra_body={"guided_regex": "(ab){12}"}
    )
    assert text.choices[0].text == "ab" * 12 and text.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"guided_regex": "((("}, "guided_regex"),
        ({"guided_grammar": "start: nothing"}, "guided_grammar"),
        ({"guided_regex": r"x[^\s\S]"}, "guided_regex"),
        ({"guided_grammar": "start: /a/ & /b/"}, "guided_grammar"),
        ({"guided_json": {"type": "frob"}}, "guided_json"),
        ({"guided_json": "no json"}, "guided_json"),
        ({"guided_json": {"uniqueItems": True, "type": "array"}}, "guided_json"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos"),
        ({"guided_regex": "a" * 300_000}, "guided_regex"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format"),
    ],
)
def test_grammars_that_cannot_be_used(server: Running, given: Any, param: str) -> None:
    body = {"model": NAME, "prompt": "x", "max_tokens": 2, **given}
    answer = httpx.post(f"{server.url}/v1/completions", json=body)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"].split(".")[0] == param, error


async def _slowly(opened: Bundle) -> None:
    grammars = Grammars(opened, seconds=0.0)
    await grammars.compile(Grammar("regex", "a", "guided_regex"))


DEAD_END: Any = {"guided_grammar": 'start: "once" REST\nREST: /a/ & /b/'}


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_a_dead_end_ends_the_text_and_is_said(server: Running, path: str) -> None:
    prompt: Any = {"messages": USER} if "chat" in path else {"prompt": "x"}
    body = {"model": NAME, "max_tokens": 20, **DEAD_END, **prompt}
    answer = httpx.post(f"{server.url}/v1/{path}", json=body)
    choice = answer.json()["choices"][0]
    assert answer.status_code == 200 and answer.headers["x-dspark-guide"] == "incomplete"
    assert (choice["finish_reason"], choice["guide"]) == ("stop", "incomplete")
    assert "once" in (choice.get("text"), choice.get("message", {}).get("content"))
    lines = httpx.post(f"{server.url}/v1/{path}", json=body | {"stream": True}).text.splitlines()
    last = [json.loads(line[6:]) for line in lines if line.startswith("data: {")][-1]["choices"][0]
    assert (last["finish_reason"], last["guide"]) == ("stop", "incomplete")
    assert "data: [DONE]" in lines


def test_a_grammar_that_takes_too_long(opened: Bundle) -> None:
    with pytest.raises(Exception, match="not compiled within") as caught:
        asyncio.run(_slowly(opened))
    assert caught.value.status_code == 400  # type: ignore[attr-defined]


def test_a_guide_keeps_its_contract(opened: Bundle) -> None:
    """What :class:`dspark_runtime.speculation.guides.GuideState` promises, token by token."""
    guide = asyncio.run(Grammars(opened).compile(Grammar("regex", "once (upon|a)!", "x")))
    state, other = guide.start(), guide.start()
    tokens = opened.codec.encode("once upon!")
    for place, token in enumerate(tokens):
        allowed = state.allowed()
        assert allowed.dtype == np.bool_ and allowed.shape == (opened.limits.vocab_size,) and allowed[token]
        assert state.accepts([*tokens[place:], 5]) == len(tokens) - place
        assert not state.stopped
        state.advance(token)
    assert state.stopped
    assert other.accepts(tokens) == len(tokens)  # another text is where it was
    text = opened.codec.decode(other.forced())
    assert text and "once ".startswith(text)
    made = opened.generate("x", SamplingParams(guide=guide), max_new_tokens=40)
    assert re.fullmatch("once (upon|a)!", made.text) and made.finish_reason == "stop"


def test_logprobs_of_a_chat(client: OpenAI, opened: Bundle) -> None:
    options: Any = {"temperature": 0, "max_tokens": 12, "logprobs": True, "top_logprobs": 3}
    options["extra_body"] = {"ignore_eos": True}
    answer = client.chat.completions.create(model=NAME, messages=USER, **options).choices[0]
    assert answer.logprobs is not None and answer.logprobs.content is not None
    prompt = opened.codec.encode_chat(USER)
    made = opened.generate(prompt, SamplingParams(logprobs=3), max_new_tokens=12, ignore_eos=True)
    tokenizer = opened.codec.tokenizer
    assert [entry.logprob for entry in answer.logprobs.content] == pytest.approx([e.logprob for e in made.logprobs])
    for entry, token in zip(answer.logprobs.content, made.tokens, strict=True):
        assert len(entry.top_logprobs) == 3 and entry.top_logprobs[0].token == entry.token
        assert entry.top_logprobs[0].logprob == entry.logprob
        if tokenizer.decode([token]) and "\ufffd" not in tokenizer.decode([token]):
            assert bytes(entry.bytes or b"").decode() == entry.token == tokenizer.decode([token])
    streamed = []
    for chunk in client.chat.completions.create(model=NAME, messages=USER, stream=True, **options):
        for choice in chunk.choices:
            streamed += (choice.logprobs.content or []) if choice.logprobs else []
    assert [entry.token for entry in streamed] == [entry.token for entry in answer.logprobs.content]
    for one, other in zip(streamed, answer.logprobs.content, strict=True):  # drafted otherwise: other rows in a pass
        assert [(top.token, top.bytes) for top in one.top_logprobs] == [
            (top.token, top.bytes) for top in other.top_logprobs
        ]
        assert [top.logprob for top in one.top_logprobs] == pytest.approx(
            [top.logprob for top in other.top_logprobs], rel=1e-5
        )


def test_logprobs_of_a_completion(client: OpenAI) -> None:
    options: Any = {"temperature": 0, "max_tokens": 12, "logprobs": 2, "extra_body": {"ignore_eos": True}}
    choice = client.completions.create(model=NAME, prompt="once upon", **options).choices[0]
    found = choice.logprobs
    assert found is not None and found.tokens and found.token_logprobs and found.top_logprobs and found.text_offset
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(found.text_offset) == 12
    entries = zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True)
    assert all(top[name] == value for name, value, top in entries)
    plain = [name for name in found.tokens if not name.startswith("bytes:") and not name.startswith("<")]
    assert all(name in choice.text for name in plain)
    streamed: list[Any] = []
    for chunk in client.completions.create(model=NAME, prompt="once upon", stream=True, **options):
        streamed += [found for c in chunk.choices if c.logprobs for found in c.logprobs.token_logprobs or []]
    assert streamed == pytest.approx(found.token_logprobs, rel=1e-5)  # drafted otherwise: other rows in a pass


def test_a_stream_may_tell_who_drafted(client: OpenAI) -> None:
    options: Any = {"temperature": 0, "max_tokens": 60, "stream": True, "extra_body": {"ignore_eos": True}}
    wanted: Any = {"include_drafters": True, "include_usage": True}
    drafters, texts, content, usage = [], "", "", None
    for chunk in client.chat.completions.create(model=NAME, messages=USER, stream_options=wanted, **options):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            content += choice.delta.content or ""
            more = choice.model_extra or {}
            assert len(more.get("drafters", [])) == len(more.get("token_texts", []))
            drafters += more.get("drafters", [])
            texts += "".join(more.get("token_texts", []))
    assert len(drafters) == 60 and content.startswith(texts)
    assert {name for names in drafters for name in names} <= {"ngram", "store", "self-draft"}
    assert usage is not None and usage.completion_tokens_details is not None
    assert sum(map(bool, drafters)) == usage.completion_tokens_details.accepted_prediction_tokens
