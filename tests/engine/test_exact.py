"""Exact mode on the real engine: sampled logprobs equal the trainer's in every bit, in any batch, chunk, dtype, and step."""

from dataclasses import replace

import pytest
import torch

from rlalign.diagnose.attribution.measure import measure
from rlalign.diagnose.both_sides import head_logprobs, hidden_states, trainer_network
from rlalign.diagnose.families.building import build
from rlalign.diagnose.families.family_table import RECIPES
from rlalign.rollout.engine import handshake
from rlalign.rollout.engine.arguments import engine_arguments
from rlalign.rollout.engine.embedded import VLLMEngine
from rlalign.types import collate
from tests.engine.conftest import ROLLOUT, start
from tests.engine.test_train import lively, rows_of, small_run

__all__ = ["lively"]  # a fixture

PROMPTS = [[5 + (7 * i + 3 * j) % 250 for j in range(n)] for i, n in enumerate((3, 70, 33, 12, 90))]


def start_exact(folder, dtype, **changes):
    return VLLMEngine(folder, replace(ROLLOUT, **changes), dtype=dtype, head_dtype="float32", seed=0, exact=True)


def sampled(engine, prompts=PROMPTS, samples=2):
    rollouts = engine.generate(prompts, prompt_ids=range(len(prompts)), samples=samples, seed=3)
    return collate(rollouts, pad_token_id=0, spec=engine.spec)


def recomputed(network, batch, temperature, rows):
    return head_logprobs(network, hidden_states(network, batch, rows=rows), batch, "float32", temperature=temperature)


@pytest.mark.parametrize(("kind", "dtype"), [("untied", "float32"), ("untied", "bfloat16"), ("tied", "bfloat16")])
def test_every_sampled_logprob_has_the_bits_of_the_trainers(kind, dtype, request):
    folder = request.getfixturevalue(kind)
    network, engine = trainer_network(folder, dtype, exact=True), start_exact(folder, dtype, temperature=0.7)
    try:
        (status,) = engine.status()
        assert (status["mode"], status["attention"], status["not_exact"]) == ("exact", ["ExactAttentionImpl"], [])
        batch = sampled(engine)
        assert len(set(batch.rollout_logprobs_BL[batch.loss_mask_BL].tolist())) > 50, "real numbers"
        for rows in (0, 1, 3):
            assert torch.equal(recomputed(network, batch, 0.7, rows), batch.rollout_logprobs_BL)
        alone = sampled(engine, PROMPTS[1:2])
        assert torch.equal(recomputed(network, alone, 0.7, 0), alone.rollout_logprobs_BL), (
            "decoded two at a time, from the cache"
        )
    finally:
        engine.close()


COVERED = ("llama", "mistral", "qwen2", "qwen3", "phi3", "granite", "hyperclovax")


@pytest.mark.nightly
@pytest.mark.parametrize("name", COVERED)
def test_every_family_that_is_taken_has_the_trainers_bits(name, tmp_path):
    folder = build(RECIPES[name], tmp_path / name)
    network, engine = trainer_network(folder, "bfloat16", exact=True), start_exact(folder, "bfloat16")
    try:
        batch = sampled(engine)
        assert torch.equal(recomputed(network, batch, 1.0, 0), batch.rollout_logprobs_BL)
    finally:
        engine.close()


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in COVERED])
def test_every_other_family_is_refused_before_an_engine_is_built(name, tmp_path):
    build(RECIPES[name], tmp_path)
    with pytest.raises(ValueError, match=f"exact=true: .*{RECIPES[name].model_type} has .*Use exact=false"):
        engine_arguments(tmp_path, ROLLOUT, dtype="bfloat16", head_dtype="float32", seed=0, exact=True)


def test_prefill_decode_and_chunks_agree_in_every_point(untied):
    network, engines = trainer_network(untied, "float32", exact=True), []
    try:
        engines.append(start_exact(untied, "float32"))
        engines.append(start_exact(untied, "float32", max_num_batched_tokens=16, max_num_seqs=16))
        batch = sampled(engines[0], PROMPTS[:3], 1)
        found = measure(engines[0], network, batch, chunked=engines[1], rows=2, patch=False)
    finally:
        for engine in engines:
            engine.close()
    assert all(p.absolute.max == 0.0 and p.isolated.max == 0.0 for r in found.routes.values() for p in r.points)
    assert all(spread.max == 0.0 for spread in found.decode_against_prefill.values())


def test_other_engines_are_vllms_own_and_do_not_pass_for_exact(untied, monkeypatch):
    monkeypatch.setenv("RLALIGN_EXACT", "1")  # left over by whatever started this process
    engine = start(untied, dtype="float32")
    beside = start_exact(untied, "float32")  # vLLM keeps attention backends and rope modules for the next engine
    try:
        assert beside.status()[0]["not_exact"] == []
        statuses = [status | {"mode": "exact"} for status in engine.status()]
        with pytest.raises(
            RuntimeError,
            match="still computes with CPUAttentionBackendImpl, .*ParallelLMHead, QKVParallelLinear, RMSNorm, Rot.*SiluAndMul",
        ):
            handshake.require(statuses, mode="exact", ranks=1)
        batch = sampled(engine)
        ours = recomputed(trainer_network(untied, "float32"), batch, 1.0, 0)
        assert not torch.equal(ours, batch.rollout_logprobs_BL), "plain engines differ by rounding"
        assert float((ours - batch.rollout_logprobs_BL).abs().max()) < 1e-4
    finally:
        engine.close()
        beside.close()


@pytest.mark.parametrize("options", [["model.dtype=float32"], ["trainer.zero_stage=3", "algo.kl_coef=0.1"]])
def test_a_run_has_no_mismatch_at_any_step(options, untied, tmp_path, lively):
    small_run(untied, tmp_path / "run", "exact=true", "algo.lr=1e-3", "mismatch.head_every=1", *options, steps=3)
    rows = rows_of(tmp_path / "run")
    assert [row["mismatch/lag0/abs_max"] for row in rows] == [row["head_isolated/abs_max"] for row in rows] == [0.0] * 3
    assert all(row["train/grad_norm"] > 0 for row in rows), "the weights move between the steps"
