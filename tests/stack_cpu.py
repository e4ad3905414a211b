"""OpenRLHF's released actors on one CPU process: what stands for Ray, CUDA and NCCL, for SkyRL's too (skyrl_cpu.py).

Ray: an actor is an object of this process, a reference its value; requests to vLLM that nobody waited for yet run as one batch.
CUDA: calls that name the device answer "cpu", others do nothing. A push: vLLM's reload in the place of NCCL and CUDA IPC, whose
receivers allocate on "cuda" and load tensor by tensor, which fails where vLLM packs weights (docs/upstream.md).
"""

import asyncio
import inspect
import os
import sys
import types
import typing
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from rlalign.rollout import attached_lines as lines
from tests.released import VERSIONS, released
from tests.verl_cpu import start_group

ABSENT = ("flash_attn", "ring_flash_attn", "pylatexenc", "optimum", "bitsandbytes", "torchdata")
SIZES = {"max_model_len": 128, "max_num_seqs": 128, "enforce_eager": True, "disable_log_stats": True}


class Device(str):
    """Where tensors go, and a number inside the name that OpenRLHF's buffer makes of it and does not use."""

    __slots__ = ()

    def __format__(self, spec):
        return "0"


class Ray(types.ModuleType):
    """In the place of the module, where a stack imports it."""

    __path__ = ()

    def __init__(self):
        super().__init__("ray")
        self._private = SimpleNamespace(services=SimpleNamespace(get_node_ip_address=lambda: "127.0.0.1"))
        self.ObjectRef = object

    def remote(self, *given, **resources):
        def made(kind):
            return ActorClass(kind) if inspect.isclass(kind) else kind

        return made(*given) if given else made

    def is_initialized(self):
        return False

    def put(self, value):
        return value

    def get(self, reference):
        if isinstance(reference, list):
            return [self.get(each) for each in reference]
        if isinstance(reference, Pending):
            Pending.resolve()
            return reference.value
        return reference

    def wait(self, references, **kwargs):
        return references[:1], references[1:]


class ActorClass:
    """What ray.remote makes of a class; as there, the class itself is two attributes away."""

    def __init__(self, kind):
        modified = type(kind.__name__, (kind,), {"__ray_actor_class__": kind})
        self.__ray_metadata__ = SimpleNamespace(modified_class=modified)
        self.kind = kind

    def options(self, **resources):
        return self

    def remote(self, *args, **kwargs):
        made = object.__new__(self.kind)
        begun = made.__init__(*args, **kwargs)
        if inspect.iscoroutine(begun):
            asyncio.run(begun)
        return Handle(made)


class Handle:
    """Of an actor, its methods called by .remote(...)."""

    __module__ = "ray.actor"  # by which rlalign knows one

    def __init__(self, actor):
        self.actor = actor

    def __getattr__(self, name):
        method = getattr(self.actor, name)

        def remote(*args, **kwargs):
            done = method(*args, **kwargs)
            if name == "generate_responses":
                return Pending(done)
            return asyncio.run(done) if inspect.iscoroutine(done) else done

        return SimpleNamespace(remote=remote)


class Pending:
    """What a call will answer; all that wait run together, as they would on vLLM's own event loop."""

    waiting: typing.ClassVar[list] = []

    def __init__(self, coroutine):
        self.coroutine, self.value = coroutine, None
        self.waiting.append(self)

    @classmethod
    def resolve(cls):
        now, cls.waiting[:] = list(cls.waiting), []

        async def every():
            return await asyncio.gather(*(each.coroutine for each in now))

        for each, value in zip(now, asyncio.run(every()), strict=True):
            each.value = value


class Batching:
    """An LLM behind what the stacks use of AsyncLLM: requests of one turn of the event loop are one batch."""

    def __init__(self, llm):
        self.llm, self.queue = llm, []
        self.output_processor = SimpleNamespace(get_num_unfinished_requests=lambda: 0)

    @classmethod
    def from_engine_args(cls, args):
        from vllm import LLM

        asked = {
            name: getattr(args, name) for name in ("model", "dtype", "seed", "worker_extension_cls", "logprobs_mode")
        }
        return cls(LLM(**asked, **SIZES, additional_config=args.additional_config, use_tqdm_on_load=False))

    async def is_sleeping(self):
        return False

    async def generate(self, prompt, params, request_id):
        loop = asyncio.get_running_loop()
        if not self.queue:
            loop.call_soon(self._flush)
        self.queue.append((prompt, params, loop.create_future()))
        yield await self.queue[-1][2]

    def _flush(self):
        (*now,), self.queue[:] = self.queue, []
        outputs = self.llm.generate([p for p, _, _ in now], [s for _, s, _ in now], use_tqdm=False)
        for output, (_, _, future) in zip(outputs, now, strict=True):
            future.set_result(output)

    async def collective_rpc(self, method, args=()):
        return self.llm.collective_rpc(method, args=args)

    async def reset_prefix_cache(self):
        return self.llm.reset_prefix_cache()

    def reload(self, weights):
        """In the place of a push."""
        worker = self.llm.llm_engine.model_executor.driver_worker.worker
        worker.model_runner.reload_weights(weights_iterator=iter(list(weights)))
        self.llm.reset_prefix_cache()


@contextmanager
def stack(folder, name="openrlhf", absent=ABSENT, importing=None):
    """Inside, the stack's released package can be imported and runs here. importing: imports it, given a MonkeyPatch."""
    from vllm import LLM  # noqa: F401 (before the stand-in for Ray, of which it must see nothing)

    from rlalign.rollout.engine.embedded import EMBEDDED_ENVIRONMENT

    os.environ.update(EMBEDDED_ENVIRONMENT | {"VLLM_CPU_KVCACHE_SPACE": "1", "RAY_ADDRESS": "none"})
    ray = Ray()
    with pytest.MonkeyPatch.context() as patch:
        for method in ("set_device", "empty_cache", "synchronize", "manual_seed_all"):
            patch.setattr(torch.cuda, method, lambda *_: None)
        patch.setattr(torch.cuda, "current_device", lambda: Device("cpu"))
        mesh = dist.device_mesh.init_device_mesh
        patch.setattr(dist.device_mesh, "init_device_mesh", lambda _, *args, **kwargs: mesh("cpu", *args, **kwargs))
        patch.setattr(lines, "_ray_get", lambda: ray.get)

        def with_stand_ins():
            sys.modules["ray"] = ray
            (importing or _import_openrlhf)(patch)

        with released(name, folder, absent=absent, importing=with_stand_ins):
            start_group()
            yield
    if dist.is_initialized():
        dist.destroy_process_group()


def _import_openrlhf(patch):
    from openrlhf.trainer.ppo_utils import experience_maker, samples_generator  # noqa: F401
    from openrlhf.trainer.ray import launcher, ppo_actor, vllm_engine
    from openrlhf.utils.deepspeed import deepspeed as strategies

    from rlalign.integrations import openrlhf as adapter

    patch.setattr(adapter, "version", lambda _: VERSIONS["openrlhf"])  # the wheel's metadata are beside its packages
    for module, names in ((launcher, ("ReferenceModelActor",)), (ppo_actor, ("PolicyModelActor",))):
        for each in names:
            patch.setattr(module, each, getattr(module, each))
    patch.setattr(vllm_engine, "RolloutRayActor", vllm_engine.RolloutRayActor)
    engines = SimpleNamespace(
        __version__=vllm_engine.vllm.__version__, AsyncEngineArgs=vllm_engine.vllm.AsyncEngineArgs
    )
    patch.setattr(vllm_engine, "vllm", SimpleNamespace(**vars(engines), AsyncLLMEngine=Batching))
    patch.setattr(vllm_engine, "PlacementGroupSchedulingStrategy", lambda **_: None)
    patch.setattr(ppo_actor.ActorPPOTrainer, "broadcast_to_vllm", _reload)
    config = strategies.get_train_ds_config

    def on_cpu(*args, **kwargs):
        made = config(*args, **kwargs)
        made["zero_optimization"] = {
            "stage": made["zero_optimization"]["stage"]
        }  # its "auto" are transformers' to fill in
        made.get("optimizer", {}).get("params", {})["torch_adam"] = True  # the fused one is a CUDA kernel
        return made

    patch.setattr(strategies, "get_train_ds_config", on_cpu)


def _reload(trainer):
    for handle in trainer.vllm_engines:
        handle.actor.llm.reload(trainer.actor.model.module.named_parameters())


class Settings(SimpleNamespace):
    """Of OpenRLHF, whose parser is no function: what is not said is None."""

    def __getattr__(self, name):
        return None


class OpenRLHF:
    """Its policy actor, sampler and experience maker around the engine that create_vllm_engines starts."""

    def __init__(self, folder, *, prompts, group, tokens, temperature=1.0, lr=3e-4, steps=100, **changes):
        from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker
        from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator
        from openrlhf.trainer.ray import ppo_actor, vllm_engine
        from openrlhf.utils import get_strategy, get_tokenizer

        self.args = openrlhf_settings(prompts=prompts, group=group, temperature=temperature, lr=lr)
        for path, value in changes.items():
            at, _, name = path.rpartition("__")
            setattr(self.args if not at else getattr(self.args, at), name, value)
        strategy = get_strategy(self.args)
        self.engines = vllm_engine.create_vllm_engines(
            1, 1, str(folder), 0, False, True, True, 128, shared_pg=object(), logprobs_mode=self.args.logprobs_mode
        )
        self.llm = self.engines[0].actor.llm.llm
        self.actor = ppo_actor.PolicyModelActor.options(num_gpus=1).remote(1, 0, None, None).actor
        self.actor.init_model_from_pretrained(strategy, str(folder), steps, self.engines)
        tokenizer = get_tokenizer(str(folder), None, "left", strategy)
        group_of_one = SimpleNamespace(
            async_run_method_batch=lambda method_name, **data: [
                self.actor.execute_batch(method_name, data, 0, len(next(iter(data.values()))))
            ],
            async_run_method=lambda method_name, **given: [getattr(self.actor, method_name)(**given)],
        )
        control = SimpleNamespace(value=0.0)
        self.maker = RemoteExperienceMaker(group_of_one, None, None, None, control, strategy, tokenizer)
        self.sampler = SamplesGenerator(strategy, None, None, tokenizer, self.engines)
        self.generate = {"temperature": temperature, "top_p": 1.0, "max_new_tokens": tokens, "max_len": 128}

    def step(self, prompts, answers):
        """Sample, score, one update: (experience, what the actor's fit returned)."""
        self.sampler.prompts_dataloader = [(None, prompts, answers, [None] * len(prompts))]
        self.sampler._dataloader_iter = None
        samples, *_ = self.sampler.generate_samples(**self.generate)
        for each in samples:
            text = self.maker.tokenizer.decode(
                each.sequences[0][1:][each.action_mask[0].bool()], skip_special_tokens=True
            )
            each.rewards = torch.tensor([float(text.strip() == each.labels[0]) - 0.01 * len(text)])
            each.info["reward"] = each.rewards
        (experience,) = self.maker.make_experience_batch(samples)
        self.actor.append(experience)
        return experience, self.actor.fit()

    def push(self):
        self.actor.broadcast_to_vllm()


def openrlhf_settings(*, prompts, group, temperature, lr):
    rows = prompts * group
    adam = Settings(lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    return Settings(
        local_rank=-1, logprobs_mode="processed_logprobs", logger=Settings(), data=Settings(),
        reward=Settings(clip_range=(-10, 10)),
        train=Settings(seed=0, micro_batch_size=rows, batch_size=rows, max_epochs=1, colocate_all=True),
        ds=Settings(
            zero_stage=2, param_dtype="bf16", attn_implementation="sdpa", lora=Settings(rank=0), tensor_parallel_size=1,
            ring_attn_size=1, deepcompile=False, use_universal_ckpt=False,
        ),
        actor=Settings(
            optim="adam", adam=adam, muon=Settings(), lr_scheduler="constant", lr_warmup_ratio=0.0, max_norm=1.0,
            eps_clip_low_high=(0.2, 0.2), loss_agg_mode="token-mean", policy_loss_type="ppo", aux_loss_coef=0.0,
        ),
        algo=Settings(
            advantage=Settings(
                estimator="group_norm", gamma=1.0, is_correction_level="token", is_correction_mode="clip",
                is_correction_gating="ratio", is_correction_threshold=(0.5, 5.0),
            ),
            kl=Settings(use_loss=False, init_coef=0.0),
        ),
        rollout=Settings(
            temperature=temperature, top_p=1.0, n_samples_per_prompt=group, micro_batch_size=rows, batch_size=prompts,
        ),
        vllm=Settings(sync_backend="nccl"), ckpt=Settings(path="none"),
    )  # fmt: skip
