"""What every rollout engine does alike, inside this process or behind HTTP."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rlalign.config import RolloutConfig
from rlalign.types import LogprobSpec

if TYPE_CHECKING:
    from torch import Tensor
    from vllm import RequestOutput, SamplingParams

EMBEDDED = "embedded"  # the name of the one engine inside this process; a server's is its url


def spec_of(config: RolloutConfig, head_dtype: str, *, vocab_size: int = 0) -> LogprobSpec:
    """What the logprobs of a run's rollouts mean. vocab_size: ids from here on are barred; 0: none."""
    return LogprobSpec(
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        min_p=config.min_p,
        processed=True,
        head_dtype=head_dtype,
        vocab_size=vocab_size,
    )


def captured_ids(config: RolloutConfig) -> int:
    """How many of the likeliest ids the engine reports with each token; 0 where nothing is truncated, or nothing to be captured.

    One more than the largest set: a set is whole where the engine says -inf of at least one id beside it.
    """
    if not (config.top_p < 1.0 or config.top_k or config.min_p) or not config.capture_ids:
        return 0
    return min(config.capture_ids, config.top_k or config.capture_ids) + 1


def group_seed(seed: int, group: int, samples: int) -> int:
    """The seed of a group's first completion; vLLM gives its i-th one the seed + i."""
    return (seed * 1_000_003 + group * samples) % 2**31


def require_room(prompts: Sequence[Sequence[int]], prompt_ids: Sequence[int], config: RolloutConfig) -> None:
    """Raise ValueError for a prompt that leaves no room in the context."""
    room = config.max_model_len - config.max_tokens
    for prompt, prompt_id in zip(prompts, prompt_ids, strict=True):
        if not 0 < len(prompt) <= room:
            raise ValueError(
                f"prompt {prompt_id} has {len(prompt)} tokens; with rollout.max_tokens={config.max_tokens} and "
                f"rollout.max_model_len={config.max_model_len} it must have 1 to {room}"
            )


@contextmanager
def compared_in(shared: Path, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """A safetensors file of these tensors that workers can read, gone at the end: for RPCs that compare and load nothing."""
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory(prefix="rlalign-compare-", dir=shared) as directory:
        Path(directory).chmod(0o755)  # workers may run as somebody else
        file = Path(directory) / "weights.safetensors"
        save_file(dict(tensors), file)
        yield str(file)


def forcing() -> SamplingParams:
    """vLLM's parameters for logprobs of given tokens, in one prefill; it applies no temperature to them."""
    from vllm import SamplingParams

    return SamplingParams(max_tokens=1, temperature=1.0, prompt_logprobs=0, detokenize=False)


def of_prompt(output: RequestOutput, ids: Sequence[int]) -> list[float]:
    """Those logprobs: entry t about token t, entry 0 is 0.0."""
    return [0.0] + [entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], ids[1:], strict=True)]


def labelled(answer: object, rank: int, engine: str, method: str) -> dict:
    """A worker's answer with where it came from. Raises RuntimeError when it is no dict: HTTP would make a string of it."""
    if not isinstance(answer, dict):
        raise RuntimeError(
            f"{engine}, rank {rank}: {method} answered {type(answer).__name__}; worker RPCs return dicts"
        )
    return {"rank": rank, **answer, "engine": engine}


def kv_spans(version_spans: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Which version computed the keys and values of each position, given which sampled each token.

    A position's keys are computed in the step that samples the next token, a prompt's in the step of the first; an update in
    flight leaves them. A request that vLLM preempted since then recomputed them: the age that follows is an upper bound.
    """
    found = []
    reached = 0
    for _, end, version in version_spans:
        if end - 1 > reached:
            found.append((reached, end - 1, version))
            reached = end - 1
    return found
