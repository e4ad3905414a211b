"""Worker extension: the RPCs that rlalign adds to every vLLM worker (vLLM's `worker_extension_cls`).

vLLM mixes this class into its worker, so the names must not clash with it. Each method runs on every rank and returns plain
data. It is imported by name, not by the plugin, so that it can report that the plugin is missing.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
import vllm
from safetensors import safe_open
from safetensors.torch import save_file
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

import rlalign
from rlalign.head import widened
from rlalign.head.cache import Epoch, MasterHead, fingerprint, rounds_to
from rlalign.rollout import SLOT, exact
from rlalign.rollout.head import logits_processor
from rlalign.rollout.head.head_settings import HeadMode
from rlalign.rollout.head.logits_processor import CACHE, AlignedLogitsProcessor, require_plain_weight, route_of
from rlalign.rollout.worker import cpu, readback
from rlalign.rollout.worker.adapters import AdapterExtension
from rlalign.rollout.worker.capture import CaptureExtension
from rlalign.rollout.worker.expert_routes import RoutesExtension
from rlalign.rollout.worker.model_identity import IdentityExtension
from rlalign.rollout.worker.op_record import OpRecordExtension
from rlalign.rollout.worker.receiving import ReceivingExtension
from rlalign.weights import MASTER_WEIGHT, digest


class WorkerExtension(
    AdapterExtension, CaptureExtension, IdentityExtension, OpRecordExtension, ReceivingExtension, RoutesExtension
):
    """RPCs of one worker. State: the version acknowledged last."""

    rlalign_version: int = 0

    def rlalign_status(self) -> dict[str, object]:
        """Which head this rank runs, and what it has done so far.

        route: the product behind our modes (None when vLLM's own runs); copies: whether it needs an fp32 copy of the weight;
        kernel: what carries it out in place of the library, with the same bits. products: how CPUs multiply the body's dtype.
        head: name and kind of the module; bumps: how often each hook has announced a change of weights. attention: classes that
        compute it; unsteady: linear layers whose bits may change with the number of rows; not_exact: everything that computes
        without `rlalign.head.exact`, empty in exact mode. multiplied: the dtype that logits were found to be
        computed in, by a probe now and by the last real call looked at; claimed: the checkpoint's own head_dtype, where it is
        another than the body's.
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
            **route_of(layer, lm_head),
            "head": f"{name}: {type(lm_head).__name__}/{type(lm_head.quant_method).__name__}",
            "products": None if (choice := widened.decide_for(lm_head)) is None else choice.products,
            "calls": layer.calls if ours else 0,
            "attention": exact.attention_classes(self.vllm_config),
            "unsteady": cpu.unsteady(self.get_model()),
            "not_exact": exact.not_exact(self.get_model(), self.vllm_config),
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
            "body_dtype": str(self.vllm_config.model_config.dtype).removeprefix("torch."),
            "claimed": layer.claimed if ours else None,
            "multiplied": self._rlalign_multiplied(layer, lm_head) if ours else None,  # last: it may make the fp32 copy
        }

    def rlalign_acknowledge(self, version: int) -> dict[str, object]:
        """Serve this version from now on; called once every rank has loaded it."""
        self.rlalign_version = version
        if self.rlalign_routes is not None:
            self.rlalign_routes.version = version
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

    def rlalign_unlanded(self, file: str, offset: int | None = None) -> dict[str, object]:
        """Weights of a safetensors file that this rank does not compute with; nothing is loaded or repaired.

        offset: of the sampled columns; None: the version that is served.
        """
        offset = self.rlalign_version if offset is None else offset
        differ, unknown = self._rlalign_not_held(file, offset)
        problems = [f"{name}: no such weight in vLLM's {type(self.get_model()).__name__}" for name in unknown]
        problems += [f"{name}: the engine computes with something else" for name in differ]
        problems += self._rlalign_head_problems(offset) + self._rlalign_copy_problems()
        return {"rank": self.rank, "problems": problems}

    def rlalign_require_landed(self, file: str, offset: int) -> None:
        """Raise RuntimeError for what `rlalign_unlanded` finds, and for vLLM's own head: where a stack drops workers' answers."""
        problems = self.rlalign_unlanded(file, offset)["problems"]
        layer = self._rlalign_layer()
        if not isinstance(layer, AlignedLogitsProcessor) or layer.mode is HeadMode.OFF:
            problems.append("it runs vLLM's own head: RLALIGN_HEAD did not reach the process that started it")
        if problems:
            raise RuntimeError(
                f"rank {self.rank} does not compute with what the trainer does: {'; '.join(problems[:5])}"
            )

    def _rlalign_multiplied(self, layer: AlignedLogitsProcessor, lm_head: VocabParallelEmbedding) -> dict[str, object]:
        seen = layer.watch.seen
        whole_path = self.vllm_config.lora_config is None  # adapters need the metadata of a batch
        probed = logits_processor.probe(self.get_model(), layer, lm_head, whole_path=whole_path)
        return {"probe": probed.as_dict(), "sampled": None if seen is None else seen.as_dict()}

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

    def _rlalign_repair_head(self, version: int) -> tuple[list[str], list[str]]:
        """Re-pack an lm_head whose kernel still multiplies by the old weight: (repaired, problems that are left).

        vLLM on CPU packs a tied lm_head at start-up and re-packs only `embed_tokens` on reload, so its own head stays stale.
        """
        name, lm_head = self._rlalign_named_head()
        if not readback.head_is_stale(lm_head, offset=version):
            return [], []
        lm_head.quant_method.process_weights_after_loading(lm_head)
        return [name], self._rlalign_head_problems(version)

    def _rlalign_take_master(self, shard_VD: torch.Tensor | None) -> list[str]:
        """Keep this rank's rows of the published fp32 lm_head; problems when they are missing or belong to another weight."""
        _, lm_head = self._rlalign_named_head()
        layer = self._rlalign_layer()
        if not isinstance(layer, AlignedLogitsProcessor):
            return []
        if shard_VD is not None:
            try:
                layer.master.load(lm_head.weight, shard_VD)
            except RuntimeError as error:
                return [str(error)]
        elif layer.mode is HeadMode.MASTER and lm_head.weight.dtype != torch.float32:
            return [f"{MASTER_WEIGHT}: head_dtype=master, but the trainer sent no unrounded lm_head"]
        return []

    def _rlalign_head_problems(self, version: int) -> list[str]:
        """Whether vLLM's own kernel multiplies by the lm_head's weight as it is now."""
        name, lm_head = self._rlalign_named_head()
        stale = readback.head_is_stale(lm_head, offset=version)
        return [f"{name}: its kernel still multiplies by an older weight"] if stale else []

    def _rlalign_copy_problems(self) -> list[str]:
        """Whether the fp32 copy, where this head needs one, is the weight's."""
        name, lm_head = self._rlalign_named_head()
        copies = route_of(self._rlalign_layer(), lm_head)["copies"]
        if copies and not rounds_to(CACHE.get(lm_head.weight), lm_head.weight):
            return [f"{name}: the fp32 copy differs from the weight it was made of"]
        return []
