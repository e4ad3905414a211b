"""What any loop may put around its step: conventions read, monitors that name causes, files that our readers read."""

import math
from types import SimpleNamespace

import pytest
import torch

import rlalign
from rlalign.loops.mirrors import require_same_head
from rlalign.loops.step_monitor import write
from rlalign.rollout.attached import spec_of_sampling

PROCESSED = {"logprobs_mode": "processed_logprobs", "head_dtype": "float32"}


def batch(noise=0.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    rollout = -3.0 * torch.rand(4, 32, generator=g)
    mask = torch.rand(4, 32, generator=g) < 0.8
    return rollout + noise * torch.randn(4, 32, generator=g), rollout, mask


@pytest.mark.parametrize(
    "params, defaults, expected",
    [
        ({}, {}, rlalign.LogprobSpec()),
        ({"temperature": 0.5}, {"temperature": 0.6, "top_p": 0.9}, rlalign.LogprobSpec(temperature=0.5, top_p=0.9)),
        ({"top_k": -1}, {"top_k": 20}, rlalign.LogprobSpec()),
        (SimpleNamespace(temperature=0.5, top_p=1.0, top_k=0, min_p=0.0), {"top_p": 0.9}, rlalign.LogprobSpec(temperature=0.5)),
    ],
)  # fmt: skip
def test_what_a_mapping_leaves_out_is_the_engines_default(params, defaults, expected):
    """A generation_config.json with top_p=0.9 reaches requests over HTTP, and never an explicit SamplingParams."""
    assert spec_of_sampling(params, defaults=defaults, **PROCESSED) == expected


@pytest.mark.parametrize(
    "params, defaults, said",
    [
        ({"frequency_penalty": 0.1}, {}, r"frequency_penalty=0\.1"),
        ({}, {"repetition_penalty": 1.1}, r"repetition_penalty=1\.1"),
        ({"bad_words": ["x"], "min_tokens": 3}, {}, r"bad_words=\('x',\), min_tokens=3"),
    ],
)
def test_settings_that_no_trainer_repeats_are_refused_by_name(params, defaults, said):
    with pytest.raises(ValueError, match=f"Monitor: sampled with {said}, which change"):
        rlalign.Monitor(spec=spec_of_sampling(params, defaults=defaults, **PROCESSED))
    rlalign.Monitor(
        spec=spec_of_sampling(params, defaults=defaults, logprobs_mode="raw_logprobs", head_dtype="float32")
    )


def test_greedy_tokens_have_no_distribution():
    with pytest.raises(ValueError, match="temperature 0: greedy"):
        spec_of_sampling({"temperature": 0.0}, **PROCESSED)


def test_logits_are_no_logprobs():
    with pytest.raises(ValueError, match="returns processed_logits, which are no log-probabilities"):
        spec_of_sampling({}, logprobs_mode="processed_logits", head_dtype="float32")


@pytest.mark.parametrize(
    "spec, said",
    [
        (rlalign.LogprobSpec(temperature=0.7, processed=False), "raw against processed logprobs"),
        (rlalign.LogprobSpec(temperature=0.7), r"another temperature: tokens are sampled at 0\.7, .* by 1;"),
        (rlalign.LogprobSpec(top_p=0.9), r"truncated sampling \(top_p=0\.9"),
    ],
)
def test_numbers_that_cannot_be_compared_are_refused_before_the_first_step(spec, said):
    with pytest.raises(ValueError, match=said):
        rlalign.Monitor(spec=spec, temperature=1.0)


def engine(head_dtype):
    return SimpleNamespace(head_dtype=head_dtype, mode="cached", require_sound=lambda: None)


def test_a_head_on_one_side_is_refused():
    mirrored = SimpleNamespace(head_dtype="float32")
    with pytest.raises(
        RuntimeError, match="one side only: the engine runs float32 .*, the trainer the model's own. Mirror it"
    ):
        rlalign.Monitor(engine("float32"))
    with pytest.raises(RuntimeError, match="one side only: the trainer is mirrored .*RLALIGN_HEAD=float32, or restore"):
        require_same_head(engine("model"), mirrored)
    with pytest.raises(RuntimeError, match="the engine runs master .*, the trainer float32"):
        require_same_head(engine("master"), mirrored)
    require_same_head(engine("float32"), mirrored)
    require_same_head(engine("model"), None)


def test_the_monitor_gives_what_compare_gives_to_whatever_logs():
    old, rollout, mask = batch(0.1)
    seen, scalars = [], []
    monitor = rlalign.Monitor(log=lambda metrics, step: seen.append((step, metrics)))
    found = monitor.step(3, old.double(), rollout.half().float(), mask.long())
    expected = rlalign.compare(
        old, rollout.half().float(), mask, lag_B=torch.zeros(4, dtype=torch.int64), positions=False
    )
    assert {k.removeprefix("mismatch/"): v for k, v in found.items()} == pytest.approx(expected, nan_ok=True)
    assert seen == [(3, found)]
    write(SimpleNamespace(add_scalar=lambda *row: scalars.append(row)), {"a": 1.0}, 2)
    write(SimpleNamespace(log=lambda metrics, step: scalars.append((metrics, step))), {"a": 1.0}, 2)
    assert scalars == [("a", 1.0, 2), ({"a": 1.0}, 2)]
    with pytest.raises(ValueError, match="Monitor: int logs nothing"):
        write(3, {}, 0)
    with pytest.raises(ValueError, match="a mask holds True and False, or 0 and 1; got values such as 7"):
        monitor.step(4, old, rollout, mask.long() * 7)


def test_staleness_is_never_called_engine_mismatch():
    old, rollout, mask = batch(0.5)
    quiet = rlalign.Monitor(stop=True)
    for step in range(8):
        found = quiet.step(step, old, rollout, mask, lag=2)
    assert "mismatch/lag0/k3" not in found and found["mismatch/lag2/k3"] > 1e-2
    loud, told = rlalign.Monitor(stop=True, say=lambda text: told.append(text)), []
    with pytest.raises(RuntimeError, match=r"mismatch/lag0/k3 = .* over 0\.01"):
        for step in range(8):
            loud.step(step, old, rollout, mask)
    assert told and "Confirm:" in told[0]


def test_tokens_are_read_back_by_the_mismatch_report(tmp_path):
    from rlalign.diagnose.offline import analyse

    ids = torch.arange(4 * 32).view(4, 32)
    for step in range(2):
        old, rollout, mask = batch(0.1, seed=step)
        numbers = {"rollout_logprobs_BL": rollout, "old_logprobs_BL": old, "mask_BL": mask}
        rlalign.write_tokens(
            tmp_path, step, token_ids_BL=ids, **numbers, policy_version=step, trainer_version=step, reward_B=[0.0, 1.0, 0.5, 1.0]
        )  # fmt: skip
    old, rollout, mask = (torch.cat(pair) for pair in zip(batch(0.1, 0), batch(0.1, 1), strict=True))
    expected = rlalign.compare(old, rollout, mask)
    found = analyse(tmp_path / "tokens").overall
    assert found["tokens"] == expected["tokens"]
    assert math.isclose(found["k3"], expected["k3"], rel_tol=1e-6)
    with pytest.raises(ValueError, match=r"old_logprobs_BL is \(4, 31\), token_ids_BL \(4, 32\)"):
        rlalign.write_tokens(tmp_path, 9, token_ids_BL=ids, **(numbers | {"old_logprobs_BL": old[:4, 1:]}))


class Tokenizer:
    def save_pretrained(self, folder):
        (folder / "tokenizer.json").write_text("{}")


def test_a_step_kept_whole_is_read_back_bit_for_bit(tmp_path):
    """Tokens, both sides' logprobs, convention and weights, the latter as the engine holds them."""
    from rlalign.diagnose.attribution.sources import of_run
    from rlalign.diagnose.replay import replay
    from rlalign.tracking.token_files import read_step
    from tests.test_live_mirror import qwen

    ids = torch.arange(4 * 32).view(4, 32) % 96
    old, rollout, mask = batch(0.1)
    mask[:, :3] = False
    numbers = {"token_ids_BL": ids, "rollout_logprobs_BL": rollout, "old_logprobs_BL": old, "mask_BL": mask}
    numbers |= {"policy_version": 5, "trainer_version": 5, "group_B": [0, 0, 1, 1]}
    rlalign.write_tokens(tmp_path, 4, **numbers)
    for read, missing in (
        (
            lambda: of_run(tmp_path, 4, 2048),
            "not the prompts before them and not the weights.*monitor, tokenizer and att",
        ),
        (lambda: replay(tmp_path, 4), "written by rlalign.write_tokens .* neither that loop's seeds nor its forward"),
    ):
        with pytest.raises(ValueError, match=missing):
            read()
    model = qwen(torch.float32)
    side = SimpleNamespace(head_dtype="float32", mode="cached", require_sound=lambda: None, body_dtype=torch.bfloat16)
    with rlalign.mirror(model) as mirrored:
        spec = rlalign.LogprobSpec(temperature=0.7, head_dtype="float32")
        monitor = rlalign.Monitor(side, mirrored, spec=spec)
        whole = {"monitor": monitor, "tokenizer": Tokenizer(), "attention_mask_BL": torch.ones(4, 32)}
        rlalign.write_tokens(tmp_path, 5, **numbers, **whole)
        with pytest.raises(ValueError, match="missing: tokenizer, attention_mask_BL"):
            rlalign.write_tokens(tmp_path, 6, **numbers, monitor=monitor)
        with pytest.raises(ValueError, match="missing: the monitor's engine, the monitor's mirror, the monitor's spec"):
            rlalign.write_tokens(tmp_path, 6, **numbers, **(whole | {"monitor": rlalign.Monitor()}))
    saved = read_step(tmp_path, 5)
    assert torch.equal(saved.old_logprobs_BL, old) and torch.equal(saved.batch.token_ids_BL, ids)
    assert torch.equal(saved.batch.rollout_logprobs_BL[mask], rollout[mask]) and saved.batch.spec == spec
    assert set(saved.batch.policy_version_BL[mask].tolist()) == {5} and saved.version == 5
    source = of_run(tmp_path, None, 2048)
    assert source.config.rollout.temperature == 0.7 and source.config.model.dtype.value == "bfloat16"
    loaded = type(model).from_pretrained(source.model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.bfloat16()), name
