"""Policy: the trained model in a DeepSpeed engine. Four verbs: score, forward_backward, optim_step, named_weights.

Every rank calls every verb with the whole batch, works on its own equal share of the rows, and gets the whole result back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor

from rlalign import ranks
from rlalign.config import AlgoConfig, TrainerConfig
from rlalign.trainer.deepspeed_setup import deepspeed_settings, join_process_group
from rlalign.trainer.head_mirror import HeadStatus, Tokens, mirror
from rlalign.trainer.network import ScoringNetwork, full_weights, load
from rlalign.types import RolloutBatch, TrainBatch
from rlalign.weights import MASTER_WEIGHT

STATE_TAG = "state"  # DeepSpeed's folder inside a checkpoint
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
        join_process_group()
        self.temperature = temperature
        self._config = config
        settings = deepspeed_settings(config, dtype)
        network = load(model, dtype, settings, checkpointing=config.gradient_checkpointing)
        self.head: HeadStatus = mirror(network, head_dtype=head_dtype, chunk=config.logprob_chunk)
        self._reference = _Reference(model, config, dtype, head_dtype) if algo.kl_coef > 0 else None
        scoring = ScoringNetwork(network)
        optimizer = torch.optim.AdamW(
            scoring.parameters(), lr=algo.lr, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / algo.warmup_steps) if algo.warmup_steps else 1.0
        )
        self._engine, *_ = deepspeed.initialize(
            model=scoring, optimizer=optimizer, lr_scheduler=schedule, config=settings
        )
        self.version = 0
        self._refresh_master()

    @property
    def network(self) -> torch.nn.Module:
        """The transformers model inside the engine; under ZeRO-3 its parameters are shards."""
        return self._engine.module.network

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return self._engine.device

    @torch.no_grad()
    def score(self, batch: RolloutBatch) -> tuple[Tensor, Tensor]:
        """Logprobs and entropies [B, L] float32 on CPU of the sampled tokens under the current weights; 0.0 elsewhere."""
        self._engine.eval()
        share = batch.rows(ranks.share_of(len(batch), "sequences"))
        scored = [self._score(self._engine, rows, exact=True) for rows in self._micro_batches(share)]
        logprobs, entropies = (torch.cat(parts) for parts in zip(*scored, strict=True))
        return ranks.gathered(logprobs, self._engine.device), ranks.gathered(entropies, self._engine.device)

    @torch.no_grad()
    def score_reference(self, batch: RolloutBatch) -> Tensor | None:
        """[B, L] float32 logprobs under the initial weights; None when no KL penalty was asked for."""
        if self._reference is None:
            return None
        share = batch.rows(ranks.share_of(len(batch), "sequences"))
        scored = [self._score(self._reference.module, rows, exact=True)[0] for rows in self._micro_batches(share)]
        return ranks.gathered(torch.cat(scored), self._engine.device)

    @torch.no_grad()
    def hidden_states(self, batch: RolloutBatch) -> Tensor:
        """[B, L, D] in the body's dtype: what the lm_head is given. Every rank computes all rows."""
        self._engine.eval()
        device = self._engine.device
        return self._engine(batch.token_ids_BL.to(device), batch.attention_mask_BL.to(device), None)

    def forward_backward(self, batch: TrainBatch, loss_function: LossFunction) -> dict[str, float]:
        """Accumulate the gradient of one optimizer step. Returns the sum over micro-batches and ranks of the loss's metrics.

        The loss must be normalised by `batch.num_tokens`, the count over the whole step; micro-batches and ranks then simply
        add up. Raises RuntimeError on every rank for a loss that is not finite on one, before any gradient reaches the optimizer.
        """
        self._engine.train()
        share = batch.rows(ranks.share_of(len(batch.rollouts), "sequences"))
        size, device = self._config.micro_batch_size, self._engine.device
        totals: dict[str, float] = {}
        for start in range(0, len(share.rollouts), size):
            rows = share.rows(slice(start, start + size))
            logprobs_BL, _ = self._score(self._engine, rows.rollouts, exact=False)
            loss, metrics = loss_function(logprobs_BL, rows)
            if ranks.any_of(not bool(torch.isfinite(loss)), device):
                raise RuntimeError(_describe_bad_loss(loss, logprobs_BL, rows, start))
            self._engine.set_gradient_accumulation_boundary(start + size >= len(share.rollouts))
            self._engine.backward(loss * ranks.world_size())  # DeepSpeed averages gradients over the ranks
            for name, value in metrics.items():
                totals[name] = totals.get(name, 0.0) + float(value)
        return ranks.summed(totals, device)

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
        """Hugging Face names and full tensors, a tied weight once: what the rollout engine must load. All ranks must iterate.

        With head_dtype=master the unrounded fp32 lm_head comes too, as MASTER_WEIGHT.
        """
        yield from full_weights(self.network, keep=ranks.rank() == 0)
        if self.head.master_VD is not None:
            yield MASTER_WEIGHT, self.head.master_VD

    def save(self, directory: Path) -> None:
        """Write an ordinary Hugging Face folder, from rank 0. Every rank must call it."""
        whole = dict(full_weights(self.network, keep=ranks.rank() == 0))
        ranks.on_first(lambda: self.network.save_pretrained(directory, state_dict=whole))

    def save_state(self, folder: Path) -> None:
        """Everything training goes on from: weights, optimizer, schedule, random states, version. Every rank must call it."""
        self._engine.save_checkpoint(
            folder, tag=STATE_TAG, client_state={"version": self.version, "torch_rng": torch.get_rng_state()}
        )

    def load_state(self, folder: Path) -> None:
        """Continue from `save_state`; the version goes back with the weights. Raises RuntimeError when DeepSpeed finds none."""
        path, state = self._engine.load_checkpoint(folder, tag=STATE_TAG)
        if path is None:
            raise RuntimeError(f"{folder}: DeepSpeed found no state to load there")
        self.version = state["version"]
        torch.set_rng_state(state["torch_rng"])
        self._refresh_master()

    @contextmanager
    def whole_head(self) -> Iterator[None]:
        """Inside, the lm_head's parameters are whole on every rank. Use its `forward`: calling it would partition them again."""
        head = self.network.get_output_embeddings()
        with deepspeed.zero.GatheredParameters(list(head.parameters()), enabled=self._config.zero_stage == 3):
            yield

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

    def _score(self, module: torch.nn.Module, batch: RolloutBatch, *, exact: bool) -> tuple[Tensor, Tensor]:
        device = self._engine.device
        token_ids, attention = batch.token_ids_BL.to(device), batch.attention_mask_BL.to(device)
        tokens = Tokens(token_ids, batch.loss_mask_BL.to(device), self.temperature)
        return module(token_ids, attention, tokens, exact=exact)


class _Reference:
    """The initial policy, frozen, for the KL penalty: partitioned like the policy under ZeRO-3, whole on every rank otherwise."""

    def __init__(self, model: Path, config: TrainerConfig, dtype: str, head_dtype: str) -> None:
        settings = deepspeed_settings(config, dtype)
        network = load(model, dtype, settings, checkpointing=False).requires_grad_(False)
        mirror(network, head_dtype=head_dtype, chunk=config.logprob_chunk)
        self.module: torch.nn.Module = ScoringNetwork(network).eval()
        if config.zero_stage == 3:
            self._engine, *_ = deepspeed.initialize(model=self.module, config=settings)


def _describe_bad_loss(loss: Tensor, logprobs_BL: Tensor, batch: TrainBatch, first_row: int) -> str:
    if bool(torch.isfinite(loss)):
        return "the loss of another rank is not finite; its message says where. No gradient was applied, no weights were published."
    bad = (~torch.isfinite(logprobs_BL) & batch.correction.keep.to(logprobs_BL.device)).nonzero()
    where = "the logprobs are finite: look at rewards, advantages and correction weights"
    if len(bad):
        row, position = bad[0].tolist()
        token = int(batch.rollouts.token_ids_BL[row, position])
        where = f"{len(bad)} logprobs are not, the first at sequence {first_row + row}, position {position}, token id {token}"
    return f"the loss is {loss.item()}; {where}. No gradient was applied and no weights were published."
