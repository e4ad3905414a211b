"""What a pool proves of its servers, and what it writes down of them."""

import json
from functools import partial

import pytest

from rlalign.rollout.server import client
from rlalign.tracking.run_directory import Run
from tests.rollout_servers import PROMPTS, FakeVLLM, Later, generate, named_model, pool_of, publish, right, state, until


@pytest.fixture
def model(tmp_path):
    return named_model(tmp_path)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(client, "WAITS", (0.01, 0.01))


def test_an_engine_that_no_request_reached_yet_is_looked_at_again_and_one_that_never_calls_our_head_is_refused(model):
    with FakeVLLM(model) as server:
        server.engines, server.idle = 2, {1}
        pool = pool_of(model, server)
        generate(pool, PROMPTS[:1])  # three completions may all have gone to the first
        with pytest.raises(RuntimeError, match=f"rollout rank 1 of {server.url} generated tokens without calling"):
            generate(pool)
        server.idle.clear()
        assert right(generate(pool))
        asked = len(server.rpcs)
        assert right(generate(pool)) and len(server.rpcs) == asked, "proved once for each life"
        pool.close()


def test_a_pause_that_leaves_old_blocks_in_the_cache_fails_the_publish(model):
    with FakeVLLM(model) as server:
        pool = pool_of(model, server)
        server.closed_routes["/pause"] = (500, {"error": {"message": "Failed to reset the KV connector cache."}})
        with pytest.raises(RuntimeError, match=f"Failed to reset the KV connector cache. .{server.url}, 500"):
            publish(pool, 2)
        assert pool.policy_version == 1 and server.label.endswith("/1")
        assert [body for path, body, _ in server.seen if path == "/pause"] == [{}, {}]
        pool.close()


def test_what_becomes_of_servers_and_requests_is_among_the_runs_events(model, tmp_path):
    def told():
        lines = (tmp_path / "run/events.jsonl").read_text().splitlines()
        return [e["message"] for e in map(json.loads, lines) if e["kind"] == "servers"]

    run = Run(tmp_path / "run", config={}, project="p", name="n", wandb_mode="disabled")
    with run, FakeVLLM(model) as steady:
        first = FakeVLLM(model).__enter__()
        pool = pool_of(model, steady, first, samples_per_request=1, say=partial(run.event, "servers"))
        assert told() == [], "a start without trouble"
        first.gate.clear()
        rollouts = Later(lambda: generate(pool))
        until(lambda: first.waiting > 0)
        waiting = first.waiting
        first.__exit__()
        assert right(rollouts.get())
        until(lambda: len(told()) == 2)
        left, again = sorted(told(), key=lambda message: "asked for again" in message)
        assert left.startswith(f"{first.url} leaves the pool with ") and again.startswith(
            f"{pool.reissued} requests were"
        )
        assert pool.reissued >= waiting
        with FakeVLLM(model, port=int(first.url.rsplit(":", 1)[1]), life="second", dtype="bfloat16") as wrong:
            until(lambda: state(pool, wrong) == "refused")
            wrong.said["dtype"] = "float32"
            until(lambda: state(pool, wrong) == "joining")
            publish(pool, 2)
            pool.close()
        run.finish({})
    assert "computes in bfloat16" in told()[2] and told()[3:] == [f"{first.url} joins the pool with policy version 2"]
