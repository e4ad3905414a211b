"""The clock's spans survive the file, and utilisation is what counting milliseconds says."""

import json
import time
from dataclasses import astuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlalign.tracking.record import read_run
from rlalign.tracking.run_directory import Run
from rlalign.tracking.timeline import RESUMED, Clock, Span, encode, merged, processes, read_timeline, utilisation

PHASES = ("rollout", "eval", "reward", "score", "train", "wait", "publish")
MS = 1e-3


def span(phase: str, start: int, length: int, step: int = 0) -> Span:
    return Span(phase, start * MS, (start + length) * MS, step)


@given(st.lists(st.tuples(st.sampled_from(PHASES), st.integers(0, 60), st.integers(0, 20)), min_size=1, max_size=25))
def test_utilisation_is_the_count_of_milliseconds(given_spans):
    spans = sorted((span(*each) for each in given_spans), key=lambda s: s.start)
    first = min(start for _, start, _ in given_spans)
    last = max(start + length for _, start, length in given_spans)
    at = [{phase for phase, start, length in given_spans if start <= ms < start + length} for ms in range(first, last)]
    found = utilisation(spans)
    if not at:
        assert found is None
        return
    generating, training = ([bool(phases & set(kinds)) for phases in at] for kinds in (PHASES[:2], PHASES[3:5]))
    busy = [bool(phases - {"wait"}) for phases in at]
    counted = {
        "generating": [g and not t for g, t in zip(generating, training, strict=True)],
        "training": [t and not g for g, t in zip(generating, training, strict=True)],
        "both": [g and t for g, t in zip(generating, training, strict=True)],
        "other": [b and not g and not t for b, g, t in zip(busy, generating, training, strict=True)],
        "idle": [not b for b in busy],
    }
    assert found.wall_s == pytest.approx(len(at) * MS)
    for name, hits in counted.items():
        assert getattr(found, name) == pytest.approx(sum(hits) / len(at), abs=1e-9), name


def test_the_hours_between_two_processes_are_nobodys_idle_time():
    spans = [span("rollout", 0, 10), span("train", 10, 10), span(RESUMED, 3_600_000, 0), span("rollout", 3_600_000, 20)]
    found = utilisation(spans)
    assert found.wall_s == pytest.approx(40 * MS) and found.idle == 0.0
    assert (found.generating, found.training) == (pytest.approx(0.75), pytest.approx(0.25))
    assert [len(part) for part in processes(spans)] == [2, 1]
    assert utilisation([span(RESUMED, 0, 0)]) is None


def test_what_waits_for_samples_and_what_makes_them_is_one_bar():
    parts = [span("rollout", 0, 10, 1), span("rollout", 4, 9, 1), span("rollout", 5, 5, 2), span("rollout", 20, 1, 1)]
    assert merged(parts) == [span("rollout", 0, 13, 1), span("rollout", 5, 5, 2), span("rollout", 20, 1, 1)]


def test_the_clock_writes_metrics_and_spans_and_nothing_for_a_phase_that_failed():
    metrics, spans, before = {}, [], time.time()
    clock = Clock(7, metrics, spans)
    with clock("score"):
        time.sleep(0.002)
    with pytest.raises(RuntimeError), clock("train"):
        raise RuntimeError
    ((phase, start, end, step),) = map(astuple, spans)
    assert (phase, step) == ("score", 7) and metrics == {"time/score_s": pytest.approx(end - start, abs=1e-6)}
    assert before - 0.01 <= start <= end - 0.002 and end <= time.time() + 0.01


def test_a_run_and_its_resume_leave_every_span(tmp_path):
    with Run(tmp_path / "r", config={}, wandb_mode="disabled", project="p", name="n") as run:
        run.log_timeline([span("rollout", 0, 5), span("train", 5, 5)])
        with run.timed(0, "eval"):
            time.sleep(0.003)
        with run.timed(0, "checkpoint"):
            pass
        run.finish({})
    with (tmp_path / "r/timeline.jsonl").open("a") as file:
        file.write('{"phase": "tra')
    with Run(tmp_path / "r", config={}, wandb_mode="disabled", project="p", name="n", resume=True) as run:
        run.log_timeline([span("rollout", 20, 5, 1)])
        run.finish({})
    assert sorted(s.phase for s in read_run(tmp_path / "r").timeline) == [
        "eval",
        RESUMED,
        "rollout",
        "rollout",
        "train",
    ]


@given(st.lists(st.builds(Span, st.text(), st.floats(0, 2e9), st.floats(0, 2e9), st.integers(0, 10**6)), max_size=5))
def test_a_row_keeps_a_span_to_the_tenth_of_a_millisecond(tmp_path_factory, spans):
    path = tmp_path_factory.mktemp("t") / "timeline.jsonl"
    path.write_text("".join(json.dumps(encode(s)) + "\n" for s in spans))
    back = read_timeline(path)
    assert sorted((s.phase, s.step) for s in back) == sorted((s.phase, s.step) for s in spans)
    assert sorted(s.start for s in back) == pytest.approx(sorted(s.start for s in spans), abs=1e-4)


def test_a_damaged_timeline_is_named_and_a_missing_one_is_empty(tmp_path):
    assert read_timeline(tmp_path / "none.jsonl") == ()
    (tmp_path / "t.jsonl").write_text('{"phase": "a", "start": 1, "end": 2, "step": 0}\n{"phase": "a"}\n')
    with pytest.raises(ValueError, match=r"t.jsonl, line 2: no span.*'start'"):
        read_timeline(tmp_path / "t.jsonl")
