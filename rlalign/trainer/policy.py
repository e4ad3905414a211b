"""Policy: the trained model in a DeepSpeed engine. Four verbs: score, forward_backward, optim_step, named_weights.

Every rank calls every verb with the whole batch, works on its own share of the sequences, and gets the whole result back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor

from rlalign import ranks
from rlalign.config import AlgoConfig, TrainerConfig
from rlalign.trainer import deepspeed_setup, packing
from rlalign.trainer.checkpoint_names import as_checkpoint, named_weights
from rlalign.trainer.forced_experts import ForcedExperts
from rlalign.trainer.head_mirror import HeadStatus, mirror
from rlalign.trainer.network import ScoringNetwork, load, padded_inputs
from rlalign.trainer.passes import LossFunction, Passes
from rlalign.trainer.rounding.mirroring import BodyPlan, MirroredBody, body_of
from rlalign.types import RolloutBatch, TrainBatch
from rlalign.weights import MASTER_WEIGHT

if TYPE_CHECKING:
    from rlalign.logprobs.truncation import Found
    from rlalign.trainer.lora import Adapters


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
        exact: bool = False,
        mirrored: BodyPlan | None = None,
        replay_experts: str = "off",
    ) -> None:
        """Load a Hugging Face folder and hand it to DeepSpeed.

        dtype: the body's; bfloat16 trains with an fp32 master copy. temperature: divides the logits, as in the rollouts. exact: as
        `rlalign.head.exact` computes, bit for bit what an exact engine does. mirrored: the roundings of a steady engine,
        which the body then follows (`rlalign.trainer.rounding`). replay_experts: all or known, for batches that carry the
        experts the engine chose (`ForcedExperts`).
        """
        torch.manual_seed(seed)
        if config.threads:
            torch.set_num_threads(config.threads)
        deepspeed_setup.join_process_group()
        self._config, self._lr = config, algo.lr
        settings = deepspeed_setup.deepspeed_settings(config, dtype)
        form = {"exact": exact, "attention": config.attention, "packed": config.pack_tokens > 0, "mirrored": mirrored}
        network = load(model, dtype, settings, checkpointing=config.gradient_checkpointing, **form)
        tiles = {"chunk": config.logprob_chunk, "keep_mib": config.logprob_keep_mib}
        self.head: HeadStatus = mirror(network, head_dtype=head_dtype, **tiles)
        experts = ForcedExperts.asked(network, replay_experts)
        self._adapters = _adapters(network, config, model, seed) if config.lora.rank else None
        self._needs_reference = algo.needs_reference
        needs_copy = algo.needs_reference and self._adapters is None
        self._reference = _Reference(model, config, dtype, head_dtype, exact, mirrored) if needs_copy else None
        scoring = ScoringNetwork(network)
        trained = [parameter for parameter in scoring.parameters() if parameter.requires_grad]
        optimizer = deepspeed_setup.adamw(trained, config, lr=algo.lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / algo.warmup_steps) if algo.warmup_steps else 1.0
        )
        self._engine, *_ = deepspeed.initialize(
            model=scoring, optimizer=optimizer, lr_scheduler=schedule, config=settings
        )
        self._passes = Passes(
            config=config,
            device=self._engine.device,
            attention=network.config._attn_implementation,
            temperature=temperature,
            experts=experts,
        )
        self.version = 0
        self._refresh_master()
        self.head.prove(network.get_output_embeddings(), self.device)
        if config.pack_tokens:
            self._engine.eval()
            packing.confirm(network, lambda inputs: self._engine(inputs, None), self.device)

    @property
    def attention(self) -> str:
        """The body's attention implementation, by transformers' name for it or ours."""
        return self._passes.attention

    @property
    def body(self) -> MirroredBody | None:
        """How the body follows the engine's roundings; None where it rounds as transformers does."""
        return body_of(self.network)

    @property
    def network(self) -> torch.nn.Module:
        """The transformers model inside the engine; under ZeRO-3 its parameters are shards."""
        return self._engine.module.network

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return self._engine.device

    def score(self, batch: RolloutBatch) -> tuple[Tensor, Tensor]:
        """Logprobs and entropies [B, L] float32 on CPU of the sampled tokens under the current weights; 0.0 elsewhere.

        Over `batch.kept` where the spec is truncated; ValueError where that is not known (see `score_truncated`).
        """
        self._require_routes(batch)
        self._engine.eval()
        logprobs_BL, entropy_BL = self._passes.score(self._engine, batch, columns=2)
        return logprobs_BL, entropy_BL

    def score_truncated(self, batch: RolloutBatch) -> tuple[Tensor, Tensor, Found]:
        """`score` of tokens sampled over top-p, top-k or min-p: finds the kept sets first, and returns them third.

        Sets that the engine captured have the last word; the trainer's own, under the current weights, stand in where there are
        none. A set beyond `truncation.LIMIT` ids is left empty and its token scored 0.0: take it out of the loss mask.
        """
        self._require_routes(batch)
        self._engine.eval()
        return self._passes.score_truncated(self._engine, batch)

    def score_reference(self, batch: RolloutBatch) -> Tensor | None:
        """[B, L] float32 logprobs under the initial weights, routed by its own gates; None when no KL penalty was asked for."""
        if not self._needs_reference:
            return None
        batch = replace(batch, routes=None)  # another model's gates: it chooses for itself
        if self._adapters is None:
            return self._passes.score(self._reference.module, batch, columns=2)[0]
        self._engine.eval()
        with self._adapters.disabled():
            return self._passes.score(self._engine, batch, columns=2)[0]

    def routes_taken(self) -> dict[str, float]:
        """Summed over the ranks, what `ForcedExperts.take` counts; empty where nothing is forced. Every rank must call it."""
        experts = self._passes.experts
        return {} if experts is None else ranks.summed({k: float(n) for k, n in experts.take().items()}, self.device)

    @torch.no_grad()
    def hidden_states(self, batch: RolloutBatch) -> Tensor:
        """[B, L, D] in the body's dtype: what the lm_head is given. Every rank computes all rows."""
        self._engine.eval()
        return self._engine(padded_inputs(batch, self.device), None)

    def forward_backward(self, batch: TrainBatch, loss_function: LossFunction) -> dict[str, float]:
        """Accumulate the gradient of one optimizer step. Returns the sum over micro-batches and ranks of the loss's metrics.

        The loss must be normalised by `batch.num_tokens`, the count over the whole step; micro-batches and ranks then simply
        add up. Raises RuntimeError on every rank for a loss that is not finite on one, before any gradient reaches the optimizer.
        """
        self._require_routes(batch.rollouts)
        return self._passes.accumulate(self._engine, batch, loss_function)

    def optim_step(self) -> dict[str, float]:
        """Apply the accumulated gradient; the policy's version grows by one."""
        found = deepspeed_setup.take_step(self._engine)
        self.version += 1
        self._refresh_master()
        return found

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """A checkpoint's names and full tensors, a tied weight once: what the rollout engine must load. All ranks must iterate.

        With head_dtype=master the unrounded fp32 lm_head comes too, as MASTER_WEIGHT.
        """
        whole = self._whole_weights()
        yield from as_checkpoint(self.network, whole) if ranks.rank() == 0 else whole
        if self.head.master_VD is not None:
            yield MASTER_WEIGHT, self.head.master_VD

    def save(self, directory: Path) -> None:
        """Write an ordinary Hugging Face folder, from rank 0; adapters merged, and apart inside it. Every rank must call it."""
        whole = dict(self._whole_weights())
        ranks.on_first(lambda: self.network.save_pretrained(directory, state_dict=whole))
        if self._adapters is not None:
            self._adapters.save(directory)

    def save_state(self, folder: Path) -> None:
        """Everything training goes on from: trained weights, optimizer, schedule, version. Every rank must call it."""
        state, frozen = {"version": self.version}, self._adapters is not None
        self._engine.save_checkpoint(
            folder, tag=deepspeed_setup.STATE_TAG, client_state=state, exclude_frozen_parameters=frozen
        )

    def load_state(self, folder: Path) -> None:
        """Continue from `save_state`; the version goes back with the weights. Raises RuntimeError when DeepSpeed finds none."""
        whole = self._adapters is None
        state = deepspeed_setup.load_checkpoint(self._engine, folder, self._config, lr=self._lr, strict=whole)
        if state is None:
            raise RuntimeError(f"{folder}: DeepSpeed found no state to load there")
        self.version = state["version"]
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

    def _require_routes(self, batch: RolloutBatch) -> None:
        if self._passes.experts is not None:
            self._passes.experts.require(batch)

    def _whole_weights(self) -> Iterator[tuple[str, Tensor]]:
        return named_weights(self.network, self.network, keep=ranks.rank() == 0)

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


def _adapters(network: torch.nn.Module, config: TrainerConfig, model: Path, seed: int) -> Adapters:
    try:
        from rlalign.trainer.lora import Adapters
    except ModuleNotFoundError as error:
        if error.name != "peft":
            raise
        raise ValueError(f"trainer.lora.rank={config.lora.rank} needs peft: pip install 'rlalign[lora]'") from error
    return Adapters(network, config.lora, model=model, seed=seed)


class _Reference:
    """The initial policy, frozen, for the KL penalty: partitioned like the policy under ZeRO-3, whole on every rank otherwise."""

    def __init__(
        self, model: Path, config: TrainerConfig, dtype: str, head_dtype: str, exact: bool, mirrored: BodyPlan | None
    ) -> None:
        settings = deepspeed_setup.deepspeed_settings(config, dtype)
        form = {"exact": exact, "attention": config.attention, "packed": config.pack_tokens > 0, "mirrored": mirrored}
        network = load(model, dtype, settings, checkpointing=False, **form).requires_grad_(False)
        mirror(network, head_dtype=head_dtype, chunk=config.logprob_chunk)
        self.module: torch.nn.Module = ScoringNetwork(network).eval()
        if config.zero_stage == 3:
            self._engine, *_ = deepspeed.initialize(model=self.module, config=settings)
