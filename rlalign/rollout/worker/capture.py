"""Worker side of attribution: activations of the live engine recorded, the tokens it decodes forced, its modules outlined.

Each method runs on every rank. Hooks see nothing of a compiled model, so capture asks for an eager engine; and they read the
state of vLLM's V1 model runner, so capture refuses any other. R output features of this rank, C input features, K sampled columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from vllm.config import CompilationMode, set_current_vllm_config
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from rlalign.rollout.worker import readback
from rlalign.rollout.worker.load_record import dry_record
from rlalign.rollout.worker.readback import Expected
from rlalign.rollout.worker.recording import LOGITS, UNKNOWN, Recorder, Tap

if TYPE_CHECKING:
    from vllm.v1.sample.metadata import SamplingMetadata

Sample = Callable[..., tuple[Tensor, Tensor | None]]  # vLLM's Sampler.sample: token ids [N], processed logprobs
SEQUENCE_KEY = "rlalign_sequence"  # SamplingParams.extra_args: which sequence of the batch a request is
FORCED_KEY = "rlalign_forced"  # SamplingParams.extra_args: the tokens to decode, whatever the sampler draws


def positions_of(args: tuple, kwargs: dict[str, object]) -> Tensor:
    """[N] positions that a model's forward is given; the last axis where it has several."""
    positions = kwargs["positions"] if "positions" in kwargs else args[1]
    return positions[-1] if positions.ndim == 2 else positions


def scheduled_rows(
    runner: GPUModelRunner, args: tuple, kwargs: dict[str, object], number: Callable[[str], int]
) -> Tensor:
    """[N, 3] (number of the request, position, decoded) of the scheduled tokens, in the order of the flattened batch."""
    batch, ends = runner.input_batch, runner.query_start_loc.np
    count = int(ends[batch.num_reqs])
    rows_N3 = torch.full((count, 3), UNKNOWN, dtype=torch.int64)
    rows_N3[:, 1] = positions_of(args, kwargs)[:count].cpu()
    for i, name in enumerate(batch.req_ids[: batch.num_reqs]):
        own = slice(int(ends[i]), int(ends[i + 1]))
        rows_N3[own, 0] = number(name)
        rows_N3[own, 2] = rows_N3[own, 1] >= len(runner.requests[name].prompt_token_ids)
    return rows_N3


@dataclass
class Capture:
    """One recording under way on this rank."""

    runner: GPUModelRunner
    recorder: Recorder
    handles: list[RemovableHandle] = field(default_factory=list)
    rows_N3: Tensor | None = None  # of the forward under way
    hidden_ND: Tensor | None = None  # what the model returned last: logits are projected from its rows

    def begin_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, object]) -> None:
        """Forward pre-hook of the model: which token each row is."""
        requests = self.runner.requests
        self.rows_N3 = scheduled_rows(
            self.runner, args, kwargs, lambda name: _extra(requests[name].sampling_params).get(SEQUENCE_KEY, UNKNOWN)
        )
        self.recorder.rows("tokens", self.rows_N3)

    def end_forward(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        """Forward hook of the model."""
        self.hidden_ND = output

    def take(self, tap: Tap, module: nn.Module, value: object) -> None:
        """Record one activation. It is copied at once: vLLM's fused norm overwrites its inputs."""
        tensor = _pick(value, tap.index)
        if tap.part is not None:
            tensor = tensor.split(part_sizes(module), dim=-1)[tap.part]
        count = len(self.rows_N3)
        self.recorder.write(tap.point, tensor[:count].reshape(count, -1))

    def take_logits(self, layer: nn.Module, args: tuple, kwargs: dict[str, object], logits_NV: Tensor | None) -> None:
        """Record logits with the tokens they were projected from: a slice of the last hidden states, or each request's last."""
        if logits_NV is None:
            return  # gathered on the first rank of the tensor-parallel group
        hidden_ND = kwargs["hidden_states"] if "hidden_states" in kwargs else args[1]
        whole_ND = self.hidden_ND
        if hidden_ND.untyped_storage().data_ptr() == whole_ND.untyped_storage().data_ptr():
            first = (hidden_ND.storage_offset() - whole_ND.storage_offset()) // whole_ND.shape[1]
            rows_N3 = self.rows_N3[first : first + len(hidden_ND)]
        else:
            ends = self.runner.query_start_loc.np[1 : self.runner.input_batch.num_reqs + 1]
            rows_N3 = self.rows_N3[torch.from_numpy(ends - 1).to(torch.int64)]
        if len(rows_N3) != len(logits_NV):
            raise RuntimeError(f"capture: {len(logits_NV)} rows of logits for {len(rows_N3)} tokens")
        self.recorder.rows(LOGITS, rows_N3)
        self.recorder.write(LOGITS, logits_NV.float(), table=LOGITS)

    def force(self, sampled_N: Tensor) -> Tensor:
        """The sampled tokens, with those of teacher-forced requests put in their place."""
        batch = self.runner.input_batch
        ends = self.runner.query_start_loc.np
        for i, request_id in enumerate(batch.req_ids[: batch.num_reqs]):
            request = self.runner.requests[request_id]
            forced = _extra(request.sampling_params).get(FORCED_KEY, ())
            step = int(self.rows_N3[int(ends[i + 1]) - 1, 1]) + 1 - len(request.prompt_token_ids)
            if 0 <= step < len(forced):
                sampled_N[i] = forced[step]
        return sampled_N


@dataclass
class Outline:
    """The modules of the first forward that ran: by name, in the order in which they began."""

    tokens: int = 0
    found: dict[str, dict[str, object]] = field(default_factory=dict)
    handles: list[RemovableHandle] = field(default_factory=list)

    def watch(self, model: nn.Module) -> None:
        """Hook every module. The model's own hook counts the tokens."""
        self.handles.append(model.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True))
        for name, module in model.named_modules():
            if name:
                self.handles += [
                    module.register_forward_pre_hook(
                        lambda m, args, kwargs, name=name: self._enter(name, m, args, kwargs), with_kwargs=True
                    ),
                    module.register_forward_hook(lambda m, args, output, name=name: self._leave(name, output)),
                ]

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict[str, object]) -> None:
        self.tokens = self.tokens or len(positions_of(args, kwargs))

    def _enter(self, name: str, module: nn.Module, args: tuple, kwargs: dict[str, object]) -> None:
        if name not in self.found:
            inputs = self._widths((*args, *kwargs.values()))
            self.found[name] = {"class": type(module).__name__, "inputs": inputs, "outputs": None}

    def _leave(self, name: str, output: object) -> None:
        about = self.found.get(name)
        if about is not None and about["outputs"] is None:
            about["outputs"] = self._widths(output if isinstance(output, tuple | list) else (output,))

    def _widths(self, values: tuple | list) -> list[tuple[int, int]]:
        """(place, features of one token) of what has as many rows as there are tokens."""
        return [
            (i, v.numel() // self.tokens)
            for i, v in enumerate(values)
            if isinstance(v, Tensor) and v.is_floating_point() and v.ndim > 1 and self.tokens in v.shape[:2]
        ]


class CaptureExtension:
    """RPCs of one worker that `rlalign attribute` adds. State: the recording, and the outline, under way."""

    rlalign_capture: Capture | None = None
    rlalign_outline: Outline | None = None

    def rlalign_modules(self) -> dict[str, dict[str, str]]:
        """ "modules": {name: class} of the engine's modules, for pairing them with the trainer's."""
        return {"modules": {name: type(module).__qualname__ for name, module in self.get_model().named_modules()}}

    def rlalign_capture_start(self, directory: str, taps: list[tuple]) -> dict[str, int]:
        """Record these taps of every forward from now on, under directory/rank<N>; answers how many there are.

        taps: (point, module, side, index, part). Raises RuntimeError for a compiled engine, a model runner that capture does
        not know, or a recording under way.
        """
        self._rlalign_refuse_capture()
        model = self.get_model()
        capture = Capture(self.model_runner, Recorder(Path(directory) / f"rank{self.rank}"))
        capture.handles.append(model.register_forward_pre_hook(capture.begin_forward, with_kwargs=True))
        capture.handles.append(model.register_forward_hook(capture.end_forward))
        for tap in (Tap(*fields) for fields in taps):
            capture.handles.append(_hook(capture, tap, model.get_submodule(tap.module)))
        (layer,) = [m for m in model.modules() if isinstance(m, LogitsProcessor)]
        capture.handles.append(layer.register_forward_hook(capture.take_logits, with_kwargs=True))
        sampler = self.model_runner.sampler
        sampler.sample = _forced(sampler.sample, capture)
        self.rlalign_capture = capture
        return {"taps": len(taps)}

    def rlalign_capture_stop(self) -> dict[str, dict[str, int]]:
        """End the recording; "rows": {point: rows}. Does nothing when none is under way."""
        capture, self.rlalign_capture = self.rlalign_capture, None
        if capture is None:
            return {"rows": {}}
        for handle in capture.handles:
            handle.remove()
        del capture.runner.sampler.sample  # the instance's; the class's own shows again
        return {"rows": capture.recorder.close()}

    def rlalign_differing_weights(self, file: str) -> dict[str, list[str]]:
        """Tensors of a safetensors file by name: those that this rank does not compute with, and the unknown to it."""
        differ, unknown = self._rlalign_not_held(file, offset=0)
        return {"differ": differ, "unknown": unknown}

    def _rlalign_not_held(self, file: str, offset: int) -> tuple[list[str], list[str]]:
        """Names of a safetensors file whose tensors this rank does not compute with, and those that the engine has no place for."""
        with safe_open(file, framework="pt") as tensors, set_current_vllm_config(self.vllm_config):
            weights = ((name, tensors.get_tensor(name)) for name in tensors.keys())  # noqa: SIM118 (not a mapping)
            record, unknown = dry_record(self.get_model(), weights, offset=offset)
        differ, _ = readback.differing(record.expected)
        return [*record.foreign, *differ], unknown + record.ignored

    def rlalign_constants(self) -> dict[str, object]:
        """What no publish carries: "epsilons" {norm: value}, and "frequencies" that positions are rotated by."""
        epsilons: dict[str, float] = {}
        frequencies: list[float] = []
        for name, module in self.get_model().named_modules():
            if isinstance(module, RMSNorm):
                epsilons[name] = float(module.variance_epsilon)
            elif isinstance(module, RotaryEmbeddingBase):
                cosine, sine = module.cos_sin_cache[1].float().chunk(2)  # of position 1: the frequencies themselves
                frequencies = torch.atan2(sine, cosine).tolist()
        return {"epsilons": epsilons, "frequencies": frequencies}

    def rlalign_outline_start(self) -> dict[str, object]:
        """Watch the next forward."""
        self._rlalign_refuse_capture()
        self.rlalign_outline = Outline()
        self.rlalign_outline.watch(self.get_model())
        return {}

    def rlalign_outline_stop(self) -> dict[str, object]:
        """ "modules": {name: class, inputs and outputs as (place, features)} in their order."""
        outline, self.rlalign_outline = self.rlalign_outline, None
        for handle in outline.handles:
            handle.remove()
        return {"modules": outline.found}

    def rlalign_places(self, file: str) -> dict[str, object]:
        """ "places": {name of a safetensors file's tensor: (module, part)}, where its features are the module's in their order.

        part: which piece of a fused projection it is, None for the whole of it. A tensor whose features the engine keeps in another
        order, or in several modules, is left out.
        """
        names = {module: name for name, module in self.get_model().named_modules()}
        with safe_open(file, framework="pt") as tensors, set_current_vllm_config(self.vllm_config):
            weights = ((name, tensors.get_tensor(name)) for name in tensors.keys())  # noqa: SIM118 (not a mapping)
            record, _ = dry_record(self.get_model(), weights, offset=0)
            places: dict[str, list] = {}
            for e in record.expected:
                for owner, rows_R in e.owners:
                    part = _part(e, rows_R, tensors.get_tensor(owner)) if owner in tensors.keys() else -1  # noqa: SIM118
                    places.setdefault(owner, []).append((names.get(e.module, ""), part))
        single = {owner: found[0] for owner, found in places.items() if len(found) == 1 and found[0][1] != -1}
        return {"places": single}

    def _rlalign_refuse_capture(self) -> None:
        runner = self.model_runner
        if not isinstance(runner, GPUModelRunner):
            raise RuntimeError(
                f"capture reads the state of vLLM's V1 model runner; this engine runs {type(runner).__module__}."
                f"{type(runner).__qualname__}. Start it with VLLM_USE_V2_MODEL_RUNNER=0"
            )
        if runner.vllm_config.compilation_config.mode != CompilationMode.NONE:
            raise RuntimeError(
                "capture sees nothing of a compiled model; start the engine with rollout.enforce_eager=true"
            )
        if self.rlalign_capture is not None:
            raise RuntimeError("a recording is under way in this engine; stop it first (rlalign_capture_stop)")


def part_sizes(module: nn.Module) -> list[int]:
    """Widths of the pieces of a fused projection on this rank. Raises RuntimeError when the module is not fused."""
    if not isinstance(module, LinearBase) or len(getattr(module, "output_partition_sizes", ())) < 2:
        raise RuntimeError(f"{type(module).__name__} is no fused projection: it has no parts to split")
    return module.output_partition_sizes


def _hook(capture: Capture, tap: Tap, module: nn.Module) -> RemovableHandle:
    if tap.side == "input":
        return module.register_forward_pre_hook(
            lambda module, args, kwargs: capture.take(tap, module, (*args, *kwargs.values())), with_kwargs=True
        )
    return module.register_forward_hook(lambda module, args, output: capture.take(tap, module, output))


def _forced(sample: Sample, capture: Capture) -> Sample:
    """The sampler's own `sample`, whose logprobs then are those of the forced tokens."""

    def sample_forced(
        logits_NV: Tensor, metadata: SamplingMetadata, logprobs_mode_override: str | None = None
    ) -> tuple[Tensor, Tensor | None]:
        sampled_N, logprobs = sample(logits_NV, metadata, logprobs_mode_override)
        return capture.force(sampled_N), logprobs

    return sample_forced


def _pick(value: object, index: int) -> Tensor:
    if isinstance(value, Tensor) and index == 0:
        return value
    if not isinstance(value, tuple | list) or index >= len(value) or not isinstance(value[index], Tensor):
        raise RuntimeError(f"capture: expected a tensor at place {index} of {type(value).__name__}")
    return value[index]


def _extra(params: object) -> dict[str, object]:
    """extra_args of a request's sampling parameters; none for a pooling request."""
    return (params.extra_args if params is not None else None) or {}


def _part(e: Expected, rows_R: Tensor | None, published: Tensor) -> int | None:
    """-1 where the features have no place of their own, or another order."""
    if e.sample_KR is None:
        return None if len(e.owners) == 1 else -1
    own_RK, whole = e.sample_KR.t()[rows_R], published.detach().to(e.sample_KR)
    if not _in_order(own_RK, whole, e) and not _in_order(own_RK, whole.t(), e):
        return -1
    sizes = list(getattr(e.module, "output_partition_sizes", ()))
    if bool(rows_R.all()):
        return (
            None if len(sizes) < 2 or e.module.tp_size == 1 else -1
        )  # of several ranks the pieces would come interleaved
    start, count = int(rows_R.nonzero()[0]), int(rows_R.sum())
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return starts.index(start) if start in starts and sizes[starts.index(start)] == count else -1


def _in_order(own_RK: Tensor, whole_RC: Tensor, e: Expected) -> bool:
    """Whether this rank's rows are consecutive rows of the whole. Where its inputs are a shard, all rows are here and summed up."""
    count, inputs = len(own_RK), getattr(e.module, "input_size_per_partition", e.module.input_size)
    if whole_RC.ndim != 2 or count > len(whole_RC) or inputs > whole_RC.shape[1]:
        return False
    if inputs < whole_RC.shape[1]:
        return count == len(whole_RC)
    seen_RK = whole_RC[:, e.columns_K]
    return any(torch.equal(seen_RK[i : i + count], own_RK) for i in range(0, len(whole_RC) - count + 1, count))
