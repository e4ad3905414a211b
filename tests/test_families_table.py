"""The matrix as data: what ships, what doctor says of it, how it is shown."""

import pytest

from rlalign.diagnose.doctor.examine import TABLE, judged_family, of_latent_norms
from rlalign.diagnose.families import family_table
from rlalign.diagnose.families.family_table import FAILED, OK, Cell


def test_the_table_that_ships_is_about_the_recipes():
    table = family_table.read(TABLE)
    assert table and table.keys() <= family_table.RECIPES.keys()
    assert all(
        set(cells) <= set(family_table.COLUMNS) and {"head", "bfloat16"} <= set(cells) for cells in table.values()
    )


def test_doctor_shows_the_row_of_the_model_and_calls_nothing_sound_that_was_not():
    table = {
        "qwen3-moe": {"load": Cell(OK), "publish": Cell(OK, "6e-06; 4 packed")},
        "gpt2": {"train": Cell(FAILED, "why")},
    }
    sound = judged_family("qwen3_moe", table)
    assert sound.state == "ok" and "qwen3-moe on a tiny model: load, publish 6e-06" in sound.found
    unsound = judged_family("gpt2", table)
    assert (
        unsound.state == "unknown"
        and "train: failed, why" in unsound.found
        and unsound.remedy == "rlalign families gpt2"
    )
    unknown = judged_family("llama", table)
    assert unknown.state == "unknown" and "no tiny model of it was measured" in unknown.found


def test_doctor_names_an_epsilon_that_vllm_reads_and_transformers_does_not():
    (other,) = of_latent_norms({"model_type": "minicpm3", "rms_norm_eps": 1e-5})
    assert other.state == "problem" and "rms_norm_eps=1e-05, transformers with 1e-06" in other.found and other.remedy
    assert [c.state for c in of_latent_norms({"model_type": "minicpm3"})] == ["problem"]
    assert [c.state for c in of_latent_norms({"model_type": "minicpm3", "rms_norm_eps": 1e-6})] == ["ok"]
    assert not list(of_latent_norms({"model_type": "llama", "rms_norm_eps": 1e-5}))


def test_a_reason_is_given_once_below_the_table():
    shown = family_table.as_markdown(
        {"a": {"load": Cell(FAILED, "no")}, "b": {"load": Cell(FAILED, "no"), "score": Cell(OK, "1e-06")}}
    )
    assert shown.splitlines() == [
        "| family | load | score |", "|---|---|---|", "| a | **failed** (1) | - |", "| b | **failed** (1) | 1e-06 |", "", "1. no",
    ]  # fmt: skip


def test_a_table_survives_its_file(tmp_path):
    table = {"a": {"load": Cell(OK, "x"), "score": Cell(FAILED, "y")}}
    family_table.write(table, tmp_path / "table.json")
    assert family_table.read(tmp_path / "table.json") == table and family_table.read(tmp_path / "none.json") == {}


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="no family is called lama; there are llama"):
        family_table.named(["lama"])
