"""``dspark-export generate``: one prompt, a file of prompts, standard input, or a chat on a terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dspark_runtime.errors import UsageError

if TYPE_CHECKING:
    from dspark_runtime import Bundle, Generation, Stream

_HELP = "/reset forgets the conversation, /stats shows the last answer's statistics, /exit leaves"


def generate(
    bundle: Annotated[Path, typer.Argument(help="Folder of the bundle.", show_default=False)],
    prompt: Annotated[
        str | None, typer.Argument(help="Prompt; without one: standard input, or a chat.", show_default=False)
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="One prompt per line, or JSON lines with `turns` or `prompt`.")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Most tokens to generate (default: 256).")] = None,
    speculate: Annotated[
        str, typer.Option(help="auto, off, ngram, self-draft or ngram+self-draft. Changes speed, never text.")
    ] = "auto",
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Keep the k likeliest tokens; 0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens of this total probability.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Keep tokens of at least this share of the likeliest one's.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the random numbers.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="End the text at this string; may be repeated.")] = None,
    system: Annotated[str | None, typer.Option(help="System message put before the conversation.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is; no chat template.")] = False,
    threads: Annotated[int | None, typer.Option(help="Threads (default: one per physical core).")] = None,
    exact: Annotated[
        bool | None,
        typer.Option("--exact/--no-exact", help="Speculative text equals plain text (default: the bundle's setting)."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Prompts of a file that run together.")] = 1,
    stats: Annotated[bool, typer.Option("--stats", help="Print statistics on stderr.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per prompt.")] = False,
) -> None:
    """Generate text from BUNDLE; the text goes to stdout, everything else to stderr."""
    from dspark_runtime import Bundle

    if prompt is not None and file is not None:
        raise UsageError("both a prompt and --file were given; give one of them")
    if raw and system is not None:
        raise UsageError("--system needs the chat template; leave out --raw, or put the text into the prompt")
    chatting = prompt is None and file is None and sys.stdin.isatty()
    prompts = [] if chatting else _prompts(prompt, file)
    opened = Bundle.open(bundle, threads=threads, exact=exact)
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "speculate": speculate,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "seed": seed,
        "stop": stop or (),
    }
    if chatting:
        _chat(opened, system, options)
        return
    encoded = [opened.codec.encode(p) if raw else opened.codec.encode_chat(_messages(system, p)) for p in prompts]
    if len(encoded) == 1 and not as_json:
        _stream(opened.generate(encoded[0], stream=True, **options), stats)
        return
    for start in range(0, len(encoded), batch_size):
        part = encoded[start : start + batch_size]
        for offset, generation in enumerate(opened.generate(part, batch_size=batch_size, **options)):
            _print(generation, prompts[start + offset], stats, as_json)


def _messages(system: str | None, prompt: str) -> list[dict[str, str]]:
    before = [] if system is None else [{"role": "system", "content": system}]
    return [*before, {"role": "user", "content": prompt}]


def _prompts(prompt: str | None, file: Path | None) -> list[str]:
    if prompt is not None:
        return [prompt]
    if file is None:
        return [_text(sys.stdin.buffer.read(), "standard input")]
    from dspark_export.bench.prompts import read_prompts

    return [item.text for item in read_prompts(file)]


def _text(data: bytes, where: str) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{where} is not UTF-8 text (byte {error.start}); convert it first") from error
    if not text.strip():
        raise UsageError(f"{where} holds no prompt; give one as an argument, with --file, or on standard input")
    return text


def _stream(stream: Stream, stats: bool) -> Generation:
    for chunk in stream:
        sys.stdout.write(chunk.text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    if stats:
        _print_stats(stream.generations[0])
    return stream.generations[0]


def _print(generation: Generation, prompt: str, stats: bool, as_json: bool) -> None:
    if as_json:
        record = {
            "prompt": prompt,
            "text": generation.text,
            "tokens": generation.tokens,
            "finish_reason": generation.finish_reason,
            "prompt_tokens": generation.prompt_tokens,
            "stats": generation.stats.to_dict(),
        }
        typer.echo(json.dumps(record, ensure_ascii=False))
        return
    typer.echo(generation.text)
    if stats:
        _print_stats(generation)


def _print_stats(generation: Generation) -> None:
    stats = generation.stats
    seconds = stats.seconds
    lines = [
        f"{stats.emitted} tokens ({generation.finish_reason}), {stats.tokens_per_second:.1f} tokens/s; "
        f"before that, prefill of {generation.prompt_tokens} tokens in {seconds.prefill:.2f} s",
        f"{stats.rounds} rounds of {stats.accepted_length:.2f} tokens; drafted {stats.drafted}, verified "
        f"{stats.verified}, accepted {stats.accepted}",
        f"draft {seconds.draft:.3f} s, verify {seconds.verify:.3f} s, host {seconds.host:.3f} s",
    ]
    lines += [f"{name}: {c.accepted} of {c.drafted} accepted" for name, c in stats.per_drafter.items()]
    for line in lines:
        typer.echo(f"  {line}", err=True)


def _chat(bundle: Bundle, system: str | None, options: dict[str, Any]) -> None:
    """Questions and answers until the end of input; Ctrl-C ends an answer, not the chat."""
    typer.echo(f"chat with {bundle.manifest.source.id}; {_HELP}", err=True)
    start = [] if system is None else [{"role": "system", "content": system}]
    messages, last = list(start), None
    for line in _lines():
        if line == "/exit":
            return
        if line == "/reset":
            messages = list(start)
        elif line == "/stats":
            if last is not None:
                _print_stats(last)
        elif line.startswith("/"):
            typer.echo(f"{line} is no command; {_HELP}", err=True)
        else:
            messages.append({"role": "user", "content": line})
            last = _answer(bundle, messages, options)
            messages.append({"role": "assistant", "content": last.text})


def _answer(bundle: Bundle, messages: Sequence[dict[str, str]], options: dict[str, Any]) -> Generation:
    stream: Stream = bundle.chat(messages, stream=True, **options)
    chunks = iter(stream)
    while True:
        try:
            chunk = next(chunks, None)
        except KeyboardInterrupt:
            stream.cancel()
            continue
        if chunk is None:
            break
        sys.stdout.write(chunk.text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return stream.generations[0]


def _lines() -> Iterator[str]:
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            typer.echo("", err=True)
            return
        except KeyboardInterrupt:
            typer.echo("", err=True)
            continue
        if line:
            yield line
