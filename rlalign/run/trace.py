"""What is kept every `tracking.trace_every` steps, to say later what a growing mismatch follows (`rlalign.mismatch.causes`)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch

from rlalign.trainer.head_isolation import predicting
from rlalign.weights import MASTER_WEIGHT

if TYPE_CHECKING:
    from rlalign.run.parties import StepResult
    from rlalign.trainer.policy import Policy

TOKENS = 64  # whose logits are looked at
UNLIKELY = 0.01  # probability under which a sampled token counts as one of low probability
_LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")


def traced(policy: Policy, result: StepResult, micro_batch_size: int) -> dict[str, float]:
    """Norms of the published weights by layer, the scale of the logits, the share of unlikely tokens. Every rank must call it.

    trace/norm/LAYER: Frobenius, "rest" is all outside the layers. trace/logit_std, logit_max: over the vocabulary, before a cap,
    the mean of some tokens, under the weights as they are now. trace/unlikely: share of the step's tokens sampled at p < 0.01.
    """
    squares: dict[str, float] = {}
    for name, weight in policy.named_weights():
        if name == MASTER_WEIGHT:  # the lm_head once more, unrounded
            continue
        found = _LAYER.search(f".{name}")
        layer = f"layer{int(found.group(1)):02d}" if found else "rest"
        squares[layer] = (
            squares.get(layer, 0.0) + float(torch.linalg.vector_norm(weight.detach(), dtype=torch.float64)) ** 2
        )
    few = result.batch.rows(slice(0, 4 * micro_batch_size))
    hidden_ND, _ = predicting(policy.hidden_states(few), few.token_ids_BL, few.loss_mask_BL, limit=TOKENS)
    with policy.whole_head(), torch.no_grad():
        weight_VD = policy.network.get_output_embeddings().weight
        logits_NV = hidden_ND.to(weight_VD.device).float() @ weight_VD.float().T
    old_N = result.old_logprobs_BL[result.batch.loss_mask_BL]
    numbers = {
        "logit_std": logits_NV.std(1).mean(), "logit_max": logits_NV.amax(1).mean(),
        "unlikely": (old_N.exp() < UNLIKELY).double().mean(),
    }  # fmt: skip
    norms = {f"trace/norm/{layer}": total**0.5 for layer, total in sorted(squares.items())}
    return norms | {f"trace/{name}": float(value) for name, value in numbers.items()}
