"""In which dtype logits were multiplied, told from their values: nobody's word is taken for it.

A head in float32 is off from float64 by a few units of its last place; one rounded to 16 bits by thousands of times that, and it
lands on that dtype's numbers. Suffixes: N rows, D hidden, V vocabulary, C sampled rows of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

ROUNDED = {"bfloat16": torch.bfloat16, "float16": torch.float16}
ROWS, COLUMNS = 4, 512  # of the sample that is compared
AT_ONCE = 8192  # rows of the weight widened to float64 together
SMALLER = 2.0**-6  # float32 is off by less than this part of what rounding to bfloat16 costs; float16 by 2^-3 of it
AGREE = 0.75  # share of values that land where a dtype's rounding puts them
OTHER = "none of float32, bfloat16, float16"


@dataclass(frozen=True, slots=True, kw_only=True)
class Multiplied:
    """dtype: float32, bfloat16, float16, OTHER, or None where values cannot tell, which `why` explains.

    max_error: largest distance from float64; bfloat16_error: what rounding once to bfloat16 would cost here.
    """

    dtype: str | None
    max_error: float = 0.0
    bfloat16_error: float = 0.0
    why: str = ""

    def as_dict(self) -> dict[str, object]:
        """Plain data, for an answer of a worker."""
        return asdict(self)


def said(found: Mapping[str, object]) -> str:
    """One line about a `Multiplied` as plain data."""
    if found["dtype"] is None:
        return f"not measured: {found['why']}"
    note = f"; {found['why']}" if found["why"] else ""
    return f"{found['dtype']} ({found['max_error']:.1e} from float64, bfloat16 {found['bfloat16_error']:.1e}{note})"


def judge(found: Tensor, exact: Tensor, rounded: Mapping[str, Tensor], *, size: float | None = None) -> Multiplied:
    """Which dtype these values come from. All of one shape; exact: in float64; rounded: what each 16-bit dtype gives.

    size: of the largest number that float32 has rounded on the way to them; None where that is the largest of them.
    """
    found, exact = found.detach().double().cpu(), exact.cpu()
    if not bool(torch.isfinite(found).all() and torch.isfinite(exact).all()) or not found.numel():
        return Multiplied(dtype=None, why="no finite values to compare")
    off = (found - exact).abs()
    costs = {name: (value.cpu().double() - exact).abs() for name, value in rounded.items()}
    error, cost = float(off.max()), float(costs["bfloat16"].max())
    resolution = 4 * torch.finfo(torch.float32).eps * (float(exact.abs().max()) if size is None else size)
    numbers = {"max_error": error, "bfloat16_error": cost}
    if cost * SMALLER <= resolution:
        return Multiplied(dtype=None, why="the values are too small or too round to tell dtypes apart", **numbers)
    if error <= cost * SMALLER:
        return Multiplied(dtype="float32", **numbers)
    for name, value in rounded.items():
        near = (found - value.cpu().double()).abs() <= costs[name] / 4 + costs[name].max() * SMALLER
        if float(near.double().mean()) >= AGREE:
            return Multiplied(dtype=name, **numbers)
    return Multiplied(dtype=OTHER, **numbers)


@torch.no_grad()
def of_logits(logits_NV: Tensor, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None = None) -> Multiplied:
    """Judge a head's logits, before any transform, on a few rows and some 512 words."""
    words = min(logits_NV.shape[-1], weight_VD.shape[0])
    chosen_C = slice(None, words, max(1, words // COLUMNS))
    found_NC = logits_NV.reshape(-1, logits_NV.shape[-1])[:ROWS, chosen_C]
    exact_NC = hidden_ND.reshape(-1, hidden_ND.shape[-1])[:ROWS].double() @ weight_VD[chosen_C].double().t()
    if bias_V is not None:
        exact_NC = exact_NC + bias_V[chosen_C].double()
    return judge(found_NC, exact_NC, {name: exact_NC.to(dtype) for name, dtype in ROUNDED.items()})


@torch.no_grad()
def of_logprobs(
    logprobs_N: Tensor,
    hidden_ND: Tensor,
    weight_VD: Tensor,
    token_ids_N: Tensor,
    *,
    bias_V: Tensor | None,
    transform: Callable[[Tensor], Tensor],
    temperature: float | Tensor,
) -> Multiplied:
    """Judge a head by the logprobs it gave of these tokens (nats), where it never shows its logits. A few rows; all words.

    transform: what the model does to its logits, before the temperature (one number, or [N, 1]).
    """
    hidden_ND = hidden_ND.detach().double()
    exact_NV = torch.cat([hidden_ND @ rows.detach().double().t() for rows in weight_VD.split(AT_ONCE)], dim=1)
    if bias_V is not None:
        exact_NV = exact_NV + bias_V.detach().double()

    def chosen(logits_NV: Tensor) -> Tensor:
        logprobs_NV = (transform(logits_NV).double() / temperature).log_softmax(-1)
        return logprobs_NV.gather(1, token_ids_N[:, None])[:, 0]

    rounded = {name: chosen(exact_NV.to(dtype)) for name, dtype in ROUNDED.items()}
    # A probability near 1 has a logprob near 0, which is the difference of two large numbers.
    size = float((transform(exact_NV).double() / temperature).abs().max())
    return judge(logprobs_N, chosen(exact_NV), rounded, size=size)
