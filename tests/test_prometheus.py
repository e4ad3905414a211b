"""The endpoint of a live run, scraped over HTTP and read with Prometheus's own parser."""

import json
import math
import socket
import threading
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics
from prometheus_client.parser import text_string_to_metric_families as families

from rlalign.ranks import free_port
from rlalign.tracking.backends import Places
from rlalign.tracking.prometheus import _State, gauge_name
from rlalign.tracking.run_directory import Run


def scrape(url: str) -> dict[str, dict[tuple, float]]:
    """Samples by name and labels."""
    found: dict[str, dict[tuple, float]] = {}
    for family in families(urlopen(url, timeout=10).read().decode()):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return found


def start(directory, port, **more):
    return Run(directory, config={}, project="p", name="n", places=Places(backends=(), port=port, group="ab"), **more)


@pytest.fixture
def live(tmp_path):
    with start(tmp_path / "run", free_port()) as run:
        yield run, json.loads((tmp_path / "run/run.json").read_text())["prometheus"]["url"]
        if run._open:
            run.finish({})


def test_a_scrape_says_where_the_run_is_and_what_it_did(live):
    run, url = live
    assert scrape(url)["rlalign_step"] == {(): -1.0}
    for step in range(3):
        row = {"mismatch/lag0/k3": 10.0**-step, "mismatch/lag0/over_0.1": math.nan, "reward/mean": math.inf}
        row |= {"rollout/tokens": 100.0, "time/rollout_s": 0.5, "time/train_s": 1.0 + step}
        run.log(step, row | ({"publish/version": step + 1, "publish/bytes": 8.0} if step else {}))
    run.event("alert/warn", "k3 rose")
    run.event("alert/warn", "and again")
    found = scrape(url)
    assert found["rlalign_step"][()] == 2 and found["rlalign_policy_version"][()] == 3
    assert found["rlalign_mismatch_lag0_k3"][()] == 0.01 and found["rlalign_reward_mean"][()] == math.inf
    assert math.isnan(found["rlalign_mismatch_lag0_over_0_1"][()])
    assert found["rlalign_phase_last_seconds"] == {(("phase", "rollout"),): 0.5, (("phase", "train"),): 3.0}
    assert found["rlalign_phase_seconds_total"] == {(("phase", "rollout"),): 1.5, (("phase", "train"),): 6.0}
    counted = {name: found[f"rlalign_{name}_total"][()] for name in ("tokens", "steps", "publishes", "publish_bytes")}
    assert counted == {"tokens": 300, "steps": 3, "publishes": 2, "publish_bytes": 16}
    assert found["rlalign_events_total"] == {(("kind", "alert/warn"),): 2.0}
    assert list(found["rlalign_run_info"]) == [(("group", "ab"), ("name", "n"), ("project", "p"))]
    assert found["process_resident_memory_bytes"][()] > 1e6


def test_it_listens_on_loopback_alone_and_lets_go_of_the_port_when_the_run_ends(live):
    run, url = live
    assert url.startswith("http://127.0.0.1:")
    listening = run._backends["prometheus"]._server.socket.getsockname()[0]
    assert listening == "127.0.0.1"
    run.finish({})
    with pytest.raises(URLError):
        urlopen(url, timeout=10)
    with socket.socket() as again:
        again.bind(("127.0.0.1", int(url.split(":")[2].split("/")[0])))


def test_a_taken_port_is_said_before_the_older_run_is_touched(tmp_path):
    with Run(tmp_path / "run", config={}, wandb_mode="disabled", project="p", name="n") as run:
        run.finish({})
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            ValueError, match=f"prometheus_port={port}: cannot listen on 127.0.0.1:{port} of {socket.gethostname()}"
        ):
            start(tmp_path / "run", port, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    with pytest.raises(ValueError, match="no-such-host"):
        places = Places(backends=(), port=port, host="no-such-host.invalid")
        Run(tmp_path / "other", config={}, project="p", name="n", places=places)


def test_a_directory_that_is_refused_leaves_no_endpoint_behind(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    port = free_port()
    with pytest.raises(ValueError, match="holds files that are no run"):
        start(tmp_path, port)
    with socket.socket() as again:
        again.bind(("127.0.0.1", port))


def test_a_scrape_while_rows_come_in_is_never_torn(live):
    run, url = live
    done = threading.Event()

    def log() -> None:
        for step in range(300):
            run.log(step, {"a": float(step), "b": float(step), f"new{step}": 0.0})
        done.set()

    writer = threading.Thread(target=log)
    writer.start()
    while not done.is_set():
        found = scrape(url)
        if "rlalign_a" in found:
            assert found["rlalign_a"] == found["rlalign_b"] == found["rlalign_step"]
    writer.join()


KEYS = st.one_of(
    st.text(min_size=1), st.sampled_from(["rollout/tokens", "publish/bytes", "time/train_s", "tokens", "a/b", "a_b"])
)


@given(st.dictionaries(KEYS, st.floats(allow_nan=False), max_size=8))
def test_any_keys_make_a_page_that_both_parsers_read_and_no_value_is_lost(metrics):
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.openmetrics.exposition import generate_latest as generate_open_metrics

    registry, state = CollectorRegistry(), _State({"name": "n"})
    registry.register(state)
    state.log(0, metrics)
    read = [
        s
        for f in families(generate_latest(registry).decode())
        for s in f.samples
        if not s.name.startswith("rlalign_phase")
    ]
    for key, value in metrics.items():
        if not (key.startswith("time/") and key.endswith("_s")):
            shown = [s.value for s in read if s.name == gauge_name(key) and s.labels.get("key", key) == key]
            assert shown == [value], (key, read)
    names = [family.name for family in open_metrics(generate_open_metrics(registry).decode())]
    assert len(names) == len(set(names))
