"""Ten minutes on a GPU: the laws of the Triton head, where the body rounds, then the head's speed, memory and error beside peers.

    python -m benchmarks.gpu --json FILE [--markdown FILE] [--minutes 8]

Needs torch, triton and this tree; peers are measured where they are installed (pip install --no-deps liger-kernel
liger-cute-kernels cut-cross-entropy trl verl). Every result is written to FILE as it comes; a second call goes on where the first
stopped, and begins anew where device, versions or kernels differ. A law that does not hold ends with exit code 1, and the rows of
the head it was asked of are left out. A way that breaks the device is recorded, and the command begins again without it; what still
runs when the time is up ends with exit code 3, and a second call goes on. --device cpu runs the same path in Triton's interpreter
on small shapes: its times say nothing. --markdown without --json writes what the roofline predicts, each row "not run".
Suffixes: N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import argparse
import functools
import gc
import hashlib
import json
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from benchmarks.gpu_paths import Way

SHAPES = ((4096, 2048, 131072), (4096, 1024, 151936), (2048, 4096, 262144), (8192, 4096, 131072))
ROWS, HEADS = (1, 8, 32, 64, 128, 256, 512), ((4096, 131072), (1024, 151936))
SMALL_SHAPES, SMALL_ROWS, SMALL_HEADS = ((40, 48, 700), (24, 96, 520)), (1, 5), ((64, 600),)
FORWARD, BOTH, DECODE = "forward", "forward + backward", "decode"
PRODUCTS = {FORWARD: 1, BOTH: 4}  # logits, logits again, two gradients; a path that keeps its logits needs three
TFLOPS, BANDWIDTH = 750e12, 4.2e12  # of an H200 as cuBLAS reaches them in bf16; bytes a second as copies do
CHECKED = 64  # rows compared with float64
ROUNDS = 5
CALLS = {
    FORWARD: 2,
    BOTH: 2,
    DECODE: 20,
}  # between two events, so that the host's launches hide behind the device's work
SPARE = 20.0  # seconds before the end after which nothing is begun: what was begun is finished in them
NO_TIME = "no time left"
GEMM = "bf16 products alone"
ANSWER = {True: "yes", False: "**no**", None: "not here"}


class LostDeviceError(RuntimeError):
    """The device answers no more, as after an illegal access: only another process can go on."""


def machine(device: torch.device) -> dict[str, str]:
    """What results are comparable within."""
    import triton

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()}, Triton interpreted"
    root, digest = Path(__file__).parents[1] / "rlalign", hashlib.sha256()
    for file in sorted([*root.glob("head/**/*.py"), *root.glob("logprobs/*.py")]):
        digest.update(file.read_bytes())
    return {
        "device": name,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "sources": digest.hexdigest()[:12],
    }


def ask_sign_of_life(device: torch.device) -> None:
    """Raise LostDeviceError where a product of the device fails."""
    try:
        torch.ones(2, 2, device=device).sum().item()
    except RuntimeError as error:
        raise LostDeviceError(str(error).splitlines()[0]) from error


def tasks(small: bool) -> list[tuple[str, tuple[int, int, int]]]:
    """(what, (N, D, V)) in the order they are run: the shapes of the goals first."""
    found = [(what, shape) for shape in (SMALL_SHAPES if small else SHAPES) for what in (FORWARD, BOTH)]
    rows, heads = (SMALL_ROWS, SMALL_HEADS) if small else (ROWS, HEADS)
    return found + [(DECODE, (n, d, v)) for d, v in heads for n in rows]


def predicted_ms(what: str, shape: tuple[int, int, int]) -> float:
    """The least time of an H200: products at TFLOPS, and for decoding the weight read and the logits written once."""
    n, d, v = shape
    compute = PRODUCTS.get(what, 1) * 2 * n * d * v / TFLOPS
    return 1e3 * (compute if what != DECODE else max(compute, 2 * d * v / BANDWIDTH) + 4 * n * v / BANDWIDTH)


def products_alone(what: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The matrix products that the task needs, bf16 in and out, through one buffer in blocks of the vocabulary."""
    block = 16384

    def run(hidden_ND: Tensor, weight_VD: Tensor, _: Tensor) -> Tensor:
        for weight_SD in weight_VD.split(block):
            x_NS = hidden_ND @ weight_SD.t()
            if what == BOTH:
                x_NS = hidden_ND @ weight_SD.t()
                last = x_NS @ weight_SD
                last = x_NS.t() @ hidden_ND
        return x_NS if what != BOTH else last

    return run


class Measurement:
    """Ways over one task: operands once, times interleaved, and each way's error and memory."""

    def __init__(self, what: str, shape: tuple[int, int, int], device: torch.device) -> None:
        n, d, v = shape
        g = torch.Generator(device=device).manual_seed(0)
        self.what, self.device = what, device
        self.hidden_ND = torch.randn(n, d, generator=g, device=device).bfloat16()
        self.weight_VD = (3 / d**0.5 * torch.randn(v, d, generator=g, device=device)).bfloat16()
        self.target_N = torch.randint(0, v, (n,), generator=g, device=device)
        self.exact_C = self._exact()

    def _exact(self) -> Tensor:
        rows = self.hidden_ND[:CHECKED].double()
        logits = torch.cat([rows @ part.double().t() for part in self.weight_VD.split(16384)], 1)
        return logits if self.what == DECODE else logits.log_softmax(-1).gather(1, self.target_N[:CHECKED, None])[:, 0]

    def once(self, score: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """One call, with gradients where the task has them."""
        if self.what != BOTH or getattr(score, "bare", False):
            with torch.no_grad():
                return score(self.hidden_ND, self.weight_VD, self.target_N)
        hidden_ND, weight_VD = self.hidden_ND.detach().requires_grad_(), self.weight_VD.detach().requires_grad_()
        result = score(hidden_ND, weight_VD, self.target_N)
        result.sum().backward()
        return result.detach()

    def first(self, score: Callable[[Tensor, Tensor, Tensor], Tensor]) -> dict[str, object]:
        """Compiles, then error against float64 and memory beyond operands, results and gradients."""
        result = self.once(score)
        row: dict[str, object] = {}
        if not getattr(score, "bare", False):
            off = (result[:CHECKED].double() - self.exact_C).abs()
            row |= {"max_error": float(off.max()), "mean_error": float(off.mean())}
        del result
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            gc.collect()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.once(score)
            kept = 2 * (self.hidden_ND.numel() + self.weight_VD.numel()) if self.what == BOTH else 0
            row["peak_mib"] = (torch.cuda.max_memory_allocated() - before - kept) / 2**20
        return row

    def ms(self, score: Callable[[Tensor, Tensor, Tensor], Tensor]) -> float:
        """Of one call, from the device's clock."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            self.once(score)
            return 1e3 * (time.perf_counter() - start)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(CALLS[self.what]):
            self.once(score)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / CALLS[self.what]


def run(results: dict, device: torch.device, deadline: float, save: Callable[[], None]) -> None:
    """Laws, the body's roundings, then rows, each saved as it comes; what is there already is left alone.

    Raises LostDeviceError where the device is gone; what broke it is saved, and is not asked again.
    """
    from benchmarks import gpu_rounding
    from benchmarks.gpu_laws import LAWS, check

    for name in LAWS:
        if name not in {law["law"] for law in results["laws"]} and time.monotonic() < deadline:
            results["laws"].append(check(name, device))
            print(results["laws"][-1], flush=True)
            save()
            ask_sign_of_life(device)
    if not results.get("rounding") and time.monotonic() < deadline:
        try:
            results["rounding"] = list(gpu_rounding.rows(device))
        except Exception as error:  # the head's rows do not wait for the body's
            results["rounding"] = [{"op": "all", "kernel": "all", "status": said(error)}]
        save()
        ask_sign_of_life(device)
    for what, shape in tasks(device.type == "cpu"):
        found = [row for row in results["rows"] if (row["what"], tuple(row["shape"])) == (what, shape)]
        if time.monotonic() > deadline or (found and not any(row.get("status") == NO_TIME for row in found)):
            continue
        made = measured(what, shape, device, results, deadline, save)
        results["rows"] = [row for row in results["rows"] if row not in found] + made
        save()


@functools.lru_cache(maxsize=64)
def _loaded(way: Way) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return way.load()


def said(error: Exception) -> str:
    """Kind and first line."""
    return f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"


def measured(
    what: str,
    shape: tuple[int, int, int],
    device: torch.device,
    results: dict,
    deadline: float,
    save: Callable[[], None],
) -> list[dict]:
    """Rows of one task, every way interleaved. results["broken"]: what is said of ways that an earlier process fell over."""
    from benchmarks.gpu_laws import unsound
    from benchmarks.gpu_paths import DECODING, SCORING, asking, head

    task, bare = Measurement(what, shape, device), products_alone(what)
    bare.bare = True
    scores, rows = {GEMM: bare}, {GEMM: {"float32": False}}
    for way in DECODING if what == DECODE else SCORING:
        key = f"{what} {shape} {way.name}"
        rows[way.name] = {"float32": way.float32}
        try:
            if key in results["broken"] or time.monotonic() > deadline:
                raise TimeoutError(results["broken"].get(key, NO_TIME))
            score = _loaded(way)
            if asking(score) in unsound(results["laws"]):
                raise RuntimeError("a law does not hold")
            results["running"] = (key, time.monotonic())
            with head(asking(score)):
                rows[way.name] |= task.first(score)
            scores[way.name] = score
        except TimeoutError as why:
            rows[way.name]["status"] = str(why)
        except Exception as error:  # a peer that is missing, or fails here, is a row that says so
            results["broken"][key] = rows[way.name]["status"] = said(error)
            gc.collect()
            save()
            ask_sign_of_life(device)
            results["broken"].pop(key)
        results.pop("running", None)
    task.ms(bare)
    times: dict[str, list[float]] = {name: [] for name in scores}
    for _ in range(ROUNDS if device.type == "cuda" else 1):
        for name, score in scores.items():
            with head(asking(score)):
                times[name].append(task.ms(score))
    for name, found in times.items():
        rows[name] |= {
            "ms": statistics.median(found),
            "of_products": statistics.median(found) / statistics.median(times[GEMM]),
        }
    made = [{"what": what, "shape": list(shape), "way": name, **row} for name, row in rows.items()]
    print(what, shape, {row["way"]: round(row["ms"], 3) if "ms" in row else row["status"] for row in made}, flush=True)
    return made


def launches(shape: tuple[int, int, int]) -> list[str]:
    """Of the Triton head for one shape, by calculation: tiles of a block of the vocabulary, waves on 132 multiprocessors, MiB."""
    from rlalign.head.triton import softmax_plan
    from rlalign.logprobs.blocks import Tile, columns_of

    (n, d, v), plan, tile = shape, softmax_plan(), Tile.of(torch.device("meta"), None)
    blocks = columns_of(v, tile.vocab)
    width, rows = blocks[0].stop, min(n, tile.tokens)
    tiles = -(-rows // plan.rows) * -(-width // plan.columns)
    waves = tiles / 132
    sums = 12 * n * sum(-(-(block.stop - block.start) // plan.columns) for block in blocks)
    backward = 2 * rows * width + 4 * width * d + 4 * n * d
    calls = len(blocks) * -(-n // tile.tokens)
    cells = [
        " x ".join(map(str, shape)),
        f"{calls}",
        f"{tiles}",
        f"{waves:.1f}",
        f"{100 * waves / -(-tiles // 132):.0f} %",
    ]
    return [*cells, f"{sums / 2**20:.0f}", f"{backward / 2**20:.0f}"]


def markdown(results: dict) -> str:
    """The table of results, or of predictions where there are none."""
    from benchmarks import gpu_rounding

    where = results["machine"]
    lines = [
        "# The head on a GPU",
        "",
        f"{', '.join(f'{key} {value}' for key, value in where.items()) or 'not run'}; `python -m benchmarks.gpu`.",
        "",
    ]
    lines += [
        f"Predicted: the least time of an H200 at {TFLOPS / 1e12:.0f} TFLOP/s in bf16 and {BANDWIDTH / 1e12:.1f} TB/s.",
        "Ratios are to the bf16 products alone: forward one, forward + backward four (a path that keeps its logits needs three).",
        "Errors: nats from float64; for decoding, of the logits.",
        "",
    ]
    if results["laws"]:
        lines += ["| law | holds | found |", "|---|---|---|"]
        lines += [f"| {law['law']} | {ANSWER[law['holds']]} | {law['found']} |" for law in results["laws"]] + [""]
    lines += gpu_rounding.markdown(results.get("rounding", []))
    lines += [
        "| N x D x V | what | way | float32 logits | ms | predicted ms | of the products | extra MiB | max error | mean error |"
    ]
    lines += ["|---|---|---|:-:|--:|--:|--:|--:|--:|--:|"]
    known = {(row["what"], tuple(row["shape"])): [] for row in results["rows"]}
    for row in results["rows"]:
        known[row["what"], tuple(row["shape"])].append(row)
    for what, shape in known or tasks(small=False):
        for row in known.get((what, shape), [{"way": "all", "status": "not run"}]):
            cells = [
                " x ".join(map(str, shape)),
                what,
                row["way"],
                "yes" if row.get("float32") else "no" if "float32" in row else "",
            ]
            cells += [
                f"{row['ms']:.3f}" if "ms" in row else row["status"],
                f"{predicted_ms(what, shape):.3f}" if shape[0] * shape[2] > 10**5 else "",
            ]
            cells += [f"{row['of_products']:.2f}" if "of_products" in row else ""]
            cells += [
                f"{row[key]:{form}}" if key in row else ""
                for key, form in (("peak_mib", ".0f"), ("max_error", ".1e"), ("mean_error", ".1e"))
            ]
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Launches of the Triton head on a GPU of 132 multiprocessors, by calculation:", ""]
    lines += [
        "| N x D x V | calls of the kernel a pass | tiles a call | waves | filled | sums, MiB | backward buffers, MiB |"
    ]
    lines += ["|---|--:|--:|--:|--:|--:|--:|"]
    lines += [f"| {' | '.join(launches(shape))} |" for shape in SHAPES]
    return "\n".join(lines) + "\n"


def empty(where: dict[str, str]) -> dict:
    """Results of a machine, before any."""
    return {"machine": where, "laws": [], "rows": [], "broken": {}}


def write(results: dict, file: Path | None, table: Path | None = None) -> None:
    """The results, whole or not at all, and their table."""
    if file is not None:
        part = file.with_suffix(f".{threading.get_ident()}")
        part.write_text(json.dumps({key: value for key, value in results.items() if key != "running"}, indent=1))
        part.replace(file)
    if table is not None:
        table.write_text(markdown(results))


def end_at(moment: float, results: dict, finish: Callable[[], None]) -> threading.Timer:
    """End this process then, whatever it waits for; a way that has had a minute by then is not asked again."""

    def end() -> None:
        key, since = results.get("running") or ("", moment)
        if moment - since > 60:
            results["broken"][key] = f"not done after {moment - since:.0f} s"
        try:
            finish()
            print(f"time is up{key and ' in '}{key}; a second call goes on", flush=True)
        finally:
            os._exit(3)

    timer = threading.Timer(max(moment - time.monotonic(), 0), end)
    timer.daemon = True
    timer.start()
    return timer


def main() -> int:
    """Run, or write the table alone; 1 where a law does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="results; goes on with those it holds")
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--minutes", type=float, default=8.0)
    arguments = parser.parse_args()
    results, files = empty({}), (arguments.json, arguments.markdown)
    if arguments.json is not None:
        begun = time.monotonic()
        if arguments.device == "cpu":
            os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are defined
        elif not torch.cuda.is_available():
            parser.error("no CUDA device; --device cpu runs the same path in Triton's interpreter")
        device = torch.device(arguments.device)
        if arguments.json.exists():
            results = json.loads(arguments.json.read_text())
        if results["machine"] != machine(device):
            results = empty(machine(device))
        save = functools.partial(write, results, arguments.json)
        timer = end_at(begun + 60 * arguments.minutes, results, functools.partial(write, results, *files))
        try:
            run(results, device, begun + 60 * arguments.minutes - SPARE, save)
        except LostDeviceError as error:
            left = arguments.minutes - (time.monotonic() - begun) / 60
            print(f"the device is lost ({error}); again, without what broke it, for {left:.1f} minutes", flush=True)
            again = [sys.executable, "-m", "benchmarks.gpu", *sys.argv[1:], "--minutes", f"{left:.2f}"]
            os.execv(sys.executable, again)
        finally:
            timer.cancel()
    write(results, None, arguments.markdown)
    return 1 if any(law["holds"] is False for law in results["laws"]) else 0


if __name__ == "__main__":
    raise SystemExit(main())
