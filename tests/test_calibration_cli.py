"""`rlalign calibrate`: honest numbers, a file only when it helps, and errors that name the line."""

import json

import numpy as np
import pytest
from scipy.special import expit

from rlalign.calibration.calibrators import Calibrator, ModelIdentity, PlattCalibrator
from rlalign.calibration.calibrators.cross_fit import cross_fitted, read_score_rows
from rlalign.calibration.metrics import brier_score
from rlalign.commands.calibrate import METHODS, calibrate, report

MODEL = ModelIdentity(id="org/rm", head_dtype="float32")


def write(path, records):
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n")
    return path


def binary(path, n=300, seed=0, scale=0.5, extra=lambda i: {}):
    random = np.random.default_rng(seed)
    x = random.normal(2, 3, n)
    y = random.random(n) < expit(scale * (x - 2))
    return write(
        path, [{"logit": float(a), "label": int(b), **extra(i)} for i, (a, b) in enumerate(zip(x, y, strict=True))]
    )


@pytest.mark.parametrize("method", METHODS)
def test_fit_and_report(tmp_path, capsys, method):
    scores, out = binary(tmp_path / "s.jsonl"), tmp_path / "out" / "c.json"
    plot, numbers = tmp_path / "p.png", tmp_path / "q.json"
    assert calibrate(scores, method=method, out=out, plot=plot, json_path=numbers, model=MODEL) == 0
    said = capsys.readouterr().out
    loaded = Calibrator.load(out, expect_model=MODEL)
    assert loaded.calibration_id in said and "cross-fitted" in said
    assert plot.read_bytes().startswith(b"\x89PNG")
    quality = json.loads(numbers.read_text())["quality"]
    rows = read_score_rows(scores)
    assert quality["after"]["brier"]["value"] == pytest.approx(
        brier_score(loaded.probabilities(rows.logits), rows.labels_N)
    )
    if method != "identity":
        assert quality["cross-fitted"]["brier"]["value"] < quality["before"]["brier"]["value"]
    assert report(out, model=MODEL) == 0
    fresh = binary(tmp_path / "fresh.jsonl", seed=1)
    assert report(out, scores_file=fresh, plot=tmp_path / "r.svg") == (
        1 if method in ("identity", "temperature") else 0
    )


def test_report_sees_a_domain_that_moved(tmp_path, capsys):
    calibrate(binary(tmp_path / "s.jsonl"), method="platt", out=tmp_path / "c.json", model=MODEL)
    moved = binary(tmp_path / "moved.jsonl", seed=1, scale=-0.2)
    assert report(tmp_path / "c.json", scores_file=moved) == 1
    assert "not calibrated on these rows" in capsys.readouterr().out


def test_cross_fitting_never_sees_its_own_row(tmp_path):
    """A row with an absurd label moves every fold's fit but the one that judges it."""
    rows = read_score_rows(binary(tmp_path / "s.jsonl", n=60))
    flipped = rows.rows(np.arange(60))
    at = int(np.argmax(rows.logits))
    flipped.labels_N[at] = 1 - flipped.labels_N[at]
    groups = np.arange(60)
    fields = {"shape": "binary", "logits": rows.logits, "weight_N": None, "group_N": groups}
    one = cross_fitted(PlattCalibrator, type(rows)(labels_N=rows.labels_N, **fields))
    two = cross_fitted(PlattCalibrator, type(rows)(labels_N=flipped.labels_N, **fields))
    assert one[at] == two[at]
    assert (one != two).sum() >= 40


def test_groups_stay_in_one_fold(tmp_path):
    """Copies of a row in one group are judged by one fit; without groups they meet several, and help to judge another."""
    random = np.random.default_rng(0)
    records = []
    for group in range(60):
        logit = float(random.normal())
        label = int(random.random() < expit(1.5 * logit))
        records += [{"logit": logit, "label": label, "group": group}] * 8
    grouped = read_score_rows(write(tmp_path / "a.jsonl", records))
    loose = read_score_rows(write(tmp_path / "b.jsonl", [{k: r[k] for k in ("logit", "label")} for r in records]))
    held = [cross_fitted(METHODS["isotonic"], rows).reshape(60, 8) for rows in (grouped, loose)]
    assert (np.ptp(held[0], axis=1) == 0).all() and (np.ptp(held[1], axis=1) > 0).mean() > 0.5
    scores = [brier_score(p.ravel(), grouped.labels_N) for p in held]
    assert scores[0] > scores[1]


def test_a_calibration_that_does_harm_is_not_written(tmp_path, capsys):
    random = np.random.default_rng(0)
    x = random.normal(0, 1, 60)
    y = random.random(60) < expit(x)  # calibrated already, and few: any fit is noise
    scores = write(tmp_path / "s.jsonl", [{"logit": float(a), "label": int(b)} for a, b in zip(x, y, strict=True)])
    assert calibrate(scores, method="isotonic", out=tmp_path / "c.json") == 1
    assert not (tmp_path / "c.json").exists()
    assert "does harm" in capsys.readouterr().out


def test_pairs_and_classes(tmp_path, capsys):
    random = np.random.default_rng(0)
    chosen, rejected = random.normal(1, 2, 200), random.normal(0, 2, 200)
    pairs = [
        {"chosen": float(a), "rejected": float(b), "group": i // 2}
        for i, (a, b) in enumerate(zip(chosen, rejected, strict=True))
    ]
    assert calibrate(write(tmp_path / "p.jsonl", pairs), method="platt", out=tmp_path / "p.json") == 0
    assert "bound to no model" in capsys.readouterr().out
    want = PlattCalibrator().fit_pairs(chosen, rejected)
    assert Calibrator.load(tmp_path / "p.json").calibration_id == want.calibration_id
    x = random.normal(0, 3, (200, 3))
    y = (x / 3 + random.gumbel(size=x.shape)).argmax(1)
    classes = [{"logits": a.tolist(), "label": int(b), "weight": 2.0} for a, b in zip(x, y, strict=True)]
    scores = write(tmp_path / "k.jsonl", classes)
    assert calibrate(scores, method="temperature", out=tmp_path / "k.json", model=MODEL) == 0
    assert report(tmp_path / "k.json", scores_file=scores, json_path=tmp_path / "k.q.json") == 0
    assert json.loads((tmp_path / "k.q.json").read_text())["quality"]["raw"]["auroc"] is None
    with pytest.raises(ValueError, match="fitted on 3 logits per row"):
        report(tmp_path / "k.json", scores_file=binary(tmp_path / "s.jsonl", n=60))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty; expected one JSON object per line"),
        ("{", "s.jsonl:1: not JSON"),
        ("[1]", "s.jsonl:1: expected a JSON object, got list"),
        ('{"score": 1, "label": 1}', "s.jsonl:1: fields \\['label', 'score'\\]; expected one of"),
        ('{"logit": 1, "label": 1}\n\n{"logit": 1}', "s.jsonl:3: fields \\['logit'\\], but .*s.jsonl:1 has"),
        ('{"logit": NaN, "label": 1}', "logits: 1 of 1 entries are not finite"),
        ('{"logit": "1", "label": 1}', "logits: expected real numbers"),
        ('{"logits": [1, 2], "label": 1}\n{"logits": [1], "label": 0}', "different lengths"),
    ],
)
def test_bad_files(tmp_path, text, message):
    (tmp_path / "s.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        calibrate(tmp_path / "s.jsonl", method="platt", out=tmp_path / "c.json")


def test_a_line_ends_at_a_line_break_and_nowhere_else(tmp_path):
    rows = [{"logit": float(i % 7), "label": i % 2, "group": f"a\u2028b\x85{i // 2}"} for i in range(8)]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "s.jsonl").write_text(text, encoding="utf-8")
    assert read_score_rows(tmp_path / "s.jsonl").group_N.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_bad_arguments(tmp_path):
    scores = binary(tmp_path / "s.jsonl", n=60)
    with pytest.raises(
        ValueError, match="method: expected one of platt, temperature, isotonic, beta, identity, got 'ats'"
    ):
        calibrate(scores, method="ats", out=tmp_path / "c.json")
    with pytest.raises(ValueError, match="folds: expected a whole number of at least 2"):
        calibrate(scores, method="platt", out=tmp_path / "c.json", folds=1)
    with pytest.raises(ValueError, match="no such file"):
        calibrate(tmp_path / "absent.jsonl", method="platt", out=tmp_path / "c.json")
    one_label = write(tmp_path / "one.jsonl", [{"logit": float(i - 8), "label": int(i == 9)} for i in range(10)])
    with pytest.raises(ValueError, match="without fold \\d of 5: .*use fewer folds"):
        calibrate(one_label, method="temperature", out=tmp_path / "c.json")
    calibrate(scores, method="platt", out=tmp_path / "c.json")
    with pytest.raises(ValueError, match="needs --scores"):
        report(tmp_path / "c.json", plot=tmp_path / "p.png")


def test_soft_labels_are_rates(tmp_path, capsys):
    random = np.random.default_rng(0)
    x = random.normal(2, 3, 300)
    y = np.clip(expit(0.5 * (x - 2)) + random.normal(0, 0.05, 300), 0, 1)
    scores = write(tmp_path / "s.jsonl", [{"logit": float(a), "label": float(b)} for a, b in zip(x, y, strict=True)])
    out = tmp_path / "c.json"
    with pytest.raises(ValueError, match="pass soft_labels=True"):
        calibrate(scores, method="platt", out=out, model=MODEL)
    assert calibrate(scores, method="platt", out=out, plot=tmp_path / "p.png", model=MODEL, soft_labels=True) == 0
    wanted = PlattCalibrator().fit(x, y, soft_labels=True)
    np.testing.assert_allclose(Calibrator.load(out).transform(x), wanted.transform(x), rtol=1e-9)


def test_scores_that_fall_with_success_can_be_asked_for(tmp_path):
    scores = binary(tmp_path / "s.jsonl", scale=-0.5)
    with pytest.raises(ValueError, match="allow_negative_scale=True"):
        calibrate(scores, method="platt", out=tmp_path / "c.json", model=MODEL)
    assert calibrate(scores, method="platt", out=tmp_path / "c.json", model=MODEL, allow_negative_scale=True) == 0
    assert Calibrator.load(tmp_path / "c.json").scale_ < 0
    with pytest.raises(ValueError, match="an option of platt"):
        calibrate(scores, method="beta", out=tmp_path / "d.json", model=MODEL, allow_negative_scale=True)
