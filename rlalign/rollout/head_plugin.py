"""Entry point of the vLLM plugin (group `vllm.general_plugins`).

vLLM calls `register()` in every process that builds a model. It only logs a plugin whose import fails and starts without it,
so nothing here may be trusted to have run: the engine proves it on every rank afterwards (`rlalign.rollout.engine.handshake`).
This module therefore imports nothing heavy, and a layer that finds no rlalign settings behaves exactly like vLLM's own.
"""

from __future__ import annotations

import os

from rlalign.rollout import GLOO_TRANSFER, SLOT


def register() -> None:
    """Put our layer in vLLM's slot for LogitsProcessor; install epoch hooks, gloo transport, RPCs to every engine. Idempotent.

    A slot that another plugin holds is left alone: an engine that asks for our head then ends at its start, naming the holder.
    """
    import vllm
    from vllm.model_executor.custom_op import op_registry_oot
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    from rlalign.rollout import exact, hooks, versions
    from rlalign.rollout.engine import own_process
    from rlalign.rollout.worker import cpu

    if hooks.installed():
        return
    own_process.end_with_parent()
    hooks.refuse_early()
    hooks.append_rpcs()
    if SLOT not in op_registry_oot:
        from rlalign.rollout.head.logits_processor import AlignedLogitsProcessor

        LogitsProcessor.register_oot(AlignedLogitsProcessor)
    hooks.bump_epochs()
    if exact.enabled():  # engines in processes of their own learn it here
        exact.register()
    if versions.has_output_spans(vllm.__version__):  # the version whose sources these two were written for
        hooks.ask_every_engine()
        if os.environ.get(own_process.YIELDING) == "1":
            own_process.yield_cores()
            cpu.install_widened()
    if cpu.steady_wanted():
        cpu.install_widened()  # without bf16 instructions the one order of additions is that of widened products
        cpu.install_steady()
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    WeightTransferEngineFactory.register_engine(GLOO_TRANSFER, "rlalign.rollout.worker.receiving", "GlooTransferEngine")
