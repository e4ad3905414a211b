"""The laws of a pool of rollout servers: each completion once, whoever answers, whatever dies."""

import json
import time

import pytest

from rlalign.rollout.server import client
from tests.rollout_servers import PROMPTS, FakeVLLM, Later, generate, named_model, pool_of, publish, right, state, until


@pytest.fixture
def model(tmp_path):
    return named_model(tmp_path)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(client, "WAITS", (0.01, 0.01))


@pytest.mark.parametrize("samples_per_request", [0, 1, 2])
def test_the_rollouts_do_not_depend_on_who_answers_nor_on_how_a_group_is_cut(model, samples_per_request):
    with FakeVLLM(model) as a, FakeVLLM(model) as b:
        pool = pool_of(model, a, b, samples_per_request=samples_per_request)
        assert right(generate(pool))
        assert a.calls and b.calls and a.calls + b.calls == 12
        assert len(set(a.sampled + b.sampled)) == 12
        pool.close()


def test_a_slow_server_gets_less_and_a_full_one_nothing(model):
    with FakeVLLM(model) as slow, FakeVLLM(model) as fast:
        pool = pool_of(model, slow, fast, concurrency=3)
        slow.gate.clear()
        rollouts = Later(lambda: generate(pool))
        until(lambda: fast.calls == 9)
        assert slow.waiting == 1
        slow.gate.set()
        assert right(rollouts.get())
        assert (slow.calls, fast.calls) == (3, 9)
        pool.close()


def test_a_busy_answer_is_asked_again_and_a_refusal_is_not(model):
    with FakeVLLM(model) as server:
        pool = pool_of(model, server)
        server.fails = [(503, {"error": "busy"}), (429, {"error": "queue full"})]
        assert right(generate(pool))
        server.fails = [(400, {"error": {"message": "max_tokens must be positive"}})]
        before = server.calls
        with pytest.raises(RuntimeError, match="refused a request of prompt 0: max_tokens must be positive"):
            generate(pool, PROMPTS[:1])
        assert server.calls == before
        pool.close()


def test_a_dead_servers_requests_are_asked_for_elsewhere_none_lost_none_twice(model):
    with FakeVLLM(model) as dying, FakeVLLM(model) as healthy:
        pool = pool_of(model, dying, healthy, samples_per_request=1)
        dying.gate.clear()
        rollouts = Later(lambda: generate(pool))
        until(lambda: dying.waiting > 0)
        dying.__exit__()
        assert right(rollouts.get())
        assert healthy.calls == 12 and len(set(healthy.sampled)) == 12 and pool.reissued > 0
        until(lambda: state(pool, dying) == "down")
        healthy.__exit__()
        with pytest.raises(
            RuntimeError, match=f"no rollout server is left to sample: {dying.url} is down .*{healthy.url} is down"
        ):
            generate(pool)
        pool.close()


def test_a_server_that_hangs_without_closing_is_given_up(model):
    with FakeVLLM(model) as hanging, FakeVLLM(model) as healthy:
        pool = pool_of(model, hanging, healthy)
        hanging.gate.clear()
        rollouts = Later(lambda: generate(pool))
        until(lambda: hanging.waiting > 0)
        hanging.closed_routes["/health"] = (500, {})
        assert right(rollouts.get())
        assert healthy.calls == 12
        hanging.gate.set()
        pool.close()


def test_a_request_that_always_fails_ends_with_all_its_failures(model):
    with FakeVLLM(model) as server:
        pool = pool_of(model, server)
        server.fails = [(500, {"error": {"message": f"EngineDead {i}"}}) for i in range(9)]
        with pytest.raises(RuntimeError, match="prompt 0 .* failed 5 times: EngineDead 0.*EngineDead 4"):
            generate(pool, PROMPTS[:1])
        pool.close()


def test_an_aborted_request_is_no_completion(model):
    with FakeVLLM(model) as server:
        pool = pool_of(model, server)
        cut = {"index": 0, "finish_reason": "abort", "token_ids": [], "text": "", "logprobs": {"content": []}}
        server.fails = [(200, {"choices": [cut]})]
        assert right(generate(pool, PROMPTS)) and pool.reissued == 1
        pool.close()


def test_requests_wait_for_an_update_and_get_the_new_version(model):
    with FakeVLLM(model) as a, FakeVLLM(model) as b:
        pool = pool_of(model, a, b, concurrency=3)
        a.gate.clear(), b.gate.clear()
        rollouts = Later(lambda: generate(pool))
        until(lambda: a.waiting == b.waiting == 1)
        pool.suspend("publishing policy version 2 did not finish")
        assert a.paused and b.paused
        a.gate.set(), b.gate.set()
        time.sleep(0.05)
        assert rollouts.is_alive() and a.calls == b.calls == 0
        pool.acknowledge(2)
        assert right(rollouts.get(), version=2)
        assert not a.paused and a.policy_version == b.policy_version == pool.policy_version == 2
        pool.close()


def test_an_update_that_fails_or_takes_too_long_ends_the_waiting_with_its_reason(model):
    with FakeVLLM(model) as server:
        pool = pool_of(model, server, pause_timeout_s=0.3)
        pool.suspend("publishing policy version 2 did not finish")
        waiting = Later(lambda: generate(pool))
        time.sleep(0.05)
        assert not server.waiting, "sent to a server that is being updated"
        pool.suspend("publishing policy version 2 failed: rank 0: lm_head.weight did not land")
        with pytest.raises(RuntimeError, match="refuse to run: publishing policy version 2 failed: rank 0: lm_head"):
            waiting.get()
        with pytest.raises(RuntimeError, match="refuse to run: .*lm_head"):
            generate(pool)
        publish(pool, 3)
        assert right(generate(pool), version=3)
        pool.suspend("publishing policy version 4 did not finish")
        with pytest.raises(RuntimeError, match="did not finish, and rollout.pause_timeout_s=0.3 is over"):
            generate(pool)
        pool.close()


def test_a_restarted_server_serves_nothing_until_weights_are_published_to_it(model):
    with FakeVLLM(model) as steady, FakeVLLM(model) as restarted:
        pool = pool_of(model, steady, restarted)
        restarted.label, restarted.said["life"] = "default", "second"  # between two requests, unseen
        assert right(generate(pool))
        until(lambda: state(pool, restarted) == "joining")
        before = restarted.calls
        assert right(generate(pool)) and restarted.calls == before
        publish(pool, 2)
        assert pool.engines == [steady.url, restarted.url] and restarted.label.endswith("/2")
        assert right(generate(pool), version=2) and restarted.calls > before
        pool.close()


def test_a_server_that_failed_a_request_and_is_another_process_now_gets_no_second_one(model):
    with FakeVLLM(model) as steady, FakeVLLM(model) as restarted:
        pool = pool_of(model, steady, restarted)
        restarted.said["life"] = "second"
        restarted.fails = [(500, {"error": {"message": "EngineDeadError"}})] * 9
        assert right(generate(pool)) and steady.calls == 12
        until(lambda: state(pool, restarted) == "joining")
        pool.close()


def test_a_server_that_comes_back_on_its_port_joins_at_the_next_publish(model):
    with FakeVLLM(model) as steady:
        first = FakeVLLM(model).__enter__()
        pool = pool_of(model, steady, first)
        first.__exit__()
        until(lambda: state(pool, first) == "down")
        assert pool.ask("rlalign_status")[0]["engine"] == steady.url
        port = int(first.url.rsplit(":", 1)[1])
        with FakeVLLM(model, port=port, life="second") as second:
            until(lambda: state(pool, second) == "joining")
            assert right(generate(pool)) and not second.calls and pool.engines == [steady.url]
            publish(pool, 2)
            assert right(generate(pool), version=2) and second.calls
            pool.close()


def test_a_server_that_another_run_publishes_to_is_left_alone(model):
    with FakeVLLM(model) as shared:
        mine = pool_of(model, shared)
        other = pool_of(model, shared)
        with pytest.raises(RuntimeError, match="another run publishes to it"):
            generate(mine)
        assert right(generate(other))
        mine.close(), other.close()


def test_answers_of_all_workers_say_where_they_come_from(model, tmp_path):
    with FakeVLLM(model) as a, FakeVLLM(model) as b:
        pool = pool_of(model, a, b)
        assert [(s["engine"], s["rank"]) for s in pool.status()] == [(a.url, 0), (b.url, 0)]
        pool.ask_each("rlalign_acknowledge", [(7,), (8,)])
        assert (a.policy_version, b.policy_version) == (7, 8)
        assert str(pool.head_logits(tmp_path / "x", batch=2)) == f"{tmp_path}/x.logits"
        b.rpc_fails["rlalign_status"] = "CUDA out of memory"
        with pytest.raises(RuntimeError, match=f"{b.url}: rlalign_status failed: .*CUDA out of memory"):
            pool.status()
        b.__exit__()
        assert [s["engine"] for s in pool.status()] == [a.url] == pool.engines
        a.__exit__()
        with pytest.raises(RuntimeError, match="no rollout server answered rlalign_status"):
            pool.status()
        pool.close()


def test_before_the_first_publish_nothing_is_sampled(model):
    with FakeVLLM(model) as server:
        pool = pool_of(model, server, published=None)
        with pytest.raises(RuntimeError, match="no weights were published to the servers yet"):
            generate(pool)
        with pytest.raises(ValueError, match="prompt 0 has 61 tokens"):
            generate(pool, [[1] * 61])
        pool.close()
        with pytest.raises(RuntimeError, match="was closed"):
            generate(pool)


def test_closing_ends_those_who_wait(model):
    with FakeVLLM(model) as server:
        pool = pool_of(model, server, concurrency=3)
        server.gate.clear()
        waiting = Later(lambda: generate(pool))
        until(lambda: server.waiting)
        pool.close()
        with pytest.raises(RuntimeError, match="the pool was closed"):
            waiting.get()
        server.gate.set()


def test_json_has_no_word_for_nan_and_the_rollout_has(model):
    with FakeVLLM(model) as server:
        pool = pool_of(model, server)
        generate(pool)
        choice = server._choice(PROMPTS[0], 5, 4, 0)
        choice["logprobs"]["content"][1]["logprob"] = -9999.0
        server.fails = [(200, json.loads(json.dumps({"choices": [choice]})))]
        (rollout,) = generate(pool, PROMPTS[:1], samples=1)
        assert [p != p for p in rollout.rollout_logprobs[3:]] == [False, True, False, False]
        pool.close()
