"""One family in one engine, in a process of its own: `python -m rlalign.diagnose.families.engine_cells FOLDER DTYPE OUT`.

Writes the cells that an engine can answer as JSON: load, score, head, publish.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rlalign.diagnose.families import building
from rlalign.diagnose.families.cell import FAILED, OK, REFUSED, Cell

if TYPE_CHECKING:
    from torch import Tensor

    from rlalign.rollout.engine.embedded import VLLMEngine

LIMIT = {"float32": (1e-4, "nats at most"), "bfloat16": (1e-2, "k3")}
MOVED = 1e-2  # nats: an update that changes less shows nothing


def main(folder: Path, dtype: str, out: Path) -> None:
    """All cells of this dtype; one that fails ends the ones behind it."""
    cells: dict[str, Cell] = {}
    out.write_text("{}")
    for name, work in _steps(folder, dtype):
        cells[name] = _outcome(work)
        out.write_text(json.dumps({n: asdict(c) for n, c in cells.items()}))
        if cells[name].state != OK:
            return


def _steps(folder: Path, dtype: str) -> list[tuple[str, Callable[[], str]]]:
    import torch

    from rlalign.config import RolloutConfig
    from rlalign.rollout.engine.embedded import VLLMEngine
    from rlalign.trainer import logit_check
    from rlalign.trainer.checkpoint_names import as_checkpoint
    from rlalign.weights import publish

    torch.set_num_threads(1)
    sequences = building.probes()
    model = building.perturbed(folder, seed=1, dtype=dtype, size=0.0)
    moved = building.perturbed(folder, seed=1, dtype=dtype)
    before_BL, after_BL = (building.reference(m, sequences) for m in (model, moved))
    rollout = RolloutConfig(max_tokens=12, max_model_len=256, max_num_seqs=32, enforce_eager=True)
    held: list[VLLMEngine] = []

    def load() -> str:
        held.append(VLLMEngine(folder, rollout, dtype=dtype, head_dtype="float32", seed=0))
        return ""

    def head() -> str:
        transform = logit_check.transform_of(model)
        named = {"hidden/": transform.hidden_divisor, "x": transform.logit_scale, "cap": transform.cap}
        return ", ".join(f"{n} {v:g}" for n, v in named.items() if v not in (1.0, None)) or "nothing"

    def score() -> str:
        return _judged(held[0], sequences, before_BL, dtype)

    def published() -> str:
        report = publish(as_checkpoint(moved, moved.named_parameters()), 1, receiver=held[0])
        if float((before_BL - after_BL).abs().max()) < MOVED:
            raise RuntimeError("the update moved no logprob: this shows nothing")
        proofs = ", ".join(f"{count} {proof}" for proof, count in sorted(report.proofs.items()))
        return f"{_judged(held[0], sequences, after_BL, dtype)}; {proofs}"

    if dtype == "float32":
        return [("head", head), ("load", load), ("score", score), ("publish", published)]
    return [("bfloat16", lambda: load() + score()), ("bfloat16 publish", published)]


def _judged(engine: VLLMEngine, sequences: list[list[int]], wanted_BL: Tensor, dtype: str) -> str:
    """Raises RuntimeError when the engine is further from transformers' own forward than rounding explains."""
    import torch

    limit, unit = LIMIT[dtype]
    apart = (torch.tensor(engine.score(sequences), dtype=torch.float64) - wanted_BL)[:, 1:]
    found = float(apart.abs().max()) if dtype == "float32" else float((apart.exp() - 1 - apart).mean())
    if not found <= limit:
        raise RuntimeError(f"the engine is {found:.1e} {unit} from transformers' own forward, limit {limit:g}")
    return f"{found:.0e}"


def _outcome(work: Callable[[], str]) -> Cell:
    try:
        return Cell(OK, work())
    except ValueError as error:  # by us, before anything ran; what an engine cannot do is a failure with its own words
        return Cell(REFUSED, _short(error))
    except Exception as error:  # every error is an answer here
        return Cell(FAILED, _short(error))


def _short(error: Exception) -> str:
    """The last line that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
