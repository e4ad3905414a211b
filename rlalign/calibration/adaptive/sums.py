"""Sums over the vocabulary, tile by tile ([tokens, vocabulary] never exists), and the losses of a temperature on them.

One pass finds what does not move with the temperature (Facts); one pass per training step gives the log-sum-exp of
the scaled logits and, in the same tiles, its derivative by the scale, so the backward pass forms no logits at all.

N tokens, D hidden, V vocabulary, T rows and S columns of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from rlalign.head.projection import check_operands, route
from rlalign.head.transform import HeadTransform
from rlalign.logprobs.blocks import Tile, padded, token_tiles
from rlalign.logprobs.forward import Problem, Transform

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

Loss = Literal["top_label", "selective", "cross_entropy", "label_smoothing", "uniform"]
AlphaForm = Literal["share", "balanced", "added"]
LOSSES = ("top_label", "selective", "cross_entropy", "label_smoothing", "uniform")
ALPHA_FORMS = ("share", "balanced", "added")


once_differentiable: Any = torch.autograd.function.once_differentiable  # typed, its result would not fit `backward`


class Facts(NamedTuple):
    """What the uncalibrated logits say, per token.

    Logits of the target, of the top token (the first where several are largest) and of the runner-up; their mean over
    the vocabulary; the top token's id; whether it is the target.
    """

    target_N: Tensor
    top_N: Tensor
    runner_up_N: Tensor
    mean_N: Tensor
    top_id_N: Tensor
    right_N: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """Which loss.

    top_label: log loss of "the most likely token is the right one" under its own probability; proper for confidence.
    cross_entropy: -log p(target). uniform: cross-entropy to the uniform distribution, whatever the target.
    label_smoothing: (1 - smoothing) cross_entropy + smoothing uniform (arXiv 1512.00567).
    selective: cross-entropy where the base model's argmax is right, uniform where it is wrong (arXiv 2409.19817).
    How its alpha weighs them, per token:
      share     (1 - alpha) if right, alpha if wrong. The default: no token's weight depends on another token.
      balanced  the official code: mean over the right tokens times (1 - alpha)(1 - a), mean over the wrong ones times
                alpha a, normalised, a the accuracy; here a is the fitted set's, not a batch's, so a batch without
                wrong tokens still has a gradient. The same as share at alpha' / (1 - alpha') =
                alpha / (1 - alpha) * (a / (1 - a))^2: at a = 0.9 wrong tokens weigh 81 times more than alpha says.
      added     cross-entropy everywhere, plus alpha times uniform where wrong.
    Raises ValueError on an unknown name, and on alpha or smoothing outside (0, 1).
    """

    loss: Loss = "top_label"
    alpha: float = 0.5
    alpha_form: AlphaForm = "share"
    smoothing: float = 0.1

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"loss: expected one of {', '.join(LOSSES)}, got {self.loss!r}")
        if self.alpha_form not in ALPHA_FORMS:
            raise ValueError(f"alpha_form: expected one of {', '.join(ALPHA_FORMS)}, got {self.alpha_form!r}")
        for name, value in (("alpha", self.alpha), ("smoothing", self.smoothing)):
            if not 0.0 < value < 1.0:
                raise ValueError(f"{name}: expected a number in (0, 1), got {value}")

    def per_token(self, rest_N: Tensor, scale_N: Tensor, facts: Facts, accuracy: float) -> Tensor:
        """The loss of each token [N], nats; its mean over tokens is what is minimised.

        rest_N: log-sum-exp of the scaled logits without the top token's. accuracy: of the whole fitted set; only
        `balanced` reads it. Raises ValueError where `balanced` has nothing to balance (accuracy 0 or 1).
        """
        top_N = scale_N * facts.top_N
        if self.loss == "top_label":
            log_odds_N = top_N - rest_N
            return functional.softplus(torch.where(facts.right_N, -log_odds_N, log_odds_N))
        lse_N = torch.logaddexp(top_N, rest_N)
        hard_N, smooth_N = self._weights(facts.right_N, accuracy)
        return hard_N * (lse_N - scale_N * facts.target_N) + smooth_N * (lse_N - scale_N * facts.mean_N)

    def _weights(self, right_N: Tensor, accuracy: float) -> tuple[Tensor, Tensor]:
        """Weights of the target's and of the uniform cross-entropy, per token."""
        right_N = right_N.to(torch.float32)
        wrong_N = 1.0 - right_N
        if self.loss == "selective" and self.alpha_form == "share":
            return (1.0 - self.alpha) * right_N, self.alpha * wrong_N
        if self.loss == "selective" and self.alpha_form == "added":
            return torch.ones_like(right_N), self.alpha * wrong_N
        if self.loss == "selective":
            if not 0.0 < accuracy < 1.0:
                raise ValueError(
                    f"alpha_form 'balanced': the fitted tokens are all {'right' if accuracy else 'wrong'}, so there is "
                    "nothing to balance; use alpha_form 'share'"
                )
            hard, smooth = (1.0 - self.alpha) * (1.0 - accuracy), self.alpha * accuracy
            total = hard + smooth
            return hard / total / accuracy * right_N, smooth / total / (1.0 - accuracy) * wrong_N
        smooth = {"cross_entropy": 0.0, "uniform": 1.0, "label_smoothing": self.smoothing}[self.loss]
        return torch.full_like(right_N, 1.0 - smooth), torch.full_like(right_N, smooth)


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """From hidden states to logits: the model's lm_head and what it does to its output. Frozen.

    vocab_size: real rows of a padded weight, None for all. chunk: tokens per tile.
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    soft_cap: float | None = None
    logit_scale: float = 1.0
    vocab_size: int | None = None
    chunk: int | None = None

    def __post_init__(self) -> None:
        if self.rows < 2:
            raise ValueError(f"Projection: a vocabulary of at least 2 is needed, got {self.rows}")

    @property
    def rows(self) -> int:
        """Tokens of the vocabulary."""
        return self.weight_VD.shape[0] if self.vocab_size is None else self.vocab_size

    @classmethod
    def of(cls, model: PreTrainedModel) -> Projection:
        """Of a transformers causal LM: Gemma's final_logit_softcapping, Cohere's logit_scale, Granite's logits_scaling."""
        transform, head = HeadTransform.of(model.config), model.get_output_embeddings()
        if head is None:
            raise ValueError(f"{type(model).__name__} has no lm_head; load a causal language model")
        return cls(
            weight_VD=head.weight.detach(),
            bias_V=None if head.bias is None else head.bias.detach(),
            soft_cap=transform.soft_cap,
            logit_scale=transform.logit_scale,
        )

    def problem(self, hidden_ND: Tensor, target_N: Tensor) -> Problem:
        """The operands of one pass."""
        check_operands(hidden_ND, self.weight_VD, self.bias_V)
        return Problem(
            hidden_ND=hidden_ND,
            weight_VD=self.weight_VD[: self.rows],
            bias_V=None if self.bias_V is None else self.bias_V[: self.rows],
            target_N=target_N,
            transform=Transform(self.soft_cap, self.logit_scale, None),
            tile=Tile.of(hidden_ND.device, self.chunk),
            route=route(hidden_ND, self.weight_VD),
        )


@torch.no_grad()
def facts_of(problem: Problem) -> Facts:
    """One pass over the unscaled logits."""
    n, vocab, device = len(problem.hidden_ND), problem.weight_VD.shape[0], problem.hidden_ND.device
    target_N, total_N = torch.full((n,), float("nan"), device=device), torch.zeros(n, device=device)
    best_N2 = torch.full((n, 2), float("-inf"), device=device)
    top_id_N = torch.zeros(n, dtype=torch.int64, device=device)
    for rows, columns, x_TS in _tiles(problem):
        column_T1, inside_T = problem.target_columns(rows, columns)
        target_N[rows] = torch.where(inside_T, x_TS.gather(1, column_T1)[:, 0], target_N[rows])
        total_N[rows] += x_TS.sum(1)
        two_T2 = x_TS.topk(2, dim=1).values
        first_T = x_TS.argmax(1)  # topk may name any of several largest; the first is what a greedy sampler takes
        ahead_T = two_T2[:, 0] > best_N2[rows, 0]
        top_id_N[rows] = torch.where(ahead_T, first_T + columns.start, top_id_N[rows])
        best_N2[rows] = torch.cat((best_N2[rows], two_T2), dim=1).topk(2, dim=1).values
    return Facts(target_N, best_N2[:, 0], best_N2[:, 1], total_N / vocab, top_id_N, top_id_N == problem.target_N)


def rest_log_sum_exp(scale_N: Tensor, problem: Problem, facts: Facts) -> Tensor:
    """log sum exp(s z) over the vocabulary without the top token, [N] float32, differentiable in scale_N (once)."""
    return _Rest.apply(scale_N, problem, facts)


class _Rest(torch.autograd.Function):
    """d/ds log sum exp(s z) is the mean of z under softmax(s z): found in the forward pass, kept as one number a token."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, scale_N: Tensor, problem: Problem, facts: Facts) -> Tensor:
        total_N, weighted_N = torch.zeros(2, len(scale_N), device=scale_N.device)
        for rows, columns, x_TS in _tiles(problem):
            at_T1 = (facts.top_id_N[rows] - columns.start).unsqueeze(1)
            here_T1 = (at_T1 >= 0) & (at_T1 < x_TS.shape[1])
            at_T1 = at_T1.clamp(0, x_TS.shape[1] - 1)
            # below the runner-up, whose own term is 1: the sum neither overflows nor vanishes
            x_TS.sub_(facts.runner_up_N[rows].unsqueeze(1))
            exp_TS = torch.exp(x_TS * scale_N[rows].unsqueeze(1))
            exp_TS.scatter_(1, at_T1, torch.where(here_T1, 0.0, exp_TS.gather(1, at_T1)))
            total_N[rows] += exp_TS.sum(1)
            weighted_N[rows] += exp_TS.mul_(x_TS).sum(1)
        ctx.save_for_backward(weighted_N / total_N + facts.runner_up_N)
        return total_N.log() + scale_N * facts.runner_up_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad_N,), (mean_N,) = grad_outputs, ctx.saved_tensors
        return grad_N * mean_N, None, None


def _tiles(problem: Problem) -> Iterator[tuple[slice, slice, Tensor]]:
    """(tokens, columns, logits) of every tile; the logits are overwritten by the next tile."""
    problem, n, tile = problem.widened(problem.route), len(problem.hidden_ND), problem.tile
    shape = (min(tile.tokens, n), min(tile.vocab, problem.weight_VD.shape[0]))
    buffer = padded(*shape, torch.float32, problem.hidden_ND.device)
    for columns, weight_SD in problem.blocks():
        width = columns.stop - columns.start
        for rows in token_tiles(n, tile.tokens):
            yield rows, columns, problem.logits(rows, columns, weight_SD, buffer[: rows.stop - rows.start, :width])
