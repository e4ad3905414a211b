"""The recipe of a tiny policy, its supervised training, and what it reaches on held-out prompts.

B sequences, L padded length, N answer tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

    from rlalign.tasks import Prompt, Task

Progress = Callable[[str], None]
RECIPE_VERSION = 1  # raised whenever this file makes another policy from the same recipe
MAX_ANSWER_TOKENS = 8
IGNORED = -100  # the label of tokens that are not part of an answer


def _two_digit_addition() -> dict[str, Any]:
    return {
        "min_terms": 2,
        "max_terms": 2,
        "min_digits": 2,
        "max_digits": 2,
        "operators": ["+"],
        "allow_parentheses": False,
        "prompt_field": "expression",
        "template": "{prompt} =",
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyRecipe:
    """Everything that decides which policy comes out: two equal recipes give the same folder.

    task, task_params, train_size, eval_size, seed: as in `load_task`; only the train split is trained on.
    stop_at: expected accuracy on held-out prompts, sampled at temperature 1, at which training ends.
    accept_from: the least one accepted once max_steps are done.
    label_smoothing: keeps the policy less sure than it could be (greedy about 0.8 where sampling gets 0.4), which is
    what RL then has to earn.
    """

    tied: bool = False
    task: str = "basic_arithmetic"
    task_params: dict[str, Any] = field(default_factory=_two_digit_addition)
    train_size: int = 4096
    eval_size: int = 256
    seed: int = 0
    hidden_size: int = 128
    intermediate_size: int = 256
    layers: int = 2
    heads: int = 4
    head_dim: int = 32
    initializer_range: float = 0.12  # 0.02, the usual one, learns several times slower at this width
    context: int = 512
    batch_size: int = 64
    learning_rate: float = 3e-3
    label_smoothing: float = 0.15
    warmup_steps: int = 50
    max_steps: int = 600
    check_every: int = 20
    stop_at: float = 0.38
    accept_from: float = 0.25

    @property
    def folder(self) -> str:
        """The cache folder's name, which carries a hash of every field and of the transformers release."""
        release = ".".join(version("transformers").split(".")[:2])
        key = json.dumps([RECIPE_VERSION, release, asdict(self)], sort_keys=True)
        return f"tiny-qwen3-{'tied' if self.tied else 'untied'}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def teach(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, task: Task, recipe: TinyRecipe, progress: Progress
) -> int:
    """Supervised training on answers alone until `stop_at`; the steps it took.

    Raises RuntimeError when max_steps end below accept_from.
    """
    import torch

    ids_BL, labels_BL = _encode(list(task.train), tokenizer)
    held_out = _encode(task.eval_prompts(), tokenizer)
    alphabet = labels_BL[labels_BL != IGNORED].unique()
    order = {prompt.prompt_id: row for row, prompt in enumerate(task.train)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    expected = 0.0
    for step in range(recipe.max_steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * _schedule(step, recipe)
        rows = [order[prompt.prompt_id] for prompt in task.train_prompts(step, recipe.batch_size)]
        answered, targets = _answer_logits(model, ids_BL[rows], labels_BL[rows])
        loss = _soft_cross_entropy(answered, targets, alphabet, recipe.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % recipe.check_every == 0 or step + 1 == recipe.max_steps:
            expected = _expected_accuracy(model, *held_out)
            progress(f"tiny policy: step {step + 1}, loss {loss.item():.2f}, held-out accuracy {expected:.2f}")
            if expected >= recipe.stop_at:
                return step + 1
    if expected < recipe.accept_from:
        raise RuntimeError(
            f"tiny policy: held-out accuracy {expected:.2f} after {recipe.max_steps} steps, expected at least "
            f"{recipe.accept_from}; raise max_steps, or give the recipe an easier task or a wider model"
        )
    return recipe.max_steps


def _soft_cross_entropy(logits_NV: Tensor, labels_N: Tensor, alphabet: Tensor, smoothing: float) -> Tensor:
    """Cross entropy to labels that give `smoothing` of their mass, evenly, to the tokens that occur in answers.

    Label smoothing (arXiv:1512.00567) over the answer alphabet alone, so that no other token becomes likely.
    """
    logprobs_NV = logits_NV.log_softmax(dim=-1)
    hard = logprobs_NV.gather(-1, labels_N[:, None]).mean()
    return -(1.0 - smoothing) * hard - smoothing * logprobs_NV[:, alphabet].mean()


def _schedule(step: int, recipe: TinyRecipe) -> float:
    """Linear warm-up, then a cosine down to a tenth at max_steps."""
    cosine = 0.5 * (1.0 + math.cos(math.pi * step / recipe.max_steps))
    return min(1.0, (step + 1) / max(1, recipe.warmup_steps)) * (0.1 + 0.9 * cosine)


def _encode(prompts: list[Prompt], tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """Token ids, padded on the right, and labels: the next token where it belongs to the answer, else IGNORED."""
    import torch

    pairs = [
        (
            tokenizer(p.text).input_ids,
            [*tokenizer(p.answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id],
        )
        for p in prompts
    ]
    length = max(len(prompt) + len(answer) for prompt, answer in pairs)
    ids_BL = torch.full((len(pairs), length), cast("int", tokenizer.pad_token_id))
    labels_BL = torch.full((len(pairs), length), IGNORED)
    for row, (prompt, answer) in enumerate(pairs):
        ids_BL[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels_BL[row, len(prompt) - 1 : len(prompt) + len(answer) - 1] = torch.tensor(answer)
    return ids_BL, labels_BL


def _answer_logits(model: Qwen3ForCausalLM, ids_BL: Tensor, labels_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and labels of answer tokens alone, [N, V] and [N]. Padding lies to the right, where causality hides it."""
    hidden = model.model(input_ids=ids_BL, use_cache=False).last_hidden_state
    counted_BL = labels_BL != IGNORED
    return model.lm_head(hidden[counted_BL]).float(), labels_BL[counted_BL]


def _expected_accuracy(model: Qwen3ForCausalLM, ids_BL: Tensor, labels_BL: Tensor) -> float:
    """The mean probability of the whole reference answer and its <eos>: sampled accuracy without the sampling noise."""
    import torch

    with torch.no_grad():
        logits, labels = _answer_logits(model, ids_BL, labels_BL)
        chosen = torch.log_softmax(logits, dim=-1).gather(-1, labels[:, None])[:, 0]
        counted_BL = labels_BL != IGNORED
        rows = counted_BL.nonzero()[:, 0]
        return torch.zeros(len(ids_BL)).index_add_(0, rows, chosen).exp().mean().item()


def accuracy(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, task: Task, *, greedy: bool) -> float:
    """The part of held-out prompts answered right by `generate`, sampled at temperature 1 or greedily."""
    import torch
    from transformers import GenerationConfig

    settings = GenerationConfig(
        do_sample=not greedy,
        temperature=None if greedy else 1.0,
        top_k=None if greedy else 0,  # transformers cuts at 50 when nobody says otherwise
        max_new_tokens=MAX_ANSWER_TOKENS,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    prompts = task.eval_prompts()
    batch = tokenizer([prompt.text for prompt in prompts], padding=True, return_tensors="pt")
    with torch.no_grad():
        written = cast("Any", model).generate(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, generation_config=settings
        )
    texts = tokenizer.batch_decode(written[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    return sum(task.reward(prompt, text) for prompt, text in zip(prompts, texts, strict=True)) / len(prompts)
