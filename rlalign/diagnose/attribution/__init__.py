"""rlalign attribute: which layer, and which step of it, the mismatch between rollout engine and trainer comes from.

    from rlalign.diagnose.attribution.measure import measure
    found = measure(engine, network, batch)
    found.first_over_floor, found.logprob_share, found.points

mapping says what matches, derived finds it out for any architecture; trainer_side and rollout/capture how it is seen and replaced;
findings are the numbers and their floors; measure does it all; report shows it; sources are the command line's. budget is another
question: what a quantised body would cost, without an engine.
"""
