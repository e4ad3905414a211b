"""What a calibration is fitted on and applied to: batches of tokens, or of classes with a pooled hidden state.

A fit takes a sequence of batches. A list keeps hidden states in memory; anything with `__len__` and `__getitem__` may
make them when asked (`ModelBatches` runs a causal LM over prompts with completions), so that one batch exists at a time.

B sequences, L padded length, N scored tokens or rows, D hidden, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from rlalign.calibration.adaptive.sums import Facts, Projection, facts_of, rest_log_sum_exp
from rlalign.head.transform import HeadTransform
from rlalign.tasks.rows import cell, jsonl_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rlalign.logprobs.forward import Problem


__all__ = ["Completion", "Encoded", "ModelBatches", "encode", "read_completions"]

Level = Literal["token", "sequence"]
LEVELS = ("token", "sequence")


T_co = TypeVar("T_co", covariant=True)


class Batches(Protocol[T_co]):
    """`len` batches; `[i]` gives the same one every time, so that it may be computed when it is asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> T_co: ...


class Batch(Protocol):
    """N things to calibrate, each with a hidden state and logits."""

    @property
    def hidden(self) -> Tensor:
        """What the head reads, [..., D]."""
        ...

    def __len__(self) -> int: ...

    def states(self) -> Tensor:
        """[N, D]: the hidden states of the N things."""
        ...

    def pick(self, raw: Tensor, level: Level) -> Tensor:
        """[N]: the head's output [...] at the N things."""
        ...

    def facts(self) -> Facts:
        """One pass over the uncalibrated logits."""
        ...

    def rest(self, scale_N: Tensor, facts: Facts) -> Tensor:
        """Log-sum-exp of the scaled logits without the top one, [N], differentiable in scale_N."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """Sequences with their hidden states, right padded; the masked tokens are the N things, row by row.

    hidden [B, L, D]: of the last layer after its norm, entry t computed from tokens 0..t, so it is entry t - 1 that
    predicts token t. token_ids [B, L] int64. mask [B, L] bool: the tokens to calibrate, never token 0. Prompt and
    padding are masked out here and count nowhere: neither as wrong, nor in a mean, nor in the accuracy.
    Raises ValueError on wrong shapes or dtypes, a mask that keeps nothing or token 0, ids outside the vocabulary and
    hidden states that are not finite anywhere: 0 times NaN is NaN in a gradient, padding included.
    """

    hidden: Tensor
    token_ids: Tensor
    mask: Tensor
    projection: Projection

    def __post_init__(self) -> None:
        shape = tuple(self.token_ids.shape)
        if self.hidden.dim() != 3 or tuple(self.hidden.shape[:2]) != shape or tuple(self.mask.shape) != shape:
            raise ValueError(
                f"TokenBatch: expected hidden [B, L, D], token_ids and mask [B, L], got {tuple(self.hidden.shape)}, "
                f"{shape}, {tuple(self.mask.shape)}"
            )
        if self.mask.dtype != torch.bool or self.token_ids.dtype != torch.int64:
            raise ValueError(f"TokenBatch: mask must be bool, ids int64; got {self.mask.dtype}, {self.token_ids.dtype}")
        if not bool(self.mask.any()):
            raise ValueError(f"TokenBatch: the mask keeps none of {shape} tokens; leave this batch out")
        if bool(self.mask[:, 0].any()):
            raise ValueError("TokenBatch: the mask keeps token 0, which has no context to be predicted from")
        target_N = self.token_ids[self.mask]
        if bool(((target_N < 0) | (target_N >= self.projection.rows)).any()):
            raise ValueError(
                f"TokenBatch: ids {int(target_N.min())}..{int(target_N.max())} under the mask, vocabulary "
                f"{self.projection.rows}; does the tokenizer belong to this model?"
            )
        _require_finite(self.hidden.flatten(0, 1), "TokenBatch: hidden states, flat")

    def __len__(self) -> int:
        return int(self.mask.sum())

    def states(self) -> Tensor:
        """The state before each masked token."""
        return self.hidden[:, :-1][self.mask[:, 1:]]

    def pick(self, raw: Tensor, level: Level) -> Tensor:
        """The output before each masked token; at level sequence, that before the first masked token of its row."""
        before_BL = raw[:, :-1]
        counted_BL = self.mask[:, 1:]
        if level == "sequence":
            first_B1 = counted_BL.int().argmax(1, keepdim=True)
            before_BL = before_BL.gather(1, first_B1).expand_as(counted_BL)
        return before_BL[counted_BL]

    def facts(self) -> Facts:
        """One pass over the vocabulary."""
        return facts_of(self._problem())

    def rest(self, scale_N: Tensor, facts: Facts) -> Tensor:
        """One pass over the vocabulary; none in the backward pass."""
        return rest_log_sum_exp(scale_N, self._problem(), facts)

    def per_sequence(self, value_N: Tensor) -> list[Tensor]:
        """The values of each row's masked tokens."""
        return list(value_N.split(self.mask.sum(1).tolist()))

    def _problem(self) -> Problem:
        return self.projection.problem(self.states(), self.token_ids[self.mask])


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassBatch:
    """Rows with a pooled hidden state and K logits: a multi-class reward head, or a judge's label tokens.

    hidden [N, D]; logits [N, K] with K > 1 (a scalar reward r is the pair (0, r - bias)); labels [N] int64.
    Raises ValueError on wrong shapes or dtypes, labels outside 0..K-1 and values that are not finite.
    """

    hidden: Tensor
    logits: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        n = len(self.labels)
        if self.hidden.dim() != 2 or self.logits.dim() != 2 or {len(self.hidden), len(self.logits)} != {n} or n == 0:
            raise ValueError(
                f"ClassBatch: expected hidden [N, D], logits [N, K], labels [N] with N > 0, got "
                f"{tuple(self.hidden.shape)}, {tuple(self.logits.shape)}, {tuple(self.labels.shape)}"
            )
        if self.logits.shape[1] < 2:
            raise ValueError("ClassBatch: one logit per row; give a scalar reward r as the two logits (0, r - bias)")
        if self.labels.dtype != torch.int64 or bool(((self.labels < 0) | (self.labels >= self.logits.shape[1])).any()):
            raise ValueError(f"ClassBatch: labels must be int64 classes 0..{self.logits.shape[1] - 1}")
        _require_finite(self.hidden, "ClassBatch: hidden states")
        _require_finite(self.logits, "ClassBatch: logits")

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def of_rewards(cls, rewards: Tensor, hidden: Tensor, labels: Tensor, *, bias: float = 0.0) -> ClassBatch:
        """Scalar rewards [N] as the two logits (0, r - bias), so that p = sigmoid((r - bias) / T(h)); labels 0 or 1.

        bias: where a single calibration says p = 1/2 (PlattCalibrator.bias_); T alone cannot move that point.
        """
        margin_N = rewards.float() - bias
        return cls(hidden=hidden, logits=torch.stack((torch.zeros_like(margin_N), margin_N), 1), labels=labels)

    @property
    def num_classes(self) -> int:
        """K."""
        return self.logits.shape[1]

    def states(self) -> Tensor:
        """All of them."""
        return self.hidden

    def pick(self, raw: Tensor, level: Level) -> Tensor:
        """Every row is a sequence of its own."""
        return raw

    def facts(self) -> Facts:
        """From the logits as they are."""
        logits_NK = self.logits.float()
        top_id_N = logits_NK.argmax(1)
        two_N2 = logits_NK.topk(2, dim=1).values
        target_N = logits_NK.gather(1, self.labels[:, None])[:, 0]
        return Facts(target_N, two_N2[:, 0], two_N2[:, 1], logits_NK.mean(1), top_id_N, top_id_N == self.labels)

    def rest(self, scale_N: Tensor, facts: Facts) -> Tensor:
        """Over the K - 1 classes that are not the top one."""
        logits_NK = self.logits.float() * scale_N[:, None]
        return logits_NK.scatter(1, facts.top_id_N[:, None], float("-inf")).logsumexp(1)


def _require_finite(x: Tensor, what: str) -> None:
    bad_N = ~x.isfinite().all(-1)
    if bool(bad_N.any()):
        raise ValueError(
            f"{what}: {int(bad_N.sum())} of {len(x)} rows are not finite, the first is {int(bad_N.int().argmax())}"
        )


def token_batches(
    hidden: Sequence[Tensor],
    token_ids: Sequence[Sequence[int]],
    starts: Sequence[int],
    projection: Projection,
    *,
    batch_size: int = 16,
) -> list[TokenBatch]:
    """Batches from one [L, D] tensor per sequence, wherever it was computed (vLLM, a file, another machine).

    hidden[i]: a row per token of token_ids[i]. starts[i]: index of the first token to calibrate (the prompt's length),
    at least 1. Sequences keep their order. Raises ValueError where lengths do not fit.
    """
    if not len(hidden) == len(token_ids) == len(starts) or not hidden:
        raise ValueError(f"token_batches: {len(hidden)} hidden, {len(token_ids)} token_ids, {len(starts)} starts")
    for i, (h_LD, ids, start) in enumerate(zip(hidden, token_ids, starts, strict=True)):
        if h_LD.dim() != 2 or len(h_LD) != len(ids) or not 1 <= start < len(ids):
            raise ValueError(
                f"token_batches: sequence {i} has {len(ids)} tokens, hidden states {tuple(h_LD.shape)} and start {start}; "
                "expected one row per token and 1 <= start < length"
            )
    batches = []
    for first in range(0, len(hidden), batch_size):
        at = slice(first, first + batch_size)
        hidden_BLD = torch.nn.utils.rnn.pad_sequence(list(hidden[at]), batch_first=True)
        ids_BL, _, mask_BL = _padded(token_ids[at], starts[at], hidden_BLD.device)
        batches.append(TokenBatch(hidden=hidden_BLD, token_ids=ids_BL, mask=mask_BL, projection=projection))
    return batches


def _padded(
    token_ids: Sequence[Sequence[int]], starts: Sequence[int], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """ids [B, L] padded on the right; bool: which are tokens, and which of those are to be calibrated."""
    pad = torch.nn.utils.rnn.pad_sequence
    ids_BL = pad([torch.tensor(ids) for ids in token_ids], batch_first=True)
    place_L = torch.arange(ids_BL.shape[1])
    present_BL = place_L < torch.tensor([len(ids) for ids in token_ids])[:, None]
    mask_BL = present_BL & (place_L >= torch.tensor(starts)[:, None])
    return ids_BL.to(device), present_BL.to(device), mask_BL.to(device)


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
        ids_BL, present_BL, mask_BL = _padded(
            [row.token_ids for row in group], [row.start for row in group], self._projection.weight_VD.device
        )
        body = self._model.base_model(input_ids=ids_BL, attention_mask=present_BL.long(), use_cache=False)
        hidden = HeadTransform.of(self._model.config).hidden(body.last_hidden_state)
        return TokenBatch(hidden=hidden, token_ids=ids_BL, mask=mask_BL, projection=self._projection)
