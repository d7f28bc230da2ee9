"""The command line: registers the verbs and is the one place that turns an error into a message and an exit code.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | a deliberate error of no particular kind |
| 2 | the request is wrong: options, prompt, sampling parameters |
| 3 | the checkpoint is missing, damaged or inconsistent |
| 4 | the checkpoint would run its own code, and that was not allowed |
| 5 | the architecture is not supported |
| 6 | tracing, rewriting, quantizing or compiling failed |
| 7 | a bundle cannot be opened or written, or a deployment cannot be written |
| 8 | an inference backend is missing or failed |
| 9 | the draft does not fit the model |
| 10 | a check of the validation failed |
| 70 | a bug of this program |
| 130, 143 | interrupted by Ctrl-C, terminated |
"""

from __future__ import annotations

import errno
import sys
import traceback
import warnings
from typing import Annotated, Any, TextIO

import typer
from typer.core import TyperGroup

from dspark_export.cli.bench import bench
from dspark_export.cli.build import build
from dspark_export.cli.check import check
from dspark_export.cli.compile import compile_
from dspark_export.cli.deploy import deploy
from dspark_export.cli.doctor import doctor
from dspark_export.cli.draft_trace import draft_trace
from dspark_export.cli.generate import generate
from dspark_export.cli.inspect import inspect
from dspark_export.cli.phrases import phrases
from dspark_export.cli.train_drafter import train_drafter
from dspark_export.cli.validate import validate
from dspark_runtime.errors import DsparkError
from dspark_serve.cli import serve

BUG, INTERRUPTED = 70, 130


class _Commands(TyperGroup):
    """The verbs; errors of this project end with their message, everything else as a bug."""

    def invoke(self, ctx: Any) -> Any:
        debug = bool(ctx.params.get("debug"))
        warnings.showwarning = _warn
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt:
            _fail("interrupted", INTERRUPTED, debug)
        except DsparkError as error:
            _fail(str(error), error.exit_code, debug)
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader of our output has gone: typer ends quietly
                raise
            _fail(f"unexpected {type(error).__name__}: {error}", BUG, debug)
        except Exception as error:
            if hasattr(error, "exit_code"):  # an unknown option or a missing argument: typer explains it
                raise
            hint = (
                "" if debug else "; this is a bug: run again with `dspark-export --debug ...` and report the traceback"
            )
            _fail(f"unexpected {type(error).__name__}: {error}{hint}", BUG, debug)


def _warn(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Warnings of this project as one line, those of libraries not at all: they speak to programmers."""
    if category.__module__.startswith("dspark_"):
        typer.echo(f"dspark-export: warning: {message}", err=True)


def _fail(message: str, code: int, debug: bool) -> None:
    if debug:
        traceback.print_exc(file=sys.stderr)
    typer.echo(f"dspark-export: {message}", err=True)
    raise typer.Exit(code)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 2 wrong request, 3 to 5 checkpoint, 6 export, 7 bundle, 8 backend, 9 draft, 10 failed "
    "check, 70 bug, 130 interrupted, 143 terminated.",
)


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Turn a Hugging Face language model into a bundle of ONNX graphs, and generate text from it speculatively."""


for verb in (
    build,
    check,
    inspect,
    generate,
    serve,
    bench,
    phrases,
    draft_trace,
    deploy,
    doctor,
    train_drafter,
    validate,
):
    app.command()(verb)
app.command("compile")(compile_)

if __name__ == "__main__":
    app()
