"""What exact mode costs: sampling, the trainer's forward, forward and backward, beside the same without it. results/exact.md.

python -m benchmarks.exact
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from benchmarks.random_policy import build
from rlalign.cli import set_environment
from rlalign.config import RolloutConfig
from rlalign.tracking import environment
from rlalign.types import RolloutBatch, collate

OPERATIONS = ("sampling", "trainer forward", "forward + backward")


@dataclass(frozen=True)
class Load:
    """Prompts of one length, completions of each, tokens sampled."""

    name: str
    prompts: int
    length: int
    samples: int
    tokens: int
    rounds: int


LOADS = {
    "demo": Load("The demo's policy (0.4 M)", 16, 8, 8, 6, 7),
    "68m": Load("random Qwen3 (68 M)", 2, 64, 2, 16, 2),
}


def measure(model: Path, load: Load, dtype: str) -> dict[str, tuple[list[float], list[float]]]:
    """{operation: (plain seconds, exact seconds)}, one after the other in every round."""
    from rlalign.diagnose.both_sides import trainer_network
    from rlalign.rollout.engine.embedded import VLLMEngine

    rollout = RolloutConfig(
        max_tokens=load.tokens, max_model_len=256, max_num_seqs=128, enforce_eager=True, prefix_caching=False
    )
    kinds = {"dtype": dtype, "head_dtype": "float32", "seed": 0}
    engines = [VLLMEngine(model, rollout, exact=exact, **kinds) for exact in (False, True)]
    try:
        networks = [trainer_network(model, dtype, exact=exact) for exact in (False, True)]
        generator = torch.Generator().manual_seed(0)
        prompts = torch.randint(3, 250, (load.prompts, load.length), generator=generator).tolist()

        def sample(engine: VLLMEngine) -> RolloutBatch:
            found = engine.generate(prompts, prompt_ids=range(len(prompts)), samples=load.samples, seed=1)
            return collate(found, pad_token_id=0, spec=engine.spec)

        batches = [sample(engine) for engine in engines]
        equal = torch.equal(score(networks[1], batches[1], grad=False), batches[1].rollout_logprobs_BL)
        assert equal, "exact mode was timed, but it is not exact"
        parts: dict[str, Callable[[int], object]] = {
            "sampling": lambda side: sample(engines[side]),
            "trainer forward": lambda side: score(networks[side], batches[0], grad=False),
            "forward + backward": lambda side: score(networks[side], batches[0], grad=True),
        }
        for part in parts.values():  # warm
            part(0), part(1)
        return {name: interleaved(part, (0, 1), load.rounds) for name, part in parts.items()}
    finally:
        for engine in engines:
            engine.close()


def score(network: nn.Module, batch: RolloutBatch, *, grad: bool) -> torch.Tensor:
    """The trainer's logprobs [B, L] with its float32 head; with grad also the gradient of their sum."""
    from rlalign.trainer.head_mirror import Tokens, mirror

    mirror(network, head_dtype="float32", chunk=0)
    network.zero_grad()
    with torch.set_grad_enabled(grad):
        body = network.base_model(input_ids=batch.token_ids_BL, attention_mask=batch.attention_mask_BL, use_cache=False)
        tokens = Tokens(batch.token_ids_BL, batch.loss_mask_BL, 1.0)
        logprobs_BL, _ = network.get_output_embeddings()(body.last_hidden_state, tokens, exact=not grad)
        if grad:
            logprobs_BL.sum().backward()
    return logprobs_BL.detach()


T = TypeVar("T")


def interleaved(part: Callable[[T], object], sides: tuple[T, T], rounds: int) -> tuple[list[float], list[float]]:
    """CPU seconds of both sides, in turn: whatever runs is inside this process, on one thread."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for side, taken in zip(sides, seconds, strict=True):
            began = time.process_time()
            part(side)
            taken.append(time.process_time() - began)
    return seconds


def row(load: Load, dtype: str, name: str, plain: list[float], exact: list[float]) -> str:
    numbers = [min(plain), statistics.median(plain), min(exact), statistics.median(exact)]
    cells = [load.name, dtype, name, *(f"{1e3 * n:.0f}" for n in numbers)]
    return "| " + " | ".join([*cells, f"{min(exact) / min(plain):.1f}"]) + " |"


def page(rows: list[str]) -> str:
    """The table and where it comes from."""
    about = environment.snapshot()
    versions = ", ".join(f"{n} {about['versions'][n]}" for n in ("vllm", "torch", "transformers"))
    shapes = "; ".join(
        f"{x.name}: {x.prompts} prompts of {x.length} tokens, {x.samples} completions each, {x.tokens} tokens, {x.rounds} rounds"
        for x in LOADS.values()
    )
    lines = [
        "# What exact mode costs",
        "",
        "`exact=true` beside the same work without it, float32 head on both sides in both cases; CPU milliseconds, smallest",
        "and median, taken in turn; the last column is the ratio of the smallest. Before it is timed exact mode is compared: every",
        f"sampled logprob has the trainer's bits. {shapes}.",
        f"{about['cpu']}, one thread, {versions}.",
        "",
        "    python -m benchmarks.exact",
        "",
        "| model | body | | plain, min | median | exact, min | median | times |",
        "|---|---|---|--:|--:|--:|--:|--:|",
        *rows,
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="append", choices=tuple(LOADS), help="only this one (default both)")
    parser.add_argument(
        "--keep", type=Path, help="rows of earlier calls, added to: models can be measured one at a time"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "exact.md")
    arguments = parser.parse_args()
    set_environment()
    torch.set_num_threads(1)
    from rlalign.tiny_policy import cached_policy

    rows = json.loads(arguments.keep.read_text()) if arguments.keep and arguments.keep.exists() else []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.model or LOADS:
            rows = [r for r in rows if not r.startswith(f"| {LOADS[name].name} |")]
            model = cached_policy("untied") if name == "demo" else build(Path(folder) / "model")
            for dtype in ("float32", "bfloat16"):
                found = measure(model, LOADS[name], dtype)
                rows += [row(LOADS[name], dtype, operation, *found[operation]) for operation in OPERATIONS]
    if arguments.keep:
        arguments.keep.write_text(json.dumps(rows))
    arguments.out.write_text(page(rows))
    print(arguments.out.read_text())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
