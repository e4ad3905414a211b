"""Adapters to stacks that people already run. Importing one imports its stack; nothing here is imported by anything else."""

from __future__ import annotations

import os

__all__ = ["require_tested"]


def require_tested(stack: str, found: str, tested: tuple[str, ...], *, allow: str, does: str, own: str) -> None:
    """Raise RuntimeError unless major.minor of `found` is in `tested`, or the variable `allow` is 1.

    does: what the adapter takes by name; own: the class of one's own that could do without it.
    """
    if ".".join(found.split(".")[:2]) in tested or os.environ.get(allow) == "1":
        return
    raise RuntimeError(
        f"{stack} {found} was not tried with this adapter ({', '.join(tested)} were), which {does} by name. Install a tested one; "
        f"or set {allow}=1 and read the first step's mismatch/lag0/k3; or use rlalign.attach and rlalign.mirror in your own {own}"
    )
