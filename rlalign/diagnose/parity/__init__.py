"""rlalign parity: the same tokens through rollout engine and trainer, at identical weights, for every pair of heads.

grid says what is measured, measuring does it, baseline prints it for a pull request and compares it with an earlier result.
"""
