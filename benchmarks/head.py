"""Speed, memory and error of token logprobs from hidden states, against every peer that is installed.

    python benchmarks/head.py --json benchmarks/results/head_cpu.json --shapes 4096x151936 --what forward

Rows are added to the file: device, path, fp32_output, n, hidden, vocab, what (forward | forward_backward | decode),
seconds (minimum), peak_extra_bytes, max_error, mean_error (against float64), repeats. All paths of
a shape run interleaved in one process; a path slower than --slow seconds runs once. A peer that is not installed gets a
row with `status`; head_peers.py says how to get them. The bare float32 products of operands widened beforehand are rows too.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import head_peers as peers
import torch
import torch.nn.functional as F
from head_peers import Score
from torch import Tensor

from rlalign.head import projection
from rlalign.logprobs import token_logprobs
from rlalign.logprobs.blocks import padded
from rlalign.tracking.environment import cpu_model


def ours(mode: str, keep_mib: int = 0) -> Score:
    def score(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
        # one row too many in front, since token_logprobs pairs token t with the hidden state at t - 1
        ids = F.pad(target_N, (1, 0)).unsqueeze(0)
        return token_logprobs(
            F.pad(hidden_ND, (0, 0, 0, 1)).unsqueeze(0), weight_VD, ids, mode=mode, keep_mib=keep_mib
        )[0, 1:]

    return score


def full_fp32(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
    logits_NV = F.linear(hidden_ND.float(), weight_VD.float())
    return logits_NV.log_softmax(-1).gather(-1, target_N[:, None])[:, 0]


def full_bf16(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
    return F.linear(hidden_ND, weight_VD).log_softmax(-1).gather(-1, target_N[:, None])[:, 0]


def torch_core(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
    return -F.linear_cross_entropy(hidden_ND, weight_VD, target_N, reduction="none")


# name -> (float32 logits, how to get it)
PATHS: dict[str, tuple[bool, Callable[[], Score]]] = {
    "rlalign fast": (True, lambda: ours("fast")),
    "rlalign exact_mirror": (True, lambda: ours("exact_mirror")),
    "full logits fp32": (True, lambda: full_fp32),
    "full logits bf16": (False, lambda: full_bf16),
    "torch.compile fp32": (True, lambda: torch.compile(full_fp32)),
    "cut-cross-entropy (torch_compile)": (False, peers.cut_cross_entropy),
    "TRL chunked bf16": (False, lambda: peers.trl(torch.bfloat16)),
    "TRL chunked fp32": (True, lambda: peers.trl(torch.float32)),
    "verl fused linear bf16": (False, lambda: peers.verl(torch.bfloat16)),
    "verl fused linear fp32": (True, lambda: peers.verl(torch.float32)),
    "Liger selective bf16": (False, lambda: peers.liger(torch.bfloat16)),
    "Liger selective fp32": (True, lambda: peers.liger(torch.float32)),
    "torch core linear_cross_entropy": (False, lambda: torch_core),
    "prime-rl chunked bf16": (False, lambda: peers.prime_rl(torch.bfloat16)),
    "prime-rl chunked fp32": (True, lambda: peers.prime_rl(torch.float32)),
    "Unsloth chunked bf16 (torch_compile)": (False, peers.unsloth),
    "RL-Kernel native bf16": (False, lambda: peers.rl_kernel(torch.bfloat16)),
    "RL-Kernel native fp32": (True, lambda: peers.rl_kernel(torch.float32)),
}
BARE = {"forward": "fp32 product alone", "forward_backward": "four fp32 products alone"}
SLOW_BY_DESIGN = "torch core linear_cross_entropy"  # minutes per call on CPU: only when asked for by name


def bare_products(hidden_ND: Tensor, weight_VD: Tensor, what: str, columns: int = 2048) -> Callable[[], None]:
    """The float32 products behind one call of ours and nothing else, block by block: logits; again, and both gradients."""
    (n, d), v = hidden_ND.shape, weight_VD.shape[0]
    hidden, weight = hidden_ND.float(), weight_VD.float()
    tile, of_hidden = (padded(n, size, torch.float32, hidden.device) for size in (columns, d))
    of_block = padded(columns, d, torch.float32, hidden.device)
    of_hidden.zero_()

    def call() -> None:
        for start in range(0, v, columns):
            block = weight[start : start + columns]
            logits = tile[:, : len(block)]
            torch.mm(hidden, block.t(), out=logits)
            if what == "forward_backward":
                torch.mm(hidden, block.t(), out=logits)
                of_hidden.addmm_(logits, block)
                torch.mm(logits.t(), hidden, out=of_block[: len(block)])

    return call


def decode_paths(weight_VD: Tensor) -> dict[str, tuple[bool, Callable[[Tensor], Tensor]]]:
    """The head of one decode step: hidden [N, D] -> logits [N, V]."""
    copy_VD = weight_VD.float()
    return {
        "bf16 head": (False, lambda h: F.linear(h, weight_VD)),
        "rlalign project": (True, lambda h: projection.project(h, weight_VD)),
        "rlalign project, cached fp32 weight": (
            True,
            lambda h: projection.project(h, copy_VD, weight_is_bf16_valued=True),
        ),
        "cached fp32 weight, sgemm": (True, lambda h: F.linear(h.float(), copy_VD)),
        "fp32 by casting the weight each call": (True, lambda h: F.linear(h.float(), weight_VD.float())),
    }


@dataclass
class Peak:
    """Highest memory of a block above its start, in bytes: resident set on Linux CPU, allocator on CUDA."""

    device: torch.device
    bytes: int = 0

    def __enter__(self) -> Peak:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
        else:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
            self.start = self._status("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        high = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else self._status("VmHWM")
        self.bytes = high - self.start

    @staticmethod
    def _status(field: str) -> int:
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
        return int(line.split()[1]) * 1024


def machine(device: torch.device, called: str) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    info = Path("/proc/cpuinfo").read_text()
    name = cpu_model()
    features = " ".join(f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in info)
    return f"{called or f'{name} ({features})'}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def timed(call: Callable[[], Tensor | None], device: torch.device, clock: str = "wall") -> tuple[float, Tensor | None]:
    now = time.process_time if clock == "processor" else time.perf_counter
    start = now()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return now() - start, result


def operands(n: int, d: int, v: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(n, d, generator=g).bfloat16()
    weight_VD = torch.empty(v, d, dtype=torch.bfloat16).normal_(0.0, 5.0 / d**0.5, generator=g)  # logits up to about 27
    return hidden_ND.to(device), weight_VD.to(device), torch.randint(0, v, (n,), generator=g).to(device)


def exact(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
    return torch.cat([
        (h.double()[None] @ weight_VD.double().t()).log_softmax(-1)[:, t]
        for h, t in zip(hidden_ND, target_N, strict=True)
    ])  # fmt: skip


def score_rows(args: argparse.Namespace, n: int, v: int, what: str, device: torch.device) -> list[dict[str, object]]:
    hidden_ND, weight_VD, target_N = operands(n, args.hidden, v, device)
    reference = exact(hidden_ND[:16], weight_VD, target_N[:16])
    paths = dict(PATHS)
    for mib in args.keep if what == "forward_backward" else []:
        mib = mib or int(1.03 * 4 * n * v / 2**20) + 1
        paths[f"rlalign fast, keep_mib={mib}"] = (True, functools.partial(ours, "fast", mib))
    rows: dict[str, dict[str, object]] = {}
    calls: dict[str, Callable[[], Tensor]] = {}
    for name in [p for p in paths if p in (args.paths or PATHS.keys() - {SLOW_BY_DESIGN}) or p not in PATHS]:
        fp32, make = paths[name]
        rows[name] = {"path": name, "fp32_output": fp32, "n": n, "hidden": args.hidden, "vocab": v, "what": what}
        try:
            score = make()
        except ImportError as missing:
            rows[name]["status"] = f"not measured: {missing}"
            print(f"{name}: {rows[name]['status']}", flush=True)
            continue
        calls[name] = lambda score=score: run(score, hidden_ND, weight_VD, target_N, what)
    if args.bare:
        rows[BARE[what]] = {
            "path": BARE[what],
            "fp32_output": True,
            "n": n,
            "hidden": args.hidden,
            "vocab": v,
            "what": what,
        }
        calls[BARE[what]] = bare_products(hidden_ND, weight_VD, what)
    for repeat in range(args.rounds):
        for name, call in calls.items():
            row, cold = rows[name], "compile" in name and repeat == 0
            if repeat and float(row.get("seconds", 0.0)) > args.slow:
                continue
            if "status" in row:
                continue
            try:
                with Peak(device) as peak:
                    seconds, got = timed(call, device, args.clock)
            except ImportError as missing:  # some look for what they need only when they are called
                row["status"] = f"not measured: {missing}"
                print(f"{name}: {row['status']}", flush=True)
                continue
            if repeat == 0 and got is not None:
                error = (got[:16].detach().double() - reference).abs()
                row |= {"max_error": error.max().item(), "mean_error": error.mean().item()}
            if not cold:  # the first call of a compiled path compiles
                row["seconds"] = min(seconds, float(row.get("seconds", seconds)))
                row["peak_extra_bytes"] = max(peak.bytes, int(row.get("peak_extra_bytes", 0)))
                row["repeats"] = int(row.get("repeats", 0)) + 1
            print(f"{what} {n}x{v} {name}: {seconds:.2f} s, {peak.bytes / 2**20:.0f} MiB", flush=True)
    return list(rows.values())


def run(score: Score, hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, what: str) -> Tensor:
    if what == "forward":
        with torch.no_grad():
            return score(hidden_ND, weight_VD, target_N)
    hidden_ND, weight_VD = hidden_ND.detach().requires_grad_(), weight_VD.detach().requires_grad_()
    logprobs_N = score(hidden_ND, weight_VD, target_N)
    logprobs_N.backward(torch.linspace(-1, 1, len(logprobs_N), device=logprobs_N.device).to(logprobs_N.dtype))
    return logprobs_N


def decode_rows(args: argparse.Namespace, v: int, device: torch.device) -> list[dict[str, object]]:
    rows = []
    for n in (1, 8, 64, 256):
        hidden_ND, weight_VD, _ = operands(n, args.hidden, v, device)
        exact_NV = hidden_ND[:1].double() @ weight_VD.double().t()
        shape = {"n": n, "hidden": args.hidden, "vocab": v, "what": "decode"}
        best: dict[str, float] = {}
        with torch.inference_mode():
            paths = decode_paths(weight_VD)
            for _ in range(4 * args.rounds):
                for name, (_, call) in paths.items():
                    seconds, _ = timed(functools.partial(call, hidden_ND), device, args.clock)
                    best[name] = min(seconds, best.get(name, seconds))
            for name, (fp32, call) in paths.items():
                with Peak(device) as peak:
                    error = (call(hidden_ND)[:1].double() - exact_NV).abs()
                rows.append({"path": name, "fp32_output": fp32, **shape, "seconds": best[name],
                             "peak_extra_bytes": peak.bytes, "max_error": error.max().item(),
                             "mean_error": error.mean().item(), "repeats": 4 * args.rounds})  # fmt: skip
                print(f"decode {n}x{v} {name}: {1e3 * best[name]:.1f} ms", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--shapes", nargs="+", default=["1024x32000", "4096x32000", "1024x151936", "4096x151936"])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--what", nargs="+", default=["forward", "forward_backward", "decode"])
    parser.add_argument("--paths", nargs="+", choices=list(PATHS))
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--slow", type=float, default=12.0)
    parser.add_argument("--keep", nargs="*", type=int, default=[0], help="MiB of logits ours may keep; 0: all of them")
    parser.add_argument("--bare", action=argparse.BooleanOptionalAction, default=True, help="the bare float32 products")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 leaves torch's choice")
    parser.add_argument("--host", default="", help="what to call this machine, where its processor hides what it is")
    parser.add_argument(
        "--clock", choices=("wall", "processor"), default="wall", help="processor: on a busy machine, one thread"
    )
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    if args.threads:
        torch.set_num_threads(args.threads)
    name, when = machine(device, args.host), time.strftime("%Y-%m-%d %H:%M:%S")
    for what in args.what:
        for shape in args.shapes:
            n, v = map(int, shape.split("x"))
            rows = decode_rows(args, v, device) if what == "decode" else score_rows(args, n, v, what, device)
            known = json.loads(args.json.read_text())["rows"] if args.json.exists() else []
            known += [{"device": name, "run": when, "clock": args.clock, **row} for row in rows]
            args.json.write_text('{"rows": [\n' + ",\n".join(map(json.dumps, known)) + "\n]}\n")


if __name__ == "__main__":
    main()
