"""This project and other programs on the same weights, prompts and threads, in turns, in one run."""
