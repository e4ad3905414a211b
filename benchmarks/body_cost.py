"""What a mirrored body and a steady engine cost: CPU seconds of both sides, interleaved, on a real model.

python -m benchmarks.body_cost FOLDER [--rounds N]

Engines are started in turn (vLLM's own, steady, and again) and sample the same prompts; then the trainer scores and differentiates
the same sequences, as transformers rounds and mirrored, in turn. Fastest of each. One thread.
"""

from __future__ import annotations

import argparse
import gc
import time
from pathlib import Path

import torch

from benchmarks.body_mirrored import OWN, STEADY, prompts_of
from benchmarks.exact import score
from rlalign.cli import set_environment
from rlalign.config import RolloutConfig
from rlalign.types import RolloutBatch, collate

SEQUENCES, TOKENS, PROMPTS, SCORED = 64, 48, 64, 16
BODIES = ("model", "mirrored")


def decoding(model: Path, starts: int, rounds: int) -> tuple[dict[str, list[float]], RolloutBatch]:
    """CPU seconds of sampling SEQUENCES completions of TOKENS tokens, per engine, and what was sampled."""
    from rlalign.rollout.engine.embedded import VLLMEngine
    from rlalign.run.assembly import load_tokenizer

    tokenizer = load_tokenizer(model)
    prompts = prompts_of(tokenizer, PROMPTS)
    rollout = RolloutConfig(
        max_tokens=TOKENS, max_model_len=256, max_num_seqs=SEQUENCES, enforce_eager=True, prefix_caching=False,
        max_num_batched_tokens=1024,
    )  # fmt: skip
    seconds: dict[str, list[float]] = {OWN: [], STEADY: []}
    for _ in range(starts):
        for kind, found in seconds.items():
            engine = VLLMEngine(model, rollout, dtype="bfloat16", head_dtype="float32", seed=0, steady=kind == STEADY)
            try:
                for at in range(rounds + 1):
                    began = time.process_time()
                    rollouts = engine.generate(prompts, prompt_ids=range(PROMPTS), samples=1, seed=1)
                    spent = time.process_time() - began
                    if at:
                        found.append(spent / sum(sum(r.loss_mask) for r in rollouts))
                batch = collate(rollouts, pad_token_id=tokenizer.pad_token_id, spec=engine.spec)
            finally:
                engine.close()
                gc.collect()
    return seconds, batch


def training(model: Path, batch: RolloutBatch, rounds: int) -> dict[str, dict[str, list[float]]]:
    """CPU seconds of the trainer's two passes over SCORED sequences, per body."""
    from rlalign.diagnose.both_sides import trainer_network
    from rlalign.rollout.worker import cpu
    from rlalign.trainer.rounding.mirroring import BodyPlan

    few = batch.rows(slice(0, SCORED))
    networks = {
        body: trainer_network(model, "bfloat16", mirrored=BodyPlan(cpu) if body == "mirrored" else None)
        for body in BODIES
    }
    seconds: dict[str, dict[str, list[float]]] = {}
    for name, grad in (("forward", False), ("forward + backward", True)):
        found = seconds[name] = {body: [] for body in BODIES}
        for at in range(rounds + 1):
            for body, network in networks.items():
                began = time.process_time()
                score(network, few, grad=grad)
                if at:
                    found[body].append(time.process_time() - began)
    return seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--starts", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    set_environment()
    torch.set_num_threads(1)
    engines, batch = decoding(options.model, options.starts, options.rounds)
    own, steady = (min(engines[kind]) for kind in (OWN, STEADY))
    print("| operation | model, or vLLM's own | mirrored, or steady | ratio of the fastest |\n|---|--:|--:|--:|")
    print(f"| engine, ms a sampled token | {1e3 * own:.2f} | {1e3 * steady:.2f} | {steady / own:.2f} |", flush=True)
    sums = [0.0, 0.0]
    for name, found in training(options.model, batch, 2 * options.rounds).items():
        plain, mirrored = (min(found[body]) for body in BODIES)
        sums = [sums[0] + plain, sums[1] + mirrored]
        print(f"| trainer, {name}, s | {plain:.2f} | {mirrored:.2f} | {mirrored / plain:.2f} |", flush=True)
    print(f"| trainer, both passes, s | {sums[0]:.2f} | {sums[1]:.2f} | {sums[1] / sums[0]:.2f} |")


if __name__ == "__main__":
    main()
