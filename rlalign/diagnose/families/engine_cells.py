"""One family in one engine, in a process of its own: the engine starts once, the trainers follow one another beside it."""

from __future__ import annotations

import json
import os
import traceback
import zlib
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rlalign.diagnose.families import building
from rlalign.diagnose.families.cell import FAILED, OK, PROCESSES, REFUSED, Cell

if TYPE_CHECKING:
    from torch import Tensor

    from rlalign.config import TrainerConfig
    from rlalign.rollout.engine.embedded import VLLMEngine

LIMIT = {"float32": (1e-4, "nats at most"), "bfloat16": (1e-2, "k3")}
LOADED = 1e-5  # nats between an engine that was published to and one that loaded the same weights
MOVED = 1e-2  # nats: an update that changes less shows nothing
NEEDED = {"head", "load", "score"}  # behind one of these that fails nothing is worth running


def run(folder: Path, process: str, wanted: list[str], out: Path, log: Path) -> None:
    """The wanted cells of this process (a key of `cell.PROCESSES`), and what they stand on.

    out: gets what was found, as JSON. log: gets what this process and its children say.
    """
    os.setpgid(0, 0)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    side = _Sides(folder, process)
    cells: dict[str, Cell] = {}
    for name in PROCESSES[process]:
        if name not in wanted and name not in NEEDED:
            continue
        cells[name] = outcome(side.work(name))
        out.write_text(json.dumps({n: asdict(c) for n, c in cells.items()}))
        if cells[name].state != OK and (name in NEEDED or name == "bfloat16"):
            break
    side.close()


class _Sides:
    """The engine of this process, and transformers' models with the weights of the folder, and after a made-up update."""

    def __init__(self, folder: Path, process: str) -> None:
        import torch

        from rlalign.config import RolloutConfig

        torch.set_num_threads(1)
        self.folder, self.dtype = folder, "bfloat16" if process == "bfloat16" else "float32"
        self.sequences = building.probes()
        self.model = building.perturbed(folder, seed=1, dtype=self.dtype, size=0.0)
        self.moved = building.perturbed(folder, seed=1, dtype=self.dtype)
        self.before_BL, self.after_BL = (building.reference(m, self.sequences) for m in (self.model, self.moved))
        self.rollout = RolloutConfig(
            max_tokens=12, max_model_len=256, max_num_seqs=32, enforce_eager=True, prompts_per_step=4, group_size=4,
            tensor_parallel_size=2 if process == "TP 2" else 1,
        )  # fmt: skip
        self.engine: VLLMEngine | None = None

    def work(self, name: str) -> Callable[[], str]:
        """What fills the cell of this name."""
        from rlalign.config import LoraConfig, TrainerConfig

        return {
            "head": self.head, "load": self.load, "score": self.score, "publish": self.publish, "attribute": self.attribute,
            "train": partial(self.train, TrainerConfig(micro_batch_size=8)),
            "ZeRO-3": partial(self.train, TrainerConfig(micro_batch_size=8, zero_stage=3)),
            "LoRA": partial(self.train, TrainerConfig(micro_batch_size=8, lora=LoraConfig(rank=4))),
            "bfloat16": lambda: self.load() + self.score(), "bfloat16 publish": self.publish,
            "TP 2": lambda: "; ".join(filter(None, (self.load(), self.score(), self.publish()))),
        }[name]  # fmt: skip

    def load(self) -> str:
        from rlalign.rollout.engine.embedded import VLLMEngine

        self.engine = VLLMEngine(self.folder, self.rollout, dtype=self.dtype, head_dtype="float32", seed=0)
        return ""

    def head(self) -> str:
        from rlalign.trainer import logit_check

        transform = logit_check.transform_of(self.model)
        named = {"hidden/": transform.hidden_divisor, "x": transform.logit_scale, "cap": transform.cap}
        return ", ".join(f"{n} {v:g}" for n, v in named.items() if v not in (1.0, None)) or "nothing"

    def score(self) -> str:
        return self._judged(self.before_BL)

    def publish(self) -> str:
        from rlalign.rollout.engine.arguments import require_reloads
        from rlalign.trainer.checkpoint_names import as_checkpoint
        from rlalign.weights import publish

        require_reloads(self.folder)
        report = publish(as_checkpoint(self.moved, self.moved.named_parameters()), 1, receiver=self.engine)
        self._require_moved(self.after_BL)
        proofs = ", ".join(f"{count} {proof}" for proof, count in sorted(report.proofs.items()))
        return f"{self._judged(self.after_BL) if self.dtype == 'float32' else self._as_loaded()}; {proofs}"

    def _as_loaded(self) -> str:
        """The published weights in a fresh engine, from a file: the same logprobs, however far they are from transformers'."""
        published = _as_float64(self.engine.score(self.sequences))
        self.engine.close()
        self.folder = building.saved(self.moved, self.folder.with_name("moved"))
        self.load()
        apart = float((_as_float64(self.engine.score(self.sequences)) - published).abs().max())
        if not apart <= LOADED:
            raise RuntimeError(f"the engine is {apart:.1e} nats from a fresh one that loaded the published weights")
        return f"{_k3(published - self.after_BL):.0e}"

    def attribute(self) -> str:
        """Both sides hold equal weights, so that every step over its floor is a false alarm."""
        from rlalign.diagnose.attribution.measure import measure
        from rlalign.rollout.engine.teacher_forcing import Route
        from rlalign.trainer.checkpoint_names import as_checkpoint
        from rlalign.types import collate
        from rlalign.weights import publish

        publish(as_checkpoint(self.moved, self.moved.named_parameters()), 1, receiver=self.engine)
        prompts = [sequence[:24] for sequence in self.sequences]
        rollouts = self.engine.generate(prompts, prompt_ids=range(len(prompts)), samples=3, seed=0)
        batch = collate(rollouts, pad_token_id=0, spec=self.engine.spec)
        found = measure(self.engine, self.moved, batch, routes=(Route.prefill, Route.decode))
        if first := found.first_over_floor:
            raise RuntimeError(f"equal weights, and {first.point} is {first.excess:.1f} times its floor")
        kinds = len({p.kind for p in found.points})
        return f"{len(found.points)} points of {kinds} kinds"

    def train(self, trainer: TrainerConfig) -> str:
        """One GRPO step as a run makes it, then the engine against the saved weights in transformers alone."""
        from rlalign.config import AlgoConfig, Dtype, ModelConfig, RunConfig
        from rlalign.run.assembly import load_tokenizer, start_policy
        from rlalign.run.parties import Parties
        from rlalign.run.step import train_step
        from rlalign.weights import publish

        config = RunConfig(
            model=ModelConfig(path=str(self.folder), dtype=Dtype.float32), rollout=self.rollout, trainer=trainer,
            algo=AlgoConfig(lr=2e-2),
        )  # fmt: skip
        tokenizer, policy = load_tokenizer(self.folder), start_policy(self.folder, config)
        try:
            parties = Parties(
                engine=self.engine, trainer=policy, task=_ChecksumTask(), publish=partial(publish, receiver=self.engine),
                encode=tokenizer.encode, pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
            parties.publish(policy.named_weights(), policy.version)
            self._judged(self.before_BL)
            result = train_step(0, parties, config)
            saved = self.folder.with_name("trained")
            policy.save(saved)
        finally:
            policy.close()
        trained_BL = building.reference(building.perturbed(saved, seed=0, dtype="float32", size=0.0), self.sequences)
        self._require_moved(trained_BL)
        return f"{result.metrics['mismatch/lag0/k3']:.0e}; {self._judged(trained_BL)}"

    def close(self) -> None:
        """End the engine."""
        if self.engine is not None:
            self.engine.close()

    def _require_moved(self, after_BL: Tensor) -> None:
        if float((self.before_BL - after_BL).abs().max()) < MOVED:
            raise RuntimeError("the update moved no logprob: this shows nothing")

    def _judged(self, wanted_BL: Tensor) -> str:
        """Raises RuntimeError when the engine is further from transformers' own forward than rounding explains."""
        limit, unit = LIMIT[self.dtype]
        apart = _as_float64(self.engine.score(self.sequences)) - wanted_BL
        found = float(apart.abs().max()) if self.dtype == "float32" else _k3(apart)
        if not found <= limit:
            raise RuntimeError(f"the engine is {found:.1e} {unit} from transformers' own forward, limit {limit:g}")
        return f"{found:.0e}"


def _as_float64(scores: list[list[float]]) -> Tensor:
    """[B, L] in float64."""
    import torch

    return torch.tensor(scores, dtype=torch.float64)


def _k3(apart_BL: Tensor) -> float:
    """Mean over all tokens but the first."""
    found = apart_BL[:, 1:]
    return float((found.exp() - 1 - found).mean())


class _ChecksumTask:
    """Prompts that a random model can be rewarded for: by a checksum, so that no two completions earn the same."""

    def train_prompts(self, step: int, count: int) -> list:
        from rlalign.tasks import Prompt

        return [Prompt(prompt_id=i, text=f"{17 * i} + {i} =", answer="", source={}) for i in range(count)]

    def reward(self, prompt: object, completion: str) -> float:
        return zlib.crc32(completion.encode()) / 2**32


def outcome(work: Callable[[], str]) -> Cell:
    """ok with what it says; refused where rlalign itself raised a ValueError; failed for anything else."""
    try:
        return Cell(OK, work())
    except Exception as error:  # every error is an answer here
        raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
        refused = type(error) is ValueError and "/rlalign/" in raised_in
        return Cell(REFUSED if refused else FAILED, _short(error))


def _short(error: Exception) -> str:
    """The first line that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
