"""mirror() and mirror_check(): the engine's head, and body, in a living model; given tokens through both sides at equal weights.

The probe behind a mirrored body says how the living engine was found to round, now and at earlier starts.
Suffixes: B sequences, L padded length, N tokens, D hidden.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from rlalign import mismatch
from rlalign.cache_folder import cache_folder
from rlalign.head import widened
from rlalign.rollout.attached import AttachedEngine
from rlalign.rollout.worker import cpu
from rlalign.tracking import environment
from rlalign.tracking.files import write_json
from rlalign.trainer import head_isolation, live_mirror
from rlalign.trainer.live_mirror import Mirror
from rlalign.trainer.rounding import mirroring, variants
from rlalign.trainer.rounding.mirroring import BodyPlan, Choices
from rlalign.trainer.rounding.probing import Probed, probe

__all__ = [
    "LagZero",
    "Settled",
    "examine",
    "kept_plan",
    "mirror",
    "mirror_check",
    "recorded",
    "require_same_head",
    "settle",
]

T = TypeVar("T")
R = TypeVar("R")
NO_ARITHMETIC = ("_name_or_path", "dtype", "transformers_version", "architectures", "use_cache")  # of a model's config
SEQUENCES, LENGTH = 6, 40  # of made-up tokens, for an engine whose prompts are not known
HEAD_TOKENS = 256


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
        return BodyPlan(cpu, self.choices, self.probed)

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
    return probe(network, Path(str(answer["file"])), answer["modules"], kernels=cpu)


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
    return BodyPlan(cpu, choices)


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
    done = mirroring.mirror_body(model, settled.choices, kernels=cpu)
    left = dict(done.left) | dict(probed.left) | dict(settled.changed)
    unsteady = [name for status in engine.status() for name in status.get("unsteady", ())]
    if unsteady:
        left["steadiness"] = (
            f"the engine's {unsteady[0]} and {len(unsteady) - 1} more change their bits with the number of rows: start it with "
            "RLALIGN_STEADY=1"
        )
    return replace(done, left=left, probed=probed)


@dataclass(frozen=True, slots=True, kw_only=True)
class LagZero:
    """Mismatch at equal weights. whole: of the models; heads: of the two heads on the same hidden states, None for a sharded one.

    Values as `rlalign.compare` names them, in nats; heads also has each side's mean distance from float64 (rollout_error,
    trainer_error) and what rounding logits to bfloat16 would cost (bf16_error).
    """

    tokens: int
    whole: dict[str, float]
    heads: dict[str, float] | None

    def __str__(self) -> str:
        rows = [("", *head_isolation.KEPT), ("whole model", *(f"{self.whole[n]:.2e}" for n in head_isolation.KEPT))]
        if self.heads is not None:
            rows.append(("heads alone", *(f"{self.heads[n]:.2e}" for n in head_isolation.KEPT)))
        table = "\n".join(f"{row[0]:<12}" + "".join(f"{cell:>14}" for cell in row[1:]) for row in rows)
        return f"{table}\n{self.tokens} tokens, nats, temperature 1"


def mirror_check(engine: AttachedEngine, model: Mirror, token_ids: Sequence[Sequence[int]]) -> LagZero:
    """Score the same tokens on both sides and compare: engine mismatch without staleness, sampling or a loop around it.

    engine: from `rlalign.attach`, an LLM or a server. model: from `rlalign.mirror`. token_ids: sequences of two tokens or more;
    each token but the first is scored, at temperature 1 (vLLM applies none to prompt logprobs).
    Weights must be equal on both sides: `publish` or `verify` first. Raises RuntimeError for a head on one side only, ValueError
    for tokens that cannot be scored.
    """
    if not isinstance(model, Mirror):
        raise ValueError(
            f"mirror_check: got a {type(model).__name__} where a mirror belongs: its head is not the engine's; rlalign.mirror it"
        )
    require_same_head(engine, model)
    model.require_in_place()
    if not token_ids or min(len(each) for each in token_ids) < 2:
        raise ValueError("mirror_check: give sequences of at least two tokens; the first of each has no context")
    rollout_BL, ids_BL, mask_BL = _padded(engine.score(token_ids), token_ids)
    device = next(model.inner.parameters()).device
    inputs = {"input_ids": ids_BL.to(device), "attention_mask": mask_BL.long().to(device)}
    inputs["attention_mask"][:, 0] = 1
    training = model.model.training
    model.model.eval()
    try:
        with torch.no_grad():
            old_BL, _ = model.token_logprobs(inputs, mask_BL.to(device), exact=model.head_dtype == "float32")
            heads = _heads(engine, model, inputs, ids_BL, mask_BL)
    finally:
        model.model.train(training)
    whole = mismatch.compare(old_BL.cpu(), rollout_BL, mask_BL, positions=False)
    return LagZero(tokens=int(whole["tokens"]), whole={name: whole[name] for name in head_isolation.KEPT}, heads=heads)


def require_same_head(engine: AttachedEngine, model: Mirror | None) -> None:
    """Raise RuntimeError where only one of the two sides has the head: no better than none, and its numbers look plausible."""
    trainer = "the model's own" if model is None else model.head_dtype
    if engine.head_dtype == "model" and model is not None:
        raise RuntimeError(
            f"a head on one side only: the trainer is mirrored ({trainer}), the engine runs vLLM's own head. Start the engine "
            f"with RLALIGN_HEAD={trainer}, or restore() the mirror"
        )
    if engine.head_dtype != "model" and trainer != engine.head_dtype:
        raise RuntimeError(
            f"a head on one side only: the engine runs {engine.head_dtype} ({engine.mode}), the trainer {trainer}. Mirror it: "
            f'rlalign.mirror(model, head_dtype="{engine.head_dtype}")'
        )


def _padded(logprobs: Sequence[Sequence[float]], token_ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
    length = max(len(each) for each in token_ids)
    shape = (len(token_ids), length)
    rollout_BL, ids_BL = torch.zeros(shape), torch.zeros(shape, dtype=torch.int64)
    mask_BL = torch.zeros(shape, dtype=torch.bool)
    for b, (numbers, ids) in enumerate(zip(logprobs, token_ids, strict=True)):
        rollout_BL[b, : len(ids)], ids_BL[b, : len(ids)] = torch.tensor(numbers), torch.tensor(ids)
        mask_BL[b, 1 : len(ids)] = True
    return rollout_BL, ids_BL, mask_BL


def _heads(
    engine: AttachedEngine, model: Mirror, inputs: dict[str, Tensor], ids_BL: Tensor, mask_BL: Tensor
) -> dict[str, float] | None:
    weight = getattr(model.inner.get_output_embeddings(), "weight", None)
    if model.inner is not model.model or weight is None or not weight.numel() or hasattr(weight, "placements"):
        return None  # wrapped: the head's weight is whole inside a forward only
    hidden_BLD = model.inner.base_model(**inputs).last_hidden_state.to(engine.body_dtype)
    hidden_ND, ids_N = head_isolation.predicting(hidden_BLD.cpu(), ids_BL, mask_BL, limit=HEAD_TOKENS)
    return head_isolation.measure(
        engine, model.inner, hidden_ND, ids_N, temperature=1.0, shared=engine.shared, master_VD=model.status.master_VD
    )
