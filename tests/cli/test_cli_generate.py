"""generate: where text, JSON, statistics and errors go, and what the options do."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dspark_export.cli import chat
from dspark_export.cli.chat import Chat
from dspark_export.cli.generate import read_variables
from dspark_runtime import SPECULATION_MODES, Bundle
from dspark_runtime.errors import UsageError
from tests.cli.conftest import Invoke, json_lines

PROMPT = "one two one two one"
OPTIONS = ("--max-new-tokens", 24, "--threads", 1)


def test_text_on_stdout_and_nothing_else(bundle: Path, opened: Bundle, invoke: Invoke) -> None:
    result = invoke("generate", bundle, PROMPT, *OPTIONS)
    assert result.exit_code == 0
    expected = opened.generate(PROMPT, max_new_tokens=24, chat=True)
    assert result.stdout == expected.text + "\n"
    assert result.stderr == ""


@pytest.mark.parametrize("mode", SPECULATION_MODES)
def test_speculation_keeps_the_text(bundle: Path, invoke: Invoke, mode: str) -> None:
    plain = invoke("generate", bundle, PROMPT, *OPTIONS, "--speculate", "off")
    assert invoke("generate", bundle, PROMPT, *OPTIONS, "--speculate", mode).stdout == plain.stdout


def test_json(bundle: Path, opened: Bundle, invoke: Invoke) -> None:
    result = invoke("generate", bundle, PROMPT, *OPTIONS, "--json")
    (record,) = json_lines(result.stdout)
    expected = opened.generate(PROMPT, max_new_tokens=24, chat=True)
    assert record["prompt"] == PROMPT
    assert record["tokens"] == expected.tokens and record["text"] == expected.text
    assert record["finish_reason"] == expected.finish_reason
    assert record["prompt_tokens"] == expected.prompt_tokens
    assert record["stats"]["emitted"] == len(expected.tokens)
    assert set(record["stats"]["seconds"]) == {"prefill", "draft", "verify", "host"}


def test_template_variables(bundle: Path, opened: Bundle, invoke: Invoke) -> None:
    message = [{"role": "user", "content": PROMPT}]
    expected = opened.chat(message, template_variables={"add_generation_prompt": False}, max_new_tokens=24)
    assert expected != opened.chat(message, max_new_tokens=24)
    result = invoke("generate", bundle, PROMPT, *OPTIONS, "--template-var", "add_generation_prompt=false")
    assert result.stdout == expected.text + "\n"
    given = ["a=false", "b=high", 'c={"d": [1]}', "e=", 'f="5"', "g=5", "h=x=y"]
    read = {"a": False, "b": "high", "c": {"d": [1]}, "e": "", "f": "5", "g": 5, "h": "x=y"}
    assert read_variables(given) == read


def test_statistics_on_stderr(bundle: Path, invoke: Invoke) -> None:
    result = invoke("generate", bundle, PROMPT, *OPTIONS, "--speculate", "ngram", "--stats")
    names = ("rounds", "drafted", "verified", "accepted", "accepted length", "prefill", "draft", "host", "tokens/s")
    assert all(name in result.stderr for name in names)
    assert result.stdout == invoke("generate", bundle, PROMPT, *OPTIONS).stdout


@pytest.mark.parametrize("batch_size", [1, 2])
def test_files_of_prompts(bundle: Path, invoke: Invoke, tmp_path: Path, batch_size: int) -> None:
    prompts = ["red blue red", "a b c a b", "x"]
    (tmp_path / "lines.txt").write_text("\n".join(prompts) + "\n\n")
    records = [{"turns": [prompts[0], "later"]}, {"prompt": prompts[1]}, {"turns": [prompts[2]], "kind": "short"}]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    alone = [json_lines(invoke("generate", bundle, p, *OPTIONS, "--json").stdout)[0] for p in prompts]
    for name in ("lines.txt", "records.jsonl"):
        result = invoke("generate", bundle, "--file", tmp_path / name, *OPTIONS, "--json", "--batch-size", batch_size)
        found = json_lines(result.stdout)
        assert [f["prompt"] for f in found] == prompts
        assert [f["tokens"] for f in found] == [a["tokens"] for a in alone]
    text = invoke("generate", bundle, "-f", tmp_path / "lines.txt", *OPTIONS, "--batch-size", batch_size).stdout
    assert text == "".join(a["text"] + "\n" for a in alone)


def test_standard_input_without_a_terminal(bundle: Path, opened: Bundle, invoke: Invoke) -> None:
    expected = opened.generate("größer als", max_new_tokens=24)
    result = invoke("generate", bundle, *OPTIONS, "--raw", stdin="größer als\n".encode())
    assert result.stdout == expected.text + "\n"


def test_stop_strings(bundle: Path, invoke: Invoke) -> None:
    whole = invoke("generate", bundle, PROMPT, *OPTIONS, "--raw").stdout.rstrip("\n")
    middle = whole[len(whole) // 2 :][:3]
    (record,) = json_lines(
        invoke("generate", bundle, PROMPT, *OPTIONS, "--raw", "--stop", "never", "--stop", middle, "--json").stdout
    )
    assert record["finish_reason"] == "stop"
    assert record["text"] == whole[: whole.index(middle)]


def test_sampling_follows_its_seed(bundle: Path, invoke: Invoke) -> None:
    def text(seed: int, mode: str) -> str:
        sampled = ("--temperature", 1.5, "--top-k", 50, "--top-p", 0.95, "--min-p", 0.01, "--seed", seed)
        return invoke("generate", bundle, PROMPT, *OPTIONS, *sampled, "--speculate", mode).stdout

    assert text(1, "off") == text(1, "off")
    assert len({text(seed, "off") for seed in range(4)}) > 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--speculate", "magic"], 2, "'magic' is unknown"),
        (["--temperature", "-1"], 2, "temperature"),
        (["--top-p", "0"], 2, "top_p"),
        (["--threads", "0"], 2, "threads=0"),
        (["--max-new-tokens", "0"], 2, "max_new_tokens"),
        (["--max-new-tokens", "100000"], 2, "100000"),
        (["--batch-size", "0"], 2, "--batch-size"),
        (["--raw", "--system", "Be brief."], 2, "--system"),
        (["--file", "nowhere.txt"], 2, "more than one of a prompt, --file"),
        (["--no-such-option"], 2, "--no-such-option"),
        (["--template-var", "thinking"], 2, "write NAME=VALUE"),
        (["--template-var", "=1"], 2, "write NAME=VALUE"),
        (["--template-var", "a=1", "--raw"], 2, "--template-var is for the chat template"),
    ],
)
def test_wrong_options(bundle: Path, invoke: Invoke, arguments: list[str], code: int, message: str) -> None:
    result = invoke("generate", bundle, PROMPT, *arguments)
    assert result.exit_code == code
    assert message in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", None, "cannot read the prompts"),
        ("a.txt", b"", "holds no prompts"),
        ("a.txt", b"caf\xe9\n", "not UTF-8"),
        ("a.jsonl", b"{'turns': 1}\n", "line 1 is not JSON"),
        ("a.jsonl", b'{"turns": ["ok"]}\n{"text": "x"}\n', "line 2 has neither"),
        ("a.jsonl", b'{"turns": []}\n', "neither"),
        ("a.jsonl", b"[1, 2]\n", "neither"),
    ],
)
def test_unusable_files(
    bundle: Path, invoke: Invoke, tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    result = invoke("generate", bundle, "--file", tmp_path / name)
    assert result.exit_code == 2
    assert message in result.stderr and result.stdout == ""


@pytest.mark.parametrize(
    ("data", "message"), [(b"ab\xff", "(byte 2)"), (b"", "holds no prompt"), (b" \n", "holds no prompt")]
)
def test_unusable_standard_input(bundle: Path, invoke: Invoke, data: bytes, message: str) -> None:
    result = invoke("generate", bundle, stdin=data)
    assert result.exit_code == 2
    assert message in result.stderr and result.stdout == ""


def test_no_bundle(tmp_path: Path, invoke: Invoke) -> None:
    result = invoke("generate", tmp_path, PROMPT)
    assert result.exit_code == 7 and result.stdout == ""


def test_a_prompt_that_is_too_long(bundle: Path, invoke: Invoke) -> None:
    result = invoke("generate", bundle, "word " * 2000)
    assert result.exit_code == 2 and result.stdout == ""


def test_chat_on_a_terminal(bundle: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "dspark_export.cli.main", "generate", str(bundle), "--max-new-tokens", "8"]
    with subprocess.Popen(
        command, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"TERM": "dumb"}
    ) as process:
        os.close(theirs)
        os.write(ours, b"/stats\nred blue red\n/stats\n/reset\n/what\n/exit\n")
        stdout, stderr = process.communicate(timeout=120)
        os.close(ours)
    assert process.returncode == 0, stderr
    for text in (b"/reset forgets", b"no answer yet", b"accepted length", b"/what is not a command"):
        assert text in stderr
    assert b"accepted length" not in stdout


def test_ctrl_c_ends_an_answer_and_keeps_it(
    opened: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written: list[str] = []

    def interrupted_write(text: str) -> None:
        written.append(text)
        if len(written) == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(chat, "write", interrupted_write)
    lines = iter(["one two", "/stats"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines, "/exit"))
    before = signal.getsignal(signal.SIGINT)
    conversation = Chat(opened, "Be brief.", {"max_new_tokens": 60, "speculate": "off"}, stats=False)
    conversation.run()
    assert signal.getsignal(signal.SIGINT) is before
    assert "(cancelled)" in capsys.readouterr().err
    roles = [message["role"] for message in conversation._messages]
    assert roles == ["system", "user", "assistant"]
    assert conversation._messages[-1]["content"] == "".join(written).removesuffix("\n")


def test_a_chat_survives_a_question_that_is_too_long(
    opened: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["word " * 2000, "short", None])

    def typed(_: str) -> str:
        line = next(lines)
        if line is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", typed)
    conversation = Chat(opened, None, {"max_new_tokens": 4}, stats=True)
    conversation.run()
    assert "/reset starts a new conversation" in capsys.readouterr().err
    assert conversation._messages[0]["content"] == "short"


def test_a_chat_with_wrong_options_ends(opened: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda _: "hello")
    with pytest.raises(UsageError, match="temperature"):
        Chat(opened, None, {"temperature": -1.0}, stats=False).run()


def test_what_was_learned_is_kept_in_a_file(bundle: Path, opened: Bundle, invoke: Invoke, tmp_path: Path) -> None:
    store = tmp_path / "mine" / "phrases.store"
    command = ("generate", bundle, PROMPT, *OPTIONS, "--speculate", "store", "--draft-length", 8, "--json")
    without, first, second, third = (
        json_lines(invoke(*command, *options).stdout)[0]
        for options in (("--no-history",), ("--store", store), ("--store", store), ("--store", store, "--no-history"))
    )
    assert first["tokens"] == second["tokens"] == without["tokens"] == third["tokens"]
    assert without["stats"]["rounds"] == first["stats"]["rounds"] > second["stats"]["rounds"]
    assert third["stats"]["rounds"] > second["stats"]["rounds"]
    store.write_bytes(b"something else")
    refused = invoke(*command, "--store", store)
    assert refused.exit_code == 7 and "holds no phrases" in refused.stderr
    assert store.read_bytes() == b"something else"
