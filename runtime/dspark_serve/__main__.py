"""``python -m dspark_serve``, and what the console script ``dspark-serve`` calls."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line, or say what it needs."""
    try:
        # typer: inside, so that its absence has a message
        from dspark_serve import cli
    except ModuleNotFoundError as error:
        print(f'dspark-serve: serving needs {error.name}; pip install "dspark-runtime[cpu,serve]"', file=sys.stderr)
        sys.exit(2)
    cli.main()


if __name__ == "__main__":
    main()
