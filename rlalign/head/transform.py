"""HeadTransform: everything a model does between its last hidden states and its logits, besides the lm_head itself.

One reader for both sides, the scorers and the diagnosis. What it reads is checked against the model's own forward wherever a model
is loaded (`rlalign.trainer.logit_check`): a field that it does not know is an error there, not a factor in every logprob.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["HeadTransform"]

# Logits are multiplied by these; absent, None and 0 mean nothing.
FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
# One name, two meanings: Granite divides by it, HyperCLOVA X multiplies.
MULTIPLIED_BY_LOGITS_SCALING = ("hyperclovax",)
# The hidden state is divided, in its own dtype, before the lm_head.
HIDDEN_DIVISORS: dict[str, Callable[[Mapping[str, object]], float]] = {
    "minicpm": lambda config: config["hidden_size"] / config["dim_model_base"],
    "minicpm3": lambda config: config["hidden_size"] / config["dim_model_base"],
}


class ModelConfig(Protocol):
    """A transformers configuration."""

    def get_text_config(self) -> ModelConfig: ...

    def to_dict(self) -> dict[str, object]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadTransform:
    """A divisor of the hidden states (MiniCPM); of the logits a factor (Cohere, Falcon-H1), a divisor (Granite), a cap (Gemma).

    1/d is rounded, and a product with it has other bits than a division by d: the two ways below are the two libraries'.
    """

    hidden_divisor: float = 1.0
    factor: float = 1.0
    divisor: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, config: ModelConfig | Mapping[str, object]) -> HeadTransform:
        """From a transformers configuration, multimodal ones included, or from its text part as a mapping."""
        fields = config if isinstance(config, Mapping) else config.get_text_config().to_dict()
        kind = str(fields.get("model_type") or "")
        factor, scaling = 1.0, float(fields.get("logits_scaling") or 1.0)
        for name in FACTORS:
            factor *= float(fields.get(name) or 1.0)
        multiplied = kind.startswith(MULTIPLIED_BY_LOGITS_SCALING)
        return cls(
            hidden_divisor=HIDDEN_DIVISORS[kind](fields) if kind in HIDDEN_DIVISORS else 1.0,
            factor=factor * scaling if multiplied else factor,
            divisor=1.0 if multiplied else scaling,
            cap=fields.get("final_logit_softcapping") or None,
        )

    @property
    def logit_scale(self) -> float:
        """The one factor that logits are multiplied by, after `soft_cap`."""
        return self.factor / self.divisor

    @property
    def soft_cap(self) -> float | None:
        """The cap on logits that are not scaled yet: cap(s x) is s times this cap of x."""
        return None if self.cap is None else self.cap / self.logit_scale

    def hidden(self, hidden: Tensor) -> Tensor:
        """What the lm_head is given for these last hidden states, in their dtype."""
        return hidden if self.hidden_divisor == 1.0 else hidden / self.hidden_divisor

    def apply(self, logits: Tensor) -> Tensor:
        """As vLLM does it, in the dtype of the logits: the cap, then one product."""
        capped = _capped(logits, self.soft_cap)
        return capped if self.logit_scale == 1.0 else capped * self.logit_scale

    def apply_as_transformers(self, logits: Tensor) -> Tensor:
        """As transformers does it: the factor, the division, then the cap."""
        return _capped(logits * self.factor / self.divisor, self.cap)


def _capped(logits: Tensor, cap: float | None) -> Tensor:
    return logits if cap is None else (logits / cap).tanh() * cap
