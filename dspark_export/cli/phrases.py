"""``dspark-export phrases``: more to draft from, out of the user's own prompts or answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dspark_export.cli.arguments import AsJson, BundleFolder, Seed, Threads
from dspark_export.cli.progress import bars, terminable
from dspark_export.prompts.sets import read_prompts, read_responses
from dspark_runtime.errors import UsageError

if TYPE_CHECKING:
    from dspark_export.build.phrases import Corpus


def phrases(
    bundle: BundleFolder,
    prompts: Annotated[
        list[Path] | None,
        typer.Option("--prompts", "-p", help="Let the model answer the prompts of this file. Repeatable."),
    ] = None,
    responses: Annotated[
        list[Path] | None,
        typer.Option(
            "--responses", "-r", help="Take answers that were logged: JSON lines with `prompt`, `response`. Repeatable."
        ),
    ] = None,
    own: Annotated[int, typer.Option(min=0, help="Let the model answer this many prompts of its own.")] = 0,
    replace: Annotated[bool, typer.Option("--replace", help="Drop the phrases the bundle has.")] = False,
    seed: Seed = 0,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Add phrases to BUNDLE, so that texts of your kind are drafted better. Texts stay the same, token by token."""
    if not (prompts or responses or own):
        raise UsageError("nothing to make phrases of: give --prompts, --responses or --own")
    # numpy, onnx, pydantic: only when a bundle is opened
    from dspark_export.build.phrases import (
        OWN,
        add_corpus,
        answered_texts,
        corpus_of,
        given_texts,
        known_corpus,
        own_texts,
    )
    from dspark_runtime import Bundle

    asked = [item.text for path in prompts or () for item in read_prompts(path)]
    given = [pair for path in responses or () for pair in read_responses(path)]
    opened = Bundle.open(bundle, threads=threads)
    before = None if replace else known_corpus(opened.files)
    names = [path.name for path in (*(prompts or ()), *(responses or ()))]
    with terminable(), bars() as shown:
        task = shown.add_task("answering", total=len(asked) + own or None)

        def on_text() -> None:
            shown.advance(task)

        texts = given_texts(opened, given)
        texts += answered_texts(opened, asked, seed, on_text) if asked else []
        texts += own_texts(opened, own, seed, on_text=on_text) if own else []
        made = corpus_of(texts, opened.manifest.model.vocab_size, ", ".join([OWN] * bool(own) + names), before)
    size = add_corpus(bundle, made).files[made.facts.file].size
    if as_json:
        gain = None if made.gain is None else vars(made.gain)
        typer.echo(json.dumps({"bundle": str(bundle), **made.facts.model_dump(), "size": size, "gain": gain}))
    else:
        _print(made, size)


def _print(made: Corpus, size: int) -> None:
    facts, gain = made.facts, made.gain
    counts = f"{facts.contexts} contexts of {facts.tokens} tokens in {facts.texts} texts"
    typer.echo(f"phrases   {counts}, {size / 1e6:.1f} MB")
    typer.echo(f"origin    {facts.origin}")
    if gain is None:
        typer.echo("gain      not measured: it takes more than one text")
    else:
        tokens = f"{gain.without:.2f} tokens a round before, {gain.with_corpus:.2f} now"
        typer.echo(f"gain      {tokens}, on {gain.texts} texts held out")
