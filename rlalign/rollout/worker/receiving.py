"""The worker's side of a publish: begin, take a bucket any number of times, finish with the proof.

Between begin and finish vLLM's parameters are on the meta device and each layer is filled as soon as its tensors are there
(vLLM's layerwise reload); of a published tensor only what the read-back compares is kept. Every method answers instead of
raising: what went wrong is in `problems`, so that the publisher hears all ranks.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path

import torch
from vllm.config import set_current_vllm_config
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.logger import init_logger
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from rlalign.head.cache import Epoch
from rlalign.rollout.head.logits_processor import CACHE
from rlalign.rollout.worker import readback
from rlalign.rollout.worker.load_record import LoadRecord
from rlalign.weights import MASTER_WEIGHT, digest
from rlalign.weights.bucket import Entry
from rlalign.weights.file_transport import greet, read
from rlalign.weights.groups import GlooGroup, worker_name

logger = init_logger(__name__)
Weights = Iterable[tuple[str, torch.Tensor]]


@dataclass
class Update:
    """One publish under way on this worker."""

    version: int
    wire: bool  # through vLLM's weight-transfer engine, which opens and closes the reload itself
    after_failure: bool  # the last one did not end well: only all weights together make this worker sound again
    rebuilds: int
    started: float
    record: LoadRecord  # of what vLLM's own loaders make of the weights
    open: bool = True  # wire: vLLM's session is
    broken: bool = False  # no more buckets: some of one was lost
    tensors: int = 0
    bytes: int = 0
    sent: dict[str, str] = field(default_factory=dict)  # {name: digest} of what went to the loaders
    master_VD: torch.Tensor | None = None  # this rank's rows


def answering(method: Callable[..., dict]) -> Callable[..., dict]:
    """Turn an exception into a problem of the answer: raised in one of several workers, vLLM would lose the others' answers."""

    @wraps(method)
    def answer(self: ReceivingExtension, *args: object) -> dict[str, object]:
        try:
            return {"rank": self.rank, "problems": [], **method(self, *args)}
        except Exception as error:
            logger.exception("%s failed", method.__name__)
            if self.rlalign_update is not None:
                self.rlalign_update.broken = True
            return {"rank": self.rank, "problems": [f"{type(error).__name__} on {socket.gethostname()}: {error}"]}

    return answer


class ReceivingExtension:
    """RPCs of weights.publish, mixed into the worker extension."""

    rlalign_update: Update | None = None
    rlalign_torn: bool = False  # an update is under way, or did not end well

    def rlalign_whereabouts(self) -> dict[str, object]:
        """Where this worker runs, and the version it serves (None while its weights are in doubt)."""
        return {
            "rank": self.rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "device": self.device.type,
            "version": None if self.rlalign_torn else self.rlalign_version,
        }

    @answering
    def rlalign_join(self, told: dict) -> dict[str, object]:
        """Join the trainer's group with vLLM's weight-transfer engine of this "backend", made here unless the server has one.

        told: also "init", what the engine is told. Raises ValueError for a server with another backend.
        """
        from vllm.config import WeightTransferConfig
        from vllm.distributed.weight_transfer import WeightTransferEngineFactory

        if self.weight_transfer_engine is None:
            self.weight_transfer_engine = WeightTransferEngineFactory.create_engine(
                WeightTransferConfig(backend=told["backend"]), self.vllm_config, self.device, self.get_model()
            )
        elif self.weight_transfer_engine.config.backend != told["backend"]:
            raise ValueError(
                f"this server runs vLLM's weight transfer {self.weight_transfer_engine.config.backend!r}; start it without "
                f"--weight-transfer-config, or with backend {told['backend']!r}"
            )
        self.init_weight_transfer_engine(told["init"])
        return {}

    @answering
    def rlalign_begin(self, told: dict) -> dict[str, object]:
        """Open the model for a version's weights. told: "version", "route" ("files" or "wire"), and what the route needs."""
        if told["route"] == "files" and (problems := greet(Path(told["hello"]), told["timeout_s"])):
            return {"problems": problems}
        self._rlalign_close()  # an update that was given up
        torn, self.rlalign_torn, wire = self.rlalign_torn, True, told["route"] == "wire"
        with set_current_vllm_config(self.vllm_config):
            if wire:
                self.start_weight_update()
            else:
                initialize_layerwise_reload(self.get_model())
        record = LoadRecord(self.get_model(), told["version"])
        self.rlalign_update = Update(told["version"], wire, torn, CACHE.rebuilds, time.perf_counter(), record)
        record.watch()
        return {}

    @answering
    def rlalign_take(self, bucket: dict) -> dict[str, object]:
        """Load one bucket: its "file", or what the trainer is about to send over the wire."""
        update = self._rlalign_require_update()
        entries = [Entry(**entry) for entry in bucket["entries"]]
        with set_current_vllm_config(self.vllm_config), self._rlalign_noting(update, entries):
            if update.wire:
                update.open = False  # vLLM's session is over where this raises
                self.update_weights(bucket["update"])
                update.open = True
                return {}
            data, problems = read(Path(bucket["file"]), entries, mapped=bucket["mapped"], timeout_s=bucket["timeout_s"])
            update.broken = bool(problems)
            if data is not None:
                self.get_model().load_weights((entry.name, entry.view(data)) for entry in entries)
        return {"problems": problems}

    @answering
    def rlalign_finish(self, told: dict) -> dict[str, object]:
        """Close the update, refresh the head, and prove on this rank that the engine computes with what was sent.

        told: "version", and "whole": all weights must have come, as they must after an update that failed.
        Returns an acknowledgement; `problems` lists every tensor that did not arrive or did not land, and is empty on success.
        """
        update = self._rlalign_require_update()
        version = update.version
        self._rlalign_close()
        repaired, problems = self._rlalign_repair_head(version)
        record = update.record
        differ, fingerprint = readback.differing(record.expected)
        problems += [
            f"{name}: the engine computes with something else" for name in differ if name not in record.foreign
        ]
        problems += record.problems(update.sent)
        problems += self._rlalign_take_master(update.master_VD) + self._rlalign_copy_problems()
        if told["whole"] or update.after_failure:
            problems += self._rlalign_missing(update)
        self.rlalign_torn = bool(problems)
        return {
            "version": version,
            "tensors": update.tensors,
            "bytes": update.bytes,
            "repaired": repaired + record.repaired,
            "proofs": record.proofs(),
            "problems": problems,
            "fingerprint": fingerprint,
            "rebuilds": CACHE.rebuilds - update.rebuilds,
            "seconds": time.perf_counter() - update.started,
        }

    @answering
    def rlalign_abandon(self) -> dict[str, object]:
        """Give an update up. The parameters come back from meta, some of them with values of nobody's: not to be used."""
        self._rlalign_close()
        return {}

    def _rlalign_require_update(self) -> Update:
        if self.rlalign_update is None or self.rlalign_update.broken:
            raise RuntimeError("no update is under way here: it was never begun, or failed and must begin again")
        return self.rlalign_update

    def _rlalign_close(self) -> None:
        """End the layerwise reload, whatever has arrived."""
        update, self.rlalign_update = self.rlalign_update, None
        if update is None:
            return
        try:
            with set_current_vllm_config(self.vllm_config):
                if update.wire and update.open:
                    self.finish_weight_update()
                else:
                    finalize_layerwise_reload(self.get_model(), self.model_config)
        finally:
            update.record.release()
        self.model_runner.reset_encoder_cache()
        self.model_runner.reset_mm_cache()
        self.model_runner.reset_lora_state()
        Epoch.bump("rlalign_update")

    @contextmanager
    def _rlalign_noting(self, update: Update, entries: list[Entry]) -> Iterator[None]:
        """Inside, whatever is loaded into the model passes by `_note`: also what vLLM's own engines receive."""
        model = self.get_model()
        load = model.load_weights
        model.load_weights = lambda weights: update.record.load(load, self._rlalign_note(update, entries, weights))
        try:
            yield
        finally:
            del model.load_weights  # the instance's; the class's own shows again

    def _rlalign_note(self, update: Update, entries: list[Entry], weights: Weights) -> Weights:
        """Pass weights on, counted; the unrounded head stays here. Raises where one is not what was sent."""
        sent = {entry.name: entry.digest for entry in entries}
        for name, tensor in weights:
            if update.wire and digest(tensor) != sent[name]:  # a file is checked whole, before any of it is loaded
                raise RuntimeError(f"{name}: its bytes are not those that were sent")
            update.tensors += 1
            update.bytes += tensor.nbytes
            if name == MASTER_WEIGHT:
                update.master_VD = readback.vocabulary_shard(self._rlalign_named_head()[1], tensor)
                continue
            update.sent[name] = sent[name]
            yield name, tensor

    def _rlalign_missing(self, update: Update) -> list[str]:
        """What of the model no bucket of this update brought, though all of it was needed."""
        came = {id(getattr(e.module, e.parameter)) for e in update.record.expected}
        return [
            f"{name}: not published, and this worker's own is not to be trusted"
            for name, parameter in self.get_model().named_parameters()
            if id(parameter) not in came
        ]


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
