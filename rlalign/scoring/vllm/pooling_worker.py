"""Worker side of VLLMScorer: states before the head come back beside the scores (vLLM's `worker_extension_cls`).

vLLM offers no way to ask for both (vllm-project/vllm#20624). Goes when its pooling output carries hidden states itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from vllm.model_executor.layers.pooler.seqwise.heads import ClassifierPoolerHead
    from vllm.v1.pool.metadata import PoolingMetadata

WITH_STATE = "rlalign_with_state"  # key in PoolingParams.extra_kwargs of a request that wants its state
EXTENSION = f"{__name__}.PoolingWorkerExtension"


class _Worker(Protocol):
    """What vLLM's worker, into whose bases the extension goes, has."""

    rank: int

    def get_model(self) -> torch.nn.Module: ...


class PoolingWorkerExtension:
    """RPCs that rlalign adds to the workers of a pooling engine."""

    def rlalign_open_pooler(self: _Worker) -> dict[str, Any]:
        """Let this rank's classification head give states to the requests that ask for them. Idempotent.

        Returns {"rank", "opened", "reason"}: opened is False where this model has no state in front of a head.
        """
        head = _classifier_head(self.get_model())
        if isinstance(head, str):
            return {"rank": self.rank, "opened": False, "reason": head}
        if append_states not in head._forward_hooks.values():
            head.register_forward_hook(append_states)
        return {"rank": self.rank, "opened": True, "reason": ""}


def _classifier_head(model: torch.nn.Module) -> ClassifierPoolerHead | str:
    """The head that turns one pooled state into logits, or why there is none."""
    from vllm.model_executor.layers.pooler.seqwise.heads import ClassifierPoolerHead

    pooler = model.pooler
    tasks = getattr(pooler, "poolers_by_task", {})  # only a dispatching pooler has them
    head = getattr(tasks.get("classify"), "head", None)
    if not isinstance(head, ClassifierPoolerHead):
        return f"{type(model).__name__} has no head over one pooled state (its pooler is {type(pooler).__name__})"
    if head.classifier is None:
        return f"{type(model).__name__} computes its scores before pooling, so the pooled vector is already the score"
    return head


def append_states(
    head: ClassifierPoolerHead, inputs: tuple[torch.Tensor | list[torch.Tensor], PoolingMetadata], scores: torch.Tensor
) -> torch.Tensor | list[torch.Tensor]:
    """Forward hook: [K] scores become float32 [K + D], scores then state, for requests that asked; others stay untouched."""
    states, metadata = inputs
    asked = [bool((params.extra_kwargs or {}).get(WITH_STATE)) for params in metadata.pooling_params]
    if not any(asked):
        return scores
    return [
        torch.cat([score.float(), state.float()]) if wanted else score
        for score, state, wanted in zip(scores, states, asked, strict=True)
    ]
