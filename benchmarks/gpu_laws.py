"""What must hold on a device before its speed is worth a look: the laws of tests/test_triton_head.py, and those only a device has.

A law raises AssertionError or returns a line about what it found. N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.gpu_paths import head
from rlalign.head.projection import project
from rlalign.head.triton import ONE_PASS, PLANS, TRITON
from rlalign.logprobs import token_logprobs

Law = Callable[[torch.device, bool], str]  # device, small: shapes for the interpreter


class NotHereError(Exception):
    """A law that this device cannot be asked about."""


def operands(
    n: int, v: int, d: int, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor]:
    """Hidden states and a weight whose logits are of size one."""
    g = torch.Generator().manual_seed(n + v + d)
    hidden, weight = torch.randn(n, d, generator=g), torch.randn(v, d, generator=g) / d**0.5
    return hidden.to(device, dtype), weight.to(device, dtype)


def _logits_are_float64s(device: torch.device, small: bool) -> str:
    worst = 0.0
    shapes = (
        [(1, 1, 1), (19, 301, 70), (65, 3, 130)]
        if small
        else [(1, 1, 8), (19, 301, 70), (130, 5003, 1024), (300, 4099, 4096)]
    )
    for n, v, d in shapes:
        for dtype in (torch.bfloat16, torch.float16):
            h, w = operands(n, v, d, device, dtype)
            size = h.double().abs() @ w.double().abs().t()
            off = (project(h, w).double() - h.double() @ w.double().t()).abs() / size.clamp_min(1e-30)
            worst = max(worst, float(off.max()))
    # a tensor core cuts off what is beyond float32 at every step of the chain, 256 of them here, where a CPU rounds to nearest
    allowed = -20 if device.type == "cpu" else -17
    assert worst <= 2.0**allowed, f"off by {worst:.1e} of the products' absolute sum; 2^{allowed} allowed"
    return f"within {worst:.1e} of the products' absolute sum"


def _a_rows_bits_are_its_own(device: torch.device, small: bool) -> str:
    n, v, d = (70, 300, 64) if small else (4096, 32003, 2048)
    h, w = operands(n, v, d, device)
    whole = project(h, w)
    counts = (1, 63, 65) if small else (1, 2, 3, 16, 63, 64, 65, 127, 128, 129, 512, 1000)
    for count in counts:
        for first in (0, n - count):
            assert torch.equal(project(h[first : first + count], w), whole[first : first + count]), (
                f"{count} rows differ"
            )
    for first in (1, v // 3, v - 1):
        assert torch.equal(project(h[:64], w[first:]), whole[:64, first:]), f"the vocabulary from {first} on differs"
    return f"{len(counts)} row counts and 3 slices of {v}"


def _plans_agree(device: torch.device, small: bool) -> str:
    from rlalign.head.triton import launches

    h, w = operands(*((5, 300, 70) if small else (200, 5003, 4096)), device)
    odd = torch.nn.functional.pad(w, (0, 1))[:, :-1]  # rows that begin nowhere in particular: no TMA
    found = [
        launches.logits(h, x, torch.empty(len(h), len(w), device=device), plan=p)
        for p in PLANS.values()
        for x in (w, odd)
    ]
    assert all(torch.equal(found[0], other) for other in found[1:]), (
        "tiles of 64 and of 128 rows, or other loads, give other bits"
    )
    return f"tiles of {', '.join(map(str, PLANS))} rows, by TMA where there is one and by pointer"


def _scored(device: torch.device, small: bool, **options: object) -> tuple[list[Tensor], list[Tensor]]:
    """(ours, float64's) logprobs, entropies and gradients of hidden states, weight and bias."""
    n, v, d = (16, 286, 40) if small else (256, 5003, 1024)
    h, w = operands(n + 1, v, d, device)
    bias, ids = torch.linspace(-1, 1, v, device=device), (torch.arange(n + 1, device=device) * 31) % v
    heat = torch.linspace(0.6, 1.5, n + 1, device=device)
    mine = [x.clone().requires_grad_() for x in (h, w, bias)]
    exact = [x.double().requires_grad_() for x in (h, w, bias)]
    got = token_logprobs(
        mine[0][None], mine[1], ids[None], bias=mine[2], temperature=heat[None], soft_cap=3.0, logit_scale=0.5, entropy=True,
        **options,
    )  # fmt: skip
    x = torch.tanh((exact[0][:-1] @ exact[1].t() + exact[2]) / 3.0) * 3.0 * 0.5 / heat[1:, None].double()
    p = x.log_softmax(-1)
    wanted = (p.gather(-1, ids[1:, None])[:, 0], -(p.exp() * p).sum(-1))
    outcome, slope = [], torch.linspace(-1, 1, n, device=device)
    for (logprob, entropy), of in (((y[0, 1:] for y in got), mine), (wanted, exact)):
        loss = (logprob * slope).sum() + (entropy * slope.flip(0)).sum()
        outcome.append([logprob.detach(), entropy.detach(), *torch.autograd.grad(loss, of)])
    return outcome[0], outcome[1]


def _logprobs_and_gradients_are_float64s(device: torch.device, small: bool) -> str:
    got, exact = _scored(device, small)
    errors = [
        float((a.double() - b).abs().max() / (1.0 if i < 2 else b.abs().max()))
        for i, (a, b) in enumerate(zip(got, exact, strict=True))
    ]
    assert max(errors[:2]) <= 2e-5 and max(errors[2:]) <= 1e-2, f"errors {errors}"
    return "logprob {:.1e}, entropy {:.1e} nats; gradients {:.1e}, {:.1e}, {:.1e} of the largest".format(*errors)


def _what_is_kept_changes_no_bit(device: torch.device, small: bool) -> str:
    kept, fresh = _scored(device, small, keep_mib=8)[0], _scored(device, small)[0]  # all of them: 5.3 MB at most
    same = [torch.equal(a, b) for a, b in zip(kept, fresh, strict=True)]
    assert all(same[:4]), f"logprob, entropy, gradients of hidden states and weight equal: {same[:4]}"
    return "with all logits kept" + ("" if same[4] else "; the bias gradient's last bits differ")


def _the_mirror_carries_the_engines_bits(device: torch.device, small: bool) -> str:
    # CUDA's log_softmax adds a row up from its first 16-byte boundary: the same place in every row only where four divides v
    n, v, d = (6, 292, 40) if small else (65, 32004, 2048)
    h, w = operands(n, v, d, device)
    ids = (torch.arange(n, device=device) * 31) % v
    got = token_logprobs(h[None], w, ids[None], mode="exact_mirror")[0]
    for t in range(1, n):
        assert torch.equal(project(h[t - 1 : t], w).log_softmax(-1)[0, ids[t]], got[t]), f"token {t} differs"
    return f"{n - 1} tokens, each decoded alone"


def _a_bad_row_spoils_no_other(device: torch.device, small: bool) -> str:
    h, w = operands(9, 300, 64, device)
    ids = torch.arange(9, device=device)
    fine = token_logprobs(h[None], w, ids[None])[0]
    broken = h.clone()
    broken[2], broken[4, 0], broken[6, 1] = 1e30, torch.nan, torch.inf
    if device.type == "cpu":
        raise NotHereError("on a CPU such states are refused")
    got = token_logprobs(broken[None], w, ids[None])[0]
    spared = torch.tensor([0, 1, 2, 4, 6, 8], device=device)
    assert torch.equal(got[spared], fine[spared]) and bool(got[[5, 7]].isnan().all())
    return "rows with NaN, inf and 1e30 beside it"


def _nothing_synchronises(device: torch.device, small: bool) -> str:
    if device.type != "cuda":
        raise NotHereError("needs a GPU")
    _scored(device, small)  # compiled before the watch begins
    h, w = operands(64, 5003, 1024, device)
    h, w = h.requires_grad_(), w.requires_grad_()
    ids = torch.arange(64, device=device)[None]
    token_logprobs(h[None], w, ids, entropy=True)[0].sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        token_logprobs(h[None], w, ids, entropy=True)[0].sum().backward()
        project(h.detach(), w.detach())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "forward, backward and decode under torch's own watch"


def _a_graph_sees_new_weights(device: torch.device, small: bool) -> str:
    if device.type != "cuda":
        raise NotHereError("needs a GPU")
    for rows in (1, 8, 200):
        h, w = operands(rows, 5003, 1024, device)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            project(h, w)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = project(h, w)
        for _ in range(2):
            w.copy_(torch.randn_like(w))
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(out, project(h, w)), f"{rows} rows: the graph has other bits than a call"
    return "1, 8 and 200 rows, two updates in place"


def _compiling_changes_no_bit(device: torch.device, small: bool) -> str:
    if device.type != "cuda":
        raise NotHereError("the interpreter is not compiled around")
    h, w = operands(33, 5003, 512, device)
    ids = torch.arange(33, device=device)[None]

    def score(hidden: Tensor, weight: Tensor) -> Tensor:
        return token_logprobs(hidden[None], weight, ids, temperature=0.7)

    assert torch.equal(torch.compile(score, fullgraph=True)(h, w), score(h, w))
    return "fullgraph"


LAWS: dict[str, tuple[str, Law]] = {
    "logits are float64's": (TRITON, _logits_are_float64s),
    "a row's bits are its own": (TRITON, _a_rows_bits_are_its_own),
    "plans agree": (TRITON, _plans_agree),
    "logprobs, entropies and gradients are float64's": (TRITON, _logprobs_and_gradients_are_float64s),
    "the same, cublas_one_pass": (ONE_PASS, _logprobs_and_gradients_are_float64s),
    "what is kept changes no bit": (TRITON, _what_is_kept_changes_no_bit),
    "the mirror carries the engine's bits": (TRITON, _the_mirror_carries_the_engines_bits),
    "a bad row spoils no other": (TRITON, _a_bad_row_spoils_no_other),
    "nothing synchronises": (TRITON, _nothing_synchronises),
    "a captured graph sees new weights": (TRITON, _a_graph_sees_new_weights),
    "torch.compile changes no bit": (TRITON, _compiling_changes_no_bit),
}


def unsound(laws: list[dict]) -> set[str]:
    """The heads of which a law does not hold."""
    return {LAWS[law["law"]][0] for law in laws if law["holds"] is False}


def check(name: str, device: torch.device) -> dict[str, object]:
    """{"law", "holds", "found"} of one law, whatever it raises; holds is None where it cannot be asked."""
    asked, law = LAWS[name]
    try:
        with head(asked):
            return {"law": name, "holds": True, "found": law(device, device.type == "cpu")}
    except NotHereError as why:
        return {"law": name, "holds": None, "found": str(why)}
    except Exception as error:  # a law that cannot even run does not hold; the reason goes into the results
        return {"law": name, "holds": False, "found": f"{type(error).__name__}: {str(error)[:300]}"}
