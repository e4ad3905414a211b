"""TRL's GRPOTrainer and RLOOTrainer with vLLM: one head on both sides, proved weights, and a named cause where they disagree.

Two ways in: `AlignedGRPOTrainer` (`AlignedRLOOTrainer`) in the trainer's place, or `align(trainer)` on a trainer (a subclass of
one's own, say) whose vLLM runs under RLALIGN_HEAD=float32. What changes, and what it cannot see: docs/trl.md.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from transformers import TrainerCallback
from trl import GRPOTrainer, RLOOTrainer
from trl.generation import vllm_generation

from rlalign.integrations.trl_settings import correction_of, require_settings, require_version, sampling_of
from rlalign.loops import Monitor
from rlalign.mismatch.monitor import DEFAULT_RULES, Rule
from rlalign.rollout.attached import AttachedEngine, attach
from rlalign.rollout.head.head_settings import VARIABLES
from rlalign.trainer.live_mirror import Mirror, causal_model, mirror
from rlalign.weights import SHARED_MEMORY

__all__ = ["AlignedGRPOTrainer", "AlignedRLOOTrainer", "Alignment", "align", "correction_of"]

# Into TRL's own log, beside its sampling/sampling_logp_difference.
LOGGED = ("lag0/k3", "lag0/abs_mean", "lag0/p99", "lag0/ess", "lag0/pearson_prob", "nonfinite")
Scored = tuple[Tensor, Tensor | None, Tensor | None]
_ABSENT = object()


def align(
    trainer: GRPOTrainer | RLOOTrainer,
    *,
    head_dtype: str = "float32",
    weights: Literal["publish", "verify"] = "publish",
    rules: tuple[Rule, ...] = DEFAULT_RULES,
    stop: bool = False,
    shared: Path = SHARED_MEMORY,
    key: str | None = None,
) -> Alignment:
    """Put the rollout engine's head into the trainer's model, prove both, and take over how weights reach the engine.

    trainer: before its `train()`, with use_vllm=True, and vLLM started under RLALIGN_HEAD=float32, in this process (colocate) or
    as a server. head_dtype: "float32" or "master" (the trainer's float32 lm_head, unrounded, on both sides). weights: "publish"
    replaces TRL's push by one that is read back; "verify" leaves it and compares every tensor afterwards. rules, stop: as in
    `rlalign.Monitor`. shared, key: a folder that trainer and engine both see, and the server's API key.
    Raises ValueError for settings of TRL that would leave the two sides apart, RuntimeError where the engine or the model has
    another head than asked for, or an untested version of TRL.
    """
    require_version(version("trl"))
    require_settings(trainer, weights=weights)
    generation = trainer.vllm_generation
    where = generation.llm if generation.mode == "colocate" else generation.vllm_client.base_url
    engine = attach(where, head_dtype=head_dtype, shared=shared, key=key)
    models = [model for model in (trainer.model, trainer.ref_model) if model is not None]
    mirrors: list[Mirror] = []
    own_heads = []
    try:
        if getattr(
            trainer.args, "cast_lm_head_to_fp32", False
        ):  # the same float32 weight, through the engine's product
            own_heads = [_take_head_out(model) for model in models]
        for model in models:
            mirrors.append(mirror(model, head_dtype=head_dtype))
        monitor = Monitor(
            engine, mirrors[0], spec=engine.spec(sampling_of(trainer)), temperature=trainer.temperature, rules=rules, stop=stop
        )  # fmt: skip
    except BaseException:
        for put_back in [each.restore for each in mirrors] + own_heads:
            put_back()
        engine.detach()
        raise
    found = Alignment(trainer, engine, mirrors, monitor, weights, own_heads)
    trainer.add_callback(found)
    return found


class _Aligned:
    """Before a trainer of TRL in the bases: builds it with our head asked for, then aligns it."""

    def __init__(
        self,
        *args: object,
        rlalign_head_dtype: str = "float32",
        rlalign_weights: Literal["publish", "verify"] = "publish",
        rlalign_stop: bool = False,
        rlalign_vllm: Mapping[str, object] | None = None,
        **kwargs: object,
    ) -> None:
        with asking_for_head(rlalign_head_dtype), building_with(rlalign_vllm or {}), pushing(rlalign_weights):
            super().__init__(*args, **kwargs)
        self.alignment = align(self, head_dtype=rlalign_head_dtype, weights=rlalign_weights, stop=rlalign_stop)


class AlignedGRPOTrainer(_Aligned, GRPOTrainer):
    """GRPOTrainer whose vLLM and whose model have one head. Takes GRPOTrainer's arguments, and `align`'s as `rlalign_...`.

    rlalign_vllm: further arguments of vllm.LLM, which TRL has no way for (enforce_eager, dtype).
    """


class AlignedRLOOTrainer(_Aligned, RLOOTrainer):
    """RLOOTrainer whose vLLM and whose model have one head; arguments as AlignedGRPOTrainer's.

    TRL asks vLLM for no logprobs there; they are asked for, and compared with the ones its loss divides by.
    """


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


@contextmanager
def pushing(weights: str) -> Iterator[None]:
    """A server's client built inside opens no NCCL group where publish moves the weights: TRL's needs CUDA on both sides."""
    client = vllm_generation.VLLMClient
    stock = client.init_communicator
    if weights == "publish":
        client.init_communicator = lambda self, device=0: None
    try:
        yield
    finally:
        client.init_communicator = stock


def _take_head_out(model: nn.Module) -> Callable[[], None]:
    """Remove the forward that cast_lm_head_to_fp32 put on the lm_head (its weight stays float32); returns what undoes it."""
    lm_head = causal_model(model).get_output_embeddings()
    forward = vars(lm_head).pop("forward")
    return lambda: vars(lm_head).update(forward=forward)


class Alignment(TrainerCallback):
    """What `align` put into a trainer: `engine`, `mirrors` (policy, and reference where there is one), `monitor`; `undo`."""

    def __init__(
        self,
        trainer: GRPOTrainer | RLOOTrainer,
        engine: AttachedEngine,
        mirrors: list[Mirror],
        monitor: Monitor,
        weights: Literal["publish", "verify"],
        own_heads: Sequence[Callable[[], None]] = (),
    ) -> None:
        self.trainer, self.engine, self.mirrors, self.monitor = trainer, engine, mirrors, monitor
        self.publish_seconds: list[float] = []
        self.metrics: list[dict[str, float]] = []  # of every generation, newest last
        generation, self._own_heads = trainer.vllm_generation, own_heads
        self._stock_sync, self._proven = generation.sync_weights, False
        self._sync = self._publish if weights == "publish" else self._verify
        self._replaced: list[tuple[object, str, object]] = []
        self._old: Tensor | None = None  # of the policy, in the generation that is being scored
        self._sampled: list | None = None
        self._put(generation, "sync_weights", self.sync_weights)
        self._put(generation, "generate", self._listened(generation.generate))
        if generation.logprobs is None:  # RLOO
            self._put(generation, "logprobs", 0)
        self._put(trainer, "_get_per_token_logps_and_entropies", self.score)
        self._put(trainer, "_generate_and_score_completions", self._watched(trainer._generate_and_score_completions))

    def undo(self) -> None:
        """Give trainer, model and engine back as they were; the engine keeps its head. Safe to call twice."""
        for owner, name, before in self._replaced:
            vars(owner).pop(name, None) if before is _ABSENT else setattr(owner, name, before)
        self._replaced.clear()
        for put_back in [each.restore for each in self.mirrors] + list(self._own_heads):
            put_back()
        self.engine.detach()
        if self in self.trainer.callback_handler.callbacks:
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
        """In the trainer's place: logprobs [B, logits_to_keep] (nats, at the trainer's temperature) by the mirrored head.

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
        scored = torch.cat(logprobs)
        if self._old is None and not torch.is_grad_enabled() and mine is self.mirrors[0]:
            self._old = scored  # the reference is scored later, with PEFT through the same model
        return scored, torch.cat(entropies) if compute_entropy else None, None

    # --- inside ---

    def _put(self, owner: object, name: str, value: object) -> None:
        self._replaced.append((owner, name, vars(owner).get(name, _ABSENT)))
        setattr(owner, name, value)

    def _publish(self) -> None:
        generation = self.trainer.vllm_generation
        if generation.mode == "colocate" and generation.enable_sleep_mode:
            generation.llm.wake_up(tags=["weights"])
            generation._llm_weights_sleeping = False
        peft = is_peft_model(self.trainer.model)  # TRL would merge in place, and take out again, in 16 bits
        weights = self.mirrors[0].named_weights() if peft else generation._iter_named_params()
        self.engine.publish(weights, self.trainer.state.global_step)

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

    def _listened(self, generate: Callable) -> Callable:
        def listened(*args: object, **kwargs: object) -> tuple:
            answer = generate(*args, **kwargs)
            self._sampled = answer[2]
            return answer

        return listened

    def _watched(self, generate_and_score: Callable) -> Callable:
        def watched(inputs: object) -> dict[str, object]:
            self.engine.require_sound()
            self._old = None
            output = generate_and_score(inputs)
            if not self._proven:
                self.engine.prove()
                self._proven = True
            mask = output["completion_mask"]
            mask = mask * output["tool_mask"] if "tool_mask" in output else mask
            step = self.trainer.state.global_step
            found = self.monitor.step(
                step, self._old, self._rollout_logprobs(output), mask, lag=step - self.engine.policy_version
            )
            self.metrics.append(found)
            log = self.trainer._metrics["train" if self.trainer.model.training else "eval"]
            for name in LOGGED:
                if (key := f"mismatch/{name}") in found:
                    log[key].append(found[key])
            log["publish/seconds"].append(self.publish_seconds[-1] if self.publish_seconds else 0.0)
            return output

        return watched

    def _rollout_logprobs(self, output: dict[str, object]) -> Tensor:
        """[B, T] as sampled: what GRPOTrainer hands on, or what RLOOTrainer's engine said, which it leaves lying."""
        if "sampling_per_token_logps" in output:
            return output["sampling_per_token_logps"]
        rollout_BT = torch.zeros(output["completion_ids"].shape)
        for row_T, said in zip(rollout_BT, self._sampled, strict=True):
            row_T[: len(said)] = torch.tensor([float("nan") if each[0] is None else each[0] for each in said])
        return rollout_BT
