"""train(): put the real parties together and run the steps."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rlalign.config import RunConfig, to_plain
from rlalign.loop import Parties, StepResult, train_step

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlalign.rollout.engine import VLLMEngine
    from rlalign.tasks import Task
    from rlalign.tracking.console import Progress
    from rlalign.tracking.run import Run
    from rlalign.trainer.policy import Policy

EVAL_SEED = 2**20  # far from the steps' own seeds
HEAD_TOKENS = 256  # tokens of a step on which the heads are compared in isolation


def train(config: RunConfig) -> dict:
    """Run the configuration to its end and return the summary, which is also in the run directory.

    The directory holds everything up to the last whole step, however the run ends. Raises ValueError for input that cannot
    be used, RuntimeError when the two engines break their contract, MismatchLimitError when the gate stops the run.
    """
    from rlalign.tracking.console import Progress
    from rlalign.tracking.report import write_report
    from rlalign.tracking.run import Run

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    directory = Path(config.output_dir)
    progress = Progress(config.steps)
    run = Run(
        directory,
        config=to_plain(config),
        wandb_mode=config.tracking.wandb,
        project=config.tracking.project,
        name=config.name,
        overwrite=config.overwrite,
    )
    try:
        with run, progress:
            summary = _run(config, run, progress)
    finally:
        report = write_report([directory], directory / "report.html")
    progress.final_table(summary, report)
    return summary


def _run(config: RunConfig, run: Run, progress: Progress) -> dict:
    model = resolve_model(config.model.path, progress)
    tokenizer = load_tokenizer(model)
    task = load_task_of(config)
    progress.stage("starting vLLM")
    engine = _start_engine(model, config)
    try:
        progress.stage("starting DeepSpeed")
        policy = _start_policy(model, config)
        try:
            return _steps(config, run, progress, engine, policy, task, tokenizer)
        finally:
            policy.close()
    finally:
        engine.close()


def _steps(
    config: RunConfig,
    run: Run,
    progress: Progress,
    engine: VLLMEngine,
    policy: Policy,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
) -> dict:
    from rlalign.tracking.summary import summarize
    from rlalign.weights import publish

    parties = Parties(
        engine=engine,
        trainer=policy,
        task=task,
        publish=partial(publish, receiver=engine, shared=Path(config.weights.shared)),
        encode=partial(encode, tokenizer, chat=config.task.chat_template),
        pad_token_id=tokenizer.pad_token_id,
    )
    parties.publish(policy.named_weights(), policy.version)  # both sides loaded the same folder: now it is proved
    rows, samples = [], config.tracking.eval_samples
    for step in range(config.steps):
        accuracy = (
            {"eval/accuracy": evaluate(parties, samples=samples)} if step % config.tracking.eval_every == 0 else {}
        )
        result = train_step(step, parties, config)
        for warning in result.warnings:
            run.event("mismatch", warning)
        metrics = accuracy | result.metrics
        if config.mismatch.head_every and step % config.mismatch.head_every == 0:
            metrics |= head_in_isolation(engine, policy, result, config)
        if step == config.steps - 1:
            # The final weights; every earlier row evaluates those before its step.
            metrics["eval/accuracy"] = evaluate(parties, samples=samples)
        rows.append({"step": step, **metrics})
        _record(run, step, metrics, result, config, tokenizer)
        progress.step(step, metrics)
    summary = summarize(rows) | _who(config, engine, policy)
    run.log_head_status(engine.status())
    run.finish(summary)
    return summary


def evaluate(parties: Parties, *, samples: int) -> float:
    """Mean reward on the held-out prompts, `samples` completions each, sampled as in training and always with the same seeds."""
    prompts = parties.task.eval_prompts()
    rollouts = parties.engine.generate(
        [parties.encode(p.text) for p in prompts],
        prompt_ids=[p.prompt_id for p in prompts],
        samples=samples,
        seed=EVAL_SEED,
    )
    return sum(parties.task.reward(prompts[r.group_id], r.text) for r in rollouts) / len(rollouts)


def head_in_isolation(engine: VLLMEngine, policy: Policy, result: StepResult, config: RunConfig) -> dict[str, float]:
    """The two heads on the same hidden states of this step's tokens, under the weights that both sides hold now."""
    from rlalign.diagnose.head_isolation import measure, predicting

    batch = result.batch.rows(slice(0, config.trainer.micro_batch_size * 4))
    hidden, tokens = predicting(policy.hidden_states(batch), batch.token_ids_BL, batch.loss_mask_BL, limit=HEAD_TOKENS)
    measured = measure(
        engine,
        policy.network,
        hidden,
        tokens,
        temperature=config.rollout.temperature,
        shared=Path(config.weights.shared),
    )
    return {f"head_isolated/{name}": value for name, value in measured.items()}


def resolve_model(path: str, progress: Progress | None = None) -> Path:
    """The folder of a model: a local Hugging Face folder, or the tiny policy named tiny:untied or tiny:tied."""
    if path.startswith("tiny:"):
        from rlalign.tiny_policy import cached_policy

        return cached_policy(path.removeprefix("tiny:"), report=progress.stage if progress else print)
    folder = Path(path).expanduser()
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"model.path={path!r} is not a Hugging Face folder (no config.json there). Give a local folder with config.json, "
            "weights and tokenizer, or tiny:untied / tiny:tied for the built-in demo policy."
        )
    return folder


def load_tokenizer(model: Path) -> PreTrainedTokenizerBase:
    """The folder's tokenizer. Raises ValueError when its ids do not fit the model's vocabulary."""
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    size = AutoConfig.from_pretrained(model).vocab_size
    largest = max(tokenizer.get_vocab().values())
    if largest >= size:
        raise ValueError(
            f"{model}: the tokenizer has token ids up to {largest}, the model only {size} rows of embeddings; "
            "tokenizer and checkpoint do not belong together"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise ValueError(f"{model}: the tokenizer has neither a pad nor an eos token; rollouts cannot end")
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerBase, text: str, *, chat: bool) -> list[int]:
    """Token ids of a prompt, in the tokenizer's chat template when asked."""
    if not chat:
        return tokenizer.encode(text)
    message = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)


def load_task_of(config: RunConfig) -> Task:
    """The configured task."""
    from rlalign.tasks import load_task

    c = config.task
    return load_task(c.name, dict(c.params), train_size=c.train_size, eval_size=c.eval_size, seed=c.seed)


def _start_engine(model: Path, config: RunConfig) -> VLLMEngine:
    from rlalign.rollout.engine import VLLMEngine

    return VLLMEngine(
        model, config.rollout, dtype=config.model.dtype.value, head_dtype=config.head_dtype.value, seed=config.seed
    )


def _start_policy(model: Path, config: RunConfig) -> Policy:
    from rlalign.trainer.policy import Policy

    return Policy(
        model,
        config.trainer,
        config.algo,
        dtype=config.model.dtype.value,
        head_dtype=config.head_dtype.value,
        temperature=config.rollout.temperature,
        seed=config.seed,
    )


def _record(
    run: Run,
    step: int,
    metrics: dict[str, float],
    result: StepResult,
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    run.log(step, metrics)
    every = config.tracking.tokens_every
    if every and (step % every == 0 or step == config.steps - 1):
        columns = token_columns(step, result, tokenizer)
        run.log_tokens(step, columns)
        run.log_histogram(step, "mismatch/log_ratio", columns["log_ratio"])


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
        "policy_version": batch.policy_version_B[rows].tolist(),
        "prompt_id": batch.prompt_id_B[rows].tolist(),
        "group_id": batch.group_id_B[rows].tolist(),
        "reward": result.rewards_B[rows].tolist(),
        "advantage": result.advantages_BL[at].tolist(),
        "loss_mask": [True] * len(token_ids),
    }


def _who(config: RunConfig, engine: VLLMEngine, policy: Policy) -> dict:
    statuses = engine.status()
    return {
        "engine": {"name": "vllm", "version": engine.version},
        "head": {
            "mode": engine.mode,
            "dtype": config.head_dtype.value,
            "ranks": len(statuses),
            "calls": sum(s["calls"] for s in statuses),
            "trainer": {"mode": policy.head.mode, "dtype": policy.head.dtype, "calls": policy.head.calls},
        },
        "policy_version": policy.version,
    }
