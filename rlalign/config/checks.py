"""What every section of the configuration refuses with: one readable line that names the key."""

from __future__ import annotations


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"configuration: {message}")


def positive(section: object, prefix: str, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        require(value > 0, f"{prefix}.{name}={value}: must be positive")
