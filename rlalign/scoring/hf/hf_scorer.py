"""The scorer itself: a request becomes rows, rows become batches, batches become answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Literal, Self, TypedDict, Unpack

from rlalign.calibration.arrays import whole
from rlalign.scoring.hf import model_loading
from rlalign.scoring.hf.describe import attention_balance, describe, window_of
from rlalign.scoring.hf.forward_pass import Row, outputs, read_row, split_by_budget, worthwhile_groups
from rlalign.scoring.params import PoolerDefaults, ScoringParams
from rlalign.scoring.result import Answer, score_result
from rlalign.scoring.scorer import Scoring, checked_inputs
from rlalign.scoring.sequences import Sequencer, TokenSequence

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rlalign.scoring.result import ScoreResult
    from rlalign.scoring.scorer import Text

Packing = Literal["auto", "always", "never"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HFRequest:
    """A checked, tokenised request. rows: what is run; indices: which items each row holds, in its order."""

    params: ScoringParams
    sequences: list[TokenSequence]
    rows: list[Row]
    indices: list[list[int]]
    label_ids: list[list[int]]

    @property
    def num_tokens(self) -> int:
        """Tokens that the model will read: a shared query counts once a row."""
        return sum(row.length for row in self.rows)


class Options(TypedDict, total=False):
    """How a model is described and run, see `HFScorer`."""

    pooler: PoolerDefaults | None
    packing: Packing
    max_batch_tokens: int
    max_pack_tokens: int


class HFScorer(Scoring[HFRequest]):
    """Sequence and token classifiers, cross-encoders, generative judges and embedders, from a folder or a hub id.

    dtype: "auto" is the checkpoint's. A score head is multiplied in float32 whatever the body's dtype, as vLLM does.
    attention: auto is transformers' own choice (sdpa), or eager for a model whose scores sdpa would leave uncapped; flex_attention
    skips the blocks between packed items (GPUs). pooler: the model's own choices, where
    its files do not state them (step pooling, logit_mean).
    packing: "auto" shares a query between its items wherever that is exact and saves work, "always" raises ValueError where it
    is not exact (`info.packing_reason`), "never" runs each item alone. Scores are the same in all three.
    max_batch_tokens: padded tokens of one forward pass. max_pack_tokens: of one packed row.
    """

    def __init__(
        self,
        path: str,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        device: str = "cpu",
        attention: Literal["auto", "sdpa", "eager", "flex_attention"] = "auto",
        trust_remote_code: bool = False,
        **options: Unpack[Options],
    ) -> None:
        loaded = model_loading.load(
            str(path), revision=revision, dtype=dtype, device=device, attention=attention,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
        self._start(loaded, **options)

    @classmethod
    def wrap(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        id: str,
        **options: Unpack[Options],
    ) -> Self:
        """A scorer of a model in memory, whose head is copied: wrap again after an update of its weights."""
        scorer = cls.__new__(cls)
        scorer._start(model_loading.wrap(model, tokenizer, id=id), **options)
        return scorer

    def _start(
        self,
        loaded: model_loading.LoadedModel,
        *,
        pooler: PoolerDefaults | None = None,
        packing: Packing = "auto",
        max_batch_tokens: int = 4096,
        max_pack_tokens: int = 4096,
    ) -> None:
        self._loaded = loaded
        self.info = describe(loaded, pooler)
        self.tokenizer = loaded.tokenizer
        if packing == "always" and not self.info.packs:
            raise ValueError(f"{self.info.id}: items cannot be packed exactly: {self.info.packing_reason}")
        self._packing = packing if self.info.packs else "never"
        self._window, self._balance = window_of(loaded.config), attention_balance(loaded)
        self._max_batch_tokens = whole(max_batch_tokens, "max_batch_tokens", at_least=1)
        self._max_pack_tokens = whole(max_pack_tokens, "max_pack_tokens", at_least=1)
        self._sequencer = Sequencer(
            loaded.tokenizer, pairs=not self.info.causal, max_length=self.info.max_length, model=self.info.id,
            prompt=loaded.facts.prompt,
        )  # fmt: skip

    def prepare(self, query: Text, items: Text | Sequence[Text], params: ScoringParams | None = None) -> HFRequest:
        """Check, resolve and tokenise a request. Raises ValueError before any computation."""
        resolved = (params or ScoringParams()).verify(self.info)
        query, listed = checked_inputs(query, items, self.info.vocab_size)
        label_ids = resolved.label_ids(len(listed)) if resolved.task == "generative" else [[] for _ in listed]
        if resolved.item_first and self._packing == "always":
            raise ValueError("item_first: an item before its query cannot share it; use packing='auto' or 'never'")
        sequences = self._sequencer.sequences(query, listed, resolved)
        rows, indices = self._rows(sequences)
        return HFRequest(params=resolved, sequences=sequences, rows=rows, indices=indices, label_ids=label_ids)

    def run(self, requests: Sequence[HFRequest]) -> list[ScoreResult]:
        """Score prepared requests in batches of at most max_batch_tokens, of whichever requests they come from."""
        answers = [[Answer()] * len(request.sequences) for request in requests]
        todo = [(r, g) for r, request in enumerate(requests) for g in range(len(request.rows))]
        for batch in self._batches(todo, requests):
            found = outputs(self._loaded, [requests[r].rows[g] for r, g in batch])
            for (r, g), output in zip(batch, found, strict=True):
                request, indices = requests[r], requests[r].indices[g]
                labels = [request.label_ids[i] for i in indices]
                found_here = read_row(self._loaded, self.info, request.params, request.rows[g], output, labels)
                for i, answer in zip(indices, found_here, strict=True):
                    sequence = request.sequences[i]
                    answers[r][i] = replace(answer, prompt_tokens=len(sequence), truncated=sequence.truncated)
        return [score_result(row, request.params, self.info) for row, request in zip(answers, requests, strict=True)]

    def _rows(self, sequences: list[TokenSequence]) -> tuple[list[Row], list[list[int]]]:
        """Items with the same query behind each other in one row where packing is on, else a row each."""
        rows: list[Row] = []
        indices: list[list[int]] = []
        for shared, group in groupby(range(len(sequences)), key=lambda i: sequences[i].shared):
            members = list(group)
            for part in self._groups(len(shared), [len(sequences[i].own) for i in members]):
                chosen = [members[p] for p in part]
                rows.append(
                    Row(query=shared, items=[sequences[i].own for i in chosen], type_ids=sequences[chosen[0]].type_ids)
                )
                indices.append(chosen)
        return rows, indices

    def _groups(self, query_length: int, item_lengths: list[int]) -> list[list[int]]:
        fits = self._window is None or query_length + max(item_lengths) <= self._window
        if self._packing == "never" or query_length == 0 or not fits:
            return [[i] for i in range(len(item_lengths))]
        if self._packing == "always" or self._balance is None:
            return split_by_budget(query_length, item_lengths, self._max_pack_tokens)
        return worthwhile_groups(query_length, item_lengths, budget=self._max_pack_tokens, balance=self._balance)

    def _batches(self, todo: list[tuple[int, int]], requests: Sequence[HFRequest]) -> Iterator[list[tuple[int, int]]]:
        """Rows of similar length together, packed ones apart from others, padded size within the budget."""

        def packed(key: tuple[int, int]) -> bool:
            return len(requests[key[0]].indices[key[1]]) > 1

        def length(key: tuple[int, int]) -> int:
            return requests[key[0]].rows[key[1]].length

        for _, group in groupby(sorted(todo, key=lambda key: (packed(key), length(key))), key=packed):
            batch: list[tuple[int, int]] = []
            for key in group:
                if batch and (len(batch) + 1) * length(key) > self._max_batch_tokens:
                    yield batch
                    batch = []
                batch.append(key)
            yield batch
