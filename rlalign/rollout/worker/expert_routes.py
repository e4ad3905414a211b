"""Worker side of routed experts: which experts each token went through, of every request, prefix-cached prompts included.

vLLM's V2 runner, GPUs' default, returns routes with its completions; nothing is recorded here. The V1 runner returns none: vLLM's
own capturer is bound to its routers, and what it saw is kept twice: by request, and by the slot of the KV cache a token's keys went
to. A prompt that comes from the prefix cache is not computed again; its routes are those of the slots it is read from, as its keys
are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

NEVER = -1  # version of a slot or position that nothing went through


@dataclass
class Kept:
    """Routes [positions, layers, K] and the version of the weights that made each; grows as it is written."""

    routes: Tensor
    version_N: Tensor = field(default_factory=lambda: torch.full((0,), NEVER, dtype=torch.int32))
    _whole: int = 0

    def put(self, at_N: Tensor, routes: Tensor, version: Tensor | int) -> None:
        """Write at these places."""
        short = int(at_N.max()) + 1 - len(self.version_N) if len(at_N) else 0
        if short > 0:
            room = max(short, len(self.version_N))
            self.routes = torch.cat([self.routes, self.routes.new_zeros(room, *self.routes.shape[1:])])
            self.version_N = torch.cat([self.version_N, self.version_N.new_full((room,), NEVER)])
        self.routes[at_N], self.version_N[at_N] = routes, version

    def known(self) -> int:
        """Positions from the first on without a gap. What is known stays so: only what lies behind it is looked at."""
        gaps = (self.version_N[self._whole :] == NEVER).nonzero()
        self._whole = self._whole + int(gaps[0]) if len(gaps) else len(self.version_N)
        return self._whole


class RouteRecorder:
    """Routes of one rank from `start` on. layers: numbers of the decoder layers that are mixtures."""

    def __init__(self, runner: GPUModelRunner, vllm_config: VllmConfig) -> None:
        """Bind vLLM's capturer. Raises ValueError for a model without experts or a kernel that hides its routes."""
        from vllm.model_executor.layers.fused_moe.routed_experts_capturer import (
            RoutedExpertsCapturer,
            bind_routed_experts_capturer,
        )
        from vllm.v1.kv_cache_interface import FullAttentionSpec

        model = runner.get_model()
        self.layers, self.runner, self.version = mixture_layers(model), runner, 0
        self._seen: set[int] = set()
        self._capturer = RoutedExpertsCapturer(runner.max_num_tokens, vllm_config)
        bind_routed_experts_capturer(model, self)
        groups = runner.kv_cache_config.kv_cache_groups  # a sliding window's blocks are given back, with what they held
        self._group = next((i for i, g in enumerate(groups) if isinstance(g.kv_cache_spec, FullAttentionSpec)), 0)
        self.shape = (len(self.layers), self._capturer.shape_per_token[1])
        self.wide = self._capturer.output_dtype_name == "uint16"
        self._slots = Kept(self._none())
        self._requests: dict[int, Kept] = {}
        model.register_forward_pre_hook(self._begin)
        model.register_forward_hook(self._end)

    def capture(self, layer_id: int, topk_ids: Tensor) -> None:
        """Called by each router inside a forward."""
        self._seen.add(layer_id)
        self._capturer.capture(layer_id, topk_ids)

    def take(self) -> dict[int, dict[str, object]]:
        """{seed: its routes} of every request since the last call: "data" bytes, "positions", "versions" that made them."""
        found, self._requests = self._requests, {}
        return {
            seed: {
                "data": kept.routes[: (known := kept.known())].contiguous().view(torch.uint8).numpy().tobytes(),
                "positions": known,
                "versions": kept.version_N[:known].unique().tolist(),
            }
            for seed, kept in found.items()
        }

    def _none(self) -> Tensor:
        return torch.zeros(0, *self.shape, dtype=torch.int16 if self.wide else torch.uint8)

    def _begin(self, model: nn.Module, args: tuple) -> None:
        self._seen.clear()

    def _end(self, model: nn.Module, args: tuple, output: object) -> None:
        batch = self.runner.input_batch
        ends = self.runner.query_start_loc.np[: batch.num_reqs + 1]
        count = int(ends[-1])
        if not count:
            return
        if self._seen != set(self.layers):
            raise RuntimeError(
                f"routed experts: layers {sorted(set(self.layers) - self._seen)} of a forward were not seen; a captured graph or "
                "another kernel hides them. Start the engine with rollout.enforce_eager=true, or use rollout.replay_experts=off"
            )
        whole = self._capturer.snapshot_routing_data(count)
        routes = (whole.view(torch.int16) if self.wide else whole)[:, self.layers].cpu()
        table = batch.block_table[self._group]
        self._slots.put(table.slot_mapping.gpu[:count].cpu(), routes, self.version)
        for i, request_id in enumerate(batch.req_ids[: batch.num_reqs]):
            seed = getattr(self.runner.requests[request_id].sampling_params, "seed", None)
            if seed is not None:
                first = int(batch.num_computed_tokens_cpu[i])
                kept = self._requests.setdefault(seed, Kept(self._none()))
                self._from_slots(kept, kept.known(), first, table, i)
                own = routes[int(ends[i]) : int(ends[i + 1])]
                kept.put(torch.arange(first, first + len(own)), own, self.version)

    def _from_slots(self, kept: Kept, start: int, end: int, table: object, row: int) -> None:
        """Positions that this request did not compute: their keys came from the prefix cache."""
        if start >= end:
            return
        at_N = torch.arange(start, end)
        blocks_N = torch.from_numpy(table.block_table.np[row])[at_N // table.block_size].long()
        slot_N = blocks_N * table.block_size + at_N % table.block_size
        kept.put(at_N, self._slots.routes[slot_N], self._slots.version_N[slot_N])


def mixture_layers(model: nn.Module) -> list[int]:
    """Numbers of the decoder layers that are mixtures of experts. Raises ValueError where there is none."""
    from vllm.model_executor.layers.fused_moe.layer import MoERunner

    found = sorted({m.layer_id for m in model.modules() if isinstance(m, MoERunner)})
    if not found:
        raise ValueError(
            f"rollout.replay_experts: vLLM's {type(model).__name__} has no mixture of experts; use rollout.replay_experts=off"
        )
    return found


class RoutesExtension:
    """RPCs of one worker around routed experts."""

    rlalign_routes: RouteRecorder | None = None

    def rlalign_routes_start(self) -> dict[str, object]:
        """Record from now on, or leave it to the V2 runner ("returned").

        "layers": decoder layers that are mixtures, "k": experts of a token, "wide": two bytes an id.
        """
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner

        runner, model = self.model_runner, self.vllm_config.model_config
        layers = mixture_layers(runner.get_model())
        if returned := not isinstance(runner, GPUModelRunner):
            if getattr(runner, "aux_output_connector", None) is None:
                raise RuntimeError(
                    f"routed experts: vLLM's {type(runner).__module__}.{type(runner).__qualname__} was started without "
                    "enable_return_routed_experts (vLLM 0.32 and later, with a prefix cache); VLLM_USE_V2_MODEL_RUNNER=0 starts "
                    "the runner that is recorded here"
                )
        elif self.rlalign_routes is None:
            self.rlalign_routes = RouteRecorder(runner, self.vllm_config)
        wide, k = model.get_num_experts() > 256, model.get_num_experts_per_tok()
        return {"layers": layers, "k": k, "wide": wide, "returned": returned}

    def rlalign_routes_take(self) -> dict[str, object]:
        """ "routes" of every request with a seed since the last call; from the first tensor-parallel rank alone."""
        found = self.rlalign_routes.take()
        return {"routes": found if self.rank == 0 else {}}
