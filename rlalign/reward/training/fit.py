"""The optimisation of a reward model: network, rows to batches, one loss, AdamW; on one device, or many through accelerate.

N rows or pairs of a micro-batch.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from torch.nn import functional

from rlalign.reward.training.examples import Labelled, Row
from rlalign.scoring.params import ScoringParams
from rlalign.scoring.sequences import Sequencer
from rlalign.trainer import attention_choice

if TYPE_CHECKING:
    from collections.abc import Callable

    from accelerate import Accelerator
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class RewardNetwork(nn.Module):
    """Token ids to rewards. `model` is what transformers saves and loads: a sequence classifier with one label."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids_NL: Tensor, lengths_N: Tensor) -> Tensor:
        """Rewards [N] float32. lengths_N: tokens of each sequence; what lies to the right of them is padding.

        The last token is found by its place: transformers looks for the pad id, and finds the wrong token in models whose
        pad and end tokens are one.
        """
        place_L = torch.arange(ids_NL.shape[1], device=ids_NL.device)
        mask_NL = place_L < lengths_N[:, None]
        states = self.model.base_model(input_ids=ids_NL, attention_mask=mask_NL.long(), use_cache=False)
        last_ND = states.last_hidden_state[torch.arange(len(ids_NL), device=ids_NL.device), lengths_N - 1]
        with torch.autocast(ids_NL.device.type, enabled=False):
            return cast("torch.nn.Module", self.model.score)(last_ND.float())[:, 0]


def load(path: Path, *, seed: int) -> tuple[RewardNetwork, PreTrainedTokenizerBase]:
    """A reward model to go on with, or a causal language model that gets a new head, in float32.

    Raises ValueError where the folder is neither, or the architecture has no score head on its last token.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    if not (path / "config.json").is_file():
        raise ValueError(f"{path} is not a Hugging Face folder (no config.json there)")
    shown = logging.get_verbosity()
    logging.set_verbosity_error()  # that the head is new is what was asked for
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # of the new head
            model = AutoModelForSequenceClassification.from_pretrained(
                path, num_labels=1, dtype=torch.float32, attn_implementation=attention_choice.of_folder(path).name
            )
    except ValueError as error:
        raise ValueError(f"{path}: transformers has no sequence classifier of this architecture ({error})") from error
    finally:
        logging.set_verbosity(shown)
    if not isinstance(getattr(model, "score", None), nn.Linear):
        raise ValueError(
            f"{path}: {type(model).__name__} has no linear score head on the last token; start from a decoder (Llama, Qwen, ...)"
        )
    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise ValueError(f"{path}: the tokenizer has neither a pad nor an eos token; batches cannot be padded")
    model.config.pad_token_id = tokenizer.pad_token_id
    return RewardNetwork(model), tokenizer


def tokenised(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[tuple[str, str]], *, max_length: int, chat: bool, model: str
) -> list[list[int] | None]:
    """Token ids of (prompt, completion), exactly as HFScorer reads them; None for those longer than max_length.

    chat: through the tokenizer's chat template. Nothing is cut: a model that has learned from halves of answers scores halves.
    Raises ValueError where there is no template.
    """
    if chat and tokenizer.chat_template is None:
        raise ValueError(f"{model}: its tokenizer has no chat template; train on plain text, or add one")
    sequencer = Sequencer(tokenizer, pairs=False, max_length=None, model=model)
    found: list[list[int] | None] = []
    for prompt, completion in texts:
        if chat:
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
            text = tokenizer.apply_chat_template(messages, tokenize=False)
            ids = tokenizer(cast("str", text), add_special_tokens=False)["input_ids"]
        else:
            (sequence,) = sequencer.sequences(prompt, [completion], ScoringParams())
            ids = [*sequence.shared, *sequence.own]
        found.append(ids if len(ids) <= max_length else None)
    return found


def padded(sequences: Sequence[list[int]], *, pad_token_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """ids [N, L] padded on the right, and lengths [N]."""
    rows = [torch.tensor(ids) for ids in sequences]
    ids_NL = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_token_id)
    return ids_NL.to(device), torch.tensor([len(ids) for ids in sequences], device=device)


def bradley_terry_loss(
    chosen_N: Tensor, rejected_N: Tensor, *, centring: float = 0.0, weights_N: Tensor | None = None
) -> Tensor:
    """Mean of weight * (-log sigmoid(chosen - rejected) + centring * (chosen + rejected)^2), in nats.

    Pairs say nothing about the level of the rewards; the second term keeps it near 0 (arXiv 2312.09244, Eq. 2; 0.01 there).
    weights_N: with mean 1 over the data set, so that batches add up. Raises ValueError on shapes that differ, no pairs, a
    negative centring or weight.
    """
    _require(chosen_N, rejected_N, weights_N, "bradley_terry_loss: chosen and rejected")
    if centring < 0:
        raise ValueError(f"bradley_terry_loss: centring cannot be negative, got {centring}")
    loss_N = -functional.logsigmoid(chosen_N - rejected_N) + centring * (chosen_N + rejected_N).square()
    return (loss_N if weights_N is None else weights_N * loss_N).mean()


def pointwise_loss(rewards_N: Tensor, labels_N: Tensor, *, weights_N: Tensor | None = None) -> Tensor:
    """Mean of weight * binary cross entropy of sigmoid(reward), in nats. labels_N: in [0, 1].

    weights_N: with mean 1 over the data set. Raises ValueError on shapes that differ, no rows, labels outside [0, 1], or a
    negative weight.
    """
    _require(rewards_N, labels_N, weights_N, "pointwise_loss: rewards and labels")
    if ((labels_N < 0) | (labels_N > 1)).any():
        raise ValueError(f"pointwise_loss: labels must lie in [0, 1], got {labels_N.min():g} to {labels_N.max():g}")
    return functional.binary_cross_entropy_with_logits(rewards_N, labels_N, weight=weights_N)


def _require(left_N: Tensor, right_N: Tensor, weights_N: Tensor | None, what: str) -> None:
    if left_N.shape != right_N.shape or left_N.ndim != 1 or len(left_N) == 0:
        raise ValueError(f"{what} must be [N] with N >= 1, got {tuple(left_N.shape)} and {tuple(right_N.shape)}")
    if weights_N is not None and (weights_N.shape != left_N.shape or (weights_N < 0).any()):
        raise ValueError(f"{what}: weights must be [N] and not negative, got shape {tuple(weights_N.shape)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a reward model is trained.

    batch_size: rows or pairs of one optimizer step, over all processes. micro_batch_size: of one forward pass.
    centring: keeps the level of the rewards near 0 when learning from pairs (arXiv 2312.09244).
    max_length: tokens; longer rows are left out and counted. chat_template: prompt and completion through the base's chat
    template, for the run to do the same. held_out: share of the prompts that is never trained on.
    """

    epochs: int = 1
    batch_size: int = 64
    micro_batch_size: int = 16
    learning_rate: float = 1e-5
    warmup: float = 0.05
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    centring: float = 0.01
    max_length: int = 2048
    chat_template: bool = False
    held_out: float = 0.1
    gradient_checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "micro_batch_size", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if not (self.learning_rate > 0 and self.grad_clip > 0 and self.weight_decay >= 0 and self.centring >= 0):
            raise ValueError("learning_rate and grad_clip must be positive, weight_decay and centring not negative")
        if not (0 <= self.warmup < 1 and 0 < self.held_out < 1):
            raise ValueError(f"warmup={self.warmup} and held_out={self.held_out} are shares, between 0 and 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A row with its token ids: of the completion, or of the chosen and the rejected one."""

    row: Row
    sequences: tuple[list[int], ...]


def fit(
    network: RewardNetwork,
    items: Sequence[Item],
    recipe: Recipe,
    accelerator: Accelerator,
    *,
    pad: int,
    say: Callable[[str], None],
) -> int:
    """Train `network` in place; the optimizer steps taken. accelerator: accumulates `accumulation(...)` micro-batches.

    Raises ValueError on fewer rows than a batch, RuntimeError when the loss is not finite.
    """
    if len(items) < recipe.batch_size:
        raise ValueError(f"{len(items)} rows to train on are fewer than batch_size={recipe.batch_size}")
    steps = recipe.epochs * (len(items) // recipe.batch_size)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=recipe.weight_decay
    )
    prepared, optimizer = accelerator.prepare(network, optimizer)
    prepared.train()
    mean_weight = sum(item.row.weight for item in items) / len(items)
    step, loss = 0, math.nan
    for batch in _micro_batches(items, recipe, accelerator.process_index, accelerator.num_processes):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * _schedule(step, steps, recipe.warmup)
        with accelerator.accumulate(prepared):
            batch_loss = _loss(prepared, batch, recipe, mean_weight, pad=pad, device=accelerator.device)
            loss = float(batch_loss.detach())
            if not math.isfinite(loss):
                raise RuntimeError(f"step {step + 1}: the loss is {loss}; lower the learning rate or look at the data")
            accelerator.backward(batch_loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(prepared.parameters(), recipe.grad_clip)
                step += 1
                if step % max(1, steps // 10) == 0:
                    say(f"step {step} of {steps}: loss {loss:.3f}")
            optimizer.step()
            optimizer.zero_grad()
    network.eval()
    return step


def accumulation(recipe: Recipe, processes: int) -> int:
    """Micro-batches of one optimizer step on each process. Raises ValueError where they do not make up batch_size."""
    together = recipe.micro_batch_size * processes
    if recipe.batch_size % together:
        raise ValueError(
            f"batch_size={recipe.batch_size} must be a multiple of micro_batch_size={recipe.micro_batch_size} x {processes} "
            "processes"
        )
    return recipe.batch_size // together


def _micro_batches(items: Sequence[Item], recipe: Recipe, rank: int, world: int) -> Iterator[list[Item]]:
    """This process's share of every batch. Each epoch has its own order, and leaves out the rows that fill no batch."""
    for epoch in range(recipe.epochs):
        order = list(range(len(items)))
        random.Random(f"{recipe.seed}/{epoch}").shuffle(order)
        for start in range(0, len(items) - recipe.batch_size + 1, recipe.batch_size):
            mine = order[start : start + recipe.batch_size][rank::world]
            for at in range(0, len(mine), recipe.micro_batch_size):
                yield [items[i] for i in mine[at : at + recipe.micro_batch_size]]


def _loss(
    network: torch.nn.Module,
    items: Sequence[Item],
    recipe: Recipe,
    mean_weight: float,
    *,
    pad: int,
    device: torch.device,
) -> Tensor:
    """One forward pass over all sequences of the micro-batch: for pairs the chosen ones first."""
    sides = list(zip(*(item.sequences for item in items), strict=True))
    rewards = network(*padded([ids for side in sides for ids in side], pad_token_id=pad, device=device))
    weights_N = torch.tensor([item.row.weight / mean_weight for item in items], device=device)
    labels = [item.row.label for item in items if isinstance(item.row, Labelled)]
    if not labels:
        chosen_N, rejected_N = rewards.chunk(2)
        return bradley_terry_loss(chosen_N, rejected_N, centring=recipe.centring, weights_N=weights_N)
    return pointwise_loss(rewards, torch.tensor(labels, device=device), weights_N=weights_N)


def _schedule(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up over that share of the steps, then a cosine down to a tenth."""
    rising = min(1.0, (step + 1) / max(1, round(warmup * steps)))
    return rising * (0.1 + 0.9 * 0.5 * (1.0 + math.cos(math.pi * step / steps)))
