"""One forward pass over rows, and the projections behind it.

B rows, L tokens, N states, D hidden, K labels, V vocabulary, X = D where backbone and head are apart, else K.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from rlalign.head import projection
from rlalign.head.transform import HeadTransform
from rlalign.scoring.hf.item_packing import Row, row_batch

if TYPE_CHECKING:
    from torch import Tensor

    from rlalign.scoring.hf.model_loading import LoadedModel


def outputs(loaded: LoadedModel, rows: Sequence[Row]) -> Tensor:
    """[B, L, D] last hidden states of rows (padding included); of a model that is run whole its logits, [B, K] or [B, L, K].

    Rows of one item take the model's own positions and mask, as transformers would run them; others the block mask.
    """
    pad_token_id = loaded.config.pad_token_id
    batch = row_batch(rows, pad_token_id=pad_token_id if pad_token_id is not None else 0, device=loaded.device)
    inputs: dict[str, Tensor | bool] = {"input_ids": batch.token_ids_BL}
    if any(len(row.items) > 1 for row in rows):
        flex = loaded.config._attn_implementation == "flex_attention"
        inputs["attention_mask"] = batch.flex_mask() if flex else batch.block_mask_B1LL()
        inputs["position_ids"] = batch.position_ids_BL
    else:
        inputs["attention_mask"] = batch.attention_mask_BL.long()
    if loaded.head is not None:
        inputs["use_cache"] = False
    if batch.type_ids_BL is not None:
        inputs["token_type_ids"] = batch.type_ids_BL
    with torch.inference_mode():
        found = loaded.backbone(**inputs)
    return found.logits if loaded.head is None and loaded.task != "embed" else found.last_hidden_state


def score_logits(loaded: LoadedModel, states_ND: Tensor) -> Tensor:
    """float32 logits [N, K] of a score head, whatever the dtype of the body."""
    with torch.inference_mode():
        return loaded.head(states_ND.float())


def vocabulary_logits(loaded: LoadedModel, states_ND: Tensor) -> Tensor:
    """float32 logits [N, V] of a causal LM, with the cap or scale that its config states."""
    transform = HeadTransform.of(loaded.config)
    with torch.inference_mode():
        logits_NV = projection.project(transform.hidden(states_ND), loaded.head.weight, loaded.head.bias)
    return transform.apply_as_transformers(logits_NV)


def label_logprobs(loaded: LoadedModel, states_ND: Tensor, label_ids: Sequence[Sequence[int]]) -> list[Tensor]:
    """Log-probabilities (nats, over the whole vocabulary) of each state's own label tokens."""
    logits_NV = vocabulary_logits(loaded, states_ND)
    norm_N = logits_NV.logsumexp(-1)
    return [logits_NV[n, list(ids)] - norm_N[n] for n, ids in enumerate(label_ids)]


def token_columns(loaded: LoadedModel, states_ND: Tensor, token_ids: Sequence[int]) -> Tensor:
    """float32 logits [N, K] of some tokens only: what a step-pooling causal LM scores with."""
    chosen = torch.tensor(list(token_ids), device=states_ND.device)
    with torch.inference_mode():
        return vocabulary_logits(loaded, states_ND)[:, chosen]
