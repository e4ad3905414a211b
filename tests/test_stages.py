"""Progress of a long command: quiet in a log but for a line every half minute, live on a terminal, gone when it ends."""

import io
import time

from rich.console import Console

from rlalign.tracking.console import Stages


def log(**kind):
    out = io.StringIO()
    return out, Console(file=out, width=120, **kind)


def test_a_short_command_says_nothing_in_a_log():
    out, console = log()
    with Stages("parity", 2, console=console) as stages:
        stages.stage("one")
        stages.stage("two")
    assert out.getvalue() == ""


def test_a_long_stage_says_where_it_is_and_what_is_left():
    out, console = log()
    with Stages("parity", 4, console=console, every=0.05) as stages:
        stages.stage("first")
        time.sleep(0.12)
        assert "parity 1/4: first, 0:00 so far" in out.getvalue() and "ETA" not in out.getvalue()
        stages.stage("second")
        time.sleep(0.12)
        assert "parity 2/4: second, 0:00 so far, ETA 0:0" in out.getvalue()
        assert 0.3 < stages.left() < 3.0, "three more stages of about 0.12 s"
    lines = out.getvalue().count("\n")
    time.sleep(0.12)
    assert out.getvalue().count("\n") == lines, "nothing after the end"


def test_without_a_total_there_is_no_time_left():
    out, console = log()
    with Stages("attribute", console=console, every=0.05) as stages:
        stages.stage("first")
        stages.stage("[second]")
        time.sleep(0.12)
    assert "attribute 2: [second], 0:00 so far\n" in out.getvalue() and "ETA" not in out.getvalue()


def test_a_terminal_gets_one_live_line_and_no_log_lines():
    out, console = log(force_terminal=True)
    with Stages("doctor", 2, console=console, every=0.02) as stages:
        stages.stage("[first]")
        time.sleep(0.15)
    assert "doctor 1/2: [first]" in out.getvalue() and "so far" not in out.getvalue()


def test_an_error_ends_it_too():
    out, console = log()
    try:
        with Stages("doctor", console=console, every=0.02) as stages:
            stages.stage("first")
            raise ValueError("x")
    except ValueError:
        pass
    lines = out.getvalue().count("\n")
    time.sleep(0.06)
    assert out.getvalue().count("\n") == lines
