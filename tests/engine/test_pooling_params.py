"""ScoringParams.verify against vLLM's own PoolingParams.verify: the matrix of task and parameter, and the defaults.

Same verdict everywhere, but where ours differs on purpose: raw logits by default, and step pooling that names its step token.
"""

from __future__ import annotations

import pytest

from rlalign.scoring import ScoringParams
from rlalign.scoring.params import InvalidParams, ModelInfo, PoolerDefaults
from tests.engine.scoring_models import CONTEXT, save

TASKS = ("classify", "token_classify", "embed", "token_embed")
GIVEN = {
    "use_activation": True,
    "dimensions": 16,
    "step_tag_id": 5,
    "returned_token_ids": [0, 1],
}
MATRYOSHKA = {"matryoshka_dimensions": [16, 32]}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """vLLM's ModelConfig of a small model, without an engine."""
    from vllm.config import ModelConfig, PoolerConfig

    folder = save("three_labels", tmp_path_factory.mktemp("three_labels"))

    def make(*, step=False, overrides=None, **pooler):
        pooling = PoolerConfig(tok_pooling_type="STEP" if step else "ALL", **pooler)
        return ModelConfig(
            folder,
            runner="pooling",
            dtype="float32",
            max_model_len=CONTEXT,
            pooler_config=pooling,
            hf_overrides=overrides or {},
        )

    return make


def info_of(config, *, task) -> ModelInfo:
    """The same facts for us."""
    pooler = config.pooler_config
    return ModelInfo(
        id="m", architecture="A", tasks=(task,), vocab_size=288, hidden_size=64, num_labels=3, activation="softmax",
        max_length=CONTEXT, matryoshka_dimensions=tuple(config.matryoshka_dimensions or ()) if config.is_matryoshka else None,
        pooler=PoolerDefaults(
            token_pooling=pooler.tok_pooling_type, use_activation=pooler.use_activation, dimensions=pooler.dimensions,
            step_tag_id=pooler.step_tag_id,
            returned_token_ids=None if pooler.returned_token_ids is None else tuple(pooler.returned_token_ids),
        ),
    )  # fmt: skip


def theirs(config, task, given):
    """What vLLM makes of the parameters, or None where it refuses."""
    from vllm import PoolingParams
    from vllm.exceptions import VLLMValidationError

    params = PoolingParams(task=task, **given)
    try:
        params.verify(config)
    except VLLMValidationError:
        return None
    return params


def ours(config, task, given):
    try:
        return ScoringParams(task=task, **given).verify(info_of(config, task=task))
    except InvalidParams:
        return None


@pytest.mark.parametrize("overrides", [None, MATRYOSHKA], ids=["plain", "matryoshka"])
@pytest.mark.parametrize("name", GIVEN)
@pytest.mark.parametrize("task", TASKS)
def test_the_same_parameters_are_refused(config, task, name, overrides):
    made = config(overrides=overrides)
    given = {name: GIVEN[name]}
    assert (ours(made, task, given) is None) == (theirs(made, task, given) is None)


@pytest.mark.parametrize("dimensions", [-1, 0, 1, 16, 17, 32, 64, 65])
@pytest.mark.parametrize("task", ["embed", "token_embed"])
def test_the_same_dimensions_are_refused(config, task, dimensions):
    made = config(overrides=MATRYOSHKA)
    verdict = theirs(made, task, {"dimensions": dimensions})
    assert (ours(made, task, {"dimensions": dimensions}) is None) == (verdict is None)


@pytest.mark.parametrize("task", TASKS)
def test_the_same_defaults_but_for_raw_logits(config, task):
    made = config()
    a, b = ours(made, task, {}), theirs(made, task, {})
    assert b.use_activation is True
    assert a.use_activation is ("embed" in task)  # a reward is a logit unless somebody asks
    assert a.skip_reading_prefix_cache == b.skip_reading_prefix_cache == task.startswith("token_")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("default", [True, False])
@pytest.mark.parametrize("given", [None, True, False])
def test_the_user_comes_before_the_engine(config, task, default, given):
    made = config(use_activation=default)
    wish = {} if given is None else {"use_activation": given}
    a, b = ours(made, task, wish), theirs(made, task, wish)
    assert a.use_activation == b.use_activation == (default if given is None else given)


def test_step_pooling_merges_alike(config):
    made = config(step=True, step_tag_id=7, returned_token_ids=[0, 2])
    for given in ({}, {"step_tag_id": 9}, {"returned_token_ids": [1]}):
        a, b = ours(made, "token_classify", given), theirs(made, "token_classify", given)
        assert (a.step_tag_id, a.returned_token_ids) == (b.step_tag_id, b.returned_token_ids)
    nameless = config(step=True)
    assert theirs(nameless, "token_classify", {}).step_tag_id is None  # vLLM returns every token then
    with pytest.raises(InvalidParams, match="step pooling needs the token that ends a step"):
        ScoringParams(task="token_classify").verify(info_of(nameless, task="token_classify"))


@pytest.mark.parametrize("task", ["score", "encode"])
def test_removed_tasks_are_refused_with_the_new_name(task):
    from vllm import PoolingParams
    from vllm.exceptions import VLLMValidationError

    for make, error in ((PoolingParams, VLLMValidationError), (ScoringParams, ValueError)):
        with pytest.raises(error, match=r"was removed.*use"):
            make(task=task)


def test_both_name_every_parameter_at_fault(config):
    made = config()
    given = {"step_tag_id": 5, "returned_token_ids": [0, 1]}
    from vllm import PoolingParams
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match=r"step_tag_id.*returned_token_ids"):
        PoolingParams(task="classify", **given).verify(made)
    with pytest.raises(InvalidParams, match=r"step_tag_id.*returned_token_ids"):
        ScoringParams(task="classify", **given).verify(info_of(made, task="classify"))
