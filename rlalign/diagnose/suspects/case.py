"""The two sides of a mismatch, and what the trainer's model says when it is asked in the plainest way.

B sequences, L padded length.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rlalign import mismatch
from rlalign.diagnose.both_sides import head_logprobs, head_put_back, hidden_states
from rlalign.mismatch.causes import Cause
from rlalign.trainer.checkpoint_names import as_checkpoint
from rlalign.types import RolloutBatch
from rlalign.weights import SHARED_MEMORY

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlalign.rollout.engine.embedded import VLLMEngine

ROUNDING = 2e-5  # nats: what float32 arithmetic in another order may change in a logprob


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is to be explained. batch: just sampled by the engine, at the weights that both sides should hold now.

    score: the trainer's own scoring, [B, L] logprobs as in `Policy.score`; network: the model inside it, whose
    parameters the engine should hold, unless `weights` yields others: merged adapters. tokenizer: the trainer's. master_VD: with
    head_dtype=master.
    """

    engine: VLLMEngine
    network: nn.Module
    batch: RolloutBatch
    score: Callable[[RolloutBatch], Tensor]
    tokenizer: PreTrainedTokenizerBase | None = None
    master_VD: Tensor | None = None
    shared: Path = SHARED_MEMORY
    weights: Callable[[], Iterable[tuple[str, Tensor]]] | None = None

    @cached_property
    def old_BL(self) -> Tensor:
        """What the trainer says."""
        return self.score(self.batch).cpu()

    @cached_property
    def hidden_BLD(self) -> Tensor:
        """[B, L, D] of the model with every sequence alone: no padding that a mask or a position could get wrong."""
        length = self.batch.token_ids_BL.shape[1]
        rows = [hidden_states(self.network, part) for part in self.alone]
        return torch.cat([torch.nn.functional.pad(h, (0, 0, 0, length - h.shape[1])) for h in rows])

    @cached_property
    def alone(self) -> list[RolloutBatch]:
        """Each sequence as a batch of its own, without padding."""
        return [_trimmed(self.batch.rows(slice(i, i + 1))) for i in range(len(self.batch))]

    @cached_property
    def together_BLD(self) -> Tensor:
        """[B, L, D] of the model with the padded batch, as a trainer in good order calls it."""
        return hidden_states(self.network, self.batch)

    @cached_property
    def reference_BL(self) -> Tensor:
        """What the trainer's model says under the engine's convention, each sequence alone."""
        return self.plain(self.temperature, self.head)

    @cached_property
    def floor(self) -> float:
        """Mean |difference| of the model with itself, alone against together: nothing smaller is evidence (nats)."""
        return max(ROUNDING, self.apart(self.plain(self.temperature, self.head, together=True), self.reference_BL))

    @property
    def temperature(self) -> float:
        """What was asked for."""
        return self.engine.spec.temperature

    @property
    def head(self) -> str:
        """The head dtype that was asked for."""
        return self.engine.spec.head_dtype

    def plain(self, temperature: float, head: str, *, together: bool = False) -> Tensor:
        """[B, L]: the same hidden states under another temperature or head; together: those of the padded batch."""
        hidden_BLD = self.together_BLD if together else self.hidden_BLD
        with head_put_back(self.network):
            return head_logprobs(
                self.network, hidden_BLD, self.batch, head, temperature=temperature, master_VD=self.master_VD
            )

    def apart(self, one_BL: Tensor, other_BL: Tensor) -> float:
        """Mean |difference| over the sampled tokens, in nats."""
        mask_BL = self.batch.loss_mask_BL
        return float((one_BL[mask_BL].double() - other_BL[mask_BL].double()).abs().mean())

    @cached_property
    def measured(self) -> dict[str, float]:
        """The run's metrics of this batch, by their logged names."""
        found = mismatch.compare(self.old_BL, self.batch.rollout_logprobs_BL, self.batch.loss_mask_BL)
        return {f"mismatch/{'' if n.startswith('position') else 'lag0/'}{n}": v for n, v in found.items()}


def _trimmed(row: RolloutBatch) -> RolloutBatch:
    """Without padding."""
    return row.rows(slice(None), int(row.attention_mask_BL.sum()))


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
    from rlalign.rollout.engine import teacher_forcing

    own = list(as_checkpoint(case.network, ((n, p) for n, p in case.network.named_parameters() if LORA not in n)))
    weights = own if case.weights is None else list(case.weights())
    by_rank = teacher_forcing.differing_weights(case.engine, weights, shared=Path(case.shared))
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
    from rlalign.rollout.engine import teacher_forcing

    theirs, ours = teacher_forcing.constants(case.engine), _trainer_constants(case.network)
    wrong = [n for n in theirs if n in ours and not _same(theirs[n], ours[n])]
    epsilons = [n for n in wrong if n != teacher_forcing.FREQUENCIES]
    if epsilons:
        shown = ", ".join(f"{n} {theirs[n][0]:g} against {ours[n][0]:g}" for n in epsilons[:3])
        why = f"{len(epsilons)} norm(s) have another epsilon in the engine than in the trainer: {shown}"
        yield Cause("norm epsilon", why, "rlalign attribute", 1.0)
    if teacher_forcing.FREQUENCIES in wrong:
        one, other = theirs[teacher_forcing.FREQUENCIES], ours[teacher_forcing.FREQUENCIES]
        why = f"positions are rotated by {_theta(one)} in the engine and {_theta(other)} in the trainer"
        yield Cause("rope theta", why, "rlalign attribute", 1.0)


def _trainer_constants(network: nn.Module) -> dict[str, list[float]]:
    from rlalign.rollout.engine.teacher_forcing import FREQUENCIES

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
