"""OpenRLHF's actors and vLLM, as they are and aligned: mismatch, OpenRLHF's own metric, and what a step costs.

    PYTHONPATH=. python benchmarks/attach_stacks.py [--steps 20] [--min-tokens 1]

On one CPU process: tests/stack_cpu.py says what stands for Ray, CUDA and the push. The rest is the released package's:
create_vllm_engines, RolloutRayActor, SamplesGenerator, RemoteExperienceMaker, PolicyModelActor with DeepSpeed ZeRO-2 (bf16 with
float32 masters) and PolicyLoss, and its worker extension in a real vLLM. The arms take turns as in attach_trl.py. stock: OpenRLHF
as it is. rollout only: the same with RLALIGN_HEAD=float32. aligned: rlalign.integrations.openrlhf. OpenRLHF's min_tokens=1 takes
the end of sequence out of the first token's distribution; the adapter sends 0, and so do all arms, unless --min-tokens 1.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time

from benchmarks.attach_trl import in_turns, table

OWN = "vllm_kl"
PROMPTS, GROUP, TOKENS = 8, 4, 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--min-tokens", type=int, default=0, choices=(0, 1), help="of the arms without the adapter")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        worker(json.loads(given.worker))
        return
    columns = ("arm", "stack", "lag-0 k3", "mean abs log_ratio", OWN, "push, ms", "step, ms")
    print(f"| {' | '.join(columns)} | step, CPU time | step, wall |")
    print("|---|---|" + "--:|" * 7)
    asked = {"precision": "OpenRLHF", "steps": given.steps, "script": __file__, "min_tokens": given.min_tokens}
    for line in table("OpenRLHF", in_turns(asked)):
        print(line, flush=True)


def worker(asked: dict) -> None:
    """One arm, step by step as the parent says."""
    import torch

    from rlalign import compare
    from rlalign.tasks import load_task
    from rlalign.tiny_policy import cached_policy
    from tests import stack_cpu

    torch.set_num_threads(1)
    found = {each: [] for each in ("k3", "abs_mean", "wall", "cpu", "sync", "own")}
    sums = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
    task = load_task("chain_sum", sums, train_size=512, eval_size=8, seed=0)
    with stack_cpu.stack(tempfile.mkdtemp()):
        if asked["arm"] == "aligned":
            from rlalign.integrations import openrlhf

            openrlhf.switch_on()
        elif not asked["min_tokens"]:
            without_min_tokens()
        parts = stack_cpu.OpenRLHF(cached_policy("untied"), prompts=PROMPTS, group=GROUP, tokens=TOKENS)
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
            metrics = compare(
                batch.action_log_probs, batch.rollout_log_probs, batch.action_mask.bool(), positions=False
            )
            for each in ("k3", "abs_mean"):
                found[each].append(metrics[each])
            found["own"].append(float(logged[OWN]))
            print("STEP", flush=True)
    print("RESULT " + json.dumps(found), flush=True)
    os._exit(0)  # vLLM's process group would be waited for


def without_min_tokens() -> None:
    """OpenRLHF's rollout actor, sampling the first token from the whole distribution."""
    from openrlhf.trainer.ray import launcher, vllm_engine

    from rlalign.integrations.openrlhf import unrestricted
    from rlalign.integrations.ray_actors import plain

    vllm_engine.RolloutRayActor = launcher.ray.remote(unrestricted(plain(vllm_engine.RolloutRayActor)))


if __name__ == "__main__":
    main()
