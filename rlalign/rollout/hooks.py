"""What the plugin puts around vLLM's own code in every process of an engine. Each function is called once, before a model is built.

refuse_early   settings that cannot be, where the user stands: before vLLM starts a process or reads a weight
append_rpcs    our RPCs on every worker, whatever `worker_extension_cls` the stack chose
bump_epochs    every route by which vLLM changes weights bumps the epoch that the head cache is keyed on
ask_every_engine   an RPC to a server reaches all its data-parallel engines, and all answer
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import wraps
from typing import TYPE_CHECKING

from rlalign.head.cache import Epoch
from rlalign.rollout import ENGINES, SETTINGS_KEY

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.worker.worker_base import WorkerBase, WorkerWrapperBase

OURS = "rlalign_"  # begins the names of our RPCs
# RPCs that never write weights (the step loop's, and ours that only read), or that bump the epoch themselves (rlalign_finish).
QUIET_RPCS = frozenset((
    "execute_model", "sample_tokens", "execute_dummy_batch", "take_draft_token_ids", "check_health", "rlalign_status",
    "rlalign_identity", "rlalign_claim", "rlalign_acknowledge", "rlalign_head_logits", "rlalign_set_head", "rlalign_whereabouts",
    "rlalign_finish",
))  # fmt: skip
RPC, CALLABLE, LOADER = "rpc", "callable_rpc", "weight_loader"  # reasons of a bump


def installed() -> bool:
    """True where vLLM's engine arguments are checked already."""
    from vllm.engine.arg_utils import EngineArgs

    build = EngineArgs.create_engine_config
    return hasattr(build, "__wrapped__") and build.__module__ == __name__


def refuse_early() -> None:
    """Let vLLM's engine arguments check what is asked of us, when they become a configuration.

    Raised in a worker, the same words would be 160 lines up in its log, under "Engine core initialization failed".
    """
    from vllm.engine.arg_utils import EngineArgs

    build = EngineArgs.create_engine_config

    @wraps(build, assigned=("__name__", "__qualname__", "__doc__"))
    def checked(self: EngineArgs, *args: object, **kwargs: object) -> VllmConfig:
        config = build(self, *args, **kwargs)
        settle(config)
        return config

    EngineArgs.create_engine_config = checked


def settle(config: VllmConfig) -> None:
    """Check what this engine is asked, and write what only the environment asks into its additional_config, which reaches every
    worker: Ray and data-parallel ones do not inherit our variables.

    Raises ValueError for settings that are none or cannot be here, RuntimeError for a vLLM outside the tested range or another
    plugin's head in this process.
    """
    from rlalign.rollout.head.head_settings import HeadMode, HeadSettings
    from rlalign.rollout.head.logits_processor import mode_of, require_no_rival

    if config.model_config.runner_type == "pooling":
        return  # has no head
    if mode_of(config) is not HeadMode.OFF:
        require_no_rival()
    if HeadSettings.of_engine(config.additional_config) is not None:
        return
    asked = HeadSettings.of_environment(os.environ)
    if asked is None:
        return
    if not isinstance(config.additional_config, Mapping):
        raise ValueError(
            f"RLALIGN_HEAD={asked.head_dtype} needs an additional_config that is a dictionary, to reach every worker; this "
            f"engine's is a {type(config.additional_config).__name__}. Unset the variable, or pass a dictionary"
        )
    config.additional_config = {**config.additional_config, SETTINGS_KEY: asked.as_dict()}


def append_rpcs() -> None:
    """Patch the call between a worker's making and its model's. Not `init_worker`: a worker in a process of its own loads the
    plugins inside it.

    vLLM mixes one extension into its worker class before it makes a worker. Ours joins the bases of the living class afterwards, so
    that vLLM's check for names that clash sees nothing of it, and the option stays the stack's.
    """
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    init_device = WorkerWrapperBase.init_device

    @wraps(init_device)
    def appending(self: WorkerWrapperBase, *args: object, **kwargs: object) -> None:
        append(type(self.worker))
        load_model = self.worker.load_model

        @wraps(load_model)
        def checking(*args: object, **kwargs: object) -> None:
            load_model(*args, **kwargs)
            require_head(self.worker)

        self.worker.load_model = checking
        init_device(self, *args, **kwargs)

    WorkerWrapperBase.init_device = appending


def append(worker_class: type[WorkerBase]) -> None:
    """Give a worker class our RPCs. Nothing for one that has them. Raises RuntimeError where a name of ours is taken."""
    from rlalign.rollout.worker.extension import WorkerExtension

    if issubclass(worker_class, WorkerExtension):
        return
    taken = [name for name in dir(worker_class) if name.startswith(OURS) and hasattr(WorkerExtension, name)]
    if taken:
        raise RuntimeError(
            f"{worker_class.__qualname__} has {', '.join(taken)} already, from another rlalign or a copy of its extension; leave "
            " that worker_extension_cls out: the plugin brings these methods itself"
        )
    worker_class.__bases__ = (*worker_class.__bases__, WorkerExtension)


def require_head(worker: WorkerBase) -> None:
    """Raise where this worker was asked for a head and its model has not got it: called as soon as the model is there.

    ValueError for a head that is packed by a quantisation; RuntimeError for another plugin's layer or patch, or a model whose
    logits do not come from one LogitsProcessor.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    from rlalign.rollout.head import logits_processor as head
    from rlalign.rollout.worker import readback

    config = worker.vllm_config
    if config.model_config.runner_type == "pooling" or head.mode_of(config) is head.HeadMode.OFF:
        return
    head.require_no_rival()
    model, layer = worker.get_model(), worker._rlalign_layer()
    if not isinstance(layer, head.AlignedLogitsProcessor):
        raise RuntimeError(
            f"rlalign's head was asked for, and {type(model).__name__} was built with "
            f"{type(layer).__module__}.{type(layer).__qualname__}: the plugin came too late in this process. Build the engine "
            "after vLLM's plugins have been loaded, or ask rlalign for nothing (unset RLALIGN_HEAD; no additional_config)"
        )
    heads = {n: m for n, m in model.named_modules() if isinstance(m, ParallelLMHead)}
    for name, lm_head in (heads or dict([readback.find_head(model)])).items():
        head.require_plain_weight(lm_head, name)


def bump_epochs() -> None:
    """Patch three places: every worker RPC except the quiet ones (sleep/wake, reset_weights, extensions, RPCs that do not exist
    yet); access to `model_runner` or a method through the worker wrapper (callables sent by `collective_rpc` bypass the former);
    the vocabulary-parallel weight loader (`load_weights` on the model, and every reload in checkpoint format).

    What none of them sees (writes through a tensor kept outside, raw memcpy) the cache's sample of the content finds.
    """
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


def ask_every_engine() -> None:
    """Give vLLM's client for servers our way of asking, for our methods alone; in the server's HTTP process.

    vLLM (0.32) sends an RPC to all engines and returns what the first of them said: a publish would be proved on that one alone.
    It returns all of them for its own `compute_weight_checksums`, and this does the same for ours.
    """
    from vllm.v1.engine.core_client import AsyncMPClient

    AsyncMPClient.collective_rpc_async = _ask_every_engine


async def _ask_every_engine(
    self: object, method: str, timeout: float | None = None, args: tuple = (), kwargs: dict | None = None
) -> list:
    """One answer a worker, engine by engine, numbered through: rank counts over all engines. Other methods as in vLLM."""
    if not isinstance(method, str) or not method.startswith(OURS):
        return await self.call_utility_async("collective_rpc", method, timeout, args, kwargs)
    engines = await self.call_utility_all_async("collective_rpc", method, timeout, args, kwargs)
    return [
        answer | {"rank": index * len(answers) + rank, ENGINES: len(engines)} if isinstance(answer, dict) else answer
        for index, answers in enumerate(engines)
        for rank, answer in enumerate(answers)
    ]
