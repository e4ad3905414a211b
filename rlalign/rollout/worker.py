"""Worker extension: the RPCs that rlalign adds to every vLLM worker (vLLM's `worker_extension_cls`).

vLLM mixes this class into its worker, so the names must not clash with it. Each method runs on every rank and returns plain
data. It is imported by name, not by the plugin, so that it can report that the plugin is missing.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import torch
import vllm
from safetensors import safe_open
from safetensors.torch import save_file
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

import rlalign
from rlalign import head
from rlalign.head_cache import Epoch, MasterHead, fingerprint
from rlalign.rollout import readback
from rlalign.rollout.capture import CaptureExtension
from rlalign.rollout.head_layer import (
    CACHE,
    AlignedLogitsProcessor,
    HeadMode,
    reads_weight_directly,
    require_plain_weight,
)
from rlalign.rollout.head_plugin import SLOT
from rlalign.weights import MANIFEST_KEY, MASTER_WEIGHT, WEIGHTS_FILE, digest


class WorkerExtension(CaptureExtension):
    """RPCs of one worker. State: the version acknowledged last."""

    rlalign_version: int = 0

    def rlalign_status(self) -> dict[str, object]:
        """Which head this rank runs, and what it has done so far.

        route: the product behind our modes (None when vLLM's own runs); copies: whether it needs an fp32 copy of the weight.
        head: name and kind of the module; bumps: how often each hook has announced a change of weights.
        """
        layer = self._rlalign_layer()
        name, lm_head = self._rlalign_named_head()
        holder = op_registry_oot.get(SLOT)
        ours = isinstance(layer, AlignedLogitsProcessor)
        master = layer.master if ours else MasterHead()
        if ours and layer.mode is not HeadMode.OFF:
            require_plain_weight(lm_head, name)
        plain = "weight" in dict(lm_head.named_parameters(recurse=False))
        return {
            "rank": self.rank,
            "pid": os.getpid(),
            "class": f"{type(layer).__module__}.{type(layer).__qualname__}",
            "slot_holder": None if holder is None else f"{holder.__module__}.{holder.__qualname__}",
            "mode": layer.mode.value if ours else None,
            **_route_of(layer, lm_head),
            "head": f"{name}: {type(lm_head).__name__}/{type(lm_head.quant_method).__name__}",
            "calls": layer.calls if ours else 0,
            "rebuilds": CACHE.rebuilds,
            "caught_by_fingerprint": CACHE.caught_by_fingerprint,
            "cache_bytes": CACHE.nbytes + master.nbytes,
            "masters_loaded": master.loads,
            "epoch": Epoch.value,
            "bumps": dict(Epoch.reasons),
            "fingerprint": digest(fingerprint(lm_head.weight)) if plain else None,
            "policy_version": self.rlalign_version,
            "rlalign": rlalign.__version__,
            "vllm": vllm.__version__,
            "vllm_plugins": os.environ.get("VLLM_PLUGINS"),
        }

    def rlalign_load(self, directory: str) -> dict[str, object]:
        """Load published weights, refresh the head, and prove on this rank that the engine computes with them.

        Returns an acknowledgement; `problems` lists every tensor that did not arrive or did not land, and is empty on success.
        """
        started = time.perf_counter()
        with safe_open(Path(directory) / WEIGHTS_FILE, framework="pt") as file:
            manifest = json.loads(file.metadata()[MANIFEST_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        count, size = len(tensors), sum(t.nbytes for t in tensors.values())
        problems = [
            f"{n}: bytes differ from the manifest" for n in tensors if digest(tensors[n]) != manifest["digests"][n]
        ]
        problems += [f"{n}: in the manifest, not in the file" for n in manifest["digests"] if n not in tensors]
        rebuilds, repaired = CACHE.rebuilds, []
        if not problems:
            master_VD = tensors.pop(MASTER_WEIGHT, None)
            try:
                self.reload_weights(weights_iterator=iter(tensors.items()))
            finally:
                Epoch.bump("rlalign_load")
            repaired = self._rlalign_repair_head(manifest["version"])
            problems = self._rlalign_take_master(master_VD) + self._rlalign_unlanded(tensors, manifest["version"])
        return {
            "rank": self.rank,
            "version": manifest["version"],
            "tensors": count,
            "bytes": size,
            "repaired": repaired,
            "problems": problems,
            "rebuilds": CACHE.rebuilds - rebuilds,
            "seconds": time.perf_counter() - started,
        }

    def rlalign_acknowledge(self, version: int) -> dict[str, object]:
        """Serve this version from now on; called once every rank has loaded it."""
        self.rlalign_version = version
        return {"rank": self.rank, "version": version}

    def rlalign_set_head(self, mode: str) -> dict[str, object]:
        """Switch the head mode of a live engine: for `rlalign parity`, never inside a run."""
        self._rlalign_layer().set_mode(HeadMode(mode))
        return {"rank": self.rank, "mode": mode}

    def rlalign_head_logits(self, hidden_file: str, batch: int) -> dict[str, object]:
        """Project stored hidden states through this engine's head, `batch` rows at a time as decoding would.

        hidden_file: safetensors with `hidden_ND`. Writes `logits_NV` beside it and answers with that file's path. The model's
        own compute_logits runs, so bias, soft cap and scale are in.
        """
        with safe_open(hidden_file, framework="pt") as file:
            hidden_ND = file.get_tensor("hidden_ND")
        model, device = self.get_model(), self._rlalign_named_head()[1].weight.device
        with torch.inference_mode():
            logits = [model.compute_logits(rows.to(device)) for rows in hidden_ND.split(batch)]
        if logits[0] is None:
            return {"rank": self.rank, "file": None}  # a tensor-parallel group gathers its logits on the first rank
        out = str(Path(hidden_file).with_suffix(".logits.safetensors"))
        save_file({"logits_NV": torch.cat(logits).float().cpu().contiguous()}, out)
        return {"rank": self.rank, "file": out}

    def _rlalign_layer(self) -> LogitsProcessor:
        layers = [m for m in self.get_model().modules() if isinstance(m, LogitsProcessor)]
        if len(layers) != 1:
            raise RuntimeError(
                f"expected one LogitsProcessor in {type(self.get_model()).__name__}, found {len(layers)}"
            )
        return layers[0]

    def _rlalign_named_head(self) -> tuple[str, VocabParallelEmbedding]:
        """The module that the layer was last given; before its first call, the one that the model's structure suggests."""
        layer = self._rlalign_layer()
        if isinstance(layer, AlignedLogitsProcessor) and layer.seen_head is not None:
            seen = layer.seen_head()
            for name, module in self.get_model().named_modules():
                if module is seen:
                    return name, module
        return readback.find_head(self.get_model())

    def _rlalign_repair_head(self, version: int) -> list[str]:
        """Re-pack an lm_head whose kernel still multiplies by the old weight.

        vLLM on CPU packs a tied lm_head at start-up and re-packs only `embed_tokens` on reload, so its own head stays stale.
        """
        name, lm_head = self._rlalign_named_head()
        if not readback.head_is_stale(lm_head, offset=version):
            return []
        lm_head.quant_method.process_weights_after_loading(lm_head)
        return [name]

    def _rlalign_take_master(self, master_VD: torch.Tensor | None) -> list[str]:
        """Keep this rank's rows of the published fp32 lm_head; problems when it is missing or belongs to another weight."""
        _, lm_head = self._rlalign_named_head()
        layer = self._rlalign_layer()
        if not isinstance(layer, AlignedLogitsProcessor):
            return []
        if master_VD is not None:
            try:
                layer.master.load(lm_head.weight, readback.vocabulary_shard(lm_head, master_VD))
            except RuntimeError as error:
                return [str(error)]
        elif layer.mode is HeadMode.MASTER and lm_head.weight.dtype != torch.float32:
            return [f"{MASTER_WEIGHT}: head_dtype=master, but the trainer sent no unrounded lm_head"]
        return []

    def _rlalign_unlanded(self, tensors: dict[str, torch.Tensor], version: int) -> list[str]:
        model = self.get_model()
        problems = []
        for name, tensor in tensors.items():
            place = readback.locate(model, name)
            if place is None:
                problems.append(f"{name}: no such weight in vLLM's {type(model).__name__}")
            elif not readback.landed(place, tensor, offset=version):
                problems.append(f"{name}: the engine computes with something else")
        name, lm_head = self._rlalign_named_head()
        if readback.head_is_stale(lm_head, offset=version):
            problems.append(f"{name}: its kernel still multiplies by an older weight")
        copies = _route_of(self._rlalign_layer(), lm_head)["copies"]
        if copies and not torch.equal(CACHE.get(lm_head.weight), lm_head.weight.float()):
            problems.append(f"{name}: the fp32 copy differs from the weight it was made of")
        return problems


def _route_of(layer: LogitsProcessor, lm_head: VocabParallelEmbedding) -> dict[str, object]:
    """{"route", "copies"} of this layer for hidden states in the body's dtype."""
    if not isinstance(layer, AlignedLogitsProcessor) or layer.mode in (HeadMode.OFF, HeadMode.NATIVE):
        return {"route": None, "copies": False}
    weight = lm_head.weight
    hidden = weight.new_empty(1, weight.shape[1])
    if layer.mode is HeadMode.MASTER:
        wide = weight.new_empty(1, weight.shape[1], dtype=torch.float32)
        return {"route": head.route(hidden, wide).value, "copies": False}
    copies = weight.dtype != torch.float32 and not reads_weight_directly(hidden, weight)
    wide = weight.new_empty(1, weight.shape[1], dtype=torch.float32) if copies else weight
    return {
        "route": head.route(hidden, wide, weight_is_bf16_valued=weight.dtype == torch.bfloat16).value,
        "copies": copies,
    }
