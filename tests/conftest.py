"""Shared by all tests."""

import multiprocessing
import os
import sys
from collections import defaultdict

import pytest
import torch
from markupsafe import Markup

with (
    pytest.MonkeyPatch.context() as patch
):  # Triton's own functions are interpreted only if they are defined under this
    patch.setenv("TRITON_INTERPRET", "1")
    import triton.language  # noqa: F401

from tests import kernel_parts, routes_run

routes_run.watch()
_everywhere: defaultdict[str, set[str]] = defaultdict(set)  # what the workers of this session report


# Ranks in processes of their own are forked from one that has imported what takes seconds.
multiprocessing.set_forkserver_preload(["torch.distributed", "transformers.models.qwen3.modeling_qwen3"])
SHARED_SERVERS = {
    "test_servers.py",
    "test_asynchronous.py",
    "test_wire.py",
    "test_attach_servers.py",
}  # both start once
FORKED_RANKS = {"test_fsdp2.py", "test_mismatch_reduce.py", "test_sampler_ranks.py", "test_vocab_parallel.py"}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """The tests of a file stay on one worker, and files that share servers do."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            name = file.rpartition("/")[2]
            return "two servers" if name in SHARED_SERVERS else "ranks" if name in FORKED_RANKS else file

    return Scheduling(config, log)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in SHARED_SERVERS)  # stable: the longest group first


@pytest.fixture(autouse=True, scope="module")
def as_it_was():
    """What a file's tests leave in their process counts for no other file.

    Variables of ours, the linear function of `deepspeed.zero.Init`, the precision of the one accelerator that a process can have.
    """
    before, linear = {n: v for n, v in os.environ.items() if n.startswith("RLALIGN_")}, torch.nn.functional.linear
    yield
    for name in [n for n in os.environ if n.startswith("RLALIGN_") and n not in before]:
        del os.environ[name]
    os.environ.update(before)
    torch.nn.functional.linear = linear
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)


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


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """A cache folder with the compiled head kernel in it."""
    return kernel_parts.library_in(tmp_path_factory.mktemp("compiled"))


@pytest.fixture
def undrawn(monkeypatch):
    """Charts without lines, for what a page says in words."""
    monkeypatch.setattr("rlalign.report.plots._svg", lambda draw, name, height=0.0: Markup("<svg></svg>"))


@pytest.fixture
def compiling(monkeypatch):
    """torch.compile really compiles: an engine started earlier in this process may have switched it off for eager runs."""
    import torch._dynamo

    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    with torch._dynamo.config.patch(disable=False):
        yield
