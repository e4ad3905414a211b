"""What travels over vLLM's /inference/v1/generate: token ids and sampling parameters in; tokens, logprobs and versions out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from rlalign.config import RolloutConfig
from rlalign.rollout.engine.surface import group_seed, kv_spans
from rlalign.types import Rollout

UNSPEAKABLE = -9999.0  # vLLM's word for a logprob of NaN or -inf, which JSON has no number for


class Logprob(msgspec.Struct):
    logprob: float


class Logprobs(msgspec.Struct):
    content: list[Logprob]


class Span(msgspec.Struct):
    """Output tokens start..end, end exclusive, and the label of the weights that sampled them."""

    version: str
    start: int
    end: int


class Completion(msgspec.Struct):
    """One sampled sequence. weight_versions: None before vLLM 0.32."""

    index: int
    finish_reason: str
    token_ids: list[int]
    text: str
    logprobs: Logprobs
    weight_versions: list[Span] | None = None


class Generated(msgspec.Struct):
    choices: list[Completion]


ANSWER = msgspec.json.Decoder(Generated)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Some completions of one prompt: numbers first .. first + count - 1 of its group, each with a seed of its own.

    The seeds are those of the embedded engine, so that it does not matter who samples, nor how a group is cut.
    """

    prompt: tuple[int, ...]
    prompt_id: int
    group_id: int
    first: int
    count: int
    seed: int  # of the group's first completion
    max_tokens: int

    @property
    def tokens(self) -> int:
        """What it may cost: tokens that are computed at most."""
        return len(self.prompt) + self.count * self.max_tokens

    def body(self, config: RolloutConfig) -> bytes:
        """The JSON that vLLM takes; it gives sequence i of a request the seed `seed + i`."""
        return msgspec.json.encode(
            {
                "token_ids": self.prompt,
                "output_mode": "text",
                "sampling_params": {
                    "n": self.count,
                    "seed": (self.seed + self.first),
                    "temperature": config.temperature,
                    "top_p": config.top_p,
                    "top_k": config.top_k,
                    "min_p": config.min_p,
                    "max_tokens": self.max_tokens,
                    "logprobs": 0,
                },
            }
        )


def cut(
    prompts: Sequence[Sequence[int]], prompt_ids: Sequence[int], *, samples: int, seed: int, config: RolloutConfig
) -> list[Request]:
    """The requests of one `generate`: groups in order, each in pieces of rollout.samples_per_request."""
    size = config.samples_per_request or samples
    return [
        Request(
            prompt=tuple(prompt),
            prompt_id=prompt_id,
            group_id=group,
            first=first,
            count=min(size, samples - first),
            seed=group_seed(seed, group, samples),
            max_tokens=config.max_tokens,
        )
        for group, (prompt, prompt_id) in enumerate(zip(prompts, prompt_ids, strict=True))
        for first in range(0, samples, size)
    ]


def rollouts_of(
    request: Request, completions: Sequence[Completion], versions: Sequence[Sequence[int]]
) -> list[Rollout]:
    """The rollouts of one answered request. versions: of every span of every completion, as the pool read them."""
    start, found = len(request.prompt), []
    for completion, labels in zip(completions, versions, strict=True):
        tokens, logprobs = completion.token_ids, [entry.logprob for entry in completion.logprobs.content]
        spans = [
            (start + span.start, start + span.end, version)
            for span, version in zip(completion.weight_versions, labels, strict=True)
        ]
        rollout = Rollout(
            token_ids=[*request.prompt, *tokens],
            loss_mask=[False] * start + [True] * len(tokens),
            rollout_logprobs=[0.0] * start + [math.nan if p == UNSPEAKABLE else p for p in logprobs],
            prompt_id=request.prompt_id,
            group_id=request.group_id,
            finish_reason=completion.finish_reason,
            version_spans=spans,
            kv_spans=kv_spans(spans) if len(spans) < 2 else [],
            kv_recomputed=len(spans) > 1,  # a publish pauses with clear_cache
            text=completion.text,
        )
        found.append(rollout)
    return found
