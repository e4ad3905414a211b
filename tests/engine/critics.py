"""A few optimizer steps of a critic: in real DeepSpeed, on any number of ranks, and in a plain torch loop.

`torchrun -m tests.engine.critics MODEL FOLDER` runs the multi-rank cases and leaves rank 0's results in FOLDER.
"""

import sys
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModel

from rlalign.config import AlgoConfig, CriticConfig, TrainerConfig
from rlalign.objective import choice, corrections
from rlalign.types import TrainBatch
from tests.engine.updates import ROWS, STEPS, flat, make_batch, save_cases

LR, CLIP = 1e-3, 0.05
CASES = {  # name -> dtype, of the trainer
    "zero1": ("float32", {"zero_stage": 1}),
    "zero3-packed": ("float32", {"zero_stage": 3, "pack_tokens": 40, "gradient_checkpointing": True}),
    "zero2-bf16": ("bfloat16", {"zero_stage": 2}),
}


def make_returns(batch):
    """What would be earned: something of the tokens, so that there is something to learn."""
    return torch.where(batch.loss_mask_BL, (batch.token_ids_BL % 7).float() / 7 - 0.2, 0.0)


def plain_loop(folder: Path) -> dict:
    """The written objective in float64: losses, gradient norms, last values, and how far every weight moved."""
    batch = make_batch()
    mask, returns = batch.loss_mask_BL, make_returns(batch).double()
    body = AutoModel.from_pretrained(folder, dtype=torch.float64)
    head = torch.nn.Linear(body.config.hidden_size, 1, dtype=torch.float64)
    torch.nn.init.zeros_(head.weight), torch.nn.init.zeros_(head.bias)
    parameters = [*body.parameters(), *head.parameters()]
    before = flat((None, p) for p in parameters)
    optimizer = torch.optim.AdamW(parameters, lr=LR, betas=(0.9, 0.95), weight_decay=0.0)

    def values():
        hidden = body(batch.token_ids_BL, attention_mask=batch.attention_mask_BL).last_hidden_state
        return torch.nn.functional.pad(head(hidden)[:, :-1, 0], (1, 0))

    norms, losses, old = [], [], values().detach()
    for _ in range(STEPS):
        new = values()
        error = torch.maximum((new - returns) ** 2, (old + (new - old).clamp(-CLIP, CLIP) - returns) ** 2)
        loss = 0.5 * error[mask].mean()
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, 1.0)))
        optimizer.step()
        losses.append(loss.item())
    moved = flat((None, p) for p in parameters) - before
    return {
        "losses": losses,
        "norms": norms,
        "values": torch.where(mask, values(), 0.0).float().detach(),
        "moved": moved,
    }


def start_critic(folder: Path, trainer: TrainerConfig, *, dtype: str = "float32"):
    from rlalign.trainer.critic import Critic

    return Critic(folder, trainer, CriticConfig(lr=LR, clip=CLIP), dtype=dtype)


def train(critic, steps: int = STEPS, old=None) -> dict:
    """The same of `steps` updates by the critic itself."""
    batch = make_batch()
    before, losses, norms = flat(critic.named_weights()), [], []
    loss = partial(choice.value_loss, algo=AlgoConfig(advantage="gae", critic=CriticConfig(clip=CLIP)))
    correction = corrections.identity(batch.rollout_logprobs_BL, batch.rollout_logprobs_BL, batch.loss_mask_BL)
    whole = TrainBatch(
        rollouts=batch,
        old_logprobs_BL=batch.rollout_logprobs_BL,
        advantages_BL=make_returns(batch),
        correction=correction,
        num_tokens=int(correction.keep.sum()),
        num_sequences=ROWS,
        values_BL=critic.values(batch) if old is None else old,
        returns_BL=make_returns(batch),
    )
    for _ in range(steps):
        losses.append(critic.forward_backward(whole, loss)["value_loss"])
        norms.append(critic.optim_step().get("grad_norm"))
    moved = flat(critic.named_weights()) - before
    return {"losses": losses, "norms": norms, "values": critic.values(batch), "moved": moved}


def run_case(folder: Path, name: str) -> dict:
    dtype, form = CASES[name]
    critic = start_critic(folder, TrainerConfig(micro_batch_size=4, **form), dtype=dtype)
    result = train(critic)
    critic.close()
    return result


def main(folder: Path, out: Path) -> None:
    save_cases(CASES, run_case, folder, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
