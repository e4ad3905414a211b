"""A mirrored trainer and a steady engine, real vLLM on CPU: the same logprob for every token, bit for bit, and why."""

from dataclasses import replace

import pytest
import torch
from vllm import _custom_ops

from rlalign.diagnose.both_sides import probed_body, trainer_network, trainer_scores
from rlalign.head import steady
from rlalign.loops.mirrors import settle
from rlalign.rollout.engine.embedded import VLLMEngine
from rlalign.rollout.worker.cpu import attend
from rlalign.run.assembly import require_steady
from rlalign.trainer.rounding import variants
from rlalign.trainer.rounding.mirroring import VLLM_CPU
from rlalign.types import collate
from tests import kernel_parts
from tests.engine.conftest import ROLLOUT, perturbed, worker_of
from tests.engine.test_train import lively, rows_of, small_run
from tests.test_rounding import reference_kernel

__all__ = ["lively"]  # a fixture

PROMPTS = [[5 + (7 * i + 3 * j) % 250 for j in range(12 + 9 * i)] for i in range(9)]


def rope_here():
    """How vLLM's kernel rounds on this host: turned by a cosine that leaves 0.78 of a bf16 unit, rounded up or cut off."""
    value = 1 + 10 / 128
    turned, cache_1D = torch.full((1, 32), value).bfloat16(), torch.tensor([[value] * 16 + [0.0] * 16]).bfloat16()
    _custom_ops.rotary_embedding(torch.zeros(1, dtype=torch.long), turned, None, 32, cache_1D, True)
    return variants.ROUNDED_ONCE if float(turned[0, 0]) > 1 + 20 / 128 else variants.TRUNCATED_ONCE


HERE = replace(VLLM_CPU, rope=rope_here())


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """What a probe keeps for the next start stays here, beside the kernel that hosts without bf16 instructions need."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLALIGN_CACHE", str(kernel_parts.library_in(tmp_path_factory.mktemp("cache"))))
        yield


@pytest.fixture(scope="module")
def engine(untied):
    rollout = replace(ROLLOUT, prefix_caching=False)
    started = VLLMEngine(untied, rollout, dtype="bfloat16", head_dtype="float32", seed=0, steady=True)
    yield started
    started.close()


@pytest.fixture(scope="module")
def settled(engine, untied, own_cache):
    from rlalign.config import compose, load

    return probed_body(engine, untied, load(compose("demo", ["model.dtype=bfloat16"])), PROMPTS)


def test_every_sampled_token_has_the_trainers_logprob_bit_for_bit(engine, untied, settled):
    require_steady(engine.status())
    rollouts = engine.generate(PROMPTS, prompt_ids=range(len(PROMPTS)), samples=3, seed=3)
    batch = collate(rollouts, pad_token_id=0, spec=engine.spec)
    networks = [trainer_network(untied, "bfloat16", mirrored=plan) for plan in (settled.plan, None)]
    mirrored_BL, plain_BL = (trainer_scores(n, batch, "float32", temperature=1.0)[0] for n in networks)
    apart, plain = ((x - batch.rollout_logprobs_BL)[batch.loss_mask_BL].abs() for x in (mirrored_BL, plain_BL))
    assert float(plain.mean()) > 1e-3
    assert float(apart.mean()) < 1e-6, "what is left is the order in which float32 heads and normalisers add"


def test_the_probe_chooses_what_vllm_does_and_finds_nothing_left(settled):
    probed = settled.probed
    assert settled.choices == HERE and not probed.left and not settled.changed
    assert all(probed.apart(op, getattr(HERE, op)) == 0 for op in variants.OPS), "\n".join(settled.describe())
    own = {(r.op, r.part): (r.prefill, r.decode) for r in probed.rows if r.variant == variants.MODEL}
    parts = {"input_layernorm", "post_attention_layernorm", "self_attn.qkv_proj", "self_attn.attn", "mlp.act_fn"}
    assert parts <= {part for _, part in own}
    for op in ("add_and_norm", "rope"):
        shares = [
            both for (of, part), both in own.items() if of == op and "q_norm" not in part and "k_norm" not in part
        ]
        assert max(min(both) for both in shares) > 0.05, "prefilled and decoded tokens are both counted"


def test_a_choice_stands_until_it_is_beaten_and_is_then_named_and_not_taken(settled, untied, monkeypatch):
    network = trainer_network(untied, "bfloat16")
    assert settle(settled.probed, network).choices == HERE
    rows = tuple(replace(r, apart=r.apart + (r.variant == HERE.rope) * 10**9) for r in settled.probed.rows)
    again = settle(replace(settled.probed, rows=rows), network)
    assert again.choices == replace(HERE, rope=variants.MODEL) and set(again.changed) == {"rope"}
    with pytest.raises(
        RuntimeError, match=rf"rope: {HERE.rope} at an earlier start, \w+ now; its kernel is not determin"
    ):
        again.require_settled()


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
    x = torch.randn(300, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = {n: layer.mlp.gate_up_proj(x[:n])[0] for n in (1, 3, 4, 5, 64, 300)}
    parts = (moved.model.layers[1].mlp.gate_proj.weight, moved.model.layers[1].mlp.up_proj.weight)
    expected = torch.cat([steady.linear(x, weight) for weight in parts], dim=1)
    assert all(torch.equal(rows, expected[:n]) for n, rows in found.items())


PARTITIONED = ["trainer.zero_stage=3", "trainer.gradient_checkpointing=true", "algo.kl_coef=0.1"]


@pytest.mark.parametrize("options", [(), pytest.param(PARTITIONED, marks=pytest.mark.nightly)])
def test_a_run_keeps_both_sides_equal_while_its_weights_move(untied, tmp_path, lively, options):
    options = [*options, "algo.lr=1e-3", "rollout.max_tokens=8", "rollout.prompts_per_step=2", "task.eval_size=2"]
    small_run(untied, tmp_path / "run", "trainer.body=mirrored", "model.dtype=bfloat16", *options, steps=2)
    rows = rows_of(tmp_path / "run")
    assert all(row["mismatch/lag0/k3"] < 1e-9 for row in rows)
    assert all(row["train/grad_norm"] > 0 for row in rows), "the weights move between the steps"
    events = (tmp_path / "run" / "events.jsonl").read_text()
    assert "sampled tokens have the engine's logprob in every bit" in events
