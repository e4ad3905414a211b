"""One fault at a time in a real engine or trainer, for the diagnosis to find: what is planted, and which cause must be named.

Each plant takes a `Bench` in good order and yields the case that a diagnosis would see; afterwards the bench is in order again.
B sequences, L padded length.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.planting_bench import WIDTH, Bench
from rlalign.diagnose.both_sides import at_temperature
from rlalign.diagnose.suspects import Case
from rlalign.types import RolloutBatch

WHERE = 2  # the layer that is tampered with


@contextmanager
def nothing(bench: Bench) -> Iterator[Case]:
    """No fault: no cause may be claimed."""
    yield bench.case(bench.sample())


@contextmanager
def norm_epsilon(bench: Bench) -> Iterator[Case]:
    """Another RMSNorm epsilon in one layer of the engine."""
    norm = bench.model().model.layers[WHERE].post_attention_layernorm
    before, norm.variance_epsilon = norm.variance_epsilon, 1e-2
    yield bench.case(bench.sample())
    norm.variance_epsilon = before


@contextmanager
def rope_theta(bench: Bench) -> Iterator[Case]:
    """The engine rotates by another theta."""
    rotary = bench.model().model.layers[0].self_attn.rotary_emb
    before = rotary.cos_sin_cache.clone()
    half = before.shape[1] // 2
    frequencies = 500_000.0 ** (-torch.arange(half, dtype=torch.float32) / half)
    angles = torch.arange(before.shape[0], dtype=torch.float32)[:, None] * frequencies
    rotary.cos_sin_cache.copy_(torch.cat([angles.cos(), angles.sin()], dim=1))
    yield bench.case(bench.sample())
    rotary.cos_sin_cache.copy_(before)


@contextmanager
def stale_layer(bench: Bench) -> Iterator[Case]:
    """After an update one layer of the engine still has the old weights."""
    before = bench.move()
    kept = {n: before[n] if f"layers.{WHERE}." in n else p for n, p in bench.network.named_parameters()}
    bench.publish(kept)
    yield bench.case(bench.sample())
    bench.restore()


@contextmanager
def transposed_weight(bench: Bench) -> Iterator[Case]:
    """A square matrix arrived transposed."""
    name = f"model.layers.{WHERE}.self_attn.o_proj.weight"
    weights = dict(bench.network.named_parameters())
    bench.publish(weights | {name: weights[name].t().contiguous()})
    yield bench.case(bench.sample())
    bench.restore()


@contextmanager
def half_updated_weight(bench: Bench) -> Iterator[Case]:
    """Of one matrix only the first half of the rows is new."""
    name = f"model.layers.{WHERE}.mlp.gate_proj.weight"
    before = bench.move()
    weights = dict(bench.network.named_parameters())
    rows = weights[name].shape[0] // 2
    bench.publish(weights | {name: torch.cat([weights[name][:rows], before[name][rows:]])})
    yield bench.case(bench.sample())
    bench.restore()


@contextmanager
def head_of_the_engine(bench: Bench) -> Iterator[Case]:
    """The engine projects in bf16, the trainer in float32."""
    bench.engine.set_head("off")
    yield bench.case(bench.sample())
    bench.engine.set_head(bench.engine.mode)


@contextmanager
def head_of_the_trainer(bench: Bench) -> Iterator[Case]:
    """The trainer projects in bf16, the engine in float32."""
    yield bench.case(bench.sample(), partial(bench.score, head="model"))


@contextmanager
def swapped_special_token(bench: Bench) -> Iterator[Case]:
    """The trainer's tokenizer has pad and eos the other way round."""
    case = bench.case(bench.sample())
    case.tokenizer.eos_token, case.tokenizer.pad_token = case.tokenizer.pad_token, case.tokenizer.eos_token
    yield case


@contextmanager
def missing_attention_mask(bench: Bench) -> Iterator[Case]:
    """The trainer pads on the left and passes no mask: shorter sequences attend to padding."""

    def score(batch: RolloutBatch) -> Tensor:
        length_B = batch.attention_mask_BL.sum(1).tolist()
        length = batch.token_ids_BL.shape[1]
        turned = [ids.roll(length - n) for ids, n in zip(batch.token_ids_BL, length_B, strict=True)]
        logprobs_BL = _logprobs(bench.network, torch.stack(turned), position_ids=None)
        back = [row.roll(n - length) for row, n in zip(logprobs_BL, length_B, strict=True)]
        return torch.where(batch.loss_mask_BL, torch.stack(back), 0.0)

    yield bench.case(bench.sample(), score)


@contextmanager
def wrong_positions(bench: Bench) -> Iterator[Case]:
    """Positions of the response count on from a prompt that was truncated: a gap of 7 after the prompt."""

    def score(batch: RolloutBatch) -> Tensor:
        positions_BL = torch.arange(batch.token_ids_BL.shape[1]).expand_as(batch.token_ids_BL)
        positions_BL = positions_BL + 7 * (batch.loss_mask_BL.cumsum(1) > 0)
        logprobs_BL = _logprobs(bench.network, batch.token_ids_BL, position_ids=positions_BL)
        return torch.where(batch.loss_mask_BL, logprobs_BL, 0.0)

    yield bench.case(bench.sample(), score)


def _logprobs(network: nn.Module, token_ids_BL: Tensor, position_ids: Tensor | None) -> Tensor:
    """[B, L] by plain transformers, without an attention mask; entry t is about token t."""
    with torch.no_grad():
        body = network.base_model(input_ids=token_ids_BL, position_ids=position_ids, use_cache=False)
        weight = network.get_output_embeddings().weight
        logits = body.last_hidden_state.float() @ weight.float().t()
    chosen = logits[:, :-1].log_softmax(-1).gather(2, token_ids_BL[:, 1:, None])[..., 0]
    return torch.nn.functional.pad(chosen, (1, 0))


@contextmanager
def temperature_ignored(bench: Bench) -> Iterator[Case]:
    """The engine samples at 0.7, the trainer scores at 1."""
    with at_temperature(bench.engine, 0.7):
        yield bench.case(bench.sample(0.7), bench.score)


@contextmanager
def raw_logprobs(bench: Bench) -> Iterator[Case]:
    """The engine samples at 0.7 and reports raw logprobs."""
    worker = bench.engine._llm.llm_engine.model_executor.driver_worker.worker
    sampler = worker.model_runner.sampler
    before, sampler.logprobs_mode = sampler.logprobs_mode, "raw_logprobs"
    with at_temperature(bench.engine, 0.7):
        yield bench.case(bench.sample(0.7), partial(bench.score, temperature=0.7))
    sampler.logprobs_mode = before


@contextmanager
def top_p_unseen(bench: Bench) -> Iterator[Case]:
    """The engine samples with top-p 0.7 and says nothing of it; the trainer scores the whole vocabulary."""
    before, bench.engine.config = bench.engine.config, replace(bench.engine.config)
    bench.engine.config.top_p = 0.7  # past the check of the configuration, which refuses it
    yield bench.case(bench.sample())
    bench.engine.config = before


@contextmanager
def prefix_cache_kept(bench: Bench) -> Iterator[Case]:
    """Weights are published without a reset of the prefix cache."""
    bench.sample()
    bench.move()
    reset, bench.engine.reset_prefix_cache = bench.engine.reset_prefix_cache, lambda: None
    bench.publish(dict(bench.network.named_parameters()))
    bench.engine.reset_prefix_cache = reset
    yield bench.case(bench.sample())
    bench.restore()


@contextmanager
def adapter_not_applied(bench: Bench) -> Iterator[Case]:
    """The trainer trains a low-rank adapter of a projection; the engine serves the base weights."""
    linear = bench.network.base_model.layers[WHERE].self_attn.q_proj
    generator = torch.Generator().manual_seed(2)
    a, b = (torch.randn(shape, generator=generator) * 0.2 for shape in ((4, WIDTH), (linear.out_features, 4)))
    linear.lora_A, linear.lora_B = (nn.Parameter(t.to(linear.weight.dtype)) for t in (a, b))
    plain = linear.forward
    linear.forward = lambda x: plain(x) + x @ linear.lora_A.t() @ linear.lora_B.t()
    yield bench.case(bench.sample())
    bench.restore()


@contextmanager
def stale_rank(bench: Bench) -> Iterator[Case]:
    """One of two tensor-parallel ranks goes on with the old weights."""
    from rlalign.weights import _write

    old = bench.shared / "old"
    shutil.rmtree(old, ignore_errors=True)
    old.mkdir()
    _write(bench.move().items(), 1, old)
    bench.publish(dict(bench.network.named_parameters()))
    bench.engine._llm.collective_rpc(_load_on_rank_one, args=(str(old),))
    yield bench.case(bench.sample())
    shutil.rmtree(old)
    bench.restore()


def _load_on_rank_one(worker: object, directory: str) -> None:
    if worker.rank == 1:
        worker.rlalign_load(directory)


@dataclass(frozen=True)
class Fault:
    """plant: makes it. expected: the cause that must be named, and what its evidence must contain."""

    name: str
    plant: Callable[[Bench], Iterator[Case]]
    expected: str
    evidence: str = ""
    ranks: int = 1
    bodies: tuple[str, ...] = ("float32", "bfloat16")


LAYER = f"layers.{WHERE}."
FAULTS = (
    Fault("RMSNorm epsilon of one layer", norm_epsilon, "norm epsilon", LAYER),
    Fault("rope theta", rope_theta, "rope theta", "theta 5e+05"),
    Fault("a stale layer", stale_layer, "stale weights", f"layer(s) {WHERE}"),
    Fault("a transposed weight", transposed_weight, "stale weights", f"{LAYER}self_attn.o_proj.weight"),
    Fault("a half-updated weight", half_updated_weight, "stale weights", f"{LAYER}mlp.gate_proj.weight"),
    Fault("bf16 head in the engine", head_of_the_engine, "one-sided head", bodies=("bfloat16",)),
    Fault("bf16 head in the trainer", head_of_the_trainer, "one-sided head", bodies=("bfloat16",)),
    Fault("swapped special token", swapped_special_token, "tokenizer"),
    Fault("missing attention mask", missing_attention_mask, "attention mask"),
    Fault("wrong position ids after truncation", wrong_positions, "position ids"),
    Fault("temperature ignored", temperature_ignored, "temperature"),
    Fault("raw instead of processed logprobs", raw_logprobs, "raw against processed logprobs"),
    Fault("top-p without renormalisation", top_p_unseen, "truncation"),
    Fault("prefix cache not reset", prefix_cache_kept, "prefix cache after sync"),
    Fault("LoRA not applied", adapter_not_applied, "LoRA not applied"),
    Fault("one tensor-parallel rank stale", stale_rank, "one engine rank differs", "rank 1", ranks=2),
)
