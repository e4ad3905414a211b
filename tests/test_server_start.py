"""Which servers a run refuses, how it finds them, and how one is started: each refusal names the host and the remedy."""

import asyncio
import json
import os
import socket
import stat

import pytest

from rlalign.commands import rollout_server
from rlalign.config import RolloutConfig
from rlalign.rollout import hooks
from rlalign.rollout.engine.arguments import as_options, engine_arguments
from rlalign.rollout.server import client, process_guard, roster
from rlalign.rollout.server.launching import Launch, ServerProcess, devices_of, reserve
from tests.rollout_servers import PROMPTS, FakeVLLM, named_model, pool_of, publish


@pytest.fixture
def model(tmp_path):
    return named_model(tmp_path / "model", transformers_version="5")


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(client, "WAITS", (0.01,))


ANOTHER = {
    "config": ("serves another model: rank 0 has", "start it with model.path="),
    "tokenizer": ("has another tokenizer", "scored as something else"),
    "dtype": ("computes in other, this run in float32", "start it with model.dtype=float32"),
    "logprobs_mode": ("returns other", "--logprobs-mode processed_logprobs"),
}


@pytest.mark.parametrize("what", ANOTHER)
def test_a_server_of_something_else_is_refused(model, what):
    with FakeVLLM(model, **{what: "other"}) as server, pytest.raises(RuntimeError) as refusal:
        pool_of(model, server)
    message = str(refusal.value).replace(" (rank 0)", "")
    assert server.url in message and "(host hopper)" in message
    assert all(part in message for part in ANOTHER[what])


def test_too_short_a_context_is_refused_and_a_longer_one_is_not(model):
    with FakeVLLM(model, max_model_len=63) as short, FakeVLLM(model, max_model_len=65) as long:
        with pytest.raises(RuntimeError, match=f"{short.url} .*takes sequences of 63 tokens.*rollout.max_model_len=64"):
            pool_of(model, long, short)
        pool_of(model, long).close()


def test_what_differs_between_equal_models_is_no_difference(model, tmp_path):
    same = tmp_path / "same"
    same.mkdir()
    (same / "config.json").write_text('{"hidden_size": 8, "transformers_version": "6", "vocab_size": 97, "dtype": "x"}')
    (same / "tokenizer.json").write_text("{}")
    with FakeVLLM(same) as server:
        pool_of(model, server).close()


CLOSED = {
    "dev mode off": (
        "/collective_rpc",
        (404, {"detail": "Not Found"}),
        "development routes are off; start it with `rlalign",
    ),
    "scale out off": (
        "/inference/v1/generate",
        (403, {"error": "scale out"}),
        "answers 403; start .*--enable-scale-out",
    ),
    "no key": (
        "/version",
        (401, {"error": "missing or wrong key"}),
        "401 missing or wrong key; set RLALIGN_ROLLOUT_KEY",
    ),
}


@pytest.mark.parametrize("case", CLOSED)
def test_a_closed_route_is_refused_with_its_remedy(model, case):
    path, answer, message = CLOSED[case]
    with FakeVLLM(model) as server:
        server.closed_routes[path] = answer
        with pytest.raises(RuntimeError, match=f"{server.url}.*{message}"):
            pool_of(model, server)


def test_a_server_without_rlalign_or_with_its_head_switched_off_is_refused(model, monkeypatch):
    with FakeVLLM(model) as server:
        server.status = {"class": "vllm.LogitsProcessor", "slot_holder": None, "mode": None, "vllm_plugins": "lora"}
        with pytest.raises(RuntimeError, match=f"{server.url} .*host hopper.*plugin did not register"):
            pool_of(model, server)
        monkeypatch.setattr("tests.rollout_servers.KNOWN", set())
        with pytest.raises(
            RuntimeError, match=f"{server.url} has no worker RPC rlalign_identity: rlalign is not in it; start it"
        ):
            pool_of(model, server)


def test_versions_too_old_or_unequal_are_refused(model):
    with FakeVLLM(model) as new, FakeVLLM(model) as other:
        other.version = "0.31.0"
        with pytest.raises(RuntimeError, match=f"{other.url} runs vLLM 0.31.0, .* install vLLM 0.32 or later there"):
            pool_of(model, new, other)
        other.version = "0.32.1"
        with pytest.raises(RuntimeError, match="runs vLLM 0.32.*their numbers differ; install one version"):
            pool_of(model, new, other)
        other.version, other.status["rlalign"] = "0.32.0", "0.0.9"
        with pytest.raises(
            RuntimeError, match=f"{other.url}.*runs rlalign 0.0.9, the driver .*install the same version"
        ):
            pool_of(model, new, other)


def test_something_else_than_a_server_of_ours_is_refused(model):
    with FakeVLLM(model) as server:
        del server.said["tokenizer"]
        with pytest.raises(
            RuntimeError, match=f"{server.url} says nothing of its 'tokenizer': it runs another rlalign"
        ):
            pool_of(model, server)
        server.closed_routes["/version"] = (200, b"<html>")
        with pytest.raises(RuntimeError, match=f"{server.url}: an answer without 'version'; is that a vLLM server"):
            pool_of(model, server)


def test_a_missing_rank_is_refused(model):
    with FakeVLLM(model, ranks=2) as server, pytest.raises(RuntimeError, match=f"{server.url}.*1 of 2 rollout ranks"):
        pool_of(model, server)


def test_of_a_data_parallel_server_every_engine_must_answer(model):
    with FakeVLLM(model) as server:
        server.tells_engines = False
        with pytest.raises(
            RuntimeError, match=f"{server.url} .host hopper.: rlalign's plugin is in its workers, but not in its HTTP"
        ):
            pool_of(model, server)
        server.tells_engines, server.engines = True, 2
        pool = pool_of(model, server)
        assert [(s["engine"], s["rank"]) for s in pool.status()] == [(server.url, 0), (server.url, 1)]
        pool.close()
        server.status["mode"] = "native"
        with pytest.raises(RuntimeError, match=f"{server.url} .*its head runs in mode 'native'"):
            pool_of(model, server)


def test_vllms_client_for_servers_asks_every_engine_and_numbers_the_ranks_through():
    class Two:
        async def call_utility_all_async(self, *asked):
            return [[{"rank": rank, "at": engine} for rank in range(2)] for engine in "ab"]

        async def call_utility_async(self, *asked):
            return ["what vLLM returns", *asked]

    ask = hooks._ask_every_engine
    found = asyncio.run(ask(Two(), "rlalign_status", 1.0, ("x",)))
    assert [(a["at"], a["rank"], a["engines"]) for a in found] == [("a", 0, 2), ("a", 1, 2), ("b", 2, 2), ("b", 3, 2)]
    theirs = asyncio.run(ask(Two(), "their_own_method", 2.0))
    assert theirs == ["what vLLM returns", "collective_rpc", "their_own_method", 2.0, (), None]


@pytest.mark.slow
def test_a_server_that_is_not_there_is_named(model):
    with (
        FakeVLLM(model) as there,
        pytest.raises(RuntimeError, match="1 of 2 .*127.0.0.1:9 is down .*`rlalign rollout-server`"),
    ):
        gone = FakeVLLM(model)
        gone._http.server_close()
        gone.url = "http://127.0.0.1:9"
        pool_of(model, there, gone, start_timeout_s=2)


def announce(folder, server, key=None):
    said = {"host": "hopper", "pid": 1, "model": "m", "vllm": "0.32.0", "rlalign": "0.1.0"}
    return roster.announce(folder, roster.Announcement(url=server.url, key=key, **said))


def test_servers_are_found_by_their_ready_files_and_later_ones_join_at_a_publish(model, tmp_path):
    folder = tmp_path / "ready"
    with FakeVLLM(model) as first, FakeVLLM(model) as second:
        file = announce(folder, first, key="secret")
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        pool = pool_of(model, servers=[], server_folder=str(folder), wait_for=1)
        assert pool.engines == [first.url]
        assert first.seen[-1][2]["Authorization"] == "Bearer secret"
        announce(folder, second)
        while "joining" not in pool.servers().get(second.url, ""):
            pass
        publish(pool, 2)
        assert pool.engines == [first.url, second.url]
        rollouts = pool.generate(PROMPTS, prompt_ids=range(4), samples=2, seed=0)
        assert len(rollouts) == 8 and second.calls
        pool.close()
    with pytest.raises(RuntimeError, match="0 of 2 rollout servers were ready after rollout.start_timeout_s=0.5"):
        pool_of(model, servers=[], server_folder=str(folder), wait_for=2, start_timeout_s=0.5)
    (folder / "x.server.json").write_text("{}")
    with pytest.raises(ValueError, match="x.server.json: no announcement of `rlalign rollout-server`.*remove it"):
        list(roster.announced_in(folder))


def test_a_port_that_is_taken_is_refused_with_its_holder_before_anything_starts(model):
    launch = Launch(model=model, config=RolloutConfig(), dtype="float32", head_dtype="float32", seed=0)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"127.0.0.1:{port} .*held by pid {os.getpid()} .*--port 0 for a free one"):
            ServerProcess(launch, host="127.0.0.1", port=port, key=None, log=None)
    with pytest.raises(ValueError, match="--host 0.0.0.0 without a key.*set RLALIGN_ROLLOUT_KEY"):
        ServerProcess(launch, host="0.0.0.0", port=0, key=None, log=None)


def test_a_reserved_port_is_given_to_nobody_but_who_asks_for_it():
    with reserve("127.0.0.1", 0) as mine, reserve("127.0.0.1", 0) as other:
        port = mine.getsockname()[1]
        assert port != other.getsockname()[1]
        with reserve("127.0.0.1", port) as vllms:
            vllms.listen()


def test_the_command_line_says_what_the_embedded_engine_is_given(model):
    config = RolloutConfig(max_model_len=99, max_tokens=9, enforce_eager=True, prefix_caching=False)
    arguments = engine_arguments(model, config, dtype="float32", head_dtype="float32", seed=3, exact=False)
    options = as_options(arguments)
    launch = Launch(
        model=model, config=config, dtype="float32", head_dtype="float32", seed=3, options=("--data-parallel-size", "2")
    )
    line, environment = launch.command("127.0.0.1", 8000, "secret"), launch.environment("secret")
    assert " ".join(options) in " ".join(line) and line[-2:] == ["--data-parallel-size", "2"]
    assert "secret" not in line and process_guard.CLASS in line and environment[process_guard.KEY_VARIABLE] == "secret"
    assert options[options.index("--max-model-len") :][:2] == ["--max-model-len", "99"]
    assert "--enforce-eager" in options and "--no-enable-prefix-caching" in options and "None" not in options
    assert json.loads(options[options.index("--additional-config") + 1]) == arguments["additional_config"]
    assert environment["VLLM_SERVER_DEV_MODE"] == "1" and "RANK" not in environment


@pytest.mark.parametrize(
    "tokens, on_gpu, chunked", [(0, False, False), (99, False, False), (16, False, None), (0, True, None)]
)
def test_prompts_are_cut_into_chunks_on_cpu_only_where_that_is_asked_for(model, monkeypatch, tokens, on_gpu, chunked):
    monkeypatch.setattr("torch.cuda.is_available", lambda: on_gpu)
    config = RolloutConfig(max_model_len=99, max_tokens=9, max_num_batched_tokens=tokens)
    arguments = engine_arguments(model, config, dtype="float32", head_dtype="float32", seed=3, exact=False)
    assert arguments["enable_chunked_prefill"] is chunked
    assert ("--no-enable-chunked-prefill" in as_options(arguments)) is (chunked is False)


@pytest.mark.parametrize(
    "on_gpu, asked, returned", [(True, None, True), (True, "0", False), (False, None, False), (False, "1", True)]
)
def test_routed_experts_are_asked_of_the_runner_that_returns_them(model, monkeypatch, on_gpu, asked, returned):
    monkeypatch.setattr("torch.cuda.is_available", lambda: on_gpu)
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    if asked is not None:
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", asked)
    options = {"dtype": "float32", "head_dtype": "float32", "seed": 3, "exact": False}
    config = RolloutConfig(max_model_len=99, max_tokens=9, enforce_eager=True, replay_experts="all")
    assert engine_arguments(model, config, **options).get("enable_return_routed_experts", False) is returned
    found = engine_arguments(model, RolloutConfig(max_model_len=99, max_tokens=9), **options)
    assert "enable_return_routed_experts" not in found


def test_servers_take_the_last_devices_and_leave_the_first_to_the_trainer(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4,5,6,7")
    assert [devices_of(i, 2, 2) for i in range(2)] == ["4,5", "6,7"]
    assert devices_of(0, 3, 2) is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert devices_of(0, 1, 1) is None


def test_overrides_end_where_vllms_own_options_begin():
    words = ["rollout.max_tokens=8", "task=addition", "--data-parallel-size", "2"]
    assert rollout_server.split(words) == (words[:2], words[2:])
    assert rollout_server.split(words[:1]) == (words[:1], [])


@pytest.mark.parametrize(
    ("path", "header", "status"),
    [
        ("/collective_rpc", None, 401),
        ("/collective_rpc", "Bearer wrong", 401),
        ("/collective_rpc", "Bearer right", 200),
        ("/health", None, 200),
        ("/v1/models", None, 401),
    ],
)
def test_the_guard_asks_for_the_key_on_every_route_but_health(monkeypatch, path, header, status):
    monkeypatch.setenv(process_guard.KEY_VARIABLE, "right")
    sent = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200})

    async def send(message):
        sent.append(message)

    headers = [(b"authorization", header.encode())] if header else []
    asyncio.run(process_guard.KeyGuard(app)({"type": "http", "path": path, "headers": headers}, None, send))
    assert sent[0]["status"] == status
    monkeypatch.delenv(process_guard.KEY_VARIABLE)
    with pytest.raises(RuntimeError, match="needs RLALIGN_ROLLOUT_KEY"):
        process_guard.KeyGuard(app)
