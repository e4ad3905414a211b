"""`rlalign attach-check URL`: which head a living vLLM server runs on every rank, and whether it holds a folder's weights."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rlalign.config.sections import MEMORY_OF_ONE_BOX

if TYPE_CHECKING:
    from torch import Tensor

COLUMNS = ("rank", "mode", "body", "probe", "last call", "calls", "version", "head")


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("url", help="of a `vllm serve` with VLLM_SERVER_DEV_MODE=1, such as http://host:8000")
    parser.add_argument(
        "--head-dtype",
        default="float32",
        choices=("float32", "master", "model"),
        help="what it must run (default %(default)s)",
    )
    parser.add_argument("--model", type=Path, help="compare its weights with those of this Hugging Face folder")
    parser.add_argument(
        "--shared", type=Path, default=Path(MEMORY_OF_ONE_BOX), help="a folder that both can read (default %(default)s)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Ask, print and compare; the server is left as it is. Raises RuntimeError for what does not fit, which is exit code 1."""
    from rlalign.rollout.attached import attach

    key = os.environ.get("RLALIGN_ROLLOUT_KEY")
    engine = attach(
        arguments.url, head_dtype=arguments.head_dtype, key=key, shared=arguments.shared, after_generation=True
    )  # fmt: skip
    try:
        for line in table(engine.status()):
            print(line)
        if arguments.model is not None:
            found = engine.verify(folder_weights(arguments.model), hold=False)
            print(
                f"{found.tensors} weights of {arguments.model} are what {found.ranks} ranks compute with ({found.seconds:.1f} s)"
            )
    finally:
        engine.detach()
    return 0


def table(statuses: list[dict]) -> list[str]:
    """One line a rank, under a head line."""

    def dtype(found: dict | None) -> str:
        return "-" if found is None or found["dtype"] is None else str(found["dtype"])

    rows = [
        (s["rank"], s["mode"], s["body_dtype"], dtype(s["multiplied"]["probe"]), dtype(s["multiplied"]["sampled"]), s["calls"],
         s["policy_version"], s["head"])
        for s in statuses
    ]  # fmt: skip
    cells = [COLUMNS, *(tuple(map(str, row)) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(COLUMNS))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def folder_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a folder's safetensors files, by name. Raises ValueError for a folder without any."""
    from safetensors import safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"--model {folder}: no *.safetensors there")
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                yield name, tensors.get_tensor(name)
