"""How far the two sides are apart at lag 0 with the body as transformers rounds and mirrored, op by op, and what it costs.

python -m benchmarks.body_mirrored NAME=FOLDER ... [--samples N] [--tokens N] [--out FILE]

For each model an engine as vLLM builds it and a steady one sample the same prompts; the trainer's model scores both, first as
transformers rounds, then mirrored. Heads are float32 on both sides throughout. The table is results/body_mirrored.md.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.exact import interleaved, score
from rlalign.cli import set_environment
from rlalign.config import RolloutConfig
from rlalign.tracking import environment
from rlalign.trainer.rounding.mirroring import BodyPlan
from rlalign.types import RolloutBatch, collate
from rlalign.weights import SHARED_MEMORY

if TYPE_CHECKING:
    from rlalign.rollout.engine.embedded import VLLMEngine

TOPICS = (
    "rainbows", "volcanoes", "bread", "chess", "bees", "glaciers", "the moon", "steam engines", "democracy", "coffee", "whales",
    "prime numbers", "the violin", "vaccines", "deserts", "paper", "magnets", "bridges", "dreams", "inflation", "sharks", "glass",
    "jazz", "tides", "the printing press", "honey", "satellites", "earthquakes", "silk", "photosynthesis", "clocks", "rice",
)  # fmt: skip
QUESTIONS = ("Explain {} to a child.", "Write a short story about {}.", "List five facts about {}, with reasons.")
OWN, STEADY = "vLLM's own", "steady"
DRAWS, ROUNDS, STEP_SEQUENCES = 1000, 7, 8


@dataclass
class Found:
    """Of one model. gaps: (engine, route, body) -> row of numbers; seconds: operation -> (without, with)."""

    name: str
    gaps: dict[tuple[str, str, str], dict[str, float]] = field(default_factory=dict)
    seconds: dict[str, tuple[list[float], list[float]]] = field(default_factory=dict)
    ops: list[str] = field(default_factory=list)
    probed_tokens: int = 0
    plan: BodyPlan | None = None


def gap(own_BL: Tensor, rollout_BL: Tensor, batch: RolloutBatch) -> dict[str, float]:
    """k3 and mean |log_ratio| in nats per token with 95 % intervals; whole completions are drawn, not tokens."""
    rows = [own_BL[i][m].double() - rollout_BL[i][m].double() for i, m in enumerate(batch.loss_mask_BL)]
    sums = np.array(
        [[len(x), float((x.exp() - 1 - x).sum()), float(x.abs().sum()), float((x == 0).sum())] for x in rows]
    )
    drawn = np.random.default_rng(0).integers(0, len(sums), (DRAWS, len(sums)))
    means = sums[drawn].sum(1)
    means = means[:, 1:3] / means[:, :1]
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    tokens, k3, mean, equal = sums.sum(0)
    return {
        "tokens": tokens, "k3": k3 / tokens, "k3_low": low[0], "k3_high": high[0],
        "mean": mean / tokens, "mean_low": low[1], "mean_high": high[1], "equal": equal / tokens,
    }  # fmt: skip


def prompts_of(tokenizer: object, count: int) -> list[list[int]]:
    """Token ids of so many prompts: questions through the chat template or without one; sums for a vocabulary of bytes."""
    if len(tokenizer) < 1000:
        return [tokenizer(f"{a}+{b}=")["input_ids"] for a in range(11, 99) for b in range(11, 99)][:: 7744 // count][
            :count
        ]
    said = [q.format(t) for q in QUESTIONS for t in TOPICS][:count]
    if tokenizer.chat_template is None:
        return [tokenizer(f"Question: {text}\nAnswer:")["input_ids"] for text in said]
    turns = [[{"role": "user", "content": text}] for text in said]
    return [list(tokenizer.apply_chat_template(t, add_generation_prompt=True, return_dict=False)) for t in turns]


def sampled(model: Path, options: argparse.Namespace, *, steady: bool, found: Found) -> tuple[RolloutBatch, Tensor]:
    """Completions of the prompts with the engine's logprobs as decoded, and the same tokens' prefilled."""
    from rlalign.rollout.engine.embedded import VLLMEngine
    from rlalign.run.assembly import load_tokenizer

    tokenizer = load_tokenizer(model)
    prompts = prompts_of(tokenizer, options.prompts)
    rollout = RolloutConfig(
        max_tokens=options.tokens, max_model_len=512 if options.tokens > 32 else 128, max_num_seqs=64, enforce_eager=True,
        prefix_caching=False, max_num_batched_tokens=1024,
    )  # fmt: skip
    engine = VLLMEngine(model, rollout, dtype="bfloat16", head_dtype="float32", seed=0, steady=steady)
    try:
        rollouts = engine.generate(prompts, prompt_ids=range(len(prompts)), samples=options.samples, seed=1)
        batch = collate(rollouts, pad_token_id=tokenizer.pad_token_id, spec=engine.spec)
        tokens = [batch.token_ids_BL[i][m].tolist() for i, m in enumerate(batch.attention_mask_BL)]
        prefilled_BL = torch.zeros(batch.token_ids_BL.shape)
        for i, row in enumerate(engine.score(tokens)):
            prefilled_BL[i, : len(row)] = torch.tensor(row)
        if steady:
            found.plan = probed(engine, model, prompts, found)
        return batch, prefilled_BL
    finally:
        engine.close()
        gc.collect()


def probed(engine: VLLMEngine, model: Path, prompts: list[list[int]], found: Found) -> BodyPlan:
    """The table of single ops, prefilled and decoded, on a few sequences."""
    from rlalign.diagnose.both_sides import trainer_network
    from rlalign.loops.mirrors import examine, recorded, settle

    network, few = trainer_network(model, "bfloat16"), prompts[:12]
    one, _ = recorded(
        engine,
        lambda: engine.generate(few, prompt_ids=range(len(few)), samples=1, seed=2),
        SHARED_MEMORY,
        lambda answer: examine(network, answer),
    )
    settled = settle(one, network)
    found.ops, found.probed_tokens = settled.describe(), one.tokens
    return settled.plan


def trainer_logprobs(network: nn.Module, batch: RolloutBatch, rows: int = 16) -> Tensor:
    """[B, L] in micro-batches, as a trainer scores."""
    return torch.cat([score(network, batch.rows(slice(i, i + rows)), grad=False) for i in range(0, len(batch), rows)])


def measure(name: str, model: Path, options: argparse.Namespace) -> Found:
    """Everything about one model."""
    from rlalign.diagnose.both_sides import trainer_network

    found, batches = Found(name), {}
    for engine in options.engines:
        began = time.time()
        batch, prefilled_BL = batches[engine] = sampled(model, options, steady=engine == STEADY, found=found)
        found.gaps[engine, "decode - prefill", "the engine with itself"] = gap(
            prefilled_BL, batch.rollout_logprobs_BL, batch
        )
        print(f"{name}: {engine}, {time.time() - began:.0f} s", flush=True)
    plans = {"model": None, "mirrored": found.plan}
    networks = {body: trainer_network(model, "bfloat16", mirrored=plan) for body, plan in plans.items()}
    for engine, (batch, prefilled_BL) in batches.items():
        for body, network in networks.items():
            own_BL = trainer_logprobs(network, batch)
            for route, theirs_BL in (("decode", batch.rollout_logprobs_BL), ("prefill", prefilled_BL)):
                row = found.gaps[engine, route, body] = gap(own_BL, theirs_BL, batch)
                print(name, engine, route, body, row, flush=True)
    if options.no_cost:
        return found
    few = batches[STEADY][0].rows(slice(0, STEP_SEQUENCES))
    parts: dict[str, Callable[[str], object]] = {
        "trainer forward": lambda body: score(networks[body], few, grad=False),
        "trainer forward + backward": lambda body: score(networks[body], few, grad=True),
    }
    for part, run in parts.items():
        first, second = interleaved(run, ("model", "mirrored"), ROUNDS + 1)
        found.seconds[part] = first[1:], second[1:]  # the first round warms up
        print(name, part, [min(s) for s in found.seconds[part]], flush=True)
    return found


def page(every: list[Found], options: argparse.Namespace) -> str:
    """The tables, and where they come from."""
    about = environment.snapshot()
    versions = ", ".join(f"{n} {about['versions'][n]}" for n in ("vllm", "torch", "transformers"))
    lines = [
        "# A mirrored body", "",
        f"`python -m benchmarks.body_mirrored`, {about['cpu']}, {versions}; bf16 bodies, float32 heads, one thread. "
        f"{options.prompts} prompts, {options.samples} completions each of up to {options.tokens} tokens, temperature 1. "
        "Intervals: 95 %, bootstrap over completions.", "",
        "| model | engine | route | trainer's body | tokens | k3 | mean abs log_ratio, nats | equal in every bit |",
        "|---|---|---|---|--:|--:|--:|--:|",
    ]  # fmt: skip
    for found in every:
        for (engine, route, body), g in found.gaps.items():
            k3 = f"{g['k3']:.2e} ({g['k3_low']:.2e} to {g['k3_high']:.2e})"
            mean = f"{g['mean']:.2e} ({g['mean_low']:.2e} to {g['mean_high']:.2e})"
            lines.append(
                f"| {found.name} | {engine} | {route} | {body} | {g['tokens']:.0f} | {k3} | {mean} | {g['equal']:.2%} |"
            )
    lines += [
        "",
        "## Cost",
        "",
        f"CPU seconds, fastest of {ROUNDS} interleaved rounds over {STEP_SEQUENCES} sequences.",
        "",
    ]
    lines += [
        "| model | operation | model | mirrored | ratio, fastest | ratio, medians |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for found in every:
        for part, (plain, mirrored) in found.seconds.items():
            ratio, middle = min(mirrored) / min(plain), statistics.median(mirrored) / statistics.median(plain)
            lines.append(
                f"| {found.name} | {part} | {min(plain):.2f} | {min(mirrored):.2f} | {ratio:.2f} | {middle:.2f} |"
            )
    for found in every:
        lines += [
            "",
            f"## {found.name}, op by op",
            "",
            f"Share of differing elements, {found.probed_tokens} tokens.",
            "",
            *found.ops,
        ]
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--engines", nargs="+", choices=(OWN, STEADY), default=[OWN, STEADY])
    parser.add_argument("--no-cost", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    set_environment()
    torch.set_num_threads(1)
    every: list[Found] = []
    for text in options.models:
        name, folder = text.split("=", 1)
        every.append(measure(name, Path(folder), options))
        if options.out:
            options.out.write_text(page(every, options))
    print(page(every, options))


if __name__ == "__main__":
    main()
