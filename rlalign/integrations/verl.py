"""verl with vLLM: one head on both sides, proved weights, and lag-0 mismatch beside verl's own metrics.

Importing this module switches it on, which is what verl does with `actor_rollout_ref.model.external_lib=rlalign.integrations.verl`
in every process that builds its model's configuration: trainer, actor, reference, rollout server. docs/verl.md says what changes.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from functools import wraps
from importlib.metadata import version
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.utils.debug import metrics as debug_metrics
from verl.utils.device import get_device_name, get_vendor
from verl.workers.engine import BaseEngine, EngineRegistry, FSDPEngine
from verl.workers.rollout import base as rollouts

from rlalign.integrations import require_tested
from rlalign.loops import Monitor
from rlalign.rollout.head.head_settings import VARIABLES
from rlalign.trainer.head_mirror import Tokens
from rlalign.trainer.live_mirror import Mirror, mirror

if TYPE_CHECKING:
    from verl import DataProto

__all__ = ["aligned", "compared", "switch_on"]

TESTED = ("0.9",)
ALLOW_UNTESTED = "RLALIGN_ALLOW_UNTESTED_VERL"
MODEL = "language_model"
MIRRORED = ("fsdp", "fsdp2")  # strategies of verl's engine
# Into verl's own metrics, beside training/rollout_probs_diff_...; lag0/... only where the batch says which version sampled it.
LOGGED = ("k3", "abs_mean", "p99", "ess", "pearson_prob", "nonfinite")
BOUND = "verl.trainer.ppo.v1.trainer_base"  # has verl's function under its own name, if it was imported before
ROLLOUT = ("vllm", "async")
SAMPLED: dict[str, float] = {}  # "temperature": of the rollout whose adapter was built in this process


def switch_on() -> None:
    """Ask vLLM servers that this process starts for a float32 head, give verl's FSDP engine the same one, verify its pushes.

    Called as this module is imported. Raises RuntimeError for an untested verl, ValueError where RLALIGN_HEAD asks for another head
    than float32, or another plugin has registered its own engine where the adapter registers its.
    """
    require_version(version("verl"))
    variable = VARIABLES["head_dtype"]
    if os.environ.setdefault(variable, "float32") != "float32":
        raise ValueError(
            f"{variable}={os.environ[variable]!r}: rlalign.integrations.verl mirrors float32 heads, since verl's push carries no "
            f"unrounded lm_head. Unset it, or leave external_lib=rlalign.integrations.verl out"
        )
    device = os.getenv("VERL_ENGINE_DEVICE") or get_device_name()
    vendor = os.getenv("VERL_ENGINE_VENDOR") or get_vendor()
    backends = EngineRegistry._engines.get(MODEL, {})
    for backend, engines in backends.items():
        if (device, vendor) in engines:
            raise ValueError(
                f"another plugin has registered {engines[device, vendor].__qualname__} for verl's {backend} engine on {device} of "
                f"{vendor}; give that class the mirror (rlalign.integrations.verl.aligned) and register it yourself"
            )
        if device in engines:
            kind = aligned(engines[device]) if backend in MIRRORED else refusing(backend)
            EngineRegistry.register(MODEL, backend, device=device, vendor=vendor)(kind)
    for rollout in rollouts._ROLLOUT_REGISTRY:
        ours = "verl_rollout.VerifiedServerAdapter" if rollout == ROLLOUT else "verl.RefusedRollout"
        rollouts._ROLLOUT_REGISTRY[rollout] = f"rlalign.integrations.{ours}"
    found = compared(debug_metrics.calculate_debug_metrics)
    for module in (debug_metrics, sys.modules.get(BOUND)):
        if module is not None:
            module.calculate_debug_metrics = found


def compared(calculate: Callable[[DataProto], dict]) -> Callable[[DataProto], dict]:
    """verl's calculate_debug_metrics with the adapter's in its dictionary: mismatch/k3 ..., mismatch/lag0/... where lag is known.

    Causes are said where a metric is past its limit. verl calls it wherever old_log_probs are recomputed (bypass_mode=False).
    """
    monitor, steps = Monitor(), 0

    @wraps(calculate)
    def both(data: DataProto) -> dict:
        nonlocal steps
        found = calculate(data)
        batch = data.batch
        width = batch["rollout_log_probs"].shape[1]
        mask_BL = batch["response_mask"][:, -width:].bool()
        if not mask_BL.any():
            return found
        ours = monitor.step(steps, batch["old_log_probs"], batch["rollout_log_probs"], mask_BL, lag=_lag(data))
        steps += 1
        keys = (f"mismatch/{lag}{name}" for lag in ("", "lag0/") for name in LOGGED)
        return found | {key: ours[key] for key in keys if key in ours}

    return both


def _lag(data: DataProto) -> torch.Tensor | None:
    """Updates [B] between the oldest weights that sampled a row and those that recompute it; None where verl says nothing."""
    sampled, step = data.non_tensor_batch.get("min_global_steps"), data.meta_info.get("global_steps")
    if sampled is None or step is None or any(each is None for each in sampled):
        return None
    return torch.tensor([step - 1 - int(each) for each in sampled])


def aligned(engine: type) -> type:
    """A subclass of verl's FSDP engine: log_probs and entropies from the rollout's float32 projection, without logits."""

    class Aligned(engine):
        mirror: Mirror

        def _build_model_optimizer(self) -> None:
            _require_settings(self)
            super()._build_model_optimizer()
            self.mirror = mirror(self.module)

        def prepare_model_inputs(self, micro_batch: TensorDict) -> tuple[dict, dict]:
            _require_request(micro_batch)
            inputs, told = super().prepare_model_inputs(micro_batch)
            self.mirror.ask(_tokens(inputs, told, self.model_config), exact=not torch.is_grad_enabled())
            return inputs, told

        def prepare_model_outputs(
            self, output: object, output_args: dict, micro_batch: TensorDict, logits_processor_func: object
        ) -> dict[str, torch.Tensor]:
            logprobs, entropy = self.mirror.answer(output)
            fused = SimpleNamespace(log_probs=logprobs[:, 1:], entropy=entropy[:, 1:])
            tu.assign_non_tensor(micro_batch, use_fused_kernels=True)  # verl's word for an output that brings log_probs
            try:
                return super().prepare_model_outputs(fused, output_args, micro_batch, logits_processor_func)
            finally:
                tu.assign_non_tensor(micro_batch, use_fused_kernels=False)

    Aligned.__name__ = Aligned.__qualname__ = f"Aligned{engine.__name__}"
    return Aligned


def refusing(backend: str) -> type:
    """An engine that cannot be built: its head would stay in 16 bits beside a float32 one in the rollout."""

    class Refusing(BaseEngine):
        def __init__(self, *args: object, **kwargs: object) -> None:
            raise ValueError(
                f"rlalign.integrations.verl mirrors the head of {', '.join(MIRRORED)}; actor.strategy={backend} would leave "
                "a float32 head on the rollout's side alone. Choose one of these, or leave external_lib out"
            )

    return Refusing


class RefusedRollout:
    """A rollout that cannot be built: another engine than vLLM has no float32 head of rlalign."""

    def __init__(self, config: object, *args: object, **kwargs: object) -> None:
        raise ValueError(
            f"rlalign.integrations.verl puts its head into vLLM; rollout.name={config.name} would leave a float32 head on the "
            "trainer's side alone. Choose vllm, or leave external_lib out"
        )


def _tokens(inputs: dict, told: dict, model_config: object) -> Tokens:
    """What verl asks of a micro-batch: at every position the token after it, one more than positions, at verl's temperatures."""
    if "temperature_rmpad" in told:  # packed, perhaps this rank's shard
        labels_BL, temperature = told["input_ids_rmpad_rolled"][None], told["temperature_rmpad"][None]
        valid_BL = torch.ones_like(labels_BL, dtype=torch.bool)
        temperature = torch.cat([temperature[:, :1], temperature], 1)
    else:
        labels_BL, temperature = inputs["input_ids"].roll(-1, 1), told["temperature"]
        valid_BL = inputs["attention_mask"].bool()
    real = len(model_config.tokenizer)  # verl's rollout server gives ids from here on no probability
    rows = model_config.hf_config.get_text_config().vocab_size
    valid_BL = torch.cat([torch.zeros_like(valid_BL[:, :1]), valid_BL & (labels_BL < real)], 1)
    ids_BL = torch.cat([labels_BL[:, :1], labels_BL], 1)
    return Tokens(ids_BL, valid_BL, temperature.clamp(min=1e-8), vocab_size=min(real, rows))


def _require_settings(engine: FSDPEngine) -> None:
    """Raise ValueError for settings of verl that would leave the two sides apart."""
    config, model, wrong = engine.engine_config, engine.model_config, None
    if model.use_fused_kernels:
        wrong = (
            "model.use_fused_kernels=True: it passes the lm_head by; leave it False, no logits are built here either"
        )
    elif model.lora_rank > 0 and not model.lora.get("merge", False):
        wrong = "LoRA as an adapter of the rollout: what it serves cannot be read back; set model.lora.merge=True"
    elif getattr(config.qat, "enable", False):
        wrong = "engine.qat: the rollout's weights are quantised; there is nothing to mirror"
    elif model.tokenizer is None:
        wrong = "model.load_tokenizer=False: the rollout gives ids beyond the tokenizer's no probability, and it is unknown here"
    elif hasattr(model.hf_config, "vision_config"):
        wrong = "a model with images: this adapter was tried on text only"
    if wrong is not None:
        raise ValueError(f"rlalign.integrations.verl: {wrong}")


def _require_request(micro_batch: TensorDict) -> None:
    asked, sampled = (
        tu.get_non_tensor_data(data=micro_batch, key="temperature", default=None),
        SAMPLED.get("temperature"),
    )
    if isinstance(asked, int | float) and sampled is not None and not math.isclose(asked, sampled, rel_tol=1e-6):
        raise ValueError(
            f"another temperature: rollout.temperature={sampled:g}, and the actor was asked to divide its logits by {asked:g}; "
            "use one on both sides"
        )
    for name in ("calculate_sum_pi_squared", "distillation_use_topk"):
        if tu.get_non_tensor_data(data=micro_batch, key=name, default=False):
            raise ValueError(
                f"rlalign.integrations.verl builds no logits, which {name} needs; switch that off, or leave external_lib out"
            )


def require_version(found: str) -> None:
    """Raise RuntimeError for a verl that this adapter was not tried on, unless RLALIGN_ALLOW_UNTESTED_VERL=1."""
    does = "subclasses its FSDP engine and its vLLM ServerAdapter"
    require_tested("verl", found, TESTED, allow=ALLOW_UNTESTED, does=does, own="engine")


switch_on()
