"""Critic: what a sequence will still earn, before each token. A body of its own under a float32 head, in its own DeepSpeed engine.

It has no lm_head, so `head_dtype` does not concern it, and vLLM never sees it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import deepspeed
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.utils import logging

from rlalign import logprobs
from rlalign.config import CriticConfig, TrainerConfig
from rlalign.trainer import deepspeed_setup, packing
from rlalign.trainer.checkpoint_names import named_weights
from rlalign.trainer.head_mirror import Tokens
from rlalign.trainer.network import ScoringNetwork, load
from rlalign.trainer.passes import LossFunction, Passes
from rlalign.types import RolloutBatch, TrainBatch

SCORE = "score.weight"  # of a reward model in transformers


class ValueHead(nn.Linear):
    """One number from the hidden state before each token, in float32 whatever the body's dtype."""

    def __init__(self, hidden_size: int, dtype: torch.dtype) -> None:
        """All zero: a new critic says 0 everywhere, and the first advantages are the rewards."""
        super().__init__(hidden_size, 1, dtype=dtype, device="cpu")
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, hidden_BLD: Tensor, tokens: Tokens, *, exact: bool = False) -> tuple[Tensor]:
        """Values [B, L] float32 of the masked tokens; 0.0 elsewhere. exact: no difference here."""
        return (logprobs.token_values(hidden_BLD, self.weight, self.bias, tokens.mask_BL),)


class ValueNetwork(nn.Module):
    """Body and value head, in the place of a causal language model inside `ScoringNetwork`."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.base_model = body
        self.value_head = ValueHead(body.config.get_text_config().hidden_size, body.dtype)

    def get_output_embeddings(self) -> nn.Module:
        return self.value_head


class Critic:
    """The critic being trained. Every rank calls every verb with the whole batch, as with the policy."""

    def __init__(self, model: Path, trainer: TrainerConfig, critic: CriticConfig, *, dtype: str) -> None:
        """Load the body of a Hugging Face folder, with a reward model's score head where it has one.

        dtype: the body's; bfloat16 trains with an fp32 master copy. Raises ValueError for a score head of several labels.
        """
        deepspeed_setup.join_process_group()
        settings = deepspeed_setup.deepspeed_settings(trainer, dtype)
        with _quiet():
            body = load(
                model, dtype, settings, checkpointing=trainer.gradient_checkpointing, attention=trainer.attention,
                packed=trainer.pack_tokens > 0, head=False,
            )  # fmt: skip
        network = ValueNetwork(body)
        if (score_1D := _score_head(model)) is not None:
            network.value_head.weight.data.copy_(score_1D)
        scoring = ScoringNetwork(network)
        self._config, self._lr = trainer, critic.lr
        optimizer = deepspeed_setup.adamw(scoring.parameters(), trainer, lr=critic.lr)
        self._engine, *_ = deepspeed.initialize(model=scoring, optimizer=optimizer, config=settings)
        attention = body.config._attn_implementation
        self._passes = Passes(config=trainer, device=self._engine.device, attention=attention)
        if trainer.pack_tokens:
            self._engine.eval()
            packing.confirm(body, lambda inputs: self._engine(inputs, None), self._engine.device)

    def values(self, batch: RolloutBatch) -> Tensor:
        """[B, L] float32 on CPU: what is still to be earned before each sampled token; 0.0 elsewhere."""
        self._engine.eval()
        return self._passes.score(self._engine, batch, columns=1)[0]

    def forward_backward(self, batch: TrainBatch, loss_function: LossFunction) -> dict[str, float]:
        """Accumulate the gradient of one optimizer step, as `Policy.forward_backward` does."""
        return self._passes.accumulate(self._engine, batch, loss_function)

    def optim_step(self) -> dict[str, float]:
        """Apply the accumulated gradient."""
        return deepspeed_setup.take_step(self._engine)

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Names and whole tensors. All ranks must iterate."""
        network = self._engine.module.network
        return named_weights(network, network)

    def save_state(self, folder: Path) -> None:
        """Weights and optimizer. Every rank must call it."""
        self._engine.save_checkpoint(folder, tag=deepspeed_setup.STATE_TAG)

    def load_state(self, folder: Path) -> None:
        """Continue from `save_state`. Raises ValueError where no critic was saved."""
        if not (folder / deepspeed_setup.STATE_TAG).is_dir():
            raise ValueError(
                f"{folder}: no critic was saved there, so its run had none; resume with algo.advantage=group, or start anew"
            )
        deepspeed_setup.load_checkpoint(self._engine, folder, self._config, lr=self._lr)

    def close(self) -> None:
        """Release DeepSpeed's buffers."""
        self._engine.destroy()


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers would report the checkpoint's own head as unexpected; it is left out on purpose."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _score_head(folder: Path) -> Tensor | None:
    """[1, D] of a reward model's folder, None of any other."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            if SCORE not in tensors.keys():  # noqa: SIM118  (safe_open is no mapping)
                continue
            score_KD = tensors.get_tensor(SCORE)
            if score_KD.shape[0] != 1:
                raise ValueError(
                    f"algo.critic.path={folder}: its score head has {score_KD.shape[0]} labels, a value is one number; give a "
                    "reward model with one label, or a language model"
                )
            return score_KD
    return None
