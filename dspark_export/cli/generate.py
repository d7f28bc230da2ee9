"""``dspark-export generate``: one prompt, a file of prompts, standard input, or a chat on a terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dspark_export.cli.arguments import (
    BundleFolder,
    ConfidenceThreshold,
    DraftSampling,
    Exact,
    History,
    Seed,
    Store,
    Temperature,
    Threads,
)
from dspark_export.cli.chat import Chat
from dspark_export.cli.printing import print_stats, write
from dspark_export.prompts.sets import read_prompts
from dspark_runtime.errors import UsageError

if TYPE_CHECKING:
    from dspark_runtime import Bundle, Generation


def generate(
    bundle: BundleFolder,
    prompt: Annotated[
        str | None,
        typer.Argument(help="Prompt; without one: standard input, or a chat on a terminal.", show_default=False),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", "-f", help="Read a prompt per line, or JSON lines with `turns` or `prompt`."),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Generate at most this many tokens (default: 256, or whatever fits).")
    ] = None,
    speculate: Annotated[
        str, typer.Option(help="Draft with auto, off, or drafters of the bundle joined with +, like ngram+self-draft.")
    ] = "auto",
    temperature: Temperature = 0.0,
    top_k: Annotated[int, typer.Option(help="Keep the k most likely tokens; 0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Keep the most likely tokens of this total probability.")] = 1.0,
    min_p: Annotated[
        float, typer.Option(help="Keep tokens of at least this share of the most likely token's probability.")
    ] = 0.0,
    seed: Seed = 0,
    draft_sampling: DraftSampling = "coupled",
    confidence_threshold: ConfidenceThreshold = 0.0,
    draft_length: Annotated[
        int | None, typer.Option(help="Draft exactly this many tokens per round (default: adaptive).")
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End the text before this string. Repeatable.")] = None,
    system: Annotated[str | None, typer.Option(help="Put a system message before the conversation.")] = None,
    template_var: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="Set a variable of the chat template, like enable_thinking=false; JSON or text. Repeatable.",
        ),
    ] = None,
    prompt_ids: Annotated[
        Path | None, typer.Option(help="Read token ids instead of text: a JSON list, or whitespace-separated integers.")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")] = False,
    threads: Threads = None,
    exact: Exact = None,
    backend: Annotated[
        str,
        typer.Option(help="Run on onnxruntime (the CPU), onnxruntime-cuda, tensorrt or tensorrt-rtx; see `compile`."),
    ] = "onnxruntime",
    device: Annotated[int, typer.Option(help="Use this GPU, with a --backend that runs on one.")] = 0,
    store: Store = None,
    history: History = True,
    batch_size: Annotated[int, typer.Option(min=1, max=1024, help="Run this many prompts of a file together.")] = 1,
    stats: Annotated[bool, typer.Option("--stats", help="Print statistics on stderr.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per prompt.")] = False,
) -> None:
    """Generate text from BUNDLE. The text goes to stdout, everything else to stderr."""
    # numpy, pydantic: only when a bundle is opened
    from dspark_runtime import Bundle, PhraseOptions
    from dspark_runtime.phrases.store import DEFAULT_HISTORY

    source = _Source(prompt, file, prompt_ids)
    source.check(system, raw, as_json)
    given_ids, prompts = source.ids(), source.prompts()
    if template_var and (raw or prompt_ids is not None):
        raise UsageError("--template-var is for the chat template, which --raw and --prompt-ids leave out")
    variables = read_variables(template_var or [])
    phrases = PhraseOptions(DEFAULT_HISTORY if history else 0, file=store)
    opened = Bundle.open(bundle, threads=threads, exact=exact, backend=backend, device=device, phrases=phrases)
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "speculate": speculate,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "seed": seed,
        "stop": stop or (),
        "draft_sampling": draft_sampling,
        "confidence_threshold": confidence_threshold,
        "draft_length": draft_length,
    }
    try:
        if source.chatting:
            Chat(opened, system, {**options, "template_variables": variables}, stats).run()
            return
        if given_ids is not None:
            encoded = [given_ids]
        else:
            codec = opened.codec
            encoded = [
                codec.encode(p) if raw else codec.encode_chat(_messages(system, p), **variables) for p in prompts
            ]
        if len(encoded) == 1 and not as_json:
            _stream(opened, encoded[0], options, stats)
            return
        for start in range(0, len(encoded), batch_size):
            part = encoded[start : start + batch_size]
            for offset, generation in enumerate(opened.generate(part, batch_size=batch_size, **options)):
                _print(generation, prompts[start + offset], stats, as_json)
    finally:
        if store is not None:
            opened.phrases.save()


@dataclass(frozen=True)
class _Source:
    """Where prompts come from: an argument, a file, a file of token ids, else standard input."""

    prompt: str | None
    file: Path | None
    prompt_ids: Path | None

    def check(self, system: str | None, raw: bool, as_json: bool) -> None:
        """UsageError where two sources are given, or options that do not go together with the one."""
        if sum(given is not None for given in (self.prompt, self.file, self.prompt_ids)) > 1:
            raise UsageError("more than one of a prompt, --file and --prompt-ids was given; give one of them")
        if self.prompt_ids is not None and system is not None:
            raise UsageError("--system needs the chat template; token ids are taken as they are")
        if raw and system is not None:
            raise UsageError("--system needs the chat template; leave out --raw, or put the text into the prompt")
        if self.chatting and (raw or as_json):
            raise UsageError(
                "--raw and --json need a prompt: give one as an argument, with --file, or on standard input"
            )

    @property
    def chatting(self) -> bool:
        """Whether a person types on a terminal."""
        return self.prompt is None and self.file is None and self.prompt_ids is None and sys.stdin.isatty()

    def ids(self) -> list[int] | None:
        return None if self.prompt_ids is None else read_ids(self.prompt_ids)

    def prompts(self) -> list[str]:
        """Every prompt as text; of token ids the name of their file."""
        if self.prompt_ids is not None:
            return [str(self.prompt_ids)]
        return [] if self.chatting else _prompts(self.prompt, self.file)


def read_variables(given: Sequence[str]) -> dict[str, Any]:
    """Template variables of ``NAME=VALUE`` texts; a VALUE that is not JSON is text. Raises UsageError for others."""
    variables = {}
    for text in given:
        name, found, value = text.partition("=")
        if not found or not name.isidentifier():
            raise UsageError(f"--template-var {text!r}: write NAME=VALUE, such as enable_thinking=false")
        try:
            variables[name] = json.loads(value)
        except ValueError:
            variables[name] = value
    return variables


def _messages(system: str | None, prompt: str) -> list[dict[str, str]]:
    before = [] if system is None else [{"role": "system", "content": system}]
    return [*before, {"role": "user", "content": prompt}]


def _prompts(prompt: str | None, file: Path | None) -> list[str]:
    if prompt is not None:
        return [prompt]
    if file is None:
        return [_text(sys.stdin.buffer.read(), "standard input")]

    return [item.text for item in read_prompts(file)]


def read_ids(path: Path) -> list[int]:
    """Token ids of a file: a JSON list, or whitespace-separated integers. Raises UsageError for anything else."""
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read as text: {error}") from error
    try:
        ids = json.loads(text) if text.startswith("[") else [int(part) for part in text.split()]
    except ValueError:
        ids = None
    if not isinstance(ids, list) or not ids or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise UsageError(
            f"{path} holds no token ids; write a JSON list like [1, 42, 7], or whitespace-separated integers"
        )
    return ids


def _text(data: bytes, where: str) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{where} is not UTF-8 text (byte {error.start}); convert it first") from error
    if not text.strip():
        raise UsageError(f"{where} holds no prompt; give one as an argument, with --file, or on standard input")
    return text.removesuffix("\n")  # the one that `echo` and editors put at the end


def _stream(bundle: Bundle, tokens: Sequence[int], options: dict[str, Any], stats: bool) -> None:
    stream = bundle.generate(tokens, stream=True, **options)
    for chunk in stream:
        write(chunk.text)
    write("\n")
    if stats:
        print_stats(stream.generations[0])


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
        write(json.dumps(record) + "\n")
    else:
        write(generation.text + "\n")
    if stats:
        print_stats(generation)
