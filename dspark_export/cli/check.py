"""``dspark-export check``: whether a draft can draft for a model, before anything is built."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from dspark_export.cli.arguments import Model, OwnEmbeddings, Revision, UnsafeCheckpoint, UntestedArchitecture

if TYPE_CHECKING:
    from dspark_export.drafts.pair_check import PairReport

_MARKS = {"ok": "ok", "warning": "warning", "error": "ERROR"}


def check(
    model: Model,
    draft: Annotated[str, typer.Argument(help="Hub id or folder of the draft.", show_default=False)],
    revision: Revision = None,
    draft_revision: Annotated[str | None, typer.Option(help="Take this branch, tag or commit of a hub draft.")] = None,
    drafts: Annotated[
        int | None, typer.Option(min=1, help="Check for this many tokens per round (default: what the draft can).")
    ] = None,
    allow_own_embeddings: OwnEmbeddings = False,
    allow_unsafe_checkpoint: UnsafeCheckpoint = False,
    allow_untested_architecture: UntestedArchitecture = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print all findings as JSON.")] = False,
) -> None:
    """Check that DRAFT can draft for MODEL: tokenizer, vocabulary, taps, mask token, positions, stored embeddings.

    Ends with 0 if a build would take the pair, with 9 if not, and with the code of the error if a file is damaged.
    """
    # torch: only when a pair is checked
    from dspark_export.checkpoints import Trust, resolve
    from dspark_export.drafts.formats import recognise
    from dspark_export.drafts.pair_check import check_pair

    trust = Trust.opened() if allow_unsafe_checkpoint else Trust.closed()
    trial = None
    if allow_untested_architecture:
        # onnx, transformers: only when a model is traced
        from dspark_export.graphs.decoder import trace_without_weights

        trial = trace_without_weights
    target = resolve(model, revision, trust, trial)
    opened = recognise(draft, revision=draft_revision, trust=trust, trial=trial)
    report = check_pair(target, opened, allow_own_embeddings=allow_own_embeddings, drafts=drafts)
    if as_json:
        typer.echo(json.dumps(report.to_dict()))
    else:
        _print(report)
    if error := report.error():
        raise typer.Exit(error.exit_code)


def _print(report: PairReport) -> None:
    typer.echo(f"{report.draft} ({report.format}) for {report.target}")
    for finding in report.findings:
        text = finding.found if finding.severity == "ok" else finding.message
        typer.echo(f"  {_MARKS[finding.severity]:8}{finding.id:12} {text}")
    if report.ok:
        typer.echo("fits" + (f", {len(report.warnings)} warnings" if report.warnings else ""))
    else:
        typer.echo(f"does not fit: {len(report.errors)} errors")
