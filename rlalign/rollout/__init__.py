"""The rollout side: vLLM, embedded or as servers; and the names under which it knows what is ours. Imports nothing."""

from __future__ import annotations

SETTINGS_KEY = "rlalign"  # in vLLM's additional_config: {"rlalign": {"head_dtype": "float32", "mode": "auto"}}
SLOT = "LogitsProcessor"  # vLLM's layer from hidden states to logits, not its sampling plug-ins of the same name
ENGINES = (
    "engines"  # in answers of a server's workers: how many data-parallel engines were asked; missing without our plugin
)
GLOO_TRANSFER = "rlalign_gloo"  # our weight-transfer backend, for WeightTransferConfig(backend=...)
