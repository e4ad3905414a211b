"""The layer that replaces vLLM's LogitsProcessor: same head, float32 logits, proof of what it did.

Only `_apply_head` is overridden (signature stable from vLLM 0.28 to 0.33): gathering, padding, soft cap, scale and LoRA stay
vLLM's own. `forward` must not be overridden, since the LoRA wrapper calls it unbound with itself as `self`.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from functools import partial

import torch
import vllm
from torch import Tensor, nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding

from rlalign.head import multiplied, projection
from rlalign.head.cache import HeadCache, MasterHead
from rlalign.head.multiplied import Multiplied
from rlalign.head.products import AS_STORED
from rlalign.head.routes import bits, kernel_name
from rlalign.rollout import SLOT, exact, versions
from rlalign.rollout.head.decode import decode_logits
from rlalign.rollout.head.head_settings import FIELDS_SPELLING, HeadMode, HeadSettings

log = init_logger("vllm.rlalign")  # under vLLM's name: only its own loggers are shown in workers
ApplyHead = Callable[["AlignedLogitsProcessor", VocabParallelEmbedding, Tensor, Tensor | None], Tensor]
# Speculative methods that propose tokens without a network of their own: nothing but the target's head makes logits.
DRAFTS_WITHOUT_HEAD = frozenset({"ngram", "ngram_gpu", "suffix"})
VLLMS_OWN = (HeadMode.OFF, HeadMode.NATIVE, HeadMode.EXACT)  # ways through vLLM's own `_apply_head`
CACHE = HeadCache()  # one per process: a worker has one target model
METHODS = ("forward", "_get_logits", "_apply_head", "_gather_logits", "get_top_tokens")


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
    hidden = torch.randn(multiplied.ROWS, weight.shape[1], generator=generator)
    hidden = hidden.to(weight.device, layer.body_dtype)
    calls, layer.watch.asked = layer.calls, False
    try:
        with torch.inference_mode():
            found = judged(layer, lm_head, hidden, None, layer._apply_head(lm_head, hidden, None))
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
    route = route_of(layer, lm_head)
    body = str(layer.body_dtype).removeprefix("torch.")
    dtype = body if layer.mode is HeadMode.OFF and layer.settings is not None else "float32"
    if layer.settings is None:
        return "rlalign: neither additional_config nor RLALIGN_HEAD asks for a head; it is vLLM's own"
    claim = f"; the checkpoint's head_dtype {layer.claimed} is not used" if layer.claimed not in (None, dtype) else ""
    of_ours = f", route {route['route']}, kernel {route['kernel'] or 'of the library'}" if route["route"] else ""
    return f"rlalign: head {dtype}, body {body}, mode {layer.mode.value}{of_ours}{claim}"


def _is_rounded(logits: Tensor) -> bool:
    finite = logits[torch.isfinite(logits)]
    return finite.numel() > 0 and bool((finite.to(torch.bfloat16).to(finite.dtype) == finite).all())


class AlignedLogitsProcessor(LogitsProcessor):
    """vLLM's LogitsProcessor with the projection that the trainer uses."""

    def __init__(
        self,
        vocab_size: int,
        org_vocab_size: int | None = None,
        scale: float = 1.0,
        logits_as_input: bool = False,
        soft_cap: float | None = None,
    ) -> None:
        super().__init__(vocab_size, org_vocab_size, scale, logits_as_input, soft_cap)
        config = get_current_vllm_config()  # only here: it is out of reach during forward
        self.settings = asked_of(config)
        self.body_dtype: torch.dtype = config.model_config.dtype
        # The checkpoint may have said head_dtype: an engine of ours has the trainer's head, which knows the body's dtype alone.
        own = self.head_dtype
        self.claimed = None if own in (None, self.body_dtype) else str(own).removeprefix("torch.")
        self.off_dtype = own if own is None or self.settings is None else self.body_dtype
        self.calls = 0
        self.seen_head: weakref.ref[VocabParallelEmbedding] | None = None
        self.master = MasterHead()
        self.watch = HeadWatch()
        self.set_mode(mode_of(config))

    def set_mode(self, mode: HeadMode) -> None:
        """Switch the head. Runs set it once; `rlalign parity` compares modes on one engine."""
        self.mode = mode
        self.watch.forget()
        self.head_dtype = torch.float32 if mode is HeadMode.NATIVE else self.off_dtype

    @watched
    def _apply_head(
        self, lm_head: VocabParallelEmbedding, hidden_states: torch.Tensor, embedding_bias: torch.Tensor | None
    ) -> torch.Tensor:
        self.calls += 1
        self.seen_head = weakref.ref(lm_head)
        if self.mode in VLLMS_OWN:
            return super()._apply_head(lm_head, hidden_states, embedding_bias)
        require_plain_weight(lm_head)
        weight = lm_head.weight
        if self.mode is HeadMode.MASTER:
            return projection.project(hidden_states, self.master.get(weight), embedding_bias)
        if reads_weight_directly(hidden_states, weight):
            return decode_logits(hidden_states, weight, embedding_bias)
        return projection.project(
            hidden_states, CACHE.get(weight), embedding_bias, weight_is_bf16_valued=weight.dtype == torch.bfloat16
        )


def reads_weight_directly(hidden_states: torch.Tensor, weight: torch.Tensor) -> bool:
    """True where the product takes the 16-bit weight as it is: no fp32 copy exists, so none can be stale."""
    return weight.dtype != torch.float16 and projection.route(hidden_states, weight) in AS_STORED


def require_plain_weight(lm_head: VocabParallelEmbedding, name: str = "lm_head") -> None:
    """Raise ValueError for a head whose weight is packed by a quantisation scheme: its fp32 copy would be noise."""
    if isinstance(lm_head.quant_method, UnquantizedEmbeddingMethod | UnquantizedLinearMethod):
        return
    raise ValueError(
        f"{name} is quantised by {type(lm_head.quant_method).__name__}: a float32 head needs its plain weight. "
        f"Exclude it in the quantisation config (ignore=['{name}'], or lm_head: false), "
        "or run with head_dtype=model on both sides."
    )


def asked_of(config: VllmConfig) -> HeadSettings | None:
    """What an engine asks of us, None for nothing. `fp32_lm_head` under prime-rl's worker extension means that one's own head.

    Raises ValueError for settings that are none, RuntimeError where both were asked.
    """
    extension = config.parallel_config.worker_extension_cls
    if not extension.startswith("prime_rl."):
        return HeadSettings.wanted(config.additional_config)
    own = {key: value for key, value in (config.additional_config or {}).items() if key != FIELDS_SPELLING}
    if HeadSettings.wanted(own) is None:
        return None
    raise RuntimeError(
        f"rlalign's head was asked for, and the worker extension {extension} writes prime-rl's own over vLLM's {SLOT}: only one of "
        'the two can make the logits. Leave prime-rl its own (unset RLALIGN_HEAD, no "rlalign" in additional_config) and align '
        "its trainer (rlalign.integrations.prime_rl)"
    )


def mode_of(config: VllmConfig) -> HeadMode:
    """What an engine of this configuration runs; OFF where it asks nothing of us.

    Raises ValueError for settings that are none or cannot be here, RuntimeError for a vLLM outside the tested range.
    """
    settings = asked_of(config)
    if settings is None:
        return HeadMode.OFF
    versions.require_supported(vllm.__version__)
    mode = settings.resolve(device=config.device_config.device_type)
    if mode is HeadMode.EXACT and not exact.enabled():
        raise ValueError(
            f'additional_config["rlalign"]: mode "exact" in an engine that is not built in exact mode ({exact.VARIABLE} is not '
            'set), so its head would be vLLM\'s own; start it with exact=true through rlalign, or with mode "auto"'
        )
    _require_no_draft_head(mode, config)
    return mode


def _require_no_draft_head(mode: HeadMode, config: VllmConfig) -> None:
    """Raise ValueError for a draft network under a head of ours: its logits may be replayed from a captured graph, in which
    no check for a changed weight runs (vLLM's V2 runner captures draft forward, logits and sampling as one graph)."""
    speculative = config.speculative_config
    if speculative is None or speculative.method in DRAFTS_WITHOUT_HEAD or mode in (HeadMode.OFF, HeadMode.NATIVE):
        return
    raise ValueError(
        f"speculative method {speculative.method!r} brings a draft network with a head of its own, which mode {mode.value!r} "
        "cannot keep fresh inside captured graphs; use ngram or suffix drafts, or rollout.head_mode=native"
    )


def route_of(layer: LogitsProcessor, lm_head: VocabParallelEmbedding) -> dict[str, object]:
    """{"route", "copies", "kernel", "bits"} of this layer for hidden states in the body's dtype, tried now."""
    if not isinstance(layer, AlignedLogitsProcessor) or layer.mode in VLLMS_OWN:
        return {"route": None, "copies": False, "kernel": None, "bits": None}
    weight = lm_head.weight
    body, size = weight.dtype, weight.shape[1]
    wide = torch.float32 if layer.mode is HeadMode.MASTER else body
    hidden, operand = weight.new_empty(1, size), weight.new_empty(1, size, dtype=wide)
    copies = wide != torch.float32 and not reads_weight_directly(hidden, operand)
    bf16_valued = copies and body == torch.bfloat16
    if copies:
        operand = operand.float()
    route = projection.route(hidden, operand, weight_is_bf16_valued=bf16_valued)
    product = partial(projection.project, weight_is_bf16_valued=bf16_valued) if copies else decode_logits
    return {
        "route": route.value,
        "copies": copies,
        "kernel": kernel_name(route, hidden, operand),
        "bits": bits(product, size, body, operand.dtype, weight.device),
    }


def require_no_rival() -> None:
    """Raise RuntimeError naming who else makes logits in this process: a plugin in the slot, or functions over vLLM's methods."""
    nothing = "ask rlalign for nothing (unset RLALIGN_HEAD; no additional_config)"
    holder = op_registry_oot.get(SLOT)
    if holder is not None and not _is_of(("rlalign",), holder):
        raise RuntimeError(
            f"rlalign's head was asked for, and another plugin holds vLLM's {SLOT} slot: "
            f"{holder.__module__}.{holder.__qualname__}. Only one of the two can make the logits: leave that plugin out of "
            f"VLLM_PLUGINS, or {nothing}"
        )
    methods = {name: function for name in METHODS if (function := vars(LogitsProcessor).get(name)) is not None}
    foreign = [f"{n} (now of {f.__module__})" for n, f in methods.items() if not _is_of(("vllm", "rlalign"), f)]
    if foreign:
        raise RuntimeError(
            f"rlalign's head was asked for, and something has written over vLLM's {SLOT}: {', '.join(foreign)}. Its logits "
            f"would be neither's: switch that patch off (a plugin's: leave it out of VLLM_PLUGINS; prime-rl's comes with its "
            f"worker extension), or {nothing}"
        )


def _is_of(packages: tuple[str, ...], found: type | Callable) -> bool:
    return found.__module__.split(".")[0] in packages
