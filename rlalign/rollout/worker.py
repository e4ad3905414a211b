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
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

import rlalign
from rlalign.head_cache import Epoch, fingerprint
from rlalign.rollout import readback
from rlalign.rollout.head_layer import CACHE, AlignedLogitsProcessor, HeadMode
from rlalign.rollout.head_plugin import SLOT
from rlalign.weights import MANIFEST_KEY, WEIGHTS_FILE, digest


class WorkerExtension:
    """RPCs of one worker. State: the version acknowledged last."""

    rlalign_version: int = 0

    def rlalign_status(self) -> dict[str, object]:
        """Which head this rank runs, and what it has done so far."""
        layer = self._rlalign_layer()
        holder = op_registry_oot.get(SLOT)
        ours = isinstance(layer, AlignedLogitsProcessor)
        return {
            "rank": self.rank,
            "pid": os.getpid(),
            "class": f"{type(layer).__module__}.{type(layer).__qualname__}",
            "slot_holder": None if holder is None else f"{holder.__module__}.{holder.__qualname__}",
            "mode": layer.mode.value if ours else None,
            "calls": layer.calls if ours else 0,
            "rebuilds": CACHE.rebuilds,
            "caught_by_fingerprint": CACHE.caught_by_fingerprint,
            "cache_bytes": CACHE.nbytes,
            "epoch": Epoch.value,
            "fingerprint": digest(fingerprint(self._rlalign_head().weight)),
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
        problems = [
            f"{n}: bytes differ from the manifest" for n in tensors if digest(tensors[n]) != manifest["digests"][n]
        ]
        problems += [f"{n}: in the manifest, not in the file" for n in manifest["digests"] if n not in tensors]
        rebuilds, repaired = CACHE.rebuilds, []
        if not problems:
            try:
                self.reload_weights(weights_iterator=iter(tensors.items()))
            finally:
                Epoch.bump()
            repaired = self._rlalign_repair_head(manifest["version"])
            problems = self._rlalign_unlanded(tensors, manifest["version"])
        return {
            "rank": self.rank,
            "version": manifest["version"],
            "tensors": len(tensors),
            "bytes": sum(t.nbytes for t in tensors.values()),
            "repaired": repaired,
            "problems": problems,
            "rebuilds": CACHE.rebuilds - rebuilds,
            "seconds": time.perf_counter() - started,
        }

    def rlalign_acknowledge(self, version: int) -> int:
        """Serve this version from now on; called once every rank has loaded it."""
        self.rlalign_version = version
        return version

    def rlalign_set_head(self, mode: str) -> str:
        """Switch the head mode of a live engine: for `rlalign parity`, never inside a run."""
        self._rlalign_layer().set_mode(HeadMode(mode))
        return mode

    def rlalign_head_logits(self, hidden_file: str, batch: int) -> str:
        """Project stored hidden states through this engine's head, `batch` rows at a time as decoding would.

        hidden_file: safetensors with `hidden_ND`. Writes `logits_NV` beside it and returns that file's path.
        """
        with safe_open(hidden_file, framework="pt") as file:
            hidden_ND = file.get_tensor("hidden_ND")
        device = self._rlalign_head().weight.device
        with torch.inference_mode():
            logits = [self._rlalign_layer()(self._rlalign_head(), rows.to(device)) for rows in hidden_ND.split(batch)]
        if logits[0] is None:
            return ""  # the logits of a tensor-parallel group are gathered on its first rank
        from safetensors.torch import save_file

        out = str(Path(hidden_file).with_suffix(".logits.safetensors"))
        save_file({"logits_NV": torch.cat(logits).float().cpu().contiguous()}, out)
        return out

    def _rlalign_layer(self) -> LogitsProcessor:
        layers = [m for m in self.get_model().modules() if isinstance(m, LogitsProcessor)]
        if len(layers) != 1:
            raise RuntimeError(
                f"expected one LogitsProcessor in {type(self.get_model()).__name__}, found {len(layers)}"
            )
        return layers[0]

    def _rlalign_head(self) -> ParallelLMHead:
        return self.get_model().lm_head

    def _rlalign_repair_head(self, version: int) -> list[str]:
        """Re-pack an lm_head whose kernel still multiplies by the old weight.

        vLLM on CPU packs a tied lm_head at start-up and re-packs only `embed_tokens` on reload, so its own head stays stale.
        """
        lm_head = self._rlalign_head()
        if not readback.head_is_stale(lm_head, offset=version):
            return []
        lm_head.quant_method.process_weights_after_loading(lm_head)
        return ["lm_head"]

    def _rlalign_unlanded(self, tensors: dict[str, torch.Tensor], version: int) -> list[str]:
        model = self.get_model()
        problems = []
        for name, tensor in tensors.items():
            place = readback.locate(model, name)
            if place is None:
                problems.append(f"{name}: no such weight in vLLM's {type(model).__name__}")
            elif not readback.landed(place, tensor, offset=version):
                problems.append(f"{name}: the engine computes with something else")
        if readback.head_is_stale(self._rlalign_head(), offset=version):
            problems.append("lm_head: its kernel still multiplies by an older weight")
        layer = self._rlalign_layer()
        if isinstance(layer, AlignedLogitsProcessor) and layer.mode is HeadMode.CACHED:
            weight = self._rlalign_head().weight
            if not torch.equal(CACHE.get(weight), weight.float()):
                problems.append("lm_head: the fp32 copy differs from the weight it was made of")
        return problems
