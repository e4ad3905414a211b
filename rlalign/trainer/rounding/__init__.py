"""The trainer's body, rounding where the rollout engine rounds.

variants is the table: for each op the ways in which engines round it, each named after what it rounds; `mirror_body` puts one choice
per op into a transformers model; probe finds the choice by giving the engine's recorded inputs to every variant.
"""
