"""The embedded vLLM engine, what it is started with, and the proofs that it is the one this run asked for."""
