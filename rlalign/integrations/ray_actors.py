"""What the adapters of stacks on Ray share: the class behind an actor class, and the comparison after a push."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from torch import Tensor

from rlalign.rollout.attached import AttachedEngine

__all__ = ["plain", "verify_push"]

# Tensors of a push that are compared, other ones each time: until each had its turn, and afterwards
FIRST, LATER = 32, 8


def plain(actor: type) -> type:
    """The class that `ray.remote` was given."""
    return actor if inspect.isclass(actor) else actor.__ray_metadata__.modified_class.__ray_actor_class__


def verify_push(engine: AttachedEngine | None, weights: Iterator[tuple[str, Tensor]]) -> None:
    """Compare some of the trainer's weights with what the engine computes with. engine: None on every rank but the first.

    A name that nobody loads or a kernel that keeps its copy is found in the first pushes, and a push that is lost by any tensor: so
    FIRST tensors a push until each had its turn, and LATER ones from then on. All ranks iterate, since they gather shards together.
    Raises RuntimeError naming what differs.
    """
    if engine is not None:
        engine.verify(weights, sample=LATER if engine.every_tensor_had_its_turn else FIRST)
    for _ in weights:
        pass
