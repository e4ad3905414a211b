"""OpenRLHF with vLLM: one float32 head on both sides, compared pushes, and mismatch in OpenRLHF's own log.

    python -m rlalign.integrations.openrlhf ...     # the arguments of openrlhf.cli.train_ppo_ray, which it runs

docs/stacks.md says what changes.
"""

from __future__ import annotations

import runpy
import sys
from importlib.metadata import version
from types import SimpleNamespace

import torch.distributed as dist
from torch.nn.utils.rnn import pad_sequence

from rlalign.integrations import require_tested
from rlalign.integrations.ray_actors import plain, verify_push
from rlalign.loops import Monitor
from rlalign.rollout.attached import AttachedEngine, attach
from rlalign.trainer.live_mirror import Mirror, mirror

__all__ = ["aligned", "main", "mirrored", "require_settings", "serving", "switch_on", "unrestricted"]

TESTED = ("0.11",)
ALLOW_UNTESTED = "RLALIGN_ALLOW_UNTESTED_OPENRLHF"
COMPARED = ("action_log_probs", "rollout_log_probs", "action_mask")  # fields of OpenRLHF's Experience


def main() -> None:
    """Run OpenRLHF's trainer with the aligned actors in the place of its own."""
    switch_on()
    sys.argv[0] = "openrlhf.cli.train_ppo_ray"
    runpy.run_module("openrlhf.cli.train_ppo_ray", run_name="__main__")


def switch_on() -> None:
    """Put subclasses where OpenRLHF's launcher looks for its Ray actors: policy, reference, and the one around vLLM.

    Raises RuntimeError for an untested OpenRLHF, unless RLALIGN_ALLOW_UNTESTED_OPENRLHF=1.
    """
    does = "subclasses its PolicyModelActor, ReferenceModelActor and RolloutRayActor"
    require_tested("OpenRLHF", version("openrlhf"), TESTED, allow=ALLOW_UNTESTED, does=does, own="actor")
    from openrlhf.trainer.ray import launcher, ppo_actor, vllm_engine

    ray = launcher.ray
    vllm_engine.RolloutRayActor = ray.remote(serving(plain(vllm_engine.RolloutRayActor)))
    ppo_actor.PolicyModelActor = ray.remote(num_gpus=1)(aligned(plain(ppo_actor.PolicyModelActor)))
    launcher.ReferenceModelActor = ray.remote(num_gpus=1)(mirrored(plain(launcher.ReferenceModelActor)))


def unrestricted(actor: type) -> type:
    """RolloutRayActor without OpenRLHF's min_tokens=1, which takes the end-of-sequence token out of the first distribution."""

    class Unrestricted(actor):
        async def generate(
            self, prompt_token_ids: list[int], sampling_params: object, *args: object, **kwargs: object
        ) -> object:
            sampling_params.min_tokens = 0
            return await super().generate(prompt_token_ids, sampling_params, *args, **kwargs)

    return Unrestricted


def serving(actor: type) -> type:
    """RolloutRayActor, unrestricted, whose vLLM runs the float32 head and can be asked which one it runs."""

    class Serving(unrestricted(actor)):
        async def __init__(self, *args: object, **kwargs: object) -> None:
            kwargs["additional_config"] = {"rlalign": {"head_dtype": "float32"}}
            await super().__init__(*args, **kwargs)

        async def collective_rpc(self, method: str, args: tuple = ()) -> list:
            return await self.llm.collective_rpc(method, args=args)

    return Serving


def mirrored(actor: type) -> type:
    """ReferenceModelActor, whose model projects as vLLM does."""

    class Mirrored(actor):
        mirrored: Mirror

        def init_model_from_pretrained(self, *args: object, **kwargs: object) -> None:
            super().init_model_from_pretrained(*args, **kwargs)
            self.mirrored = mirror(self.model.model)

    return Mirrored


def aligned(actor: type) -> type:
    """PolicyModelActor, mirrored. Its first rank attaches to the engines, compares logprobs and what a push left behind.

    What `fit` returns, and OpenRLHF logs, has mismatch/... of this rank's samples beside vllm_kl: mismatch/lag0/... too unless
    training is asynchronous. Causes are printed where a metric is past its limit.
    """

    class Aligned(actor):
        mirrored: Mirror
        engine: AttachedEngine | None = None
        step = 0

        def init_model_from_pretrained(self, strategy: object, *args: object, **kwargs: object) -> None:
            require_settings(strategy.args)
            super().init_model_from_pretrained(strategy, *args, **kwargs)
            self.mirrored = mirror(self.actor.model)
            if dist.get_rank() == 0:
                self.engine = attach(list(self.vllm_engines))
                self.monitor = self.watching()

        def watching(self) -> Monitor:
            """Raise for a head on one side only, raw logprobs, another temperature, truncated sampling: before a step."""
            asked = self.strategy.args.rollout
            spec = self.engine.spec({"temperature": asked.temperature, "top_p": asked.top_p})
            return Monitor(self.engine, self.mirrored, spec=spec, temperature=self.actor.temperature)

        def fit(self, kl_ctl: float = 0) -> dict:
            found = {} if self.engine is None else self._compared(self.trainer.replay_buffer.items)
            return super().fit(kl_ctl) | found

        def broadcast_to_vllm(self) -> None:
            super().broadcast_to_vllm()
            verify_push(self.engine, self.mirrored.named_weights())

        def _compared(self, samples: list) -> dict[str, float]:
            self.engine.prove()
            columns = ([getattr(each, name) for each in samples] for name in COMPARED)
            lag = None if self.strategy.args.train.async_enable else 0
            self.step += 1
            return self.monitor.step(self.step - 1, *(pad_sequence(c, batch_first=True) for c in columns), lag=lag)

    return Aligned


def require_settings(args: SimpleNamespace) -> None:
    """Raise ValueError for settings of OpenRLHF under which nothing can be compared or proved."""
    wrong = None
    if args.algo.advantage.is_correction_level == "off":
        wrong = "algo.advantage.is_correction_level=off: vLLM is asked for no logprobs; set it to token or seq"
    elif args.ds.lora.rank > 0 or args.ds.load_in_4bit:
        wrong = "ds.lora.rank and ds.load_in_4bit: what OpenRLHF pushes then was not tried; train whole 16-bit weights"
    elif args.ds.tensor_parallel_size > 1:
        wrong = "ds.tensor_parallel_size above 1: DeepSpeed splits the lm_head, which is not mirrored; use ZeRO"
    if wrong is not None:
        raise ValueError(f"rlalign.integrations.openrlhf: {wrong}; or start openrlhf.cli.train_ppo_ray itself")


if __name__ == "__main__":
    from rlalign.integrations import openrlhf  # under its own name, so that Ray's workers import it

    openrlhf.main()
