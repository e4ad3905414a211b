"""Steps of `rlalign train` against TRL's GRPOTrainer: same model, prompts, rewards, group sizes, lengths and machine.

python benchmarks/loop.py --peer PYTHON [--size demo|m69] [--write]      PYTHON: of an environment with trl, vllm, datasets

Runs are interleaved (A B A B ...), each a process of its own; medians over the steps of all of a side's runs, the first ones
left out. Seconds on the wall, and of the processor (both sides run vLLM inside their process), which other programs on
the machine hardly change. Ours also says where its processor time goes: generation, forward and backward, optimizer, publish,
and the rest, which is its own overhead.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "loop.md"
PEER = Path(__file__).parent / "loop_trl.py"
SIZES = {
    "demo": {"prompts_per_step": 32, "group_size": 8, "max_tokens": 6, "max_model_len": 64, "steps": 20, "lr": 3e-4},
    "m69": {"prompts_per_step": 4, "group_size": 8, "max_tokens": 48, "max_model_len": 128, "steps": 5, "lr": 1e-6},
}
WARM_UP = {"demo": 2, "m69": 1}  # steps of each run that are not counted
OURS = {"demo": ["trainer.pack_tokens=4096"], "m69": ["trainer.pack_tokens=2048"]}
THEIRS = {
    "demo": {"precision": "fp32", "micro_batch_size": 256},
    "m69": {"precision": "bf16", "micro_batch_size": 32},  # autocast, with fp32 weights as ours, is slower
}
ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "TOKENIZERS_PARALLELISM": "false",
}


def main() -> None:
    """Compare, or run one side of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, help="python of the peer's environment")
    parser.add_argument("--sides", nargs="+", choices=("rlalign", "trl"), default=["rlalign", "trl"])
    parser.add_argument("--size", choices=SIZES, default="demo")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each side")
    parser.add_argument("--threads", type=int, default=1, help="of torch, for both sides")
    parser.add_argument("--precision", choices=("fp32", "autocast", "bf16"), help="of the peer's trainer")
    parser.add_argument("--runs", type=Path, default=Path("loop_runs.jsonl"), help="file of runs, appended to")
    parser.add_argument(
        "--write", action="store_true", help="append the table of all runs in that file to results/loop.md"
    )
    parser.add_argument("--ours", help=argparse.SUPPRESS)  # a child: JSON of one run
    parser.add_argument("overrides", nargs="*", help="of our configuration")
    arguments = parser.parse_args()
    if arguments.ours:
        print("RESULT " + json.dumps(run_ours(json.loads(arguments.ours))))
        return
    run_all(arguments)
    rows = [json.loads(line) for line in arguments.runs.read_text().splitlines()]
    for size in dict.fromkeys(row["size"] for row in rows):
        text = table(size, [row for row in rows if row["size"] == size])
        print(text)
        if arguments.write:
            with RESULTS.open("a") as file:
                file.write(text)


def run_all(arguments: argparse.Namespace) -> None:
    """Interleaved runs of the chosen sides, each added to the file of runs."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = build_model(work / "m69") if arguments.size == "m69" else tiny()
        shared = SIZES[arguments.size] | {"model": str(model), "threads": arguments.threads}
        prompts = write_prompts(work / "prompts.jsonl", shared)
        peer = shared | THEIRS[arguments.size] | {"vllm": True, "prompts": str(prompts), "output": str(work / "peer")}
        peer |= {"precision": arguments.precision} if arguments.precision else {}
        ours = shared | {"overrides": OURS[arguments.size] + arguments.overrides, "output": str(work / "ours")}
        for _ in range(arguments.rounds):
            for side in arguments.sides:
                command = [sys.executable, __file__, "--ours", json.dumps(ours)]
                if side == "trl":
                    command = [str(arguments.peer), str(PEER), json.dumps(peer)]
                found = child(command, arguments.threads, plugins="none" if side == "trl" else "rlalign")
                setting = peer["precision"] if side == "trl" else " ".join(ours["overrides"])
                told = {"size": arguments.size, "side": side, "setting": f"{setting}, {arguments.threads} thread(s)"}
                with arguments.runs.open("a") as file:
                    file.write(json.dumps(told | found) + "\n")


def child(command: list[str], threads: int, *, plugins: str = "rlalign") -> dict:
    """What a run printed as its result. Raises RuntimeError with the end of its output when there is none.

    plugins: of vLLM; the peer's engine must not have our head where both are installed.
    """
    environment = ENVIRONMENT | os.environ | {"OMP_NUM_THREADS": str(threads), "VLLM_PLUGINS": plugins}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=290)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    raise RuntimeError(f"{command[:2]} gave no result:\n{done.stderr[-3000:]}")


def summary(runs: list[dict]) -> dict[str, object]:
    """Medians over the counted steps of all runs."""
    first = WARM_UP[runs[0]["size"]]
    steps = [second for run in runs for second in run["step_s"][first:]]
    tokens = [count for run in runs for count in run["tokens"]]
    step_s = statistics.median(steps)
    found: dict[str, object] = {
        "step_s": step_s,
        "fastest_s": min(steps),
        "cpu_s": statistics.median(second for run in runs for second in run["cpu_s"][first:]),
        "steps_per_min": 60 / step_s,
        "tokens_per_s": statistics.mean(tokens) / step_s,
        "of_each_run": [statistics.median(run["cpu_s"][first:]) for run in runs],
        "reward": runs[-1]["reward"],
    }
    if "phases" in runs[0]:
        rows = [row for run in runs for row in run["phases"][first:]]
        found["phases"] = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    return found


def run_ours(arguments: dict) -> dict[str, object]:
    """`rlalign train` in this process, with a clock around the verbs of its parties."""
    from rlalign.config import compose, load
    from rlalign.rollout.engine.embedded import VLLMEngine
    from rlalign.run import assembly, train
    from rlalign.run import step as loop
    from rlalign.tracking.run_directory import Run
    from rlalign.trainer.policy import Policy

    spent: dict[str, float] = {}
    rows: list[dict[str, float]] = []
    logged: list[dict[str, float]] = []
    for owner, verb, phase in (
        (VLLMEngine, "generate", "generation"),
        (Policy, "score", "score: forward"),
        (Policy, "forward_backward", "train: forward and backward"),
        (Policy, "optim_step", "optimizer"),
    ):
        setattr(owner, verb, clocked(getattr(owner, verb), phase, spent))
    parties_of = assembly.parties
    plain_log, plain_step = Run.log, loop.train_step
    ends: list[tuple[float, float]] = []

    def with_clock(*given, **options):
        parties = parties_of(*given, **options)
        return replace(parties, publish=clocked(parties.publish, "publish", spent))

    def step(*given, **options):
        spent.clear()
        began = time.process_time()
        result = plain_step(*given, **options)
        whole = time.process_time() - began
        rows.append({**spent, "rest: rlalign's own": whole - sum(spent.values()), "step": whole})
        return result

    def log(self, number, metrics):
        plain_log(self, number, metrics)
        logged.append(dict(metrics))
        ends.append((time.perf_counter(), time.process_time()))

    assembly.parties, train.train_step, Run.log = with_clock, step, log
    config = load(compose("demo", overrides(arguments)))
    train.train(config)
    step_s, cpu_s = ([end - start for start, end in pairwise(times)] for times in zip(*ends, strict=True))
    return {
        "step_s": step_s[:-1],  # the last step also evaluates
        "cpu_s": cpu_s[:-1],
        "tokens": [row["rollout/tokens"] for row in logged],
        "reward": [row["reward/mean"] for row in logged],
        "phases": rows[:-1],
    }


def clocked(verb: Callable, phase: str, spent: dict[str, float]) -> Callable:
    """The verb, with its processor seconds added to `spent`."""

    def timed(*given, **options):
        began = time.process_time()
        try:
            return verb(*given, **options)
        finally:
            spent[phase] = spent.get(phase, 0.0) + time.process_time() - began

    return timed


def overrides(arguments: dict) -> list[str]:
    """Our configuration of a run: the demo's, at this size, evaluated at its ends only."""
    return [
        f"model.path={arguments['model']}",
        f"steps={arguments['steps']}",
        f"output_dir={arguments['output']}",
        f"algo.lr={arguments['lr']}",
        "mismatch.action=warn",  # a random model's bf16 mismatch is no subject here
        "tracking.wandb=disabled",
        "tracking.eval_every=100000",
        "task.eval_size=16",
        f"trainer.threads={arguments['threads']}",
        *(
            f"rollout.{name}={arguments[name]}"
            for name in ("prompts_per_step", "group_size", "max_tokens", "max_model_len")
        ),
        *arguments["overrides"],
    ]


def write_prompts(path: Path, arguments: dict) -> Path:
    """The prompts of our steps, in their order, with their answers, for the peer."""
    from rlalign.config import compose, load
    from rlalign.run.assembly import load_task_of

    config = load(compose("demo", overrides(arguments | {"overrides": [], "output": "none"})))
    task = load_task_of(config)
    rows = [
        {"prompt": prompt.text, "answer": str(sum(int(term) for term in prompt.text.rstrip(" =").split("+")))}
        for step in range(arguments["steps"])
        for prompt in task.train_prompts(step, arguments["prompts_per_step"])
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tiny() -> Path:
    """The demo's policy."""
    from rlalign.tiny_policy import cached_policy

    return cached_policy("untied")


def build_model(folder: Path, *, hidden: int = 512, layers: int = 12, vocabulary: int = 32_000) -> Path:
    """A random Qwen3 with the demo's tokenizer; 69 M parameters unless told otherwise."""
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=4, head_dim=64, max_position_embeddings=2048, tie_word_embeddings=False,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(tiny())
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    Qwen3ForCausalLM(config).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def table(size: str, rows: list[dict]) -> str:
    """One section of results/loop.md. The peer's fastest setting is what ours is compared with."""
    import torch

    by_setting: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        by_setting.setdefault((row["side"], row["setting"]), []).append(row)
    found = {key: summary(of_setting) for key, of_setting in sorted(by_setting.items())}
    shape = SIZES[size]
    lines = [
        f"\n## {size}: {shape['prompts_per_step']} x {shape['group_size']} completions of at most {shape['max_tokens']} tokens",
        f"`python benchmarks/loop.py --peer PYTHON --size {size}`; {os.cpu_count()} cores, torch {torch.__version__}; medians\n",
        "| | setting | processor s/step | of each run | wall s/step | fastest | steps/min | sampled tokens/s |",
        "|---|---|--:|---|--:|--:|--:|--:|",
    ]
    for (side, setting), one in found.items():
        runs = ", ".join(f"{second:.3f}" for second in one["of_each_run"])
        lines.append(
            f"| {side} | {setting} | {one['cpu_s']:.3f} | {runs} | {one['step_s']:.3f} | {one['fastest_s']:.3f} | "
            f"{one['steps_per_min']:.0f} | {one['tokens_per_s']:.0f} |"
        )
    best = {
        side: min((one for (of, _), one in found.items() if of == side), key=lambda one: one["cpu_s"])
        for side, _ in found
    }
    if len(best) == 2:
        ours, theirs = best["rlalign"], best["trl"]
        cpu, wall, fastest = (theirs[of] / ours[of] for of in ("cpu_s", "step_s", "fastest_s"))
        lines.append(
            f"\nRatio: **{cpu:.2f}x** of processor time, {wall:.2f}x on the wall, {fastest:.2f}x of the fastest steps"
        )
    if "rlalign" in best:
        phases = best["rlalign"]["phases"]
        lines += ["\n| phase of ours, processor time | ms | share |", "|---|--:|--:|"]
        lines += [f"| {name} | {1e3 * value:.1f} | {value / phases['step']:.1%} |" for name, value in phases.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
