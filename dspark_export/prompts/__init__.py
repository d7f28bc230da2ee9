"""Prompts: the sets that come with the package, files of them, and what a bundle writes."""

ROWS = 32
"""Texts that a bundle writes at once, by default."""
