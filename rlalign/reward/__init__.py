"""Reward scores made honest: calibration, the metrics that judge it, and the files that carry it."""
