"""A small real HTTP server that answers as vLLM's rollout server with our worker extension does, and that can be made to fail."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import rlalign
from rlalign.config import RolloutConfig
from rlalign.rollout.engine.handshake import LAYER
from rlalign.rollout.server.greeting import Launch
from rlalign.rollout.server.pool import ServerPool
from tests import http_servers

PROMPTS = [[1, 40, 41], [1, 60], [1, 70, 71, 72], [1, 80]]
KNOWN = {"rlalign_identity", "rlalign_status", "rlalign_acknowledge", "rlalign_head_logits"}


def sampled(prompt: list[int], seed: int, count: int) -> list[int]:
    """What "the model" says: it depends on prompt and seed alone."""
    return [(sum(prompt) * 31 + seed * 7 + i * i) % 97 for i in range(count)]


def named_model(folder: Path, **said: str) -> Path:
    """What a run knows of its model before any weight is read; said: more of the configuration."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"vocab_size": 97, "hidden_size": 8} | said))
    (folder / "tokenizer.json").write_text("{}")
    return folder


class FakeVLLM(http_servers.Server):
    """`gate`: while cleared, nothing is sampled. `fails`: (status, body) answered instead of sampling, once each."""

    def __init__(self, model: Path, port: int = 0, **said: object) -> None:
        super().__init__(self._respond, port=port)
        from rlalign.rollout.worker.model_identity import digests

        self.said = {
            "rank": 0, "host": "hopper", "pid": 1, "life": f"first of {self.url}", "model": str(model), **digests(model),
            "vocab_size": 97, "dtype": "float32", "max_model_len": 64, "logprobs_mode": "processed_logprobs", "device": "cpu",
            "ranks": 1,
        } | said  # fmt: skip
        measured = {"dtype": "float32", "max_error": 1e-7, "bfloat16_error": 1e-2, "why": ""}
        self.version, self.status = "0.32.0", {
            "class": LAYER, "slot_holder": LAYER, "mode": "cached", "not_exact": [], "body_dtype": "float32",
            "multiplied": {"probe": measured, "sampled": None},
        }  # fmt: skip
        self.label, self.policy_version, self.paused = "default", 0, False
        self.engines = 1  # data-parallel; each with the ranks it was told
        self.tells_engines = True
        self.idle: set[int] = set()  # engines that no request reached
        self.closed_routes: dict[str, tuple[int, object]] = {}
        self.fails: list[tuple[int, object]] = []
        self.rpc_fails: dict[str, str] = {}
        self.gate = threading.Event()
        self.gate.set()
        self.going = threading.Condition()
        self.sampled: list[tuple[tuple[int, ...], int]] = []  # (prompt, seed) of every completion that was delivered
        self.waiting = 0
        self.rpcs: list[tuple[str, list]] = []

    @property
    def calls(self) -> int:
        return len(self.sampled)

    def _respond(self, path: str, body: dict | None) -> tuple[int, object]:
        if path in self.closed_routes:
            return self.closed_routes[path]
        if path == "/inference/v1/generate":
            return self._generate(body) if body else (400, {"error": {"message": "token_ids: Field required"}})
        if path == "/collective_rpc":
            return self._rpc(body["method"], body["args"])
        if path in ("/pause", "/resume"):
            with self.going:
                self.paused = path == "/pause"
                self.going.notify_all()
        if path == "/update_weight_version":
            self.label = body["new_version"]
        answers = {"/version": {"version": self.version}}
        return 200, answers.get(path, {})

    def _rpc(self, method: str, args: list) -> tuple[int, object]:
        self.rpcs.append((method, args))
        if method in self.rpc_fails:
            return 500, {"error": {"message": f"Call to collective_rpc method failed: {self.rpc_fails[method]}"}}
        if method not in KNOWN:
            said = f"Worker failed with error ''CPUWorker' object has no attribute '{method}'', please check"
            return 500, {"error": {"message": f"Call to collective_rpc method failed: {said}"}}
        if method == "rlalign_acknowledge":
            self.policy_version = args[0]
        answers = {
            "rlalign_identity": self.said,
            "rlalign_status": {"rank": 0, "rlalign": rlalign.__version__, "calls": self.calls} | self.status,
            "rlalign_head_logits": {"rank": 0, "file": f"{args[0]}.logits" if args else None},
        }
        answer = answers.get(method, {"rank": 0, "version": self.policy_version})
        if not self.tells_engines:
            return 200, {"results": [answer]}
        every = [answer | {"rank": i, "engines": self.engines} for i in range(self.engines)]
        return 200, {"results": [a | ({"calls": 0} if a["rank"] in self.idle else {}) for a in every]}

    def _generate(self, body: dict) -> tuple[int, object]:
        if self.fails:
            return self.fails.pop(0)
        self.waiting += 1
        self.gate.wait(20)
        with self.going:
            self.going.wait_for(lambda: not self.paused, 20)
        self.waiting -= 1
        p = body["sampling_params"]
        choices = [self._choice(body["token_ids"], p["seed"], p["max_tokens"], i) for i in range(p["n"])]
        self.sampled += [(tuple(body["token_ids"]), p["seed"] + i) for i in range(p["n"])]
        return 200, {"choices": choices, "usage": {}}

    def _choice(self, prompt: list[int], seed: int, count: int, index: int) -> dict:
        tokens = sampled(prompt, seed + index, count)
        return {
            "index": index, "finish_reason": "length", "token_ids": tokens, "text": " ".join(map(str, tokens)),
            "logprobs": {"content": [{"token": str(t), "logprob": -t / 97} for t in tokens]},
            "weight_versions": [{"version": self.label, "start": 0, "end": count}],
        }  # fmt: skip


def config_for(urls: list[str], **settings: object) -> RolloutConfig:
    defaults = {"max_tokens": 4, "max_model_len": 64, "health_every_s": 0.05, "start_timeout_s": 20, "servers": urls}
    return RolloutConfig(backend="server", **(defaults | settings))


def pool_of(
    model: Path,
    *servers: FakeVLLM,
    published: int | None = 1,
    key: str | None = None,
    say: Callable[[str], None] = print,
    **settings: object,
) -> ServerPool:
    """A pool over these servers, whose weights count as published."""
    config = config_for([s.url for s in servers], **settings)
    wanted = Launch(model=model, config=config, dtype="float32", head_dtype="float32", seed=0)
    pool = ServerPool(config.servers, wanted, count=len(servers) or config.wait_for, key=key, say=say)
    if published is not None:
        publish(pool, published)
    return pool


def publish(pool: ServerPool, version: int) -> None:
    """The receiver's half of a publish, without weights."""
    pool.suspend(f"publishing policy version {version} did not finish")
    pool.acknowledge(version)


def generate(pool, prompts=PROMPTS, samples=3, seed=5):
    return pool.generate(prompts, prompt_ids=range(len(prompts)), samples=samples, seed=seed)


class Later(threading.Thread):
    """A call in another thread: its result, or the error it ended with."""

    def __init__(self, call):
        super().__init__(daemon=True)
        self.call, self.result, self.error = call, None, None
        self.start()

    def run(self):
        try:
            self.result = self.call()
        except Exception as error:
            self.error = error

    def get(self):
        self.join(120)
        assert not self.is_alive(), "still waiting"
        if self.error:
            raise self.error
        return self.result


def until(condition):
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.005)


def state(pool, server):
    return pool.servers()[server.url].split(" is ")[1].split(" ")[0]


def right(rollouts, samples=3, seed=5, version=1):
    """Every completion of every prompt, once, in order, sampled with its own seed."""
    assert [r.group_id for r in rollouts] == [g for g in range(len(PROMPTS)) for _ in range(samples)]
    for i, r in enumerate(rollouts):
        group, member = divmod(i, samples)
        prompt, own_seed = PROMPTS[group], (seed * 1_000_003 + group * samples) % 2**31 + member
        tokens = sampled(prompt, own_seed, 4)
        assert r.token_ids == [*prompt, *tokens] and r.loss_mask == [False] * len(prompt) + [True] * 4
        assert r.rollout_logprobs[len(prompt) :] == [-t / 97 for t in tokens]
        assert r.version_spans == [(len(prompt), len(prompt) + 4, version)]
        assert r.text == " ".join(map(str, tokens))
    return True
