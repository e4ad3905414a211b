"""Our RPCs on every worker, whatever `worker_extension_cls` the stack chose; no engine that was asked for a head it cannot have.

vLLM mixes one extension into its worker class before it makes a worker. Ours joins the bases of the living class afterwards, so
that vLLM's check for names that clash sees nothing of it, and the option stays the stack's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING

from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.v1.worker.worker_base import WorkerWrapperBase

from rlalign.rollout.head.head_settings import HeadMode
from rlalign.rollout.head.logits_processor import mode_of

if TYPE_CHECKING:
    from vllm.v1.worker.worker_base import WorkerBase


def install() -> None:
    """Patch the call between a worker's making and its model's. Called once per process by the plugin.

    Not `init_worker`: a worker in a process of its own loads the plugins inside it.
    """
    WorkerWrapperBase.init_device = _after_appending(WorkerWrapperBase.init_device)


def _after_appending(init_device: Callable[..., None]) -> Callable[..., None]:
    @wraps(init_device)
    def appending(self: WorkerWrapperBase, *args: object, **kwargs: object) -> None:
        append(type(self.worker))
        self.worker.load_model = _checked(self.worker, self.worker.load_model)
        init_device(self, *args, **kwargs)

    return appending


def append(worker_class: type[WorkerBase]) -> None:
    """Give a worker class our RPCs. Nothing for one that has them. Raises RuntimeError where a name of ours is taken."""
    from rlalign.rollout.worker.extension import WorkerExtension

    if issubclass(worker_class, WorkerExtension):
        return
    taken = [name for name in dir(worker_class) if name.startswith("rlalign_") and hasattr(WorkerExtension, name)]
    if taken:
        raise RuntimeError(
            f"{worker_class.__qualname__} has {', '.join(taken)} already, from another rlalign or a copy of its extension; leave "
            " that worker_extension_cls out: the plugin brings these methods itself"
        )
    worker_class.__bases__ = (*worker_class.__bases__, WorkerExtension)


def _checked(worker: WorkerBase, load_model: Callable[..., None]) -> Callable[..., None]:
    @wraps(load_model)
    def checking(*args: object, **kwargs: object) -> None:
        load_model(*args, **kwargs)
        require_head(worker)

    return checking


def require_head(worker: WorkerBase) -> None:
    """Raise where this worker was asked for a head and its model has not got it: called as soon as the model is there.

    ValueError for a head that is packed by a quantisation; RuntimeError for another plugin's layer or patch, or a model whose
    logits do not come from one LogitsProcessor.
    """
    from rlalign.rollout.head import rivals
    from rlalign.rollout.head.logits_processor import AlignedLogitsProcessor, require_plain_weight
    from rlalign.rollout.worker import readback

    config = worker.vllm_config
    if config.model_config.runner_type == "pooling" or mode_of(config) is HeadMode.OFF:
        return
    rivals.require_none()
    layer = worker._rlalign_layer()
    if not isinstance(layer, AlignedLogitsProcessor):
        raise RuntimeError(
            f"rlalign's head was asked for, and {type(worker.get_model()).__name__} was built with "
            f"{type(layer).__module__}.{type(layer).__qualname__}: the plugin came too late in this process. Build the engine "
            "after vLLM's plugins have been loaded, or ask rlalign for nothing (unset RLALIGN_HEAD; no additional_config)"
        )
    heads = {n: m for n, m in worker.get_model().named_modules() if isinstance(m, ParallelLMHead)}
    for name, lm_head in (heads or dict([readback.find_head(worker.get_model())])).items():
        require_plain_weight(lm_head, name)
