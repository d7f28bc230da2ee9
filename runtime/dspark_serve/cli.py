"""``dspark-serve`` and ``dspark-export serve``: one command under two names."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from dspark_runtime.errors import DsparkError, UsageError

LogLevel = Literal["debug", "info", "warning", "error"]


def serve(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.", show_default=False)],
    host: Annotated[str, typer.Option(help="Listen on this address; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Listen on this port; 0 for any free one.")] = 8000,
    rows: Annotated[int, typer.Option(help="Run this many requests together.")] = 8,
    max_length: Annotated[
        int | None,
        typer.Option(
            help="Accept requests of up to this many tokens, prompt and text (default: 4096, or the model's)."
        ),
    ] = None,
    queue: Annotated[int, typer.Option(help="Queue at most this many requests.")] = 64,
    chunk: Annotated[int, typer.Option(help="Compute at most this much of a prompt between two rounds.")] = 128,
    speculate: Annotated[
        str, typer.Option(help="Draft with auto, off, or drafters of the bundle joined with +, like ngram+self-draft.")
    ] = "auto",
    exact: Annotated[
        bool | None,
        typer.Option(
            "--exact/--no-exact", help="Keep speculative text equal to plain text (default: the bundle's setting)."
        ),
    ] = None,
    reuse_prefixes: Annotated[
        bool,
        typer.Option(
            "--reuse-prefixes/--no-reuse-prefixes",
            help="Reuse the context of texts with the same beginning; see security.md.",
        ),
    ] = True,
    store: Annotated[
        Path | None,
        typer.Option("--store", help="Begin with the phrases of earlier requests in this file, and save them there."),
    ] = None,
    history: Annotated[bool, typer.Option("--history/--no-history", help="Draft from earlier requests.")] = True,
    share_history: Annotated[
        bool,
        typer.Option("--share-history", help="Draft from earlier requests of all API keys; see security.md."),
    ] = False,
    memory: Annotated[
        float | None, typer.Option(help="Let the caches take this many GiB (default: what is left).")
    ] = None,
    served_name: Annotated[
        str | None, typer.Option(help="Call the model this in requests (default: the folder's name).")
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="Require one of the API keys in this file (one per line) or DSPARK_API_KEY.")
    ] = None,
    rate_limit: Annotated[
        int, typer.Option(min=0, help="Accept this many requests per minute from each key; 0 for no limit.")
    ] = 0,
    cors: Annotated[
        list[str] | None, typer.Option(help="Accept requests from web pages of this origin. Repeatable.")
    ] = None,
    drain: Annotated[
        float, typer.Option(min=0, help="Give running requests this many seconds to end when the server stops.")
    ] = 30.0,
    traces: Annotated[
        bool, typer.Option("--traces", help="Make OpenTelemetry spans; start with opentelemetry-instrument.")
    ] = False,
    threads: Annotated[
        int | None, typer.Option(help="Use this many threads (default: OMP_NUM_THREADS or all cores).")
    ] = None,
    backend: Annotated[
        str, typer.Option(help="Run on onnxruntime (the CPU), onnxruntime-cuda, tensorrt or tensorrt-rtx.")
    ] = "onnxruntime",
    device: Annotated[int, typer.Option(help="Use this GPU, with a --backend that runs on one.")] = 0,
    log_level: Annotated[
        LogLevel, typer.Option(help="Log at this level; info writes one line of JSON per request.")
    ] = "info",
) -> None:
    """Serve BUNDLE over HTTP with OpenAI's API: chat and completions, streamed or whole. Stop it with Ctrl-C."""
    try:
        # fastapi, numpy, pydantic: only when a server starts
        from dspark_runtime import PhraseOptions, ServiceOptions
        from dspark_runtime.phrases.store import DEFAULT_HISTORY
        from dspark_serve.server import ServerOptions  # fmt: skip
        from dspark_serve.server import serve as run
    except ModuleNotFoundError as error:
        raise UsageError(f'serving needs {error.name}; pip install "dspark-runtime[cpu,serve]"') from error
    if share_history and not history:
        raise UsageError("--share-history shares what --no-history does not keep; leave one of them out")
    _log_to_stderr(log_level)
    options = ServerOptions(
        host=host,
        port=port,
        name=served_name,
        api_keys=api_key_file,
        origins=tuple(cors or ()),
        rate_limit=rate_limit,
        drain=drain,
        traces=traces,
        phrases=PhraseOptions(DEFAULT_HISTORY if history else 0, share_history, store),
        service=ServiceOptions(
            rows=rows,
            capacity=max_length,
            queue=queue,
            chunk=chunk,
            speculate=speculate,
            reuse_prefixes=reuse_prefixes,
            memory=None if memory is None else int(memory * 2**30),
        ),
    )
    run(bundle, options, typer.echo, threads=threads, exact=exact, backend=backend, device=device)


def main() -> None:
    """The console script: errors of this project end with their message and exit code."""
    app = typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.command()(serve)
    try:
        app(prog_name="dspark-serve")
    except DsparkError as error:
        typer.echo(f"dspark-serve: {error}", err=True)
        sys.exit(error.exit_code)


def _log_to_stderr(level: LogLevel) -> None:
    """Lines of JSON, as those of the requests are."""
    plain, wrapped = logging.StreamHandler(), logging.StreamHandler()
    wrapped.setFormatter(_AsJson())
    logging.basicConfig(level=level.upper(), handlers=[wrapped], force=True)
    logging.getLogger("uvicorn").setLevel("WARNING" if level == "info" else level.upper())
    requests = logging.getLogger("dspark_serve.requests")
    requests.propagate = False
    requests.handlers = [plain]


class _AsJson(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        entry = {"time": self.formatTime(record), "level": record.levelname.lower(), "logger": record.name}
        entry["message"] = record.getMessage()
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry)
