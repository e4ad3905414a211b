"""What a live engine holds, looked at without changing it: weights through their kernels, and constants.

Unlike a publish, which would repair what it checks.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from rlalign.rollout.engine.embedded import VLLMEngine
from rlalign.weights import MASTER_WEIGHT

FREQUENCIES = "rotary frequencies"


def differing_weights(
    engine: VLLMEngine, weights: Iterable[tuple[str, Tensor]], *, shared: Path
) -> dict[int, list[str]]:
    """{rank: one line for every weight that this rank does not compute with}; empty lists where all are equal.

    weights: Hugging Face names and full tensors, as for a publish. Sampled columns of every row, through the kernels.
    """
    with tempfile.TemporaryDirectory(prefix="rlalign-inspect-", dir=shared) as directory:
        file = Path(directory) / "weights.safetensors"
        save_file({n: t.detach().cpu().contiguous() for n, t in weights if n != MASTER_WEIGHT}, file)
        return {answer["rank"]: answer["problems"] for answer in engine.ask("rlalign_unlanded", str(file))}


def constants(engine: VLLMEngine) -> dict[str, list[float]]:
    """{module or FREQUENCIES: values} of the first rank: the epsilon of every norm, and what positions are rotated by."""
    answer = engine.ask("rlalign_constants")[0]
    rotary = {FREQUENCIES: answer["frequencies"]} if answer["frequencies"] else {}
    return {name: [epsilon] for name, epsilon in answer["epsilons"].items()} | rotary
