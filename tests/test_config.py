"""Every shipped configuration composes; bad ones are refused with one line that says what to do."""

from collections import defaultdict
from functools import cache
from itertools import zip_longest
from pathlib import Path

import pytest
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from rlalign.config import (
    PRESETS,
    CorrectionConfig,
    Dtype,
    HeadDtype,
    compose,
    load,
    register_schema,
    to_plain,
)

CONFIGS = Path(__file__).parents[1] / "configs"
MINIMAL = ["model.path=x", "task.name=y"]


def groups() -> dict[str, list[str]]:
    found = defaultdict(list)
    for file in sorted(CONFIGS.glob("*/*.yaml")):
        found[file.parent.name].append(f"{file.parent.name}={file.stem}")
    return found


@cache
def demo() -> DictConfig:
    """The demo, composed once; nobody changes it."""
    return compose("demo", [])


def changed(*overrides: str) -> DictConfig:
    """The demo with overrides as Hydra hands them on, for what `load` says of values that have the right types."""
    return OmegaConf.merge(OmegaConf.to_container(demo()), OmegaConf.from_dotlist(list(overrides)))


@pytest.mark.parametrize("options", [[o for o in row if o] for row in zip_longest(*groups().values())], ids=", ".join)
def test_every_group_option_composes(options):
    load(compose("train", [*options, *MINIMAL]))


@pytest.mark.nightly
@pytest.mark.parametrize("option", [option for options in groups().values() for option in options])
def test_every_group_option_composes_alone(option):
    load(compose("train", [option, *MINIMAL]))


@pytest.mark.parametrize("name", sorted(p.stem for p in CONFIGS.glob("*.yaml") if p.stem != "train"))
def test_every_complete_configuration_composes_as_it_is(name):
    load(compose(name, []))


def test_overrides_reach_the_dataclasses_with_their_types():
    config = load(compose("demo", ["algo.lr=1e-5", "rollout.group_size=4", "model.dtype=float32", "head_dtype=model"]))
    assert (config.algo.lr, config.rollout.group_size) == (1e-5, 4)
    assert (config.model.dtype, config.head_dtype) == (Dtype.float32, HeadDtype.model)


def test_a_configuration_survives_its_own_plain_form():
    config = load(compose("demo", ["algo=tis"]))
    assert load(to_plain(config)) == config
    assert config.algo.correction.preset == "tis"
    assert config.output_dir == "runs/demo"


def test_the_demo_can_be_run_exact():
    assert load(compose("demo", ["exact=true"])).exact and not load(demo()).exact


def test_a_mirrored_body_needs_an_eager_engine_and_exact_has_two_spellings():
    mirrored = load(changed("trainer.body=mirrored", "rollout.enforce_eager=true"))
    assert mirrored.mirrored and not mirrored.exact and not load(demo()).mirrored
    assert load(changed("trainer.body=exact")).exact


REFUSED_BY_HYDRA = {
    "algo.lrr=1": "Key 'lrr' not in 'AlgoConfig'",
    "algo.lr=abc": "'abc' of type 'str' could not be converted to Float",
    "algo=nope": "Could not find 'algo/nope'",
    "head_dtype=float16": "expected one of",
}
BAD = {
    "trainer.body=half": "choose one of model, mirrored, exact",
    "trainer.body=mirrored & rollout.enforce_eager=false": "a compiled engine fuses operations and rounds elsewhere",
    "trainer.body=mirrored & model.dtype=float32": "it is about where 16 bits are rounded",
    "trainer.body=mirrored & trainer.lora.rank=4": "adapters are merged in the engine, not in the trainer",
    "trainer.body=mirrored & rollout.tensor_parallel_size=2": "the all-reduce adds and rounds partial products",
    "trainer.body=mirrored & trainer.attention=eager": "a mirrored body attends through the engine's kernel",
    "trainer.body=mirrored & head_dtype=model": "16-bit heads alone differ by more than the bodies",
    "trainer.body=mirrored & exact=true": "choose one; exact computes both sides anew",
    "exact=true & trainer.pack_tokens=64": "an attention of its own, over padded rows",
    "trainer.lora.rank=-1": "trainer.lora.rank=-1: cannot be negative",
    "trainer.lora.targets=[all-linear,q_proj]": "or all-linear alone",
    "trainer.lora.dropout=1.0": "must be at least 0 and below 1",
    "trainer.lora.rank=4 & head_dtype=master": "the lm_head is frozen",
    "trainer.lora.rank=4 & exact=true": "adapters are merged in the engine, not in the trainer",
    "exact=true & head_dtype=model": "exact=true with head_dtype=model: exact mode computes float32 logits",
    "exact=true & rollout.tensor_parallel_size=2": "the all-reduce adds partial products in another order",
    "exact=true & rollout.enforce_eager=false": "a compiled model rearranges the sums",
    "rollout.top_p=1.5": "top_p must lie in",
    "rollout.capture_ids=4096": "must lie in 0..4095",
    "rollout.temperature=0": "must be positive",
    "rollout.group_size=1": "at least 2 samples",
    "rollout.max_tokens=64": "leaves no room for a prompt",
    "rollout.head_mode=magic": "choose one of auto, native, cached",
    "rollout.backend=ray": "choose one of embedded, server",
    "rollout.start=2": "rollout.start with rollout.backend=embedded: set rollout.backend=server",
    "rollout.wait_for=2": "rollout.wait_for with rollout.backend=embedded",
    "rollout.backend=server": "needs exactly one of rollout.start, rollout.servers, rollout.server_folder, got none",
    "rollout.backend=server & rollout.start=1 & rollout.server_folder=x": "got rollout.start and rollout.server_folder",
    "rollout.backend=server & rollout.server_folder=x": "the folder needs the number of servers to wait for",
    "rollout.backend=server & rollout.servers=[localhost:8000]": "'localhost:8000' is no url; write http://HOST:PORT",
    "rollout.backend=server & rollout.servers=[http://a,http://a]": "names a server twice",
    "rollout.backend=server & rollout.start=-1": "cannot be negative",
    "rollout.pause_timeout_s=0": "must be positive",
    "algo.minibatches=7": "does not divide",
    "algo.lr=-1": "cannot be negative",
    "algo.loss=magic": "choose one of grpo",
    "algo.correction.preset=nope": "choose one of tis",
    "algo.correction={preset: tis, low: 0.5}": "the preset tis has no such bound (it takes high)",
    "algo.correction.level=token": "either a preset or both level and mode",
    "algo.correction={preset: tis, level: token, mode: mask}": "either a preset or both level and mode",
    "algo.correction.high=2": "neither a preset nor level and mode",
    "trainer.zero_stage=0": "without an fp32 master",
    "trainer.logprob_keep_mib=-1": "cannot be negative",
    "trainer.zero_stage=4": "0, 1, 2 or 3",
    "checkpoint.resume=maybe": "choose one of never, auto, must",
    "checkpoint.keep=0": "at least one must stay",
    "tracking.wandb=maybe": "choose one of auto, online, offline, disabled",
    "steps=0": "must be positive",
    "task.train_size=8": "more than task.train_size",
}


THROUGH_HYDRA = (
    "rollout.temperature=0",
    "algo.correction={preset: tis, low: 0.5}",
)  # two of many, values of both kinds


def assert_one_line(error: ValueError, message: str) -> None:
    assert message in str(error) and "\n" not in str(error)


@pytest.mark.parametrize(("override", "message"), BAD.items(), ids=BAD)
def test_bad_values_give_one_readable_line(override, message):
    with pytest.raises(ValueError, match="configuration: ") as error:
        load(changed(*override.split(" & ")))
    assert_one_line(error.value, message)


@pytest.mark.parametrize("override", [*REFUSED_BY_HYDRA, *THROUGH_HYDRA])
def test_bad_words_of_the_command_line_give_one_readable_line(override):
    with pytest.raises(ValueError, match="configuration: ") as error:
        load(compose("demo", [override]))
    assert_one_line(error.value, (REFUSED_BY_HYDRA | BAD)[override])


def test_missing_values_are_named():
    with pytest.raises(ValueError, match=r"missing mandatory value: path"):
        load(compose("train", []))


def test_every_preset_is_a_correction_that_can_be_said_and_has_its_row():
    register_schema()
    store = ConfigStore.instance()
    assert set(store.list("correction")) == {f"{name}.yaml" for name in ("none", *PRESETS)}
    rows = (Path(__file__).parents[1] / "docs" / "losses.md").read_text()
    for name in PRESETS:
        said = store.load(f"correction/{name}.yaml")
        assert said.node == {"preset": name} and said.package == "algo.correction"
        correction = load(changed("algo.loss=gspo", f"algo.correction.preset={name}")).algo.correction
        assert correction == CorrectionConfig(preset=name) and f"| `{name}` |" in rows


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.nightly] * (n != "tis")) for n in PRESETS])
def test_a_loss_and_a_correction_can_both_be_said(name):
    config = load(compose("demo", ["algo=gspo", f"correction={name}"]))
    assert (config.algo.loss, config.algo.correction) == ("gspo", CorrectionConfig(preset=name))


def test_no_correction_leaves_what_the_algorithm_says():
    assert load(compose("demo", ["algo=tis"])).algo.correction == CorrectionConfig(preset="tis")
    assert load(compose("demo", ["algo=tis", "correction=kpop"])).algo.correction.preset == "kpop"
