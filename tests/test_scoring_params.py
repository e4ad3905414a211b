"""ScoringParams: the task x parameter matrix, resolution, and messages that name every fault at once."""

import math

import msgspec
import pytest

from rlalign.scoring.params import InvalidParams, ModelInfo, PoolerDefaults, ScoringParams

STEP = PoolerDefaults(token_pooling="STEP", step_tag_id=7, returned_token_ids=(0, 1))
MODELS = {
    "classify": ModelInfo(
        id="rm", architecture="Qwen3ForSequenceClassification", tasks=("classify",), vocab_size=100, hidden_size=64,
        num_labels=1, activation="sigmoid", max_length=50, exposes_hidden_states=True,
    ),
    "token_classify": ModelInfo(
        id="prm", architecture="Qwen2ForTokenClassification", tasks=("token_classify",), vocab_size=100, hidden_size=64,
        num_labels=2, activation="softmax", max_length=50, pooler=STEP,
    ),
    "embed": ModelInfo(
        id="emb", architecture="Qwen3Model", tasks=("embed", "token_embed"), vocab_size=100, hidden_size=64,
        max_length=50, matryoshka_dimensions=(16, 32),
    ),
    "token_embed": ModelInfo(
        id="emb", architecture="Qwen3Model", tasks=("token_embed", "embed"), vocab_size=100, hidden_size=64,
        max_length=50, matryoshka_dimensions=(16, 32),
    ),
    "generative": ModelInfo(
        id="judge", architecture="Qwen3ForCausalLM", tasks=("generative",), vocab_size=100, hidden_size=64, max_length=50,
        hidden_states_reason="Qwen3ForCausalLM is a CausalLM: it has no score head",
    ),
}  # fmt: skip
MATRIX = [  # parameter and value -> tasks that take it; the rows of "Valid parameters per task"
    ("use_activation", True, {"classify", "token_classify", "embed", "token_embed"}),
    ("logit_mean", 0.0, {"classify", "token_classify"}),
    ("logit_sigma", 2.0, {"classify", "token_classify"}),
    ("return_pooled_hidden_states", True, {"classify"}),
    ("return_token_logprobs", True, {"generative"}),
    ("label_token_ids", [3, 4], {"generative"}),
    ("temperature", 2.0, {"generative"}),
    ("full_vocabulary", True, {"generative"}),
    ("min_label_mass", 0.25, {"generative"}),
    ("step_tag_id", 9, {"token_classify"}),
    ("returned_token_ids", [1], {"token_classify"}),
    ("dimensions", 16, {"embed", "token_embed"}),
    ("item_first", True, {"classify", "generative"}),
    ("alone", True, {"classify"}),
    ("truncate_prompt_tokens", 10, set(MODELS)),
    ("truncate_prompt_tokens", -1, set(MODELS)),
    ("max_tokens_per_item", 3, set(MODELS)),
    ("skip_reading_prefix_cache", True, set(MODELS)),
]


def given(task, **fields):
    """Parameters of a task, with the labels that a judge cannot do without."""
    labels = {"label_token_ids": [1, 2]} if task == "generative" else {}
    return ScoringParams(**(labels | fields))


@pytest.mark.parametrize("task", MODELS)
@pytest.mark.parametrize(("name", "value", "tasks"), MATRIX)
def test_each_parameter_belongs_to_its_tasks(task, name, value, tasks):
    params = given(task, **{name: value})
    if task in tasks:
        resolved = params.verify(MODELS[task])
        assert getattr(resolved, name) == (50 if value == -1 else value)
    else:
        with pytest.raises(
            InvalidParams, match=f"task '{task}'.*{name}.*The task supports .*truncate_prompt_tokens"
        ) as error:
            params.verify(MODELS[task])
        assert error.value.fields == (name,)


def test_every_parameter_is_in_the_matrix():
    removed = {"softmax", "activation", "normalize", "logit_bias", "logit_scale"}
    named = {name for name, _, _ in MATRIX} | {"task", "calibrate", "truncation_side"} | removed
    assert named == set(ScoringParams.__struct_fields__)


@pytest.mark.parametrize(("task", "activated"), [
    ("classify", False), ("token_classify", False), ("embed", True), ("token_embed", True), ("generative", None),
])  # fmt: skip
def test_logits_are_raw_and_embeddings_of_unit_length_by_default(task, activated):
    resolved = given(task).verify(MODELS[task])
    assert resolved.use_activation is activated
    assert resolved.task == task
    assert resolved.skip_reading_prefix_cache is (task in ("token_classify", "token_embed"))
    assert resolved.truncate_prompt_tokens is None and resolved.return_pooled_hidden_states is False


def test_a_judge_gets_temperature_one_and_half_the_mass():
    resolved = given("generative").verify(MODELS["generative"])
    assert (resolved.temperature, resolved.min_label_mass) == (1.0, 0.5)


@pytest.mark.parametrize("task", MODELS)
def test_resolving_changes_neither_the_caller_s_object_nor_a_resolved_one(task):
    params = given(task, truncate_prompt_tokens=-1)
    before = msgspec.json.encode(params)
    resolved = params.verify(MODELS[task])
    assert msgspec.json.encode(params) == before and resolved != params
    assert resolved.verify(MODELS[task]) == resolved


def test_the_user_comes_before_the_model_and_the_model_before_the_task():
    model = msgspec.structs.replace(
        MODELS["classify"], pooler=PoolerDefaults(use_activation=True, logit_mean=1.0, logit_sigma=3.0)
    )
    resolved = ScoringParams(logit_sigma=2.0).verify(model)
    assert (resolved.use_activation, resolved.logit_mean, resolved.logit_sigma) == (True, 1.0, 2.0)
    assert ScoringParams(use_activation=False).verify(model).use_activation is False


def test_every_fault_is_named_at_once():
    params = ScoringParams(
        temperature=2.0, label_token_ids=[1], dimensions=8, truncate_prompt_tokens=0, logit_sigma=-1.0
    )
    with pytest.raises(InvalidParams) as error:
        params.verify(MODELS["classify"])
    named = {"temperature", "label_token_ids", "dimensions", "truncate_prompt_tokens", "logit_sigma"}
    assert set(error.value.fields) == named and all(name in str(error.value) for name in named)
    assert "The task supports use_activation, calibrate, return_pooled_hidden_states" in str(error.value)


def test_a_task_is_never_overwritten():
    params = ScoringParams().verify(MODELS["embed"])
    with pytest.raises(ValueError, match="cannot overwrite task='embed' with 'token_embed'"):
        params.verify(MODELS["embed"], task="token_embed")
    assert ScoringParams().verify(MODELS["embed"], task="token_embed").task == "token_embed"
    with pytest.raises(InvalidParams, match="task='classify': the model supports embed, token_embed"):
        ScoringParams(task="classify").verify(MODELS["embed"])


@pytest.mark.parametrize(("old", "new"), [("score", "classify"), ("encode", "embed"), ("reward", "classify")])
def test_removed_tasks_name_their_successor(old, new):
    with pytest.raises(ValueError, match=f"'{old}' was removed upstream: use task='{new}'"):
        ScoringParams(task=old)
    with pytest.raises(msgspec.ValidationError, match="was removed upstream"):
        msgspec.convert({"task": old}, ScoringParams)


@pytest.mark.parametrize(("old", "value", "new"), [
    ("softmax", True, "use_activation"), ("activation", False, "use_activation"), ("normalize", True, "for embeddings only"),
    ("logit_bias", 1.5, "logit_mean"), ("logit_scale", 4.0, "logit_sigma, its inverse"),
])  # fmt: skip
def test_removed_names_are_refused_with_the_new_form(old, value, new):
    with pytest.raises(ValueError, match=f"{old} was removed upstream: use .*{new}"):
        ScoringParams(**{old: value})
    with pytest.raises(msgspec.ValidationError, match=f"{old} was removed upstream"):
        msgspec.convert({old: value}, ScoringParams)


@pytest.mark.parametrize(("task", "name", "value", "says"), [
    ("classify", "truncate_prompt_tokens", -2, "from -1 to 50"),
    ("classify", "truncate_prompt_tokens", 51, "from -1 to 50"),
    ("classify", "truncate_prompt_tokens", True, "from -1 to 50"),
    ("classify", "truncate_prompt_tokens", 4.0, "from -1 to 50"),
    ("classify", "max_tokens_per_item", 0, "from 1"),
    ("classify", "truncation_side", "left", "nothing is cut without"),
    ("classify", "truncation_side", "middle", "expected left, right"),
    ("classify", "logit_sigma", 0.0, "must be positive"),
    ("classify", "logit_sigma", math.nan, "expected a finite number"),
    ("classify", "logit_mean", math.inf, "expected a finite number"),
    ("classify", "use_activation", 1, "expected True or False"),
    ("generative", "temperature", 0.0, "must be positive"),
    ("generative", "temperature", math.inf, "expected a finite number"),
    ("generative", "min_label_mass", 1.5, "a probability"),
    ("generative", "label_token_ids", [], "needs the token ids|expected a list"),
    ("generative", "label_token_ids", [5], "always 1.0"),
    ("generative", "label_token_ids", [5, 5], "the same id twice"),
    ("generative", "label_token_ids", [5, 100], "100 is not an id from 0 to 99"),
    ("generative", "label_token_ids", [5, -1], "-1 is not an id"),
    ("generative", "label_token_ids", [5, True], "True is not an id"),
    ("generative", "label_token_ids", [5, 1.0], "1.0 is not an id"),
    ("generative", "label_token_ids", [[1, 2], []], "item 1: expected a list"),
    ("generative", "return_pooled_hidden_states", True, "CausalLM"),
    ("token_classify", "step_tag_id", 100, "from 0 to 99"),
    ("token_classify", "returned_token_ids", [2], "2 is not an id from 0 to 1"),
    ("token_classify", "skip_reading_prefix_cache", False, "a cached prefix has no states"),
    ("embed", "dimensions", 20, "trained for 16, 32"),
    ("embed", "dimensions", 0, "from 1 to 64"),
])  # fmt: skip
def test_bad_values_are_refused_with_what_was_expected(task, name, value, says):
    with pytest.raises(InvalidParams, match=says) as error:
        given(task, **{name: value}).verify(MODELS[task])
    assert name in error.value.fields


def test_matryoshka_needs_a_model_that_was_trained_for_it():
    plain = msgspec.structs.replace(MODELS["embed"], matryoshka_dimensions=None)
    with pytest.raises(InvalidParams, match="no Matryoshka training"):
        ScoringParams(dimensions=16).verify(plain)
    free = msgspec.structs.replace(MODELS["embed"], matryoshka_dimensions=())
    assert ScoringParams(dimensions=20).verify(free).dimensions == 20


def test_step_pooling_comes_from_the_model_and_only_from_a_step_model():
    resolved = ScoringParams().verify(MODELS["token_classify"])
    assert (resolved.step_tag_id, resolved.returned_token_ids) == (7, [0, 1])
    assert ScoringParams(step_tag_id=9).verify(MODELS["token_classify"]).step_tag_id == 9
    every_token = msgspec.structs.replace(MODELS["token_classify"], pooler=PoolerDefaults(token_pooling="ALL"))
    with pytest.raises(InvalidParams, match="only with step pooling") as error:
        ScoringParams(step_tag_id=9, returned_token_ids=[0]).verify(every_token)
    assert error.value.fields == ("step_tag_id", "returned_token_ids")
    no_tag = msgspec.structs.replace(MODELS["token_classify"], pooler=PoolerDefaults(token_pooling="STEP"))
    with pytest.raises(InvalidParams, match="needs the token that ends a step"):
        ScoringParams().verify(no_tag)


def test_labels_may_differ_by_item():
    params = given("generative", label_token_ids=[[1, 2], [3, 4]]).verify(MODELS["generative"])
    assert params.label_ids(2) == [[1, 2], [3, 4]]
    assert given("generative").label_ids(3) == [[1, 2]] * 3
    with pytest.raises(InvalidParams, match="2 lists for 3 items"):
        params.label_ids(3)


def test_one_label_is_fine_among_the_whole_vocabulary():
    params = given("generative", label_token_ids=[5], full_vocabulary=True)
    assert params.verify(MODELS["generative"]).full_vocabulary
    with pytest.raises(InvalidParams, match="renormalised"):
        given("generative", full_vocabulary=True, temperature=2.0).verify(MODELS["generative"])


def test_traps_of_the_softmax_are_refused():
    one = msgspec.structs.replace(MODELS["classify"], activation="softmax")
    with pytest.raises(InvalidParams, match="always 1.0"):
        ScoringParams(use_activation=True).verify(one)
    three = msgspec.structs.replace(MODELS["classify"], activation="softmax", num_labels=3)
    with pytest.raises(InvalidParams, match="cancels in the softmax"):
        ScoringParams(use_activation=True, logit_mean=1.0).verify(three)


def test_calibration_is_the_default_exactly_where_a_calibrator_is_attached():
    plain, attached = MODELS["classify"], msgspec.structs.replace(MODELS["classify"], calibration_id="platt-1")
    assert ScoringParams().verify(plain).calibrate is False
    assert ScoringParams().verify(attached).calibrate is True
    assert ScoringParams(calibrate=False).verify(attached).calibrate is False
    with pytest.raises(InvalidParams, match="no calibrator is attached"):
        ScoringParams(calibrate=True).verify(plain)


@pytest.mark.parametrize("task", MODELS)
def test_logits_and_log_odds_can_be_calibrated_and_embeddings_cannot(task):
    attached = msgspec.structs.replace(MODELS[task], calibration_id="platt-1")
    if task in ("classify", "token_classify", "generative"):
        assert given(task, calibrate=True).verify(attached).calibrate is True
    else:
        assert given(task).verify(attached).calibrate is None
        with pytest.raises(InvalidParams, match="calibrate=True: not a parameter of this task"):
            given(task, calibrate=True).verify(attached)


def test_a_calibrated_score_is_not_squashed_or_shifted_as_well():
    attached = msgspec.structs.replace(MODELS["classify"], calibration_id="platt-1")
    with pytest.raises(InvalidParams, match="ask for one of the two") as error:
        ScoringParams(use_activation=True, logit_mean=1.0, logit_sigma=2.0).verify(attached)
    assert set(error.value.fields) == {"use_activation", "logit_mean", "logit_sigma"}
    eager = msgspec.structs.replace(attached, pooler=PoolerDefaults(use_activation=True, logit_sigma=2.0))
    resolved = ScoringParams().verify(eager)
    assert resolved.calibrate and not resolved.use_activation and resolved.logit_sigma is None


def test_a_calibrated_judge_has_two_labels():
    attached = msgspec.structs.replace(MODELS["generative"], calibration_id="platt-1")
    assert given("generative").verify(attached).calibrate
    with pytest.raises(InvalidParams, match="exactly two labels"):
        given("generative", label_token_ids=[1, 2, 3]).verify(attached)


def test_hidden_states_of_a_cross_encoder_are_refused_with_its_reason():
    cross = msgspec.structs.replace(
        MODELS["classify"], exposes_hidden_states=False, hidden_states_reason="CrossEncodingPooler"
    )
    with pytest.raises(InvalidParams, match="CrossEncodingPooler"):
        ScoringParams(return_pooled_hidden_states=True).verify(cross)


def test_truncation_to_the_model_needs_a_limit():
    endless = msgspec.structs.replace(MODELS["classify"], max_length=None)
    with pytest.raises(InvalidParams, match="no maximum length"):
        ScoringParams(truncate_prompt_tokens=-1).verify(endless)


def test_parameters_travel_as_json():
    params = given("generative", temperature=2.0, label_token_ids=[[1, 2], [3]])
    assert msgspec.json.decode(msgspec.json.encode(params), type=ScoringParams) == params
    assert b"use_activation" not in msgspec.json.encode(params)
    with pytest.raises(msgspec.ValidationError, match="unknown field"):
        msgspec.json.decode(b'{"tempreature": 2}', type=ScoringParams)
