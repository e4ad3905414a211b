"""16-bit products on this CPU: torch's own against `rlalign.head.widened`, for single layers, attention, and whole steps of
training.

python -m benchmarks.bf16_products [--model FOLDER] [--steps 2] [--device NAME] [--write]

Layers and attention: milliseconds, the smallest of a few, taken in turn. Steps: `rlalign train` of a random Llama of the shape of
SmolLM2-135M (30 layers, 576 wide, 9 heads on 3, 49,152 words, tied), each way in a process of its own, in turn.
device: what to call this machine, where the software does not see it as it is.
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
from pathlib import Path

import torch
from torch.nn import functional as F

from rlalign.head import widened

RESULTS = Path(__file__).parent / "results" / "bf16_products.md"
LAYERS = ((16, 576, 1536), (512, 576, 1536), (1000, 128, 384))  # tokens, inputs, outputs
ATTENTION = ((64, 4, 14, 32), (4, 9, 256, 64))  # sequences, heads, length, head size
WAYS = (widened.NATIVE, widened.WIDENED)
PHASES = {"rollout": "time/rollout_s", "score": "time/score_s", "train": "time/train_s", "step": "time/step_s"}


def main() -> None:
    """Measure, print and perhaps write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of the model of the steps; made where it is missing")
    parser.add_argument("--steps", type=int, default=2, help="of each run; the first is not counted; 0: none")
    parser.add_argument("--device", default="", help="what to call this machine")
    parser.add_argument("--write", action="store_true", help="append to results/bf16_products.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = [f"## {options.device or widened.host()}", "", *_layers()]
    if options.steps:
        with tempfile.TemporaryDirectory() as folder:
            model = build(options.model or Path(folder) / "model")
            lines += ["", *_steps(model, options.steps, Path(folder))]
    text = "\n".join(lines) + "\n"
    print(text)
    if options.write:
        with RESULTS.open("a") as file:
            file.write("\n" + text)


def build(folder: Path) -> Path:
    """A random Llama of SmolLM2-135M's shape with a byte tokenizer; nothing is written where one is."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from rlalign.tiny_policy.tokenizer import byte_tokenizer

    if (folder / "model.safetensors").is_file():
        return folder
    torch.manual_seed(0)
    tokenizer = byte_tokenizer(2048)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _layers() -> list[str]:
    lines = ["| bf16, one thread | | torch's own, ms | widened, ms | times |", "|---|---|--:|--:|--:|"]
    for rows, inputs, outputs in LAYERS:
        x, w, g = (torch.randn(*s).bfloat16() for s in ((rows, inputs), (outputs, inputs), (rows, outputs)))
        name = f"linear layer, {rows} x {inputs} x {outputs}"
        lines += [
            _row(name, "forward", lambda x=x, w=w: F.linear(x, w)),
            _row(name, "gradient of input", lambda g=g, w=w: g @ w),
            _row(name, "gradient of weight", lambda g=g, x=x: g.t() @ x),
        ]
    for shape in ATTENTION:
        query, key, value, grad = (torch.randn(*shape).bfloat16() for _ in range(4))

        def forward(query=query, key=key, value=value) -> torch.Tensor:
            return F.scaled_dot_product_attention(query, key, value, is_causal=True)

        def both(given=(query, key, value), grad=grad) -> None:
            leaves = [x.detach().requires_grad_() for x in given]
            torch.autograd.grad(F.scaled_dot_product_attention(*leaves, is_causal=True), leaves, grad)

        name = "attention, " + " x ".join(map(str, shape))
        lines += [_row(name, "forward", forward), _row(name, "forward + backward", both)]
    return lines


def _row(name: str, what: str, call: Callable[[], object]) -> str:
    best = dict.fromkeys(WAYS, float("inf"))
    for _ in range(4):
        for way in WAYS:
            with widened.using(way):
                start = time.perf_counter()
                call()
                best[way] = min(best[way], 1e3 * (time.perf_counter() - start))
    native, wide = best.values()
    return f"| {name} | {what} | {native:.2f} | {wide:.2f} | {native / wide:.1f} |"


def _steps(model: Path, steps: int, folder: Path) -> list[str]:
    found: dict[str, list[dict]] = {way: [] for way in WAYS}
    for way in reversed(WAYS):
        out = folder / way
        settings = [
            f"model.path={model}", "rollout=cpu", "trainer=cpu", "task=addition", "mismatch=warn", f"steps={steps}",
            f"output_dir={out}",
            "rollout.prompts_per_step=4", "rollout.group_size=2", "rollout.max_tokens=16", "rollout.max_model_len=64",
            "tracking.backends=[]", "tracking.eval_every=1000", "tracking.eval_samples=1", "task.eval_size=2",
        ]  # fmt: skip
        subprocess.run(
            [sys.executable, "-m", "rlalign.cli", "train", *settings],
            check=True,
            env=os.environ | {widened.VARIABLE: way},
        )
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        found[way] = rows[1:] or rows
    lines = ["| GRPO step, 135 M, 8 sequences | torch's own, s | widened, s | times |", "|---|--:|--:|--:|"]
    for phase, key in PHASES.items():
        if all(key in row for rows in found.values() for row in rows):
            native, wide = (statistics.median(row[key] for row in found[way]) for way in WAYS)
            lines.append(f"| {phase} | {native:.2f} | {wide:.2f} | {native / wide:.1f} |")
    return lines


if __name__ == "__main__":
    main()
