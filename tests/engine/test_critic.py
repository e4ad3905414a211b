"""The critic in real DeepSpeed: a plain loop's updates for any ZeRO stage and number of ranks; saved, it goes on as it was."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, Qwen3ForSequenceClassification

from rlalign.config import TrainerConfig, load
from rlalign.run import assembly
from tests.engine.conftest import on_two_ranks
from tests.engine.critics import CASES, CLIP, plain_loop, start_critic, train
from tests.engine.updates import make_batch


@pytest.fixture(scope="module")
def plain(untied):
    return plain_loop(untied)


@pytest.fixture(scope="module")
def two_ranks(untied, tmp_path_factory) -> Path:
    return on_two_ranks("tests.engine.critics", untied, tmp_path_factory.mktemp("ranks"))


def same(found: dict, wanted: dict, tolerance: float) -> None:
    """tolerance: relative, of losses and norms; Adam turns the last bits of vanishing gradients into whole steps."""
    assert found["losses"] == pytest.approx(wanted["losses"], rel=tolerance)
    if None not in found["norms"] and None not in wanted["norms"]:  # stage 0 clips by the norm without telling it
        assert found["norms"] == pytest.approx(wanted["norms"], rel=tolerance)
    moved = float(wanted["moved"].abs().mean())
    assert float((found["moved"] - wanted["moved"]).abs().mean()) < 20 * tolerance * moved
    assert (found["values"] - wanted["values"]).abs().max() < 20 * tolerance


@pytest.mark.parametrize("form", [{"zero_stage": 0}, {"zero_stage": 2, "pack_tokens": 30}, {"zero_stage": 3}])
def test_updates_equal_the_plain_loop(untied, plain, form):
    critic = start_critic(untied, TrainerConfig(micro_batch_size=5, **form))
    assert not critic.values(make_batch()).any()  # a new head says 0
    found = train(critic)
    critic.close()
    same(found, plain, 1e-4)
    assert (
        found["losses"][-1] < found["losses"][0] and found["values"].abs().max() > 1.5 * CLIP
    )  # it learns, and is clipped


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_equal_the_plain_loop(two_ranks, plain, name):
    same(torch.load(two_ranks / f"{name}.pt", weights_only=True), plain, 1e-4 if CASES[name][0] == "float32" else 0.02)


def test_saved_it_goes_on_bit_for_bit(untied, tmp_path):
    trainer = TrainerConfig(micro_batch_size=5)
    old = torch.zeros_like(make_batch().rollout_logprobs_BL)
    first = start_critic(untied, trainer)
    train(first, 1, old)
    first.save_state(tmp_path)
    whole = train(first, 2, old)
    first.close()
    again = start_critic(untied, trainer)
    again.load_state(tmp_path)
    resumed = train(again, 2, old)
    again.close()
    assert resumed["losses"] == whole["losses"] and torch.equal(resumed["values"], whole["values"])
    with pytest.raises(ValueError, match="no critic was saved there"):
        again.load_state(tmp_path / "nowhere")


def test_it_starts_as_the_reward_model_it_is_given(untied, tmp_path):
    """Body and score head are the reward model's: the value before a token is its score of what stood before."""
    config = AutoModel.from_pretrained(untied).config
    config.num_labels = 1
    judge = Qwen3ForSequenceClassification(config).float()
    judge.score.weight.data.normal_()
    judge.save_pretrained(tmp_path)
    critic, batch = start_critic(tmp_path, TrainerConfig(micro_batch_size=5)), make_batch()
    values = critic.values(batch)
    names = {name for name, _ in critic.named_weights()}
    critic.close()
    scores = judge.score(judge.model(batch.token_ids_BL, attention_mask=batch.attention_mask_BL).last_hidden_state)[
        ..., 0
    ]
    torch.testing.assert_close(
        values[:, 1:], torch.where(batch.loss_mask_BL, scores.roll(1, 1), 0.0)[:, 1:], rtol=1e-4, atol=1e-5
    )
    assert not any("lm_head" in name for name in names) and {"value_head.weight", "value_head.bias"} <= names
    config.num_labels = 2
    Qwen3ForSequenceClassification(config).save_pretrained(tmp_path / "two")
    with pytest.raises(ValueError, match="its score head has 2 labels"):
        start_critic(tmp_path / "two", TrainerConfig())


def test_a_critic_of_its_own_must_read_the_policy_s_tokens(untied, tmp_path):
    tokenizer = assembly.load_tokenizer(untied)

    def folder(path="", advantage="gae"):
        algo = {"advantage": advantage, "critic": {"path": str(path)}}
        return assembly.critic_folder(
            untied, load({"model": {"path": "x"}, "task": {"name": "x"}, "algo": algo}), tokenizer
        )

    assert folder() == untied and folder(untied) == untied and folder(advantage="group") is None
    with pytest.raises(ValueError, match=r"algo.critic.path='.*nowhere' is not a Hugging Face folder"):
        folder(tmp_path / "nowhere")
    shutil.copytree(untied, tmp_path / "other")
    tokenizer_file = tmp_path / "other" / "tokenizer.json"
    spelled = json.loads(tokenizer_file.read_text())
    first, second = list(spelled["model"]["vocab"])[-2:]
    vocabulary = spelled["model"]["vocab"]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    tokenizer_file.write_text(json.dumps(spelled))
    with pytest.raises(ValueError, match="gives tokens other ids than the policy's"):
        folder(tmp_path / "other")
