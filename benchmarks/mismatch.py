"""What measuring and correcting costs: compare + correct on 64 x 4096 tokens against scoring those tokens.

The claim: under 1 % of the trainer's scoring time. Scoring is one no-grad forward pass of a small Qwen3 with its token
log-probabilities; it runs on --rows of the 64 sequences and is scaled up, since sequences do not share work.
Prints JSON; --write adds the measurement to results/mismatch.md.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from rlalign import mismatch
from rlalign.objective import corrections
from rlalign.tracking.environment import cpu_model

B, L = 64, 4096
RESULTS = Path(__file__).parent / "results" / "mismatch.md"
HEADER = """# Cost of `mismatch.compare` + `corrections.correct`

`python benchmarks/mismatch.py --write`: 64 x 4096 tokens, median of 5, against scoring them with a small Qwen3.

| machine | threads | torch | scoring model | compare (s) | correct (s) | scoring (s) | share |
|---|---|---|---|---|---|---|---|
"""


def main() -> None:
    """Measure and print; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, default=2, help="sequences to score (default %(default)s of 64)")
    parser.add_argument("--write", action="store_true", help="append to results/mismatch.md")
    arguments = parser.parse_args()
    result = measure(torch.device(arguments.device), arguments.rows)
    print(json.dumps(result, indent=2))
    if arguments.write:
        text = RESULTS.read_text() if RESULTS.exists() else HEADER
        RESULTS.write_text(text + line(result))


def measure(device: torch.device, rows: int) -> dict[str, str | int | float]:
    """Seconds of each part, and their ratio."""
    g = torch.Generator().manual_seed(0)
    rollout_BL = -torch.empty(B, L).exponential_(1.0, generator=g).to(device)
    old_BL = rollout_BL + 0.02 * torch.randn(B, L, generator=g).to(device)
    mask_BL = torch.ones(B, L, dtype=torch.bool, device=device)
    mask_BL[:, :512] = False
    lag_B = torch.zeros(B, dtype=torch.long, device=device)
    given = (old_BL, rollout_BL, mask_BL)
    compare_s = _median(lambda: mismatch.compare(*given, lag_B=lag_B), device)
    correct_s = _median(lambda: corrections.correct(*given, level="token", mode="truncate", high=2.0), device)
    model, name = _scoring_model(device)
    ids = torch.randint(0, model.config.vocab_size, (rows, L), generator=g).to(device)
    scoring_s = _median(lambda: _score(model, ids), device, repeats=3) * B / rows
    return {
        "machine": _machine(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "tokens": B * L,
        "scoring_model": name,
        "compare_s": compare_s,
        "correct_s": correct_s,
        "scoring_s": scoring_s,
        "share": (compare_s + correct_s) / scoring_s,
    }


def line(r: dict[str, str | int | float]) -> str:
    """One row of the results table."""
    return (
        f"| {r['machine']} | {r['threads']} | {r['torch']} | {r['scoring_model']} | {r['compare_s']:.3f} | "
        f"{r['correct_s']:.3f} | {r['scoring_s']:.1f} | {r['share']:.2%} |\n"
    )


def _median(call: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    call()
    seconds = []
    for _ in range(repeats):
        _wait(device)
        began = time.perf_counter()
        call()
        _wait(device)
        seconds.append(time.perf_counter() - began)
    return sorted(seconds)[repeats // 2]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _scoring_model(device: torch.device) -> tuple[torch.nn.Module, str]:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=L,
        tie_word_embeddings=False,
    )
    model = Qwen3ForCausalLM(config).to(device).eval()
    return model, f"Qwen3, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, float32"


@torch.no_grad()
def _score(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    logits = model(ids).logits[:, :-1]
    return torch.log_softmax(logits, -1).gather(-1, ids[:, 1:, None])


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_model()


if __name__ == "__main__":
    main()
