"""Exact mode on the real engine: sampled logprobs equal the trainer's in every bit, in any batch, chunk, and dtype."""

from dataclasses import replace

import pytest
import torch

from rlalign.diagnose.attribution.exact_sides import end, prepare, require_exact
from rlalign.diagnose.attribution.measure import measure
from rlalign.diagnose.both_sides import head_logprobs, hidden_states, trainer_network
from rlalign.types import collate
from tests.engine.conftest import ROLLOUT, start

PROMPTS = [[5 + (7 * i + 3 * j) % 250 for j in range(n)] for i, n in enumerate((3, 70, 33, 12, 90))]


def sampled(engine, prompts=PROMPTS, samples=2):
    rollouts = engine.generate(prompts, prompt_ids=range(len(prompts)), samples=samples, seed=3)
    return collate(rollouts, pad_token_id=0, spec=engine.spec)


def recomputed(network, batch, temperature, rows):
    return head_logprobs(network, hidden_states(network, batch, rows=rows), batch, "model", temperature=temperature)


@pytest.mark.parametrize(("kind", "dtype"), [("untied", "float32"), ("untied", "bfloat16"), ("tied", "bfloat16")])
def test_every_sampled_logprob_has_the_bits_of_the_trainers(kind, dtype, request):
    folder = request.getfixturevalue(kind)
    network, rollout = trainer_network(folder, dtype), replace(ROLLOUT, temperature=0.7)
    head_dtype = prepare(network, rollout)
    engine = None
    try:
        engine = start(folder, dtype=dtype, head_dtype=head_dtype, rollout=rollout)
        require_exact([engine])
        batch = sampled(engine)
        assert len(set(batch.rollout_logprobs_BL[batch.loss_mask_BL].tolist())) > 50, "real numbers"
        for rows in (0, 1, 3):
            assert torch.equal(recomputed(network, batch, 0.7, rows), batch.rollout_logprobs_BL)
        alone = sampled(engine, PROMPTS[1:2])
        assert torch.equal(recomputed(network, alone, 0.7, 0), alone.rollout_logprobs_BL), (
            "decoded two at a time, from the cache"
        )
    finally:
        if engine is not None:
            engine.close()
        end()


def test_prefill_decode_and_chunks_agree_in_every_point(untied):
    network = trainer_network(untied, "float32")
    head_dtype = prepare(network, ROLLOUT)
    engines = []
    try:
        engines.append(start(untied, dtype="float32", head_dtype=head_dtype))
        engines.append(
            start(
                untied,
                dtype="float32",
                head_dtype=head_dtype,
                rollout=replace(ROLLOUT, max_num_batched_tokens=16, max_num_seqs=16),
            )
        )
        require_exact(engines)
        found = measure(engines[0], network, sampled(engines[0]), chunked=engines[1], rows=2)
    finally:
        for engine in engines:
            engine.close()
        end()
    assert all(p.absolute.max == 0.0 and p.isolated.max == 0.0 for r in found.routes.values() for p in r.points)
    assert all(spread.max == 0.0 for spread in found.decode_against_prefill.values())


def test_afterwards_engines_are_vllms_own_and_an_engine_that_is_not_exact_is_refused(untied):
    end()
    engine = start(untied, dtype="float32")
    try:
        with pytest.raises(
            RuntimeError,
            match="still runs vLLM's CPUAttentionBackendImpl, .*ParallelLMHead, QKVParallelLinear, RMSNorm, Rot.*SiluAndMul",
        ):
            require_exact([engine])
        batch = sampled(engine)
        ours = recomputed(trainer_network(untied, "float32"), batch, 1.0, 0)
        assert not torch.equal(ours, batch.rollout_logprobs_BL), "plain engines differ by rounding"
        assert float((ours - batch.rollout_logprobs_BL).abs().max()) < 1e-4
    finally:
        engine.close()


def test_tensor_parallelism_is_refused(untied):
    with pytest.raises(ValueError, match="all-reduce adds partial products in another order"):
        prepare(trainer_network(untied, "float32"), replace(ROLLOUT, tensor_parallel_size=2))
