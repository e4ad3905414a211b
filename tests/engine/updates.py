"""A few optimizer steps on one batch: by the policy in real DeepSpeed, on any number of ranks, and by a plain torch loop.

`torchrun -m tests.engine.updates MODEL FOLDER` runs the multi-rank cases and leaves rank 0's results in FOLDER.
"""

import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from rlalign import ranks
from rlalign.config import AlgoConfig, LoraConfig, TrainerConfig
from rlalign.objective import choice, corrections
from rlalign.types import LogprobSpec, Rollout, TrainBatch, collate

STEPS, LR = 3, 1e-3
ROWS = 12
RANK_CASES = {  # name -> dtype, ZeRO stage, gradient checkpointing, KL coefficient, tokens of a packed micro-batch
    "zero1": ("float32", 1, False, 0.0, 0),
    "zero2": ("float32", 2, True, 0.0, 0),
    "zero3": ("float32", 3, False, 0.0, 0),
    "zero3-checkpointing-kl": ("float32", 3, True, 0.1, 0),
    "zero1-bf16": ("bfloat16", 1, False, 0.0, 0),
    "zero3-bf16": ("bfloat16", 3, False, 0.0, 0),
    "zero2-lora": ("float32", 2, False, 0.0, 0),
    "zero3-lora-checkpointing-kl": ("float32", 3, True, 0.1, 0),
    "zero1-packed-lora-bf16": ("bfloat16", 1, False, 0.0, 200),
    "zero0-packed": ("float32", 0, False, 0.0, 32),
    "zero2-packed": ("float32", 2, False, 0.0, 14),
    "zero3-packed-checkpointing-kl": ("float32", 3, True, 0.1, 32),
    "zero1-packed-bf16": ("bfloat16", 1, False, 0.0, 200),
}


def make_batch():
    """Twelve sequences of different lengths, three groups."""
    generator = torch.Generator().manual_seed(0)
    rollouts = []
    for i in range(ROWS):
        length = int(torch.randint(5, 14, (1,), generator=generator))
        rollouts.append(
            Rollout(
                token_ids=torch.randint(3, 280, (length,), generator=generator).tolist(),
                loss_mask=[False] * 2 + [True] * (length - 2),
                rollout_logprobs=[0.0] * 2 + [-3.0] * (length - 2),
                prompt_id=i // 4,
                group_id=i // 4,
                finish_reason="stop",
                version_spans=[(2, length, 0)],
            )
        )
    return collate(rollouts, pad_token_id=0, spec=LogprobSpec())


def make_advantages(batch):
    return torch.randn(ROWS, 1, generator=torch.Generator().manual_seed(1)).expand(batch.token_ids_BL.shape)


def plain_loop(folder: Path):
    """The written objective: gradient norms, and how far every weight moved."""
    batch = make_batch()
    advantages = make_advantages(batch)
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before = flat(network.named_parameters())
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    norms = []
    for _ in range(STEPS):
        logits = network(batch.token_ids_BL, attention_mask=batch.attention_mask_BL).logits.double().log_softmax(-1)
        new = logits[:, :-1].gather(-1, batch.token_ids_BL[:, 1:, None])[..., 0]
        mask, a = batch.loss_mask_BL[:, 1:], advantages[:, 1:].double()
        ratio = (new - new.detach()).exp()
        per_token = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)
        optimizer.zero_grad()
        (per_token[mask].sum() / mask.sum()).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)))
        optimizer.step()
    return norms, flat(network.named_parameters()) - before


def flat(named):
    return torch.cat([p.detach().float().flatten() for _, p in named])


def start_policy(
    folder: Path,
    trainer: TrainerConfig,
    *,
    dtype: str,
    kl_coef: float = 0.0,
    lr: float = LR,
    temperature: float = 1.0,
    replay_experts: str = "off",
):
    from rlalign.trainer.policy import Policy

    algo = AlgoConfig(lr=lr, kl_coef=kl_coef)
    of_run = {"dtype": dtype, "head_dtype": "float32", "temperature": temperature, "replay_experts": replay_experts}
    return Policy(folder, trainer, algo, **of_run, seed=0)


def train(policy, *, kl_coef: float = 0.0) -> dict:
    """norms, losses and first-step logprobs of STEPS updates, and how far the weights moved."""
    batch = make_batch()
    before, norms, losses = flat(policy.named_weights()), [], []
    loss = partial(choice.policy_loss, algo=AlgoConfig(kl_coef=kl_coef), max_tokens=12)
    first = None
    for _ in range(STEPS):
        old, _ = policy.score(batch)
        first = old if first is None else first
        correction = corrections.identity(old, old, batch.loss_mask_BL)
        whole = TrainBatch(
            rollouts=batch,
            old_logprobs_BL=old,
            advantages_BL=make_advantages(batch),
            correction=correction,
            num_tokens=int(correction.keep.sum()),
            num_sequences=ROWS,
            ref_logprobs_BL=policy.score_reference(batch),
        )
        losses.append(policy.forward_backward(whole, loss))
        norms.append(policy.optim_step().get("grad_norm"))
    assert policy.version == STEPS
    return {
        "norms": norms, "metrics": losses, "logprobs": first, "weights": before,
        "moved": flat(policy.named_weights()) - before,
    }  # fmt: skip


def run_case(folder: Path, name: str) -> dict:
    dtype, stage, checkpointing, kl_coef, pack_tokens = RANK_CASES[name]
    trainer = TrainerConfig(
        zero_stage=stage, micro_batch_size=4, gradient_checkpointing=checkpointing, pack_tokens=pack_tokens,
        lora=LoraConfig(rank=4 if "lora" in name else 0),
    )  # fmt: skip
    policy = start_policy(folder, trainer, dtype=dtype, kl_coef=kl_coef)
    result = train(policy, kl_coef=kl_coef)
    policy.close()
    return result


def save_cases(names: Iterable[str], run: Callable[[Path, str], dict], folder: Path, out: Path) -> None:
    """Every rank runs every case; the first one's results become files of these names."""
    for name in names:
        result = run(folder, name)
        if ranks.rank() == 0:
            torch.save(result, out / f"{name}.pt")


def main(folder: Path, out: Path) -> None:
    save_cases(RANK_CASES, run_case, folder, out)
    policy = start_policy(folder, TrainerConfig(zero_stage=3, micro_batch_size=4), dtype="float32")
    policy.save(out / "saved")
    try:
        policy.score(make_batch().rows(slice(0, 5)))
    except ValueError as error:
        (out / f"uneven-{ranks.rank()}.txt").write_text(str(error))
    policy.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
