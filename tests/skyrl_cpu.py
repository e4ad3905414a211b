"""SkyRL's released FSDP worker and trainer on one CPU process; stack_cpu.py says what stands for Ray, CUDA and the push."""

import asyncio
import typing
from contextlib import contextmanager
from types import SimpleNamespace

import typing_extensions

from tests import stack_cpu

ABSENT = ("flash_attn", "jaxtyping", "loguru", "polars", "torchdata", "skyrl_gym")


@contextmanager
def stack(folder):
    """Inside, the released package can be imported and runs here."""
    with stack_cpu.stack(folder, "skyrl", ABSENT, _importing):
        yield


def _importing(patch):
    patch.setattr(typing, "TypedDict", typing_extensions.TypedDict)  # without it SkyRL imports from Python 3.12 on only
    from skyrl.backends.skyrl_train.distributed import fsdp_utils
    from skyrl.backends.skyrl_train.workers.fsdp import fsdp_worker
    from skyrl.train import trainer
    from skyrl.train.utils import ray_logging

    patch.setattr(ray_logging, "redirect_actor_output_to_file", lambda: None)
    patch.setattr(fsdp_utils, "_sync_non_persistent_buffers", lambda *_: None)  # between ranks, by way of .cuda()
    patch.setattr(trainer, "get_sampling_params_for_backend", trainer.get_sampling_params_for_backend)
    patch.setattr(trainer.RayPPOTrainer, "_build_train_dataloader_and_compute_training_steps", lambda _: None)
    patch.setattr(
        fsdp_worker.FSDPWeightExtractor, "_gather_tensor", lambda _, t: getattr(t, "full_tensor", lambda: t)()
    )


class SkyRL:
    """Its FSDP policy worker and what RayPPOTrainer does in a step, around an engine with its worker extension."""

    def __init__(self, folder, *, aligned, prompts, group, tokens, temperature=1.0, lr=3e-4, steps=100, **overrides):
        from skyrl.backends.skyrl_train.inference_servers.new_inference_worker_wrap import (
            VLLM_NEW_INFERENCE_WORKER_EXTENSION_CLS,
        )
        from skyrl.backends.skyrl_train.workers.fsdp import fsdp_worker
        from skyrl.train.config import SkyRLTrainConfig
        from skyrl.train.trainer import RayPPOTrainer
        from transformers import AutoTokenizer
        from vllm import LLM

        from rlalign.integrations import skyrl as adapter
        from rlalign.integrations.ray_actors import plain

        rows = prompts * group
        asked = {
            "trainer.policy.model.path": folder, "trainer.flash_attn": False, "trainer.gradient_checkpointing": False,
            "trainer.train_batch_size": prompts, "trainer.policy_mini_batch_size": prompts,
            "trainer.policy.optimizer_config.lr": lr,
            "trainer.micro_train_batch_size_per_gpu": rows, "trainer.micro_forward_batch_size_per_gpu": rows,
            "trainer.remove_microbatch_padding": False, "trainer.algorithm.use_kl_loss": False,
            "trainer.policy.use_torch_compile": False, "trainer.placement.colocate_all": False,
            "trainer.placement.policy_num_gpus_per_node": 1, "generator.inference_engine.enable_ray_prometheus_stats": False,
            "generator.n_samples_per_prompt": group,
            "generator.sampling_params.temperature": temperature, "generator.sampling_params.max_generate_length": tokens,
        }  # fmt: skip
        self.cfg = cfg = SkyRLTrainConfig.from_cli_overrides(asked | overrides)
        worker, trainer = plain(fsdp_worker.PolicyWorker), RayPPOTrainer
        if aligned:
            adapter.configure(cfg)
            worker, trainer = adapter.aligned(worker), adapter.comparing(trainer)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.worker = worker(
            cfg=cfg.trainer, world_size=1, rank=0, local_rank=0, master_addr="127.0.0.1", master_port=None,
            sequence_parallel_size=1,
        )  # fmt: skip
        self.worker.init_worker_process_group()
        self.worker.init_model(str(folder), num_training_steps=steps)
        engine = {"dtype": "bfloat16"} | cfg.generator.inference_engine.engine_init_kwargs
        self.llm = LLM(
            str(folder), worker_extension_cls=VLLM_NEW_INFERENCE_WORKER_EXTENSION_CLS, **stack_cpu.SIZES, **engine
        )
        self.client = SimpleNamespace(server_urls=[self.llm], data_parallel_size=1, reset_prefix_cache=self._reset)
        self.worker.weight_extractor = fsdp_worker.FSDPWeightExtractor(self.worker.model.model)
        self.worker._transfer_strategy_cls = self.worker._weight_transfer_sender = SimpleNamespace(
            send_chunks=self._send
        )
        self.trainer = trainer(cfg, None, self.tokenizer, None, self.client, None)
        self.trainer.dispatch = SimpleNamespace(
            get_lcm_dp_size=lambda: 1, empty_cache=lambda *_: None, optim_step=lambda _: self.worker.optim_step(),
            forward=lambda _, data: self.worker.forward(data), stage_data=lambda _, data, parts: [data[a:b] for a, b in parts],
            forward_from_staged=lambda _, chunk: self.worker.forward(chunk),
            forward_backward_from_staged=lambda _, chunk: self.worker.forward_backward(chunk),
        )  # fmt: skip

    async def _reset(self, **_):
        self.llm.reset_prefix_cache()

    async def _send(self, chunks, **_):
        stack_cpu.Batching(self.llm).reload(
            (n, t) for chunk in chunks for n, t in zip(chunk.names, chunk.tensors, strict=True)
        )

    def step(self, prompts, answers):
        """Sample, score, one update: (training batch, what the trainer logs)."""
        from skyrl.train import trainer as trainers
        from vllm import SamplingParams

        group, trainer = self.cfg.generator.n_samples_per_prompt, self.trainer
        params = SamplingParams(**trainers.get_sampling_params_for_backend("vllm", self.cfg.generator.sampling_params))
        given = [{"prompt_token_ids": self.tokenizer(p)["input_ids"]} for p in prompts for _ in range(group)]
        outputs = self.llm.generate(given, params, use_tqdm=False)
        responses = [o.outputs[0] for o in outputs]
        wanted = [answer for answer in answers for _ in range(group)]
        scores = [float(r.text.strip() == a) - 0.01 * len(r.text) for r, a in zip(responses, wanted, strict=True)]
        ids = [list(r.token_ids) for r in responses]
        made = {
            "prompt_token_ids": [o.prompt_token_ids for o in outputs], "response_ids": ids,
            "rewards": [[0.0] * (len(i) - 1) + [s] for i, s in zip(ids, scores, strict=True)],
            "loss_masks": [[1] * len(i) for i in ids],
            "rollout_logprobs": [[e[t].logprob for e, t in zip(r.logprobs, r.token_ids, strict=True)] for r in responses],
        }  # fmt: skip
        trainer.all_metrics = {}
        batch = trainer.convert_to_training_input(made, [str(i // group) for i in range(len(ids))])
        batch = trainer.compute_advantages_and_returns(trainer.fwd_logprobs_values_reward(batch))
        batch.pop("rewards")
        batch.metadata.pop("uids")
        trainer.train_critic_and_policy(batch)
        trainer.global_step += 1
        return batch, trainer.all_metrics

    def push(self):
        asyncio.run(self.worker.broadcast_to_inference_engines(self.client, self.cfg.generator.inference_engine))
