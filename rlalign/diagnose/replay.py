"""rlalign replay: one logged step once more, offline. Both sides are loaded with the weights of that step and asked again.

Three answers: the tokens sampled again with their seeds, the trainer's scores of the stored tokens, and the mismatch metrics
from both. Each reproduces bit for bit, within the noise floor, or not. B sequences, L padded length, N tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from rlalign import mismatch
from rlalign.config import HeadDtype, RunConfig
from rlalign.diagnose.both_sides import model_folder
from rlalign.rollout.engine import noise_floor
from rlalign.run.assembly import load_task_of, load_tokenizer, sampling, start_embedded
from rlalign.run.sampler import step_seed
from rlalign.tracking import environment
from rlalign.tracking.record import RunRecord, config_of, read_run
from rlalign.tracking.token_files import SavedStep, read_loop, read_step
from rlalign.types import RolloutBatch, collate

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig

    from rlalign.rollout.engine.embedded import VLLMEngine
    from rlalign.trainer.network import ScoringNetwork
    from rlalign.trainer.passes import Passes
    from rlalign.trainer.rounding.mirroring import BodyPlan

DECIDING = ("rlalign", "torch", "vllm", "transformers")  # packages that can change a number of the replay
SHOWN = ("k1", "k3", "abs_mean", "p99", "abs_max", "pearson_prob", "ess")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One side against what was logged. compared: tokens in both; equal: with the same bits; mean, worst: |difference|, nats.

    floor: mean |difference| of that side with itself when only the batch changes.
    """

    name: str
    tokens: int
    compared: int
    equal: int
    mean: float
    worst: float
    floor: float

    @property
    def verdict(self) -> str:
        """ "bit for bit", "within the floor" (mean difference at most twice the floor's) or "differs"."""
        if self.equal == self.tokens:
            return "bit for bit"
        return "within the floor" if self.compared and self.mean <= 2.0 * self.floor else "differs"


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """metrics: name -> (logged, from the stored logprobs, replayed; None where sampling took another way)."""

    run: str
    step: int
    version: int
    answers: tuple[Answer, ...]
    metrics: Mapping[str, tuple[float, float, float | None]]
    notes: tuple[str, ...]

    @property
    def reproduced(self) -> bool:
        """Both sides answered as they did, and the log says what its own tokens say."""
        log_is_right = all(logged == stored for logged, stored, _ in self.metrics.values())
        return log_is_right and all(a.verdict != "differs" for a in self.answers)


def replay(run: Path, step: int, *, any_version: bool = False) -> Replay:
    """Replay a step. Raises ValueError for a step that was not logged or not saved, or with other library versions.

    any_version: go on with other libraries, and say so in the notes.
    """
    if read_loop(Path(run)) is not None:
        raise ValueError(
            f"{run} was written by rlalign.write_tokens in a loop of one's own: a replay samples and scores once more as the run "
            "did, and neither that loop's seeds nor its forward are known here. `rlalign mismatch` reads its tokens, `rlalign "
            "attribute --run` whole steps; or train with `rlalign train tracking.replay_every=N`"
        )
    record = read_run(run)
    row = _logged(record, step)
    saved = read_step(Path(run), step)
    notes = _surroundings(record, any_version=any_version)
    config = config_of(record)
    if config.trainer.threads:
        torch.set_num_threads(config.trainer.threads)
    trainer = _Trainer.of(saved, config)
    engine = start_embedded(saved.model, config)
    try:
        _load_master(engine, trainer.module.network, saved, config)
        engine.acknowledge(saved.version)
        again, rollout = _sampled_again(engine, saved, config)
    finally:
        engine.close()
    trainer_BL, scored = _scored_again(trainer, saved)
    diverged = rollout.compared < rollout.tokens
    notes += ["sampling took another way: replayed metrics are not comparable"] if diverged else []
    replayed = None if diverged else mismatch.compare(trainer_BL, again.rollout_logprobs_BL, again.loss_mask_BL)
    return Replay(
        run=str(run),
        step=step,
        version=saved.version,
        answers=(rollout, scored),
        metrics=_metrics(row, saved, replayed),
        notes=tuple(notes),
    )


def report(found: Replay) -> str:
    """The answers and the metrics as Markdown, and the verdict as the last line."""
    lines = [f"replay of {found.run}, step {found.step}, policy version {found.version}", ""]
    lines += ["| side | tokens | compared | equal bits | mean difference | largest | floor | |", "|---" * 8 + "|"]
    for a in found.answers:
        numbers = f"{a.tokens} | {a.compared} | {a.equal} | {a.mean:.2e} | {a.worst:.2e} | {a.floor:.2e}"
        lines.append(f"| {a.name} | {numbers} | {a.verdict} |")
    lines += ["", "| metric | logged | from the stored tokens | replayed |", "|---|--:|--:|--:|"]
    for name, (logged, stored, replayed) in found.metrics.items():
        lines.append(f"| {name} | {logged:.9g} | {stored:.9g} | {'' if replayed is None else f'{replayed:.9g}'} |")
    lines += ["", *(f"- {note}" for note in found.notes)]
    lines.append("the step reproduces" if found.reproduced else "the step does NOT reproduce")
    return "\n".join(lines)


def as_json(found: Replay) -> dict:
    """Plain data with the verdicts."""
    plain = asdict(found) | {"reproduced": found.reproduced}
    plain["answers"] = [asdict(a) | {"verdict": a.verdict} for a in found.answers]
    return plain


def _logged(record: RunRecord, step: int) -> Mapping[str, float]:
    rows = {int(row["step"]): row for row in record.metrics.rows}
    if step in rows:
        return rows[step]
    logged = f"it logged steps {min(rows)} to {max(rows)}" if rows else "it logged no step"
    raise ValueError(f"{record.directory}: step {step} was not logged; {logged}")


def _surroundings(record: RunRecord, *, any_version: bool) -> list[str]:
    """What differs here from where the run was. Raises ValueError for libraries, unless any version will do."""
    here, there = environment.snapshot(), record.environment
    changed = [
        f"{name} {there['versions'].get(name)} then, {here['versions'][name]} now"
        for name in DECIDING
        if there["versions"].get(name) != here["versions"][name]
    ]
    if changed and not any_version:
        raise ValueError(
            f"{record.directory} ran on other libraries ({'; '.join(changed)}): a difference would not say which side moved. "
            "Install those, or replay with --any-version"
        )
    notes = [f"other libraries: {line}" for line in changed]
    for key, what in (
        ("cpu", "another processor"),
        ("gpus", "other GPUs"),
        ("variables", "other environment variables"),
    ):
        if there.get(key) != here[key]:
            notes.append(f"{what}: {there.get(key)} then, {here[key]} now; last bits may differ")
    return notes


def _load_master(engine: VLLMEngine, network: nn.Module, saved: SavedStep, config: RunConfig) -> None:
    if config.head_dtype is not HeadDtype.master:
        return
    from rlalign.trainer.checkpoint_names import as_checkpoint
    from rlalign.weights import MASTER_WEIGHT, publish

    if saved.master_VD is None:
        raise ValueError(f"{saved.model.parent}: a run with head_dtype=master, but its unrounded lm_head was not saved")
    weights = [*as_checkpoint(network, network.named_parameters()), (MASTER_WEIGHT, saved.master_VD)]
    publish(weights, saved.version, receiver=engine, shared=Path(config.weights.shared))


def _sampled_again(engine: VLLMEngine, saved: SavedStep, config: RunConfig) -> tuple[RolloutBatch, Answer]:
    batch, samples = saved.batch, config.rollout.group_size
    versions = set(batch.policy_version_BL[batch.loss_mask_BL].tolist())
    if versions != {saved.version}:
        raise ValueError(
            f"step {saved.step} was sampled by policy versions {sorted(versions)}, its saved weights are version {saved.version}: "
            "only steps sampled by one version can be replayed"
        )
    first = batch.loss_mask_BL.int().argmax(1).tolist()
    prompts = [batch.token_ids_BL[i, : first[i]].tolist() for i in range(0, len(batch), samples)]
    ids = batch.prompt_id_B[::samples].tolist()
    tokenizer = load_tokenizer(saved.model)
    pad = cast("int", tokenizer.pad_token_id)
    through = sampling(config, load_task_of(config), tokenizer)(engine) if config.task.environment else engine
    seed = step_seed(config, saved.step)

    def sampled(count: int) -> RolloutBatch:
        rollouts = through.generate(prompts[:count], prompt_ids=ids[:count], samples=samples, seed=seed)
        return collate(rollouts, pad_token_id=pad, spec=engine.spec)

    again = sampled(len(prompts))
    half = sampled(max(1, len(prompts) // 2))
    floor = noise_floor.of_repeated_sampling(half, again)["floor_abs_mean"]
    length = min(again.token_ids_BL.shape[1], batch.token_ids_BL.shape[1])
    same_BL = (again.token_ids_BL[:, :length] == batch.token_ids_BL[:, :length]).cumprod(1).bool()
    compared_BL = same_BL & again.loss_mask_BL[:, :length] & batch.loss_mask_BL[:, :length]
    new_N = again.rollout_logprobs_BL[:, :length][compared_BL]
    old_N = batch.rollout_logprobs_BL[:, :length][compared_BL]
    tokens = max(int(batch.loss_mask_BL.sum()), int(again.loss_mask_BL.sum()))
    return again, _answer("rollout, sampled again", tokens, new_N, old_N, floor)


@dataclass(frozen=True, slots=True)
class _Trainer:
    """The run's scoring without its optimizer: loaded and called as the trainer does it."""

    module: ScoringNetwork
    passes: Passes

    @classmethod
    def of(cls, saved: SavedStep, config: RunConfig) -> _Trainer:
        from rlalign.trainer.forced_experts import ForcedExperts
        from rlalign.trainer.head_mirror import mirror
        from rlalign.trainer.network import ScoringNetwork, load
        from rlalign.trainer.passes import Passes

        t = config.trainer
        folder = model_folder(config) if t.lora.rank else saved.model
        whole: dict[str, Any] = {"zero_optimization": {"stage": 0}}
        form = {
            "exact": config.exact,
            "attention": t.attention,
            "packed": t.pack_tokens > 0,
            "mirrored": _kept_body(folder, config),
        }
        network = load(folder, config.model.dtype.value, whole, checkpointing=False, **form)
        if t.lora.rank:
            from rlalign.trainer.lora import FOLDER, put_in

            put_in(network, saved.model / FOLDER)
        network.eval().to("cuda" if torch.cuda.is_available() else "cpu")
        mirror(network, head_dtype=config.head_dtype.value, chunk=t.logprob_chunk).master_VD = saved.master_VD
        passes = Passes(
            config=t,
            experts=ForcedExperts.asked(network, config.rollout.replay_experts),
            device=cast("torch.device", network.device),
            attention=cast("PreTrainedConfig", network.config)._attn_implementation or "",
            temperature=config.rollout.temperature,
        )
        return cls(ScoringNetwork(network), passes)

    def score(self, batch: RolloutBatch, *, trainer_ranks: int) -> Tensor:
        """[B, L] logprobs, each rank's share of the rows in its micro-batches."""
        shares = [
            self.passes.share(self.module, batch, columns=2, rank=rank, of=trainer_ranks)[0]
            for rank in range(trainer_ranks)
        ]
        return torch.stack(shares).sum(0)


def _kept_body(folder: Path, config: RunConfig) -> BodyPlan | None:
    """The roundings that the run's probe chose on this host; None for a body that was not mirrored."""
    if not config.mirrored:
        return None
    from transformers import AutoConfig

    from rlalign.loops.mirrors import kept_plan

    return kept_plan(AutoConfig.from_pretrained(folder), getattr(torch, config.model.dtype.value))


def _scored_again(trainer: _Trainer, saved: SavedStep) -> tuple[Tensor, Answer]:
    batch, mask_BL = saved.batch, saved.batch.loss_mask_BL
    again_BL = trainer.score(batch, trainer_ranks=saved.trainer_ranks)
    few = range(min(noise_floor.FEW, len(batch)))
    alone_BL = torch.cat([trainer.score(batch.rows(slice(i, i + 1)), trainer_ranks=1) for i in few])
    inside = mask_BL[: len(few)]
    floor = float((alone_BL[inside] - again_BL[: len(few)][inside]).abs().mean())
    new_N, old_N = again_BL[mask_BL], saved.old_logprobs_BL[mask_BL]
    return again_BL, _answer("trainer, scored again", int(mask_BL.sum()), new_N, old_N, floor)


def _answer(name: str, tokens: int, new_N: Tensor, old_N: Tensor, floor: float) -> Answer:
    size_N = (new_N.double() - old_N.double()).abs()
    return Answer(
        name=name,
        tokens=tokens,
        compared=len(new_N),
        equal=int((new_N == old_N).sum()),
        mean=float(size_N.mean()) if len(size_N) else float("nan"),
        worst=float(size_N.max()) if len(size_N) else float("nan"),
        floor=floor,
    )


def _metrics(
    row: Mapping[str, float], saved: SavedStep, replayed: Mapping[str, float] | None
) -> dict[str, tuple[float, float, float | None]]:
    batch = saved.batch
    stored = mismatch.compare(saved.old_logprobs_BL, batch.rollout_logprobs_BL, batch.loss_mask_BL)
    return {
        f"mismatch/lag0/{name}": (
            row[f"mismatch/lag0/{name}"],
            stored[name],
            None if replayed is None else replayed[name],
        )
        for name in SHOWN
        if f"mismatch/lag0/{name}" in row
    }
