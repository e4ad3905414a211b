"""What a running vLLM engine says of the reward model it serves, as a ModelInfo; and how its scores arrive."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from rlalign.scoring.hf.describe import activation_of, label_names
from rlalign.scoring.model_info import ModelInfo, PoolerDefaults, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from vllm import LLM

    from rlalign.scoring.hf.folder import FolderFacts

POOLING_TASKS: tuple[Task, ...] = ("classify", "token_classify", "embed", "token_embed")


def engine_info(
    llm: LLM,
    tokenizer: PreTrainedTokenizerBase | None,
    opened: list[dict[str, object]] | None,
    facts: FolderFacts,
) -> ModelInfo:
    """opened: each rank's answer to `rlalign_open_pooler`; None where the engine has no extension of ours.

    Raises ValueError on an engine whose task is none of ours, RuntimeError where ranks disagree.
    """
    config = llm.model_config
    hf_config = config.hf_config
    task = _task(llm)
    labels = hf_config.num_labels if task in ("classify", "token_classify") else 0
    causal = config.attn_type == "decoder"
    exposes, reason = _hidden_states(task, config.architecture, causal, opened)
    pooler = config.pooler_config
    mean, sigma = (None, None) if pooler is None else (pooler.logit_mean, pooler.logit_sigma)
    return ModelInfo(
        id=str(config.served_model_name or config.model),
        revision=config.revision,
        architecture=config.architecture,
        tasks=(task,),
        vocab_size=config.get_vocab_size(),
        hidden_size=config.get_hidden_size(),
        num_labels=labels,
        activation=facts.activation or activation_of(hf_config, labels),
        labels=label_names(hf_config, labels),
        max_length=config.max_model_len - (task == "generative"),  # a judge needs room for the token it is asked about
        dtype=str(config.dtype).removeprefix("torch."),
        head_dtype=str(config.head_dtype).removeprefix("torch."),
        causal=causal,
        exposes_hidden_states=exposes,
        hidden_states_reason=reason,
        packing_reason="vLLM runs one sequence an item; the shared query comes from its prefix cache",
        matryoshka_dimensions=tuple(config.matryoshka_dimensions or ()) if config.is_matryoshka else None,
        pooler=PoolerDefaults()
        if pooler is None
        else PoolerDefaults(
            pooling=pooler.seq_pooling_type,
            token_pooling=pooler.tok_pooling_type,
            use_activation=pooler.use_activation,
            dimensions=pooler.dimensions,
            step_tag_id=pooler.step_tag_id,
            returned_token_ids=None if pooler.returned_token_ids is None else tuple(pooler.returned_token_ids),
            logit_mean=mean,
            logit_sigma=sigma,
        ),
        template_sha256=_template_digest(tokenizer),
        already_calibrated=mean is not None or sigma is not None,
    )


def _task(llm: LLM) -> Task:
    if llm.runner_type == "generate":
        if llm.model_config.logprobs_mode not in ("raw_logprobs", "processed_logprobs"):
            raise ValueError(
                f"a judge needs log-probabilities, but this engine returns {llm.model_config.logprobs_mode}: start it with "
                "logprobs_mode='raw_logprobs'"
            )
        return "generative"
    if llm.pooling_task not in POOLING_TASKS:
        raise ValueError(
            f"this engine pools for {llm.pooling_task!r}; a scorer needs one of {', '.join(POOLING_TASKS)} "
            "(PoolerConfig(task=...)), or a generating engine for a judge"
        )
    return llm.pooling_task


def _hidden_states(
    task: Task, architecture: str, causal: bool, opened: list[dict[str, object]] | None
) -> tuple[bool, str]:
    """(exposed, why not)."""
    if task == "generative":
        return False, f"{architecture} is a CausalLM: it has no score head, so no state that belongs to a score"
    if task != "classify":
        return False, f"a {task} engine has no score per item to have a state for"
    if not causal:
        return False, "this cross-encoder pools inside its own head and exposes no state before it"
    if opened is None:
        return False, "this engine was started without rlalign's worker extension; use VLLMScorer.start(path)"
    closed = [f"rank {rank['rank']}: {rank['reason']}" for rank in opened if not rank["opened"]]
    if closed and len(closed) < len(opened):
        raise RuntimeError(
            f"{len(closed)} of {len(opened)} vLLM ranks could not open their pooler: {'; '.join(closed)}"
        )
    return not closed, "; ".join(closed[:1])


def _template_digest(tokenizer: PreTrainedTokenizerBase | None) -> str | None:
    template = None if tokenizer is None else tokenizer.chat_template
    return hashlib.sha256(template.encode()).hexdigest() if isinstance(template, str) else None
