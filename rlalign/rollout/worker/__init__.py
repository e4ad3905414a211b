"""What runs in every vLLM worker: receiving and reading back weights, and recording activations."""
