"""A written model repository on the real Triton server, asked by its real clients."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from dspark_runtime import Bundle, SamplingParams
from dspark_serve.triton.asking import INPUTS
from tests.deploy.conftest import LENGTH, NAME, QUEUE, ROWS, Server, Start
from tests.shared.folders import ROOT

PROMPT = "Once upon a time"
LONG = {"max_tokens": 400, "ignore_eos": True}
ENDLESS = {"max_tokens": 16000, "ignore_eos": True}  # much longer than its test


def joined(responses: list[dict[str, list[object]]]) -> tuple[str, list[object]]:
    """Text and tokens of all responses of a stream."""
    texts = "".join(str(response["text_output"][0]) for response in responses)
    return texts, [token for response in responses for token in response["token_ids"]]


# Texts


def test_a_whole_text_is_that_of_the_bundle(server: Server, opened: Bundle) -> None:
    status, answer = server.generate(text_input=PROMPT, max_tokens=24)
    alone = opened.generate(PROMPT, max_new_tokens=24)
    assert status == 200
    assert (answer["text_output"], answer["token_ids"]) == (alone.text, alone.tokens)
    assert (answer["finish_reason"], answer["num_input_tokens"]) == (alone.finish_reason, alone.prompt_tokens)
    assert answer["num_output_tokens"] == len(alone.tokens)


def test_a_sampled_conversation_is_that_of_the_bundle(server: Server, opened: Bundle) -> None:
    messages = [{"role": "user", "content": "Why?"}]
    params = SamplingParams(temperature=0.8, top_k=40, top_p=0.9, min_p=0.01, frequency_penalty=0.5)
    alone = opened.chat(messages, params, max_new_tokens=24, seed=7, stop=["zz"])
    status, answer = server.generate(
        messages=json.dumps([{"role": "user", "content": [{"type": "text", "text": "Why?"}]}]),
        max_tokens=24, seed=7, stop_words=["", "zz"], temperature=0.8, top_k=40, top_p=0.9, min_p=0.01,
        frequency_penalty=0.5, return_num_input_tokens=False,
    )  # fmt: skip
    assert status == 200 and "num_input_tokens" not in answer
    assert answer["token_ids"] == alone.tokens


def test_a_stream_has_the_same_text_in_pieces(server: Server, opened: Bundle) -> None:
    client = server.client()
    client.ask("a", input_ids=opened.codec.encode(PROMPT), max_tokens=48, ignore_eos=True)
    responses = client.rest("a")
    alone = opened.generate(PROMPT, max_new_tokens=48, ignore_eos=True)
    assert joined(responses) == (alone.text, alone.tokens)
    assert len(responses) > 1
    assert responses[-1]["finish_reason"] == ["length"] and responses[-1]["num_output_tokens"] == [48]


def test_generate_stream_sends_events(server: Server, opened: Bundle) -> None:
    body = {"text_input": PROMPT, "max_tokens": 32, "stream": True, "ignore_eos": True}
    status, text = server.running.ask(f"/v2/models/{NAME}/generate_stream", body)
    events = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line]
    assert status == 200 and len(events) > 1
    assert (
        "".join(event["text_output"] for event in events)
        == opened.generate(PROMPT, max_new_tokens=32, ignore_eos=True).text
    )


def test_a_short_text_ends_while_a_long_one_runs(server: Server, opened: Bundle) -> None:
    client = server.client()
    client.ask("long", text_input=PROMPT, **ENDLESS)
    responses = {"long": [client.next()["outputs"]], "short": []}
    client.ask("short", text_input="The end", max_tokens=4)
    while not responses["short"] or "finish_reason" not in responses["short"][-1]:
        response = client.next()
        responses[response["id"]].append(response["outputs"])
    client.cancel()
    assert "finish_reason" not in responses["long"][-1]
    assert joined(responses["short"])[1] == opened.generate("The end", max_new_tokens=4).tokens
    tokens = joined(responses["long"])[1]
    assert tokens == opened.generate(PROMPT, max_new_tokens=len(tokens), ignore_eos=True).tokens


def test_the_sample_client_prints_a_text(server: Server, opened: Bundle) -> None:
    address = f"127.0.0.1:{server.running.ports['GRPC']}"
    command = [str(server.python), str(server.folder / "client.py"), PROMPT, "--raw", "--max-tokens", "8"]
    done = subprocess.run([*command, "--url", address], capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    text = opened.generate(PROMPT, max_new_tokens=8)
    assert done.stdout.split() == [*text.text.split(), f"[{text.finish_reason}]"]


@pytest.mark.slow
def test_the_sample_deploys_and_asks(bundle: Path, triton: Path, opened: Bundle) -> None:
    environment = os.environ | {"DSPARK_CACHE": str(triton.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "samples/triton/ask.py", str(bundle), PROMPT, "--raw"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    text = opened.generate(PROMPT, max_new_tokens=128)
    assert done.stdout.split()[-len(text.text.split()) - 1 :] == [*text.text.split(), f"[{text.finish_reason}]"]


# Refusals


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"text_input": PROMPT, "temperature": -1}, "UsageError: temperature=-1.0 is negative"),
        ({"text_input": PROMPT, "max_tokens": LENGTH}, f"CapacityError: 12 prompt tokens and max_new_tokens={LENGTH}"),
        ({"text_input": PROMPT, "max_tokens": 0}, "UsageError: max_new_tokens=0"),
        ({"max_tokens": 4}, "UsageError: give exactly one of text_input, messages, input_ids, not none"),
        ({"text_input": "a", "input_ids": [1]}, "UsageError: give exactly one of text_input, messages, input_ids"),
        ({"input_ids": [10**6]}, "UsageError: prompt token 0 is 1000000, outside the vocabulary"),
        ({"text_input": "a" * (2**23 + 1)}, "UsageError: text_input has more than 8388608 bytes"),
        ({"text_input": ""}, "UsageError: the prompt is empty"),
        ({"messages": "hello"}, "UsageError: messages is not JSON"),
        ({"messages": '"hello"'}, "UsageError: messages is not a JSON list of objects"),
        ({"messages": "[]"}, "UsageError: "),
        ({"messages": '[{"role": "user", "content": [{"type": "image_url"}]}]'}, "UsageError: messages: a part"),
        ({"text_input": PROMPT, "stop_words": ["a"] * 17}, "UsageError: 17 stop strings"),
        ({"text_input": PROMPT, "max_token": 4}, "UsageError: max_token is not an input of this model"),
    ],
)
def test_bad_requests_are_refused_with_the_type_of_the_error(
    server: Server, inputs: dict[str, object], message: str
) -> None:
    status, answer = server.generate(**inputs)
    assert (status, answer["error"][: len(message)]) == (400, message)


def test_a_refusal_in_a_stream_names_its_type_too(server: Server) -> None:
    client = server.client()
    client.ask("a", text_input=PROMPT, top_p=7.0)
    assert "UsageError: top_p=7.0" in client.next()["error"]
    client.ask("b", text_input=PROMPT, max_tokens=2)
    assert client.rest("b")


def test_what_the_queue_does_not_take_is_refused(server: Server) -> None:
    refused = server.metric("dspark_refused_total")
    client = server.client()
    for number in range(ROWS + QUEUE):
        client.ask(str(number), text_input=PROMPT, **ENDLESS)
    assert server.reaches(QUEUE, "dspark_waiting")
    status, answer = server.generate(text_input=PROMPT)
    assert (status, answer["error"][:11]) == (400, "Overloaded:")  # Triton has one status for all errors of a model
    assert server.live()  # a full queue is a sign of life
    client.cancel()
    assert server.reaches(0, "dspark_running")
    assert server.reaches(refused + 2, "dspark_refused_total")


def test_a_deadline_ends_a_request(server: Server) -> None:
    client = server.client()
    client.ask("a", 1000, text_input=PROMPT, **ENDLESS)
    while "error" not in (response := client.next()):
        assert "finish_reason" not in response["outputs"]
    assert "DeadlineExceeded: " in response["error"]
    status, answer = server.generate(text_input=PROMPT, timeout=1000, **ENDLESS)
    assert (status, answer["error"][:17]) == (400, "DeadlineExceeded:")


def test_the_inputs_are_those_that_tritons_openai_front_end_sends() -> None:
    # Of the converter for everything but vLLM in python/openai/openai_frontend/engine/utils/triton.py of
    # triton-inference-server/server, which gives each of them the shape [1, n]; tools with a schema send two more.
    sent = {
        "text_input": "TYPE_STRING", "stream": "TYPE_BOOL", "max_tokens": "TYPE_INT32", "stop_words": "TYPE_STRING",
        "top_p": "TYPE_FP32", "frequency_penalty": "TYPE_FP32", "presence_penalty": "TYPE_FP32", "seed": "TYPE_UINT64",
        "temperature": "TYPE_FP32",
    }  # fmt: skip
    assert {name: INPUTS[name][0] for name in sent} == sent


# The end of things


def test_a_cancelled_stream_frees_its_row(server: Server) -> None:
    cancelled = server.metric("dspark_requests_total", reason="cancelled")
    client = server.client()
    client.ask("a", text_input=PROMPT, **ENDLESS)
    client.next()
    client.cancel()
    assert server.reaches(cancelled + 1, "dspark_requests_total", reason="cancelled")
    assert server.reaches(0, "dspark_running")
    assert server.generate(text_input=PROMPT, max_tokens=2)[0] == 200


def test_a_client_that_is_killed_frees_its_row(server: Server) -> None:
    cancelled = server.metric("dspark_requests_total", reason="cancelled")
    client = server.client()
    client.ask("a", text_input=PROMPT, **ENDLESS)
    client.next()
    client.kill()
    assert server.reaches(cancelled + 1, "dspark_requests_total", reason="cancelled")


def test_a_server_that_is_told_to_stop_ends_what_runs(start: Start, opened: Bundle) -> None:
    with start() as server:
        client = server.client()
        client.ask("a", text_input=PROMPT, **LONG)
        first = client.next()
        server.running.process.send_signal(signal.SIGTERM)
        tokens = first["outputs"]["token_ids"] + joined(client.rest("a"))[1]
        client.close()  # Triton waits for as long as a stream is open, busy or not
        assert server.running.process.wait(60) == 0
    assert tokens == opened.generate(PROMPT, max_new_tokens=400, ignore_eos=True).tokens


def test_the_probe_notices_that_the_models_process_died(start: Start) -> None:
    with start() as server:
        assert server.live()
        below = psutil.Process(server.running.process.pid).children(recursive=True)
        (stub,) = (
            process for process in below if "python_backend_stub" in process.name() + " ".join(process.cmdline())
        )
        stub.kill()
        assert not server.live()
        server.running.process.kill()  # it would wait for its dead model for half a minute
