"""The machine: room on disk and in shared memory, clocks that agree, memory for a float32 head."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from rlalign.assemble import resolve_model
from rlalign.config import Dtype, HeadDtype, RunConfig
from rlalign.diagnose.doctor.check import Check, judged

SKEW = 2.0  # seconds between this clock and a file system's; replays, alerts and reports are ordered by time
EARLIEST = 1_750_000_000  # 2025-06-15: older than this release, so a clock that says less is wrong


def disks(config: RunConfig) -> Iterator[Check]:
    """Where the run writes and where weights pass."""
    folder = _existing(Path(config.output_dir))
    model = resolve_model(config.model.path, say=lambda _: None)
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
    have = shutil.disk_usage(shared).free
    found = f"{have / 2**20:.0f} MiB free at {shared}, one copy of the weights is {weights / 2**20:.0f} MiB"
    yield judged("shared folder", have > 1.1 * weights, found, "choose a larger folder with weights.shared")


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
    about = json.loads((resolve_model(config.model.path, say=lambda _: None) / "config.json").read_text())
    text = about.get("text_config", about)
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


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder
