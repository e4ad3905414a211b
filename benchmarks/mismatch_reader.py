"""One million tokens through `rlalign mismatch`: seconds and peak memory of a fresh process, imports included.

The claim: under 5 s and 500 MB, for rlalign's parquet and for prime-rl's token export. Prints JSON; --write saves it to
results/mismatch_reader.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

TOKENS, LENGTH, STEPS = 1_000_000, 500, 20
RESULT = Path(__file__).parent / "results" / "mismatch_reader.json"
PROBE = """
import resource, sys, time
began = time.perf_counter()
from pathlib import Path
from rlalign.diagnose import offline
offline.run(Path(sys.argv[1]), plot=Path(sys.argv[2]))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(time.perf_counter() - began, peak, file=sys.stderr)
"""


def main() -> None:
    """Write the dumps, read each in its own process, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="save to results/mismatch_reader.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        dumps = write_dumps(Path(folder))
        rows = [measure(path, Path(folder) / "plot.png") for path in dumps]
    print(json.dumps(rows, indent=2))
    if arguments.write:
        RESULT.write_text(json.dumps(rows, indent=2) + "\n")


def measure(path: Path, plot: Path) -> dict[str, str | int | float]:
    """Report and plot of one dump in a fresh process."""
    done = subprocess.run([sys.executable, "-c", PROBE, path, plot], capture_output=True, text=True, check=True)
    seconds, peak = map(float, done.stderr.split()[-2:])
    return {
        "file": path.name,
        "file_mb": path.stat().st_size / 1e6,
        "tokens": TOKENS,
        "seconds": seconds,
        "peak_mb": peak,
    }


def write_dumps(folder: Path) -> list[Path]:
    """The same tokens as rlalign writes them and as prime-rl exports them."""
    r = np.random.default_rng(0)
    rollout = -r.exponential(0.5, TOKENS).astype(np.float32)
    old = (rollout + 0.02 * r.standard_t(4, TOKENS)).astype(np.float32)
    ids = r.integers(0, 50_000, TOKENS).astype(np.int32)
    sequences = TOKENS // LENGTH
    step = np.repeat(np.arange(STEPS), TOKENS // STEPS)
    columns = {
        "step": step, "sequence": np.tile(np.repeat(np.arange(sequences // STEPS), LENGTH), STEPS),
        "position": np.tile(np.arange(LENGTH), sequences), "token_id": ids, "token": ids.astype(str),
        "rollout_logprob": rollout, "old_logprob": old, "policy_version": step, "group_id": np.arange(TOKENS) // LENGTH // 8,
        "reward": np.zeros(TOKENS, np.float32), "advantage": np.zeros(TOKENS, np.float32), "loss_mask": np.ones(TOKENS, bool),
    }  # fmt: skip
    parquet, jsonl = folder / "step-000000.parquet", folder / "rank_0.jsonl"
    pq.write_table(pa.table(columns), parquet)
    with jsonl.open("w") as file:
        for b in range(sequences):
            rows = slice(b * LENGTH, (b + 1) * LENGTH)
            file.write(json.dumps(_prime_rl_row(b, ids[rows], old[rows], rollout[rows]), separators=(",", ":")) + "\n")
    return [parquet, jsonl]


def _prime_rl_row(b: int, ids: np.ndarray, old: np.ndarray, rollout: np.ndarray) -> dict:
    d = old.astype(float) - rollout
    return {
        "schema_version": 1, "step": b // 100, "export_step": b // 100, "rank": 0, "env_name": "math",
        "token_ids": ids.tolist(), "position_ids": list(range(LENGTH)), "loss_mask": [True] * LENGTH,
        "advantages": [0.5] * LENGTH, "losses": [{"rl": {"advantage": 0.5, "mask": True}}] * LENGTH,
        "inference_logprobs": rollout.tolist(), "trainer_logprobs": old.tolist(), "entropy": np.abs(rollout).tolist(),
        "mismatch_kl": (np.expm1(d) - d).tolist(), "importance_ratio": np.exp(d).tolist(), "is_masked": [False] * LENGTH,
    }  # fmt: skip


if __name__ == "__main__":
    main()
