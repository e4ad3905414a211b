"""What the examples share: sums with proposed answers, and the tiny reward model trained on sums of two digits.

The reward model is a genuine one: it learned from a tiny policy's own verified samples. It is made on first use (a minute or two)
and cached. `trained` makes further models of it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rlalign.reward.training.tiny_reward import cached_reward_model

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rlalign.scoring.scorer import Scoring

RIGHT, TENS, ONES = 0, 1, 2  # how an answer can be wrong: by a multiple of ten, or not
KINDS = ("right", "wrong by tens", "wrong by ones")


@dataclass(frozen=True, slots=True)
class Answer:
    """A proposed answer to a sum. kind: RIGHT, TENS or ONES."""

    question: str
    text: str
    kind: int

    @property
    def right(self) -> bool:
        return self.kind == RIGHT


def reward_model() -> Path:
    """The folder of the tiny reward model: one label, raw logits."""
    return cached_reward_model("untied", report=print)


def questions(count: int, low: int, high: int, seed: int) -> list[list[Answer]]:
    """Four proposed answers to each of `count` sums of numbers from low to high: two right ones at most."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        a, b = draw.randrange(low, high + 1), draw.randrange(low, high + 1)
        off = [0, draw.choice([0, 10]), draw.choice([10, 20, 100]), draw.choice([1, 2, 3, 7])]
        signs = [draw.choice([-1, 1]) for _ in off]
        texts = [abs(a + b + sign * d) for sign, d in zip(signs, off, strict=True)]
        draw.shuffle(texts)
        found.append([Answer(f"{a} + {b} =", str(t), _kind(t - a - b)) for t in texts])
    return found


def answers(count: int, low: int, high: int, seed: int) -> list[Answer]:
    """One list of the answers to count / 4 questions."""
    return [answer for asked in questions(count // 4, low, high, seed) for answer in asked]


def labels(rows: list[Answer]) -> NDArray[np.int64]:
    """1 for right answers."""
    return np.array([row.right for row in rows], dtype=np.int64)


def logits(scorer: Scoring, rows: list[Answer]) -> NDArray[np.float32]:
    """Raw logits [N, K] of answers to their questions. Raises RuntimeError where one has none."""
    results = scorer.run([scorer.prepare(row.question, [row.text]) for row in rows])
    failed = [result.errors[0] for result in results if result.errors[0] is not None]
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(rows)} answers have no score; {failed[0]}")
    return np.stack([result.logits[0] for result in results])


def served(scorer: Scoring, rows: list[Answer]) -> NDArray[np.float32]:
    """Activated scores [N, K], as the engine's own configuration makes them."""
    from rlalign.scoring import ScoringParams

    params = ScoringParams(use_activation=True)
    results = scorer.run([scorer.prepare(row.question, [row.text], params) for row in rows])
    return np.stack([result.scores[0] for result in results])


def trained(rows: list[Answer], folder: Path, *, kinds: bool, steps: int, seed: int = 0) -> Path:
    """The reward model trained further on `rows`, saved in `folder`: on right or wrong, or with kinds=True on three classes."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(seed)
    base = reward_model()
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=3 if kinds else 1, ignore_mismatched_sizes=True, dtype=torch.float32
    )
    batch = tokenizer(
        [row.question + row.text for row in rows], padding=True, padding_side="right", return_tensors="pt"
    )
    target = torch.tensor([row.kind if kinds else float(row.right) for row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        chosen = torch.randint(len(rows), (64,))
        out = model(input_ids=batch.input_ids[chosen], attention_mask=batch.attention_mask[chosen]).logits
        if kinds:
            loss = torch.nn.functional.cross_entropy(out, target[chosen])
        else:
            loss = torch.nn.functional.binary_cross_entropy_with_logits(out[:, 0], target[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _kind(difference: int) -> int:
    if difference == 0:
        return RIGHT
    return TENS if difference % 10 == 0 else ONES
