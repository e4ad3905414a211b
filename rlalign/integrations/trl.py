"""TRL's GRPOTrainer with vLLM in its process: one head on both sides, proved weights, and a named cause where they disagree.

Two ways in: `AlignedGRPOTrainer` in GRPOTrainer's place, or `align(trainer)` on a trainer (a subclass of one's own, say) that was
built with RLALIGN_HEAD=float32 in its environment. What changes, and what it cannot see: docs/trl.md.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from trl import GRPOTrainer
from trl.generation import vllm_generation

from rlalign.loops import Monitor
from rlalign.mismatch.monitor import DEFAULT_RULES, Rule
from rlalign.rollout.attached import AttachedEngine, attach
from rlalign.rollout.head.head_settings import VARIABLES
from rlalign.trainer.live_mirror import Mirror, causal_model, mirror

__all__ = ["AlignedGRPOTrainer", "Alignment", "align"]

TESTED = ("1.16",)
ALLOW_UNTESTED = "RLALIGN_ALLOW_UNTESTED_TRL"
# Into TRL's own log, beside its sampling/sampling_logp_difference.
LOGGED = ("lag0/k3", "lag0/abs_mean", "lag0/p99", "lag0/ess", "lag0/pearson_prob", "nonfinite")
Scored = tuple[Tensor, Tensor | None, Tensor | None]


def align(
    trainer: GRPOTrainer,
    *,
    head_dtype: str = "float32",
    weights: Literal["publish", "verify"] = "publish",
    rules: tuple[Rule, ...] = DEFAULT_RULES,
    stop: bool = False,
) -> Alignment:
    """Put the rollout engine's head into the trainer's model, prove both, and take over how weights reach the engine.

    trainer: before its `train()`, with use_vllm=True, vllm_mode="colocate" and vLLM built under RLALIGN_HEAD=float32.
    head_dtype: "float32" or "master" (the trainer's float32 lm_head, unrounded, on both sides). weights: "publish" replaces TRL's
    push by one that is read back; "verify" leaves it and compares every tensor afterwards. rules, stop: as in `rlalign.Monitor`.
    Raises ValueError for settings of TRL that would leave the two sides apart, RuntimeError where the engine or the model has
    another head than asked for, or an untested version of TRL.
    """
    require_version(version("trl"))
    _require_settings(trainer)
    engine = attach(trainer.vllm_generation.llm, head_dtype=head_dtype)
    mirrors: list[Mirror] = []
    try:
        for model in (trainer.model, getattr(trainer, "ref_model", None)):
            if model is not None:
                mirrors.append(mirror(model, head_dtype=head_dtype))
        monitor = Monitor(
            engine, mirrors[0], spec=engine.spec(sampling_of(trainer)), temperature=trainer.temperature, rules=rules, stop=stop
        )  # fmt: skip
    except BaseException:
        for each in mirrors:
            each.restore()
        engine.detach()
        raise
    found = Alignment(trainer, engine, mirrors, monitor, weights)
    trainer.add_callback(found)
    return found


class AlignedGRPOTrainer(GRPOTrainer):
    """GRPOTrainer whose vLLM and whose model have one head. Takes GRPOTrainer's arguments, and `align`'s as `rlalign_...`.

    rlalign_vllm: further arguments of vllm.LLM, which TRL has no way for (enforce_eager, dtype).
    """

    def __init__(
        self,
        *args: object,
        rlalign_head_dtype: str = "float32",
        rlalign_weights: Literal["publish", "verify"] = "publish",
        rlalign_stop: bool = False,
        rlalign_vllm: Mapping[str, object] | None = None,
        **kwargs: object,
    ) -> None:
        with asking_for_head(rlalign_head_dtype), building_with(rlalign_vllm or {}):
            super().__init__(*args, **kwargs)
        self.alignment = align(self, head_dtype=rlalign_head_dtype, weights=rlalign_weights, stop=rlalign_stop)


@contextmanager
def asking_for_head(head_dtype: str) -> Iterator[None]:
    """A vLLM built inside is asked for this head: TRL builds its LLM from a fixed list of arguments, so by the environment."""
    name = VARIABLES["head_dtype"]
    before = os.environ.get(name)
    if before not in (None, "", head_dtype):
        raise ValueError(f"{name}={before!r} is set, and head_dtype={head_dtype!r} was asked for; unset one")
    os.environ[name] = head_dtype
    try:
        yield
    finally:
        os.environ.pop(name) if before is None else os.environ.update({name: before})


@contextmanager
def building_with(arguments: Mapping[str, object]) -> Iterator[None]:
    """A vLLM built by TRL inside gets these arguments as well. Raises ValueError for one that TRL sets itself."""
    stock = vllm_generation.LLM

    def build(**given: object) -> object:
        if taken := sorted(arguments.keys() & given.keys()):
            raise ValueError(
                f"TRL sets {', '.join(taken)} of vllm.LLM itself; use GRPOConfig's vllm_... settings for it"
            )
        return stock(**given, **arguments)

    vllm_generation.LLM = build
    try:
        yield
    finally:
        vllm_generation.LLM = stock


class Alignment(TrainerCallback):
    """What `align` put into a trainer: `engine`, `mirrors` (policy, and reference where there is one), `monitor`; `undo`."""

    def __init__(
        self,
        trainer: GRPOTrainer,
        engine: AttachedEngine,
        mirrors: list[Mirror],
        monitor: Monitor,
        weights: Literal["publish", "verify"],
    ) -> None:
        self.trainer, self.engine, self.mirrors, self.monitor = trainer, engine, mirrors, monitor
        self.publish_seconds: list[float] = []
        self.metrics: list[dict[str, float]] = []  # of every generation, newest last
        self._stock_sync, self._proven = trainer.vllm_generation.sync_weights, False
        self._sync = self._publish if weights == "publish" else self._verify
        self._replaced: list[tuple[object, str]] = []
        self._put(trainer.vllm_generation, "sync_weights", self.sync_weights)
        self._put(trainer, "_get_per_token_logps_and_entropies", self.score)
        self._put(trainer, "_generate_and_score_completions", self._watched(trainer._generate_and_score_completions))

    def undo(self) -> None:
        """Give trainer, model and engine back as they were; the engine keeps the head that it was started with."""
        for owner, name in self._replaced:
            vars(owner).pop(name, None)
        for each in self.mirrors:
            each.restore()
        self.engine.detach()
        self.trainer.remove_callback(self)

    def sync_weights(self) -> None:
        """In VLLMGeneration's place: the trainer's weights into the engine, and back out of its kernels."""
        before = time.perf_counter()
        self._sync()
        self.publish_seconds.append(time.perf_counter() - before)

    def score(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **others: object,
    ) -> Scored:
        """In GRPOTrainer's place: logprobs [B, logits_to_keep] (nats, at the trainer's temperature) by the mirrored head.

        Raises ValueError for images, which this adapter was not tried with.
        """
        if given := [name for name, value in others.items() if value is not None]:
            raise ValueError(
                f"rlalign.integrations.trl scores text only, and TRL passed {', '.join(given)}; undo() the alignment"
            )
        if compute_aux_loss:
            raise ValueError(
                "rlalign.integrations.trl: the router's auxiliary loss is not passed on; set router_aux_loss_coef=0.0"
            )
        mine = self._mirror_of(model)
        exact = not torch.is_grad_enabled() and mine.head_dtype == "float32"
        logprobs, entropies = [], []
        for ids_BL, attended_BL in zip(
            input_ids.split(batch_size or len(input_ids)),
            attention_mask.split(batch_size or len(input_ids)),
            strict=True,
        ):
            mask_BL = attended_BL.bool()
            mask_BL[:, :-logits_to_keep] = False
            with self.trainer.accelerator.autocast():
                found = mine.token_logprobs(
                    {"input_ids": ids_BL, "attention_mask": attended_BL}, mask_BL,
                    temperature=self.trainer.temperature, exact=exact, through=model,
                )  # fmt: skip
            logprobs.append(found[0][:, -logits_to_keep:])
            entropies.append(found[1][:, -logits_to_keep:])
        return torch.cat(logprobs), torch.cat(entropies) if compute_entropy else None, None

    # --- inside ---

    def _put(self, owner: object, name: str, value: Callable) -> None:
        setattr(owner, name, value)
        self._replaced.append((owner, name))

    def _publish(self) -> None:
        generation = self.trainer.vllm_generation
        if generation.enable_sleep_mode:
            generation.llm.wake_up(tags=["weights"])
            generation._llm_weights_sleeping = False
        self.engine.publish(generation._iter_named_params(), self.trainer.state.global_step)

    def _verify(self) -> None:
        self._stock_sync()
        self.engine.verify(self.trainer.vllm_generation._iter_named_params(), version=self.trainer.state.global_step)

    def _mirror_of(self, model: nn.Module) -> Mirror:
        inner = causal_model(model)
        for each in self.mirrors:
            if each.inner is inner:
                return each
        raise RuntimeError(
            f"TRL scores with a {type(inner).__name__} that was not there when the trainer was aligned; align it after the "
            "model has been set"
        )

    def _watched(self, generate_and_score: Callable) -> Callable:
        def watched(inputs: object) -> dict[str, object]:
            self.engine.require_sound()
            output = generate_and_score(inputs)
            if not self._proven:
                self.engine.prove()
                self._proven = True
            mask = output["completion_mask"]
            mask = mask * output["tool_mask"] if "tool_mask" in output else mask
            step = self.trainer.state.global_step
            found = self.monitor.step(
                step, output["old_per_token_logps"], output["sampling_per_token_logps"], mask,
                lag=step - self.engine.policy_version,
            )  # fmt: skip
            self.metrics.append(found)
            log = self.trainer._metrics["train" if self.trainer.model.training else "eval"]
            for name in LOGGED:
                if (key := f"mismatch/{name}") in found:
                    log[key].append(found[key])
            log["publish/seconds"].append(self.publish_seconds[-1] if self.publish_seconds else 0.0)
            return output

        return watched


def require_version(found: str) -> None:
    """Raise RuntimeError for a TRL that this adapter was not tried on, unless RLALIGN_ALLOW_UNTESTED_TRL=1."""
    if ".".join(found.split(".")[:2]) in TESTED or os.environ.get(ALLOW_UNTESTED) == "1":
        return
    raise RuntimeError(
        f"TRL {found} was not tried with this adapter ({', '.join(TESTED)} were), which replaces methods of GRPOTrainer and "
        f"VLLMGeneration by name. Install a tested one; or set {ALLOW_UNTESTED}=1 and read the first step's mismatch/lag0/k3; or "
        "use rlalign.attach and rlalign.mirror in your own subclass"
    )


def sampling_of(trainer: GRPOTrainer) -> dict[str, object]:
    """What TRL asks vLLM to sample with, under vLLM's names."""
    generation = trainer.vllm_generation
    found = {
        name: getattr(generation, name) for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    }
    return found | {"structured_outputs": generation.structured_outputs_regex} | generation.generation_kwargs


def _require_settings(trainer: GRPOTrainer) -> None:
    args, generation = trainer.args, getattr(trainer, "vllm_generation", None)
    wrong = None
    if generation is None:
        wrong = "use_vllm=False: there is no second engine to align with"
    elif generation.mode != "colocate":
        wrong = (
            'vllm_mode="server": its engine is in another process; attach to the server\'s address with rlalign.attach'
        )
    elif generation.tensor_parallel_size > 1:
        wrong = "vllm_tensor_parallel_size > 1: each process sees its own worker only; use 1 (one engine a process)"
    elif not trainer.vllm_importance_sampling_correction:
        wrong = (
            "vllm_importance_sampling_correction=False: then nothing recomputes the logprobs to compare; leave it True"
        )
    elif getattr(trainer, "_is_vlm", False):
        wrong = "a model with images: this adapter scores text only"
    elif args.cast_lm_head_to_fp32:
        wrong = "cast_lm_head_to_fp32=True: TRL's own float32 head, on one side only; leave it False"
    if wrong is not None:
        raise ValueError(f"rlalign.integrations.trl: {wrong}")
