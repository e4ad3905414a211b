"""OpenRLHF's or SkyRL's classes and vLLM, as they are and aligned: mismatch, the stack's own metric, and what a step costs.

    PYTHONPATH=. python benchmarks/attach_stacks.py [--stack openrlhf|skyrl] [--steps 20] [--min-tokens 1] [--model DIR]

On one CPU process: tests/stack_cpu.py and skyrl_cpu.py say what stands for Ray, CUDA and the push; the rest is released:
OpenRLHF's create_vllm_engines, RolloutRayActor, SamplesGenerator, RemoteExperienceMaker, PolicyModelActor with DeepSpeed ZeRO-2
(bf16 with float32 masters) and PolicyLoss; SkyRL's FSDP2 policy worker (bf16 over float32), its batches, advantages and loss; the
worker extension of each in a real vLLM. The arms take turns as in attach_trl.py. stock: the stack as it is. rollout only: the same
with RLALIGN_HEAD=float32. aligned: the adapter. Both stacks' min_tokens=1 takes the end of sequence out of the first token's
distribution; the adapters send 0, and so do all arms, unless --min-tokens 1.
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
    parser.add_argument("--stack", choices=tuple(OWN), default="openrlhf")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--min-tokens", type=int, default=0, choices=(0, 1), help="of the arms without the adapter")
    parser.add_argument("--model", help="a folder in the place of the demo's policy")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of a completion at most")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        worker(json.loads(given.worker))
        return
    columns = ("arm", "stack", "lag-0 k3", "mean abs log_ratio", OWN[given.stack], "push, ms", "step, ms")
    print(f"| {' | '.join(columns)} | step, CPU time | step, wall |")
    print("|---|---|" + "--:|" * 7)
    asked = vars(given) | {"precision": given.stack, "script": __file__}
    for line in table(given.stack, in_turns(asked)):
        print(line, flush=True)


def worker(asked: dict) -> None:
    """One arm, step by step as the parent says."""
    import torch

    from rlalign import compare
    from rlalign.tasks import load_task
    from rlalign.tiny_policy import cached_policy
    from tests import skyrl_cpu, stack_cpu

    torch.set_num_threads(1)
    found = {each: [] for each in ("k3", "abs_mean", "wall", "cpu", "sync", "own")}
    sums = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
    task = load_task("chain_sum", sums, train_size=512, eval_size=8, seed=0)
    folder = asked["model"] or cached_policy("untied")
    sizes = {"prompts": PROMPTS, "group": GROUP, "tokens": asked["tokens"], "lr": 1e-5 if asked["model"] else 3e-4}
    with {"openrlhf": stack_cpu, "skyrl": skyrl_cpu}[asked["stack"]].stack(tempfile.mkdtemp()):
        build, compared = {"openrlhf": (openrlhf, of_openrlhf), "skyrl": (skyrl, of_skyrl)}[asked["stack"]]
        parts = build(asked, folder, sizes)
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
            metrics = compare(*compared(batch), positions=False)
            for each in ("k3", "abs_mean"):
                found[each].append(metrics[each])
            found["own"].append(float(logged[OWN[asked["stack"]]]))
            print("STEP", flush=True)
    print("RESULT " + json.dumps(found), flush=True)
    os._exit(0)  # vLLM's process group would be waited for


def openrlhf(asked: dict, folder: object, sizes: dict) -> object:
    """The stack's parts in this arm."""
    from tests import stack_cpu

    if asked["arm"] == "aligned":
        from rlalign.integrations import openrlhf as adapter

        adapter.switch_on()
    elif not asked["min_tokens"]:
        without_min_tokens()
    return stack_cpu.OpenRLHF(folder, **sizes)


def of_openrlhf(batch: object) -> tuple:
    """The two sides' logprobs and their mask, as the stack compares them."""
    return batch.action_log_probs, batch.rollout_log_probs, batch.action_mask.bool()


def skyrl(asked: dict, folder: object, sizes: dict) -> object:
    """The stack's parts in this arm."""
    from skyrl.train import trainer

    from rlalign.integrations import skyrl as adapter
    from tests import skyrl_cpu

    if not asked["min_tokens"]:
        trainer.get_sampling_params_for_backend = adapter.sampling
    return skyrl_cpu.SkyRL(folder, aligned=asked["arm"] == "aligned", **sizes)


def of_skyrl(batch: dict) -> tuple:
    """The two sides' logprobs and their mask, as the stack compares them."""
    return batch["action_log_probs"].float(), batch["rollout_logprobs"].float(), batch["loss_mask"] > 0


def without_min_tokens() -> None:
    """OpenRLHF's rollout actor, sampling the first token from the whole distribution."""
    from openrlhf.trainer.ray import launcher, vllm_engine

    from rlalign.integrations.openrlhf import unrestricted
    from rlalign.integrations.ray_actors import plain

    vllm_engine.RolloutRayActor = launcher.ray.remote(unrestricted(plain(vllm_engine.RolloutRayActor)))


if __name__ == "__main__":
    main()
