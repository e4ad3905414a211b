"""attach(): an engine that somebody else started, proved, published to, verified and read as one of our own."""

from __future__ import annotations

import asyncio
import math
import os
import socket
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlalign.rollout import ENGINES
from rlalign.rollout.attached_lines import ActorLine, Line, lines_to
from rlalign.rollout.engine import handshake
from rlalign.rollout.engine.surface import compared_in
from rlalign.rollout.head.head_settings import HeadSettings
from rlalign.types import LogprobSpec
from rlalign.weights import MASTER_WEIGHT, SHARED_MEMORY, PublishReport, Transport
from rlalign.weights import publish as publish_weights
from rlalign.weights.bucket import who

__all__ = ["AttachedEngine", "VerifyReport", "attach"]

TOLD = 5  # problems that an error repeats
PROCESSED = {"processed_logprobs": True, "raw_logprobs": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What a verification looked at. tensors of `offered` were compared on every rank; complete: all of them were."""

    tensors: int
    offered: int
    bytes: int
    ranks: int
    seconds: float

    @property
    def complete(self) -> bool:
        """True when no tensor was left out."""
        return self.tensors == self.offered


def attach(
    engine: object,
    *,
    head_dtype: str = "float32",
    head_mode: str = "auto",
    loop: asyncio.AbstractEventLoop | None = None,
    key: str | None = None,
    shared: Path = SHARED_MEMORY,
    after_generation: bool = False,
    take_over: bool = False,
) -> AttachedEngine:
    """Ask every rank of a living engine which head it runs, and return a handle if that is the head asked for.

    engine: a `vllm.LLM`, an `AsyncLLM` (with `loop`, from another thread than its event loop's), the address of a `vllm serve`
    with VLLM_SERVER_DEV_MODE=1 (key: of its API), a Ray actor that has collective_rpc, or a list of these.
    head_dtype, head_mode: what RLALIGN_HEAD or additional_config asked of it. shared: a folder that its workers can read, for
    weights. after_generation: accept an engine that has sampled already: those tokens have no proof. take_over: accept one that
    another handle holds.
    Raises ValueError for what is no engine, RuntimeError naming the rank whose head, versions or history do not fit.
    """
    settings = HeadSettings(head_dtype, head_mode)
    lines = lines_to(engine, loop=loop, key=key)
    found = AttachedEngine(lines, settings, shared)
    try:
        found._shake_hands(after_generation=after_generation, take_over=take_over)
    except BaseException:
        found._close()
        raise
    return found


class AttachedEngine:
    """Handle of one engine, or of several that serve the same weights. Made by `attach`."""

    def __init__(self, lines: Sequence[Line], settings: HeadSettings, shared: Path) -> None:
        self._lines = list(lines)
        self.engines: list[str] = [line.name for line in self._lines]
        self.head_dtype, self.shared, self.mode = settings.head_dtype, shared, ""
        self._settings, self._owner = settings, f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self._doubt: str | None = None
        self._doubtful: int | None = None  # the adapter that the doubt is about; None: all weights
        self._turn = 0  # of the rotating samples of `verify`
        self._identity: list[dict] = []
        self.policy_version = 0

    # --- evidence ---

    def status(self) -> list[dict]:
        """What each rank's head is and did: class, mode, the dtype its logits were found to be multiplied in, calls, versions."""
        return self.ask("rlalign_status")

    def prove(self) -> list[dict]:
        """After the first tokens: every rank made them through this head, in the dtype it promises. Returns the ranks' answers.

        Raises RuntimeError naming the rank that did not.
        """
        statuses = self.status()
        self._require_head(statuses)
        handshake.require_called(statuses)
        handshake.require_multiplied(statuses)
        return statuses

    def spec(self, params: object = None) -> LogprobSpec:
        """The convention of logprobs sampled with these parameters: vLLM's SamplingParams, or a mapping as sent over HTTP.

        Without any, the engine's own defaults (the model's generation_config.json, unless started with generation_config=vllm).
        Raises ValueError for greedy sampling, and for an engine that returns logits.
        """
        said = self._identity[0]
        return spec_of_sampling(
            {} if params is None else params, logprobs_mode=said["logprobs_mode"], head_dtype=self.head_dtype,
            defaults=said["sampling_defaults"],
        )  # fmt: skip

    def identity(self) -> dict[str, Any]:
        """What the first rank said of itself: model, dtype, logprobs_mode, kv_cache_dtype, sampling_defaults, host and more."""
        return dict(self._identity[0])

    @property
    def body_dtype(self) -> torch.dtype:
        """What the engine's layers below the head compute in."""
        return getattr(torch, str(self._identity[0]["dtype"]))

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Teacher-forced logprobs of given tokens, entry t about token t, entry 0 is 0.0 (nats, temperature 1).

        Raises ValueError for Ray actors, which have no call that gives them, and where several engines are held.
        """
        self.require_sound()
        if len(self._lines) != 1 or isinstance(self._lines[0], ActorLine):
            raise ValueError(
                f"score: {', '.join(self.engines)} cannot be asked for prompt logprobs from here; attach a vllm.LLM, an AsyncLLM "
                "or one server, or sample with logprobs and give both sides' numbers to rlalign.compare"
            )
        return self._lines[0].score(sequences)

    def head_logits(self, hidden_file: Path, *, batch: int) -> Path:
        """Project stored hidden states through the engine's head, `batch` rows at a time; returns the file of logits."""
        return Path(self.ask("rlalign_head_logits", str(hidden_file), batch)[0]["file"])

    def require_sound(self) -> None:
        """Raise RuntimeError while the engine's weights are in doubt: after a publish or a verification that failed."""
        if self._doubt is not None:
            raise RuntimeError(f"this engine must not generate: {self._doubt}")

    # --- weights ---

    def publish(
        self, named_weights: Iterable[tuple[str, Tensor]], version: int, *, transport: Transport | None = None
    ) -> PublishReport:
        """Move full tensors by their Hugging Face names into the engine as policy `version`, and read back what it computes with.

        The trainer may hold another dtype than the engine: what must be found there is the value it should hold, the rounded
        one. In mode "master" a 32-bit lm_head travels unrounded, too. Raises RuntimeError when a tensor did not land; the
        engine then refuses to generate until a publish of all weights succeeds.
        """
        whole = _whole(named_weights)
        weights = self._with_master(whole) if self.head_dtype == "master" else whole
        return publish_weights(weights, version, receiver=self, shared=self.shared, transport=transport)

    def verify(
        self,
        named_weights: Iterable[tuple[str, Tensor]],
        *,
        sample: int | None = None,
        version: int | None = None,
        hold: bool = True,
    ) -> VerifyReport:
        """Compare the weights that the engine computes with, whoever pushed them there, with the trainer's; loads nothing.

        sample: compare so many tensors, other ones at every call, until all have had their turn; None compares all.
        version: stamp it on what is sampled from now on, and forget keys and values of older weights.
        Sampled columns of every row of a linear layer, through its kernel; every byte of the rest. Rounded as in `publish`.
        Raises RuntimeError naming what differs; with hold the engine then refuses to generate until a publish or verification
        of all weights passes.
        """
        if sample is not None and sample < 1:
            raise ValueError(f"verify: sample must be a positive number of tensors, or None for all; got {sample}")
        before = time.perf_counter()
        chosen, offered = self._chosen(named_weights, sample)
        size = sum(tensor.nbytes for tensor in chosen.values())
        with compared_in(self.shared, chosen) as file:
            answers = self.ask("rlalign_unlanded", file, self._turn)
        self._turn += 1
        self._compared += len(chosen)
        remedy = "They were not pushed, or under other names, or a kernel kept its packed copy; `publish` moves and proves them"
        self._require_landed(answers, f"of {len(chosen)} weights compared, the engine", remedy, hold=hold)
        if version is not None:
            self.acknowledge(version)
        elif len(chosen) == offered and self._doubt is not None:
            self.acknowledge(self.policy_version)
        return VerifyReport(
            tensors=len(chosen), offered=offered, bytes=size, ranks=len(answers), seconds=time.perf_counter() - before
        )

    def verify_adapter(
        self, folder: Path | str, adapter: int, *, version: int | None = None, hold: bool = True
    ) -> VerifyReport:
        """Compare the adapter that every rank holds under an id with the trainer's, layer by layer; loads nothing.

        folder: what peft's `save_pretrained` wrote, where the workers can read it. adapter: vLLM's `lora_int_id`. version: stamp it
        on what is sampled from now on, and forget keys and values of the adapter before: vLLM's prefix cache knows an adapter by
        name and path alone. Scaling, shards of tensor parallelism and packing are compared with what vLLM multiplies by.
        Raises RuntimeError naming rank and layers of an adapter that is not there, is an older one, is scaled otherwise or was
        dropped; with hold the engine then refuses to generate until this adapter passes. ValueError for files of something else
        than plain LoRA, and for an engine without adapters.
        """
        if self._doubtful != adapter:
            self.require_sound()
        before = time.perf_counter()
        answers = self.ask("rlalign_adapter", str(Path(folder).resolve()), adapter)
        if unread := [f"{who(a)}: {a['unread']}" for a in answers if "unread" in a]:
            raise ValueError(f"verify_adapter({str(folder)!r}, {adapter}): {unread[0]}")
        remedy = (
            "add_lora of an id that vLLM knows keeps what it has: use LoRARequest(..., load_inplace=True), or a new id for each "
            "version"
        )
        try:
            self._require_landed(answers, f"adapter {adapter}: the engine", remedy, hold=hold)
        except RuntimeError:
            self._doubtful = adapter if hold else self._doubtful
            raise
        if version is not None or self._doubt is not None:
            self.acknowledge(self.policy_version if version is None else version)
        tensors = int(answers[0]["tensors"])
        return VerifyReport(
            tensors=tensors, offered=tensors, bytes=int(answers[0]["bytes"]), ranks=len(answers),
            seconds=time.perf_counter() - before,
        )  # fmt: skip

    def detach(self) -> None:
        """Give the engine back: it keeps its head and its weights, and can be attached again. Safe to call twice."""
        if self._lines:
            self.ask("rlalign_claim", None)
            self._close()

    # --- the receiving side of weights.publish ---

    def ask(self, method: str, *args: object) -> list[dict]:
        """One RPC of every worker of every engine, at the same time; each answer with its "rank" and its "engine"."""
        return self.ask_each(method, [args] * len(self._lines))

    def ask_each(self, method: str, args_of_engine: Sequence[tuple]) -> list[dict]:
        """`ask` with a tuple of arguments for each of `engines`, in their order."""
        if not self._lines:
            raise RuntimeError("this handle was detached; attach the engine again")
        if len(self._lines) == 1:
            return self._lines[0].ask(method, args_of_engine[0])
        with ThreadPoolExecutor(len(self._lines)) as pool:
            calls = [pool.submit(line.ask, method, a) for line, a in zip(self._lines, args_of_engine, strict=True)]
            return [answer for call in calls for answer in call.result()]

    def suspend(self, reason: str) -> None:
        """Refuse to generate from now on."""
        self._doubt, self._doubtful = reason, None
        for line in self._lines:
            line.hold(reason)

    def acknowledge(self, version: int) -> None:
        """Stamp the version on everything sampled from now on, which uses no key or value of older weights."""
        self.ask("rlalign_acknowledge", version)
        for line in self._lines:
            line.release(version)
        self.policy_version, self._doubt, self._doubtful = version, None, None

    # --- inside ---

    def _require_landed(self, answers: Sequence[dict], what: str, remedy: str, *, hold: bool) -> None:
        """Raise RuntimeError for the problems that ranks found; with hold, refuse to generate because of them."""
        problems = [f"{who(a)}: {problem}" for a in answers for problem in a["problems"]]
        if not problems:
            return
        more = f"; and {len(problems) - TOLD} more" if len(problems) > TOLD else ""
        reason = f"{what} does not compute with the trainer's: {'; '.join(problems[:TOLD])}{more}. {remedy}"
        if hold:
            self.suspend(reason)
        raise RuntimeError(reason)

    def _shake_hands(self, *, after_generation: bool, take_over: bool) -> None:
        self._identity = self.ask("rlalign_identity")
        engines = {answer["engine"]: answer for answer in self._identity}.values()
        ranks = sum(int(answer["ranks"]) * int(answer.get(ENGINES, 1)) for answer in engines)
        if any(lacking := {"sampling_defaults", "owner"} - answer.keys() for answer in self._identity):
            raise RuntimeError(
                f"this engine's rlalign says nothing of its {min(lacking)}; install the same version everywhere"
            )
        owners = {answer["owner"] for answer in self._identity} - {None}
        if owners and not take_over:
            raise RuntimeError(
                f"this engine is attached already, by {min(owners)} (host:pid:handle). Two handles would publish over each other: "
                "use that one, detach() it, or pass take_over=True where its process is gone"
            )
        steps = max(int(answer["sampled_steps"]) for answer in self._identity)
        if steps and not after_generation:
            raise RuntimeError(
                f"this engine has sampled in {steps} steps before it was attached; nothing is known of those tokens' head and "
                "weights. Attach before the first generate, or pass after_generation=True and train on later tokens only"
            )
        statuses = self.status()
        self._require_head(statuses, ranks=ranks)
        self.policy_version = int(statuses[0]["policy_version"])
        self.ask("rlalign_claim", self._owner)

    def _require_head(self, statuses: list[dict], ranks: int | None = None) -> None:
        said = self._identity[0]
        self.mode = self._settings.resolve(device=str(said["device"])).value
        if self.mode != "off" and all(s["mode"] == "off" for s in statuses):
            raise RuntimeError(
                f"this engine runs vLLM's own head ({statuses[0]['body_dtype']}), and head_dtype={self.head_dtype} was asked for. "
                f"The head is chosen when an engine starts: start it with RLALIGN_HEAD={self.head_dtype} in its environment, or "
                f'with additional_config={{"rlalign": {{"head_dtype": "{self.head_dtype}"}}}}; or attach with head_dtype="model"'
            )
        handshake.require(statuses, mode=self.mode, ranks=len(statuses) if ranks is None else ranks)

    def _chosen(self, named_weights: Iterable[tuple[str, Tensor]], sample: int | None) -> tuple[dict[str, Tensor], int]:
        """The tensors of this turn, in copies, and how many were offered. All are looked at: shards may have to be gathered."""
        weights = ((n, t) for n, t in _whole(named_weights) if n != MASTER_WEIGHT)
        if sample is None:
            kept = {name: _copy(tensor) for name, tensor in weights}
            offered = len(kept)
        else:
            kept, offered, size = {}, 0, self._size
            first = self._turn * sample
            wanted = {(first + i) % size for i in range(min(sample, size))} if size else set(range(sample))
            for index, (name, tensor) in enumerate(weights):
                if index in wanted:
                    kept[name] = _copy(tensor)
                offered += 1
            self._size = offered
        if not kept:
            raise ValueError("verify: the trainer offered no weights")
        return kept, offered

    _size = 0  # tensors that the last sampled verification was offered
    _compared = 0  # by all verifications

    @property
    def every_tensor_had_its_turn(self) -> bool:
        """True when sampled verifications have compared, together, as many tensors as the trainer offers."""
        return 0 < self._size <= self._compared

    def _with_master(self, named_weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The weights, and at their end the lm_head once more, unrounded, unless the caller brings it."""
        head = str(self.status()[0]["head"]).split(":")[0].removeprefix("model.") + ".weight"
        unrounded, brought = None, False
        for name, tensor in named_weights:
            brought |= name == MASTER_WEIGHT
            if name.removeprefix("model.") == head:
                unrounded = tensor.detach().clone()
            yield name, tensor
        if brought or unrounded is None:
            return  # without a head the workers say what is missing
        if unrounded.dtype != torch.float32:
            raise ValueError(
                f"head_dtype=master projects with the trainer's unrounded lm_head; {head} was published in {unrounded.dtype} and "
                f"no {MASTER_WEIGHT} with it. Publish the float32 weights, or attach with head_dtype=float32"
            )
        yield MASTER_WEIGHT, unrounded

    def _close(self) -> None:
        for line in self._lines:
            line.close()
        self._lines = []


def _whole(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The same weights. Raises ValueError for a shard: published, it would be taken for the tensor."""
    for name, tensor in weights:
        remedy = None
        if name.rpartition(".")[2] == "_flat_param":
            remedy = "an FSDP flat parameter, many tensors in one"
        elif hasattr(tensor, "placements"):
            remedy = f"a DTensor, this rank's shard ({tensor.placements})"
        elif not tensor.numel():
            remedy = "empty; under ZeRO-3 it is partitioned"
        if remedy is not None:
            raise ValueError(
                f"{name} is {remedy}. Give whole tensors, such as those of rlalign.mirror(model).named_weights()"
            )
        yield name, tensor


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def spec_of_sampling(
    params: object, *, logprobs_mode: str, head_dtype: str, defaults: Mapping[str, object] | None = None
) -> LogprobSpec:
    """The convention of logprobs that an engine returns for a request.

    params: vLLM's SamplingParams, or a mapping of the settings sent over HTTP. defaults: what the engine puts in for settings that
    a mapping leaves out (its generation_config).
    Raises ValueError for a mode that gives logits, and for greedy sampling where logprobs are the sampler's.
    """
    if logprobs_mode not in PROCESSED:
        raise ValueError(
            f"this engine returns {logprobs_mode}, which are no log-probabilities; start it with logprobs_mode=processed_logprobs"
        )
    if isinstance(params, Mapping):
        params = {**(defaults or {}), **{name: value for name, value in params.items() if value is not None}}
    spec = LogprobSpec.of_sampling(params, processed=PROCESSED[logprobs_mode], head_dtype=head_dtype)
    if spec.processed and not 0.0 < spec.temperature < math.inf:
        raise ValueError(
            f"sampling at temperature {spec.temperature:g}: greedy tokens are drawn from no distribution; sample above 0"
        )
    return spec
