"""Policy: the trained model in a DeepSpeed engine. Four verbs: score, forward_backward, optim_step, named_weights."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlalign.config import AlgoConfig, TrainerConfig
from rlalign.trainer.head_mirror import HeadStatus, Tokens, mirror
from rlalign.types import RolloutBatch, TrainBatch
from rlalign.weights import MASTER_WEIGHT

LossFunction = Callable[[Tensor, TrainBatch], tuple[Tensor, dict[str, float]]]


class Policy:
    """The policy being trained. `version` counts completed optimizer steps; the initial weights are version 0."""

    def __init__(
        self,
        model: Path,
        config: TrainerConfig,
        algo: AlgoConfig,
        *,
        dtype: str,
        head_dtype: str,
        temperature: float,
        seed: int,
    ) -> None:
        """Load a Hugging Face folder and hand it to DeepSpeed.

        dtype: the body's; bfloat16 trains with an fp32 master copy. temperature: divides the logits, as in the rollouts.
        """
        torch.manual_seed(seed)
        if config.threads:
            torch.set_num_threads(config.threads)
        _init_distributed()
        if torch.distributed.get_world_size() > 1:
            raise RuntimeError(
                f"{torch.distributed.get_world_size()} trainer ranks were launched; this release trains on one rank only, "
                "since the loss denominator is counted on it. Start one process."
            )
        self.temperature = temperature
        self._config = config
        network = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
        network.config.use_cache = False
        self.reference = _frozen_copy(network, head_dtype, config) if algo.kl_coef > 0 else None
        self.head: HeadStatus = mirror(network, head_dtype=head_dtype, chunk=config.logprob_chunk)
        optimizer = torch.optim.AdamW(
            network.parameters(), lr=algo.lr, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / algo.warmup_steps) if algo.warmup_steps else 1.0
        )
        self._engine, *_ = deepspeed.initialize(
            model=network, optimizer=optimizer, lr_scheduler=schedule, config=_deepspeed_config(config, dtype)
        )
        self.version = 0
        self._refresh_master()

    @property
    def network(self) -> torch.nn.Module:
        """The transformers model inside the engine."""
        return self._engine.module

    @torch.no_grad()
    def score(self, batch: RolloutBatch) -> tuple[Tensor, Tensor]:
        """Logprobs and entropies [B, L] float32 on CPU of the sampled tokens under the current weights; 0.0 elsewhere."""
        self.network.eval()
        scored = [self._score(self.network, rows, exact=True) for rows in self._micro_batches(batch)]
        return torch.cat([logprobs.cpu() for logprobs, _ in scored]), torch.cat(
            [entropy.cpu() for _, entropy in scored]
        )

    @torch.no_grad()
    def score_reference(self, batch: RolloutBatch) -> Tensor | None:
        """[B, L] float32 logprobs under the initial weights; None when no KL penalty was asked for."""
        if self.reference is None:
            return None
        return torch.cat(
            [self._score(self.reference, rows, exact=True)[0].cpu() for rows in self._micro_batches(batch)]
        )

    @torch.no_grad()
    def hidden_states(self, batch: RolloutBatch) -> Tensor:
        """[B, L, D] in the body's dtype: what the lm_head is given."""
        self.network.eval()
        return self._hidden(self.network, batch)

    def forward_backward(self, batch: TrainBatch, loss_function: LossFunction) -> dict[str, float]:
        """Accumulate the gradient of one optimizer step. Returns the sum over micro-batches of each of the loss's metrics.

        The loss must be normalised by `batch.num_tokens`, the count over the whole step; micro-batches then simply add up.
        Raises RuntimeError for a loss that is not finite, before any gradient reaches the optimizer.
        """
        self.network.train()
        size = self._config.micro_batch_size
        totals: dict[str, float] = {}
        for start in range(0, len(batch.rollouts), size):
            rows = batch.rows(slice(start, start + size))
            logprobs_BL, _ = self._score(self.network, rows.rollouts, exact=False)
            loss, metrics = loss_function(logprobs_BL, rows)
            if not torch.isfinite(loss):
                raise RuntimeError(_describe_bad_loss(loss, logprobs_BL, rows, start))
            self._engine.set_gradient_accumulation_boundary(start + size >= len(batch.rollouts))
            self._engine.backward(loss)
            for name, value in metrics.items():
                totals[name] = totals.get(name, 0.0) + float(value)
        return totals

    def optim_step(self) -> dict[str, float]:
        """Apply the accumulated gradient; the policy's version grows by one."""
        lr = self._engine.get_lr()[0]
        self._engine.set_gradient_accumulation_boundary(True)
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        self.version += 1
        self._refresh_master()
        found = {"lr": float(lr)}
        return found if norm is None else found | {"grad_norm": float(norm)}  # stage 0 clips by it and does not tell it

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Hugging Face names and full tensors, a tied weight once: what the rollout engine must load.

        With head_dtype=master the unrounded fp32 lm_head comes too, as MASTER_WEIGHT.
        """
        yield from self.network.named_parameters()
        if self.head.master_VD is not None:
            yield MASTER_WEIGHT, self.head.master_VD

    def save(self, directory: Path) -> None:
        """Write an ordinary Hugging Face folder."""
        self.network.save_pretrained(directory)

    def close(self) -> None:
        """Release DeepSpeed's buffers. The process group stays: an embedded vLLM may still hold the same one."""
        self._engine.destroy()

    def _refresh_master(self) -> None:
        """With head_dtype=master, fetch the fp32 lm_head from the optimizer. Collective: its shards lie on all ranks."""
        if self.head.dtype != "master":
            return
        weight = self.network.get_output_embeddings().weight
        self.head.master_VD = None  # the old one must go first: one copy at a time
        master_VD = safe_get_full_fp32_param(weight)
        if master_VD is None:
            raise RuntimeError(
                f"head_dtype=master: DeepSpeed {deepspeed.__version__} keeps no fp32 master of {self.head.name}.weight "
                f"({weight.dtype}); train it in bfloat16 with ZeRO stage 1 or higher, or run with head_dtype=float32"
            )
        self.head.master_VD = master_VD.detach()

    def _micro_batches(self, batch: RolloutBatch) -> Iterator[RolloutBatch]:
        size = self._config.micro_batch_size
        return (batch.rows(slice(start, start + size)) for start in range(0, len(batch), size))

    def _hidden(self, network: torch.nn.Module, batch: RolloutBatch) -> Tensor:
        device = self._engine.device
        body = network.base_model(
            input_ids=batch.token_ids_BL.to(device), attention_mask=batch.attention_mask_BL.to(device), use_cache=False
        )
        return body.last_hidden_state

    def _score(self, network: torch.nn.Module, batch: RolloutBatch, *, exact: bool) -> tuple[Tensor, Tensor]:
        device = self._engine.device
        tokens = Tokens(batch.token_ids_BL.to(device), batch.loss_mask_BL.to(device), self.temperature)
        return network.get_output_embeddings()(self._hidden(network, batch), tokens, exact=exact)


def _frozen_copy(network: torch.nn.Module, head_dtype: str, config: TrainerConfig) -> torch.nn.Module:
    import copy

    reference = copy.deepcopy(network).requires_grad_(False).eval()
    mirror(reference, head_dtype=head_dtype, chunk=config.logprob_chunk)
    return reference


def _deepspeed_config(config: TrainerConfig, dtype: str) -> dict[str, object]:
    return {
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": 1,  # boundaries are set by hand: the number of micro-batches follows the data
        "gradient_clipping": config.grad_clip,
        "zero_optimization": {"stage": config.zero_stage},
        "zero_allow_untested_optimizer": True,  # torch.optim.AdamW: DeepSpeed's own would compile a C++ kernel for a minute
        "bf16": {"enabled": dtype == "bfloat16"},
        "steps_per_print": 2**31 - 1,
    }


def _init_distributed() -> None:
    """Join the process group of the launcher, of an embedded vLLM, or make one of a single rank when there is neither."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = (
            False  # compiles for a minute and is no faster than gloo here
        )
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    # DeepSpeed 0.19.8 remembers the groups of an earlier engine, also after an embedded vLLM has destroyed them.
    deepspeed.utils.groups._release_process_group_references()


def _describe_bad_loss(loss: Tensor, logprobs_BL: Tensor, batch: TrainBatch, first_row: int) -> str:
    bad = (~torch.isfinite(logprobs_BL) & batch.correction.keep.to(logprobs_BL.device)).nonzero()
    where = "the logprobs are finite: look at rewards, advantages and correction weights"
    if len(bad):
        row, position = bad[0].tolist()
        token = int(batch.rollouts.token_ids_BL[row, position])
        where = f"{len(bad)} logprobs are not, the first at sequence {first_row + row}, position {position}, token id {token}"
    return f"the loss is {loss.item()}; {where}. No gradient was applied and no weights were published."
