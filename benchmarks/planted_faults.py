"""Every planted fault, in float32 and bf16 bodies: is it named among the first three causes? Writes results/planted_faults.md.

python -m benchmarks.planted_faults [--out FILE]      engines in this process; the last row starts two more processes
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.planting import FAULTS, Fault, nothing
from benchmarks.planting_bench import LAYERS, Bench, build_model
from rlalign.cli import set_environment
from rlalign.diagnose import suspects
from rlalign.mismatch.causes import Cause
from rlalign.tracking import environment

TOP = 3
CLAIM = 0.5  # a score from which a cause counts as claimed: without a fault none may reach it


@dataclass(frozen=True)
class Outcome:
    """What the diagnosis said of one planted fault. place: of the expected cause, 0 where it is not in the list."""

    fault: Fault
    body: str
    k3: float
    causes: tuple[Cause, ...]
    seconds: float

    @property
    def place(self) -> int:
        names = [c.name for c in self.causes]
        return names.index(self.fault.expected) + 1 if self.fault.expected in names else 0

    @property
    def hit(self) -> bool:
        """Named in the first three, with what its evidence must contain (the layer, the weight, the rank)."""
        return 0 < self.place <= TOP and self.fault.evidence in self.causes[self.place - 1].why


def examine(bench: Bench, fault: Fault) -> Outcome:
    """Plant, diagnose, put right."""
    began = time.perf_counter()
    with fault.plant(bench) as case:
        causes = tuple(suspects.rank(case))
        k3 = case.measured["mismatch/lag0/k3"]
    return Outcome(fault, bench.body, k3, causes, time.perf_counter() - began)


def run(body: str, ranks: int, folder: Path, shared: Path) -> tuple[Outcome, list[Outcome]]:
    """The bench without a fault, then every fault of this body and number of ranks, on one engine."""
    bench = Bench.build(folder, shared, body=body, ranks=ranks)
    try:
        quiet = examine(bench, Fault("no fault", nothing, "numerical difference"))
        return quiet, [examine(bench, f) for f in FAULTS if f.ranks == ranks and body in f.bodies]
    finally:
        bench.engine.close()


def table(quiet: list[Outcome], found: list[Outcome]) -> str:
    """Hits and misses, honestly."""
    lines = ["| planted | body | k3 | expected cause | place | first three causes | |", "|---|---|--:|---|--:|---|---|"]
    for o in found:
        named = ", ".join(f"{c.name} {c.score:.2f}" for c in o.causes[:TOP])
        verdict = "hit" if o.hit else "**miss**"
        lines.append(
            f"| {o.fault.name} | {o.body} | {o.k3:.1e} | {o.fault.expected} | {o.place or '-'} | {named} | {verdict} |"
        )
    lines.append(
        "| KV cache in fp8 | - | - | kv-cache dtype | - | not planted: vLLM's CPU backend has no fp8 cache | not tried |"
    )
    lines += ["", "Without a fault (no cause may score 0.5 or more):", ""]
    lines += ["| body | ranks | k3 | first causes | |", "|---|--:|--:|---|---|"]
    for o, ranks in zip(quiet, (1, 1, 2), strict=True):
        named = ", ".join(f"{c.name} {c.score:.2f}" for c in o.causes[:TOP])
        verdict = "quiet" if all(c.score < CLAIM for c in o.causes) else "**false alarm**"
        lines.append(f"| {o.body} | {ranks} | {o.k3:.1e} | {named} | {verdict} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "planted_faults.md")
    out = parser.parse_args().out
    set_environment()
    quiet, found = [], []
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory(dir="/dev/shm") as shared:
        model = build_model(Path(folder) / "model")
        for body, ranks in (("float32", 1), ("bfloat16", 1), ("float32", 2)):
            calm, outcomes = run(body, ranks, model, Path(shared))
            quiet.append(calm)
            found += outcomes
    about = environment.snapshot()
    versions = ", ".join(f"{n} {about['versions'][n]}" for n in ("vllm", "torch", "transformers"))
    hits, seconds = sum(o.hit for o in found), sum(o.seconds for o in found) / len(found)
    text = [
        "# Planted faults",
        "",
        f"One fault at a time in a real engine or trainer (random Qwen3, {LAYERS} layers); the diagnosis sees the running",
        f"parties only. {hits} of {len(found)} are named in the first three causes, with layer, weight or rank where one was",
        f"tampered with; {seconds:.1f} s a diagnosis on {about['cpu']}, {versions}, Python {platform.python_version()}.",
        "",
        "    python -m benchmarks.planted_faults",
        "",
        table(quiet, found),
        "",
    ]
    out.write_text("\n".join(text))
    print(out.read_text())
    return 0 if hits == len(found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
