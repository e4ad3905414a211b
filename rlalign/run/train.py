"""train(): put the real parties together and run the steps."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rlalign import ranks
from rlalign.config import RunConfig, ScheduleMode, to_plain
from rlalign.run import assembly, checkpointing, joining, observation
from rlalign.run.limits import Watch, self_test
from rlalign.run.parties import MismatchLimitError, Parties, StepRefused, StepResult
from rlalign.run.sampler import Sampler
from rlalign.run.step import train_step
from rlalign.tracking import token_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlalign.reward.drift_watch import DriftWatch
    from rlalign.rollout.shared import SharedEngine
    from rlalign.run.checkpointing import Checkpoint
    from rlalign.tracking.console import Progress
    from rlalign.tracking.run_directory import Run, SilentProgress, SilentRun
    from rlalign.trainer.policy import Policy


def train(config: RunConfig) -> dict:
    """Run the configuration to its end and return the summary, which is also in the run directory.

    Under torchrun, deepspeed or srun every rank calls this; the first one holds the engine and writes the files, and the
    others only take part.

    The directory holds everything up to the last whole step, however the run ends. Raises ValueError for input that cannot
    be used, RuntimeError when the two engines break their contract, StepRefused when a limit stops the run.
    """
    from rlalign.report import write_report
    from rlalign.tracking.backends import places_of
    from rlalign.tracking.console import Progress
    from rlalign.tracking.run_directory import Run, SilentProgress, SilentRun

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    directory = Path(config.output_dir)
    signals = checkpointing.Signals()
    first = joining.join_ranks() == 0
    found = checkpointing.find(config)
    if not first:
        with signals, SilentRun(directory) as run, SilentProgress() as progress:
            return _run(config, run, progress, found, signals)
    progress = Progress(config.steps)
    run = Run(
        directory,
        config=to_plain(config),
        project=config.tracking.project,
        name=config.name,
        places=places_of(config.tracking),
        resume=found is not None,
        overwrite=config.overwrite or (config.checkpoint.resume == "auto" and found is None),
    )
    try:
        with signals, run, progress:
            summary = _run(config, run, progress, found, signals)
    finally:
        report = write_report([directory], directory / "report.html")
    progress.final_table(summary, report)
    return summary


def _run(
    config: RunConfig,
    run: Run | SilentRun,
    progress: Progress | SilentProgress,
    found: Checkpoint | None,
    signals: checkpointing.Signals,
) -> dict:
    from rlalign.rollout.shared import SharedEngine
    from rlalign.weights import open_transport

    model = ranks.on_first(lambda: assembly.resolve_model(config.model.path, progress.stage))
    tokenizer = assembly.load_tokenizer(model)
    critic_from = ranks.on_first(lambda: assembly.critic_folder(model, config, tokenizer))
    checkpointing.settle_products(config, found, run)
    task = assembly.fitted_task(config, model, tokenizer, partial(run.event, "task"))
    reward = assembly.SharedReward(config, progress.stage)
    transport = open_transport(config.weights)
    progress.stage("starting vLLM")
    engine = SharedEngine(lambda: assembly.start_engine(model, config, partial(run.event, "servers")))
    try:
        statuses = engine.status()
        run.log_head_status(statuses)
        probed = assembly.probe_body(engine, model, config, task, tokenizer)
        progress.stage("starting DeepSpeed")
        policy = assembly.start_policy(model, config, probed)
        critic = None
        try:
            assembly.require_same_head(policy, statuses)
            if probed is not None:
                run.event("body", probed.prove(policy, engine.spec, tokenizer.pad_token_id))
            critic = assembly.start_critic(critic_from, config)
            parties = assembly.parties(
                config, engine, policy, critic, task, reward, tokenizer, transport, progress.phase
            )
            drift = assembly.start_drift_watch(reward, config, run, progress.stage)
            engine.through = assembly.sampling(config, task, tokenizer)
            sampler = None
            if config.schedule.mode is not ScheduleMode.synchronous:
                sampler = Sampler(parties, config, engine=lambda: engine.sampling, say=partial(run.event, "rollouts"))
            parts = {"drift": drift, "rollouts": sampler}
            shared = {"critic": critic, "kl_penalty": parties.kl_penalty}
            checkpoints = checkpointing.Checkpoints(
                config=config, log=run, policy=policy, signals=signals, 
                parts={name: part for name, part in parts.items() if part is not None},
                shared={name: part for name, part in shared.items() if part is not None},
            )  # fmt: skip
            steps = _Steps(config, run, progress, engine, policy, parties, sampler, tokenizer, drift, checkpoints)
            return steps.run_all(found)
        finally:
            policy.close()
            if critic is not None:
                critic.close()
    finally:
        transport.close()
        engine.close()


@dataclass
class _Steps:
    """The steps of one run, with everyone in place."""

    config: RunConfig
    run: Run | SilentRun
    progress: Progress | SilentProgress
    engine: SharedEngine
    policy: Policy
    parties: Parties
    sampler: Sampler | None  # of an asynchronous schedule
    tokenizer: PreTrainedTokenizerBase
    drift: DriftWatch | None  # on the first rank
    checkpoints: checkpointing.Checkpoints
    reasons: set[str] = field(default_factory=set)  # why samples had no reward, told once each

    def run_all(self, found: Checkpoint | None) -> dict:
        """All of them, from the checkpoint on where there is one, then the summary."""
        next_step = self.checkpoints.restore(found)
        if found is not None:
            self.run.rewind(found.step)
        self.progress.stage("publishing the first weights")
        # Both loaded one folder: now it is proved.
        self.parties.publish(self.policy.named_weights(), self.policy.version)
        self._prove_steps()
        watch = self._watch()
        self.checkpoints.before_first(next_step)
        for step in range(next_step, self.config.steps):
            metrics = ranks.on_first(partial(dict, self._step(step)))  # timings differ, and a rule may read one
            self.progress.step(step, metrics)
            watch.step(step, metrics)
            ranks.on_first(lambda: self.drift.stop_if_asked())
            with self.run.timed(step, "checkpoint"):
                self.checkpoints.after(step)
        statuses = self.engine.status()
        summary = ranks.on_first(lambda: self._summary(statuses))
        self.run.log_head_status(statuses)
        self.run.finish(summary)
        return summary

    def _prove_steps(self) -> None:
        """Compare every step of the engine with the trainer's: the read-back trusts the engine's loader, this does not."""
        from rlalign.diagnose.attribution.measure import prove_steps

        if reason := self._not_provable():
            self.run.event("weights", f"proved by read-back alone, not step by step: {reason}")
            return
        found = prove_steps(self.engine.local, self.policy.network)
        worst = max(found, key=found.__getitem__)
        self.run.event(
            "weights",
            f"{len(found)} steps of the engine equal the trainer's, the farthest {worst} ({found[worst]:.1e})",
        )

    def _not_provable(self) -> str | None:
        """Why steps cannot be seen or are proved otherwise; None where they are compared."""
        c = self.config
        return next(
            (
                reason
                for reason, found in {
                    "rollout.backend=server": c.rollout.backend == "server",
                    "a compiled engine (rollout.enforce_eager=false)": not c.rollout.enforce_eager,
                    "several trainer ranks": ranks.world_size() > 1,
                    "trainer.zero_stage=3": c.trainer.zero_stage == 3,
                    "adapters": bool(c.trainer.lora.rank),
                    "packed rows": bool(c.trainer.pack_tokens),
                    "exact or mirrored bodies, which are compared in every bit": c.exact or c.mirrored,
                }.items()
                if found
            ),
            None,
        )

    def _summary(self, statuses: list[dict]) -> dict:
        from rlalign.tracking.record import read_metrics, summarize

        rows = read_metrics(self.run.directory / "metrics.jsonl").rows
        summary = summarize(rows) | observation.participants(self.config, self.engine, statuses, self.policy)
        verdict = self_test(rows, self.config.algo.lr)
        return summary | ({"self_test": verdict} if verdict else {})

    def _step(self, step: int) -> dict[str, float]:
        config, last = self.config, step == self.config.steps - 1
        before = self._evaluate(step) if step % config.tracking.eval_every == 0 else {}
        version, replay_every = self.policy.version, config.tracking.replay_every
        keep = bool(replay_every) and step % replay_every == 0
        if keep:
            self._keep_weights(step)
        try:
            result = train_step(step, self.parties, config, self.sampler)
        except StepRefused as stop:  # what stopped the run is what must not be lost
            observation.log_step(self.run, step, before | stop.result.metrics, stop.result, self.tokenizer, tokens=True)
            if replay_every:  # not trained on: the weights are still those that sampled it
                self._keep_weights(step)
                self._keep_batch(step, stop.result, version)
            if isinstance(stop, MismatchLimitError):
                self._explain(stop.result)
            raise
        if keep:
            self._keep_batch(step, result, version)
        for warning in result.warnings:
            self.run.event("mismatch", warning)
        if new := set(result.rewards.failed.values()) - self.reasons:
            self.reasons |= new
            self.run.event("reward", f"step {step}: {result.rewards.describe_failed()}")
        metrics = before | result.metrics | self._drift_metrics(step, result)
        if ranks.rank() == 0:  # whose row every rank gets
            metrics |= observation.server_metrics(self.engine)
        if config.mismatch.head_every and step % config.mismatch.head_every == 0:
            with self.run.timed(step, "head"):
                metrics |= observation.head_in_isolation(self.engine, self.policy, result, config)
        if config.tracking.trace_every and step % config.tracking.trace_every == 0:
            with self.run.timed(step, "trace"):
                metrics |= observation.traced(self.policy, result, config.trainer.micro_batch_size) | self._apart()
        if last:  # of the final weights; every earlier row evaluates those before its step
            metrics |= self._evaluate(step)
        every = config.tracking.tokens_every
        tokens = bool(every) and (step % every == 0 or last)
        observation.log_step(self.run, step, metrics, result, self.tokenizer, tokens=tokens)
        return metrics

    def _apart(self) -> dict[str, float]:
        """trace/apart/STEP: how far each step of the engine is from the trainer's, where they can be compared."""
        from rlalign.diagnose.attribution.measure import measured_steps

        if self._not_provable():
            return {}
        if self.sampler is not None:
            self.sampler.settle()  # the engine answers one caller at a time
        found = measured_steps(self.engine.local, self.policy.network)
        return {f"trace/apart/{name}": apart for name, apart in found.items()}

    def _evaluate(self, step: int) -> dict[str, float]:
        with self.run.timed(step, "eval"):
            return observation.evaluate(self.parties, samples=self.config.tracking.eval_samples)

    def _drift_metrics(self, step: int, result: StepResult) -> dict[str, float]:
        versions_B, prompts_B = result.batch.policy_version_BL.amax(1).numpy(), result.batch.prompt_id_B.numpy()
        return ranks.on_first(
            lambda: self.drift.step(step, result.rewards, policy_versions=versions_B, prompt_ids=prompts_B)
        )

    def _explain(self, result: StepResult) -> None:
        """Ask both sides why they disagree, while they still stand as they were.

        One trainer rank with whole weights and the embedded engine only: it looks into the engine's process.
        """
        from rlalign.diagnose import suspects

        if ranks.world_size() > 1 or self.config.trainer.zero_stage == 3 or self.config.rollout.backend == "server":
            return
        case = suspects.Case(
            engine=self.engine.local,
            network=self.policy.network,
            batch=result.batch if result.probe is None else result.probe,  # older tokens prove nothing about the engine
            score=lambda batch: self.policy.score(batch)[0],
            tokenizer=self.tokenizer,
            master_VD=self.policy.head.master_VD,
            shared=Path(self.config.weights.shared),
            weights=self.policy.named_weights,
        )
        try:
            if self.sampler is not None:
                self.sampler.settle()  # the engine answers one caller at a time
            causes = suspects.report(suspects.rank(case, with_layers=False))
        except (ValueError, RuntimeError) as error:  # the mismatch is what must be raised
            causes = f"the diagnosis itself failed: {error}"
        self.run.event("diagnosis", causes)
        self.progress.stage(f"likely causes, most likely first:\n{causes}")

    def _keep_weights(self, step: int) -> None:
        """What `rlalign replay` will load. Every trainer rank takes part."""

        def save(folder: Path) -> None:
            self.policy.save(folder)
            ranks.on_first(lambda: self.tokenizer.save_pretrained(folder))

        token_files.save_weights(self.run.directory, step, save=save, master_VD=self.policy.head.master_VD)

    def _keep_batch(self, step: int, result: StepResult, version: int) -> None:
        shared_by, old_BL = ranks.world_size(), result.old_logprobs_BL
        ranks.on_first(
            lambda: token_files.save_batch(
                self.run.directory, step, result.batch, old_BL, version=version, trainer_ranks=shared_by
            )
        )

    def _watch(self) -> Watch:
        return Watch(
            self.config,
            spec=self.engine.spec,
            trainer_head="model" if self.policy.head.mode == "off" else self.policy.head.dtype,
            floor=self.parties.floor,
            log=self.run,
            say=self.progress.stage,
            checkpoint=self.policy.save,
        )
