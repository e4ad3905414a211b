"""verl's actor worker and vLLM with verl's worker extension, as they are and aligned: mismatch, verl's metrics, cost.

    PYTHONPATH=. python benchmarks/attach_verl.py [--steps 20] [--strategies fsdp2 fsdp]

On one CPU process: tests/verl_cpu.py has the platform that verl leaves to plugins, and what stands for its Ray actor. Everything
else is verl's own: engine, PPO loss, advantages, push over shared memory, metrics. The arms take turns as in attach_trl.py.
stock: verl as it is. rollout only: the same with RLALIGN_HEAD=float32. aligned: external_lib=rlalign.integrations.verl.
The actor is in verl's default precision: float32 masters, bf16 parameters in the forward.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from functools import partial

from benchmarks.attach_trl import in_turns, table

STRATEGIES = ("fsdp2", "fsdp")
OWN = {"own": "k3_kl", "own_probs": "training/rollout_probs_diff_mean"}
PROMPTS, GROUP, TOKENS = 8, 4, 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES, choices=STRATEGIES)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        worker(json.loads(given.worker))
        return
    columns = ("arm", "strategy", "lag-0 k3", "mean abs log_ratio", *(f"verl's {name}" for name in OWN.values()))
    print(f"| {' | '.join(columns)} | push, ms | step, ms | step, CPU time | step, wall |")
    print("|---|---|" + "--:|" * 8)
    for strategy in given.strategies:
        found = in_turns({"precision": strategy, "steps": given.steps, "script": __file__})
        for line in table(strategy, found, own=tuple(OWN)):
            print(line, flush=True)


def worker(asked: dict) -> None:
    """One arm, step by step as the parent says."""
    import torch

    from rlalign.tasks import load_task
    from rlalign.tiny_policy import cached_policy
    from tests import verl_cpu

    torch.set_num_threads(1)
    folder = cached_policy("untied")
    sums = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
    task = load_task("chain_sum", sums, train_size=512, eval_size=8, seed=0)
    found = {name: [] for name in ("k3", "abs_mean", "wall", "cpu", "sync", *OWN)}
    with verl_cpu.platform():
        if asked["arm"] == "aligned":
            import rlalign.integrations.verl  # noqa: F401 (switches itself on)
        from transformers import AutoTokenizer

        sizes = dict.fromkeys(("micro_batch_size_per_gpu", "infer_micro_batch_size_per_gpu"), PROMPTS * GROUP)
        actor = verl_cpu.worker(folder, strategy=asked["precision"], model={"use_remove_padding": True}, engine=sizes)
        rollout = verl_cpu.rollout(folder, verl_cpu.vllm_engine(folder), temperature=1.0)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        push = partial(timed, found["sync"], verl_cpu.push, rollout, actor)
        push(0)
        found["sync"].clear()
        print("READY", flush=True)
        for step in range(asked["steps"]):
            sys.stdin.readline()
            before = time.perf_counter(), time.process_time()
            prompts = task.train_prompts(step, PROMPTS)
            ids = [tokenizer(p.text)["input_ids"] for p in prompts]
            train_step(found, actor, rollout, tokenizer, ids, [p.answer for p in prompts], step)
            push(step + 1)
            found["wall"].append(time.perf_counter() - before[0])
            found["cpu"].append(time.process_time() - before[1])
            print("STEP", flush=True)
    print("RESULT " + json.dumps(found), flush=True)
    os._exit(0)  # vLLM's process group would be waited for


def train_step(
    found: dict, actor: object, rollout: object, tokenizer: object, prompts: list, answers: list, step: int
) -> None:
    """Sample, recompute, compare, one update: verl's functions throughout."""
    import numpy
    import torch
    from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage
    from verl.trainer.ppo.rollout_corr_helper import compute_offpolicy_metrics

    from rlalign import compare
    from tests import verl_cpu

    rows = verl_cpu.sampled(rollout, prompts, group=GROUP, tokens=TOKENS, seed=None)
    _, old_BL, rollout_BL, mask_BL = verl_cpu.compared(actor, rows, 1.0)
    metrics = compare(old_BL, rollout_BL, mask_BL.bool(), positions=False)
    theirs = compute_offpolicy_metrics(old_BL, rollout_BL, mask_BL)
    theirs |= verl_cpu.debug_metrics(old_BL, rollout_BL, mask_BL)
    for name in ("k3", "abs_mean"):
        found[name].append(metrics[name])
    for name, key in OWN.items():
        found[name].append(float(theirs[key]))
    wanted = [answer for answer in answers for _ in range(GROUP)]
    texts = [tokenizer.decode(r, skip_special_tokens=True).strip() for _, r, _ in rows]
    rewards = torch.tensor([float(a == b) - 0.01 * len(a) for a, b in zip(texts, wanted, strict=True)])
    at_end = torch.zeros(old_BL.shape)
    at_end[range(len(rows)), mask_BL.sum(1) - 1] = rewards
    groups = numpy.arange(len(rows)) // GROUP
    advantages_BL, _ = compute_grpo_outcome_advantage(at_end, mask_BL, groups)
    verl_cpu.update(actor, rows, 1.0, old_BL, advantages_BL)


def timed(seconds: list, function: object, *args: object) -> None:
    before = time.perf_counter()
    function(*args)
    seconds.append(time.perf_counter() - before)


if __name__ == "__main__":
    main()
