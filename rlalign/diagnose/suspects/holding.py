"""What the engine holds: every weight on every rank through its kernel, norm epsilons, rotary frequencies, adapters."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import nn

from rlalign.diagnose.suspects.case import Case
from rlalign.mismatch.causes import Cause
from rlalign.trainer.checkpoint_names import as_checkpoint

LAYER = re.compile(r"layers\.(\d+)\.")
LORA = "lora_"
PUBLISH = "rlalign doctor (publishes the weights once more and verifies them)"


def causes(case: Case) -> list[Cause]:
    """What differs, by name."""
    return [*_adapters(case), *_weights(case), *_constants(case)]


def _adapters(case: Case) -> Iterator[Cause]:
    names = [n for n, _ in case.network.named_parameters() if LORA in n]
    if names and case.weights is None:
        why = f"the trainer's model has {len(names)} adapter weights ({names[0]}, ...), the engine serves the base model alone"
        yield Cause("LoRA not applied", why, "merge the adapter before publishing, or serve it with the engine", 1.0)


def _weights(case: Case) -> Iterator[Cause]:
    from rlalign.rollout.engine import inspection

    own = list(as_checkpoint(case.network, ((n, p) for n, p in case.network.named_parameters() if LORA not in n)))
    weights = own if case.weights is None else list(case.weights())
    by_rank = inspection.differing_weights(case.engine, weights, shared=Path(case.shared))
    wrong = {rank: lines for rank, lines in by_rank.items() if lines}
    if not wrong:
        return
    total, rank = len(weights), max(wrong, key=lambda r: len(wrong[r]))
    names = [line.split(":")[0] for line in wrong[rank]]
    why = f"{len(names)} of {total} weights on rank {rank} are not the trainer's: {_summary(names)}"
    if len(wrong) < len(by_rank):
        right = sorted(set(by_rank) - set(wrong))
        why += f"; rank(s) {', '.join(map(str, right))} have them all"
        yield Cause("one engine rank differs", why, PUBLISH, 1.0)
    yield Cause("stale weights", why, PUBLISH, 0.95 if len(wrong) < len(by_rank) else 1.0)


def _summary(names: Sequence[str]) -> str:
    """The first names, or the layers where there are many."""
    if len(names) <= 4:
        return ", ".join(names)
    layers = sorted({int(m.group(1)) for n in names if (m := LAYER.search(n))})
    others = [n for n in names if not LAYER.search(n)]
    where = [f"layer(s) {', '.join(map(str, layers))}"] if layers else []
    return "; ".join([*where, *others[:3]])


def _constants(case: Case) -> Iterator[Cause]:
    from rlalign.rollout.engine import inspection

    theirs, ours = inspection.constants(case.engine), _trainer_constants(case.network)
    wrong = [n for n in theirs if n in ours and not _same(theirs[n], ours[n])]
    epsilons = [n for n in wrong if n != inspection.FREQUENCIES]
    if epsilons:
        shown = ", ".join(f"{n} {theirs[n][0]:g} against {ours[n][0]:g}" for n in epsilons[:3])
        why = f"{len(epsilons)} norm(s) have another epsilon in the engine than in the trainer: {shown}"
        yield Cause("norm epsilon", why, "rlalign attribute", 1.0)
    if inspection.FREQUENCIES in wrong:
        one, other = theirs[inspection.FREQUENCIES], ours[inspection.FREQUENCIES]
        why = f"positions are rotated by {_theta(one)} in the engine and {_theta(other)} in the trainer"
        yield Cause("rope theta", why, "rlalign attribute", 1.0)


def _trainer_constants(network: nn.Module) -> dict[str, list[float]]:
    from rlalign.rollout.engine.inspection import FREQUENCIES

    found: dict[str, list[float]] = {}
    for name, module in network.named_modules():
        for attribute in ("variance_epsilon", "eps"):  # transformers uses either
            if type(module).__name__.endswith("RMSNorm") and attribute in vars(module):
                found[name] = [float(vars(module)[attribute])]
        if "inv_freq" in module._buffers:
            found[FREQUENCIES] = module.inv_freq.float().tolist()
    return found


def _same(one: Sequence[float], other: Sequence[float]) -> bool:
    """An epsilon exactly; frequencies as far as a cosine table in bf16 keeps them."""
    if len(one) != len(other):
        return False
    if len(one) == 1:
        return one == other
    return all(math.isclose(a, b, rel_tol=1e-2, abs_tol=5e-3) for a, b in zip(one, other, strict=True))


def _theta(frequencies: Sequence[float]) -> str:
    """The base that gives these frequencies: theta ** (-2 j / D)."""
    ratio = frequencies[1] / frequencies[0]
    return f"theta {ratio ** -len(frequencies):.4g}"
