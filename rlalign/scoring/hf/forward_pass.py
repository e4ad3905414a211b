"""One forward pass over rows, the projections behind it, and each item's answer taken from its row.

B rows, L tokens, N states, D hidden, K labels, V vocabulary, X = D where backbone and head are apart, else K.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from rlalign.head import projection
from rlalign.head.transform import HeadTransform
from rlalign.scoring.hf.item_packing import Row, row_batch

if TYPE_CHECKING:
    from torch import Tensor

    from rlalign.scoring.hf.model_loading import LoadedModel
    from rlalign.scoring.params import ModelInfo, ScoringParams


def outputs(loaded: LoadedModel, rows: Sequence[Row]) -> Tensor:
    """[B, L, D] last hidden states of rows (padding included); of a model that is run whole its logits, [B, K] or [B, L, K].

    Rows of one item take the model's own positions and mask, as transformers would run them; others the block mask.
    """
    pad_token_id = loaded.config.pad_token_id
    batch = row_batch(rows, pad_token_id=pad_token_id if pad_token_id is not None else 0, device=loaded.device)
    inputs: dict[str, Any] = {"input_ids": batch.token_ids_BL}
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
        return loaded.scored(states_ND.float())


def vocabulary_logits(loaded: LoadedModel, states_ND: Tensor) -> Tensor:
    """float32 logits [N, V] of a causal LM, with the cap or scale that its config states."""
    transform = HeadTransform.of(loaded.config)
    with torch.inference_mode():
        weight_VD, bias_V = cast("Tensor", loaded.scored.weight), cast("Tensor | None", loaded.scored.bias)
        logits_NV = projection.project(transform.hidden(states_ND), weight_VD, bias_V)
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """values: float32 logits, label log-probabilities or states, on the CPU; state: what the head saw, if asked for."""

    values: Tensor
    state: Tensor | None = None


def read_row(
    loaded: LoadedModel,
    info: ModelInfo,
    params: ScoringParams,
    row: Row,
    output: Tensor,
    label_ids: Sequence[Sequence[int]],
) -> list[Reading]:
    """One reading an item of the row. output: [L, X] as `forward.outputs` gave it, or [K]. label_ids: of these items."""
    if params.task == "classify":
        return _classified(loaded, params, row, output)
    if params.task == "generative":
        last_ND = output[[end - 1 for _, end in row.spans]]
        return [Reading(values=found.float().cpu()) for found in label_logprobs(loaded, last_ND, label_ids)]
    readings = []
    for item, (start, end) in zip(row.items, row.spans, strict=True):
        whole_TX = torch.cat([output[: len(row.query)], output[start:end]])
        if params.task == "token_classify":
            whole_TX = _steps(loaded, params, [*row.query, *item], whole_TX)
        elif params.task == "embed":
            whole_TX = _pooled(whole_TX, info.pooler.pooling)
        readings.append(Reading(values=whole_TX.float().cpu()))
    return readings


def _classified(loaded: LoadedModel, params: ScoringParams, row: Row, output: Tensor) -> list[Reading]:
    if loaded.head is None:
        return [Reading(values=output.float().cpu())]
    last_ND = output[[end - 1 for _, end in row.spans]]
    logits_NK = score_logits(loaded, last_ND).cpu()
    states = last_ND.float().cpu() if params.return_pooled_hidden_states else [None] * len(logits_NK)
    return [
        Reading(values=logits_K, state=None if state is None else state.clone())
        for logits_K, state in zip(logits_NK, states, strict=True)
    ]


def _steps(loaded: LoadedModel, params: ScoringParams, token_ids: list[int], output_TX: Tensor) -> Tensor:
    """Logits of every token, or of the step-ending tokens only, all columns or the returned ones."""
    if params.step_tag_id is not None:
        output_TX = output_TX[[t for t, token in enumerate(token_ids) if token == params.step_tag_id]]
    columns = params.returned_token_ids
    if loaded.task == "generative":
        return token_columns(loaded, output_TX, columns or ())
    logits_TK = output_TX.float() if loaded.head is None else score_logits(loaded, output_TX)
    return logits_TK if columns is None else logits_TK[:, columns]


def _pooled(states_TD: Tensor, pooling: str | None) -> Tensor:
    if pooling == "MEAN":
        return states_TD.float().mean(0)
    return states_TD[0 if pooling == "CLS" else -1]
