"""rlalign parity on real engines: the table is complete, the float32 pair is the closest, and the limit decides the exit."""

import json

import pytest

from rlalign import cli
from rlalign.diagnose import noise_floor
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
        assert set(sources) == {"repeat", "batch_of_one", "decode", "prefix_cache", "chunked_prefill", "floor"}
        assert sources["repeat"]["abs_max"] == 0.0, "the same batch twice gave other numbers"
        assert noise_floor.read(file, body) == sources["floor"]
    with pytest.raises(ValueError, match="holds no noise floor for a float16 body"):
        noise_floor.read(file, "float16")


def test_over_the_limit_exits_1_and_says_which_pair(untied, capsys):
    options = [f"model.path={untied}", "rollout.group_size=2"]
    assert cli.main(["parity", "--prompts", "2", "--body", "bfloat16", "--k3-limit", "1e-12", *options]) == 1
    assert "bfloat16 body, float32 heads on both sides: k3 =" in capsys.readouterr().err
