"""prime-rl's trainer with the product of its own float32 head in vLLM: without it the two heads are one-sided.

    torchrun ... -m rlalign.integrations.prime_rl ...     # in the place of -m prime_rl.trainer.rl.train, same arguments

docs/stacks.md says what changes.
"""

from __future__ import annotations

import runpy
import sys
from importlib.metadata import version
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rlalign.head.projection import project
from rlalign.integrations import require_tested
from rlalign.logprobs import token_logprobs

if TYPE_CHECKING:
    from prime_rl.trainer.models.layers.lm_head import PrimeLmOutput

__all__ = ["main", "switch_on"]

TESTED = ("0.8",)
ALLOW_UNTESTED = "RLALIGN_ALLOW_UNTESTED_PRIME_RL"
TRAINER = "prime_rl.trainer.rl.train"


def main() -> None:
    """Run prime-rl's RL trainer with the aligned heads in the place of its own."""
    switch_on()
    sys.argv[0] = TRAINER
    runpy.run_module(TRAINER, run_name="__main__")


def switch_on() -> None:
    """Let prime-rl's four lm_head classes project in float32: hidden @ weight.T accumulated and kept so, logprobs from that.

    Their own products round logits to the weight's dtype, while prime-rl's vLLM keeps float32 ones. Raises RuntimeError for an
    untested prime-rl, unless RLALIGN_ALLOW_UNTESTED_PRIME_RL=1.
    """
    does = "replaces the forward of its FusedOutputLinear, VanillaOutputLinear and their Gemma forms"
    require_tested("prime-rl", version("prime-rl"), TESTED, allow=ALLOW_UNTESTED, does=does, own="trainer")
    from prime_rl.trainer.models.layers import lm_head, lm_head_gemma

    for kind in (lm_head.FusedOutputLinear, lm_head_gemma.GemmaFusedOutputLinear):
        kind.forward = _scored
    for kind in (lm_head.VanillaOutputLinear, lm_head_gemma.GemmaVanillaOutputLinear):
        kind.forward = _logits


def _scored(
    self: nn.Linear, hidden_states: Tensor, labels: Tensor | None = None, temperature: Tensor | None = None
) -> PrimeLmOutput:
    """logprobs and entropy, both [B, L] float32 in nats; entry t is about labels[:, t], the token after position t."""
    if labels is None or temperature is None:
        raise ValueError(
            f"{type(self).__name__} needs labels and temperature, both [B, L]; without them set "
            'model.fused_lm_head_token_chunk_size="disabled", which gives logits'
        )
    # token_logprobs speaks of the token at t and the state before it: one position more, whose state nobody asks
    logprobs, entropy = token_logprobs(
        nn.functional.pad(hidden_states, (0, 0, 0, 1)), self.weight, nn.functional.pad(labels, (1, 0)), entropy=True,
        temperature=nn.functional.pad(temperature.float(), (1, 0), value=1.0), soft_cap=getattr(self, "softcap", None),
    )  # fmt: skip
    return {"logprobs": logprobs[:, 1:], "entropy": entropy[:, 1:].detach()}


def _logits(
    self: nn.Linear, hidden_states: Tensor, labels: Tensor | None = None, temperature: Tensor | None = None
) -> PrimeLmOutput:
    """float32 logits [B, L, V]; the trainer divides by the temperature."""
    logits = project(hidden_states, self.weight)
    cap = getattr(self, "softcap", None)
    return {"logits": logits if cap is None else cap * torch.tanh(logits / cap)}


if __name__ == "__main__":
    main()
