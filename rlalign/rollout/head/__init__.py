"""The float32 head inside vLLM: the layer, the decode step, and the hooks that tell when a weight has changed."""
