"""The layer that replaces vLLM's LogitsProcessor: same head, float32 logits, proof of what it did.

Only `_apply_head` is overridden (signature stable from vLLM 0.26 to 0.32): gathering, padding, soft cap, scale and LoRA stay
vLLM's own. `forward` must not be overridden, since the LoRA wrapper calls it unbound with itself as `self`.
"""

from __future__ import annotations

import enum
import weakref
from dataclasses import dataclass

import torch
import vllm
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding
from vllm.platforms import current_platform

from rlalign import head
from rlalign.head_cache import HeadCache, MasterHead
from rlalign.products import AS_STORED
from rlalign.rollout import versions
from rlalign.rollout.decode_head import decode_logits
from rlalign.rollout.head_plugin import SETTINGS_KEY

# Speculative methods that propose tokens without a network of their own: nothing but the target's head makes logits.
DRAFTS_WITHOUT_HEAD = frozenset({"ngram", "ngram_gpu", "suffix"})


class HeadMode(enum.Enum):
    """How the rollout side reaches float32 logits."""

    OFF = "off"  # vLLM's own head in the model's dtype
    NATIVE = "native"  # vLLM's own float32 head: mm(out_dtype=float32) on CUDA, nothing to go stale
    CACHED = "cached"  # our product: straight from the weight where the host can, else from an fp32 copy of it
    MASTER = "master"  # the trainer's unrounded fp32 weight, published beside the 16-bit one
    EXACT = "exact"  # float32 from the lm_head's own blocked products, in an engine of exact mode


@dataclass(frozen=True, slots=True)
class HeadSettings:
    """What the driver asked of this engine, from vLLM's additional_config."""

    head_dtype: str
    mode: str

    @classmethod
    def read(cls) -> HeadSettings | None:
        """None when this engine was not started by rlalign."""
        given = get_current_vllm_config().additional_config.get(SETTINGS_KEY)
        return None if given is None else cls(head_dtype=given["head_dtype"], mode=given["mode"])

    def resolve(self) -> HeadMode:
        """The mode for this platform and version. Raises ValueError for names that do not exist."""
        if self.head_dtype == "model":
            return HeadMode.OFF
        if self.head_dtype == "master":
            return HeadMode.MASTER
        if self.head_dtype != "float32":
            raise ValueError(f'head_dtype must be "float32", "master" or "model", got {self.head_dtype!r}')
        if self.mode != "auto":
            return HeadMode(self.mode)
        on_gpu = current_platform.is_cuda() or current_platform.is_rocm()
        return HeadMode.NATIVE if on_gpu and versions.has_native_head(vllm.__version__) else HeadMode.CACHED


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
        settings = HeadSettings.read()  # only here: the current config is out of reach during forward
        mode = HeadMode.OFF if settings is None else settings.resolve()
        if settings is not None:
            versions.require_supported(vllm.__version__)
            _require_no_draft_head(mode)
        # Before 0.26 there is no head_dtype and vLLM's head always works in the model's dtype.
        self.model_dtype = self.head_dtype if versions.has_native_head(vllm.__version__) else None
        self.calls = 0
        self.seen_head: weakref.ref[VocabParallelEmbedding] | None = None
        self.master = MasterHead()
        self.set_mode(mode)

    def set_mode(self, mode: HeadMode) -> None:
        """Switch the head. Runs set it once; `rlalign parity` compares modes on one engine. Raises ValueError for native
        where this vLLM has no float32 head of its own."""
        if mode is HeadMode.NATIVE and not versions.has_native_head(vllm.__version__):
            raise ValueError(f"vLLM {vllm.__version__} has no float32 head of its own (0.26 on); use head_mode=cached")
        self.mode = mode
        self.head_dtype = torch.float32 if mode is HeadMode.NATIVE else self.model_dtype

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


def _require_no_draft_head(mode: HeadMode) -> None:
    """Raise ValueError for a draft network under a head of ours: its logits may be replayed from a captured graph, in which
    no check for a changed weight runs (vLLM's V2 runner captures draft forward, logits and sampling as one graph)."""
    speculative = get_current_vllm_config().speculative_config
    if speculative is None or speculative.method in DRAFTS_WITHOUT_HEAD or mode in (HeadMode.OFF, HeadMode.NATIVE):
        return
    raise ValueError(
        f"speculative method {speculative.method!r} brings a draft network with a head of its own, which mode {mode.value!r} "
        "cannot keep fresh inside captured graphs; use ngram or suffix drafts, or rollout.head_mode=native"
    )
