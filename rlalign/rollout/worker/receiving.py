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
import vllm
from vllm.config import set_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from rlalign.head.cache import Epoch
from rlalign.rollout import versions
from rlalign.rollout.head.logits_processor import CACHE
from rlalign.rollout.worker import readback
from rlalign.weights import MASTER_WEIGHT, digest
from rlalign.weights.bucket import Entry
from rlalign.weights.file_transport import greet, read

logger = init_logger(__name__)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
Weights = Iterable[tuple[str, torch.Tensor]]


def as_held(place: readback.Place, published: torch.Tensor) -> torch.Tensor:
    """The published tensor as the engine should hold it: rounded to the dtype of its parameter there, where that is a float."""
    module = place.module
    whole = place.parameter == "weight" and isinstance(module, LinearBase | VocabParallelEmbedding)
    dtype = (
        module.params_dtype if whole else getattr(module, place.parameter).dtype
    )  # a packed weight's own may be anything
    return published.to(dtype) if dtype in FLOATS and published.dtype in FLOATS else published


@dataclass
class Update:
    """One publish under way on this worker."""

    version: int
    wire: bool  # through vLLM's weight-transfer engine, which opens and closes the reload itself
    after_failure: bool  # the last one did not end well: only all weights together make this worker sound again
    rebuilds: int
    started: float
    open: bool = True  # wire: vLLM's session is
    broken: bool = False  # no more buckets: some of one was lost
    tensors: int = 0
    bytes: int = 0
    expected: list[readback.Expected] = field(default_factory=list)
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

        told: also "init", what the engine is told. Raises ValueError for a vLLM without that interface or with another backend.
        """
        if not versions.has_weight_transfer(vllm.__version__):
            raise ValueError(
                f"vLLM {vllm.__version__} has no weight-transfer interface that rlalign knows (0.28 on); install a newer one, or "
                "use weights.transport=folder"
            )
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
        self.rlalign_update = Update(told["version"], wire, torn, CACHE.rebuilds, time.perf_counter())
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
        differ, fingerprint = readback.differing(update.expected)
        problems += [f"{name}: the engine computes with something else" for name in differ]
        problems += self._rlalign_take_master(update.master_VD) + self._rlalign_copy_problems()
        if told["whole"] or update.after_failure:
            problems += self._rlalign_missing(update)
        self.rlalign_torn = bool(problems)
        return {
            "version": version,
            "tensors": update.tensors,
            "bytes": update.bytes,
            "repaired": repaired,
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
        with set_current_vllm_config(self.vllm_config):
            if update.wire and update.open:
                self.finish_weight_update()
            else:
                finalize_layerwise_reload(self.get_model(), self.model_config)
        self.model_runner.reset_encoder_cache()
        self.model_runner.reset_mm_cache()
        if versions.keeps_lora_state(vllm.__version__):
            self.model_runner.reset_lora_state()
        Epoch.bump("rlalign_update")

    @contextmanager
    def _rlalign_noting(self, update: Update, entries: list[Entry]) -> Iterator[None]:
        """Inside, whatever is loaded into the model passes by `_note`: also what vLLM's own engines receive."""
        model = self.get_model()
        load = model.load_weights
        model.load_weights = lambda weights: load(self._rlalign_note(update, entries, weights))
        try:
            yield
        finally:
            del model.load_weights  # the instance's; the class's own shows again

    def _rlalign_note(self, update: Update, entries: list[Entry], weights: Weights) -> Weights:
        """Pass weights on, keeping what their read-back will need. Raises where one is not what was sent, or not the model's."""
        model, sent = self.get_model(), {entry.name: entry.digest for entry in entries}
        for name, tensor in weights:
            if update.wire and digest(tensor) != sent[name]:  # a file is checked whole, before any of it is loaded
                raise RuntimeError(f"{name}: its bytes are not those that were sent")
            update.tensors += 1
            update.bytes += tensor.nbytes
            if name == MASTER_WEIGHT:
                update.master_VD = readback.vocabulary_shard(self._rlalign_named_head()[1], tensor)
                continue
            place = readback.locate(model, name)
            if place is None:
                raise ValueError(f"{name}: no such weight in vLLM's {type(model).__name__}")
            held = as_held(place, tensor)
            as_sent = sent[name] if held is tensor else ""
            update.expected.append(readback.expect(name, place, held, offset=update.version, sent=as_sent))
            yield name, held

    def _rlalign_missing(self, update: Update) -> list[str]:
        """What of the model no bucket of this update brought, though all of it was needed."""
        model = self.get_model()
        came: dict[tuple[int, str], set[int | None]] = {}
        for place in (e.place for e in update.expected):
            came.setdefault((id(place.module), place.parameter), set()).add(place.part)
        missing = []
        for name, _ in model.named_parameters():
            path, _, parameter = name.rpartition(".")
            parts = came.get((id(model.get_submodule(path)), parameter), set())
            wanted = model.packed_modules_mapping.get(path.rpartition(".")[2], [name])
            if not parts or (None not in parts and len(parts) < len(wanted)):
                missing.append(f"{name}: not published, and this worker's own is not to be trusted")
        return missing
