"""The layer that replaces vLLM's LogitsProcessor: same head, float32 logits, proof of what it did.

Only `_apply_head` is overridden (signature stable from vLLM 0.26 to 0.32): gathering, padding, soft cap, scale and LoRA stay
vLLM's own. `forward` must not be overridden, since the LoRA wrapper calls it unbound with itself as `self`.
"""

from __future__ import annotations

import weakref

import torch
import vllm
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding

from rlalign import head
from rlalign.head_cache import HeadCache, MasterHead
from rlalign.products import AS_STORED
from rlalign.rollout import exact, versions
from rlalign.rollout.decode_head import decode_logits
from rlalign.rollout.head_settings import HeadMode, HeadSettings
from rlalign.rollout.head_watch import HeadWatch, watched

# Speculative methods that propose tokens without a network of their own: nothing but the target's head makes logits.
DRAFTS_WITHOUT_HEAD = frozenset({"ngram", "ngram_gpu", "suffix"})


VLLMS_OWN = (HeadMode.OFF, HeadMode.NATIVE, HeadMode.EXACT)  # ways through vLLM's own `_apply_head`
CACHE = HeadCache()  # one per process: a worker has one target model


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
        self.settings = HeadSettings.of_engine(config.additional_config)
        self.body_dtype: torch.dtype = config.model_config.dtype
        # Before 0.26 there is no head_dtype and vLLM's head always works in the body's dtype. What it is from then on the
        # checkpoint may have said: an engine of ours has the trainer's head instead, and that knows the body's dtype alone.
        own = self.head_dtype if versions.has_native_head(vllm.__version__) else None
        self.claimed = None if own in (None, self.body_dtype) else str(own).removeprefix("torch.")
        self.off_dtype = own if own is None or self.settings is None else self.body_dtype
        self.calls = 0
        self.seen_head: weakref.ref[VocabParallelEmbedding] | None = None
        self.master = MasterHead()
        self.watch = HeadWatch()
        self.set_mode(mode_of(config))

    def set_mode(self, mode: HeadMode) -> None:
        """Switch the head. Runs set it once; `rlalign parity` compares modes on one engine. Raises ValueError for native
        where this vLLM has no float32 head of its own."""
        if mode is HeadMode.NATIVE and not versions.has_native_head(vllm.__version__):
            raise ValueError(f"vLLM {vllm.__version__} has no float32 head of its own (0.26 on); use head_mode=cached")
        self.mode = mode
        self.watch.forget()
        self.head_dtype = torch.float32 if mode is HeadMode.NATIVE else self.off_dtype

    def product(self, lm_head: VocabParallelEmbedding, hidden_ND: torch.Tensor) -> torch.Tensor:
        """This rank's logits of hidden states, as the model would have them from this layer, without a bias."""
        return self._apply_head(lm_head, hidden_ND, None)

    def hidden_size(self, lm_head: VocabParallelEmbedding) -> int:
        """Columns of this head's weight."""
        return int(lm_head.weight.shape[1])

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
            return head.project(hidden_states, self.master.get(weight), embedding_bias)
        if reads_weight_directly(hidden_states, weight):
            return decode_logits(hidden_states, weight, embedding_bias)
        return head.project(
            hidden_states, CACHE.get(weight), embedding_bias, weight_is_bf16_valued=weight.dtype == torch.bfloat16
        )


def reads_weight_directly(hidden_states: torch.Tensor, weight: torch.Tensor) -> bool:
    """True where the product takes the 16-bit weight as it is: no fp32 copy exists, so none can be stale."""
    return weight.dtype != torch.float16 and head.route(hidden_states, weight) in AS_STORED


def require_plain_weight(lm_head: VocabParallelEmbedding, name: str = "lm_head") -> None:
    """Raise ValueError for a head whose weight is packed by a quantisation scheme: its fp32 copy would be noise."""
    if isinstance(lm_head.quant_method, UnquantizedEmbeddingMethod | UnquantizedLinearMethod):
        return
    raise ValueError(
        f"{name} is quantised by {type(lm_head.quant_method).__name__}: a float32 head needs its plain weight. "
        f"Exclude it in the quantisation config (ignore=['{name}'], or lm_head: false), "
        "or run with head_dtype=model on both sides."
    )


def mode_of(config: VllmConfig) -> HeadMode:
    """What an engine of this configuration runs; OFF where it asks nothing of us.

    Raises ValueError for settings that are none or cannot be here, RuntimeError for a vLLM outside the tested range.
    """
    settings = HeadSettings.of_engine(config.additional_config)
    if settings is None:
        return HeadMode.OFF
    versions.require_supported(vllm.__version__)
    mode = settings.resolve(device=config.device_config.device_type, vllm=vllm.__version__)
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
