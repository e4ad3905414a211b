"""Do both sides hold the same weights? Asked of the engine's own kernels, on every rank."""

from __future__ import annotations

import tempfile
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from rlalign.rollout.engine.embedded import VLLMEngine
from rlalign.trainer.checkpoint_names import as_checkpoint

SHOWN = 6  # names in a message


def require_same_weights(engine: VLLMEngine, network: nn.Module, shared: Path, *, anyway: bool) -> list[str]:
    """Notes for the reader. shared: a folder that every rollout rank can read, for one copy of the weights.

    Raises RuntimeError naming the tensors that differ, unless `anyway`: then a note says so.
    """
    with tempfile.TemporaryDirectory(prefix="rlalign-weights-", dir=shared) as folder:
        file = Path(folder) / "trainer.safetensors"
        save_file(
            {n: p.detach().cpu().contiguous() for n, p in as_checkpoint(network, network.named_parameters())}, file
        )
        answers = engine.ask("rlalign_differing_weights", str(file))
    differ = sorted({name for answer in answers for name in answer["differ"]})
    unknown = sorted({name for answer in answers for name in answer["unknown"]})
    notes = []
    if unknown:
        notes.append(f"weights not compared, the engine holds them in another form: {_listed(unknown)}")
    if differ:
        said = f"the two sides hold different weights: {len(differ)} tensors, {_listed(differ)}"
        if not anyway:
            raise RuntimeError(
                f"mismatched checkpoints: {said}. Load the same, or attribute the difference with --any-weights"
            )
        notes.append(said)
    return notes


def _listed(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
