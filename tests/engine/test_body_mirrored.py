"""A mirrored trainer and a steady engine, real vLLM on CPU: the same logprob for every token, bit for bit, and why."""

from dataclasses import replace

import pytest
import torch

from rlalign.diagnose.attribution import op_probe
from rlalign.diagnose.attribution.mapping import match
from rlalign.diagnose.attribution.trainer_side import module_names
from rlalign.diagnose.both_sides import trainer_network, trainer_scores
from rlalign.head import steady
from rlalign.rollout.engine import teacher_forcing
from rlalign.rollout.engine.embedded import VLLMEngine
from rlalign.rollout.engine.teacher_forcing import Route
from rlalign.rollout.worker import cpu_kernels
from rlalign.rollout.worker.cpu_kernels import attend
from rlalign.run.assembly import require_steady
from rlalign.trainer.rounding.mirroring import VLLM_CPU
from rlalign.types import collate
from tests.engine.conftest import ROLLOUT, perturbed, worker_of
from tests.engine.test_train import lively, rows_of, small_run
from tests.test_rounding import reference_kernel

__all__ = ["lively"]  # a fixture

LONG = [[5 + (7 * i + 3 * j) % 250 for j in range(12 + 9 * i)] for i in range(9)]


@pytest.fixture(scope="module")
def engine(untied):
    started = VLLMEngine(
        untied, replace(ROLLOUT, prefix_caching=False), dtype="bfloat16", head_dtype="float32", seed=0, steady=True
    )
    yield started
    started.close()


@pytest.fixture(scope="module")
def batch(engine):
    rollouts = engine.generate(LONG, prompt_ids=range(len(LONG)), samples=3, seed=3)
    return collate(rollouts, pad_token_id=0, spec=engine.spec)


def test_every_sampled_token_has_the_trainers_logprob_bit_for_bit(engine, untied, batch):
    require_steady(engine.status())
    mask_BL = batch.loss_mask_BL
    mirrored_BL, _ = trainer_scores(
        trainer_network(untied, "bfloat16", mirrored=True), batch, "float32", temperature=1.0
    )
    plain_BL, _ = trainer_scores(trainer_network(untied, "bfloat16"), batch, "float32", temperature=1.0)
    apart = (mirrored_BL - batch.rollout_logprobs_BL)[mask_BL].abs()
    plain = (plain_BL - batch.rollout_logprobs_BL)[mask_BL].abs()
    assert float(plain.mean()) > 1e-3
    assert float(apart.mean()) < 1e-6, "what is left is the order in which float32 heads and normalisers add"


@pytest.mark.parametrize("route", list(Route))
def test_the_probe_chooses_what_is_built_in_and_finds_nothing_left(engine, untied, batch, tmp_path, route):
    network = trainer_network(untied, "bfloat16")
    mapping = match(teacher_forcing.modules(engine), module_names(network))
    forced = teacher_forcing.record(engine, batch, mapping.rollout_taps, tmp_path / "r", route=route)
    rows = op_probe.probe(network, forced.recording, mapping, decoded=route is Route.decode, kernels=cpu_kernels)
    found = op_probe.chosen(rows)
    assert (found.add_and_norm, found.rope) == (VLLM_CPU.add_and_norm, VLLM_CPU.rope)
    left = {(r.op, r.part): r.differ for r in rows if r.variant == getattr(VLLM_CPU, r.op)}
    assert max(left.values()) == 0.0, left
    model = {r.op: r.differ for r in rows if r.variant == "model"}
    assert model["rope"] > 0.05 and model["add_and_norm"] > 0.05


@pytest.mark.parametrize(("window", "soft_cap"), [(None, 0.0), (16, 0.0), (None, 5.0)])
def test_the_engines_attention_on_plain_tensors_is_attention(window, soft_cap):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(230, h, 32, generator=generator).bfloat16() for h in (4, 2, 2))
    options = {"scale": 0.2, "window": window, "soft_cap": soft_cap}
    found = attend(query, key, value, (30, 150, 1, 49), **options)
    expected = reference_kernel(query.double(), key.double(), value.double(), (30, 150, 1, 49), **options)
    assert float((found.double() - expected).norm() / expected.norm()) < 2**-7
    assert torch.equal(attend(query[30:180], key[30:180], value[30:180], (150,), **options), found[30:180])
    with pytest.raises(ValueError, match="230 tokens was given sequences of 31 in all"):
        attend(query, key, value, (30, 1), **options)


def test_a_published_weight_is_packed_again_in_the_same_order(engine, untied, tmp_path):
    from rlalign.weights import publish

    moved = perturbed(untied, seed=1)
    publish(moved.named_parameters(), 1, receiver=engine, shared=tmp_path)
    require_steady(engine.status())
    layer = worker_of(engine._llm).get_model().model.layers[1]
    x = torch.randn(300, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = {n: layer.mlp.down_proj(x[:n])[0] for n in (1, 3, 4, 5, 64, 300)}
    expected = steady.linear(x, moved.model.layers[1].mlp.down_proj.weight)
    assert all(torch.equal(rows, expected[:n]) for n, rows in found.items())


def test_a_run_keeps_both_sides_equal_while_its_weights_move(untied, tmp_path, lively):
    options = ["trainer.zero_stage=3", "trainer.gradient_checkpointing=true", "algo.kl_coef=0.1", "algo.lr=1e-3"]
    small_run(untied, tmp_path / "run", "trainer.body=mirrored", "model.dtype=bfloat16", *options, steps=2)
    rows = rows_of(tmp_path / "run")
    assert all(row["mismatch/lag0/k3"] < 1e-9 for row in rows)
    assert all(row["train/grad_norm"] > 0 for row in rows), "the weights move between the steps"
    events = (tmp_path / "run" / "events.jsonl").read_text()
    assert "sampled tokens have the engine's logprob in every bit" in events
