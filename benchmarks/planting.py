"""One fault at a time in a real engine or trainer, for the diagnosis to find: what is planted, and which cause must be named.

Each plant takes a `Bench` in good order, tells it how to undo the damage, and returns the case that a diagnosis would see.
B sequences, L padded length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import MethodType

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.planting_bench import WIDTH, Bench
from rlalign.diagnose.suspects import Case
from rlalign.types import RolloutBatch

WHERE = 2  # the layer that is tampered with


def nothing(bench: Bench) -> Case:
    """No fault: no cause may be claimed."""
    return bench.case(bench.sample())


def norm_epsilon(bench: Bench) -> Case:
    """Another RMSNorm epsilon in one layer of the engine."""
    norm = bench.model().model.layers[WHERE].post_attention_layernorm
    bench.undo = partial(setattr, norm, "variance_epsilon", norm.variance_epsilon)
    norm.variance_epsilon = 1e-2
    return bench.case(bench.sample())


def rope_theta(bench: Bench) -> Case:
    """The engine rotates by another theta."""
    rotary = bench.model().model.layers[0].self_attn.rotary_emb
    bench.undo = partial(rotary.cos_sin_cache.copy_, rotary.cos_sin_cache.clone())
    positions, half = rotary.cos_sin_cache.shape[0], rotary.cos_sin_cache.shape[1] // 2
    frequencies = 500_000.0 ** (-torch.arange(half, dtype=torch.float32) / half)
    angles = torch.arange(positions, dtype=torch.float32)[:, None] * frequencies
    rotary.cos_sin_cache.copy_(torch.cat([angles.cos(), angles.sin()], dim=1))
    return bench.case(bench.sample())


def stale_layer(bench: Bench) -> Case:
    """After an update one layer of the engine still has the old weights."""
    bench.undo = bench.restore
    before = bench.move()
    kept = {n: before[n] if f"layers.{WHERE}." in n else p for n, p in bench.network.named_parameters()}
    bench.publish(kept)
    return bench.case(bench.sample())


def transposed_weight(bench: Bench) -> Case:
    """A square matrix arrived transposed."""
    bench.undo = bench.restore
    name = f"model.layers.{WHERE}.self_attn.o_proj.weight"
    weights = dict(bench.network.named_parameters())
    bench.publish(weights | {name: weights[name].t().contiguous()})
    return bench.case(bench.sample())


def half_updated_weight(bench: Bench) -> Case:
    """Of one matrix only the first half of the rows is new."""
    bench.undo = bench.restore
    name = f"model.layers.{WHERE}.mlp.gate_proj.weight"
    before = bench.move()
    weights = dict(bench.network.named_parameters())
    rows = weights[name].shape[0] // 2
    bench.publish(weights | {name: torch.cat([weights[name][:rows], before[name][rows:]])})
    return bench.case(bench.sample())


def head_of_the_engine(bench: Bench) -> Case:
    """The engine projects in bf16, the trainer in float32."""
    bench.undo = partial(bench.engine.set_head, bench.engine.mode)
    bench.engine.set_head("off")
    return bench.case(bench.sample())


def head_of_the_trainer(bench: Bench) -> Case:
    """The trainer projects in bf16, the engine in float32."""
    return bench.case(bench.sample(), partial(bench.score, head="model"))


def logit_factor(bench: Bench) -> Case:
    """The engine multiplies its logits by a factor that the trainer does not know."""
    layer = bench.model().logits_processor
    bench.undo = partial(setattr, layer, "scale", layer.scale)
    layer.scale = layer.scale * 0.9
    return bench.case(bench.sample())


def swapped_special_token(bench: Bench) -> Case:
    """The trainer's tokenizer has pad and eos the other way round."""
    case = bench.case(bench.sample())
    case.tokenizer.eos_token, case.tokenizer.pad_token = case.tokenizer.pad_token, case.tokenizer.eos_token
    return case


def missing_attention_mask(bench: Bench) -> Case:
    """The trainer pads on the left and passes no mask: shorter sequences attend to padding."""

    def score(batch: RolloutBatch) -> Tensor:
        length_B = batch.attention_mask_BL.sum(1).tolist()
        length = batch.token_ids_BL.shape[1]
        turned = [ids.roll(length - n) for ids, n in zip(batch.token_ids_BL, length_B, strict=True)]
        logprobs_BL = _logprobs(bench.network, torch.stack(turned), position_ids=None)
        back = [row.roll(n - length) for row, n in zip(logprobs_BL, length_B, strict=True)]
        return torch.where(batch.loss_mask_BL, torch.stack(back), 0.0)

    return bench.case(bench.sample(), score)


def wrong_positions(bench: Bench) -> Case:
    """Positions of the response count on from a prompt that was truncated: a gap of 7 after the prompt."""

    def score(batch: RolloutBatch) -> Tensor:
        positions_BL = torch.arange(batch.token_ids_BL.shape[1]).expand_as(batch.token_ids_BL)
        positions_BL = positions_BL + 7 * (batch.loss_mask_BL.cumsum(1) > 0)
        logprobs_BL = _logprobs(bench.network, batch.token_ids_BL, position_ids=positions_BL)
        return torch.where(batch.loss_mask_BL, logprobs_BL, 0.0)

    return bench.case(bench.sample(), score)


def _logprobs(network: nn.Module, token_ids_BL: Tensor, position_ids: Tensor | None) -> Tensor:
    """[B, L] by plain transformers, without an attention mask; entry t is about token t."""
    with torch.no_grad():
        body = network.base_model(input_ids=token_ids_BL, position_ids=position_ids, use_cache=False)
        weight = network.get_output_embeddings().weight
        logits = body.last_hidden_state.float() @ weight.float().t()
    chosen = logits[:, :-1].log_softmax(-1).gather(2, token_ids_BL[:, 1:, None])[..., 0]
    return torch.nn.functional.pad(chosen, (1, 0))


def temperature_ignored(bench: Bench) -> Case:
    """The engine samples at 0.7, the trainer scores at 1."""
    bench.sample_at(0.7)
    return bench.case(bench.sample())


def raw_logprobs(bench: Bench) -> Case:
    """The engine samples at 0.7 and reports raw logprobs."""
    sampler = bench.worker().model_runner.sampler

    def report(mode: str) -> None:
        sampler.logprobs_mode = sampler.topk_topp_sampler.logprobs_mode = mode

    bench.undo = partial(report, sampler.logprobs_mode)
    report("raw_logprobs")
    bench.sample_at(0.7)
    return bench.case(bench.sample(), partial(bench.score, temperature=0.7))


def top_p_unseen(bench: Bench) -> Case:
    """The engine samples with top-p 0.7 and says nothing of it; the trainer scores the whole vocabulary."""
    bench.engine.config.top_p, bench.engine.config.capture_ids = 0.7, 0  # behind the back of the engine's spec
    return bench.case(bench.sample())


def prefix_cache_kept(bench: Bench) -> Case:
    """Weights are published without a reset of the prefix cache."""
    bench.undo = bench.restore
    bench.sample()
    bench.move()
    bench.engine.reset_prefix_cache = lambda: None
    bench.publish(dict(bench.network.named_parameters()))
    del bench.engine.reset_prefix_cache
    return bench.case(bench.sample())


def adapter_not_applied(bench: Bench) -> Case:
    """The trainer trains a low-rank adapter of a projection; the engine serves the base weights."""
    bench.undo = bench.restore
    linear = bench.network.base_model.layers[WHERE].self_attn.q_proj
    generator = torch.Generator().manual_seed(2)
    a, b = (torch.randn(shape, generator=generator) * 0.2 for shape in ((4, WIDTH), (linear.out_features, 4)))
    linear.lora_A, linear.lora_B = (nn.Parameter(t.to(linear.weight.dtype)) for t in (a, b))
    linear.forward = MethodType(_with_adapter, linear)
    return bench.case(bench.sample())


def _with_adapter(linear: nn.Linear, x: Tensor) -> Tensor:
    return nn.Linear.forward(linear, x) + x @ linear.lora_A.t() @ linear.lora_B.t()


def stale_rank(bench: Bench) -> Case:
    """One of two tensor-parallel ranks goes on with the old weights."""
    bench.undo = bench.restore
    old = bench.shared / "old.safetensors"
    save_file({name: tensor.detach().contiguous() for name, tensor in bench.move().items()}, old)
    bench.publish(dict(bench.network.named_parameters()))
    bench.engine._llm.collective_rpc(_load_on_rank_one, args=(str(old),))
    old.unlink()
    return bench.case(bench.sample())


def _load_on_rank_one(worker: object, file: str) -> None:
    if worker.rank == 1:
        worker.reload_weights(weights_iterator=iter(load_file(file).items()))


FLOAT32, BFLOAT16, TWO_RANKS, FP8_CACHE = "float32", "bfloat16", "float32, 2 ranks", "bfloat16, fp8 cache"
BENCHES: dict[str, dict[str, str | int]] = {
    FLOAT32: {"body": "float32"},
    BFLOAT16: {"body": "bfloat16"},
    TWO_RANKS: {"body": "float32", "ranks": 2},
    FP8_CACHE: {"body": "bfloat16", "cache": "fp8"},
}
LAYER = f"layers.{WHERE}."


@dataclass(frozen=True)
class Fault:
    """plant: makes it. expected: the cause that must be named, and what its evidence must contain. benches: where it can be."""

    name: str
    plant: Callable[[Bench], Case]
    expected: str
    evidence: str = ""
    benches: tuple[str, ...] = (FLOAT32, BFLOAT16)


FAULTS = (
    Fault("RMSNorm epsilon of one layer", norm_epsilon, "norm epsilon", LAYER),
    Fault("rope theta", rope_theta, "rope theta", "in the engine and theta 1e+04 in the trainer"),
    Fault("a stale layer", stale_layer, "stale weights", f"layer(s) {WHERE}"),
    Fault("a transposed weight", transposed_weight, "stale weights", f"{LAYER}self_attn.o_proj.weight"),
    Fault("a half-updated weight", half_updated_weight, "stale weights", f"{LAYER}mlp.gate_proj.weight"),
    Fault("bf16 head in the engine", head_of_the_engine, "one-sided head", benches=(BFLOAT16,)),
    Fault("bf16 head in the trainer", head_of_the_trainer, "one-sided head", benches=(BFLOAT16,)),
    Fault("logits multiplied on one side", logit_factor, "logit factor", "0.9 times"),
    Fault("swapped special token", swapped_special_token, "tokenizer"),
    Fault("missing attention mask", missing_attention_mask, "attention mask"),
    Fault("wrong position ids after truncation", wrong_positions, "position ids"),
    Fault("temperature ignored", temperature_ignored, "temperature"),
    Fault("raw instead of processed logprobs", raw_logprobs, "raw against processed logprobs"),
    Fault("top-p without renormalisation", top_p_unseen, "truncation"),
    Fault("prefix cache not reset", prefix_cache_kept, "prefix cache after sync"),
    Fault("LoRA not applied", adapter_not_applied, "LoRA not applied"),
    Fault("one tensor-parallel rank stale", stale_rank, "one engine rank differs", "rank 1", benches=(TWO_RANKS,)),
    Fault("KV cache in fp8", nothing, "kv-cache dtype", "fp8", benches=(FP8_CACHE,)),
)
NO_FAULT = Fault("no fault", nothing, "", benches=(FLOAT32, BFLOAT16, TWO_RANKS))
