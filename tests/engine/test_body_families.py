"""rlalign.mirror(model, engine, body=True) on other stacks' models: vLLM and transformers' classes as they start them."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import rlalign
from benchmarks.body_families import KNOWN, gap, sampled, start
from rlalign.diagnose.families import building
from rlalign.rollout.worker import cpu
from rlalign.trainer.rounding.mirroring import body_of
from tests import kernel_parts

EQUAL = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "phi3", "granite", "cohere", "olmo2")


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    """Variables of the engine, and what its probe keeps, are this test's own; hosts without bf16 instructions need the kernel."""
    for name in ("RLALIGN_HEAD", "RLALIGN_STEADY"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("RLALIGN_CACHE", str(kernel_parts.library_in(tmp_path / "cache")))
    cpu.install_steady()  # vLLM loads plugins, which ask the variable, once per process: before another test's engine


def mirrored(family, folder):
    """((share of equal bits, k3) before and after, what was mirrored) of a family's tiny model."""
    building.build(KNOWN[family], folder)
    llm = start(folder)
    try:
        tokens, model = sampled(llm), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        engine = rlalign.attach(llm, after_generation=True)
        with rlalign.mirror(model) as mirror:
            before = gap(mirror, *tokens)
        with rlalign.mirror(model, engine, body=True) as mirror:
            body, after = mirror.body, gap(mirror, *tokens)
        assert body_of(model) is None, "restored with the head"
        with rlalign.mirror(model) as mirror:
            assert gap(mirror, *tokens) == before
        with pytest.raises(ValueError, match="pass the handle of rlalign.attach as engine="):
            rlalign.mirror(model, body=True)
    finally:
        llm.llm_engine.engine_core.shutdown()
    return before, after, body


@pytest.mark.parametrize("family", ["gemma3", *(pytest.param(f, marks=pytest.mark.nightly) for f in EQUAL)])
def test_a_known_family_has_the_engines_bits(family, tmp_path):
    before, after, body = mirrored(family, tmp_path)
    assert before[0] < 0.5 and after[0] == 1.0, body.describe()
    assert not body.left


@pytest.mark.nightly
def test_a_mixture_of_experts_is_mirrored_around_its_experts(tmp_path):
    before, after, body = mirrored("qwen3-moe", tmp_path)
    assert {"rope", "attention", "add_and_norm"} <= body.applied.keys()
    assert "Qwen3MoeExperts" in body.left["products"]
    assert after[1] < before[1]
