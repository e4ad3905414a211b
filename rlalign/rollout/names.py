"""The names under which vLLM knows what is ours. Imports nothing: the plugin's entry point reads it."""

from __future__ import annotations

SETTINGS_KEY = "rlalign"  # in vLLM's additional_config: {"rlalign": {"head_dtype": "float32", "mode": "auto"}}
SLOT = "LogitsProcessor"  # vLLM's layer from hidden states to logits, not its sampling plug-ins of the same name
GLOO_TRANSFER = "rlalign_gloo"  # our weight-transfer backend, for WeightTransferConfig(backend=...)
