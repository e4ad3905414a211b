"""A head is what its name says: measured on a live engine, whatever the checkpoint claims or another patch does."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file

from rlalign.head import projection
from rlalign.rollout.engine import handshake
from rlalign.rollout.head import logits_processor
from rlalign.rollout.head.logits_processor import AlignedLogitsProcessor
from tests.engine.conftest import bare_engine, logits_through, sample, start, worker_of


@pytest.fixture(scope="module")
def claiming(untied, tmp_path_factory):
    """A checkpoint whose own config.json asks for a float32 head."""
    folder = tmp_path_factory.mktemp("claiming") / "model"
    shutil.copytree(untied, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"head_dtype": "float32"}))
    return folder


@pytest.fixture(scope="module")
def engine(claiming):
    engine = start(claiming)
    yield engine
    engine.close()


def test_the_dtype_of_live_logits_is_in_the_status(engine):
    assert engine.status()[0]["multiplied"]["probe"]["dtype"] == "float32"
    sample(engine)
    (status,) = engine.status()
    assert status["multiplied"]["sampled"]["dtype"] == "float32"
    found = status["multiplied"]["sampled"]
    assert found["max_error"] < found["bfloat16_error"] / 100
    before = status["calls"]
    assert engine.status()[0]["calls"] == before, "a probe counts as a call"


def rounding_product(original):
    return lambda *args, **kwargs: original(*args, **kwargs).bfloat16().float()


def test_a_product_that_rounds_is_named(engine, monkeypatch):
    """The planted fault: the mode says cached, the numbers are bfloat16."""
    for name in ("decode_logits", "head"):
        module = logits_processor if name == "decode_logits" else projection
        name = name if name == "decode_logits" else "project"
        monkeypatch.setattr(module, name, rounding_product(getattr(module, name)))
    with pytest.raises(
        RuntimeError, match=r"mode 'cached', which promises float32 logits; measured in a probe: bfloat16 \("
    ):
        handshake.require(engine.status(), mode="cached", ranks=1)
    sample(engine)
    assert engine.status()[0]["multiplied"]["sampled"]["dtype"] == "bfloat16"
    with pytest.raises(RuntimeError, match="promises float32"):
        handshake.require_multiplied(engine.status())


def test_another_patch_around_the_layer_is_named(engine, monkeypatch):
    monkeypatch.setattr(AlignedLogitsProcessor, "_get_logits", rounding_product(AlignedLogitsProcessor._get_logits))
    with pytest.raises(RuntimeError, match="bfloat16 .*logits that leave the model are rounded behind it"):
        handshake.require(engine.status(), mode="cached", ranks=1)


def test_a_checkpoints_own_head_dtype_does_not_make_one_side_float32(claiming, untied, tmp_path):
    """head_dtype=model is the body's dtype, as in the trainer. Without settings of ours vLLM does as the checkpoint says."""
    hidden = torch.randn(16, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = load_file(untied / "model.safetensors")["lm_head.weight"]
    exact = hidden.double() @ weight.double().t()
    off = {}
    for name, arguments in {"ours": {"head_dtype": "model"}, "vLLM's": {"additional_config": {}}}.items():
        llm = bare_engine(claiming, **arguments)
        (status,) = llm.collective_rpc("rlalign_status")
        off[name] = (logits_through(llm, hidden, tmp_path) - exact).abs().max()
        assert (status["mode"], status["body_dtype"], status["claimed"]) == ("off", "bfloat16", "float32")
        if name == "ours":
            assert status["multiplied"]["probe"]["dtype"] == "bfloat16"
            handshake.require([status], mode="off", ranks=1)
        else:
            with pytest.raises(
                RuntimeError, match="mode 'off', which promises bfloat16 logits; measured in a probe: float32"
            ):
                handshake.require([status], mode="off", ranks=1)
        llm.llm_engine.engine_core.shutdown()
    assert off["ours"] > 100 * off["vLLM's"]


def test_settings_that_cannot_be_are_refused_before_anything_is_loaded(untied, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")  # a worker's own words would stay in its log
    for wrong, said in {
        "head_dtpye": "'head_dtpye' is no setting",
        "mode": 'mode "exact" in an engine that is not built in exact mode',
    }.items():
        with pytest.raises(ValueError, match=said):
            bare_engine(untied, additional_config={"rlalign": {"head_dtype": "float32", wrong: "exact"}})
    with pytest.raises(ValueError, match="'rl_align' is read by nobody"):
        bare_engine(untied, additional_config={"rl_align": {"head_dtype": "float32"}})


def test_one_line_in_the_log_says_what_runs_and_the_fields_spelling_is_understood(claiming):
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    log = logging.getLogger("vllm.rlalign")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        llm = bare_engine(claiming, additional_config={"fp32_lm_head": True})
        mode = worker_of(llm).rlalign_status()["mode"]
        llm.llm_engine.engine_core.shutdown()
    finally:
        log.removeHandler(handler)
        log.setLevel(logging.NOTSET)
    (line,) = lines
    assert mode == "cached" and line.startswith("rlalign: head float32, body bfloat16, mode cached, route ")
