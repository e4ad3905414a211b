"""Probabilities that mean what they say: calibrators, the metrics that judge them, temperatures per token, drift."""
