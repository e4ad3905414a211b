"""rlalign attribute: which layer, and which step of it, the mismatch between rollout engine and trainer comes from.

    from rlalign.diagnose.attribution.measure import measure
    found = measure(engine, network, batch)
    found.first_over_floor, found.logprob_share, found.points

mapping says what matches, trainer_side and rollout/capture how it is seen, trainer_pass what the trainer runs; difference, bias
and compare are the numbers, floor what is normal, patching whose logprobs; route and measure do it all, result holds it; words
and page show it; sources are the command line's. budget is another question: what a quantised body would cost, without an engine.
"""
