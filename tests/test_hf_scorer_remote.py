"""Reward models that bring their own code, in the manner of Qwen2-RM and InternLM2-reward: a head of several layers."""

import json
import textwrap

import numpy as np
import pytest
import torch

from rlalign.scoring import HFScorer, ScoringParams
from tests.reward_models import model_of, words

CODE = textwrap.dedent("""
    from torch import nn
    from transformers import Qwen2Model, Qwen2PreTrainedModel
    from transformers.modeling_outputs import SequenceClassifierOutputWithPast

    class Qwen2ForRewardModel(Qwen2PreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.model = Qwen2Model(config)
            self.score = nn.Sequential(nn.Linear(config.hidden_size, 16), nn.ReLU(), nn.Linear(16, 1))
            self.post_init()

        def forward(self, input_ids=None, attention_mask=None, **more):
            states = self.model(input_ids, attention_mask=attention_mask, **more).last_hidden_state
            return SequenceClassifierOutputWithPast(logits=self.score(states)[:, -1])

    class Qwen2ForProcessRewardModel(Qwen2ForRewardModel):
        pass
""")


@pytest.fixture
def folder(tmp_path):
    """A checkpoint with its code, from the backbone of the tiny process reward model."""

    def make(architecture):
        model = model_of("process")
        config = json.loads(model.config.to_json_string())
        config |= {"architectures": [architecture], "auto_map": {"AutoModel": f"modeling_tiny_rm.{architecture}"}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "modeling_tiny_rm.py").write_text(CODE)
        head = {
            f"score.{i}.{n}": torch.randn(*s)
            for i, n, s in ((0, "weight", (16, 32)), (0, "bias", (16,)), (2, "weight", (1, 16)), (2, "bias", (1,)))
        }
        from safetensors.torch import save_file

        save_file(
            {f"model.{n}": p.detach().clone() for n, p in model.model.named_parameters()} | head,
            tmp_path / "model.safetensors",
            metadata={"format": "pt"},
        )
        return str(tmp_path), head

    return make


def by_hand(head, query, item):
    """States by transformers, then the two layers written out."""
    with torch.no_grad():
        states = model_of("process").model(input_ids=torch.tensor([query + item])).last_hidden_state[0]
    hidden = torch.relu(states @ head["score.0.weight"].T + head["score.0.bias"])
    return states, hidden @ head["score.2.weight"].T + head["score.2.bias"]


def test_a_reward_model_with_a_head_of_several_layers(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    path, head = folder("Qwen2ForRewardModel")
    scorer = HFScorer(path, trust_remote_code=True)
    query, items = words(9, 1), [words(3, 2), words(6, 3)]
    result = scorer.score(query, items, ScoringParams(return_pooled_hidden_states=True))
    for item, score, state in zip(items, result.scores, result.pooled_hidden_states, strict=True):
        states, logits = by_hand(head, query, item)
        np.testing.assert_allclose(score, logits[-1], atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(state, states[-1], atol=1e-5, rtol=0)
    assert scorer.info.num_labels == 1 and scorer.info.packs and scorer.info.activation == "sigmoid"


def test_a_process_reward_model_scores_tokens(folder):
    path, head = folder("Qwen2ForProcessRewardModel")
    result = HFScorer(path, trust_remote_code=True).score(words(4, 1), [words(3, 2)])
    np.testing.assert_allclose(result.scores[0], by_hand(head, words(4, 1), words(3, 2))[1], atol=1e-4, rtol=1e-5)


def test_code_is_not_run_unless_it_is_trusted(folder):
    path, _ = folder("Qwen2ForRewardModel")
    with pytest.raises(ValueError, match="loaded as a plain Qwen2Model.*trust_remote_code=True"):
        HFScorer(path)


def test_a_checkpoint_without_its_head_is_refused(tmp_path):
    """transformers would fill the head with random numbers and only warn."""
    model_of("one_label").model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["Qwen3ForSequenceClassification"]}))
    with pytest.raises(ValueError, match="has no .*score.weight"):
        HFScorer(tmp_path)
