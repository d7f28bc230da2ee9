"""A model of Triton's Python backend around a service; ``1/model.py`` of a written model repository imports it."""
