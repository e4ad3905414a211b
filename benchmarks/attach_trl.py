"""TRL's GRPOTrainer with vLLM in its process, as it is and aligned: lag-0 mismatch, its own metric, and what a step costs.

    python benchmarks/attach_trl.py [--steps 20] [--rounds 2]

Needs trl 1.16, datasets and pandas beside vLLM. Arms run one after another, round by round, each in a process of its own. stock:
TRL's own path with vLLM's reload in the place of its push, which fails where vLLM packs weights (docs/upstream.md). rollout only:
the same with RLALIGN_HEAD=float32, one side. aligned: AlignedGRPOTrainer. Precision: TRL's default (float32 parameters, bf16
autocast) and bf16 parameters; the engine computes in bf16 throughout.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from statistics import mean, median

ARMS = ("stock", "rollout only", "aligned")
PRECISIONS = ("autocast", "bf16")
PROMPTS, GROUP, TOKENS = 16, 8, 6
WARM = 2  # steps whose time is not counted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS, choices=PRECISIONS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        worker(json.loads(given.worker))
        return
    found = {(arm, precision): [] for precision in given.precisions for arm in ARMS}
    for _ in range(given.rounds):
        for arm, precision in found:
            found[arm, precision].append(run(arm, precision, given.steps))
    for line in table(found):
        print(line)


def run(arm: str, precision: str, steps: int) -> dict[str, list[float]]:
    """One arm in a process of its own."""
    arguments = json.dumps({"arm": arm, "precision": precision, "steps": steps})
    environment = os.environ | {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "TORCHDYNAMO_DISABLE": "1",
    }
    environment |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
    }
    environment |= {"RLALIGN_HEAD": "float32"} if arm == "rollout only" else {}
    done = subprocess.run(
        [sys.executable, __file__, "--worker", arguments], env=environment, capture_output=True, text=True
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise RuntimeError(f"{arm}, {precision}: {done.stderr[-3000:]}")
    print(f"{arm}, {precision}: {lines[0][:100]}", file=sys.stderr)
    return json.loads(lines[0].removeprefix("RESULT "))


def worker(arguments: dict) -> None:
    """Train, and print one line of numbers."""
    import torch

    from rlalign import compare

    torch.set_num_threads(1)
    metrics, ends, trainer = [], [], make_trainer(arguments)
    generate_and_score = trainer._generate_and_score_completions

    def measured(inputs: object) -> dict:
        output = generate_and_score(inputs)
        found = (output[name].float() for name in ("old_per_token_logps", "sampling_per_token_logps"))
        metrics.append(compare(*found, output["completion_mask"].bool(), positions=False))
        return output

    trainer._generate_and_score_completions = measured
    step = trainer.training_step

    def timed(*args: object, **kwargs: object) -> object:
        result = step(*args, **kwargs)
        ends.append((time.perf_counter(), time.process_time()))
        return result

    trainer.training_step = timed
    trainer.train()
    logged = [log for log in trainer.state.log_history if "reward" in log]
    wall, cpu = ([after - before for before, after in pairwise(times)][WARM:] for times in zip(*ends, strict=True))
    found = {
        "k3": [m["k3"] for m in metrics],
        "abs_mean": [m["abs_mean"] for m in metrics],
        "own": [log["sampling/sampling_logp_difference/mean"] for log in logged],
        "reward": [log["reward"] for log in logged],
        "wall": wall,
        "cpu": cpu,
        "sync": getattr(getattr(trainer, "alignment", None), "publish_seconds", SYNC_SECONDS),
    }
    print("RESULT " + json.dumps(found), flush=True)
    os._exit(0)  # vLLM's process group would be waited for


SYNC_SECONDS: list[float] = []


def make_trainer(arguments: dict) -> object:
    """One step a generation batch, all of it in one micro-batch: every old logprob is at lag 0."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    from rlalign.integrations.trl import AlignedGRPOTrainer, building_with
    from rlalign.tasks import load_task
    from rlalign.tiny_policy import cached_policy

    folder = str(cached_policy("untied"))
    task = load_task(
        "chain_sum",
        {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
        train_size=512,
        eval_size=8,
        seed=0,
    )
    rows = [
        {"prompt": p.text, "answer": p.answer}
        for step in range(arguments["steps"])
        for p in task.train_prompts(step, PROMPTS)
    ]

    def reward(completions: list, answer: list, **_: object) -> list[float]:
        return [float(text.strip() == wanted) for text, wanted in zip(completions, answer, strict=True)]

    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=arguments["precision"] == "autocast",
        model_init_kwargs={"dtype": "bfloat16" if arguments["precision"] == "bf16" else "float32"},
        gradient_checkpointing=False, per_device_train_batch_size=PROMPTS * GROUP, num_generations=GROUP,
        max_completion_length=TOKENS, temperature=1.0, learning_rate=3e-4, lr_scheduler_type="constant",
        max_steps=arguments["steps"], beta=0.0, save_strategy="no", logging_steps=1, report_to="none", disable_tqdm=True,
        shuffle_dataset=False, dataloader_pin_memory=False, use_vllm=True, vllm_mode="colocate", vllm_max_model_length=64,
        vllm_gpu_memory_utilization=0.3, seed=0,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    kind = AlignedGRPOTrainer if arguments["arm"] == "aligned" else GRPOTrainer
    with building_with({"enforce_eager": True}):
        data = Dataset.from_list(rows)
        trainer = kind(model=folder, reward_funcs=reward, args=config, train_dataset=data, processing_class=tokenizer)
    if arguments["arm"] != "aligned":
        reload_on_cpu(trainer.vllm_generation)
    return trainer


def reload_on_cpu(generation: object) -> None:
    """The whole reload of vLLM in the place of TRL's push tensor by tensor: see docs/upstream.md."""

    def sync_weights() -> None:
        before = time.perf_counter()
        runner = generation.llm.llm_engine.model_executor.driver_worker.model_runner
        runner.reload_weights(weights_iterator=generation._iter_named_params())
        generation.llm.reset_prefix_cache()
        SYNC_SECONDS.append(time.perf_counter() - before)

    generation.sync_weights = sync_weights


def table(found: dict) -> list[str]:
    """Means over all steps of all rounds; costs as the ratio to stock of medians in the same round.

    TRL's own metric is its sampling/sampling_logp_difference/mean.
    """
    lines = [
        "| arm | precision | lag-0 k3 | mean abs log_ratio | TRL's own metric | push, ms | step, CPU time | step, wall |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for (arm, precision), rounds in found.items():
        stock = found["stock", precision]
        cost = {
            kind: median(median(mine[kind]) / median(theirs[kind]) for mine, theirs in zip(rounds, stock, strict=True))
            for kind in ("cpu", "wall")
        }
        k3, size, own, push = (mean(x for r in rounds for x in r[name]) for name in ("k3", "abs_mean", "own", "sync"))
        numbers = f"{k3:.2e} | {size:.2e} | {own:.2e} | {1e3 * push:.0f} | {cost['cpu']:.3f} | {cost['wall']:.3f}"
        lines.append(f"| {arm} | {precision} | {numbers} |")
    return lines


if __name__ == "__main__":
    main()
