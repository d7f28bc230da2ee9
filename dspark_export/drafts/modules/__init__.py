"""Trained drafters as PyTorch modules over the graph contract: what is traced, and its numerical reference."""
