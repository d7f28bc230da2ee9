"""What ``generate`` and its chat write: text to stdout, statistics to stderr."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from dspark_runtime import Generation


def write(text: str) -> None:
    """Put text on stdout at once; a character that the terminal's encoding lacks becomes a question mark."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()


def print_stats(generation: Generation) -> None:
    """Print one generation's statistics to stderr, named as in ``dspark_runtime.decoding.statistics``."""
    stats, seconds = generation.stats, generation.stats.seconds
    lines = [
        f"emitted {stats.emitted} tokens ({generation.finish_reason}) after a prompt of {generation.prompt_tokens}; "
        f"decoding ran at {stats.tokens_per_second:.1f} tokens/s",
        f"rounds {stats.rounds}, drafted {stats.drafted}, verified {stats.verified}, accepted {stats.accepted}, "
        f"accepted length {stats.accepted_length:.2f}",
        *(f"{name}: verified {c.drafted}, accepted {c.accepted}" for name, c in stats.per_drafter.items()),
        f"seconds: prefill {seconds.prefill:.3f}, draft {seconds.draft:.3f}, verify {seconds.verify:.3f}, "
        f"host {seconds.host:.3f}",
    ]
    for line in lines:
        typer.echo(f"  {line}", err=True)
