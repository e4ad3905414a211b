"""Shared by all tests."""

from collections import defaultdict

import pytest

from tests import routes_run

routes_run.watch()
_everywhere: defaultdict[str, set[str]] = defaultdict(set)  # what the workers of this session report


def _add(found: dict[str, list[str]]) -> None:
    for what, hows in found.items():
        _everywhere[what] |= set(hows)


def pytest_runtest_call(item):
    routes_run.watch_attention()


def pytest_sessionfinish(session):
    found = routes_run.of_this_process()
    if hasattr(session.config, "workeroutput"):  # a worker of pytest-xdist
        session.config.workeroutput["routes_run"] = found
    else:
        _add(found)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    _add(getattr(node, "workeroutput", {}).get("routes_run", {}))


def pytest_terminal_summary(terminalreporter):
    if _everywhere:
        terminalreporter.section("ways of computing that ran on this host")
        for line in routes_run.summary(_everywhere):
            terminalreporter.line(line)


@pytest.fixture
def compiling(monkeypatch):
    """torch.compile really compiles: an engine started earlier in this process may have switched it off for eager runs."""
    import torch._dynamo

    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    with torch._dynamo.config.patch(disable=False):
        yield
