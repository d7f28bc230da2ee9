"""Chat and completions over the real ``openai`` client and real sockets."""

from __future__ import annotations

from typing import Any

import pytest
from openai import OpenAI

from dspark_runtime import Bundle, SamplingParams
from tests.serve.running import NAME, Running

USER: Any = [{"role": "user", "content": "once upon a time"}]
GREEDY: Any = {"temperature": 0, "max_tokens": 24, "extra_body": {"ignore_eos": True}}


def alone(opened: Bundle, seed: int = 0, tokens: int = 24, **params: Any) -> str:
    """The text of the same conversation without a server and without drafts."""
    prompt = opened.codec.encode_chat(USER)
    made = opened.generate(
        prompt, SamplingParams(**params), seed=seed, max_new_tokens=tokens, ignore_eos=True, speculate="off"
    )
    return made.text


def test_a_chat_is_what_the_bundle_generates(client: OpenAI, opened: Bundle) -> None:
    answer = client.chat.completions.create(model=NAME, messages=USER, **GREEDY)
    (choice,) = answer.choices
    assert choice.message.content == alone(opened)
    assert (choice.message.role, choice.finish_reason, answer.object) == ("assistant", "length", "chat.completion")
    assert answer.model == NAME and answer.id.startswith("chatcmpl-")


def test_usage_counts_tokens_and_drafts(client: OpenAI, opened: Bundle) -> None:
    usage = client.chat.completions.create(model=NAME, messages=USER, **GREEDY).usage
    assert usage is not None and usage.prompt_tokens_details and usage.completion_tokens_details
    assert usage.prompt_tokens == len(opened.codec.encode_chat(USER))
    assert usage.completion_tokens == 24
    assert usage.total_tokens == usage.prompt_tokens + 24
    made = opened.generate("once upon a time", chat=True, max_new_tokens=24, ignore_eos=True)
    details = usage.completion_tokens_details
    assert details.accepted_prediction_tokens is not None and details.rejected_prediction_tokens is not None
    assert 0 <= details.accepted_prediction_tokens < made.stats.emitted
    assert details.rejected_prediction_tokens >= 0


def test_a_stream_has_role_text_reason_and_usage(client: OpenAI, opened: Bundle) -> None:
    stream = client.chat.completions.create(
        model=NAME, messages=USER, stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    chunks = list(stream)
    first, last, usage = chunks[0].choices[0], chunks[-2].choices[0], chunks[-1]
    assert first.delta.role == "assistant" and first.finish_reason is None
    assert last.finish_reason == "length" and not last.delta.content
    assert not usage.choices and usage.usage is not None and usage.usage.completion_tokens == 24
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == alone(opened)
    assert {(chunk.id, chunk.created, chunk.model) for chunk in chunks} == {(usage.id, usage.created, NAME)}
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_several_choices_differ_and_are_those_of_a_seed(client: OpenAI) -> None:
    options: Any = {"temperature": 1.5, "max_tokens": 12, "seed": 7, "n": 3, "extra_body": {"ignore_eos": True}}
    answers = [client.chat.completions.create(model=NAME, messages=USER, **options) for _ in range(2)]
    texts = [[choice.message.content for choice in answer.choices] for answer in answers]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 3
    assert [choice.index for choice in answers[0].choices] == [0, 1, 2]
    assert answers[0].usage is not None and answers[0].usage.completion_tokens == 36
    stream = client.chat.completions.create(model=NAME, messages=USER, stream=True, **options)
    streamed = ["", "", ""]
    for chunk in stream:
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts[0]


def test_without_a_seed_texts_differ(client: OpenAI) -> None:
    options: Any = {"temperature": 1.5, "max_tokens": 24, "extra_body": {"ignore_eos": True}}
    texts = {
        client.chat.completions.create(model=NAME, messages=USER, **options).choices[0].message.content
        for _ in range(3)
    }
    assert len(texts) == 3


def test_a_stop_string_ends_the_text_before_it(client: OpenAI, opened: Bundle) -> None:
    whole = alone(opened)
    stop = whole[len(whole) // 2 :][:3]
    answer = client.chat.completions.create(model=NAME, messages=USER, stop=[stop, "\ue000"], **GREEDY)
    assert answer.choices[0].message.content == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    stream = client.chat.completions.create(model=NAME, messages=USER, stop=stop, stream=True, **GREEDY)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole[: whole.index(stop)]


@pytest.mark.parametrize(
    "given",
    [
        {"presence_penalty": 1.5, "frequency_penalty": 1.0},
        {"logit_bias": {"40": 100.0}},
        {"extra_body": {"ignore_eos": True, "repetition_penalty": 3.0}},
        {"extra_body": {"ignore_eos": True, "top_k": 1}},
        {"extra_body": {"ignore_eos": True, "min_p": 1.0}},
        {"temperature": 0.7, "top_p": 0.5, "seed": 11},
    ],
)
def test_what_is_asked_for_reaches_the_sampler(client: OpenAI, opened: Bundle, given: dict[str, Any]) -> None:
    options: dict[str, Any] = {"temperature": 0.7, "seed": 11, "max_tokens": 24, "extra_body": {"ignore_eos": True}}
    answer = client.chat.completions.create(model=NAME, messages=USER, **(options | given))
    flat = {k: v for k, v in (options | given | (options | given)["extra_body"]).items() if k != "extra_body"}
    params = {k: v for k, v in flat.items() if k not in ("seed", "max_tokens", "ignore_eos")}
    if "logit_bias" in params:
        params["logit_bias"] = {int(k): v for k, v in params["logit_bias"].items()}
    assert answer.choices[0].message.content == alone(opened, seed=11, **params)


def test_messages_may_have_parts_and_roles_of_both_ages(client: OpenAI) -> None:
    def answer(messages: Any) -> str | None:
        return client.chat.completions.create(model=NAME, messages=messages, **GREEDY).choices[0].message.content

    before: Any = [{"role": "assistant", "content": "yes", "refusal": None}]
    parts: Any = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    plain: Any = [{"role": "system", "content": "s"}, {"role": "user", "content": "a\nb"}, *before, *USER]
    new: Any = [{"role": "developer", "content": "s"}, {"role": "user", "content": parts}, *before, *USER]
    assert answer(plain) == answer(new)


def test_completions_take_text_ids_and_lists(client: OpenAI, opened: Bundle) -> None:
    options: Any = {"temperature": 0, "max_tokens": 10, "extra_body": {"ignore_eos": True}}
    ids = opened.codec.encode("once upon")
    expected = opened.generate(ids, max_new_tokens=10, ignore_eos=True).text
    for prompt in ("once upon", ids):
        answer = client.completions.create(model=NAME, prompt=prompt, **options)
        assert answer.choices[0].text == expected and answer.object == "text_completion"
    both = client.completions.create(model=NAME, prompt=["once upon", "a time"], n=2, **options)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert [both.choices[0].text, both.choices[1].text] == [expected, expected]
    assert both.usage is not None and both.usage.prompt_tokens == len(ids) + len(opened.codec.encode("a time"))
    stream = client.completions.create(
        model=NAME, prompt=[ids, ids], stream=True, stream_options={"include_usage": True}, **options
    )
    texts, reasons, usage = ["", ""], [], None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons.append(choice.finish_reason)
    assert texts == [expected, expected] and reasons.count("length") == 2
    assert usage is not None and usage.completion_tokens == 20


def test_completions_are_short_by_default(client: OpenAI) -> None:
    answer = client.completions.create(model=NAME, prompt="x", extra_body={"ignore_eos": True})
    assert answer.usage is not None and answer.usage.completion_tokens == 16


def test_models_and_health(server: Running, client: OpenAI) -> None:
    import httpx

    (card,) = client.models.list().data
    assert card.id == NAME and card.model_dump()["max_model_len"] == 256
    assert client.models.retrieve(NAME) == card
    for route, status in (("/health", "ready"), ("/health/ready", "ready"), ("/health/live", "live")):
        answer = httpx.get(server.url + route)
        assert answer.status_code == 200 and answer.json()["status"] == status
