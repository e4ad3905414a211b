"""OpenRLHF's and SkyRL's actors and vLLM, as they are and aligned: mismatch, each stack's own metric, and what a step costs.

    PYTHONPATH=. python benchmarks/attach_stacks.py --stack openrlhf|skyrl [--steps 20]

On one CPU process: tests/stack_cpu.py says what stands for Ray, CUDA and the push. The rest is the released package's: OpenRLHF's
create_vllm_engines, RolloutRayActor, SamplesGenerator, RemoteExperienceMaker, PolicyModelActor with DeepSpeed ZeRO-2 (bf16 with
float32 masters) and PolicyLoss; SkyRL's policy worker with FSDP2 (bf16 over float32), its batches, advantages and loss; the worker
extension of each in a real vLLM. The arms take turns as in attach_trl.py. stock: the stack as it is. rollout only: the same with
RLALIGN_HEAD=float32. aligned: rlalign.integrations.openrlhf or rlalign.integrations.skyrl.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time

from benchmarks.attach_trl import in_turns, table

OWN = {"openrlhf": "vllm_kl", "skyrl": "policy/rollout_train_logprobs_abs_diff_mean"}
PROMPTS, GROUP, TOKENS = 8, 4, 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stack", required=True, choices=tuple(OWN))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    if "--worker" in sys.argv:
        worker(json.loads(sys.argv[sys.argv.index("--worker") + 1]))
        return
    given = parser.parse_args()
    columns = ("arm", "stack", "lag-0 k3", "mean abs log_ratio", OWN[given.stack], "push, ms", "step, ms")
    print(f"| {' | '.join(columns)} | step, CPU time | step, wall |")
    print("|---|---|" + "--:|" * 7)
    for line in table(given.stack, in_turns({"precision": given.stack, "steps": given.steps, "script": __file__})):
        print(line, flush=True)


def worker(asked: dict) -> None:
    """One arm, step by step as the parent says."""
    import torch

    from rlalign.tasks import load_task
    from tests import stack_cpu

    torch.set_num_threads(1)
    name, found = asked["precision"], {each: [] for each in ("k3", "abs_mean", "wall", "cpu", "sync", "own")}
    sums = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
    task = load_task("chain_sum", sums, train_size=512, eval_size=8, seed=0)
    with stack_cpu.stack(name, tempfile.mkdtemp()):
        parts = build(name, aligned=asked["arm"] == "aligned")
        parts.push()
        print("READY", flush=True)
        for step in range(asked["steps"]):
            sys.stdin.readline()
            before = time.perf_counter(), time.process_time()
            prompts = task.train_prompts(step, PROMPTS)
            batch, logged = parts.step([p.text for p in prompts], [p.answer for p in prompts])
            pushing = time.perf_counter()
            parts.push()
            after = time.perf_counter()
            found["wall"].append(after - before[0])
            found["cpu"].append(time.process_time() - before[1])
            found["sync"].append(after - pushing)
            record(found, name, batch, logged)
            print("STEP", flush=True)
    print("RESULT " + json.dumps(found), flush=True)
    os._exit(0)  # vLLM's process group would be waited for


def build(name: str, *, aligned: bool) -> object:
    """The stack's parts around the demo's policy."""
    from rlalign.tiny_policy import cached_policy
    from tests import stack_cpu

    folder, sizes = cached_policy("untied"), {"prompts": PROMPTS, "group": GROUP, "tokens": TOKENS}
    if name == "skyrl":
        return stack_cpu.SkyRL(folder, aligned=aligned, **sizes)
    if aligned:
        from rlalign.integrations import openrlhf

        openrlhf.switch_on()
    return stack_cpu.OpenRLHF(folder, **sizes)


def record(found: dict, name: str, batch: object, logged: dict) -> None:
    """Our numbers, from what the stack itself compares, and its own."""
    from rlalign import compare

    if name == "openrlhf":
        compared = batch.action_log_probs, batch.rollout_log_probs, batch.action_mask.bool()
    else:
        compared = batch["action_log_probs"], batch["rollout_logprobs"], batch["loss_mask"] > 0
    metrics = compare(*(each.float() for each in compared[:2]), compared[2], positions=False)
    for each in ("k3", "abs_mean"):
        found[each].append(metrics[each])
    found["own"].append(float(logged[OWN[name]]))


if __name__ == "__main__":
    main()
