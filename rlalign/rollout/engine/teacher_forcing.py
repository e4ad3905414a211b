"""Given tokens through the live engine, on the path of prefilling or of decoding, with every activation recorded; and what it
holds, looked at without changing it. Suffixes: B sequences, L padded length.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from enum import Enum
from pathlib import Path

import torch
from torch import Tensor
from vllm import RequestOutput, SamplingParams

from rlalign.rollout.engine.embedded import VLLMEngine
from rlalign.rollout.engine.surface import compared_in
from rlalign.rollout.worker.capture import FORCED_KEY, SEQUENCE_KEY
from rlalign.rollout.worker.recording import Recording, Tap
from rlalign.types import RolloutBatch
from rlalign.weights import MASTER_WEIGHT

FREQUENCIES = "rotary frequencies"


class Route(Enum):
    """How the engine comes to the numbers: all tokens of a sequence in one forward, or one after another."""

    prefill = "prefill"
    decode = "decode"


@dataclass(frozen=True, slots=True)
class Forced:
    """What the engine did with given tokens. logprobs_BL: nats, 0.0 outside the loss mask."""

    recording: Recording
    logprobs_BL: Tensor


def modules(engine: VLLMEngine) -> dict[str, str]:
    """{name: class} of the engine's modules on its first rank."""
    return engine.ask("rlalign_modules")[0]["modules"]


def record(
    engine: VLLMEngine, batch: RolloutBatch, taps: Sequence[Tap], directory: Path, *, route: Route, alone: bool = False
) -> Forced:
    """Teacher-force the batch and record the taps under `directory`.

    Prefilling scores at temperature 1 (vLLM applies none to prompt logprobs), decoding at the engine's own temperature.
    alone: one sequence at a time. Raises RuntimeError when the engine is compiled or its model runner unknown.
    """
    rows = range(len(batch))
    engine.reset_prefix_cache()
    engine.ask("rlalign_capture_start", str(directory), [astuple(tap) for tap in taps])
    try:
        requests = [_request(engine, batch, i, route) for i in rows]
        groups = [[i] for i in rows] if alone else [list(rows)]
        logprobs_BL = torch.zeros(batch.token_ids_BL.shape)
        for group in groups:
            outputs = engine.request([requests[i][0] for i in group], [requests[i][1] for i in group])
            for i, output in zip(group, outputs, strict=True):
                _place(logprobs_BL[i], output, batch.loss_mask_BL[i], batch.token_ids_BL[i].tolist(), route)
    finally:
        engine.ask("rlalign_capture_stop")
    return Forced(Recording(directory), logprobs_BL)


def _request(engine: VLLMEngine, batch: RolloutBatch, i: int, route: Route) -> tuple[list[int], SamplingParams]:
    """Prompt and parameters of one sequence. Decoding starts at its first scored token."""
    tokens = batch.token_ids_BL[i][batch.attention_mask_BL[i]].tolist()
    extra: dict[str, object] = {SEQUENCE_KEY: i}
    if route is Route.prefill:
        params = SamplingParams(max_tokens=1, temperature=1.0, prompt_logprobs=0, detokenize=False, extra_args=extra)
        return tokens, params
    start = int(batch.loss_mask_BL[i].int().argmax())
    forced = tokens[start:]
    extra[FORCED_KEY] = forced
    params = SamplingParams(
        max_tokens=len(forced),
        temperature=engine.spec.temperature,
        logprobs=0,
        ignore_eos=True,
        detokenize=False,
        extra_args=extra,
    )
    return tokens[:start], params


def _place(logprobs_L: Tensor, output: RequestOutput, mask_L: Tensor, tokens: Sequence[int], route: Route) -> None:
    """Write the engine's logprobs of the scored tokens. Raises RuntimeError when it decoded other tokens than those forced."""
    for t in mask_L.nonzero()[:, 0].tolist():
        if route is Route.prefill:
            entry = output.prompt_logprobs[t]
        else:
            entry = output.outputs[0].logprobs[t - len(output.prompt_token_ids)]
        if tokens[t] not in entry:
            raise RuntimeError(f"the engine decoded token {list(entry)} at position {t} where {tokens[t]} was forced")
        logprobs_L[t] = entry[tokens[t]].logprob


def differing_weights(
    engine: VLLMEngine, weights: Iterable[tuple[str, Tensor]], *, shared: Path
) -> dict[int, list[str]]:
    """{rank: one line for every weight that this rank does not compute with}; empty lists where all are equal.

    weights: Hugging Face names and full tensors, as for a publish. Sampled columns of every row, through the kernels.
    """
    tensors = {n: t.detach().cpu().contiguous() for n, t in weights if n != MASTER_WEIGHT}
    with compared_in(shared, tensors) as file:
        return {answer["rank"]: answer["problems"] for answer in engine.ask("rlalign_unlanded", file)}


def constants(engine: VLLMEngine) -> dict[str, list[float]]:
    """{module or FREQUENCIES: values} of the first rank: the epsilon of every norm, and what positions are rotated by."""
    answer = engine.ask("rlalign_constants")[0]
    rotary = {FREQUENCIES: answer["frequencies"]} if answer["frequencies"] else {}
    return {name: [epsilon] for name, epsilon in answer["epsilons"].items()} | rotary
