"""Both engines on the same tokens, outside a run: what parity and doctor share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rlalign.assemble import encode, load_task_of
from rlalign.config import RunConfig
from rlalign.types import Rollout, RolloutBatch, collate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlalign.rollout.engine import VLLMEngine


def sample(
    engine: VLLMEngine, tokenizer: PreTrainedTokenizerBase, config: RunConfig, *, prompts: int, samples: int
) -> tuple[RolloutBatch, list[Rollout]]:
    """Completions of the task's first training prompts, through the live engine."""
    chosen = load_task_of(config).train_prompts(0, min(prompts, config.task.train_size))
    rollouts = engine.generate(
        [encode(tokenizer, p.text, chat=config.task.chat_template) for p in chosen],
        prompt_ids=[p.prompt_id for p in chosen],
        samples=samples,
        seed=config.seed,
    )
    return collate(rollouts, pad_token_id=tokenizer.pad_token_id, spec=engine.spec), rollouts


def trainer_network(model: Path, body: str) -> nn.Module:
    """The transformers model in evaluation mode, with a body of this dtype."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, body)).eval()


@torch.no_grad()
def trainer_scores(
    network: nn.Module, batch: RolloutBatch, head_dtype: str, *, temperature: float
) -> tuple[Tensor, Tensor]:
    """Logprobs [B, L] and hidden states [B, L, D] of the trainer's side, with this head."""
    from rlalign.trainer.head_mirror import Tokens, mirror

    mirror(network, head_dtype=head_dtype, chunk=0)
    body = network.base_model(input_ids=batch.token_ids_BL, attention_mask=batch.attention_mask_BL, use_cache=False)
    hidden_BLD = body.last_hidden_state
    tokens = Tokens(batch.token_ids_BL, batch.loss_mask_BL, temperature)
    logprobs_BL, _ = network.get_output_embeddings()(hidden_BLD, tokens, exact=True)
    return logprobs_BL, hidden_BLD
