"""The problems behind benchmarks/adaptive.py, as tokens with hidden states: what a calibration is fitted and judged on.

N scored tokens, L tokens of a sequence, D hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from rlalign.calibration.adaptive import Projection, TokenBatch, token_batches
from rlalign.tasks import Prompt, Task, load_task

MAX_ANSWER_TOKENS = 8
TRAINED_ON = 512 + 128  # problems of "addition" that GRPO trained and was evaluated on


def _arithmetic(operator: str, digits: tuple[int, int]) -> tuple[str, dict[str, object]]:
    params = {"min_terms": 2, "max_terms": 2, "min_digits": digits[0], "max_digits": digits[1], "operators": [operator],
              "allow_parentheses": False, "prompt_field": "expression", "template": "{prompt} ="}  # fmt: skip
    return "basic_arithmetic", params


FAMILIES = {
    "addition": _arithmetic("+", (2, 2)),
    "longer": _arithmetic("+", (1, 3)),
    "subtraction": _arithmetic("-", (2, 2)),
    "three terms": ("chain_sum", {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1,
                                  "prompt_field": "expression", "template": "{prompt} ="}),
    "products": ("products", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2,
                              "prompt_field": "expression", "template": "{prompt} ="}),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """Some problems of one or several families. prompt_N: which problem a scored token belongs to."""

    batches: list[TokenBatch]
    prompts: list[Prompt]

    @cached_property
    def logits_NV(self) -> torch.Tensor:
        """All logits of all scored tokens: small enough here; for the calibrations that need a table."""
        return torch.cat([b.states() @ b.projection.weight_VD.T for b in self.batches])

    @cached_property
    def labels_N(self) -> torch.Tensor:
        """The tokens that the reference answers have."""
        return torch.cat([b.token_ids[b.mask] for b in self.batches])

    @cached_property
    def prompt_N(self) -> np.ndarray:
        """The problem of each scored token."""
        counts = [n for b in self.batches for n in b.mask.sum(1).tolist()]
        return np.repeat(np.arange(len(counts)), counts)


class Policy:
    """A causal LM folder on one CPU thread, in float32."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
        self.projection = Projection.of(self.model)

    def forced(self, prompts: list[Prompt], batch_size: int = 64) -> Part:
        """The reference answers, teacher-forced: scored are the answer's tokens and the end of the sequence."""
        starts = [self._prompt(p) for p in prompts]
        ends = [
            [*self.tokenizer(p.answer, add_special_tokens=False).input_ids, self.tokenizer.eos_token_id]
            for p in prompts
        ]
        return self._part(prompts, starts, ends, batch_size)

    def greedy(self, prompts: list[Prompt], batch_size: int = 256) -> tuple[Part, list[str]]:
        """The policy's own greedy answers as scored tokens, and their texts."""
        answers: list[list[int]] = []
        for at in range(0, len(prompts), batch_size):
            texts = [p.text for p in prompts[at : at + batch_size]]
            encoded = self.tokenizer(texts, padding=True, return_tensors="pt")
            written = self.model.generate(
                input_ids=encoded.input_ids, attention_mask=encoded.attention_mask, do_sample=False,
                max_new_tokens=MAX_ANSWER_TOKENS, pad_token_id=self.tokenizer.pad_token_id,
            )  # fmt: skip
            for row in written[:, encoded.input_ids.shape[1] :].tolist():
                end = row.index(self.tokenizer.eos_token_id) + 1 if self.tokenizer.eos_token_id in row else len(row)
                answers.append(row[:end])
        part = self._part(prompts, [self._prompt(p) for p in prompts], answers, batch_size=64)
        return part, self.tokenizer.batch_decode(answers, skip_special_tokens=True)

    def _prompt(self, prompt: Prompt) -> list[int]:
        return self.tokenizer(prompt.text).input_ids

    def _part(self, prompts: list[Prompt], starts: list[list[int]], ends: list[list[int]], batch_size: int) -> Part:
        ids = [start + end for start, end in zip(starts, ends, strict=True)]
        hidden = []
        for at in range(0, len(ids), 256):
            rows = ids[at : at + 256]
            padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
            with torch.no_grad():
                body = self.model.base_model(input_ids=padded, use_cache=False).last_hidden_state
            hidden += [body[i, : len(row)] for i, row in enumerate(rows)]
        lengths = [len(start) for start in starts]
        return Part(
            batches=token_batches(hidden, ids, lengths, self.projection, batch_size=batch_size), prompts=prompts
        )


def problems(family: str, sizes: dict[str, int], seed: int) -> tuple[dict[str, list[Prompt]], Task]:
    """Disjoint problems of a family under each name in `sizes`; none that GRPO has met."""
    name, params = FAMILIES[family]
    skipped = TRAINED_ON if family == "addition" else 0
    task = load_task(name, params, train_size=skipped + sum(sizes.values()), eval_size=0, seed=0 if skipped else seed)
    parts, at = {}, skipped
    for part, size in sizes.items():
        parts[part] = list(task.train[at : at + size])
        at += size
    return parts, task
