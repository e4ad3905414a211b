"""What vLLM is started with, in one place: for the embedded engine as arguments, for a server as a command line and environment."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from rlalign.config import RolloutConfig
from rlalign.rollout import SETTINGS_KEY
from rlalign.rollout.engine.own_process import YIELDING, model_config, needed_for
from rlalign.rollout.engine.surface import captured_ids
from rlalign.rollout.head.head_settings import HeadSettings

ENVIRONMENT = {  # read when vLLM and our plugin are imported; only for where the user has not chosen
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # otherwise every engine pins itself to core 0
    "VLLM_NO_USAGE_STATS": "1",
    YIELDING: "1",
}
STATE_FIELDS = ("mamba_", "ssm_", "state_size", "linear_conv_kernel_dim", "linear_key_head_dim")
EXPERT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts")
Arguments = dict[str, str | int | float | bool | dict[str, dict[str, str]] | None]


def engine_arguments(
    model: Path, config: RolloutConfig, *, dtype: str, head_dtype: str, seed: int, exact: bool
) -> Arguments:
    """vLLM's engine arguments by their Python names; None is vLLM's own choice.

    Raises ValueError for what vLLM cannot compute here, or not as the trainer does.
    """
    if exact:
        require_exact(model)
    require_dtype(model, dtype)
    require_one_window(model, config.max_model_len)
    return {
        "model": str(model),
        "dtype": dtype,
        "seed": seed,
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": config.max_num_batched_tokens or None,
        "enable_chunked_prefill": False if _must_not_chunk(config) else None,
        "tensor_parallel_size": config.tensor_parallel_size,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "enforce_eager": config.enforce_eager,
        "enable_prefix_caching": caches_prefixes(model, config),
        "logprobs_mode": "processed_logprobs",
        "max_logprobs": max(20, captured_ids(config)),
        "worker_extension_cls": "rlalign.rollout.worker.extension.WorkerExtension",
        "additional_config": {SETTINGS_KEY: HeadSettings.of_run(head_dtype, config.head_mode, exact=exact).as_dict()},
        "generation_config": "vllm",  # sampling defaults come from our config, never from a file beside the model
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    } | ({"enable_return_routed_experts": True} if _returns_routes(config) else {})


def _returns_routes(config: RolloutConfig) -> bool:
    """Whether vLLM's V2 runner is asked for routed experts: GPUs' default runner, or by its variable. The V1 runner has none."""
    import torch

    asked = os.environ.get("VLLM_USE_V2_MODEL_RUNNER", "1" if torch.cuda.is_available() else "0")
    return config.replay_experts != "off" and asked.lower() in ("1", "true")


def _must_not_chunk(config: RolloutConfig) -> bool:
    """On CPU, unless the run asks for chunks: a sampled request with a seed whose prompt is cut at the end of an engine step ends
    vLLM 0.32 with "CPU Generator does not use offset", and a step's prompts together are often more than one engine step holds.
    """
    import torch

    return not torch.cuda.is_available() and not 0 < config.max_num_batched_tokens < config.max_model_len


def caches_prefixes(model: Path, config: RolloutConfig) -> bool:
    """rollout.prefix_caching, except for state-space and linear-attention layers where prefills are not chunked.

    vLLM 0.32 caches prefixes of such a model only with chunked prefills, which a CPU engine does without (`_must_not_chunk`), and
    would not start. The cache saves time; no number depends on it.
    """
    keeps_state = any(name.startswith(STATE_FIELDS) for name in _fields(model))
    return config.prefix_caching and not (_must_not_chunk(config) and keeps_state)


def require_dtype(model: Path, dtype: str) -> None:
    """Raise ValueError for a float32 body whose layers vLLM 0.32 computes on CPU in bfloat16 only; a worker would say it late."""
    import torch

    fields = _fields(model)
    if dtype != "float32" or torch.cuda.is_available():
        return
    kind = str(fields.get("model_type", ""))
    delta = "linear_key_head_dim" in fields
    if delta or _latent(fields):
        layers = "gated delta nets" if delta else "latent attention"
        raise ValueError(
            f"model.dtype=float32: vLLM on CPU computes {layers} ({kind}) in bfloat16 only; use model.dtype=bfloat16, or a GPU"
        )


def require_reloads(model: Path) -> None:
    """Raise ValueError for a model that vLLM 0.32 on CPU loads once and never again: it keeps latent attention's `kv_b_proj` in its
    kernel's form alone (docs/upstream.md). Such an engine scores and samples, and cannot be published to.
    """
    import torch

    fields = _fields(model)
    if _latent(fields) and not torch.cuda.is_available():
        raise ValueError(
            f"vLLM on CPU cannot take new weights for latent attention ({fields['model_type']}), so that no trainer can "
            "publish to it; train this model on a GPU"
        )


def _latent(fields: dict[str, object]) -> bool:
    return str(fields.get("model_type", "")).startswith("deepseek") and bool(fields.get("kv_lora_rank"))


def require_one_window(model: Path, max_model_len: int) -> None:
    """Raise ValueError for Cohere 2 beyond its window, which is one token wider in vLLM than in transformers (docs/upstream.md)."""
    fields = _fields(model)
    window = fields.get("sliding_window")
    if str(fields.get("model_type", "")).startswith("cohere2") and window and max_model_len > window:
        raise ValueError(
            f"rollout.max_model_len={max_model_len}: beyond {window} tokens Cohere 2's logprobs in vLLM are others: its sliding "
            f"layers see {window + 1} tokens; in transformers they see sliding_window={window}. Use at most {window}"
        )


def require_exact(model: Path) -> None:
    """Raise ValueError, naming every field, for a model that exact mode does not compute; the engine's layers would say it late."""
    fields = _fields(model)
    ropes = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    kinds = {str(rope.get("rope_type", "default")) for rope in (ropes, *ropes.values()) if isinstance(rope, dict)}
    # a list of layer types decides where there is one: many configurations carry a window that no layer has
    windows = fields.get("sliding_window") and fields.get("use_sliding_window", True)
    windows = "sliding_attention" in fields["layer_types"] if fields.get("layer_types") else windows
    activation = fields.get("hidden_activation") or fields.get("hidden_act") or fields.get("activation_function")
    against = {
        f"sliding_window={fields.get('sliding_window')}": windows,
        f"attn_logit_softcapping={fields.get('attn_logit_softcapping')}": fields.get("attn_logit_softcapping"),
        f"activation {activation}": activation not in (None, "silu", "swish"),
        f"rope of type {', '.join(sorted(kinds - {'default'}))}": kinds - {"default"},
        f"partial_rotary_factor={fields.get('partial_rotary_factor')}": fields.get("partial_rotary_factor", 1) != 1,
        "routed experts": any(fields.get(name) for name in EXPERT_FIELDS),
        "latent attention": fields.get("kv_lora_rank"),
        "state-space or linear-attention layers": any(name.startswith(STATE_FIELDS) for name in fields),
        "transformers' own layers in vLLM": needed_for(model),
    }
    found = [name for name, stands in against.items() if stands]
    if found:
        raise ValueError(
            "exact=true: exact mode computes plain causal attention, silu and whole ropes (Llama, Mistral, Qwen 2 and 3, Phi-3, "
            f"Granite); {fields.get('model_type')} has {', '.join(found)}. Use exact=false; trainer.body=mirrored follows the "
            "engine's roundings"
        )


def _fields(model: Path) -> dict[str, Any]:
    """Of a model folder's configuration, its text part where it has several."""
    about = model_config(model)
    return about.get("text_config", about)


def as_options(arguments: Arguments) -> list[str]:
    """The same as options of vLLM's command line."""
    found = []
    for name, value in arguments.items():
        option = name.replace("_", "-")
        if value is None:
            continue
        if isinstance(value, bool):
            found.append(f"--{option}" if value else f"--no-{option}")
        else:
            found += [f"--{option}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return found


def engine_environment(config: RolloutConfig) -> dict[str, str]:
    """ENVIRONMENT and what follows from the configuration; only for where the user has not chosen."""
    found = ENVIRONMENT | {"VLLM_CPU_KVCACHE_SPACE": str(config.cpu_kv_cache_gib)}
    if config.enforce_eager:  # the first request with logprobs would still compile a helper, for seconds
        found["TORCHDYNAMO_DISABLE"] = "1"
    return found
