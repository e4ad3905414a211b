"""rlalign: rollout engine and trainer agree on log-probabilities. Importing it loads nothing heavy."""

__version__ = "0.1.0"
