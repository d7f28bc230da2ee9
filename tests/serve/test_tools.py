"""Tool calls: every format cut at every place, and calls over the real client."""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_runtime import Bundle, ServiceOptions
from dspark_runtime.bundle.files import TOKENIZER_DIR
from dspark_runtime.bundle.manifest import MANIFEST
from dspark_serve.guides import Grammars
from dspark_serve.tools import Arguments, CallStart, Content, ToolFormat, ToolReader, as_message, forced_calls
from tests.serve.running import NAME, Running, running

ASK: Any = [{"role": "user", "content": "weather?"}]
HERMES = (
    "{% if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools> answer with <tool_call>"
    "{% endif %}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for call in m.tool_calls or [] %}"
    "<tool_call>{{ call.function.arguments | tojson }}</tool_call>{% endfor %}<|end|>{% endfor %}<|assistant|>"
)
WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"$ref": "#/$defs/days"}},
    "required": ["city", "days"],
    "additionalProperties": False,
    "$defs": {"days": {"type": "integer", "minimum": 1, "maximum": 9}},
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "time", "parameters": {"type": "object", "maxProperties": 0}}},
]

ANSWERS: list[tuple[ToolFormat, list[str], str | None, list[tuple[str, Any]]]] = [
    ("hermes", ["just text "], "just text ", []),
    ("hermes", ['so:\n<tool_call>\n{"name": "f", "arguments": {"a": "}\\"{"}}\n</tool_call>'], "so:",
     [("f", {"a": '}"{'})]),
    (
        "hermes",
        ['<tool_call>{"name":"f","arguments":{}}</tool_call>\n<tool_call>{"name":"g","arguments":[1,{"b":2}]}</tool_call>'],
        None,
        [("f", {}), ("g", [1, {"b": 2}])],
    ),
    ("hermes", ['<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call> and'], "and", [("f", {"a": 1})]),
    ("hermes", ['<tool_call>{"name": "f"}</tool_call>'], None, [("f", {})]),
    ("hermes", ["a <tool_call>no json</tool_call> b"], "a <tool_call>no json</tool_call> b", []),
    ("hermes", ['<tool_call>{"name": 3}'], '<tool_call>{"name": 3}', []),
    ("hermes", ["1 < 2 <tool"], "1 < 2 <tool", []),
    ("hermes", ['<tool_call>{"na'], '<tool_call>{"na', []),
    ("mistral", ["[TOOL_CALLS]", ' [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]'], None,
     [("f", {"a": 1}), ("g", {})]),
    ("mistral", ["[TOOL_CALLS]", "get_it", "[ARGS]", '{"a": 1}', "[TOOL_CALLS]", 'g{"b": {}}'], None,
     [("get_it", {"a": 1}), ("g", {"b": {}})]),
    ("mistral", ["hello [TOO"], "hello [TOO", []),
    ("mistral", ["[TOOL_CALLS]", "[]"], "[TOOL_CALLS][]", []),
    ("llama3", ['{"name": "f", "parameters": {"x": [1, 2]}}'], None, [("f", {"x": [1, 2]})]),
    ("llama3", ["<|python_tag|>", '{"name": "f", "parameters": {}}; {"name": "g", "parameters": {"a": null}}'], None,
     [("f", {}), ("g", {"a": None})]),
    ("llama3", ['{"type": "function", "name": "f", "parameters": {}}'], None, [("f", {})]),
    ("llama3", ['{"city": "Rome"}'], '{"city": "Rome"}', []),
    ("llama3", ["plain {text}"], "plain {text}", []),
    ("llama3", [" {"], " {", []),
]  # fmt: skip
MARKED = ("[TOOL_CALLS]", "[ARGS]", "<|python_tag|>")


def read(form: ToolFormat, parts: list[str], cuts: list[int]) -> tuple[str | None, list[tuple[str, Any]]]:
    """Content and calls of an answer that comes in pieces, taken after each of them."""
    reader, pieces = ToolReader(form), []
    for part in parts:
        if part in MARKED:
            reader.mark(part)
        else:
            places = [0, *sorted(cut % (len(part) + 1) for cut in cuts), len(part)]
            for start, end in pairwise(places):
                reader.push(part[start:end])
                pieces += reader.take()
        pieces += reader.take()
    reader.finish()
    pieces += reader.take()
    started = [piece.index for piece in pieces if isinstance(piece, CallStart)]
    assert started == list(range(reader.calls))
    for place, piece in enumerate(pieces):
        if isinstance(piece, Arguments):
            assert any(isinstance(p, CallStart) and p.index == piece.index for p in pieces[:place])
        elif isinstance(piece, Content):
            assert piece.text
    message = as_message(pieces)
    calls = [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in message.get("tool_calls", [])]
    return message["content"], calls


@pytest.mark.parametrize(("form", "parts", "content", "calls"), ANSWERS)
def test_answers_whole_and_a_character_at_a_time(form: Any, parts: Any, content: Any, calls: Any) -> None:
    found, made = read(form, parts, [])
    assert ((found or "").strip(), made) == ((content or "").strip(), calls)
    assert read(form, parts, list(range(200))) == (found, made)


@given(st.sampled_from(ANSWERS), st.lists(st.integers(0, 200), max_size=6))
@settings(max_examples=200, deadline=None)
def test_answers_cut_anywhere(answer: Any, cuts: list[int]) -> None:
    form, parts, _, _ = answer
    assert read(form, parts, cuts) == read(form, parts, [])


@given(st.sampled_from(["hermes", "mistral", "llama3"]), st.text(alphabet='<tol_ca>/{}":, ;[]nameI\\x1\n', max_size=60))
@settings(max_examples=300, deadline=None)
def test_no_text_is_lost_or_fails(form: Any, text: str) -> None:
    reader = ToolReader(form)
    reader.push(text)
    reader.finish()
    pieces = reader.take()
    if not reader.calls:
        assert "".join(piece.text for piece in pieces if isinstance(piece, Content)) == text


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (
            "hermes",
            '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>\n'
            '<tool_call>\n{"name": "x-y.z", "arguments": {}}\n</tool_call>',
        ),
        ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}, {"name": "x-y.z", "arguments": {}}]'),
        ("llama3", '{"name": "f", "parameters": {"a": 1}}; {"name": "x-y.z", "parameters": {}}'),
    ],
)
def test_grammars_of_calls_are_what_the_reader_reads(opened: Bundle, form: Any, text: str) -> None:
    schema = {"properties": {"a": {"$ref": "#/$defs/d"}}, "$defs": {"d": {"type": "integer", "uniqueItems": True}}}
    functions = [{"name": "f", "parameters": schema}, {"name": "x-y.z"}]
    tokens, tokenizer = opened.codec.encode(text), opened.codec.tokenizer
    grammars = Grammars(opened)

    async def accepted(several: bool) -> int:
        guide = await grammars.compile(forced_calls(form, functions, several, tokenizer))
        return guide.start().accepts(tokens)

    async def both() -> tuple[int, int]:
        return await accepted(True), await accepted(False)

    several, single = asyncio.run(both())
    assert several == len(tokens) > single
    assert read(form, [text], [])[1] == [("f", {"a": 1}), ("x-y.z", {})]


def with_template(bundle: Path, folder: Path, template: str) -> Bundle:
    """A copy of a bundle with another chat template."""
    shutil.copytree(bundle, folder)
    name, manifest = f"{TOKENIZER_DIR}/chat_template.jinja", json.loads((folder / MANIFEST).read_text())
    (folder / name).write_text(template)
    digest = hashlib.sha256(template.encode()).hexdigest()
    manifest["files"][name] |= {"sha256": digest, "size": len(template.encode())}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return Bundle.open(folder, threads=1)


@pytest.fixture(scope="module")
def tooled(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server of a model whose template has tools."""
    made = with_template(bundle, tmp_path_factory.mktemp("tools") / "bundle", HERMES)
    with running(made, ServiceOptions(rows=4, queue=16, capacity=512)) as it:
        yield it


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("choice", "names"),
    [("required", {"weather", "time"}), ({"type": "function", "function": {"name": "weather"}}, {"weather"})],
)
def test_calls_that_have_to_come(tooled: Running, choice: Any, names: set[str], stream: bool) -> None:
    options: Any = {"model": NAME, "messages": ASK, "tools": TOOLS, "tool_choice": choice, "seed": 5}
    client, calls = tooled.client(), dict[int, list[str]]()
    if stream:
        reason, begun = None, 0
        for chunk in client.chat.completions.create(stream=True, parallel_tool_calls=False, **options):
            reason = chunk.choices[0].finish_reason or reason
            for call in chunk.choices[0].delta.tool_calls or []:
                assert call.function is not None
                if call.id:
                    begun += 1
                    calls[call.index] = [call.function.name or "", ""]
                calls[call.index][1] += call.function.arguments or ""
        assert begun == len(calls) == 1
    else:
        answer = client.chat.completions.create(parallel_tool_calls=False, **options).choices[0]
        assert answer.message.content is None
        for place, made in enumerate(answer.message.tool_calls or []):
            assert made.type == "function"
            calls[place] = [made.function.name, made.function.arguments]
        reason = answer.finish_reason
    assert reason == "tool_calls" and len(calls) == 1
    for name, arguments in calls.values():
        assert name in names
        jsonschema.validate(json.loads(arguments), WEATHER if name == "weather" else {"type": "object"})


def test_tools_reach_the_template_and_calls_come_back_to_it(tooled: Running) -> None:
    def prompt(**given: Any) -> int:
        body = {"model": NAME, "messages": ASK, "max_tokens": 1, **given}
        answer = httpx.post(f"{tooled.url}/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        return int(answer.json()["usage"]["prompt_tokens"])

    assert prompt(tools=TOOLS) > prompt(tools=TOOLS, tool_choice="none") == prompt() == prompt(tools=[])
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    turn = [*ASK, {"role": "assistant", "content": None, "tool_calls": [call]}]
    turn += [{"role": "tool", "tool_call_id": "call_1", "content": "sunny"}]
    assert prompt(messages=turn, tools=TOOLS) > prompt(tools=TOOLS)


def test_text_that_is_no_call_is_the_answer(tooled: Running) -> None:
    options: Any = {"model": NAME, "messages": ASK, "temperature": 0, "max_tokens": 30}
    options["extra_body"] = {"ignore_eos": True, "chat_template_kwargs": {}}
    answer = tooled.client().chat.completions.create(tools=TOOLS, **options).choices[0]
    assert answer.message.content and not answer.message.tool_calls and answer.finish_reason == "length"


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "none"}}}, "tool_choice"),
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "no good"}}]}, "tools"),
        ({"tools": [{"type": "code"}]}, "tools"),
    ],
)
def test_tools_that_cannot_be(tooled: Running, given: Any, param: str) -> None:
    answer = httpx.post(f"{tooled.url}/v1/chat/completions", json={"model": NAME, "messages": ASK, **given})
    assert answer.status_code == 400 and answer.json()["error"]["param"].split(".")[0] == param, answer.text


def test_a_model_without_tools_says_so(server: Running) -> None:
    answer = httpx.post(f"{server.url}/v1/chat/completions", json={"model": NAME, "messages": ASK, "tools": TOOLS})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "tools"
