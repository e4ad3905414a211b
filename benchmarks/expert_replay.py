"""k3 with and without replayed experts, on a tiny Qwen3-MoE before and after it was trained. Writes results/expert_replay.md.

    python -m benchmarks.expert_replay

The model is taught the demo's sums; both bodies bfloat16, heads float32, lag 0.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median

import torch
from transformers import PreTrainedTokenizerBase, Qwen3MoeConfig, Qwen3MoeForCausalLM

from rlalign import mismatch
from rlalign.config import AlgoConfig, RolloutConfig, TrainerConfig
from rlalign.rollout.engine.embedded import VLLMEngine
from rlalign.run.step import scored
from rlalign.tasks import Task, load_task
from rlalign.tiny_policy.teaching import TinyRecipe, accuracy, teach
from rlalign.tiny_policy.tokenizer import byte_tokenizer
from rlalign.tracking.environment import cpu_model
from rlalign.trainer.forced_experts import routers
from rlalign.trainer.policy import Policy
from rlalign.types import RolloutBatch, collate

OUT = Path(__file__).parent / "results" / "expert_replay.md"
RECIPE = TinyRecipe(learning_rate=2e-3, stop_at=0.6, accept_from=0.0, max_steps=800)
SEEDS, PROMPTS, SAMPLES = (0, 1, 2), 32, 8
LAYERS, EXPERTS, CHOSEN = 4, 16, 2


def new_model(tokenizer: PreTrainedTokenizerBase) -> Qwen3MoeForCausalLM:
    """LAYERS layers of EXPERTS experts, CHOSEN of a token."""
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=math.ceil(len(tokenizer) / 64) * 64, hidden_size=128, intermediate_size=256, num_hidden_layers=LAYERS,
            num_attention_heads=4, num_key_value_heads=4, head_dim=32, num_experts=EXPERTS, num_experts_per_tok=CHOSEN,
            moe_intermediate_size=64, decoder_sparse_step=1, norm_topk_prob=True, max_position_embeddings=512,
            tie_word_embeddings=False, initializer_range=0.08, pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip


@dataclass(frozen=True)
class Found:
    """One model. ks: (k3 replayed, k3 not replayed) by seed; share of choices and of positions that differ."""

    ks: list[tuple[float, float]]
    choices: float
    positions: float
    mass: float
    bytes_per_token: float


def k3(old_BL: torch.Tensor, batch: RolloutBatch) -> float:
    lag_B = torch.zeros(len(batch), dtype=torch.int64)
    found = mismatch.compare(old_BL, batch.rollout_logprobs_BL, batch.loss_mask_BL, lag_B=lag_B, positions=False)
    return found["lag0/k3"]


def top_mass(model: Qwen3MoeForCausalLM, batch: RolloutBatch) -> float:
    """Mean probability that a gate gives to its first choice."""
    seen: list[torch.Tensor] = []
    handles = [
        router.register_forward_hook(lambda _, args, out: seen.append(out[0].float().softmax(-1).amax(-1)))
        for router in routers(model).values()
    ]
    with torch.no_grad():
        model(batch.token_ids_BL, attention_mask=batch.attention_mask_BL)
    for handle in handles:
        handle.remove()
    there = batch.attention_mask_BL.flatten()
    return fmean(float(mass[there].mean()) for mass in seen)


def measured(folder: Path, task: Task, tokenizer: PreTrainedTokenizerBase) -> Found:
    """Both sides of one model."""
    config = RolloutConfig(
        max_tokens=8, max_model_len=128, max_num_seqs=256, enforce_eager=True, replay_experts="known"
    )
    engine = VLLMEngine(folder, config, dtype="bfloat16", head_dtype="float32", seed=0)
    policy = Policy(
        folder, TrainerConfig(), AlgoConfig(), dtype="bfloat16", head_dtype="float32", temperature=1.0, seed=0,
        replay_experts="known",
    )  # fmt: skip
    prompts = [tokenizer(p.text).input_ids for p in task.train_prompts(0, PROMPTS)]
    ks, shares = [], []
    try:
        for seed in SEEDS:
            rollouts = engine.generate(prompts, prompt_ids=range(PROMPTS), samples=SAMPLES, seed=seed)
            batch = collate(rollouts, pad_token_id=tokenizer.pad_token_id, spec=engine.spec)
            _, old_BL, _, metrics = scored(policy, batch)
            own_BL = scored(policy, replace(batch, routes=None))[1]
            ks.append((k3(old_BL, batch), k3(own_BL, batch)))
            shares.append((metrics["routes/differ"], metrics["routes/tokens_differ"]))
    finally:
        policy.close()
        engine.close()
    model = Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return Found(
        ks=ks, choices=fmean(s[0] for s in shares), positions=fmean(s[1] for s in shares),
        mass=top_mass(model, batch), bytes_per_token=metrics["routes/bytes_per_token"],
    )  # fmt: skip


def row(name: str, found: Found) -> str:
    """One model's line."""
    with_, without = (", ".join(f"{pair[i]:.1e}" for pair in found.ks) for i in (0, 1))
    times = median(own / replayed for replayed, own in found.ks)
    return (
        f"| {name} | {found.mass:.2f} | {found.choices:.2%}, {found.positions:.1%} | {without} | {with_} | {times:.1f} x | "
        f"{found.bytes_per_token:.0f} |"
    )


def main() -> None:
    tokenizer = byte_tokenizer(RECIPE.context)
    task = load_task(RECIPE.task, RECIPE.task_params, train_size=RECIPE.train_size, eval_size=RECIPE.eval_size, seed=0)
    model, lines = new_model(tokenizer), []
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("as initialised", "taught"):
            folder = Path(scratch) / name.replace(" ", "-")
            if name == "taught":
                steps = teach(model, tokenizer, task, RECIPE, print)
                name = f"taught for {steps} steps: {accuracy(model, tokenizer, task, greedy=False):.0%} of held-out sums right"
            torch.nn.Module.to(model, torch.bfloat16)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            torch.nn.Module.to(model, torch.float32)
            lines.append(row(name, measured(folder, task, tokenizer)))
            print(lines[-1], flush=True)
    head = (
        "| model | gate's first choice | choices, positions that differ | k3 without replay | k3 with | "
        "k3 falls by | bytes a token |\n|---|--:|--:|---|---|--:|--:|"
    )
    OUT.write_text(
        "# k3 with and without replayed experts\n\n"
        f"Qwen3-MoE of {LAYERS} layers, {CHOSEN} of {EXPERTS} experts, bfloat16 bodies and float32 heads, lag 0; "
        f"{PROMPTS} x {SAMPLES} completions\nof the demo's sums for each of the seeds {', '.join(map(str, SEEDS))}. "
        f"{cpu_model()}.\n"
        "Written by benchmarks/expert_replay.py.\n\n"
        f"{head}\n" + "\n".join(lines) + "\n"
    )  # fmt: skip


if __name__ == "__main__":
    main()
