"""What a server does to logits, found out by asking for the same scores twice: raw and activated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from rlalign.reward.activations import activate
from rlalign.reward.http_scorer.transport import RequestFailed

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rlalign.reward.model_info import Activation

CANDIDATES: tuple[Activation, ...] = ("identity", "sigmoid", "softmax")
TOLERANCE = 5e-3  # a server may compute its activation in bf16


def activation_between(
    raw: Sequence[NDArray[np.float32] | None], activated: Sequence[NDArray[np.float32] | None]
) -> Activation:
    """The function that takes raw scores [K] to the activated ones, so that ours can do the same.

    Raises RequestFailed where it is none of identity, sigmoid and softmax: then "raw" scores are not what they are called.
    """
    if any(x is None or not np.isfinite(x).all() for x in (*raw, *activated)):
        raise RequestFailed("the server answered a small test request with scores that are not finite numbers")
    before, after = (np.concatenate([np.atleast_2d(x) for x in xs]).astype(np.float64) for xs in (raw, activated))
    for name in CANDIDATES if before.shape[-1] > 1 else CANDIDATES[:2]:
        if before.shape == after.shape and np.allclose(activate(before, name), after, rtol=TOLERANCE, atol=TOLERANCE):
            return name
    raise RequestFailed(
        f"the server's raw scores {before[0].round(4).tolist()} become {after[0].round(4).tolist()}, by none of "
        f"{', '.join(CANDIDATES)}: its raw scores are not logits"
    )
