"""Every way the lm_head can change under a running engine: its next logits belong to the weight as it is now.

Exactly means: the bits of `head.project` on the parameter read at that moment, and of the same request served with a cold
cache. vLLM's own float32 head multiplies by another kernel, so it is met to 1e-5 nats instead.
The rows are run three times: with everything on; without the sample of the content; without the hooks as well. The rows that
turn stale are the proof that each layer is needed, and a row that stops doing so says that one can go.
"""

import ctypes
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
import vllm
from vllm.config import WeightTransferConfig
from vllm.distributed.weight_transfer import WeightTransferEngineFactory

from rlalign.head import projection
from rlalign.head.cache import Epoch
from rlalign.rollout import GLOO_TRANSFER, hooks, versions
from rlalign.rollout.head.logits_processor import CACHE
from rlalign.weights.bucket import BufferBucket
from rlalign.weights.groups import GlooGroup
from tests.engine.conftest import bare_engine, logits_through, perturbed, worker_of

NAME = "lm_head.weight"
SEEDS = iter(range(1000, 2000))


class Rig:
    """One engine, its lm_head, and new weights on demand."""

    def __init__(self, folder, shared):
        self.folder, self.shared = folder, shared
        self.llm = bare_engine(folder, weight_transfer_config=WeightTransferConfig(backend=GLOO_TRANSFER))
        self.thread = ThreadPoolExecutor(1)  # the trainer's side of a transfer; the engine's is this thread
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        joining = self.thread.submit(GlooGroup, store, 0, 2, address="127.0.0.1", timeout_s=20)
        told = {"address": "127.0.0.1", "port": store.port, "size": 2, "timeout_s": 20, "engine": "embedded"}
        self.rpc("init_weight_transfer_engine", init_info=told)
        self.trainer = joining.result()
        self.hidden = torch.randn(40, 128, generator=torch.Generator().manual_seed(0)).bfloat16()

    def rpc(self, name, **arguments):
        return self.llm.collective_rpc(name, kwargs=arguments)

    @property
    def weight(self):
        return worker_of(self.llm)._rlalign_named_head()[1].weight

    def new_rows(self):
        """A new weight in vLLM's padded shape."""
        rows = torch.zeros_like(self.weight)
        rows[:288] = self.new_model().lm_head.weight
        return rows

    def new_model(self):
        return perturbed(self.folder, seed=next(SEEDS), size=0.05).requires_grad_(False)

    def logits(self):
        return logits_through(self.llm, self.hidden, self.shared)

    def truth(self):
        """The projection of the parameter as it is now."""
        return projection.project(self.hidden, self.weight.detach().clone())[:, :288]

    def is_fresh(self):
        return torch.equal(self.logits(), self.truth())

    def sampled(self):
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=8, seed=1, logprobs=0)
        (output,) = self.llm.generate([{"prompt_token_ids": [1, 40, 41]}], params, use_tqdm=False)
        chosen = output.outputs[0]
        return [(t, entry[t].logprob) for t, entry in zip(chosen.token_ids, chosen.logprobs, strict=True)]


@pytest.fixture(scope="module")
def rig(untied, tmp_path_factory):
    rig = Rig(untied, tmp_path_factory.mktemp("shared"))
    yield rig
    rig.trainer.close()
    rig.llm.llm_engine.engine_core.shutdown()


def in_place(write):
    def change(rig):
        with torch.no_grad():
            write(rig.weight, rig.new_rows())

    return change


def memcpy(weight, new):
    ctypes.memmove(weight.data_ptr(), new.data_ptr(), new.nbytes)


def load_weights(rig):
    worker_of(rig.llm).get_model().load_weights([(NAME, rig.new_model().lm_head.weight)])


def reload_disk(rig):
    rig.new_model().save_pretrained(rig.shared / "checkpoint")
    rig.rpc("reload_weights", weights_path=str(rig.shared / "checkpoint"))


def reload_iterator(rig):
    rig.rpc("reload_weights", weights_iterator=list(rig.new_model().named_parameters()))


def reload_partial(rig):
    rig.rpc("reload_weights", weights_iterator=[(NAME, rig.new_model().lm_head.weight)])


def reload_kernel_format(rig):
    with torch.no_grad():
        rig.rpc("reload_weights", weights_iterator=[(NAME, rig.new_rows())], is_checkpoint_format=False)


def reload_outside_an_rpc(rig):
    worker_of(rig.llm).reload_weights(weights_iterator=iter(list(rig.new_model().named_parameters())))


def transfer(rig):
    bucket = BufferBucket(torch.empty(2**20, dtype=torch.uint8))
    for name, parameter in rig.new_model().named_parameters():
        bucket.add(name, parameter)
    rig.rpc("start_weight_update")
    sending = rig.thread.submit(rig.trainer.send, bucket, watch=lambda: None)
    rig.rpc("update_weights", update_info={"entries": [entry.plain() for entry in bucket.entries]})
    sending.result()
    rig.rpc("finish_weight_update")


def reset(rig):
    rig.rpc("reset_weights")


def callable_rpc(rig):
    new = rig.new_rows()
    rig.llm.collective_rpc(lambda wrapper: wrapper.model_runner.model.lm_head.weight.data.copy_(new))


def callable_method(rig):
    new = rig.new_rows()
    rig.llm.collective_rpc(lambda wrapper: wrapper.get_model().lm_head.weight.data.copy_(new))


SEEN_BY_METADATA = {
    "param.copy_": in_place(lambda w, new: w.copy_(new)),
    "slice": in_place(lambda w, new: w[:16].add_(new[:16])),
    "detach().copy_": in_place(lambda w, new: w.detach().copy_(new)),
    "data =": in_place(lambda w, new: setattr(w, "data", new)),
    "reload, kernel format": reload_kernel_format,
}
SEEN_BY_HOOKS = {
    "model.load_weights": load_weights,
    "reload, disk": reload_disk,
    "reload, iterator": reload_iterator,
    "reload, partial": reload_partial,
    "reload, no RPC": reload_outside_an_rpc,
    "weight transfer": transfer,
    "callable RPC, model_runner": callable_rpc,
    "callable RPC, get_model": callable_method,
}
if versions.parse(vllm.__version__) >= (0, 32):
    SEEN_BY_HOOKS["reset_weights"] = reset  # /weight_checker reset
SEEN_BY_CONTENT = {"data.copy_": in_place(lambda w, new: w.data.copy_(new)), "memcpy": in_place(memcpy)}
ROUTES = SEEN_BY_METADATA | SEEN_BY_HOOKS | SEEN_BY_CONTENT


@pytest.fixture(autouse=True)
def restored(rig):
    """Every row starts from a whole model and a warm cache, since some routes leave none."""
    rig.rpc("reload_weights", weights_path=str(rig.folder))
    rig.logits()


def hooks_off(monkeypatch, *reasons):
    bump = Epoch.bump
    quiet = classmethod(lambda cls, reason="caller": None if reason in reasons else bump(reason))
    monkeypatch.setattr(Epoch, "bump", quiet)


@pytest.mark.parametrize("change", ROUTES.values(), ids=ROUTES)
@pytest.mark.parametrize("copies", [True, False], ids=["copy", "as the host chooses"])
def test_the_next_logits_belong_to_the_new_weight(rig, change, copies, request):
    if copies:
        request.getfixturevalue("fp32_copies")
    rig.sampled()
    before, weight = rig.logits(), rig.weight.detach().clone()
    change(rig)
    assert not torch.equal(rig.weight, weight), "the route changed nothing: this row shows nothing"
    assert rig.is_fresh() and not torch.equal(rig.logits(), before)
    warm = rig.sampled()
    CACHE.drop()
    assert rig.sampled() == warm, "a cold cache gives other logprobs"

    ours = rig.logits().log_softmax(-1)
    rig.rpc("rlalign_set_head", mode="native")
    native = rig.logits().log_softmax(-1)
    rig.rpc("rlalign_set_head", mode="cached")
    assert (ours - native).abs().max() < 1e-5


def test_sleeping_releases_the_copy_and_keeps_the_weight(rig, fp32_copies):
    before = rig.logits()
    assert CACHE.nbytes > 0
    rig.rpc("sleep", level=1)
    assert CACHE.nbytes == 0
    rig.rpc("wake_up")
    assert rig.is_fresh() and torch.equal(rig.logits(), before)


@pytest.mark.parametrize("route", ROUTES)
def test_without_the_sample_only_writes_behind_our_back_are_missed(rig, route, fp32_copies, monkeypatch):
    monkeypatch.setattr(CACHE, "check_every", 10**9)
    rig.logits()
    ROUTES[route](rig)
    assert rig.is_fresh() == (route not in SEEN_BY_CONTENT)


@pytest.mark.parametrize("route", ROUTES)
def test_without_hooks_and_sample_the_metadata_misses_what_it_is_known_to_miss(rig, route, fp32_copies, monkeypatch):
    monkeypatch.setattr(CACHE, "check_every", 10**9)
    hooks_off(monkeypatch, hooks.RPC, hooks.CALLABLE, hooks.LOADER)
    rig.logits()
    ROUTES[route](rig)
    assert rig.is_fresh() == (route in SEEN_BY_METADATA)


ONLY_GUARD = {hooks.RPC: callable_method, hooks.CALLABLE: callable_rpc, hooks.LOADER: load_weights}


@pytest.mark.parametrize("hook", ONLY_GUARD)
def test_each_hook_is_the_only_guard_of_some_route(rig, hook, fp32_copies, monkeypatch):
    monkeypatch.setattr(CACHE, "check_every", 10**9)
    rig.logits()
    with monkeypatch.context() as patch:
        hooks_off(patch, hook)
        ONLY_GUARD[hook](rig)
        assert not rig.is_fresh()
    Epoch.bump()
    rig.logits()
    ONLY_GUARD[hook](rig)
    assert rig.is_fresh()


def test_a_forward_in_the_middle_of_an_update_is_refused(rig, fp32_copies):
    rig.rpc("start_weight_update")
    try:
        with pytest.raises(RuntimeError, match=r"lm_head.weight is on the meta device.*Pause generation"):
            rig.logits()
    finally:
        rig.rpc("finish_weight_update")
    assert rig.is_fresh()


def test_a_transfer_names_what_it_cannot_use(rig):
    nobody = {"address": "127.0.0.1", "port": 9, "size": 2, "timeout_s": 0.3, "engine": "embedded"}
    engine = WeightTransferEngineFactory.create_engine(
        WeightTransferConfig(backend=GLOO_TRANSFER),
        worker_of(rig.llm).vllm_config,
        torch.device("cpu"),
        torch.nn.Module(),
    )
    with pytest.raises(RuntimeError, match="init_weight_transfer_engine was not called"):
        engine.update_weights({"entries": []})
    with pytest.raises(RuntimeError, match="cannot reach the trainer at 127.0.0.1:9.*weights.address"):
        engine.init_transfer_engine(engine.parse_init_info(nobody))
    transfer(rig)
    assert rig.is_fresh()
