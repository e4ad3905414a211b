"""The matrix of `rlalign families`: every family through every cell, each engine in a process of its own.

There the engine starts once, and the trainers follow one another beside it.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import tempfile
import traceback
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rlalign.diagnose.families import building
from rlalign.diagnose.families.family_table import FAILED, OK, PROCESSES, REFUSED, Cell, Recipe

if TYPE_CHECKING:
    from torch import Tensor

    from rlalign.config import TrainerConfig
    from rlalign.rollout.engine.embedded import VLLMEngine

# Imported once, in the server that every process is forked from: they take longer than the cells of a tiny model.
HEAVY = [
    "vllm.entrypoints.llm", "vllm.v1.engine.core", "rlalign.rollout.engine.embedded", "rlalign.trainer.policy",
    "rlalign.diagnose.attribution.measure", "rlalign.run.step", "rlalign.run.assembly",
]  # fmt: skip


def examine(
    families: Mapping[str, Recipe],
    columns: Sequence[str],
    *,
    timeout_s: float,
    say: Callable[[str, dict[str, Cell]], None],
) -> dict[str, dict[str, Cell]]:
    """The table; say: told each family's row when it is done."""
    from rlalign.rollout.engine.embedded import EMBEDDED_ENVIRONMENT

    for name, value in (EMBEDDED_ENVIRONMENT | {"TORCHDYNAMO_DISABLE": "1"}).items():  # read when HEAVY is imported
        os.environ.setdefault(name, value)
    table = {}
    for name, recipe in families.items():
        with tempfile.TemporaryDirectory(prefix=f"rlalign-{name}-") as folder:
            table[name] = row(recipe, Path(folder), columns, timeout_s)
        say(name, table[name])
    return table


def row(recipe: Recipe, folder: Path, columns: Sequence[str], timeout_s: float) -> dict[str, Cell]:
    """The cells of one family. Columns behind one that they stand on and that failed stay empty."""
    try:
        model = building.build(recipe, folder / "model")
    except Exception as error:  # a family that this transformers does not have, or builds in another way
        return {columns[0]: Cell(FAILED, f"{type(error).__name__}: {error}"[:300])}
    cells: dict[str, Cell] = {}
    for process, names in PROCESSES.items():
        if wanted := [n for n in names if n in columns]:
            found = _engine(model, process, wanted, folder / "found.json", timeout_s)
            cells |= {n: c for n, c in found.items() if n in wanted or c.state != OK}
    return cells


def _engine(model: Path, process: str, wanted: Sequence[str], out: Path, timeout_s: float) -> dict[str, Cell]:

    out.write_text("{}")
    said = out.with_suffix(".log")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(HEAVY)
    child = context.Process(target=run, args=(model, process, list(wanted), out, said))
    child.start()
    child.join(timeout_s)
    late = child.is_alive()
    if late:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # with the processes of its engine
        child.kill()
        child.join()
    found = {name: Cell(**plain) for name, plain in json.loads(out.read_text()).items()}
    if child.exitcode and all(c.state == OK for c in found.values()):
        missing = next((n for n in wanted if n not in found), wanted[-1])
        reason = f"no answer within {timeout_s:g} s" if late else last_line(said, child.exitcode)
        found[missing] = Cell(FAILED, reason)
    return found


def last_line(file: Path, code: int) -> str:
    """What a process that ended with this code said last."""
    lines = [line for line in file.read_text(errors="replace").splitlines() if line.strip()] if file.is_file() else []
    told = [line for line in lines if line.startswith(("rlalign:", "RuntimeError", "ValueError"))]
    return (told or lines or [f"exit code {code}"])[-1][:300]


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
