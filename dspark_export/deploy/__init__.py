"""Writes what runs a bundle as a service elsewhere: a model repository of Triton and what starts it."""
