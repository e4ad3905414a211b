"""Each item's answer, taken from the rows of a forward pass.

L tokens of a row, T tokens of an item's sequence or its steps, D hidden, K labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rlalign.scoring.hf.forward_pass import label_logprobs, score_logits, token_columns

if TYPE_CHECKING:
    from torch import Tensor

    from rlalign.scoring.hf.item_packing import Row
    from rlalign.scoring.hf.model_loading import LoadedModel
    from rlalign.scoring.params import ModelInfo, ScoringParams


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
        return token_columns(loaded, output_TX, columns)
    logits_TK = output_TX.float() if loaded.head is None else score_logits(loaded, output_TX)
    return logits_TK if columns is None else logits_TK[:, columns]


def _pooled(states_TD: Tensor, pooling: str | None) -> Tensor:
    if pooling == "MEAN":
        return states_TD.float().mean(0)
    return states_TD[0 if pooling == "CLS" else -1]
