"""What a run writes down beside its step metrics: held-out accuracy, the head in isolation, tokens, and who took part."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rlalign import ranks
from rlalign.config import RunConfig
from rlalign.run.parties import Parties, StepResult, verified_of
from rlalign.trainer.head_isolation import predicting
from rlalign.weights import MASTER_WEIGHT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlalign.rollout.shared import SharedEngine
    from rlalign.tracking.run_directory import Run
    from rlalign.trainer.policy import Policy

EVAL_SEED = 2**20  # far from the steps' own seeds
HEAD_TOKENS = 256  # tokens of a step on which the heads are compared in isolation


def evaluate(parties: Parties, *, samples: int) -> dict[str, float]:
    """Mean reward on the held-out prompts, `samples` completions each, sampled as in training and always with the same seeds.

    eval/accuracy: over those with a reward; NaN where none has one. eval/without_reward: the share of conversations that ended
    without one, where there are any: an accuracy that rises with it is that of the survivors.
    """
    prompts = parties.task.eval_prompts()
    rollouts = parties.sample(prompts, samples=samples, seed=EVAL_SEED)
    verified = [verified_of(r, prompts[r.group_id], parties.task) for r in rollouts]
    known = [value for value in verified if value is not None]
    found = {"eval/accuracy": sum(known) / len(known) if known else math.nan}
    if len(known) < len(verified):
        found["eval/without_reward"] = 1.0 - len(known) / len(verified)
    return found


def head_in_isolation(engine: SharedEngine, policy: Policy, result: StepResult, config: RunConfig) -> dict[str, float]:
    """The two heads on the same hidden states of this step's tokens, under the weights that both sides hold now."""
    from rlalign.trainer.head_isolation import measure, predicting

    batch = result.batch.rows(slice(0, config.trainer.micro_batch_size * 4))
    hidden, tokens = predicting(policy.hidden_states(batch), batch.token_ids_BL, batch.loss_mask_BL, limit=HEAD_TOKENS)
    with policy.whole_head():
        measured = ranks.on_first(
            lambda: measure(
                engine,
                policy.network,
                hidden,
                tokens,
                temperature=config.rollout.temperature,
                shared=Path(config.weights.shared),
                master_VD=policy.head.master_VD,
            )
        )
    return {f"head_isolated/{name}": value for name, value in measured.items()}


def log_step(
    run: Run,
    step: int,
    metrics: dict[str, float],
    result: StepResult,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: bool,
) -> None:
    """One line of metrics and when its phases ran; with `tokens` also the metrics by position and one row per sampled token."""
    run.log_timeline(result.spans)
    run.log(step, metrics if tokens else {key: value for key, value in metrics.items() if "/position" not in key})
    if tokens:
        run.log_tokens(step, token_columns(step, result, tokenizer))


def token_columns(step: int, result: StepResult, tokenizer: PreTrainedTokenizerBase) -> dict[str, list]:
    """One row per sampled token of the step, as the token files store them."""
    batch = result.batch
    rows, positions = batch.loss_mask_BL.nonzero(as_tuple=True)
    at = (rows, positions)
    token_ids = batch.token_ids_BL[at].tolist()
    rollout, old = batch.rollout_logprobs_BL[at], result.old_logprobs_BL[at]
    return {
        "step": [step] * len(token_ids),
        "sequence": rows.tolist(),
        "position": positions.tolist(),
        "token_id": token_ids,
        "token": tokenizer.convert_ids_to_tokens(token_ids),
        "rollout_logprob": rollout.tolist(),
        "old_logprob": old.tolist(),
        "log_ratio": (old - rollout).tolist(),
        "entropy": result.entropy_BL[at].tolist(),
        "policy_version": batch.policy_version_BL[at].tolist(),
        "lag": (result.version - batch.policy_version_BL[at]).tolist(),
        "kv_version": batch.kv_version_BL[at].tolist(),
        "prompt_id": batch.prompt_id_B[rows].tolist(),
        "group_id": batch.group_id_B[rows].tolist(),
        "reward": result.rewards.values_B[rows].tolist(),
        "advantage": result.advantages_BL[at].tolist(),
        "loss_mask": [True] * len(token_ids),
    }


def server_metrics(engine: SharedEngine) -> dict[str, float]:
    """Servers that have the newest weights, and requests asked for again since the start; empty for an engine of another kind.

    Call after a step's publish, on the first rank.
    """
    from rlalign.rollout.server.pool import ServerPool

    if not isinstance(engine.local, ServerPool):
        return {}
    return {"rollout/servers": float(len(engine.local.engines)), "rollout/reissued": float(engine.local.reissued)}


def participants(config: RunConfig, engine: SharedEngine, statuses: list[dict], policy: Policy) -> dict:
    """Engine, heads, trainer ranks, products of 16 bits on CPU and final version, for the summary."""
    from rlalign.head import widened

    return {
        "engine": {"name": "vllm", "version": engine.version},
        "head": {
            "mode": engine.mode,
            "dtype": config.head_dtype.value,
            "ranks": len(statuses),
            "calls": sum(s["calls"] for s in statuses),
            "trainer": {
                "ranks": ranks.world_size(),
                "mode": policy.head.mode,
                "dtype": policy.head.dtype,
                "calls": policy.head.calls,
                "multiplied": None if policy.head.multiplied is None else policy.head.multiplied.as_dict(),
                "attention": policy.attention,
                "route": policy.head.route,
                "kernel": policy.head.kernel,
                "bits": policy.head.bits,
            },
        },
        "body": None if policy.body is None else policy.body.as_dict(),
        "products": widened.state(),
        "policy_version": policy.version,
    }


TRACED_TOKENS = 64  # whose logits are looked at
UNLIKELY = 0.01  # probability under which a sampled token counts as one of low probability
_LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")


def traced(policy: Policy, result: StepResult, micro_batch_size: int) -> dict[str, float]:
    """Norms of the published weights by layer, the scale of the logits, the share of unlikely tokens. Every rank must call it.

    trace/norm/LAYER: Frobenius, "rest" is all outside the layers. trace/logit_std, logit_max: over the vocabulary, before a cap,
    the mean of some tokens, under the weights as they are now. trace/unlikely: share of the step's tokens sampled at p < 0.01.
    """
    squares: dict[str, float] = {}
    for name, weight in policy.named_weights():
        if name == MASTER_WEIGHT:  # the lm_head once more, unrounded
            continue
        found = _LAYER.search(f".{name}")
        layer = f"layer{int(found.group(1)):02d}" if found else "rest"
        squares[layer] = (
            squares.get(layer, 0.0) + float(torch.linalg.vector_norm(weight.detach(), dtype=torch.float64)) ** 2
        )
    few = result.batch.rows(slice(0, 4 * micro_batch_size))
    hidden_ND, _ = predicting(policy.hidden_states(few), few.token_ids_BL, few.loss_mask_BL, limit=TRACED_TOKENS)
    with policy.whole_head(), torch.no_grad():
        weight_VD = policy.network.get_output_embeddings().weight
        logits_NV = hidden_ND.to(weight_VD.device).float() @ weight_VD.float().T
    old_N = result.old_logprobs_BL[result.batch.loss_mask_BL]
    numbers = {
        "logit_std": logits_NV.std(1).mean(), "logit_max": logits_NV.amax(1).mean(),
        "unlikely": (old_N.exp() < UNLIKELY).double().mean(),
    }  # fmt: skip
    norms = {f"trace/norm/{layer}": total**0.5 for layer, total in sorted(squares.items())}
    return norms | {f"trace/{name}": float(value) for name, value in numbers.items()}
