"""The command line: exit codes, one readable line for bad input, and nothing done half."""

import json
import math
import random

import pytest

from rlalign import cli


def scores(path, *, rows=600, key="logit"):
    generator = random.Random(0)
    lines = []
    for _ in range(rows):
        logit = generator.gauss(0, 2)
        label = int(generator.random() < 1 / (1 + math.exp(-0.5 * (logit - 1))))
        lines.append(json.dumps({key: logit, "label": label}))
    path.write_text("\n".join(lines))
    return path


def test_calibrate_fits_writes_and_judges(tmp_path, capsys):
    file, out = scores(tmp_path / "scores.jsonl"), tmp_path / "platt.json"
    assert cli.main(["calibrate", "--scores", str(file), "--out", str(out), "--model", "org/rm"]) == 0
    printed = capsys.readouterr().out
    scale = float(printed.split("scale: ")[1].split()[0])
    assert scale == pytest.approx(0.5, abs=0.1)
    assert cli.main(["calibrate", "report", str(out), "--scores", str(file), "--model", "org/rm"]) == 0
    assert cli.main(["calibrate", "report", str(out), "--scores", str(file), "--model", "org/other"]) == 1
    assert "org/other" in capsys.readouterr().err


def test_calibrate_refuses_what_it_cannot_fit(tmp_path, capsys):
    file = scores(tmp_path / "scores.jsonl", key="score")
    assert cli.main(["calibrate", "--scores", str(file), "--out", str(tmp_path / "c.json")]) == 2
    assert "scores.jsonl:1: fields ['label', 'score']" in capsys.readouterr().err
    assert not (tmp_path / "c.json").exists()
    assert cli.main(["calibrate", "--out", str(tmp_path / "c.json")]) == 2
    assert cli.main(["calibrate", "compare", "x"]) == 2
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("\n".join(json.dumps({"chosen": i + 0.5, "rejected": i % 3}) for i in range(60)))
    assert (
        cli.main(["calibrate", "--scores", str(pairs), "--method", "isotonic", "--out", str(tmp_path / "c.json")]) == 2
    )


def test_mismatch_of_a_dump_and_its_limit(tmp_path, capsys):
    dump = tmp_path / "dump.jsonl"
    row = {"old_logprobs": [-1.0, -2.0], "rollout_logprobs": [-1.1, -1.9], "loss_mask": [True, True]}
    dump.write_text("\n".join(json.dumps(row) for _ in range(4)))
    assert cli.main(["mismatch", str(dump), "--json", str(tmp_path / "m.json")]) == 0
    k3 = (math.expm1(0.1) - 0.1 + math.expm1(-0.1) + 0.1) / 2
    assert json.loads((tmp_path / "m.json").read_text())["overall"]["k3"] == pytest.approx(k3, rel=1e-6)
    assert cli.main(["mismatch", str(dump), "--k3-limit", "1e-6"]) == 1
    assert cli.main(["mismatch", str(tmp_path / "none.parquet")]) == 2
    assert "no such file" in capsys.readouterr().err


def test_reports_of_folders_that_are_no_run_are_one_line(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("rlalign: ") and error.count("\n") == 1


def test_unknown_configurations_are_one_line(capsys):
    assert cli.main(["train", "--config-name", "nope"]) == 2
    assert cli.main(["train", "algo.lrr=1"]) == 2
    assert capsys.readouterr().err.count("\n") == 2


def test_the_word_that_deepspeeds_launcher_adds_is_not_taken_for_the_users(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["rlalign", "--local_rank=1", "report", str(tmp_path)])
    assert cli.main() == 2
    assert "unrecognized" not in (error := capsys.readouterr().err) and str(tmp_path) in error
    assert cli.own_arguments(["--local_rank=1", "--config-name", "demo", "algo.steps=3"]) == [
        "--config-name",
        "demo",
        "algo.steps=3",
    ]


def test_overrides_may_stand_between_the_options():
    words = ["parity", "a=1", "--body", "float32", "b=2", "--json", "x.json", "c=3"]
    found = cli.parsed(words)
    assert found.overrides == ["a=1", "b=2", "c=3"] and (found.body, str(found.json)) == (["float32"], "x.json")
    for wrong in (
        ["parity", "a=1", "--no-such", "b=2"],
        ["parity", "a=1", "--body", "float32", "word"],
        ["report", "x", "--out", "y", "z"],
    ):
        with pytest.raises(SystemExit):
            cli.parsed([*wrong, "--no-such"] if wrong[0] == "report" else wrong)


@pytest.mark.parametrize(
    "word", ["+rollout.temprature=0.5", "+rollout.logit_bias={40:5}", "+nonsense=1", "++rollout.x=1"]
)
def test_a_key_that_is_added_and_unknown_is_refused(word, capsys):
    assert cli.main(["doctor", word]) == 2
    assert "not in 'R" in capsys.readouterr().err


def test_a_tasks_own_parameters_can_be_added():
    from rlalign.config import compose, load

    assert load(compose("demo", ["+task.params.match=numeric"])).task.params["match"] == "numeric"
