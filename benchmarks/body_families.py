"""Which ops of a family's body can be given the engine's bits: tiny random models, each in a living vLLM on CPU and mirrored.

python -m benchmarks.body_families [FAMILY ...] [--out FILE]

Sampled tokens are scored by transformers' model with the engine's head, first with its own roundings and then mirrored by
`rlalign.mirror(model, engine, body=True)`. The table is in results/body_mirrored.md.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import rlalign
from rlalign.cli import set_environment
from rlalign.diagnose.families import building
from rlalign.diagnose.families.family_table import RECIPES, Recipe
from rlalign.rollout.engine.embedded import EMBEDDED_ENVIRONMENT

if TYPE_CHECKING:
    from vllm import LLM

    from rlalign.trainer.live_mirror import Mirror

FAMILIES = (
    "llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "olmo2", "qwen3-moe", "cohere", "granite",
)  # fmt: skip
KNOWN = RECIPES | {"cohere": Recipe("cohere", {"logit_scale": 0.25}, without=("head_dim",))}
PROMPTS, TOKENS = 12, 40


@dataclass(frozen=True)
class Row:
    """Shares of sampled tokens with equal bits, and k3 in nats, before and after; what is left as the model has it."""

    family: str
    tokens: int
    equal: tuple[float, float]
    k3: tuple[float, float]
    ops: str
    left: str

    def cells(self) -> str:
        """Markdown."""
        numbers = f"{self.k3[0]:.1e} | {self.k3[1]:.1e} | {self.equal[0]:.1%} | {self.equal[1]:.1%}"
        return f"| {self.family} | {self.tokens} | {numbers} | {self.ops} | {self.left or '-'} |"


def start(folder: Path) -> LLM:
    """vLLM as a stack would start it, with rlalign's variables."""
    for name, value in (EMBEDDED_ENVIRONMENT | {"VLLM_CPU_KVCACHE_SPACE": "1"}).items():
        os.environ.setdefault(name, value)
    os.environ |= {"RLALIGN_HEAD": "float32", "RLALIGN_STEADY": "1"}
    from vllm import LLM

    return LLM(
        model=str(folder), dtype="bfloat16", max_model_len=256, max_num_seqs=16, enforce_eager=True, disable_log_stats=True,
        use_tqdm_on_load=False, logprobs_mode="processed_logprobs", enable_prefix_caching=False,
    )  # fmt: skip


def sampled(llm: LLM) -> tuple[Tensor, Tensor, Tensor]:
    """ids, the engine's decoded logprobs and the mask of sampled tokens, all [B, L]."""
    from vllm import SamplingParams

    prompts = torch.randint(3, 256, (PROMPTS, 24), generator=torch.Generator().manual_seed(0)).tolist()
    params = SamplingParams(max_tokens=TOKENS, temperature=1.0, logprobs=0, seed=1, detokenize=False, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    ids_BL = torch.tensor([[*p, *o.outputs[0].token_ids] for p, o in zip(prompts, outputs, strict=True)])
    own_BL, mask_BL = torch.zeros(ids_BL.shape), torch.zeros(ids_BL.shape, dtype=torch.bool)
    mask_BL[:, 24:] = True
    for b, output in enumerate(outputs):
        entries = zip(output.outputs[0].logprobs, output.outputs[0].token_ids, strict=True)
        own_BL[b, 24:] = torch.tensor([entry[token].logprob for entry, token in entries])
    return ids_BL, own_BL, mask_BL


@torch.no_grad()
def gap(mirror: Mirror, ids_BL: Tensor, own_BL: Tensor, mask_BL: Tensor) -> tuple[float, float]:
    """(share of tokens with equal bits, k3)."""
    inputs = {"input_ids": ids_BL, "attention_mask": torch.ones_like(ids_BL)}
    found_BL, _ = mirror.token_logprobs(inputs, mask_BL, exact=True)
    x = (found_BL - own_BL)[mask_BL].double()
    return float((x == 0).double().mean()), float((x.exp() - 1 - x).mean())


def measure(family: str, folder: Path) -> Row:
    """One family: its engine, its model, both ways."""
    from transformers import AutoModelForCausalLM

    building.build(KNOWN[family], folder)
    llm = start(folder)
    try:
        engine = rlalign.attach(llm)
        ids_BL, own_BL, mask_BL = sampled(llm)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        with rlalign.mirror(model) as mirror:
            before = gap(mirror, ids_BL, own_BL, mask_BL)
        with rlalign.mirror(model, engine, body=True) as mirror:
            after = gap(mirror, ids_BL, own_BL, mask_BL)
            print("\n".join([family, *mirror.body.describe()]), flush=True)
            ops = ", ".join(f"{op} {name}" for op, name in mirror.body.applied.items())
            left = "; ".join(f"{part}: {why}" for part, why in mirror.body.left.items())
    finally:
        llm.llm_engine.engine_core.shutdown()
        gc.collect()
    return Row(family, int(mask_BL.sum()), (before[0], after[0]), (before[1], after[1]), ops, left)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    set_environment()
    torch.set_num_threads(1)
    lines = [
        "| family | tokens | k3: model | mirrored | equal bits: model | mirrored | mirrored ops | left as the model has it |",
        "|---|--:|--:|--:|--:|--:|---|---|",
    ]
    for family in options.families or FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            lines.append(measure(family, Path(folder)).cells())
        print("\n".join(lines), flush=True)
        if options.out:
            options.out.write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
