"""rlalign parity: the same tokens through rollout engine and trainer, at identical weights, for every pair of heads.

grid says what is measured, measure does it, table prints it for a pull request, baseline compares it with an earlier result.
"""
