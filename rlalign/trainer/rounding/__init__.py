"""The trainer's body, rounding where the rollout engine rounds.

variants is the table: for each op the ways in which engines round it, each named after what it rounds. mirroring puts one choice
per op into a transformers model (`mirror_body`), by the forwards of mirrored_modules: layers and norms, rope, the engine's kernel.
"""
