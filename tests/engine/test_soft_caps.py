"""Gemma-2's capped attention scores on both sides: the real engine, the trainer, the scorers, against transformers' eager."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

from rlalign import mismatch
from rlalign.config import AlgoConfig, TrainerConfig
from rlalign.tiny_policy.tokenizer import byte_tokenizer
from tests.engine.conftest import ROLLOUT, start

CAP = 2.0  # small, so that leaving it out shows
LONG = [[1, *range(40, 80)], [1, *range(90, 110)]]  # longer than the window of every other layer


@pytest.fixture(scope="module")
def gemma2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gemma2")
    torch.manual_seed(0)
    tokenizer = byte_tokenizer(256)
    config = Gemma2Config(
        vocab_size=288, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=256, sliding_window=16, attn_logit_softcapping=CAP,
        final_logit_softcapping=20.0, query_pre_attn_scalar=1, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config)
    for layer in model.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            projection.weight.data.mul_(4.0)
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def logprobs(folder, kind, sequences):
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=kind)
    found = []
    for ids in sequences:
        with torch.no_grad():
            logits = network(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        found.append([0.0, *logits[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()])
    return found


def test_engine_and_trainer_apply_the_cap_that_sdpa_leaves_out(gemma2):
    from rlalign.trainer.policy import Policy
    from rlalign.types import collate

    engine = start(gemma2, dtype="float32", rollout=replace(ROLLOUT, max_tokens=40))
    try:
        rollouts = engine.generate(LONG, prompt_ids=[0, 1], samples=2, seed=1)
        scored = engine.score(LONG)
    finally:
        engine.close()
    eager, sdpa = (torch.cat([*map(torch.tensor, logprobs(gemma2, kind, LONG))]) for kind in ("eager", "sdpa"))
    theirs = torch.cat([*map(torch.tensor, scored)])
    assert (theirs - eager).abs().max() < 1e-4
    assert (theirs - sdpa).abs().max() > 0.05, "the cap changes nothing here: this test shows nothing"

    batch = collate(rollouts, pad_token_id=0, spec=engine.spec)
    policy = Policy(
        gemma2,
        TrainerConfig(zero_stage=0),
        AlgoConfig(),
        dtype="float32",
        head_dtype="float32",
        temperature=1.0,
        seed=0,
    )
    assert policy.attention == "eager"
    found, _ = policy.score(batch)
    assert policy.head.multiplied.dtype == "float32"
    policy.close()
    measured = mismatch.compare(found, batch.rollout_logprobs_BL, batch.loss_mask_BL, positions=False)
    assert measured["k3"] < 1e-9


def test_sdpa_by_name_is_refused_and_packing_names_what_can(gemma2):
    from rlalign.trainer.network import load

    settings = {"zero_optimization": {"stage": 0}}
    with pytest.raises(ValueError, match=r"trainer.attention=sdpa: .*attn_logit_softcapping=2.*use auto, eager"):
        load(gemma2, "float32", settings, checkpointing=False, attention="sdpa")
    with pytest.raises(ValueError, match="'eager' cannot be told where sequences begin; use flex_attention or a flash"):
        load(gemma2, "float32", settings, checkpointing=False, packed=True)
    with pytest.raises(ValueError, match="exact mode knows plain attention only: Gemma2Attention asks for a soft cap"):
        network = load(gemma2, "float32", settings, checkpointing=False)
        from rlalign.trainer.exact_network import attention

        layer = network.model.layers[0].self_attn
        attention(layer, None, None, None, None, scaling=1.0, softcap=CAP)


def test_every_other_reader_of_a_checkpoint_takes_eager_too(gemma2):
    from rlalign.diagnose.both_sides import trainer_network
    from rlalign.reward.training.fit import load as load_reward
    from rlalign.scoring.hf import HFScorer

    assert trainer_network(gemma2, "float32").config._attn_implementation == "eager"
    scorer = HFScorer(gemma2, dtype="float32")
    assert "'eager' takes no block mask; load with flex_attention" in scorer.info.packing_reason
    with pytest.raises(ValueError, match="attention=sdpa: this checkpoint caps"):
        HFScorer(gemma2, attention="sdpa")
    network, _ = load_reward(gemma2, seed=0)
    assert network.model.config._attn_implementation == "eager"
