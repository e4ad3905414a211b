"""A GRPO loop of one's own, with torch, transformers and vllm.LLM alone, aligned by the lines that begin with rlalign or name it.

python examples/own_loop.py
"""

import os
import random
import tempfile
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

import rlalign

os.environ["RLALIGN_HEAD"] = "float32"  # every vLLM process that is started from here: float32 logits
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
TEMPERATURE, GROUP, PROMPTS, STEPS = 0.9, 8, 8, 3


def main(folder: Path, out: Path) -> list[dict[str, float]]:
    from vllm import LLM, SamplingParams

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)  # trained in float32, computed in bf16
    llm = LLM(str(folder), dtype="bfloat16", max_model_len=64, enforce_eager=True, logprobs_mode="processed_logprobs")
    params = SamplingParams(n=GROUP, max_tokens=6, temperature=TEMPERATURE, logprobs=0, seed=0)

    engine = rlalign.attach(llm)  # which head every rank runs, asked and measured; or an error that says what to do
    mirrored = rlalign.mirror(model)  # the same projection in the trainer
    monitor = rlalign.Monitor(engine, mirrored, spec=engine.spec(params), temperature=TEMPERATURE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    history, rng = [], random.Random(0)

    for step in range(STEPS):
        sums = [(rng.randint(1, 9), rng.randint(1, 9)) for _ in range(PROMPTS)]
        prompts = [{"prompt_token_ids": tokenizer.encode(f"{a} + {b} =")} for a, b in sums]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        if step == 0:
            engine.prove()  # those tokens came through that head
        rows, rewards = [], []
        for (a, b), output in zip(sums, outputs, strict=True):
            for sample in output.outputs:
                said = [at[token].logprob for at, token in zip(sample.logprobs, sample.token_ids, strict=True)]
                rows.append((list(output.prompt_token_ids), list(sample.token_ids), said))
                rewards.append(float(sample.text.strip() == str(a + b)))
        ids = pad_sequence([torch.tensor(p + c) for p, c, _ in rows], batch_first=True)
        rollout = pad_sequence([torch.tensor([0.0] * len(p) + said) for p, _, said in rows], batch_first=True)
        mask = pad_sequence([torch.tensor([False] * len(p) + [True] * len(c)) for p, c, _ in rows], batch_first=True)
        attention = pad_sequence([torch.ones(len(p) + len(c), dtype=torch.long) for p, c, _ in rows], batch_first=True)
        reward = torch.tensor(rewards).view(PROMPTS, GROUP)
        advantage = ((reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-4)).view(-1, 1)

        inputs = {"input_ids": ids, "attention_mask": attention}
        with torch.autocast("cpu", torch.bfloat16):
            logprobs, entropy = mirrored.token_logprobs(inputs, mask, temperature=TEMPERATURE)  # no logits are built
        old = logprobs.detach()
        history.append(monitor.step(step, old, rollout, mask, lag=step - engine.policy_version))
        scored = {"rollout_logprobs_BL": rollout, "old_logprobs_BL": old, "mask_BL": mask, "entropy_BL": entropy}
        whole = (
            {"monitor": monitor, "tokenizer": tokenizer, "attention_mask_BL": attention} if step == STEPS - 1 else {}
        )
        rlalign.write_tokens(out, step, token_ids_BL=ids, **scored, policy_version=step, trainer_version=step, **whole)
        correction = rlalign.correct(old, rollout, mask, level="token", mode="truncate", high=2.0)
        ratio = (logprobs - old).exp()
        loss = -(ratio * advantage * correction.weights)[mask].sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        engine.publish(model.named_parameters(), step + 1)  # rounded to the engine's bf16, read back out of its kernels
        print(f"step {step}: reward {reward.mean():.2f}, lag-0 k3 {history[-1]['mismatch/lag0/k3']:.1e}")
    return history


if __name__ == "__main__":
    from rlalign.tiny_policy import cached_policy

    main(cached_policy("untied"), Path(tempfile.mkdtemp()))
