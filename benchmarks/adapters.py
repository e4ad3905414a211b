"""LoRA published merged against LoRA served unmerged by vLLM: bytes, seconds and lag-0 k3.

    python -m benchmarks.adapters NAME=FOLDER[:DTYPE] ... [--out FILE]

A policy takes a few updates with random advantages; what they teach does not matter, how far they move the adapters does. Then the
same adapters reach vLLM in both ways, each engine in a process of its own: merged weights through a publish that reads them back,
and peft's files through vLLM's own LoRA layers beside the float32 head. Both sample the same prompts; the trainer, unmerged as
always, scores what they sampled.
"""

from __future__ import annotations

import argparse
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from rlalign import mismatch
from rlalign.config import AlgoConfig, LoraConfig, RolloutConfig, TrainerConfig
from rlalign.objective import choice, corrections
from rlalign.tracking import environment
from rlalign.types import LogprobSpec, Rollout, TrainBatch, collate

RANKS, SEEDS, PROMPTS, STEPS, TOKENS = (4, 32), (0, 1, 2), 24, 6, 24
ENGINE = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1"}
WAYS = ("base", "merged", "unmerged")
CONFIG = RolloutConfig(max_tokens=TOKENS, max_model_len=128, max_num_seqs=64, enforce_eager=True)


def prompts_of(folder: Path) -> list[list[int]]:
    """Ids of a few sums."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer(f"{i + 11} + {3 * i + 17} =").input_ids for i in range(PROMPTS)]


def updated(policy: object, rollouts: Sequence[Rollout]) -> None:
    """STEPS updates with random advantages."""
    batch, draws = collate(rollouts, pad_token_id=0, spec=LogprobSpec()), torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        old_BL, _ = policy.score(batch)
        correction = corrections.identity(old_BL, old_BL, batch.loss_mask_BL)
        whole = TrainBatch(
            rollouts=batch, old_logprobs_BL=old_BL, correction=correction, num_tokens=int(correction.keep.sum()),
            advantages_BL=torch.randn(len(batch), 1, generator=draws).expand(old_BL.shape), num_sequences=len(batch),
            ref_logprobs_BL=None,
        )  # fmt: skip
        policy.forward_backward(whole, partial(choice.policy_loss, algo=AlgoConfig(), max_tokens=TOKENS))
        policy.optim_step()


def sample(way: str, folder: Path, dtype: str, scratch: Path) -> None:
    """One engine: rollouts by seed, and bytes and seconds of bringing the adapters to it, as a pickle in `scratch`."""
    from rlalign.rollout.engine.embedded import VLLMEngine
    from rlalign.weights import publish

    prompts, size, seconds = prompts_of(folder), 0, 0.0
    if way == "unmerged":
        size, seconds, found = _unmerged(folder, dtype, prompts, scratch / "saved" / "adapter")
    else:
        engine = VLLMEngine(folder, CONFIG, dtype=dtype, head_dtype="float32", seed=0)
        if way == "merged":
            weights = torch.load(scratch / "merged.pt")
            report = publish(weights.items(), 1, receiver=engine, shared=scratch)
            size, seconds = report.bytes, report.seconds
        found = [engine.generate(prompts, seed=seed, prompt_ids=range(PROMPTS), samples=1) for seed in SEEDS]
        engine.close()
    (scratch / f"{way}.pickle").write_bytes(pickle.dumps((size, seconds, found)))


def _unmerged(folder: Path, dtype: str, prompts: list, adapter: Path) -> tuple[int, float, list[list[Rollout]]]:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    import rlalign
    from rlalign.rollout.engine.completions import rollout_of

    llm = LLM(
        model=str(folder), dtype=dtype, max_model_len=128, max_num_seqs=64, enforce_eager=True, enable_lora=True,
        max_lora_rank=max(RANKS), logprobs_mode="processed_logprobs", generation_config="vllm",
        worker_extension_cls="rlalign.rollout.worker.extension.WorkerExtension",
        additional_config={"rlalign": {"head_dtype": "float32"}},
    )  # fmt: skip
    engine = rlalign.attach(llm)
    began, request = time.perf_counter(), LoRARequest("policy", 1, str(adapter))
    llm.llm_engine.add_lora(request)
    report = engine.verify_adapter(adapter, 1, version=1)
    seconds, found = time.perf_counter() - began, []
    for seed in SEEDS:
        params = [
            SamplingParams(max_tokens=TOKENS, temperature=1.0, logprobs=0, flat_logprobs=True, seed=1000 * seed + i)
            for i in range(PROMPTS)
        ]
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False, lora_request=request)
        found.append(
            [
                rollout_of(prompts[i], output.outputs[0], prompt_id=i, group_id=i, version=1)
                for i, output in enumerate(outputs)
            ]
        )
    return report.bytes, seconds, found


def compared(name: str, folder: Path, dtype: str, rank: int, scratch: Path) -> list[str]:
    """The lines of one policy."""
    from rlalign.trainer.policy import Policy

    def sampled(way: str) -> tuple[int, float, list[list[Rollout]]]:
        command = [
            sys.executable,
            "-m",
            "benchmarks.adapters",
            f"{name}={folder}:{dtype}",
            "--way",
            way,
            "--scratch",
            str(scratch),
        ]
        subprocess.run(command, check=True, env=os.environ | ENGINE)
        return pickle.loads((scratch / f"{way}.pickle").read_bytes())

    trainer = TrainerConfig(lora=LoraConfig(rank=rank, alpha=2.0 * rank))
    policy = Policy(folder, trainer, AlgoConfig(lr=2e-3), dtype=dtype, head_dtype="float32", temperature=1.0, seed=0)
    lines = []
    for way in WAYS:
        size, seconds, found = sampled(way)
        k3 = [_k3(policy, rollouts) for rollouts in found]
        cells = [f"{size / 2**20:.2f}", f"{seconds:.2f}", ", ".join(f"{k:.1e}" for k in k3)]
        lines.append(f"| {name}, {dtype}, rank {rank} | {way} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
        if way == "base":  # before the updates, the adapters are nothing
            updated(policy, found[0])
            torch.save(dict(policy.named_weights()), scratch / "merged.pt")
            policy.save(scratch / "saved")
    policy.close()
    return lines


def _k3(policy: object, rollouts: list[Rollout]) -> float:
    batch = collate(rollouts, pad_token_id=0, spec=LogprobSpec())
    return mismatch.compare(policy.score(batch)[0], batch.rollout_logprobs_BL, batch.loss_mask_BL, positions=False)[
        "k3"
    ]


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="NAME=FOLDER[:DTYPE]")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "adapters.md")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = []
    for item in options.models:
        name, _, place = item.partition("=")
        folder, _, dtype = place.partition(":")
        if options.way:
            sample(options.way, Path(folder), dtype, options.scratch)
            os._exit(0)  # vLLM's process group would be waited for
        for rank in RANKS:
            with tempfile.TemporaryDirectory() as scratch:
                lines += compared(name, Path(folder), dtype or "bfloat16", rank, Path(scratch))
    versions = environment.snapshot()["versions"]
    head = f"""# LoRA merged and published, LoRA served unmerged

`python -m benchmarks.adapters`: {STEPS} updates at 2e-3, then {PROMPTS} prompts of {TOKENS} tokens at lag 0 for each of
{len(SEEDS)} seeds; float32 heads. MiB and seconds of bringing the adapters to the engine, both read back on every rank (`publish`,
`verify_adapter`). {environment.cpu_model()}, vllm {versions["vllm"]}, torch {versions["torch"]}; shared with other work.

| policy | way | MiB | seconds | k3 by seed |
|---|---|--:|--:|---|
"""
    options.out.write_text(head + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
