"""The report's sections on causes, corrections, alerts, time and attribution show what was logged, and only that."""

import json
import re
from pathlib import Path

import pytest

from rlalign.report import write_report
from rlalign.report.plots import POINTS
from rlalign.tracking.run_directory import Run
from rlalign.tracking.timeline import Span
from tests.test_report import EVIL, Page, read

ROUTE = {
    "first_over_floor": None,
    "logprob_share": {"embed": 0.1, "layers.0.attn_out": 0.9},
    "delta_logp": {"abs_mean": 2e-3},
}
HEAT = {"embed": [0.0, None, 1e-3], "layers.0.residual": [1e-3, 2e-3, 3e-3], "logprobs": [None, None, 4e-3]}
ATTRIBUTION = {
    "layers": 1,
    "length": 3,
    "sequences": 2,
    "scored_tokens": 6,
    "routes": {"prefill": ROUTE | {"heat": HEAT}},
}


def step_row(step: int, *, stale: bool) -> dict[str, float]:
    row = {"mismatch/lag0/k3": 3e-6, "mismatch/excess/k3": 2e-6, "mismatch/nonfinite": 0, "reward/mean": 0.1 * step}
    row |= {"staleness/policy/mean": float(stale), "staleness/policy/max": float(stale), "correction/kept_frac": 1.0}
    row |= {
        "correction/ess": 0.9 if stale else 1.0,
        "rollout/tokens": 100.0,
        "reward/rm/mean": 0.5,
        "reward/verifier/mean": 0.4,
    }
    row |= {
        "correction/changed_share": 0.98,
        "correction/weight_max": 1.5 if stale else 1.0,
    }  # without weights all are changed
    row |= {"time/rollout_s": 0.1, "time/train_s": 0.2, "time/odd_s": 0.3, "time/step_s": 0.6}
    return row | ({"staleness/k3": 5e-5} if stale else {})


def make(directory: Path, *, steps: int = 4, stale: bool = False, asynchronous: bool = False, events=()) -> Path:
    with Run(directory, config={"seed": 1}, wandb_mode="disabled", project="p", name=directory.name) as run:
        for step in range(steps):
            run.log(step, step_row(step, stale=stale))
            at = 100.0 + step
            train = (at + 0.25, at + 0.75) if asynchronous else (at + 0.5, at + 1.0)
            run.log_timeline([Span("rollout", at, at + 0.5, step), Span("train", *train, step)])
        for kind, message in events:
            run.event(kind, message)
        run.finish({})
    return directory


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    root = tmp_path_factory.mktemp("sections")
    fresh, stale = make(root / "fresh"), make(root / "stale", stale=True, asynchronous=True)
    return {
        "fresh": read(write_report([fresh], root / "fresh.html")),
        "stale": read(write_report([stale], root / "stale.html")),
        "both": read(write_report([fresh, stale], root / "both.html")),
    }


def test_the_three_causes_stand_apart_with_their_medians(pages):
    rows = {row[0]: row[1:] for row in pages["stale"].rows if row}
    of = {
        name: next(values for label, values in rows.items() if label.startswith(name))
        for name in ("engine,", "stale", "noise")
    }
    assert of == {"engine,": ["3.00e-6"], "stale": ["5.00e-5"], "noise": ["1.00e-6"]}
    fresh = {row[0]: row[1:] for row in pages["fresh"].rows if row}
    assert next(values for label, values in fresh.items() if label.startswith("stale")) == ["no such token"]


def test_a_quantity_that_did_nothing_has_no_chart(pages):
    assert "Effective sample size, tokens kept" in pages["stale"].text and "Age of the tokens" in pages["stale"].text
    assert (
        "Effective sample size, tokens kept" not in pages["fresh"].text
        and "Age of the tokens" not in pages["fresh"].text
    )
    assert "Effective sample size, tokens kept" in pages["both"].text
    assert "Ratios changed" in pages["stale"].text and "Ratios changed" not in pages["fresh"].text


def test_utilisation_and_its_speed_are_those_of_the_timeline(pages):
    rows = {row[0]: row[1:] for row in pages["both"].rows if row}
    assert rows["rollout engine alone"] == ["50.0%", "26.7%"] and rows["both at once"] == ["0.0%", "26.7%"]
    assert rows["trainer alone"] == ["50.0%", "26.7%"] and rows["nothing that is timed"] == ["0.0%", "20.0%"]
    assert rows["wall time, s"] == ["4.0", "3.8"] and rows["sampled tokens per second of it"] == ["100", "107"]


def test_the_timeline_draws_real_start_times(pages):
    said = re.findall(r"(rollout|train) of step 3: 0\.500 s from (\d\.\d+) s", pages["stale"].text)
    assert said == [("rollout", "3.000"), ("train", "3.250")]
    assert pages["both"].text.count("train of step 3") == 2


def test_phases_nobody_named_are_counted_too(pages):
    assert pages["fresh"].row("odd")[-1] == "50%" and pages["fresh"].row("rollout")[-1] == "17%"


def test_alerts_are_apart_from_other_events_and_the_first_is_a_problem(tmp_path, undrawn):
    events = [("alert/log", "quiet"), ("alert/warn", "k3 rose\nlikely: stale head"), ("checkpoint", "saved " + EVIL)]
    text = write_report([make(tmp_path / "r", events=events)], tmp_path / "r.html").read_text()
    page = Page(text)
    assert "An alert was raised; the first, after step 3: k3 rose" in page.text
    alerts, others = text.split("<h2>Alerts</h2>")[1].split("<h2>Events</h2>")
    assert "likely: stale head" in alerts and "quiet" in alerts and "saved" not in alerts
    assert "saved" in others and "script" not in page.tags


def test_no_alert_is_said(pages):
    assert "No alert." in pages["fresh"].text and "raised" not in pages["fresh"].text


def test_the_heat_map_of_an_attribution_is_in_the_report(tmp_path, undrawn):
    run = make(tmp_path / "r")
    assert "Where the mismatch comes from" not in read(write_report([run], tmp_path / "r.html")).text
    (run / "attribution.json").write_text(json.dumps(ATTRIBUTION))
    page = read(write_report([run], tmp_path / "r.html"))
    assert "prefill: no step is over its noise floor; mean |delta logp| 2.0e-3 nats, 90% of its square" in page.text
    for cell in ("layer 0, 1: 2.0e-03", "embed, 1: no token", "logprobs, 2: 4.0e-03"):
        assert cell in page.text
    over = ATTRIBUTION | {"routes": {EVIL: ROUTE | {"heat": HEAT, "first_over_floor": f"layers.0.{EVIL}"}}}
    (run / "attribution.json").write_text(json.dumps(over))
    page = read(write_report([run], tmp_path / "r.html"))
    assert "differs by itself" in page.text and "script" not in page.tags


@pytest.mark.parametrize("text", ["{", "[]", "{}", json.dumps(ATTRIBUTION | {"routes": {"prefill": {"heat": {}}}})])
def test_a_foreign_attribution_never_costs_the_page(tmp_path, undrawn, text):
    run = make(tmp_path / "r")
    (run / "attribution.json").write_text(text)
    page = read(write_report([run], tmp_path / "r.html"))
    assert "attribution.json cannot be shown" in page.text and "Where the time goes" in page.text


def test_a_run_of_an_older_version_has_its_page(tmp_path, undrawn):
    run = make(tmp_path / "r")
    (run / "timeline.jsonl").unlink()
    page = read(write_report([run], tmp_path / "r.html"))
    assert "Where the time goes" in page.text and "Utilisation" not in page.text and "Timeline" not in page.text


@pytest.mark.slow
def test_a_long_run_says_that_its_charts_are_thinned_and_loses_no_extreme(tmp_path):
    run = make(tmp_path / "r", steps=4 * POINTS)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows[777]["correction/ess"] = 0.25
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = write_report([run], tmp_path / "r.html").read_text()
    assert "Charts draw means of 4 neighbouring steps; the band reaches from the smallest to the largest." in text
    chart = text.split("Effective sample size, tokens kept")[1].split("</figure>")[0]
    assert re.search(r">\s*0\.4\s*<", chart)  # the axis reaches the one low step
    assert len(text) < 700_000
