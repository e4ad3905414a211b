"""Components to one reward a sample: sums, failures that are never 0.0, shapes, and what the loop does with all of it."""

import math

import numpy as np
import pytest
import torch

from rlalign.calibration.calibrators import IsotonicCalibrator, PlattCalibrator
from rlalign.config import RewardModelConfig, load
from rlalign.reward.mixture import EMPTY, ModelReward, RewardMixture, Sample
from rlalign.run.step import train_step
from tests.fakes import FakeEngine, FakeTrainer, parties


def samples(completions, verified=None, *, group=2):
    verified = verified or [0.0] * len(completions)
    return [
        Sample(prompt=f"p{i // group}", completion=text, verified=float(v), group=i // group, tokens=len(text))
        for i, (text, v) in enumerate(zip(completions, verified, strict=True))
    ]


def model(answers, **config):
    """A reward model whose logits (or reasons) are looked up by completion."""
    objects = {k: config.pop(k) for k in ("calibrator", "bootstrap", "references_scores") if k in config}
    references = objects.pop("references_scores", {})
    if references:
        config["references"] = "file"
    return ModelReward(
        config=RewardModelConfig(path="x", **config),
        score=lambda pairs: [answers[c] for _, c in pairs],
        references=references,
        **objects,
    )


def platt(scale=2.0, bias=0.5):
    random = np.random.default_rng(0)
    logits = random.normal(bias, 2.0, 400)
    calibrator = PlattCalibrator().fit(logits, random.random(400) < 1 / (1 + np.exp(-(logits - bias))))
    calibrator._set(scale, -scale * bias)
    return calibrator


def test_without_models_the_reward_is_the_verifiers_word_bit_for_bit():
    verified = [1.0, 0.0, 0.1, 1 / 3]
    rewards = RewardMixture()(samples("abcd", verified))
    assert torch.equal(rewards.values_B, torch.tensor(verified))
    assert rewards.failed == {} and rewards.known_B.all()


def test_the_reward_is_the_weighted_sum():
    mixture = RewardMixture(
        {"a": model({"x": 2.0, "y": -1.0}), "b": model({"x": 0.5, "y": 4.0})},
        weights={"verifier": 3.0, "a": 1.0, "b": -2.0},
    )
    rewards = mixture(samples("xy", [1.0, 0.0]))
    assert rewards.values_B.tolist() == [3.0 + 2.0 - 1.0, -1.0 - 8.0]


def test_a_component_of_weight_zero_is_measured_and_can_fail_nothing():
    mixture = RewardMixture({"watched": model({"x": "server: 503", "y": 1.5})}, weights={"verifier": 1.0})
    rewards = mixture(samples("xy", [1.0, 0.0]))
    assert rewards.values_B.tolist() == [1.0, 0.0] and rewards.failed == {}
    metrics = rewards.metrics()
    assert metrics["reward/watched/failed"] == 1.0 and metrics["reward/watched/mean"] == 1.5
    assert metrics["reward/failed"] == 0.0 and metrics["reward/verifier/mean"] == 0.5


def test_a_failed_score_is_nan_with_a_reason_and_never_zero():
    mixture = RewardMixture(
        {"rm": model({"x": "server: HTTP 503", "y": 1.0, "z": math.inf, "w": 2.0})}, weights={"rm": 1.0}
    )
    rewards = mixture(samples("xyzw"))
    assert rewards.known_B.tolist() == [False, True, False, True]
    assert rewards.failed == {0: "rm: server: HTTP 503", 2: "rm: the score is inf"}
    assert rewards.metrics()["reward/mean"] == 1.5 and rewards.metrics()["reward/failed"] == 2.0


def test_too_many_failures_stop_the_step_with_the_reasons():
    mixture = RewardMixture({"rm": model({"x": "server: HTTP 503", "y": 1.0})}, weights={"rm": 1.0}, max_failed=0.5)
    assert len(mixture(samples("xy")).failed) == 1
    with pytest.raises(
        RuntimeError, match=r"3 of 4 samples have no reward: rm: server: HTTP 503 \(3\).*max_failed=0.5"
    ):
        mixture(samples("xxxy"))


def test_an_empty_completion_has_no_score_unless_one_is_configured():
    assert model({"x": 1.0})(samples(["", "x"])).failed == {0: EMPTY}
    given = model({"x": 1.0}, empty=-5.0)(samples(["", "x"]))
    assert given.failed == {} and given.score.raw.tolist() == [-5.0, 1.0]


def test_each_distinct_pair_is_scored_once():
    asked = []
    reward = ModelReward(
        config=RewardModelConfig(path="x"), score=lambda pairs: asked.extend(pairs) or [1.0] * len(pairs)
    )
    reward(samples("xxxyy", group=3))
    assert asked == [("p0", "x"), ("p1", "y")]


def test_a_component_that_answers_nan_without_a_reason_broke_its_contract():
    class Broken:
        def __call__(self, found):
            scored = model({"x": "reason", "y": 1.0})(found)
            return type(scored)(score=scored.score, failed={})

    with pytest.raises(RuntimeError, match="samples \\[0\\] have a NaN without a reason"):
        RewardMixture({"rm": Broken()}, weights={"rm": 1.0})(samples("xy"))


LOGITS = {"a": -2.0, "b": 0.5, "c": 3.0}
P = {name: 1 / (1 + math.exp(-2.0 * (x - 0.5))) for name, x in LOGITS.items()}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"shape": "logit"}, LOGITS),
        ({"shape": "log_odds", "calibration": "f"}, {n: 2.0 * (x - 0.5) for n, x in LOGITS.items()}),
        ({"shape": "probability", "calibration": "f"}, P),
        ({"shape": "threshold", "threshold": 0.5, "calibration": "f"}, {"a": 0.0, "b": 1.0, "c": 1.0}),
        ({"shape": "sigmoid", "reference": 1.0}, {n: 1 / (1 + math.exp(1.0 - x)) for n, x in LOGITS.items()}),
    ],
    ids=lambda value: value.get("shape", ""),
)
def test_every_shape_is_its_formula(config, expected):
    calibrator = platt() if "calibration" in config else None
    score = model(LOGITS, calibrator=calibrator, **config)(samples("abc")).score
    assert score.raw.tolist() == list(LOGITS.values())
    np.testing.assert_allclose(score.calibrated, list(expected.values()), rtol=1e-6)
    assert score.calibration_id == ("identity" if calibrator is None else calibrator.calibration_id)


def test_references_are_those_of_the_prompt_and_a_prompt_without_one_has_no_reward():
    reward = model({"a": 1.0, "b": 1.0}, shape="sigmoid", references_scores={"p0": [0.0, 2.0]})
    found = reward(samples("ab", group=1))
    assert found.score.calibrated[0] == pytest.approx(0.5)  # the mean of sigmoid(1) and sigmoid(-1)
    assert found.failed == {1: "no reference for its prompt"}


def test_the_filter_leaves_out_what_the_model_is_unsure_of():
    reward = model(LOGITS, calibrator=platt(), shape="logit", calibration="f", unsure=[0.4, 0.6])
    found = reward(samples("abc"))
    assert found.score.calibrated.isnan().tolist() == [False, True, False] and list(found.failed) == [1]
    assert found.measured["filtered"] == 1.0


def test_isotonic_ties_inside_a_group_are_reported():
    logits, labels = np.array([-2.0, -1.0, 0.0, 1.0, 2.0] * 20), np.array([0, 1, 0, 1, 1] * 20)
    with pytest.warns(UserWarning, match="share their calibrated score"):
        calibrator = IsotonicCalibrator().fit(logits, labels)
    answers = {"a": -1.0, "b": 0.0, "c": 2.0, "d": -2.0}  # a and b are one plateau
    rewards = RewardMixture(
        {"rm": model(answers, calibrator=calibrator, shape="probability", calibration="f")}, weights={"rm": 1.0}
    )(samples("abcd", group=4))
    assert rewards.metrics()["reward/rm/tied_frac"] == 0.5


# in the loop


def run_config(**changes):
    base = {"model": {"path": "x"}, "task": {"name": "x"}, "rollout": {"prompts_per_step": 4, "group_size": 4}}
    return load(base | changes)


def stepped(tmp_path, reward=None, **changes):
    events = []
    p = parties(tmp_path, engine=FakeEngine(events), trainer=FakeTrainer(events))
    if reward is not None:
        p = type(p)(**{**vars(p), "reward": reward})
    return train_step(0, p, run_config(**changes)), events


class FailingOn:
    """The verifier, except that it has no answer for some samples."""

    def __init__(self, *at):
        self.at = at

    def __call__(self, found):
        rewards = RewardMixture()(found)
        values_B = rewards.values_B.index_fill(0, torch.tensor(self.at), math.nan)
        return type(rewards)(
            values_B=values_B,
            group_B=rewards.group_B,
            components=rewards.components,
            failed=dict.fromkeys(self.at, "gone"),
        )


def test_a_failed_sample_leaves_its_group_and_the_loss(tmp_path):
    whole, _ = stepped(tmp_path)
    part, events = stepped(tmp_path, FailingOn(1, 2))
    rest = [0, 3]
    kept = whole.rewards.values_B[rest].double()
    expected = (kept - kept.mean()) / (kept.std() + 1e-6) if kept[0] != kept[1] else torch.zeros(2)
    np.testing.assert_allclose(part.advantages_BL[rest, 0], expected, rtol=1e-6)
    assert (part.advantages_BL[[1, 2]] == 0).all()
    assert torch.equal(part.advantages_BL[4:], whole.advantages_BL[4:])
    trained = next(n for name, n in events if name == "forward_backward")
    assert trained == (16 - 2) * 3  # tokens in the loss's denominator


def test_a_group_with_none_left_teaches_nothing_and_the_others_still_do(tmp_path):
    part, events = stepped(tmp_path, FailingOn(4, 5, 6, 7))
    assert (part.advantages_BL[4:8] == 0).all() and part.advantages_BL.abs().sum() > 0
    assert ("forward_backward", 12 * 3) in events


def test_a_minibatch_without_any_reward_is_an_error_and_not_a_step_of_zeros(tmp_path):
    with pytest.raises(RuntimeError, match="nothing is left to train on"):
        stepped(tmp_path, FailingOn(0, 1, 2, 3), algo={"minibatches": 4})


def test_raw_scores_and_labels_of_every_sample_reach_whoever_watches(tmp_path):
    mixture = RewardMixture({"rm": model({"0": -1.0, "1": 2.0})}, weights={"verifier": 1.0})
    result, _ = stepped(tmp_path, mixture)
    labels, raw = result.rewards.components["verifier"].score.raw, result.rewards.components["rm"].score.raw
    assert torch.equal(raw, torch.where(labels == 1, 2.0, -1.0))
    assert len(raw) == len(result.texts) == len(result.batch)


# configuration

BAD = {
    "weight": ({"verifier": 2.0}, "weight 2.0 of verifier, the only reward, changes nothing"),
    "log_odds alone": (
        {"verifier": 0, "models": {"rm": {"path": "x", "shape": "log_odds", "calibration": "own"}}},
        "shape=log_odds as the only reward changes nothing: with algo.normalize_std=true advantages are (r - mean) / std",
    ),
    "unused calibration": ({"models": {"rm": {"path": "x", "calibration": "own"}}}, "shape=logit would not use it"),
    "missing calibration": ({"models": {"rm": {"path": "x", "shape": "probability"}}}, "needs a calibration"),
    "neither path nor url": ({"models": {"rm": {}}}, "give either path or server.url"),
    "both": ({"models": {"rm": {"path": "x", "server": {"url": "http://h"}}}}, "give either path or server.url"),
    "server without url": ({"models": {"rm": {"path": "x", "server": {"model": "m"}}}}, "no url"),
    "shape": ({"models": {"rm": {"path": "x", "shape": "tanh"}}}, "choose one of logit"),
    "reference": ({"models": {"rm": {"path": "x", "shape": "sigmoid"}}}, "needs either reference"),
    "two references": (
        {"models": {"rm": {"path": "x", "shape": "sigmoid", "reference": 0.0, "references": "f"}}}, "needs either reference",
    ),
    "reference unused": ({"models": {"rm": {"path": "x", "reference": 0.0}}}, "no other shape takes them"),
    "nothing trained": ({"verifier": 0, "models": {"rm": {"path": "x", "weight": 0}}}, "every weight is 0"),
    "name": ({"models": {"verifier": {"path": "x"}}}, "none of verifier, mean"),
    "length": (
        {"models": {"rm": {"path": "x", "shape": "probability", "calibration": "own", "length_correction": 0.5}}},
        "fitted on scores that were not corrected",
    ),
    "scores": ({"models": {"rm": {"path": "x", "shape": "lower_bound", "calibration": "own"}}}, "needs scores"),
    "own of a server": (
        {"models": {"rm": {"server": {"url": "http://h"}, "shape": "probability", "calibration": "own"}}}, "in the folder of path",
    ),
    "unsure": ({"models": {"rm": {"path": "x", "calibration": "own", "unsure": [0.6, 0.4]}}}, "low < high"),
    "max_failed": ({"max_failed": 1.0}, "a share"),
}  # fmt: skip


@pytest.mark.parametrize(("reward", "message"), BAD.values(), ids=BAD)
def test_what_cannot_matter_or_cannot_work_is_refused(reward, message):
    with pytest.raises(ValueError, match="configuration: ") as error:
        run_config(reward=reward)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_same_settings_pass_where_they_do_matter():
    log_odds = {"rm": {"path": "x", "shape": "log_odds", "calibration": "own", "weight": 2.0}}
    run_config(reward={"models": log_odds})  # in a mixture the scale decides
    run_config(reward={"verifier": 0, "models": log_odds}, algo={"normalize_std": False})
    run_config(reward={"verifier": 2.0}, algo={"normalize_std": False})


def test_the_refused_affine_map_really_changes_nothing_and_the_sigmoid_does():
    from rlalign.objective.advantages import group_relative

    group_B, raw = torch.tensor([0] * 4 + [1] * 4), torch.randn(8, generator=torch.Generator().manual_seed(0)) * 2
    plain = group_relative(raw, group_B)
    torch.testing.assert_close(group_relative(3.0 * raw - 7.0, group_B), plain, rtol=1e-4, atol=1e-5)
    assert (group_relative((3.0 * raw - 7.0).sigmoid(), group_B) - plain).abs().max() > 0.1
