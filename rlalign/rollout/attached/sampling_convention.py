"""What the logprobs of a foreign engine mean: its logprobs mode, and the sampling parameters of a request, as a `LogprobSpec`."""

from __future__ import annotations

import math
from collections.abc import Mapping

from rlalign.types import LogprobSpec

PROCESSED = {"processed_logprobs": True, "raw_logprobs": False}


def spec_of_sampling(
    params: object, *, logprobs_mode: str, head_dtype: str, defaults: Mapping[str, object] | None = None
) -> LogprobSpec:
    """The convention of logprobs that an engine returns for a request.

    params: vLLM's SamplingParams, or a mapping of the settings sent over HTTP. defaults: what the engine puts in for settings that
    a mapping leaves out (its generation_config).
    Raises ValueError for a mode that gives logits, and for greedy sampling where logprobs are the sampler's.
    """
    if logprobs_mode not in PROCESSED:
        raise ValueError(
            f"this engine returns {logprobs_mode}, which are no log-probabilities; start it with logprobs_mode=processed_logprobs"
        )
    if isinstance(params, Mapping):
        params = {**(defaults or {}), **{name: value for name, value in params.items() if value is not None}}
    spec = LogprobSpec.of_sampling(params, processed=PROCESSED[logprobs_mode], head_dtype=head_dtype)
    if spec.processed and not 0.0 < spec.temperature < math.inf:
        raise ValueError(
            f"sampling at temperature {spec.temperature:g}: greedy tokens are drawn from no distribution; sample above 0"
        )
    return spec
