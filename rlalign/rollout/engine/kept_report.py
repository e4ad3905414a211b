"""The set each token was sampled from, read off vLLM's processed logprobs: the ids whose logprob is not -inf."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from vllm.logprobs import FlatLogprobs


def kept_sets(flat: FlatLogprobs, reported: int) -> tuple[array, array]:
    """(ids, how many each token has) of one completion, as `Rollout.kept_ids` and `kept_counts`; both empty for reported 0.

    reported: ids asked for with each token, the likeliest first; the sampled token precedes them. Where all of them are finite the
    set may go on, and 0 is said. Raises RuntimeError when vLLM reported another number of ids.
    """
    if not reported:
        return array("i"), array("q")
    tokens = len(flat.start_indices)
    if len(flat.token_ids) != tokens * (reported + 1):
        raise RuntimeError(
            f"vLLM reported {len(flat.token_ids)} ids for {tokens} tokens, expected {reported + 1} for each: the kept sets cannot "
            "be told apart; run with rollout.capture_ids=0, with which the trainer computes them"
        )
    shape = (tokens, reported + 1)
    ids_TK = np.asarray(flat.token_ids, dtype=np.int32).reshape(shape)[:, 1:]
    inside_TK = np.asarray(flat.logprobs, dtype=np.float64).reshape(shape)[:, 1:] > -np.inf
    inside_TK &= ~inside_TK.all(1, keepdims=True)
    return array("i", ids_TK[inside_TK].tobytes()), array("q", inside_TK.sum(1, dtype=np.int64).tobytes())
