"""rlalign parity on real engines: the table is complete, the float32 pair is the closest, and limits decide the exit."""

import json

import pytest

from rlalign import cli
from rlalign.rollout.engine import noise_floor
from tests.engine.conftest import build_model


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parity")
    model = build_model(folder / "model", tied=False, logit_scale=12.0)
    file = folder / "parity.json"
    options = [f"model.path={model}", "rollout.group_size=4", "rollout.max_tokens=24"]
    code = cli.main(["parity", "--prompts", "4", "--noise-floor", "--json", str(file), *options])
    return code, json.loads(file.read_text()), file


def pick(rows, body, rollout, trainer):
    (row,) = [r for r in rows if (r["body_dtype"], r["rollout_head"], r["trainer_head"]) == (body, rollout, trainer)]
    return row


def test_the_table_has_every_pair_and_every_number(measured):
    _, result, _ = measured
    keys = {"body_dtype", "rollout_head", "trainer_head", "k1", "k3", "abs_mean", "p99", "abs_max", "pearson"}
    measured = {"floor_k3", "floor_abs_mean", "rounding_k3", "rounding_abs_mean", "rollout_rounding_abs_mean"}
    assert all(measured <= row.keys() for row in result["rows"])
    for rows in (result["rows"], result["head_isolated"]):
        assert len(rows) == 8 and all(keys <= row.keys() for row in rows)
        assert len({(r["body_dtype"], r["rollout_head"], r["trainer_head"]) for r in rows}) == 8


def test_the_float32_body_agrees_to_a_billionth(measured):
    code, result, _ = measured
    assert code == 0
    assert pick(result["rows"], "float32", "float32", "float32")["k3"] < 1e-9


def test_in_isolation_float32_on_both_sides_is_exact_and_on_one_side_is_not(measured):
    _, result, _ = measured
    rows = result["head_isolated"]
    both = pick(rows, "bfloat16", "float32", "float32")
    assert both["k3"] == 0.0 and both["abs_max"] == 0.0
    for rollout, trainer in (("float32", "model"), ("model", "float32")):
        one = pick(rows, "bfloat16", rollout, trainer)
        assert one["abs_mean"] > 1e-4 and one["abs_mean"] > 100 * both["abs_mean"]
    assert both["rollout_error"] < 1e-3 * pick(rows, "bfloat16", "model", "model")["rollout_error"]


def test_the_noise_floor_covers_every_source_and_reads_back(measured):
    _, result, file = measured
    for body, sources in result["noise_floor"].items():
        trainers = {"trainer_batch_of_one", "trainer_padding", "trainer_tiles", "trainer_update"}
        engines = {"repeat", "batch_of_one", "decode", "prefix_cache", "chunked_prefill"}
        assert set(sources) == engines | trainers | {"floor"}
        worst = [
            max(abs(sources[n]["abs_max"]) for n in names if sources[n] is not None) for names in (engines, trainers)
        ]
        assert sources["floor"]["abs_max"] == sum(worst)
        assert sources["repeat"]["abs_max"] == 0.0, "the same batch twice gave other numbers"
        assert noise_floor.read(file, body) == sources["floor"]
    with pytest.raises(ValueError, match="holds no noise floor for a float16 body"):
        noise_floor.read(file, "float16")


def test_over_the_limit_exits_1_and_says_which_pair(untied, capsys):
    options = [f"model.path={untied}", "rollout.group_size=2"]
    assert cli.main(["parity", "--prompts", "2", "--body", "bfloat16", "--k3-limit", "1e-12", *options]) == 1
    assert (
        "bfloat16 body, TP 1, prefill, temperature 1, heads float32 (cached) / float32: k3 =" in capsys.readouterr().err
    )


@pytest.mark.parametrize("side", ["rollout", "trainer"])
def test_a_head_of_another_dtype_on_one_side_is_named_though_the_body_hides_it(untied, monkeypatch, capsys, side):
    from rlalign.rollout.engine.embedded import VLLMEngine
    from rlalign.trainer import head_mirror

    if side == "rollout":
        real = VLLMEngine.set_head
        monkeypatch.setattr(VLLMEngine, "set_head", lambda self, mode: real(self, "off"))
    else:
        real_mirror = head_mirror.mirror
        monkeypatch.setattr(
            head_mirror, "mirror", lambda network, **kind: real_mirror(network, **kind | {"head_dtype": "model"})
        )
    options = [f"model.path={untied}", "rollout.group_size=4", "rollout.max_tokens=24", "--k3-limit", "1"]
    assert cli.main(["parity", "--prompts", "4", "--body", "bfloat16", *options]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rlalign: head in isolation")]
    assert len(lines) == 1 and "heads float32 (cached) / float32" in lines[0] and f"the {side}'s head is" in lines[0]
    assert cli.main(["parity", "--prompts", "4", "--body", "bfloat16", *options, "--head-limit", "1"]) == 0


def test_what_no_rounding_explains_is_over_the_limit_and_named(untied, monkeypatch, capsys):
    """A trainer that answers at another temperature than it was asked."""
    from rlalign.diagnose.parity import measuring

    real = measuring.head_logprobs
    monkeypatch.setattr(measuring, "head_logprobs", lambda *a, **k: real(*a, **k | {"temperature": 1.1}))
    options = [f"model.path={untied}", "rollout.group_size=4", "rollout.max_tokens=24"]
    assert cli.main(["parity", "--prompts", "4", "--body", "bfloat16", *options]) == 1
    assert "is more than rounding explains" in capsys.readouterr().err


@pytest.fixture(scope="module")
def varied(tmp_path_factory, untied):
    """Every mode, another temperature, small batches and a long context, on prompts of a file."""
    folder = tmp_path_factory.mktemp("varied")
    prompts, file = folder / "prompts.txt", folder / "parity.json"
    prompts.write_text("12 + 34 =\n7 + 8 =\n\n99 + 1 =\n5 + 6 =\n")
    options = [
        "--prompt-file",
        str(prompts),
        "--prompts",
        "4",
        "--body",
        "bfloat16",
        "--mode",
        "native",
        "--mode",
        "master",
    ]
    options += ["--temperature", "0.6", "--temperature", "1", "--batch", "2", "--context", "120", "--json", str(file)]
    rollout = ["rollout.group_size=4", "rollout.max_tokens=24"]
    assert cli.main(["parity", *options, f"model.path={untied}", *rollout]) == 0
    return (
        json.loads(file.read_text()),
        file,
        options[: -len(["--json", str(file)])],
        [f"model.path={untied}", *rollout],
    )


def test_the_master_head_is_exact_on_both_sides_and_not_on_one(varied):
    rows = varied[0]["head_isolated"]
    both = pick(rows, "bfloat16", "master", "master")
    (one,) = [r for r in rows if r["mode"] == "cached" and r["trainer_head"] == "master"]
    assert both["abs_mean"] < 1e-6 and one["abs_mean"] > 100 * both["abs_mean"]
    assert len(varied[0]["rows"]) == 4 * 3, "four rollout heads against three trainer heads"


def test_every_setting_is_as_close_as_teacher_forcing_and_has_its_floor(varied):
    result = varied[0]
    settings = {(r["path"], r["temperature"], r["batch"], r["context"]) for r in result["settings"]}
    assert settings == {
        ("decode", 0.6, 0, 0), ("decode", 1.0, 0, 0), ("prefill", 1.0, 2, 0), ("decode", 1.0, 2, 0),
        ("prefill", 1.0, 0, 120), ("decode", 1.0, 0, 120),
    }  # fmt: skip
    assert len(result["settings"]) == len(settings) * 4
    for row in result["settings"]:
        assert row["k3"] < 1e-3 and 0.0 <= row["floor_k3"] < 1e-3 and row["tokens"] > 8


def test_a_trainer_at_another_temperature_would_show(varied, untied, monkeypatch):
    """The row at 0.6 really samples at 0.6: a trainer that ignores it is far away."""
    from rlalign.diagnose.parity import measuring

    real = measuring.head_logprobs
    monkeypatch.setattr(measuring, "head_logprobs", lambda *a, **k: real(*a, **k | {"temperature": 1.0}))
    options = ["--body", "bfloat16", "--temperature", "0.6", "--prompts", "4", "rollout.group_size=4"]
    assert cli.main(["parity", *options, f"model.path={untied}", "rollout.max_tokens=24"]) == 1


def test_a_baseline_passes_what_is_equal_and_fails_what_got_worse(varied, tmp_path, capsys):
    result, _, options, overrides = varied
    for row in result["settings"]:
        row["abs_mean"] /= 10
    better = tmp_path / "better.json"
    better.write_text(json.dumps(result))
    assert cli.main(["parity", *options, "--baseline", str(better), *overrides]) == 1
    error = capsys.readouterr().err
    assert "whole model, bfloat16 body, TP 1, decode, temperature 0.6, heads master / master: mean |log_ratio|" in error
    assert len([line for line in error.splitlines() if "was " in line]) == len(result["settings"]), (
        "the pairs are as before"
    )
