"""TRL's GRPOTrainer with vLLM in its process, as it is and aligned: lag-0 mismatch, its own metric, and what a step costs.

    python benchmarks/attach_trl.py [--steps 20] [--precisions autocast bf16] [--model FOLDER --prompts 4 --group 4 --tokens 16]

Needs trl 1.16, datasets and pandas beside vLLM. The arms are processes of their own that take turns: one trains a step while the
others wait, in an order that reverses with every step. stock: TRL's own path with vLLM's reload in the place of its push, which
fails where vLLM packs weights (docs/upstream.md). rollout only: the same with RLALIGN_HEAD=float32, one side. aligned:
AlignedGRPOTrainer. autocast: TRL's default, float32 parameters under bf16 autocast. The engine computes in bf16 throughout.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, median, quantiles

ARMS = ("stock", "rollout only", "aligned")
PRECISIONS = ("autocast", "bf16")
WARM = 2  # steps whose time is not counted
SYNC_SECONDS: list[float] = []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS, choices=PRECISIONS)
    parser.add_argument("--model", type=Path, help="a folder; by default the demo's policy on its sums")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=6)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        worker(json.loads(given.worker))
        return
    sizes = {"prompts": given.prompts, "group": given.group, "tokens": given.tokens}
    for line in HEAD:
        print(line)
    for precision in given.precisions:
        asked = {"precision": precision, "steps": given.steps, "model": given.model and str(given.model), **sizes}
        for line in table(precision, in_turns(asked)):
            print(line, flush=True)


def in_turns(asked: dict) -> dict[str, dict]:
    """All arms of one precision: a step of each, then the next step."""
    arms = {arm: Arm(asked | {"arm": arm}) for arm in ARMS}
    try:
        for step in range(asked["steps"]):
            for arm in list(arms.values())[:: 1 if step % 2 else -1]:
                arm.step()
        return {name: arm.result() for name, arm in arms.items()}
    finally:
        for arm in arms.values():
            arm.process.kill()


class Arm:
    """One trainer in a process of its own, which trains a step when it is told to."""

    def __init__(self, asked: dict) -> None:
        environment = os.environ | {
            "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1", "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_WAIT_POLICY": "PASSIVE",
        }  # fmt: skip
        environment |= {"RLALIGN_HEAD": "float32"} if asked["arm"] == "rollout only" else {}
        self.name, self.errors = asked["arm"], tempfile.TemporaryFile("w+")  # noqa: SIM115 (as long as the process)
        self.process = subprocess.Popen(
            [sys.executable, asked.get("script", __file__), "--worker", json.dumps(asked)],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
        )  # fmt: skip
        self.answer("READY")

    def answer(self, word: str) -> str:
        for line in self.process.stdout:
            if line.startswith(word):
                return line.removeprefix(word)
        self.errors.seek(0)
        raise RuntimeError(f"{self.name} ended before {word}: {self.errors.read()[-3000:]}")

    def step(self) -> None:
        print("go", file=self.process.stdin, flush=True)
        self.answer("STEP")

    def result(self) -> dict:
        return json.loads(self.answer("RESULT "))


def worker(asked: dict) -> None:
    """Train step by step as the parent says, and print one line of numbers."""
    import torch
    from transformers import TrainerCallback

    from rlalign import compare

    torch.set_num_threads(1)
    found, trainer = {name: [] for name in ("k3", "abs_mean", "wall", "cpu")}, make_trainer(asked)
    generate_and_score = trainer._generate_and_score_completions

    def measured(inputs: object) -> dict:
        output = generate_and_score(inputs)
        logprobs = (output[name].float() for name in ("old_per_token_logps", "sampling_per_token_logps"))
        metrics = compare(*logprobs, output["completion_mask"].bool(), positions=False)
        for name in ("k3", "abs_mean"):
            found[name].append(metrics[name])
        return output

    class Turns(TrainerCallback):
        def on_step_begin(self, *_: object, **__: object) -> None:
            sys.stdin.readline()
            self.before = time.perf_counter(), time.process_time()

        def on_step_end(self, *_: object, **__: object) -> None:
            found["wall"].append(time.perf_counter() - self.before[0])
            found["cpu"].append(time.process_time() - self.before[1])
            print("STEP", flush=True)

    trainer._generate_and_score_completions = measured
    trainer.add_callback(Turns())
    print("READY", flush=True)
    trainer.train()
    logged = [log for log in trainer.state.log_history if "reward" in log]
    found["own"] = [log["sampling/sampling_logp_difference/mean"] for log in logged]
    found["reward"] = [log["reward"] for log in logged]
    found["sync"] = getattr(getattr(trainer, "alignment", None), "publish_seconds", SYNC_SECONDS)
    print("RESULT " + json.dumps(found), flush=True)
    os._exit(0)  # vLLM's process group would be waited for


def make_trainer(asked: dict) -> object:
    """One step a generation batch, all of it in one micro-batch: every old logprob is at lag 0."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    from rlalign.integrations.trl import AlignedGRPOTrainer, building_with
    from rlalign.tasks import load_task
    from rlalign.tiny_policy import cached_policy

    folder = asked["model"] or str(cached_policy("untied"))
    sums = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
    task = load_task("chain_sum", sums, train_size=512, eval_size=8, seed=0)
    rows = [
        {"prompt": p.text, "answer": p.answer}
        for step in range(asked["steps"])
        for p in task.train_prompts(step, asked["prompts"])
    ]

    def reward(completions: list, answer: list, **_: object) -> list[float]:
        right = [text.strip() == wanted for text, wanted in zip(completions, answer, strict=True)]
        return [float(is_right) - 0.01 * len(text) for is_right, text in zip(right, completions, strict=True)]

    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=asked["precision"] == "autocast",
        model_init_kwargs={"dtype": "bfloat16" if asked["precision"] == "bf16" else "float32"},
        gradient_checkpointing=False, per_device_train_batch_size=asked["prompts"] * asked["group"],
        num_generations=asked["group"], max_completion_length=asked["tokens"], temperature=1.0,
        learning_rate=1e-5 if asked["model"] else 3e-4, lr_scheduler_type="constant", max_steps=asked["steps"], beta=0.0,
        save_strategy="no", logging_steps=1, report_to="none", disable_tqdm=True, shuffle_dataset=False,
        dataloader_pin_memory=False, use_vllm=True, vllm_mode="colocate", vllm_max_model_length=128,
        vllm_gpu_memory_utilization=0.3, seed=0,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    kind = AlignedGRPOTrainer if asked["arm"] == "aligned" else GRPOTrainer
    with building_with({"enforce_eager": True, "dtype": "bfloat16"}):
        data = Dataset.from_list(rows)
        trainer = kind(model=folder, reward_funcs=reward, args=config, train_dataset=data, processing_class=tokenizer)
    if asked["arm"] != "aligned":
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


HEAD = (
    "| arm | precision | lag-0 k3 | mean abs log_ratio | TRL's own metric | push, ms | step, ms | step, CPU time | step, wall |",
    "|---|---|--:|--:|--:|--:|--:|--:|--:|",
)


def table(precision: str, found: dict[str, dict], own: tuple[str, ...] = ("own",)) -> list[str]:
    """Means over all steps; costs as the median over steps of the ratio to stock's same step, quartiles in brackets.

    own: the stack's own metrics; TRL's is its sampling/sampling_logp_difference/mean.
    """
    lines = []
    for arm, mine in found.items():
        stock = found["stock"]
        shown = []
        for kind in ("cpu", "wall"):
            ratios = [a / b for a, b in zip(mine[kind][WARM:], stock[kind][WARM:], strict=True)]
            low, middle, high = quantiles(ratios, n=4)
            shown.append("1" if arm == "stock" else f"{middle:.3f} [{low:.3f}, {high:.3f}]")
        gaps = " | ".join(f"{mean(mine[name]):.2e}" for name in ("k3", "abs_mean", *own))
        numbers = f"{gaps} | {1e3 * mean(mine['sync']):.0f} | {1e3 * median(mine['wall'][WARM:]):.0f}"
        lines.append(f"| {arm} | {precision} | {numbers} | {shown[0]} | {shown[1]} |")
    return lines


if __name__ == "__main__":
    main()
