"""verl's side of its vLLM server, with every push of weights verified in the workers before a token is sampled from them.

Named in verl's registry of rollouts by rlalign.integrations.verl; not to be imported where vLLM is not.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

from torch import Tensor
from verl.workers.config import RolloutConfig
from verl.workers.rollout.utils import ensure_async_iterator
from verl.workers.rollout.vllm_rollout import ServerAdapter

from rlalign.integrations import verl as adapter
from rlalign.rollout.engine.surface import compared_in
from rlalign.weights import SHARED_MEMORY

__all__ = ["VerifiedServerAdapter"]

SHARED = "RLALIGN_SHARED"  # a folder that trainer and vLLM's workers both see; by default memory of one box
TURNS = 16  # pushes until every tensor was compared once


class VerifiedServerAdapter(ServerAdapter):
    """verl's ServerAdapter; a sixteenth of the tensors of each push, other ones each time, is read back from vLLM's kernels.

    verl's server drops what a worker answers, so that the worker raises in its place. A RuntimeError here ends verl's step.
    """

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        require_sampling(self.config)
        adapter.SAMPLED["temperature"] = self.config.temperature
        self._turn = 0

    async def update_weights(
        self, weights: object, global_steps: int | None = None, wire_format: str = "named_tensors", **kwargs: object
    ) -> None:
        """Push as verl does, then compare. Raises ValueError for deltas, of which nothing whole is left to compare with."""
        if wire_format != "named_tensors":
            raise ValueError(
                f"rlalign.integrations.verl compares whole tensors; the checkpoint engine sends {wire_format}. Choose another "
                "rollout.checkpoint_engine.backend"
            )
        kept: dict[str, Tensor] = {}
        await super().update_weights(self._keeping(weights, kept), global_steps, wire_format, **kwargs)
        if self._has_server:
            with compared_in(Path(os.environ.get(SHARED, SHARED_MEMORY)), kept) as file:
                await self._execute_method("rlalign_require_landed", args=(file, self._turn))
        self._turn += 1

    async def _keeping(self, weights: object, kept: dict[str, Tensor]) -> AsyncIterator[tuple[str, Tensor]]:
        index = self._turn
        async for name, tensor in ensure_async_iterator(weights):
            if self._has_server and index % TURNS == 0:
                kept[name] = tensor.detach().to("cpu", copy=True).contiguous()
            index += 1
            yield name, tensor


def require_sampling(config: RolloutConfig) -> None:
    """Raise ValueError where vLLM's logprobs would be of another distribution than the trainer's, or are not asked for."""
    wrong = None
    if not config.calculate_log_probs:
        wrong = "rollout.calculate_log_probs=False: vLLM gives no logprobs, and nothing is compared; set it to True"
    elif config.logprobs_mode != "processed_logprobs":
        wrong = f"raw against processed logprobs: rollout.logprobs_mode={config.logprobs_mode}; set processed_logprobs"
    elif config.top_p < 1.0 or config.top_k > 0 or config.repetition_penalty != 1.0:
        wrong = (
            f"rollout.top_p={config.top_p}, top_k={config.top_k}, repetition_penalty={config.repetition_penalty}: verl's actor "
            "scores the whole distribution, without a penalty; set 1.0, -1 and 1.0"
        )
    elif config.quantization is not None:
        wrong = f"rollout.quantization={config.quantization}: vLLM computes with other weights than the trainer's"
    if wrong is not None:
        raise ValueError(f"rlalign.integrations.verl: {wrong}")
