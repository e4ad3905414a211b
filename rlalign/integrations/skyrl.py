"""SkyRL with vLLM: one float32 head on both sides, compared pushes, and mismatch in SkyRL's own log.

    python -m skyrl.train.entrypoints.main_base trainer.override_entrypoint=rlalign.integrations.skyrl ...

which is SkyRL's own hook: it calls `main` in the place of its entrypoint's. docs/stacks.md says what changes.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import TYPE_CHECKING

import torch.distributed as dist

from rlalign.integrations import require_tested
from rlalign.integrations.ray_actors import plain, verify_push
from rlalign.loops import Monitor
from rlalign.rollout.attached import AttachedEngine, attach, spec_of_sampling
from rlalign.trainer.live_mirror import Mirror, mirror

if TYPE_CHECKING:
    from skyrl.train.config import SkyRLTrainConfig

__all__ = ["aligned", "comparing", "configure", "main", "mirrored", "require_version", "sampling"]

TESTED = ("0.3",)
ALLOW_UNTESTED = "RLALIGN_ALLOW_UNTESTED_SKYRL"


def main() -> None:
    """Run SkyRL's training with the aligned trainer and workers. Raises RuntimeError for an untested SkyRL."""
    require_version(version("skyrl"))
    import ray
    from skyrl.train.config import SkyRLTrainConfig
    from skyrl.train.utils import validate_cfg
    from skyrl.train.utils.utils import initialize_ray

    cfg = SkyRLTrainConfig.from_cli_overrides(sys.argv[1:])
    validate_cfg(cfg)
    configure(cfg)
    initialize_ray(cfg)
    ray.get(ray.remote(num_cpus=1)(run).remote(cfg))


def run(cfg: SkyRLTrainConfig) -> None:
    """SkyRL's experiment, in the Ray task that its entrypoint starts, too."""
    from skyrl.train.entrypoints.main_base import BasePPOExp
    from skyrl.train.trainer import RayPPOTrainer

    class Aligned(BasePPOExp):
        def get_trainer(self, **given: object) -> RayPPOTrainer:
            return comparing(RayPPOTrainer)(**given)

    Aligned(cfg).run()


def configure(cfg: SkyRLTrainConfig) -> None:
    """Ask vLLM for the float32 head and processed logprobs.

    Raises ValueError for settings under which the two sides' logprobs are of different distributions, or that were not tried.
    """
    engine, sampling, wrong = cfg.generator.inference_engine, cfg.generator.sampling_params, None
    if cfg.trainer.strategy != "fsdp":
        wrong = f"trainer.strategy={cfg.trainer.strategy}: its head is not mirrored; use fsdp"
    elif cfg.trainer.policy.model.lora.rank > 0:
        wrong = "trainer.policy.model.lora.rank above 0: what it serves cannot be read back; train whole weights"
    elif sampling.logprobs is None:
        wrong = "generator.sampling_params.logprobs=null: vLLM is asked for no logprobs; set 1"
    if wrong is not None:
        raise ValueError(f"rlalign.integrations.skyrl: {wrong}, or leave trainer.override_entrypoint out")
    engine.engine_init_kwargs.setdefault("logprobs_mode", "processed_logprobs")
    engine.engine_init_kwargs["additional_config"] = {
        **engine.engine_init_kwargs.get("additional_config", {}),
        "rlalign": {"head_dtype": "float32"},
    }
    monitor(cfg)


def sampling(backend: str, params: object) -> dict[str, object]:
    """What SkyRL asks of vLLM, without its min_tokens=1, which takes the end-of-sequence token out of the first distribution."""
    from skyrl.backends.skyrl_train.inference_servers.engine_utils import get_sampling_params_for_backend

    return get_sampling_params_for_backend(backend, params) | {"min_tokens": 0}


def monitor(cfg: SkyRLTrainConfig) -> Monitor:
    """Of what vLLM is asked for, against the temperature that SkyRL's workers divide by. Raises ValueError where these differ."""
    engine = cfg.generator.inference_engine
    spec = spec_of_sampling(
        sampling(engine.backend, cfg.generator.sampling_params),
        logprobs_mode=engine.engine_init_kwargs["logprobs_mode"],
        head_dtype="float32",
    )
    return Monitor(spec=spec, temperature=cfg.trainer.algorithm.temperature)


def comparing(trainer: type) -> type:
    """RayPPOTrainer with aligned workers, and mismatch/... of every step in what it logs; lag0/... unless fully asynchronous.

    Its module samples with `sampling` from now on.
    """
    sys.modules[trainer.__module__].get_sampling_params_for_backend = sampling

    class Comparing(trainer):
        def __init__(self, cfg: SkyRLTrainConfig, *args: object, **kwargs: object) -> None:
            super().__init__(cfg, *args, **kwargs)
            self.monitor = monitor(cfg)

        def build_models(self, PolicyWorker: object, CriticWorker: object, RefWorker: object) -> None:
            import ray

            workers = (aligned(plain(PolicyWorker)), mirrored(plain(RefWorker)))
            policy, reference = (ray.remote(num_gpus=1)(worker) for worker in workers)
            super().build_models(policy, CriticWorker, reference)

        def fwd_logprobs_values_reward(self, training_input: object) -> object:
            batch = super().fwd_logprobs_values_reward(training_input)
            old_BL, rollout_BL, mask_BL = batch["action_log_probs"], batch["rollout_logprobs"], batch["loss_mask"] > 0
            lag = None if self.cfg.trainer.fully_async.enabled else 0
            if old_BL is not None and rollout_BL is not None and mask_BL.any():
                self.all_metrics.update(self.monitor.step(self.global_step, old_BL, rollout_BL, mask_BL, lag=lag))
            return batch

    return Comparing


def mirrored(worker: type) -> type:
    """A worker of SkyRL's FSDP backend, whose model projects as vLLM does."""

    class Mirrored(worker):
        mirrored: Mirror

        def init_model(self, *args: object, **kwargs: object) -> None:
            super().init_model(*args, **kwargs)
            self.mirrored = mirror(self.model.model)

    return Mirrored


def aligned(worker: type) -> type:
    """Its policy worker, mirrored. The first rank attaches to every server before the first push, and compares each push.

    Before each later one it asks every server whether the tokens since were made by the head that it was started with.
    """

    class Aligned(mirrored(worker)):
        engine: AttachedEngine | None = None

        async def broadcast_to_inference_engines(self, client: object, *args: object, **kwargs: object) -> None:
            self.mirrored.require_in_place()
            if self.engine is not None:
                self.engine.prove()
            elif dist.get_rank() == 0:
                self.engine = attach(list(client.server_urls[:: client.data_parallel_size]))
            await super().broadcast_to_inference_engines(client, *args, **kwargs)
            verify_push(self.engine, self.mirrored.named_weights())

    return Aligned


def require_version(found: str) -> None:
    """Raise RuntimeError for a SkyRL that this adapter was not tried on, unless RLALIGN_ALLOW_UNTESTED_SKYRL=1."""
    does = "subclasses its RayPPOTrainer and FSDP workers"
    require_tested("SkyRL", found, TESTED, allow=ALLOW_UNTESTED, does=does, own="worker")
