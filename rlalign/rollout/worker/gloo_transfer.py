"""vLLM's weight-transfer interface without a GPU: an engine that receives buckets over gloo from the trainer's first rank.

Select it with WeightTransferConfig(backend="rlalign_gloo"), or let a publish with weights.transport=gloo install it in a server
that was started without a backend. One update is vLLM's own sequence: start_weight_update, any number of update_weights,
finish_weight_update; generation must be paused in between, since parameters are on meta.
Memory: one bucket, and of it what waits for the other parts of its layer.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from rlalign.weights.bucket import Entry
from rlalign.weights.gloo import GlooGroup, worker_name


@dataclass
class GlooInit(WeightTransferInitInfo):
    """address, port: of the trainer's store. size: the trainer and all workers of all servers. timeout_s: of every wait.

    engine: what the trainer calls the server of this worker.
    """

    address: str
    port: int
    size: int
    timeout_s: float
    engine: str


@dataclass
class GlooUpdate(WeightTransferUpdateInfo):
    """entries: the tensors of the next bucket (`rlalign.weights.bucket.Entry`), in the order of its bytes."""

    entries: list[dict]


class GlooTransferEngine(WeightTransferEngine[GlooInit, GlooUpdate]):
    """Takes part in the trainer's broadcast of every bucket and loads it layer by layer; every rank takes its own shard."""

    init_info_cls = GlooInit
    update_info_cls = GlooUpdate
    _group: GlooGroup | None = None

    def init_transfer_engine(self, init_info: GlooInit) -> None:
        """Join the trainer's group, leaving an older one. Raises RuntimeError when that takes longer than the timeout."""
        self.shutdown()
        parallel = self.parallel_config
        rank = parallel.data_parallel_index * parallel.world_size + parallel.rank  # over all engines of the server
        name = worker_name(init_info.engine, rank)
        self._group = GlooGroup.join(
            init_info.address, init_info.port, init_info.size, name=name, timeout_s=init_info.timeout_s
        )

    def start_weight_update(self) -> None:
        """Open the model for checkpoint tensors: its parameters go to the meta device."""
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: GlooUpdate) -> None:
        """Receive one bucket and load it. Raises RuntimeError before init and when the trainer or a worker is lost."""
        if self._group is None:
            raise RuntimeError("weight transfer: init_weight_transfer_engine was not called")
        entries = [Entry(**entry) for entry in update_info.entries]
        data = self._group.receive(entries[-1].end)
        self.model.load_weights((entry.name, entry.view(data)) for entry in entries)

    def finish_weight_update(self) -> None:
        """Close the update: what did not arrive keeps its old value, what did is packed for its kernel."""
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Leave the group."""
        if self._group is not None:
            self._group.close()
            self._group = None
