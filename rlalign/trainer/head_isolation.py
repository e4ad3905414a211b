"""The head alone: the same hidden states through both sides' heads, and through float64.

On a small model the rounding of a bf16 body hides the head's own error; here the body cannot contribute.
Suffixes: N tokens, D hidden, V vocabulary, B L of one row per decode batch size.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlalign import mismatch
from rlalign.head.transform import HeadTransform
from rlalign.trainer.head_mirror import Tokens

KEPT = ("k1", "k3", "abs_mean", "p99", "abs_max", "pearson_prob")
# Rows decoded at once: a rollout's last sequences decode alone, and GEMM kernels change between these sizes.
DECODE_BATCHES = (1, 4, 16)


class HeadOwner(Protocol):
    """A rollout engine that can be asked to project given hidden states."""

    def head_logits(self, hidden_file: Path, *, batch: int) -> Path: ...


def measure(
    engine: HeadOwner,
    network: nn.Module,
    hidden_ND: Tensor,
    token_ids_N: Tensor,
    *,
    temperature: float,
    shared: Path,
    master_VD: Tensor | None = None,
) -> dict[str, float]:
    """Mismatch of the two heads over N tokens at decode batches of 1, 4 and 16, in nats.

    hidden_ND: what predicts token_ids_N, as `predicting` gives it; network: the mirrored transformers model; master_VD: the
    unrounded head where both sides project with it.
    Keys: k1 k3 abs_mean p99 abs_max pearson_prob between the two sides; rollout_error and trainer_error: each side's mean
    distance from the float64 head, which equal kernels on both sides cannot hide; bf16_error: that of a head whose logits are
    rounded to bf16 once, the scale that tells a float32 head from one that is not.
    """
    trainer_N = _trainer_logprobs(network.get_output_embeddings(), hidden_ND, token_ids_N, temperature)
    logits = (engine_logits(engine, hidden_ND, shared, batch=batch) for batch in DECODE_BATCHES)
    rollout_BL = torch.stack(
        [_chosen((x / temperature).log_softmax(-1, dtype=torch.float32), token_ids_N) for x in logits]
    )
    trainer_BL = trainer_N.expand_as(rollout_BL)
    measured = mismatch.compare(trainer_BL, rollout_BL, torch.ones_like(rollout_BL, dtype=torch.bool), positions=False)
    exact_N, rounded_N = _float64_logprobs(network, hidden_ND, token_ids_N, temperature, master_VD)
    return {name: measured[name] for name in KEPT} | {
        "bf16_error": float((rounded_N - exact_N).abs().mean()),
        "rollout_error": float((rollout_BL - exact_N).abs().mean()),
        "trainer_error": float((trainer_N - exact_N).abs().mean()),
    }


def predicting(hidden_BLD: Tensor, token_ids_BL: Tensor, loss_mask_BL: Tensor, *, limit: int) -> tuple[Tensor, Tensor]:
    """The first `limit` sampled tokens and the hidden state before each: (hidden_ND, token_ids_N)."""
    rows, positions = loss_mask_BL.nonzero(as_tuple=True)
    rows, positions = rows[:limit], positions[:limit]
    return hidden_BLD[rows, positions - 1], token_ids_BL[rows, positions]


def _trainer_logprobs(lm_head: nn.Module, hidden_ND: Tensor, token_ids_N: Tensor, temperature: float) -> Tensor:
    # The head's own alignment: entry t is about token t and comes from the hidden state before it.
    hidden = torch.cat([hidden_ND, hidden_ND[-1:]])[None]
    tokens = torch.cat([token_ids_N[:1], token_ids_N])[None].to(hidden.device)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[:, 0] = False
    with torch.no_grad():
        logprobs_BL, _ = lm_head.forward(hidden, Tokens(tokens, mask, temperature), exact=True)  # see Policy.whole_head
    return logprobs_BL[0, 1:].cpu()


def engine_logits(engine: HeadOwner, hidden_ND: Tensor, shared: Path, *, batch: int = 16) -> Tensor:
    """[N, V] float32: these hidden states through the engine's own head, cap and scale included."""
    with tempfile.TemporaryDirectory(prefix="rlalign-head-", dir=shared) as folder:
        file = Path(folder) / "hidden.safetensors"
        save_file({"hidden_ND": hidden_ND.detach().cpu().contiguous()}, file)
        return load_file(engine.head_logits(file, batch=batch))["logits_NV"]


def _float64_logprobs(
    network: nn.Module, hidden_ND: Tensor, token_ids_N: Tensor, temperature: float, master_VD: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Of the tokens, exactly and with the logits rounded to bf16."""
    lm_head = network.get_output_embeddings()
    weight_VD = lm_head.weight if master_VD is None else master_VD
    transform = HeadTransform.of(network.config)
    logits_NV = transform.hidden(hidden_ND.detach().cpu()).double() @ weight_VD.detach().cpu().double().t()
    if lm_head.bias is not None:
        logits_NV += lm_head.bias.detach().cpu().double()
    logits_NV = transform.apply(logits_NV)
    rounded_NV = logits_NV.bfloat16().double()
    return tuple(_chosen((x / temperature).log_softmax(-1), token_ids_N) for x in (logits_NV, rounded_NV))


def _chosen(logprobs_NV: Tensor, token_ids_N: Tensor) -> Tensor:
    return logprobs_NV.gather(1, token_ids_N.cpu()[:, None])[:, 0]
