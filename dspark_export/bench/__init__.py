"""Measuring a bundle: plain decoding against each way of speculating, on the same prompts, in one run."""
