"""Rows of tokens, one forward pass over them, the projections behind it, and each item's answer taken from its row.

Multi-item packing: one query and many items in one row, each item as if it stood alone behind the query.

    row       query  item 0     item 1
    position  0 1 2  3 4 5 6    3 4          every item continues where the query ends
    segment   0 0 0  1 1 1 1    2 2          -1 is padding

A token sees the query before it and the earlier tokens of its own segment, nothing else. Everything follows from lengths: no
delimiter token is inserted, and none is searched for. Rotary positions make it exact: see `describe.packing_refusal`.
B rows, L padded length, N states, D hidden, K labels, V vocabulary, X = D where backbone and head are apart, else K.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from rlalign.head import projection
from rlalign.head.transform import HeadTransform
from rlalign.scoring.result import Answer

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn.attention.flex_attention import BlockMask

    from rlalign.scoring.hf.model_loading import LoadedModel
    from rlalign.scoring.params import ModelInfo, ScoringParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A query's token ids, and those of the items behind it (each with at least one). One item: an ordinary sequence.

    type_ids: token types (segments) of an encoder's pair, None elsewhere.
    """

    query: Sequence[int]
    items: Sequence[Sequence[int]]
    type_ids: Sequence[int] | None = None

    @property
    def length(self) -> int:
        """Tokens of the row."""
        return len(self.query) + sum(map(len, self.items))

    @property
    def spans(self) -> list[tuple[int, int]]:
        """(start, end) of each item in the row, end exclusive."""
        spans, start = [], len(self.query)
        for item in self.items:
            spans.append((start, start + len(item)))
            start += len(item)
        return spans


@dataclass(frozen=True, slots=True, kw_only=True)
class RowBatch:
    """Rows, padded on the right; int64 tensors. segment_BL: 0 query, i + 1 item i, -1 padding. type_ids_BL: encoders only."""

    token_ids_BL: Tensor
    position_ids_BL: Tensor
    segment_BL: Tensor
    type_ids_BL: Tensor | None = None

    @property
    def attention_mask_BL(self) -> Tensor:
        """True on tokens: all that rows of one item need."""
        return self.segment_BL >= 0

    def block_mask_B1LL(self) -> Tensor:
        """[B, 1, L, L] bool, True where row position q may see position k; padding sees padding, so no row is empty."""
        query_BL1, key_B1L = self.segment_BL[:, :, None], self.segment_BL[:, None, :]
        length = self.segment_BL.shape[1]
        causal_LL = torch.ones(length, length, dtype=torch.bool, device=self.segment_BL.device).tril_()
        return (causal_LL & ((key_B1L == 0) | (key_B1L == query_BL1)))[:, None]

    def flex_mask(self) -> BlockMask:
        """The same as a FlexAttention BlockMask, which skips the blocks between items instead of computing and hiding them."""
        from torch.nn.attention.flex_attention import create_block_mask

        segment_BL = self.segment_BL

        def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (k <= q) & ((segment_BL[b, k] == 0) | (segment_BL[b, k] == segment_BL[b, q]))

        rows, length = segment_BL.shape
        return create_block_mask(visible, rows, None, length, length, device=str(segment_BL.device))


def row_batch(rows: Sequence[Row], *, pad_token_id: int, device: torch.device) -> RowBatch:
    """Lay rows out for one forward pass. Raises ValueError on no rows, no items or an empty item."""
    if not rows or any(not row.items or not all(map(len, row.items)) for row in rows):
        raise ValueError("packing: every row needs at least one item, and every item at least one token")
    length = max(row.length for row in rows)
    token_ids = torch.full((len(rows), length), pad_token_id, dtype=torch.int64)
    position_ids = torch.zeros(len(rows), length, dtype=torch.int64)
    segment = torch.full((len(rows), length), -1, dtype=torch.int64)
    types = None if any(row.type_ids is None for row in rows) else torch.zeros(len(rows), length, dtype=torch.int64)
    for b, row in enumerate(rows):
        n = len(row.query)
        token_ids[b, : row.length] = torch.tensor([*row.query, *(t for item in row.items for t in item)])
        position_ids[b, :n] = torch.arange(n)
        segment[b, :n] = 0
        for i, (start, end) in enumerate(row.spans):
            position_ids[b, start:end] = torch.arange(n, n + end - start)
            segment[b, start:end] = i + 1
        if types is not None:
            types[b, : row.length] = torch.tensor(row.type_ids)
    return RowBatch(
        token_ids_BL=token_ids.to(device),
        position_ids_BL=position_ids.to(device),
        segment_BL=segment.to(device),
        type_ids_BL=None if types is None else types.to(device),
    )


def split_by_budget(query_length: int, item_lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of the items of each row, in order, so that a row (query included) holds at most `budget` tokens.

    An item that does not fit even alone gets a row of its own. Raises ValueError on a budget below 1 or an empty item.
    """
    if budget < 1:
        raise ValueError(f"packing: the budget must be at least 1 token, got {budget}")
    groups: list[list[int]] = []
    used = 0
    for i, length in enumerate(item_lengths):
        if length < 1:
            raise ValueError(f"packing: item {i} is empty")
        if not groups or used + length > budget:
            groups.append([])
            used = query_length
        groups[-1].append(i)
        used += length
    return groups


def worthwhile_groups(
    query_length: int, item_lengths: Sequence[int], *, budget: int, balance: float
) -> list[list[int]]:
    """As `split_by_budget`, with rows no longer than pays off: a dense mask computes every pair of a row's tokens, seen or not.

    balance: the row length at which attention over all pairs costs as much as the layers' matrix products, in tokens. A row of
    L tokens costs L (balance + L) and serves (L - query) tokens of items, which is cheapest at query + sqrt(query^2 +
    query * balance). Groups that would still be dearer than their items alone, L (balance + L / 2) each, are taken apart.
    """
    best = query_length + math.sqrt(query_length**2 + query_length * balance)
    groups = []
    for group in split_by_budget(query_length, item_lengths, min(budget, max(1, int(best)))):
        row = query_length + sum(item_lengths[i] for i in group)
        alone = [query_length + item_lengths[i] for i in group]
        saves = row * (balance + row) < sum(length * (balance + length / 2) for length in alone)
        groups += [group] if saves else [[i] for i in group]
    return groups


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


def read_row(
    loaded: LoadedModel,
    info: ModelInfo,
    params: ScoringParams,
    row: Row,
    output: Tensor,
    label_ids: Sequence[Sequence[int]],
) -> list[Answer]:
    """One answer an item of the row. output: [L, X] as `outputs` gave it, or [K]. label_ids: of these items."""
    if params.task == "classify":
        return _classified(loaded, params, row, output)
    if params.task == "generative":
        last_ND = output[[end - 1 for _, end in row.spans]]
        logits_NV = vocabulary_logits(loaded, last_ND)
        norm_N = logits_NV.logsumexp(-1)
        return [_answer(logits_NV[n, list(ids)] - norm_N[n]) for n, ids in enumerate(label_ids)]
    answers = []
    for item, (start, end) in zip(row.items, row.spans, strict=True):
        whole_TX = torch.cat([output[: len(row.query)], output[start:end]])
        if params.task == "token_classify":
            whole_TX = _steps(loaded, params, [*row.query, *item], whole_TX)
        elif params.task == "embed":
            whole_TX = _pooled(whole_TX, info.pooler.pooling)
        answers.append(_answer(whole_TX))
    return answers


def _answer(values: Tensor, state: Tensor | None = None) -> Answer:
    return Answer(values=values.float().cpu().numpy(), state=state)


def _classified(loaded: LoadedModel, params: ScoringParams, row: Row, output: Tensor) -> list[Answer]:
    if loaded.head is None:
        return [_answer(output)]
    last_ND = output[[end - 1 for _, end in row.spans]]
    logits_NK = score_logits(loaded, last_ND).cpu()
    states = last_ND.float().cpu() if params.return_pooled_hidden_states else [None] * len(logits_NK)
    return [
        _answer(logits_K, None if state is None else state.clone())
        for logits_K, state in zip(logits_NK, states, strict=True)
    ]


def _steps(loaded: LoadedModel, params: ScoringParams, token_ids: list[int], output_TX: Tensor) -> Tensor:
    """Logits of every token, or of the step-ending tokens only, all columns or the returned ones."""
    if params.step_tag_id is not None:
        output_TX = output_TX[[t for t, token in enumerate(token_ids) if token == params.step_tag_id]]
    columns = params.returned_token_ids
    if loaded.task == "generative":
        chosen = torch.tensor(list(columns or ()), device=output_TX.device)
        return vocabulary_logits(loaded, output_TX)[:, chosen]
    logits_TK = output_TX.float() if loaded.head is None else score_logits(loaded, output_TX)
    return logits_TK if columns is None else logits_TK[:, columns]


def _pooled(states_TD: Tensor, pooling: str | None) -> Tensor:
    if pooling == "MEAN":
        return states_TD.float().mean(0)
    return states_TD[0 if pooling == "CLS" else -1]
