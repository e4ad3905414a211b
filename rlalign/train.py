"""train(): put the real parties together and run the steps."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rlalign import assemble, observe
from rlalign.config import RunConfig, to_plain
from rlalign.loop import MismatchLimitError, Parties, train_step
from rlalign.watch import Watch, self_test

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlalign.rollout.engine import VLLMEngine
    from rlalign.tracking.console import Progress
    from rlalign.tracking.run import Run
    from rlalign.trainer.policy import Policy


def train(config: RunConfig) -> dict:
    """Run the configuration to its end and return the summary, which is also in the run directory.

    The directory holds everything up to the last whole step, however the run ends. Raises ValueError for input that cannot
    be used, RuntimeError when the two engines break their contract, MismatchLimitError when a mismatch limit stops the run.
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
    model = assemble.resolve_model(config.model.path, progress.stage)
    tokenizer = assemble.load_tokenizer(model)
    task = assemble.load_task_of(config)
    progress.stage("starting vLLM")
    engine = assemble.start_engine(model, config)
    try:
        run.log_head_status(engine.status())
        progress.stage("starting DeepSpeed")
        policy = assemble.start_policy(model, config)
        try:
            parties = _parties(config, engine, policy, task, tokenizer)
            return _Steps(config, run, progress, engine, policy, parties, tokenizer).run_all()
        finally:
            policy.close()
    finally:
        engine.close()


def _parties(
    config: RunConfig, engine: VLLMEngine, policy: Policy, task: assemble.Task, tokenizer: PreTrainedTokenizerBase
) -> Parties:
    from rlalign.diagnose import noise_floor
    from rlalign.weights import publish

    floor = noise_floor.read(Path(config.mismatch.floor), config.model.dtype.value) if config.mismatch.floor else None
    return Parties(
        engine=engine,
        trainer=policy,
        task=task,
        publish=partial(publish, receiver=engine, shared=Path(config.weights.shared)),
        encode=partial(assemble.encode, tokenizer, chat=config.task.chat_template),
        pad_token_id=tokenizer.pad_token_id,
        floor=floor,
    )


@dataclass
class _Steps:
    """The steps of one run, with everyone in place."""

    config: RunConfig
    run: Run
    progress: Progress
    engine: VLLMEngine
    policy: Policy
    parties: Parties
    tokenizer: PreTrainedTokenizerBase

    def run_all(self) -> dict:
        """All of them, then the summary."""
        from rlalign.tracking.record import read_metrics
        from rlalign.tracking.summary import summarize

        self.parties.publish(
            self.policy.named_weights(), self.policy.version
        )  # both loaded one folder: now it is proved
        watch = self._watch()
        for step in range(self.config.steps):
            metrics = self._step(step)
            self.progress.step(step, metrics)
            watch.step(step, metrics)
        rows = read_metrics(self.run.directory / "metrics.jsonl").rows
        summary = summarize(rows) | observe.participants(self.config, self.engine, self.policy)
        verdict = self_test(rows, self.config.algo.lr)
        summary |= {"self_test": verdict} if verdict else {}
        self.run.log_head_status(self.engine.status())
        self.run.finish(summary)
        return summary

    def _step(self, step: int) -> dict[str, float]:
        config, last = self.config, step == self.config.steps - 1
        samples = config.tracking.eval_samples
        evaluate = step % config.tracking.eval_every == 0
        before = {"eval/accuracy": observe.evaluate(self.parties, samples=samples)} if evaluate else {}
        try:
            result = train_step(step, self.parties, config)
        except MismatchLimitError as stop:  # what stopped the run is what must not be lost
            observe.log_step(self.run, step, before | stop.result.metrics, stop.result, self.tokenizer, tokens=True)
            raise
        for warning in result.warnings:
            self.run.event("mismatch", warning)
        metrics = before | result.metrics
        if config.mismatch.head_every and step % config.mismatch.head_every == 0:
            metrics |= observe.head_in_isolation(self.engine, self.policy, result, config)
        if last:  # of the final weights; every earlier row evaluates those before its step
            metrics["eval/accuracy"] = observe.evaluate(self.parties, samples=samples)
        every = config.tracking.tokens_every
        observe.log_step(
            self.run, step, metrics, result, self.tokenizer, tokens=bool(every) and (step % every == 0 or last)
        )
        return metrics

    def _watch(self) -> Watch:
        return Watch(
            self.config,
            spec=self.engine.spec,
            trainer_head=self.policy.head.dtype if self.policy.head.mode == "mirrored" else "model",
            floor=self.parties.floor,
            log=self.run,
            say=self.progress.stage,
            checkpoint=self.policy.save,
        )
