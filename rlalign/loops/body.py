"""mirror(), and the probe behind a mirrored body: how the living engine was found to round, now and at earlier starts."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import nn
from transformers import PretrainedConfig

from rlalign.cache_folder import cache_folder
from rlalign.head import widened
from rlalign.rollout.attached import AttachedEngine
from rlalign.rollout.worker import cpu_kernels
from rlalign.tracking import environment
from rlalign.tracking.files import write_json
from rlalign.trainer import live_mirror
from rlalign.trainer.live_mirror import Mirror
from rlalign.trainer.rounding import mirroring, variants
from rlalign.trainer.rounding.mirroring import BodyPlan, Choices
from rlalign.trainer.rounding.probing import Probed, probe

__all__ = ["Settled", "examine", "kept_plan", "mirror", "recorded", "settle"]

T = TypeVar("T")
R = TypeVar("R")
NO_ARITHMETIC = ("_name_or_path", "dtype", "transformers_version", "architectures", "use_cache")  # of a model's config
SEQUENCES, LENGTH = 6, 40  # of made-up tokens, for an engine whose prompts are not known


class Asked(Protocol):
    """An engine with our RPCs."""

    def ask(self, method: str, *args: object) -> list[dict]:
        """One answer of every worker."""


@dataclass(frozen=True, slots=True)
class Settled:
    """A probe held against that of earlier starts. changed: {op: both choices}, of ops that are computed as the model does now."""

    probed: Probed
    choices: Choices
    changed: Mapping[str, str]
    file: Path

    @property
    def plan(self) -> BodyPlan:
        """What the trainer is given."""
        return BodyPlan(cpu_kernels, self.choices, self.probed)

    def describe(self) -> list[str]:
        """The table, and what is not chosen."""
        return [*self.probed.table(self.choices), *(f"not chosen: {line}" for line in self.unsettled())]

    def unsettled(self) -> list[str]:
        """A line for each op whose probe gave another answer at an earlier start."""
        return [
            f"{op}: {both}; its kernel is not deterministic, or the host has changed (remove {self.file} to begin anew)"
            for op, both in self.changed.items()
        ]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return self.probed.as_dict() | {"choices": asdict(self.choices), "changed": dict(self.changed)}

    def require_settled(self) -> BodyPlan:
        """The plan. Raises RuntimeError where an op changed: one that rounds elsewhere leaves the whole body apart."""
        if self.changed:
            raise RuntimeError(f"trainer.body=mirrored: {'; '.join(self.unsettled())}. Use trainer.body=model")
        return self.plan


def recorded(engine: Asked, drive: Callable[[], T], shared: Path, read: Callable[[dict], R]) -> tuple[R, T]:
    """Record the engine's ops while `drive` lets it compute; returns what `read` makes of the first rank's recording."""
    engine.ask("rlalign_ops_start")
    with tempfile.TemporaryDirectory(prefix="rlalign-ops-", dir=shared) as folder:
        Path(folder).chmod(0o777)  # workers may run as somebody else
        try:
            result = drive()
        finally:
            answers = engine.ask("rlalign_ops_stop", folder)
        return read(answers[0]), result


def examine(network: nn.Module, answer: Mapping[str, object]) -> Probed:
    """Every variant of every op in an engine's recording against the trainer's modules, with the engine's kernels."""
    return probe(network, Path(str(answer["file"])), answer["modules"], kernels=cpu_kernels)


def settle(probed: Probed, network: nn.Module) -> Settled:
    """Hold a probe against the one that was kept for the same versions, host, dtype and architecture; keep it if it is the first.

    A choice that was kept stands as long as no variant has fewer differing elements now.
    """
    file = _kept(network.config, network.dtype)
    now = probed.choices
    before = _read(file)
    if before is None:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, asdict(now))
        return Settled(probed, now, {}, file)
    beaten = [op for op in variants.OPS if probed.apart(op, getattr(now, op)) < probed.apart(op, getattr(before, op))]
    changed = {op: f"{getattr(before, op)} at an earlier start, {getattr(now, op)} now" for op in beaten}
    return Settled(probed, replace(before, **dict.fromkeys(changed, variants.MODEL)), changed, file)


def kept_plan(config: PretrainedConfig, dtype: torch.dtype) -> BodyPlan:
    """The plan that an earlier probe on this host settled for such a model. Raises RuntimeError where there was none."""
    file = _kept(config, dtype)
    choices = _read(file)
    if choices is None:
        raise RuntimeError(
            "no probe of a mirrored body is kept on this host for this model and these versions; `rlalign parity "
            "trainer.body=mirrored` makes one"
        )
    return BodyPlan(cpu_kernels, choices)


def _read(file: Path) -> Choices | None:
    if not file.is_file():
        return None
    try:
        return Choices(**json.loads(file.read_text()))
    except (json.JSONDecodeError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is no kept probe of a body ({error}); remove it") from error


def _kept(config: PretrainedConfig, dtype: torch.dtype) -> Path:
    about = environment.snapshot()
    shape = {name: value for name, value in config.to_dict().items() if name not in NO_ARITHMETIC}
    parts = (
        about["versions"], about["cpu"], torch.backends.cpu.get_cpu_capability(), widened.is_widened(dtype),
        torch.get_num_threads(), str(dtype), shape, [(v.op, v.name) for v in variants.TABLE], variants.SUMS,
    )  # fmt: skip
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]
    return cache_folder("bodies") / f"{digest}.json"


def mirror(
    model: nn.Module,
    engine: AttachedEngine | None = None,
    *,
    head_dtype: str = "float32",
    chunk: int = 0,
    keep_mib: int = 0,
    body: bool = False,
) -> Mirror:
    """Let a causal language model's lm_head project as the rollout engine does, and with body=True its layers round as its do.

    model, head_dtype, chunk, keep_mib, and errors of the head: `rlalign.trainer.live_mirror.mirror`. body: probe the engine's ops
    (it scores a few sequences; weights must be equal on both sides) and put the variants with the fewest differing bits into the
    model's layers, until `restore`; `Mirror.body` says what is mirrored and what is left, and why. engine: from `rlalign.attach`, a
    `vllm.LLM` on CPU that was started with RLALIGN_STEADY=1.
    Raises ValueError for body=True without an engine, off the CPU or for a body that is not bf16, RuntimeError for an engine
    that is compiled, sharded or serves adapters.
    """
    found = live_mirror.mirror(model, head_dtype=head_dtype, chunk=chunk, keep_mib=keep_mib)
    if not body:
        return found
    try:
        found.body = _mirror_body(found.inner, engine)
    except BaseException:
        found.restore()
        raise
    return found


def _mirror_body(model: nn.Module, engine: AttachedEngine | None) -> mirroring.MirroredBody:
    if engine is None:
        raise ValueError("mirror: body=True follows a living engine; pass the handle of rlalign.attach as engine=")
    mirroring.require_bf16_on_cpu(model)
    ids = torch.randint(
        model.config.get_text_config().vocab_size, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(0)
    )
    training = model.training
    model.eval()
    try:
        probed, _ = recorded(
            engine, lambda: engine.score(ids.tolist()), engine.shared, lambda answer: examine(model, answer)
        )
    finally:
        model.train(training)
    settled = settle(probed, model)
    done = mirroring.mirror_body(model, settled.choices, kernels=cpu_kernels)
    left = dict(done.left) | dict(probed.left) | dict(settled.changed)
    if unsteady := _unsteady(engine.status()):
        left["steadiness"] = (
            f"the engine's {unsteady[0]} and {len(unsteady) - 1} more change their bits with the number of rows: start it with "
            "RLALIGN_STEADY=1"
        )
    return replace(done, left=left, probed=probed)


def _unsteady(statuses: Sequence[Mapping[str, object]]) -> list[str]:
    return [name for status in statuses for name in status.get("unsteady", ())]
