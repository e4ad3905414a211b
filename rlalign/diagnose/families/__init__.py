"""Which model families work, found out on tiny random models of each: `rlalign families`."""
