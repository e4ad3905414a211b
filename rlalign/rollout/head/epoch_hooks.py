"""Hooks on every route by which vLLM changes weights; each bumps the epoch that the head cache is keyed on.

1. every worker RPC except the quiet ones: sleep/wake, reset_weights, extensions, RPCs that do not exist yet;
2. access to `model_runner` or a method through the worker wrapper: callables sent by `collective_rpc` bypass the lookup of 1;
3. the vocabulary-parallel weight loader: `load_weights` on the model, and every reload in checkpoint format.

What none of them sees (writes through a tensor kept outside, raw memcpy) the cache's sample of the content finds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

from rlalign.head.cache import Epoch

# RPCs that never write weights (the step loop's, and ours that only read), or that bump the epoch themselves (rlalign_finish).
QUIET_RPCS = frozenset(
    {"execute_model", "sample_tokens", "execute_dummy_batch", "take_draft_token_ids", "check_health"}
    | {
        "rlalign_status",
        "rlalign_identity",
        "rlalign_claim",
        "rlalign_acknowledge",
        "rlalign_head_logits",
        "rlalign_set_head",
        "rlalign_whereabouts",
        "rlalign_finish",
    }
)
RPC, CALLABLE, LOADER = "rpc", "callable_rpc", "weight_loader"  # reasons of a bump


def install() -> None:
    """Patch the places. Called once per process by the plugin, before any model is built."""
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    WorkerWrapperBase.__getattr__ = _bump_on_lookup(WorkerWrapperBase.__getattr__)
    VocabParallelEmbedding.weight_loader = _bump_after(VocabParallelEmbedding.weight_loader, LOADER)


def _bump_after(function: Callable, reason: str) -> Callable:
    @wraps(function)
    def bumping(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        finally:
            Epoch.bump(reason)  # also after a failure: part of the weights may have been written

    return bumping


def _bump_on_lookup(lookup: Callable) -> Callable:
    @wraps(lookup)
    def bumping(wrapper: object, name: str) -> object:
        found = lookup(wrapper, name)
        if name == "sample_tokens":
            wrapper.worker.rlalign_sampled_steps = getattr(wrapper.worker, "rlalign_sampled_steps", 0) + 1
        if name == "model_runner":
            Epoch.bump(CALLABLE)
        if name in QUIET_RPCS or name.startswith("_") or not callable(found):
            return found
        return _bump_after(found, RPC)

    return bumping
