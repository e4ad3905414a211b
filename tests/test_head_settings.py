"""What vLLM's additional_config may ask of the head, and the one place that decides the mode."""

import pytest

from rlalign.rollout.head.head_settings import HeadMode, HeadSettings, promised


@pytest.mark.parametrize(
    "given, expected",
    [
        ({"rlalign": {}}, HeadSettings("float32", "auto")),
        ({"rlalign": {"head_dtype": "model"}}, HeadSettings("model", "auto")),
        ({"rlalign": {"mode": "cached"}}, HeadSettings("float32", "cached")),
        ({"rlalign": {"fp32_lm_head": True}}, HeadSettings("float32", "auto")),
        ({"rlalign": {"fp32_lm_head": False}}, HeadSettings("model", "auto")),
        ({"fp32_lm_head": True}, HeadSettings("float32", "auto")),
        ({"fp32_lm_head": True, "rlalign": {"mode": "cached"}}, HeadSettings("float32", "cached")),
        ({"rlalign": {"head_dtype": "model", "mode": "off"}}, HeadSettings("model", "off")),
        ({"torchair_graph_config": {"enabled": True}, "lm_head_tensor_parallel_size": 2}, None),
        ({}, None),
    ],
)
def test_defaults_and_the_fields_own_spelling(given, expected):
    assert HeadSettings.of_engine(given) == expected


@pytest.mark.parametrize(
    "given, said",
    [
        ({"rlalign": {"head_dtpye": "float32"}}, r"'head_dtpye' is no setting; there are \"head_dtype\", \"mode\" or"),
        ({"rlalign": {"mode": "cache"}}, r"'mode' is 'cache'; choose \"auto\", \"cached\", \"exact\", \"native\" or \"off\""),
        ({"rlalign": {"head_dtype": "fp32"}}, r"'head_dtype' is 'fp32'; choose \"float32\", \"master\" or \"model\""),
        ({"rlalign": {"head_dtype": True}}, r"'head_dtype' is True; choose"),
        ({"rlalign": {"mode": None}}, r"'mode' is None; choose"),
        ({"rlalign": True}, r"\"rlalign\"\] is True; expected a dictionary such as"),
        ({"rlalign": {"fp32_lm_head": "yes"}}, r"fp32_lm_head is 'yes'; choose true or false"),
        ({"rlalign": {"fp32_lm_head": True, "head_dtype": "model"}}, r"means head_dtype 'float32', and head_dtype is 'model'"),
        ({"rlalign": {"head_dtype": "float32", "mode": "off"}}, r"'off' contradicts head_dtype 'float32'.*\"auto\", \"native\""),
        ({"rlalign": {"head_dtype": "master", "mode": "native"}}, r"'native' contradicts head_dtype 'master'.*choose \"auto\""),
        ({"rl_align": {"head_dtype": "float32"}}, r"'rl_align' is read by nobody.*did you mean 'rlalign'"),
        ({"fp32_head": True}, r"'fp32_head' is read by nobody.*did you mean 'fp32_lm_head'"),
        ({"enable_fp32_lm_head": True}, r"'enable_fp32_lm_head' is read by nobody"),
        ({"lm_head_fp32": True}, r"did you mean 'fp32_lm_head'"),
        ({"head_dtype": "float32"}, r"did you mean 'head_dtype' inside \{\"rlalign\""),
    ],
)  # fmt: skip
def test_what_would_leave_the_head_in_16_bits_is_refused_by_name(given, said):
    with pytest.raises(ValueError, match=said) as error:
        HeadSettings.of_engine(given)
    assert "\n" not in str(error.value)


ASKED = {"RLALIGN_HEAD": "float32"}


def test_the_environment_is_asked_where_the_engines_arguments_say_nothing():
    assert HeadSettings.wanted({}, {}) is None
    assert HeadSettings.wanted({}, {"RLALIGN_HEAD": "", "RLALIGN_HEAD_KERNEL": "avx2"}) is None
    assert HeadSettings.wanted({}, ASKED) == HeadSettings("float32", "auto")
    assert HeadSettings.wanted({"other": 1}, ASKED | {"RLALIGN_HEAD_MODE": "cached"}) == HeadSettings(
        "float32", "cached"
    )
    assert HeadSettings.wanted({}, {"RLALIGN_HEAD_MODE": "native"}) == HeadSettings("float32", "native")
    assert HeadSettings.wanted({"rlalign": {"head_dtype": "model"}}, ASKED) == HeadSettings("model", "auto")


@pytest.mark.parametrize(
    "given, said",
    [
        ({"RLALIGN_HEAD": "fp32"}, r'^RLALIGN_HEAD is \'fp32\'; choose "float32", "master" or "model"'),
        (ASKED | {"RLALIGN_HEAD_MODE": "cache"}, r'^RLALIGN_HEAD_MODE is \'cache\'; choose "auto"'),
        (ASKED | {"RLALIGN_HEAD_MODE": "off"}, r"^RLALIGN_HEAD_MODE 'off' contradicts head_dtype 'float32'"),
        ({"RLALIGN_HEAD_DTYPE": "float32"}, r'^RLALIGN_HEAD_DTYPE is read by nobody.*"RLALIGN_HEAD_MODE"'),
    ],
)
def test_variables_that_would_leave_the_head_in_16_bits_are_refused_by_name(given, said):
    with pytest.raises(ValueError, match=said):
        HeadSettings.wanted({}, given)


def test_one_decision_for_driver_and_worker():
    auto = HeadSettings()
    assert auto.resolve(device="cuda") is HeadMode.NATIVE
    assert auto.resolve(device="cpu") is HeadMode.CACHED
    assert auto.resolve(device="xpu") is HeadMode.CACHED  # its native head casts the weight in every step
    assert HeadSettings.of_run("model", "cached", exact=False).resolve(device="cpu") is HeadMode.OFF
    assert HeadSettings.of_run("master", "auto", exact=False).resolve(device="cuda") is HeadMode.MASTER
    assert HeadSettings.of_run("float32", "native", exact=False).resolve(device="cpu") is HeadMode.NATIVE
    assert HeadSettings.of_run("float32", "auto", exact=True).resolve(device="cpu") is HeadMode.EXACT
    assert promised("off", "bfloat16") == "bfloat16" and promised("cached", "bfloat16") == "float32"
