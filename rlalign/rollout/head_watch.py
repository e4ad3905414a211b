"""The head of a live engine, watched: what its logits were multiplied in, and one line in the log of every worker.

The first call of a head that has been asked about is compared with float64, on a few rows and words; all other calls cost
nothing. Before anything was sampled a probe goes through the same method.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding

from rlalign import multiplied
from rlalign.multiplied import Multiplied
from rlalign.rollout.head_settings import HeadMode

if TYPE_CHECKING:
    from rlalign.rollout.head_layer import AlignedLogitsProcessor

log = init_logger("vllm.rlalign")  # under vLLM's name: only its own loggers are shown in workers
ApplyHead = Callable[["AlignedLogitsProcessor", VocabParallelEmbedding, Tensor, Tensor | None], Tensor]


class HeadWatch:
    """What one layer was seen doing. asked: look at its next call; seen: what the last look found."""

    def __init__(self) -> None:
        self.asked = False
        self.logged = False
        self.seen: Multiplied | None = None

    def forget(self) -> None:
        """What was seen belongs to another mode."""
        self.asked, self.seen = False, None

    def look(
        self, layer: AlignedLogitsProcessor, lm_head: nn.Module, hidden: Tensor, bias: Tensor | None, logits: Tensor
    ) -> None:
        """Judge this call if one was asked for; a call that cannot tell leaves the question open."""
        if not self.logged:
            self.logged = True
            log.info(line(layer, lm_head))
        if (
            not self.asked
            or torch.compiler.is_compiling()
            or (hidden.is_cuda and torch.cuda.is_current_stream_capturing())
        ):
            return
        found = judged(layer, lm_head, hidden, bias, logits)
        if found.dtype is not None:
            self.asked, self.seen = False, found


def watched(apply_head: ApplyHead) -> ApplyHead:
    """`_apply_head` whose layer's watch sees operands and result."""

    @functools.wraps(apply_head)
    def and_look(
        self: AlignedLogitsProcessor,
        lm_head: VocabParallelEmbedding,
        hidden_states: Tensor,
        embedding_bias: Tensor | None,
    ) -> Tensor:
        logits = apply_head(self, lm_head, hidden_states, embedding_bias)
        self.watch.look(self, lm_head, hidden_states, embedding_bias, logits)
        return logits

    return and_look


def judged(
    layer: AlignedLogitsProcessor, lm_head: nn.Module, hidden: Tensor, bias: Tensor | None, logits: Tensor
) -> Multiplied:
    """These logits against float64 ones of the weight that this layer's mode is to multiply by."""
    if not isinstance(lm_head.quant_method, UnquantizedEmbeddingMethod | UnquantizedLinearMethod):
        return Multiplied(dtype=None, why=f"the head is quantised ({type(lm_head.quant_method).__name__})")
    weight = lm_head.weight
    if weight.is_meta or not weight.numel():
        return Multiplied(dtype=None, why="the head's weight is not there")
    if layer.mode is HeadMode.MASTER:
        weight = layer.master.get(weight)
    return multiplied.of_logits(logits, hidden, weight, bias)


def probe(model: nn.Module, layer: AlignedLogitsProcessor, lm_head: nn.Module, *, whole_path: bool) -> Multiplied:
    """Judge made-up hidden states through the live layer, and ask about its next real call.

    whole_path: also send them through the model's own compute_logits, on every rank: what is rounded behind the head, by
    another patch say, never leaves it in float32.
    """
    weight = getattr(lm_head, "weight", None)
    if weight is None or weight.is_meta or not weight.numel() or not weight.is_floating_point():
        return Multiplied(dtype=None, why=f"{type(lm_head).__name__} has no plain weight")
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(multiplied.ROWS, layer.hidden_size(lm_head), generator=generator)
    hidden = hidden.to(weight.device, layer.body_dtype)
    calls, layer.watch.asked = layer.calls, False
    try:
        with torch.inference_mode():
            found = judged(layer, lm_head, hidden, None, layer.product(lm_head, hidden))
            final = model.compute_logits(hidden) if whole_path else None
    except RuntimeError as error:  # a head that refuses, since its weight is in doubt, also refuses to sample
        return Multiplied(dtype=None, why=f"the head refused: {error}")
    finally:
        layer.calls, layer.watch.asked = calls, True
    if found.dtype == "float32" and layer.mode is not HeadMode.OFF and final is not None and _is_rounded(final):
        return Multiplied(
            dtype="bfloat16", max_error=found.max_error, bfloat16_error=found.bfloat16_error,
            why="the head gives float32, but the logits that leave the model are rounded behind it",
        )  # fmt: skip
    return found


def line(layer: AlignedLogitsProcessor, lm_head: nn.Module) -> str:
    """What a worker's log says of its head."""
    from rlalign.rollout.worker import route_of

    route = route_of(layer, lm_head)
    body = _name(layer.body_dtype)
    dtype = body if layer.mode is HeadMode.OFF and layer.settings is not None else "float32"
    if layer.settings is None:
        return "rlalign: additional_config has no settings of ours; the head is vLLM's own"
    claim = f"; the checkpoint's head_dtype {layer.claimed} is not used" if layer.claimed not in (None, dtype) else ""
    of_ours = f", route {route['route']}, kernel {route['kernel'] or 'of the library'}" if route["route"] else ""
    return f"rlalign: head {dtype}, body {body}, mode {layer.mode.value}{of_ours}{claim}"


def _is_rounded(logits: Tensor) -> bool:
    finite = logits[torch.isfinite(logits)]
    return finite.numel() > 0 and bool((finite.to(torch.bfloat16).to(finite.dtype) == finite).all())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
