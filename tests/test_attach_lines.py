"""Ways to a foreign engine without one: event loops, Ray actors, several at once; answers of workers as they may go wrong."""

import asyncio
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

import rlalign
from rlalign.rollout import attached_lines
from rlalign.rollout.attached_lines import LLMLine
from rlalign.rollout.engine import handshake

BFLOAT16 = {"dtype": "bfloat16", "why": "", "max_error": 1, "bfloat16_error": 1}


class Worker:
    """Answers our RPCs as one rank of a CPU engine in bfloat16 does."""

    def __init__(self, **changes):
        self.changes, self.owner, self.version, self.seen = changes, None, 0, []

    def answer(self, method, *args):
        self.seen.append(method)
        match method:
            case "rlalign_identity":
                found = {
                    "ranks": 1, "device": "cpu", "dtype": "bfloat16", "logprobs_mode": "processed_logprobs",
                    "sampling_defaults": {}, "owner": self.owner, "sampled_steps": 0,
                }  # fmt: skip
            case "rlalign_status":
                found = {
                    "class": handshake.LAYER, "slot_holder": handshake.LAYER, "mode": "cached", "rlalign": rlalign.__version__,
                    "body_dtype": "bfloat16", "multiplied": {"probe": None, "sampled": None}, "vllm": "0.32.0", "calls": 1,
                    "policy_version": self.version, "head": "lm_head: ParallelLMHead/UnquantizedEmbeddingMethod", "route": None,
                }  # fmt: skip
            case "rlalign_claim":
                (self.owner,) = args
                found = {"owner": self.owner}
            case "rlalign_acknowledge":
                (self.version,) = args
                found = {}
            case "rlalign_unlanded":
                found = {"problems": []}
            case _:
                raise NotImplementedError(f"Method {method!r} is not implemented.")
        return {"rank": 0, **found} | {k: v for k, v in self.changes.items() if k in found}


class FakeLLM:
    llm_engine = None

    def __init__(self, **changes):
        self.worker = Worker(**changes)

    def collective_rpc(self, method, args=()):
        return [self.worker.answer(method, *args)]

    def reset_prefix_cache(self):
        return True

    def generate(self, *args, **kwargs):
        return "tokens"


class FakeAsyncLLM:
    """Notes the thread that it is called from."""

    def __init__(self):
        self.worker, self.threads, self.calls = Worker(), set(), []

    async def collective_rpc(self, method, timeout=None, args=()):
        self.threads.add(threading.get_ident())
        return [self.worker.answer(method, *args)]

    async def pause_generation(self, *, mode, clear_cache):
        self.calls.append(("pause", mode, clear_cache))

    async def update_weight_version(self, version):
        self.calls.append(("version", version))

    async def resume_generation(self):
        self.calls.append("resume")

    async def generate(self, prompt, params, request_id):
        """Prompt logprobs come with every output; each token's is minus its id."""
        ids = prompt["prompt_token_ids"]
        for _ in range(2):
            yield SimpleNamespace(prompt_logprobs=[None, *({t: SimpleNamespace(logprob=-float(t))} for t in ids[1:])])


def actor(worker, **without):
    """As a Ray actor's handle looks: methods with `remote`."""
    remote = {
        "collective_rpc": SimpleNamespace(remote=lambda method, args=(): [worker.answer(method, *args)]),
        "reset_prefix_cache": SimpleNamespace(remote=lambda: True),
    }
    made = type("ActorHandle", (), {k: v for k, v in remote.items() if k not in without})()
    type(made).__module__ = "ray.actor"
    return made


def test_an_async_engine_is_asked_on_its_own_loop(monkeypatch):
    monkeypatch.setattr(attached_lines, "forcing", lambda: None)

    async def life():
        engine, loop = FakeAsyncLLM(), asyncio.get_running_loop()
        with pytest.raises(
            ValueError, match=r"attached from outside of its event loop.*asyncio\.to_thread\(rlalign\.attach"
        ):
            rlalign.attach(engine)
        with pytest.raises(ValueError, match="from outside of its event loop"):
            rlalign.attach(engine, loop=loop)
        handle = await asyncio.to_thread(rlalign.attach, engine, loop=loop)
        assert engine.threads == {threading.get_ident()}
        assert await asyncio.to_thread(handle.score, [[5, 6, 7], [8, 9]]) == [[0.0, -6.0, -7.0], [0.0, -9.0]]
        await asyncio.to_thread(handle.suspend, "testing")
        await asyncio.to_thread(handle.acknowledge, 7)
        assert engine.calls == [("pause", "keep", True), ("version", "7"), "resume"] and engine.worker.version == 7
        return handle

    assert asyncio.run(life()).policy_version == 7


def test_ray_actors_are_asked_through_ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(get=lambda reference: reference))
    workers = Worker(), Worker()
    handle = rlalign.attach([actor(each) for each in workers])
    assert handle.engines == ["actor 0", "actor 1"] and len(handle.status()) == 2
    handle.acknowledge(3)
    assert [w.version for w in workers] == [3, 3]
    with pytest.raises(ValueError, match="actor 0, actor 1 cannot be asked for prompt logprobs"):
        handle.score([[1, 2]])
    with pytest.raises(ValueError, match="actor 0 has no method reset_prefix_cache: attach needs collective_rpc"):
        rlalign.attach(actor(Worker(), reset_prefix_cache=True))
    with pytest.raises(RuntimeError, match="attached already"):
        rlalign.attach(actor(workers[0]))
    assert rlalign.attach(actor(workers[0]), take_over=True).policy_version == 3


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"rlalign": "0.0.1"}, r"it runs rlalign 0\.0\.1, the driver"),
        ({"mode": "off"}, r"runs vLLM's own head \(bfloat16\).*RLALIGN_HEAD=float32 in its environment"),
        ({"ranks": 2}, "1 of 2 rollout ranks answered the handshake"),
        ({"sampled_steps": 4}, "has sampled in 4 steps before it was attached"),
        ({"multiplied": {"probe": BFLOAT16}}, "promises float32 logits"),
    ],
)  # fmt: skip
def test_one_wrong_answer_and_nothing_is_attached(changes, said):
    llm = FakeLLM(**changes)
    with pytest.raises(RuntimeError, match=said):
        rlalign.attach(llm)
    assert llm.worker.owner is None


def test_an_engine_without_our_rpcs_says_what_is_missing():
    llm = FakeLLM()
    llm.worker.answer = lambda method, *args: getattr(object(), method)
    with pytest.raises(
        RuntimeError, match="has no worker RPC rlalign_identity: rlalign's plugin was not loaded.*VLLM_PLUGINS"
    ):
        rlalign.attach(llm)


def test_a_held_llm_refuses_and_goes_on_afterwards():
    llm = FakeLLM()
    line = LLMLine(llm)
    line.hold("weights of nobody")
    with pytest.raises(RuntimeError, match="must not generate: weights of nobody"):
        llm.generate(["x"])
    line.release(1)
    assert llm.generate(["x"]) == "tokens" and "generate" not in vars(llm)
    llm.reset_prefix_cache = lambda: False
    with pytest.raises(RuntimeError, match="did not reset its prefix cache"):
        line.release(2)


def test_samples_take_turns_until_every_tensor_had_its_own(tmp_path, monkeypatch):
    import safetensors.torch

    handle = rlalign.attach(FakeLLM(), shared=tmp_path)
    seen, turns = [], []
    monkeypatch.setattr(safetensors.torch, "save_file", lambda tensors, file: seen.append(set(tensors)))
    weights = [(f"w{i}", torch.zeros(2)) for i in range(7)]
    for _ in range(4):
        handle.verify(weights, sample=2)
        turns.append(handle.every_tensor_had_its_turn)
    assert [len(names) for names in seen] == [2] * 4 and set().union(*seen) == dict(weights).keys()
    assert turns == [False, False, False, True]
    assert handle.verify(weights).complete and handle.verify(weights, sample=9).complete
    with pytest.raises(ValueError, match="sample must be a positive number of tensors"):
        handle.verify(weights, sample=0)
    with pytest.raises(ValueError, match="offered no weights"):
        handle.verify([])


@pytest.mark.parametrize(
    "name, tensor, said",
    [
        ("layers.0._flat_param", torch.zeros(3), "an FSDP flat parameter, many tensors in one"),
        ("lm_head.weight", torch.zeros(0), "empty; under ZeRO-3 it is partitioned"),
    ],
)
def test_shards_are_never_taken_for_tensors(tmp_path, name, tensor, said):
    handle = rlalign.attach(FakeLLM(), shared=tmp_path)
    with pytest.raises(ValueError, match=f"{name} is {said}.*named_weights"):
        handle.verify([(name, tensor)])
