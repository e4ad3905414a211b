"""A weight-transfer backend for vLLM that needs no GPU: weights arrive as safetensors files in a folder all workers can read.

Select it with WeightTransferConfig(backend="rlalign_folder"). One update is vLLM's own sequence: start_weight_update, any number
of update_weights({"file": NAME}), finish_weight_update; generation must be paused in between, since parameters are on meta.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload


@dataclass
class FolderInit(WeightTransferInitInfo):
    """folder: readable by every worker; shared memory on one box."""

    folder: str


@dataclass
class FolderUpdate(WeightTransferUpdateInfo):
    """file: a safetensors file of that folder with checkpoint names and full tensors; several files make one update."""

    file: str


class FolderTransferEngine(WeightTransferEngine[FolderInit, FolderUpdate]):
    """Reads each file of an update and loads it layer by layer; every rank takes its own shard."""

    init_info_cls = FolderInit
    update_info_cls = FolderUpdate
    _folder: Path | None = None

    def init_transfer_engine(self, init_info: FolderInit) -> None:
        """Remember the folder. Raises ValueError when this worker cannot see it."""
        folder = Path(init_info.folder)
        if not folder.is_dir():
            raise ValueError(
                f"weight transfer: {folder} is not a folder on this worker; it must be shared by all of them"
            )
        self._folder = folder

    def start_weight_update(self) -> None:
        """Open the model for checkpoint tensors: its parameters go to the meta device."""
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: FolderUpdate) -> None:
        """Load one file. Raises RuntimeError before init, ValueError for a file that is missing or outside the folder."""
        if self._folder is None:
            raise RuntimeError("weight transfer: init_weight_transfer_engine was not called")
        file = (self._folder / update_info.file).resolve()
        if not file.is_relative_to(self._folder.resolve()) or not file.is_file():
            raise ValueError(f"weight transfer: no file {update_info.file!r} in {self._folder}")
        self.model.load_weights(_tensors(file))

    def finish_weight_update(self) -> None:
        """Close the update: what did not arrive keeps its old value, what did is packed for its kernel."""
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Nothing is held between updates."""
        self._folder = None


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118 (not a mapping)
            yield name, opened.get_tensor(name)
