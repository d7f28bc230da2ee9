"""Checkpoints that are stored quantized: their weights become the floats they stand for as they are read."""
