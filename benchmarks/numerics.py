"""How far each way of making logprobs is from float64, and which ways give equal bits at decode and training shapes.

    python benchmarks/numerics.py --markdown benchmarks/results/numerics_cpu.md

Errors in nats over random bfloat16 operands whose largest logit is 3, 16 and 29. `torch.mm(out_dtype=float32)` exists
on CUDA and ROCm only and is measured where --device says so.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from head import machine
from torch import Tensor

from rlalign.head import projection as head
from rlalign.head.products import Route, logits_of, stored_for
from rlalign.logprobs import token_logprobs

Logits = Callable[[Tensor, Tensor], Tensor]


def operands(n: int, d: int, v: int, largest: float, device: str) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden_ND, weight_VD = torch.randn(n, d, generator=g), torch.randn(v, d, generator=g) / d**0.5
    scale = largest / (hidden_ND[:64] @ weight_VD.t()).abs().max()
    targets = torch.randint(0, v, (n,), generator=g).to(device)
    return (scale * hidden_ND).bfloat16().to(device), weight_VD.bfloat16().to(device), targets


def by_route(route: Route) -> Logits:
    return lambda h, w: logits_of(stored_for(h, route), stored_for(w, route), route)


def routes(hidden_ND: Tensor, weight_VD: Tensor) -> dict[str, Logits]:
    """Every way to logits that this host has."""
    found: dict[str, Logits] = {
        "bf16 head": lambda h, w: F.linear(h, w).float(),
        "fp32 head, strict": by_route(Route.STRICT_FP32),
    }
    best = head.route(hidden_ND, weight_VD)
    if best is Route.MKL_BF16:
        found["fp32 head, MKL bf16 (AMX)"] = by_route(Route.MKL_BF16)
    if best in (Route.MKL_BF16, Route.ONEDNN_BF16):
        found["fp32 head, oneDNN bf16 (AMX)"] = by_route(Route.ONEDNN_BF16)
    if best is Route.CUDA_OUT_DTYPE:
        found["fp32 head, mm(out_dtype)"] = by_route(Route.CUDA_OUT_DTYPE)
    return found


def chosen(logprobs_NV: Tensor, target_N: Tensor) -> Tensor:
    return logprobs_NV.gather(-1, target_N[:, None])[:, 0]


def tiled(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
    """rlalign's fast mode: the sum of exp over tiles."""
    return token_logprobs(F.pad(hidden_ND, (0, 0, 0, 1))[None], weight_VD, F.pad(target_N, (1, 0))[None])[0, 1:]


def error_table(device: str) -> list[str]:
    lines = ["| logprob | largest logit 3: max / mean | 16 | 29 |", "|---|--:|--:|--:|"]
    rows: dict[str, list[str]] = {}
    for largest in (3.0, 16.0, 29.0):
        hidden_ND, weight_VD, target_N = operands(64, 4096, 32_000, largest, device)
        want_N = chosen((hidden_ND.double() @ weight_VD.double().t()).log_softmax(-1), target_N)
        got = {f"{name}, log_softmax": chosen(f(hidden_ND, weight_VD).log_softmax(-1), target_N)
               for name, f in routes(hidden_ND, weight_VD).items()}  # fmt: skip
        got["bf16 head, bf16 log_softmax"] = chosen(F.linear(hidden_ND, weight_VD).log_softmax(-1), target_N).float()
        got[f"rlalign fast ({head.route(hidden_ND, weight_VD)})"] = tiled(hidden_ND, weight_VD, target_N)
        got["rlalign fast (strict_fp32)"] = tiled(hidden_ND.float(), weight_VD.float(), target_N)
        for name, value_N in got.items():
            error_N = (value_N.double() - want_N).abs()
            rows.setdefault(name, []).append(f"{error_N.max():.1e} / {error_N.mean():.1e}")
    return lines + [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]


def bits_table(device: str) -> list[str]:
    """Logprobs of 64 tokens scored in one batch of 4096 against the same tokens decoded 1, 8 and 64 at a time."""
    hidden_ND, weight_VD, target_N = operands(4096, 1024, 32_000, 16.0, device)
    lines = ["| logits, then log_softmax | tokens with equal bits, decode 1 | 8 | 64 |", "|---|--:|--:|--:|"]
    for name, logits in routes(hidden_ND, weight_VD).items():
        whole_N = chosen(logits(hidden_ND, weight_VD)[:64].log_softmax(-1), target_N[:64])
        cells = []
        for batch in (1, 8, 64):
            parts = [logits(h, weight_VD).log_softmax(-1) for h in hidden_ND[:64].split(batch)]
            step_N = chosen(torch.cat(parts), target_N[:64])
            equal, apart = (step_N == whole_N).double().mean(), (step_N - whole_N).abs().max()
            cells.append(f"{100 * equal:.0f} % (max {apart:.0e})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def gradient_table(device: str) -> list[str]:
    """Relative error of hidden and weight gradients of a policy-gradient loss, against float64."""
    hidden_ND, weight_VD, target_N = operands(256, 1024, 32_000, 16.0, device)
    target_N[:128] = (hidden_ND[:128].float() @ weight_VD.float().t()).argmax(-1)  # half of the tokens are likely ones
    upstream_N = torch.randn(256, generator=torch.Generator().manual_seed(1)).to(device)

    def gradients(score: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [x.to(dtype).requires_grad_() for x in (hidden_ND, weight_VD)]
        return torch.autograd.grad(score(*leaves), leaves, upstream_N.to(score(*leaves).dtype))

    full = lambda h, w: chosen(F.linear(h, w).log_softmax(-1), target_N)  # noqa: E731
    exact = gradients(full, torch.float64)
    ways = {
        "full logits, float32 operands": gradients(full, torch.float32),
        "rlalign, float32 operands": gradients(lambda h, w: tiled(h, w, target_N), torch.float32),
        "rlalign, bf16 operands": gradients(lambda h, w: tiled(h, w, target_N), torch.bfloat16),
        "full bf16 logits, bf16 operands": gradients(full, torch.bfloat16),
        "float64 gradient rounded to bf16": tuple(x.bfloat16() for x in exact),
    }
    lines = ["| gradient | hidden | weight |", "|---|--:|--:|"]
    for name, got in ways.items():
        errors = [((g.double() - e).norm() / e.norm()).item() for g, e in zip(got, exact, strict=True)]
        lines.append(f"| {name} | {errors[0]:.1e} | {errors[1]:.1e} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    text = [
        "# Numerics of the head",
        f"{machine(torch.device(args.device))}; `python benchmarks/numerics.py`. bf16 operands throughout.",
        "## Error of the logprob against float64, nats",
        "Hidden 4096, vocabulary 32,000, 64 tokens.",
        "\n".join(error_table(args.device)),
        "## Equal bits between decode and training shapes",
        "64 tokens, hidden 1024, vocabulary 32,000; the training shape holds 4096 rows. What differs is the order in\n"
        "which the product adds up: sgemm and the plain bf16 product change kernels with the number of rows, the bf16\n"
        "routes (padded to two rows) do not. log_softmax works row by row and changes nothing.",
        "\n".join(bits_table(args.device)),
        "## Relative error of the gradients against float64",
        "256 tokens, half of them the likeliest; hidden 1024, vocabulary 32,000.",
        "\n".join(gradient_table(args.device)),
    ]
    args.markdown.parent.mkdir(parents=True, exist_ok=True)
    args.markdown.write_text("\n\n".join(text) + "\n")
    print("\n\n".join(text))


if __name__ == "__main__":
    main()
