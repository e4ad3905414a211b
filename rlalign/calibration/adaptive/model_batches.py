"""Token batches from a causal LM folder and prompts with completions: read, encoded, and run through the frozen model.

B sequences, L padded length, D hidden."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rlalign.calibration.adaptive.batches import TokenBatch
from rlalign.calibration.adaptive.sums import Projection
from rlalign.head.transform import HeadTransform
from rlalign.tasks.rows import cell, jsonl_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


__all__ = ["Completion", "Encoded", "ModelBatches", "encode", "read_completions"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One row of a file. where: file and line, for messages."""

    where: str
    prompt: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """Token ids of prompt and completion; start: index of the completion's first token."""

    token_ids: list[int]
    start: int


def read_completions(path: Path) -> list[Completion]:
    """Rows {"prompt": ..., "completion": ...}: right answers, whose tokens are the labels. Other fields are ignored.

    Raises ValueError naming file and line where a field is missing or empty, and on an empty file.
    """
    rows = [
        Completion(where=where, prompt=cell(row, "prompt", where), text=cell(row, "completion", where))
        for where, row in jsonl_rows(path)
    ]
    if not rows:
        raise ValueError(f"{path}: empty; expected one object with prompt and completion per line")
    return rows


def encode(
    rows: Sequence[Completion], tokenizer: PreTrainedTokenizerBase, *, longest: int, chat: bool = False
) -> list[Encoded]:
    """Prompt and completion tokenised apart, as a policy meets them, and the end-of-sequence token after them.

    chat: the prompt in the tokenizer's chat template. longest: positions of the model; a longer row is a ValueError.
    """
    found = []
    for row in rows:
        if chat:
            message = [{"role": "user", "content": row.prompt}]
            prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
        else:
            prompt = tokenizer.encode(row.prompt)
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        ids = [*prompt, *tokenizer.encode(row.text, add_special_tokens=False), *end]
        if len(ids) > longest:
            raise ValueError(f"{row.where}: {len(ids)} tokens, the model has {longest} positions; shorten or remove it")
        if not prompt:
            raise ValueError(
                f"{row.where}: the prompt has no tokens, so the first one of the completion has no context"
            )
        found.append(Encoded(token_ids=ids, start=len(prompt)))
    return found


class ModelBatches:
    """Batches made when asked for: batch i is one forward pass of the frozen body. `list(...)` keeps them all.

    The model stays where it is and as it is (evaluation mode is set, no gradient is taken). Sequences are grouped by
    length, so that little is padding.
    """

    def __init__(self, model: PreTrainedModel, rows: Sequence[Encoded], *, batch_size: int = 16) -> None:
        if batch_size < 1 or not rows:
            raise ValueError(f"ModelBatches: need a row and a positive batch_size, got {len(rows)} rows, {batch_size}")
        self._model = model.eval()
        self._projection = Projection.of(model)
        by_length = sorted(rows, key=lambda row: len(row.token_ids))
        self._groups = [by_length[at : at + batch_size] for at in range(0, len(rows), batch_size)]

    def __len__(self) -> int:
        return len(self._groups)

    @torch.no_grad()
    def __getitem__(self, index: int) -> TokenBatch:
        group = self._groups[index]
        pad = torch.nn.utils.rnn.pad_sequence
        device = self._projection.weight_VD.device
        ids_BL = pad([torch.tensor(row.token_ids) for row in group], batch_first=True).to(device)
        length_B = torch.tensor([len(row.token_ids) for row in group], device=device)
        start_B = torch.tensor([row.start for row in group], device=device)
        position_L = torch.arange(ids_BL.shape[1], device=device)
        present_BL = position_L < length_B[:, None]
        body = self._model.base_model(input_ids=ids_BL, attention_mask=present_BL.long(), use_cache=False)
        mask_BL = present_BL & (position_L >= start_B[:, None])
        hidden = HeadTransform.of(self._model.config).hidden(body.last_hidden_state)
        return TokenBatch(hidden=hidden, token_ids=ids_BL, mask=mask_BL, projection=self._projection)
