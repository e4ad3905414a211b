"""Ready files: how servers are found without guessed ports. A server writes one when it answers and removes it when it ends.

One JSON file a server, url, host, pid, model, versions and key, readable by its owner alone: who may read it may steer the server.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

SUFFIX = ".server.json"


@dataclass(frozen=True, kw_only=True)
class Announcement:
    """A server that is ready. pid: of vLLM's HTTP process on `host`; key: None where none is asked for."""

    url: str
    host: str
    pid: int
    model: str
    vllm: str
    rlalign: str
    key: str | None = None


def write(folder: Path, announced: Announcement) -> Path:
    """Announce a server; the file appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    name = announced.url.split("://")[1].replace(":", "-").replace("[", "").replace("]", "")
    file, partial = folder / f"{name}{SUFFIX}", folder / f".{name}.partial"
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as out:
        json.dump(asdict(announced), out, indent=1)
    partial.replace(file)
    return file


def read_all(folder: Path) -> Iterator[Announcement]:
    """Every announced server, whether it still lives or not. Raises ValueError for a file that is no announcement."""
    for file in sorted(folder.glob(f"*{SUFFIX}")):
        try:
            yield Announcement(**json.loads(file.read_text()))
        except FileNotFoundError:  # its server ended just now
            continue
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file}: no announcement of `rlalign rollout-server` ({error}); remove it") from error
