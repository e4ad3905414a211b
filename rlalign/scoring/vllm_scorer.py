"""VLLMScorer: reward models in vLLM's offline engine, described as the engine describes them.

    scorer = VLLMScorer.start("my/reward-model")
    result = scorer.score("What is 2 + 2? ", ["4", "5"], ScoringParams(return_pooled_hidden_states=True))

States before the head come back beside the scores by a hook on the workers (vLLM's `worker_extension_cls`): vLLM offers no way to
ask for both (vllm-project/vllm#20624). It goes when vLLM's pooling output carries hidden states itself.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol, Self, cast

import numpy as np
import torch

from rlalign.rollout import versions
from rlalign.scoring.hf.describe import activation_of, label_names
from rlalign.scoring.hf.model_loading import folder_facts, template_digest
from rlalign.scoring.params import ModelInfo, PoolerDefaults, ScoringParams, Task
from rlalign.scoring.result import Answer, score_result
from rlalign.scoring.scorer import Scoring, checked_inputs
from rlalign.scoring.sequences import Sequencer, TokenSequence

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase
    from vllm import LLM, PoolingParams, PoolingRequestOutput, RequestOutput
    from vllm.config.model import ModelDType
    from vllm.model_executor.layers.pooler.seqwise.heads import ClassifierPoolerHead
    from vllm.tasks import PoolingTask
    from vllm.v1.pool.metadata import PoolingMetadata

    from rlalign.scoring.hf.model_loading import FolderFacts
    from rlalign.scoring.result import ScoreResult
    from rlalign.scoring.scorer import Text


__all__ = ["PreparedVLLM", "VLLMScorer"]

WITH_STATE = "rlalign_with_state"  # key in PoolingParams.extra_kwargs of a request that wants its state
EXTENSION = f"{__name__}.PoolingWorkerExtension"


class _Worker(Protocol):
    """What vLLM's worker, into whose bases the extension goes, has."""

    rank: int

    def get_model(self) -> torch.nn.Module: ...


class PoolingWorkerExtension:
    """RPCs that rlalign adds to the workers of a pooling engine."""

    def rlalign_open_pooler(self: _Worker) -> dict[str, Any]:
        """Let this rank's classification head give states to the requests that ask for them. Idempotent.

        Returns {"rank", "opened", "reason"}: opened is False where this model has no state in front of a head.
        """
        head = _classifier_head(self.get_model())
        if isinstance(head, str):
            return {"rank": self.rank, "opened": False, "reason": head}
        if append_states not in head._forward_hooks.values():
            head.register_forward_hook(append_states)
        return {"rank": self.rank, "opened": True, "reason": ""}


def _classifier_head(model: torch.nn.Module) -> ClassifierPoolerHead | str:
    """The head that turns one pooled state into logits, or why there is none."""
    from vllm.model_executor.layers.pooler.seqwise.heads import ClassifierPoolerHead

    pooler = model.pooler
    tasks = getattr(pooler, "poolers_by_task", {})  # only a dispatching pooler has them
    head = getattr(tasks.get("classify"), "head", None)
    if not isinstance(head, ClassifierPoolerHead):
        return f"{type(model).__name__} has no head over one pooled state (its pooler is {type(pooler).__name__})"
    if head.classifier is None:
        return f"{type(model).__name__} computes its scores before pooling, so the pooled vector is already the score"
    return head


def append_states(
    head: ClassifierPoolerHead, inputs: tuple[torch.Tensor | list[torch.Tensor], PoolingMetadata], scores: torch.Tensor
) -> torch.Tensor | list[torch.Tensor]:
    """Forward hook: [K] scores become float32 [K + D], scores then state, for requests that asked; others stay untouched."""
    states, metadata = inputs
    asked = [bool((params.extra_kwargs or {}).get(WITH_STATE)) for params in metadata.pooling_params]
    if not any(asked):
        return scores
    return [
        torch.cat([score.float(), state.float()]) if wanted else score
        for score, state, wanted in zip(scores, states, asked, strict=True)
    ]


POOLING_TASKS: tuple[Task, ...] = ("classify", "token_classify", "embed", "token_embed")


def engine_info(
    llm: LLM,
    tokenizer: PreTrainedTokenizerBase | None,
    opened: list[dict[str, Any]] | None,
    facts: FolderFacts,
) -> ModelInfo:
    """opened: each rank's answer to `rlalign_open_pooler`; None where the engine has no extension of ours.

    Raises ValueError on an engine whose task is none of ours, RuntimeError where ranks disagree.
    """
    config = llm.model_config
    hf_config = config.hf_config
    task = _task(llm)
    labels = (hf_config.num_labels or 0) if task in ("classify", "token_classify") else 0
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
        template_sha256=template_digest(tokenizer),
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
    task: Task, architecture: str, causal: bool, opened: list[dict[str, Any]] | None
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


OLDEST = (0, 32)


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedVLLM:
    """One request: resolved parameters, one token sequence an item, a judge's labels of each item."""

    params: ScoringParams
    sequences: list[TokenSequence]
    labels: list[list[int]]

    @property
    def num_tokens(self) -> int:
        """Tokens that the engine will be given; its prefix cache may save some."""
        return sum(map(len, self.sequences))


class VLLMScorer(Scoring[PreparedVLLM]):
    """Scores through one offline vLLM engine. Raw logits; vLLM's own default, the activated score, needs use_activation=True.

    Whatever the engine's PoolerConfig does to a logit (`logit_mean`, `logit_sigma`) is part of `scores` and taken back in
    `logits`; `info.already_calibrated` then refuses a second calibration. A request that fails inside vLLM becomes an error
    of its item: vLLM's own `LLM.score` gives 0.0 for it.
    """

    def __init__(self, llm: LLM) -> None:
        """Take over a running engine. States before the head need one that `VLLMScorer.start` made."""
        import vllm

        read = None if llm.model_config.skip_tokenizer_init else llm.get_tokenizer()
        self.tokenizer = cast("PreTrainedTokenizerBase | None", read)
        extended = llm.llm_engine.vllm_config.parallel_config.worker_extension_cls == EXTENSION
        _require_errors(vllm.__version__)
        pools = llm.runner_type == "pooling"
        opened = llm.collective_rpc("rlalign_open_pooler") if extended and pools else None
        facts = folder_facts(llm.model_config.model, llm.model_config.revision)
        self.info = engine_info(llm, self.tokenizer, opened, facts)
        self._llm: LLM | None = llm
        self._lock = threading.Lock()
        self._sequencer = Sequencer(
            self.tokenizer,
            pairs=not self.info.causal,
            max_length=self.info.max_length,
            model=self.info.id,
            side=facts.side or "right",  # vLLM gives every pooling model's tokenizer the right side
            prompt=facts.prompt,
        )

    @classmethod
    def start(
        cls,
        path: str | Path,
        *,
        task: Task = "classify",
        dtype: ModelDType = "auto",
        pooler_config: dict[str, Any] | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int = 64,
        enforce_eager: bool = True,
        tensor_parallel_size: int = 1,
        gpu_memory_utilization: float = 0.9,
        cpu_kv_cache_gib: int = 1,
        seed: int = 0,
    ) -> Self:
        """Start an engine on a Hugging Face folder, in this process where vLLM's environment does not say otherwise.

        task: "generative" for a judge. pooler_config: of vLLM, such as a calibrator's `to_vllm_pooler_config()`.
        """
        from rlalign.rollout.engine.embedded import EMBEDDED_ENVIRONMENT

        for name, value in EMBEDDED_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(cpu_kv_cache_gib))
        if enforce_eager:  # vLLM would compile a helper for seconds at a judge's first request
            os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        from vllm import LLM
        from vllm.config import PoolerConfig

        judge = task == "generative"
        return cls(
            LLM(
                model=str(path),
                runner="generate" if judge else "pooling",
                pooler_config=None if judge else PoolerConfig(task=cast("PoolingTask", task), **(pooler_config or {})),
                dtype=dtype,
                max_model_len=max_model_len,
                max_num_seqs=max_num_seqs,
                enforce_eager=enforce_eager,
                tensor_parallel_size=tensor_parallel_size,
                gpu_memory_utilization=gpu_memory_utilization,
                seed=seed,
                worker_extension_cls=EXTENSION,
                disable_log_stats=True,
                use_tqdm_on_load=False,
            )
        )

    def prepare(self, query: Text, items: Text | Sequence[Text], params: ScoringParams | None = None) -> PreparedVLLM:
        """Check a request and tokenise it. Raises ValueError before any computation."""
        resolved = (params or ScoringParams()).verify(self.info)
        query, listed = checked_inputs(query, items, self.info.vocab_size)
        labels = resolved.label_ids(len(listed)) if resolved.task == "generative" else []
        return PreparedVLLM(
            params=resolved, sequences=self._sequencer.sequences(query, listed, resolved), labels=labels
        )

    def run(self, requests: Sequence[PreparedVLLM]) -> list[ScoreResult]:
        """Score prepared requests in one batch of vLLM's. Raises whatever vLLM raises when the engine itself is down."""
        outputs = iter(self._outputs(requests))
        results = []
        for request in requests:
            answers = [
                self._answer(request, i, output) for i, output in enumerate(islice(outputs, len(request.sequences)))
            ]
            results.append(score_result(answers, request.params, self.info))
        return results

    def close(self) -> None:
        """Stop the engine. Safe to call twice.

        Engines inside one process share vLLM's process groups: closing one ends the others too.
        """
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None

    # --- inside ---

    def _outputs(self, requests: Sequence[PreparedVLLM]) -> list[PoolingRequestOutput] | list[RequestOutput]:
        from vllm import SamplingParams

        if self._llm is None:
            raise RuntimeError(f"{self.info.id}: this scorer's engine is closed")
        prompts, wanted = [], []
        for request in requests:
            for i, sequence in enumerate(request.sequences):
                prompts.append({"prompt_token_ids": [*sequence.shared, *sequence.own]})
                if request.params.task == "generative":
                    ids = request.labels[i]
                    wanted.append(
                        SamplingParams(
                            max_tokens=1, temperature=1.0, logprobs=len(ids), logprob_token_ids=ids, detokenize=False
                        )
                    )
                else:
                    wanted.append(_pooling(request.params, sequence))
        if not prompts:
            return []
        with self._lock:
            if self.info.tasks == ("generative",):
                outputs = self._llm.generate(prompts, wanted, use_tqdm=False)
            else:
                task = cast("PoolingTask", self.info.tasks[0])
                outputs = self._llm.encode(prompts, wanted, pooling_task=task, use_tqdm=False)
        if len(outputs) != len(prompts):
            raise RuntimeError(f"vLLM answered {len(outputs)} of {len(prompts)} items")
        return outputs

    def _answer(self, request: PreparedVLLM, index: int, output: PoolingRequestOutput | RequestOutput) -> Answer:
        sequence = request.sequences[index]
        facts = Answer(prompt_tokens=len(sequence), truncated=sequence.truncated)
        if request.params.task == "generative":
            return _judged(cast("RequestOutput", output), request.labels[index], facts)
        pooled = cast("PoolingRequestOutput", output)
        if pooled.error is not None:
            return replace(facts, error=f"vLLM: {pooled.error.message}")
        values, state = pooled.outputs.data.float(), None
        if request.params.return_pooled_hidden_states:
            columns = self.info.num_labels
            if values.shape != (columns + self.info.hidden_size,):
                raise RuntimeError(
                    f"asked for {columns} scores and a state of {self.info.hidden_size}, vLLM's pooler returned "
                    f"{tuple(values.shape)}: its head no longer carries rlalign's hook"
                )
            values, state = values[:columns], values[columns:].clone()
        pooler = self.info.pooler
        if self.info.already_calibrated:  # the engine's affine map is undone; `scores` apply it again, or another one
            values = values.double() * (pooler.logit_sigma or 1.0) + (pooler.logit_mean or 0.0)
        return replace(facts, values=values.numpy().astype(np.float32), state=state)


def _require_errors(version: str) -> None:
    """Raise RuntimeError on a vLLM that this was not run on; on an older one a failed request might pass for a score."""
    versions.require_supported(version)
    if versions.parse(version) < OLDEST:
        raise RuntimeError(
            f"VLLMScorer needs vLLM {OLDEST[0]}.{OLDEST[1]} or newer, got {version}: it was not shown on older ones that a failed "
            "request is told from a score. Use HTTPScorer or HFScorer there"
        )


def _pooling(params: ScoringParams, sequence: TokenSequence) -> PoolingParams:
    """vLLM's PoolingParams of one item. Activations and cuts happen here, in the same arithmetic for every backend."""
    from vllm import PoolingParams

    extra: dict[str, bool | int] = {}
    if params.return_pooled_hidden_states:
        extra[WITH_STATE] = True
    if sequence.type_ids is not None and 1 in sequence.type_ids:
        extra["compressed_token_type_ids"] = sequence.type_ids.index(1)
    return PoolingParams(
        task=cast("PoolingTask", params.task),
        use_activation=False,
        step_tag_id=params.step_tag_id,
        returned_token_ids=params.returned_token_ids,
        skip_reading_prefix_cache=params.skip_reading_prefix_cache,
        extra_kwargs=extra or None,
    )


def _judged(output: RequestOutput, labels: list[int], facts: Answer) -> Answer:
    completion = output.outputs[0] if output.outputs else None
    if completion is None or not completion.logprobs or completion.finish_reason in ("error", "abort"):
        reason = "no completion" if completion is None else f"finished with {completion.finish_reason!r}"
        return replace(facts, error=f"vLLM: {reason}, without the labels' log-probabilities")
    found = completion.logprobs[0]
    if missing := [token for token in labels if token not in found]:
        return replace(facts, error=f"vLLM: no log-probability of label tokens {missing}")
    return replace(facts, values=np.array([found[token].logprob for token in labels], np.float32))
