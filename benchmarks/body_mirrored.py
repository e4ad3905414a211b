"""How far the two sides are apart at lag 0 with the body as transformers rounds and mirrored, op by op, and what it costs.

python -m benchmarks.body_mirrored NAME=FOLDER ... [--samples N] [--tokens N] [--out FILE]

For each model an engine as vLLM builds it and a steady one sample the same prompts; the trainer's model scores both, first as
transformers rounds, then mirrored. Heads are float32 on both sides throughout. The table is results/body_mirrored.md.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.exact import interleaved, score
from rlalign.cli import set_environment
from rlalign.config import RolloutConfig
from rlalign.tracking import environment
from rlalign.types import RolloutBatch, collate

TOPICS = (
    "rainbows", "volcanoes", "bread", "chess", "bees", "glaciers", "the moon", "steam engines", "democracy", "coffee", "whales",
    "prime numbers", "the violin", "vaccines", "deserts", "paper", "magnets", "bridges", "dreams", "inflation", "sharks", "glass",
    "jazz", "tides", "the printing press", "honey", "satellites", "earthquakes", "silk", "photosynthesis", "clocks", "rice",
)  # fmt: skip
QUESTIONS = ("Explain {} to a child.", "Write a short story about {}.", "List five facts about {}, with reasons.")
DRAWS, ROUNDS, STEP_SEQUENCES = 1000, 7, 8


@dataclass
class Found:
    """Of one model. gaps: (engine, route, body) -> row of numbers; seconds: operation -> (without, with)."""

    name: str
    gaps: dict[tuple[str, str, str], dict[str, float]] = field(default_factory=dict)
    seconds: dict[str, tuple[list[float], list[float]]] = field(default_factory=dict)
    ops: dict[str, list[dict[str, object]]] = field(default_factory=dict)
    chosen: str = ""


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
    """Token ids of so many prompts: questions through the chat template, sums where there is none."""
    if tokenizer.chat_template is None:
        return [tokenizer(f"{a}+{b}=")["input_ids"] for a in range(11, 99) for b in range(11, 99)][:: 7744 // count][
            :count
        ]
    said = [q.format(t) for q in QUESTIONS for t in TOPICS][:count]
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
        prefix_caching=False,
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
            probed(engine, model, batch, found)
        return batch, prefilled_BL
    finally:
        engine.close()
        gc.collect()


def probed(engine: object, model: Path, batch: RolloutBatch, found: Found) -> None:
    """The table of single ops, on a few sequences, prefilled and decoded."""
    from rlalign.diagnose.attribution import op_probe
    from rlalign.diagnose.attribution.mapping import match
    from rlalign.diagnose.attribution.trainer_side import module_names
    from rlalign.diagnose.both_sides import trainer_network
    from rlalign.rollout.engine import teacher_forcing
    from rlalign.rollout.worker import cpu_kernels

    network = trainer_network(model, "bfloat16")
    try:
        mapping = match(teacher_forcing.modules(engine), module_names(network))
    except ValueError as error:
        found.chosen = f"not probed: {str(error).splitlines()[0]}"
        return
    few, every = batch.rows(slice(0, 12)), []
    for route in teacher_forcing.Route:
        with tempfile.TemporaryDirectory() as folder:
            forced = teacher_forcing.record(engine, few, mapping.rollout_taps, Path(folder) / "r", route=route)
            decoded = route is teacher_forcing.Route.decode
            rows = op_probe.probe(network, forced.recording, mapping, decoded=decoded, kernels=cpu_kernels)
        found.ops[route.value], every = [row.as_dict() for row in rows], [*every, *rows]
    found.chosen = str(op_probe.chosen(every))


def trainer_logprobs(network: nn.Module, batch: RolloutBatch, rows: int = 16) -> Tensor:
    """[B, L] in micro-batches, as a trainer scores."""
    return torch.cat([score(network, batch.rows(slice(i, i + rows)), grad=False) for i in range(0, len(batch), rows)])


def measure(name: str, model: Path, options: argparse.Namespace) -> Found:
    """Everything about one model."""
    from rlalign.diagnose.both_sides import trainer_network

    found, batches = Found(name), {}
    for engine in ("vLLM's own", "steady"):
        began = time.time()
        batch, prefilled_BL = batches[engine] = sampled(model, options, steady=engine == "steady", found=found)
        found.gaps[engine, "decode - prefill", "the engine with itself"] = gap(
            prefilled_BL, batch.rollout_logprobs_BL, batch
        )
        print(f"{name}: {engine}, {time.time() - began:.0f} s", flush=True)
    networks = {body: trainer_network(model, "bfloat16", mirrored=body == "mirrored") for body in ("model", "mirrored")}
    for engine, (batch, prefilled_BL) in batches.items():
        for body, network in networks.items():
            own_BL = trainer_logprobs(network, batch)
            for route, theirs_BL in (("decode", batch.rollout_logprobs_BL), ("prefill", prefilled_BL)):
                row = found.gaps[engine, route, body] = gap(own_BL, theirs_BL, batch)
                print(name, engine, route, body, row, flush=True)
    few = batches["steady"][0].rows(slice(0, STEP_SEQUENCES))
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
        lines += ["", f"## {found.name}, op by op", "", f"Chosen: {found.chosen}.", ""]
        if found.ops:
            lines += [
                "| op | part | variant | differ, prefill | differ, decode | worst layer |",
                "|---|---|---|--:|--:|--:|",
            ]
            for one, other in zip(*found.ops.values(), strict=True):
                cells = [one["op"], one["part"], one["variant"], *(f"{x['differ']:.3%}" for x in (one, other))]
                lines.append(f"| {' | '.join(cells)} | {max(one['worst'], other['worst']):.3%} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=96)
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
            options.out.with_suffix(".json").write_text(json.dumps([[f.name, f.seconds, f.ops] for f in every]))
    print(page(every, options))


if __name__ == "__main__":
    main()
