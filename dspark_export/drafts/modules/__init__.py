"""Trained drafters as PyTorch modules over the graph contract: what is traced, and the numerical reference of it."""
