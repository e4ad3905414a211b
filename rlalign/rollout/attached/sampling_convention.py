"""What the logprobs of a foreign engine mean: its logprobs mode, and the sampling parameters of a request, as a `LogprobSpec`."""

from __future__ import annotations

import math
from collections.abc import Mapping

from rlalign.types import LogprobSpec

PROCESSED = {"processed_logprobs": True, "raw_logprobs": False}
NEUTRAL = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
# Settings of a request that change the distribution a token is drawn from and that no trainer repeats.
CHANGES = {
    "presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "logit_bias": None, "bad_words": None,
    "min_tokens": 0, "structured_outputs": None, "allowed_token_ids": None, "logits_processors": None,
    "thinking_token_budget": None, "watermarking": None, "structured_outputs_regex": None,
}  # fmt: skip


def spec_of_sampling(
    params: object, *, logprobs_mode: str, head_dtype: str, defaults: Mapping[str, object] | None = None
) -> LogprobSpec:
    """The convention of logprobs that an engine returns for a request.

    params: vLLM's SamplingParams, or a mapping of the settings sent over HTTP. defaults: what the engine puts in for settings that
    a mapping leaves out (its generation_config).
    Raises ValueError for a mode that gives logits, for greedy sampling, and, where logprobs are the sampler's, for settings that a
    trainer cannot repeat (penalties, biases, bad words, structured outputs, ...).
    """
    if logprobs_mode not in PROCESSED:
        raise ValueError(
            f"this engine returns {logprobs_mode}, which are no log-probabilities; start it with logprobs_mode=processed_logprobs"
        )
    processed = PROCESSED[logprobs_mode]
    if processed:
        given = {name: _of(params, name, defaults) for name in CHANGES}
        found = [f"{name}={value!r}" for name, value in given.items() if _changes(value, CHANGES[name])]
        if found:
            raise ValueError(
                f"sampling with {', '.join(found)}: its logprobs are of a distribution that no trainer computes, so that comparing "
                "them would count the setting as mismatch. Leave it out of the requests you train on (set it to its neutral value "
                "where the model's generation_config.json brings it in)"
            )
    values = {name: _of(params, name, defaults) for name in NEUTRAL}
    plain = {name: NEUTRAL[name] if value is None else value for name, value in values.items()}
    temperature = float(plain["temperature"])
    if processed and not 0.0 < temperature < math.inf:
        raise ValueError(
            f"sampling at temperature {temperature:g}: greedy tokens are drawn from no distribution; sample above 0"
        )
    top_k = max(0, int(plain["top_k"]))  # -1 is none, too
    return LogprobSpec(
        temperature=temperature, top_p=float(plain["top_p"]), top_k=top_k, min_p=float(plain["min_p"]),
        processed=processed, head_dtype=head_dtype,
    )  # fmt: skip


def _of(params: object, name: str, defaults: Mapping[str, object] | None) -> object:
    if isinstance(params, Mapping):
        found = params.get(name)
        return (defaults or {}).get(name) if found is None else found
    return getattr(params, name, None)


def _changes(value: object, neutral: object) -> bool:
    return value is not None and value != neutral and value not in ({}, [], False)
