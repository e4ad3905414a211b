"""Entry point of the vLLM plugin (group `vllm.general_plugins`).

vLLM calls `register()` in every process that builds a model. It only logs a plugin whose import fails and starts without it,
so nothing here may be trusted to have run: the engine proves it on every rank afterwards (`rlalign.rollout.engine.handshake`).
This module therefore imports nothing heavy, and a layer that finds no rlalign settings behaves exactly like vLLM's own.
"""

from __future__ import annotations

import os

from rlalign.rollout.names import GLOO_TRANSFER, SLOT


def register() -> None:
    """Put our layer in vLLM's slot for LogitsProcessor; install epoch hooks, gloo transport, RPCs to every engine. Idempotent.

    A slot that another plugin holds is left alone: an engine that asks for our head then ends at its start, naming the holder.
    """
    import vllm
    from vllm.model_executor.custom_op import op_registry_oot
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    from rlalign.rollout import exact, versions
    from rlalign.rollout.engine import early_refusal, own_process, yielding
    from rlalign.rollout.exact import switch
    from rlalign.rollout.head import epoch_hooks
    from rlalign.rollout.server import every_engine
    from rlalign.rollout.worker import appended_rpcs, cpu_layers, steady_layers

    if early_refusal.installed():
        return
    own_process.end_with_parent()
    early_refusal.install()
    appended_rpcs.install()
    if SLOT not in op_registry_oot:
        LogitsProcessor.register_oot(_layer(vllm.__version__))
    epoch_hooks.install()
    if exact.enabled():  # engines in processes of their own learn it here
        switch.register()
    if versions.has_output_spans(vllm.__version__):  # the version whose sources these two were written for
        every_engine.install()
        if os.environ.get(yielding.VARIABLE) == "1":
            yielding.install()
            cpu_layers.install()
    if steady_layers.enabled():
        cpu_layers.install()  # without bf16 instructions the one order of additions is that of widened products
        steady_layers.install()
    if versions.has_weight_transfer(vllm.__version__):
        from vllm.distributed.weight_transfer import WeightTransferEngineFactory

        WeightTransferEngineFactory.register_engine(
            GLOO_TRANSFER, "rlalign.rollout.worker.gloo_transfer", "GlooTransferEngine"
        )


def _layer(version: str) -> type:
    from rlalign.rollout import versions

    if versions.hook(version) is versions.Hook.APPLY_HEAD:
        from rlalign.rollout.head.logits_processor import AlignedLogitsProcessor as Layer
    else:
        from rlalign.rollout.head.logits_processor_early import EarlyLogitsProcessor as Layer
    return Layer
