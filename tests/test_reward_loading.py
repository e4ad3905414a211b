"""From the configuration to a mixture: models are found, calibrations are of these models, and each wrong file is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from rlalign.calibration.calibrators import (
    CalibrationMismatchError,
    Calibrator,
    ModelIdentity,
    PlattCalibrator,
    TemperatureCalibrator,
)
from rlalign.config import RewardConfig, RewardModelConfig, ScoringServerConfig
from rlalign.reward.loading import load_mixture
from rlalign.reward.mixture import Sample, logits_by
from rlalign.reward.training import Labelled, Recipe, train_reward_model, write_rows
from rlalign.scoring import HFScorer, ScoringParams
from rlalign.tiny_policy.tokenizer import byte_tokenizer

WORDS = [(" yes", 1.0), (" yes", 1.0), (" no", 0.0), (" maybe", 0.0), (" yes", 0.0), (" no", 1.0)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small reward model with scores.jsonl and calibration.json beside it."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    tokenizer = byte_tokenizer(64)
    config = Qwen3Config(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        head_dim=16, max_position_embeddings=64, initializer_range=0.2, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    rows = [Labelled(prompt=f"question {i}?", completion=w, label=y) for i in range(60) for w, y in WORDS]
    recipe = Recipe(epochs=2, batch_size=32, micro_batch_size=32, learning_rate=3e-3, max_length=32, held_out=0.3)
    train_reward_model(
        rows, base=root / "base", out=root / "rm", objective="labels", recipe=recipe, say=lambda line: None
    )
    return root / "rm"


def loaded(**config):
    return load_mixture(RewardConfig(verifier=0.0, models={"rm": RewardModelConfig(**config)}), say=lambda line: None)


def samples(*completions, prompt="question 1?"):
    return [Sample(prompt=prompt, completion=c, verified=0.0, group=0, tokens=len(c)) for c in completions]


def test_raw_logits_are_those_of_the_scorer_and_of_no_other_batch(folder):
    mixture = loaded(path=str(folder))
    values = mixture(samples(" yes", " no", " maybe")).values_B
    alone = [HFScorer(str(folder)).score("question 1?", [c]).logits[0][0] for c in (" yes", " no", " maybe")]
    np.testing.assert_allclose(values, alone, atol=1e-5)


def test_a_completion_the_model_cannot_read_fails_alone(folder):
    rewards = loaded(path=str(folder))(samples(" yes", "x" * 100, "", " no"))
    assert rewards.known_B.tolist() == [True, False, False, True]
    assert "reads at most 64" in rewards.failed[1] and "empty" in rewards.failed[2]


def test_the_own_calibration_is_used_also_after_the_folder_moved(folder, tmp_path):
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    mixture = loaded(path=str(moved), shape="probability", calibration="own")
    calibrator = Calibrator.load(folder / "calibration.json")
    rewards = mixture(samples(" yes", " no"))
    score = rewards.components["rm"].score
    np.testing.assert_allclose(score.calibrated, calibrator.transform(score.raw.double()), rtol=1e-6)
    assert score.calibration_id == calibrator.calibration_id
    assert set(rewards.metrics()) >= {"reward/rm/raw_mean", "reward/rm/tied_frac", "reward/rm/out_of_support_frac"}


def test_log_odds_and_lower_bound_come_from_the_files(folder):
    (log_odds,) = loaded(path=str(folder), shape="log_odds", calibration="own").models.values()
    assert log_odds.calibrator.scale_ > 0
    bound = loaded(path=str(folder), shape="lower_bound", calibration="own", scores="own")(samples(" yes")).values_B
    plain = loaded(path=str(folder), shape="probability", calibration="own")(samples(" yes")).values_B
    assert 0 < bound < plain


def fitted(path: Path, identity: ModelIdentity, *, calibrator=None):
    random = np.random.default_rng(0)
    logits = random.normal(size=200)
    calibrator = calibrator or PlattCalibrator().fit(logits, random.random(200) < 1 / (1 + np.exp(-logits)))
    calibrator.save(path, model=identity)
    return str(path)


@pytest.mark.parametrize(
    ("identity", "message"),
    [
        ({}, "bound to no model; fit it with rlalign calibrate --model"),
        ({"id": "another/model"}, "fitted on another model \\(id: file has 'another/model'"),
        ({"id": "HERE", "head_dtype": "bfloat16"}, "head_dtype: file has 'bfloat16', expected 'float32'"),
        ({"id": "HERE", "num_labels": 3}, "num_labels: file has 3, expected 1"),
    ],
    ids=["unbound", "id", "head_dtype", "num_labels"],
)
def test_a_calibration_of_another_model_is_refused(folder, tmp_path, identity, message):
    here = {k: str(folder) if v == "HERE" else v for k, v in identity.items()}
    path = fitted(tmp_path / "c.json", ModelIdentity(**here))
    with pytest.raises(CalibrationMismatchError, match=message):
        loaded(path=str(folder), shape="probability", calibration=path)


def test_what_the_file_does_not_state_is_not_held_against_it(folder, tmp_path):
    path = fitted(tmp_path / "c.json", ModelIdentity(id=str(folder)))
    assert loaded(path=str(folder), shape="probability", calibration=path).models["rm"].calibrator.method == "platt"


@pytest.mark.parametrize("labels", [[70], [70, 80, 90]])
def test_a_judge_of_other_than_two_labels_has_no_log_odds(folder, labels):
    """One label has none to be weighed against, and of three the third would go unseen."""
    params = {"task": "generative", "label_token_ids": labels, "full_vocabulary": True, "min_label_mass": 0.0}
    message = f"the log-odds of two labels, yes first, and label_token_ids has {len(labels)}"
    judge = str(folder.parent / "base")
    with pytest.raises(ValueError, match=f"rm: .*{message}"):  # when it is loaded
        loaded(path=judge, params=params)
    with pytest.raises(ValueError, match=message):  # a server's own labels show with the first score
        logits_by(HFScorer(judge), ScoringParams(**params))([("question 1?", " yes")])


def test_a_judge_is_rewarded_with_its_log_odds_and_not_where_it_answers_neither(folder):
    judge = str(folder.parent / "base")
    params = {"task": "generative", "label_token_ids": [70, 80], "min_label_mass": 0.0}
    values = loaded(path=judge, params=params)(samples(" yes", " no")).values_B
    logprobs = [HFScorer(judge).score("question 1?", [c], ScoringParams(**params)).logits[0] for c in (" yes", " no")]
    np.testing.assert_allclose(values, [x[0] - x[1] for x in logprobs], atol=1e-5)
    with pytest.raises(RuntimeError, match="2 of 2 samples have no reward: rm: low_label_mass"):
        loaded(path=judge, params=params | {"min_label_mass": 0.99})(samples(" yes", " no"))


def test_several_labels_need_to_be_told_apart(folder, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    AutoModelForSequenceClassification.from_pretrained(folder.parent / "base", num_labels=3).save_pretrained(
        tmp_path / "three"
    )
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "three")
    with pytest.raises(
        ValueError, match="the model has 3 labels; say which one is the reward with label_index, got None"
    ):
        loaded(path=str(tmp_path / "three"))
    value = loaded(path=str(tmp_path / "three"), label_index=2)(samples(" yes")).values_B[0]
    assert value == pytest.approx(
        HFScorer(str(tmp_path / "three")).score("question 1?", [" yes"]).logits[0][2], abs=1e-5
    )


def test_a_calibration_of_pairs_has_no_probability_to_offer(folder, tmp_path):
    pairs = TemperatureCalibrator().fit_pairs(np.arange(60) % 7, np.arange(60) % 5)
    path = fitted(tmp_path / "c.json", ModelIdentity(id=str(folder)), calibrator=pairs)
    with pytest.raises(ValueError, match="they say nothing about the level of a probability"):
        loaded(path=str(folder), shape="probability", calibration=path)
    assert loaded(path=str(folder), shape="log_odds", calibration=path).models["rm"].calibrator.scale_ > 0


def test_a_lower_bound_needs_the_very_scores_that_were_calibrated(folder, tmp_path):
    lines = (folder / "scores.jsonl").read_text().splitlines()
    (tmp_path / "fewer.jsonl").write_text("\n".join(lines[:-1]))
    with pytest.raises(ValueError, match="is not what the calibration was fitted on"):
        loaded(path=str(folder), shape="lower_bound", calibration="own", scores=str(tmp_path / "fewer.jsonl"))


def test_references_are_scored_by_the_same_model(folder, tmp_path):
    write_rows(tmp_path / "references.jsonl", [Labelled(prompt="question 1?", completion=" no", label=0.0)])
    mixture = loaded(path=str(folder), shape="sigmoid", references=str(tmp_path / "references.jsonl"))
    rewards = mixture([*samples(" yes", " no"), *samples(" yes", prompt="never referred to")])
    assert rewards.values_B[1] == pytest.approx(0.5) and rewards.values_B[0] > 0.5
    assert rewards.failed == {2: "rm: no reference for its prompt"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"path": "/nowhere"}, "is not a Hugging Face folder"),
        ({"path": "FOLDER", "params": {"colour": "red"}}, "reward.models.rm.params: .*colour"),
        ({"path": "FOLDER", "shape": "probability", "calibration": "/nowhere.json"}, "no such calibration file"),
        ({"server": ScoringServerConfig(url="http://127.0.0.1:9", api_key_env="NO_SUCH_KEY")}, "NO_SUCH_KEY is not set"),
    ],
)  # fmt: skip
def test_what_cannot_be_loaded_is_said(folder, config, message):
    with pytest.raises(ValueError, match=message):
        loaded(**{k: str(folder) if v == "FOLDER" else v for k, v in config.items()})


def test_the_record_beside_the_model_says_where_it_came_from(folder):
    record = json.loads((folder / "reward_model.json").read_text())
    assert record["objective"] == "labels" and record["rows"]["held_out"] == 18 * len(WORDS)
