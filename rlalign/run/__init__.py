"""A run: its parties, one step, sampling ahead of it, limits, checkpoints, and `train`, which puts them together."""
