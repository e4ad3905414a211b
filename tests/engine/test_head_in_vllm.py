"""The fp32 head inside the real engine: it runs, it is what it says, and whatever prevents it stops the run."""

import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlalign.head import projection, routes
from rlalign.rollout.engine import handshake
from tests.engine.conftest import sample, start


@pytest.fixture(scope="module")
def engine(untied):
    engine = start(untied)
    yield engine
    engine.close()


def engine_logits(engine, hidden, tmp_path, batch):
    file = tmp_path / "hidden.safetensors"
    save_file({"hidden_ND": hidden}, file)
    return load_file(engine.head_logits(file, batch=batch))["logits_NV"]


def test_every_rank_reports_the_patched_head(engine):
    sample(engine)
    (status,) = engine.status()
    assert status["class"] == handshake.LAYER and status["mode"] == "cached"
    assert status["calls"] > 0 and status["head"] == "lm_head: ParallelLMHead/UnquantizedEmbeddingMethod"
    padded = 4 * 320 * 128  # vLLM pads 288 rows to a multiple of 64
    assert status["copies"] == (status["route"] == "onednn_bf16"), "only that product wants a float32 copy"
    assert status["cache_bytes"] == (padded if status["copies"] else 0)


def test_every_rank_proves_its_bits_with_the_head_that_it_uses(engine):
    (status,) = engine.status()
    assert status["bits"] == routes.bits(projection.project, 128, torch.bfloat16, torch.bfloat16)
    hidden = torch.empty(1, 128, dtype=torch.bfloat16)
    if not status["copies"]:
        assert status["route"] == projection.route(hidden, hidden) and status["kernel"] == routes.kernel_name(
            projection.route(hidden, hidden), hidden, hidden
        )


def test_the_fp32_copy_is_made_once_where_it_is_needed(engine, fp32_copies):
    (before,) = engine.status()
    for _ in range(3):
        sample(engine)
    (status,) = engine.status()
    direct = projection.route(torch.empty(1, 128, dtype=torch.bfloat16), torch.empty(1, 128, dtype=torch.bfloat16))
    copied = projection.Route.ONEDNN_BF16 if direct is projection.Route.MKL_BF16 else direct
    assert status["copies"] and status["route"] == copied
    assert status["cache_bytes"] == 4 * 320 * 128 and status["rebuilds"] == before["rebuilds"] + 1
    assert status["caught_by_fingerprint"] == before["caught_by_fingerprint"]


def test_with_and_without_a_copy_the_bits_are_the_same(engine, tmp_path, request):
    hidden = torch.randn(48, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    direct = {batch: engine_logits(engine, hidden, tmp_path, batch) for batch in (1, 16)}
    request.getfixturevalue("fp32_copies")
    assert all(torch.equal(engine_logits(engine, hidden, tmp_path, batch), x) for batch, x in direct.items())


def test_logits_are_float32_exact_and_independent_of_the_decode_batch(engine, untied, tmp_path):
    weight = load_file(untied / "model.safetensors")["lm_head.weight"]
    hidden = torch.randn(48, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = hidden.double() @ weight.double().t()
    ours = engine_logits(engine, hidden, tmp_path, 48)
    engine.set_head("off")
    bf16 = engine_logits(engine, hidden, tmp_path, 48)
    engine.set_head("native")
    native = engine_logits(engine, hidden, tmp_path, 48)
    engine.set_head("cached")
    assert (ours - exact).abs().max() < 1e-4 * exact.abs().max()
    assert (bf16 - exact).abs().max() > 100 * (ours - exact).abs().max(), (
        "the bf16 head is as good: this test shows nothing"
    )
    assert torch.allclose(ours, native, atol=1e-4, rtol=0)
    for batch in (1, 3, 16):
        assert torch.equal(engine_logits(engine, hidden, tmp_path, batch), ours)


def test_sampling_is_reproducible_and_does_not_depend_on_the_batch(engine):
    from tests.engine.conftest import PROMPTS

    together, again = sample(engine), sample(engine)
    assert together == again
    first = engine.generate(PROMPTS[:1], prompt_ids=[0], samples=4, seed=3)
    assert [r.token_ids for r in first] == [r.token_ids for r in together[:4]]
    assert sample(engine, seed=4) != together


def test_texts_are_those_that_vllm_itself_would_make(engine, monkeypatch):
    """The random model says bytes that are no UTF-8, characters cut off in the middle, and special tokens."""
    ours = sample(engine, seed=5, samples=32)
    monkeypatch.setattr(engine, "_core", None)
    assert sample(engine, seed=5, samples=32) == ours
    assert any("\ufffd" in r.text for r in ours) and {r.finish_reason for r in ours} == {"stop", "length"}


def test_breaking_the_patched_path_breaks_the_run(engine, monkeypatch):
    """If the engine could fall through to vLLM's own head, this would still generate."""
    from rlalign.rollout.head.logits_processor import AlignedLogitsProcessor

    def broken(self, lm_head, hidden_states, embedding_bias):
        raise ZeroDivisionError("the patched head was executed")

    with monkeypatch.context() as patch:
        patch.setattr(AlignedLogitsProcessor, "_apply_head", broken)
        with pytest.raises(ZeroDivisionError, match="patched head was executed"):
            sample(engine)


def test_prompts_that_do_not_fit_are_refused_by_name(engine):
    with pytest.raises(ValueError, match="prompt 7 has 250 tokens.*must have 1 to 244"):
        engine.generate([[1] * 250], prompt_ids=[7], samples=2, seed=0)
    with pytest.raises(ValueError, match="prompt 8 has 0 tokens"):
        engine.generate([[]], prompt_ids=[8], samples=2, seed=0)


def test_a_plugin_left_out_by_vllm_plugins_stops_the_run(untied, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "some_other_plugin")
    with pytest.raises(RuntimeError, match="VLLM_PLUGINS='some_other_plugin' leaves out 'rlalign'"):
        start(untied)


def test_a_plugin_that_fails_to_import_stops_the_run(untied, monkeypatch):
    monkeypatch.setitem(sys.modules, "rlalign.rollout.head_plugin", None)  # what a broken import looks like
    with pytest.raises(RuntimeError, match="plugin cannot be imported .*would log this and start without it"):
        start(untied)


def test_a_worker_without_the_plugin_stops_the_run(untied, monkeypatch):
    from vllm.model_executor.custom_op import op_registry_oot

    monkeypatch.delitem(op_registry_oot, "LogitsProcessor")
    with pytest.raises(RuntimeError, match=r"was built with vllm\..*LogitsProcessor: the plugin came too late"):
        start(untied)


def test_another_plugin_in_the_slot_stops_the_run(untied, monkeypatch):
    from vllm.model_executor.custom_op import op_registry_oot
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    class Theirs(LogitsProcessor):
        pass

    monkeypatch.setitem(op_registry_oot, "LogitsProcessor", Theirs)
    with pytest.raises(RuntimeError, match=r"another plugin holds vLLM's LogitsProcessor slot: .*Theirs\. Only one"):
        start(untied)


def test_a_patch_over_vllms_own_layer_stops_the_run(untied, monkeypatch):
    """As prime-rl's plugin does it: a function of its own in the place of `_get_logits`."""
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    def theirs(self, hidden_states, lm_head, embedding_bias):
        raise AssertionError("never called")

    monkeypatch.setattr(LogitsProcessor, "_get_logits", theirs)
    with pytest.raises(
        RuntimeError,
        match=r"written over vLLM's LogitsProcessor: _get_logits \(now of .*test_head_in_vllm.*VLLM_PLUGINS",
    ):
        start(untied)


def test_a_model_that_bypasses_the_head_is_noticed():
    with pytest.raises(RuntimeError, match="rollout rank 1 generated tokens without calling"):
        handshake.require_called([{"rank": 0, "calls": 5}, {"rank": 1, "calls": 0}])


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"mode": "off"}, "rank 1: its head runs in mode 'off', this run needs 'cached'"),
        ({"rlalign": "0.0.9"}, "rank 1: it runs rlalign 0.0.9"),
    ],
)
def test_one_different_rank_is_named(answer, message):
    import rlalign

    good = {"class": handshake.LAYER, "slot_holder": handshake.LAYER, "mode": "cached", "rlalign": rlalign.__version__}
    good |= {"body_dtype": "bfloat16", "multiplied": {"probe": None, "sampled": None}}
    with pytest.raises(RuntimeError, match=message):
        handshake.require([good | {"rank": 0}, good | {"rank": 1} | answer], mode="cached", ranks=2)
    with pytest.raises(RuntimeError, match="1 of 2 rollout ranks answered"):
        handshake.require([good | {"rank": 0}], mode="cached", ranks=2)
