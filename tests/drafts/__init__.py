"""Formats of draft checkpoints and the pair check."""
