"""This project and other programs on the same weights, prompts and threads, alternating within one run."""
