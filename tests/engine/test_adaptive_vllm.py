"""Adaptive temperature on hidden states that vLLM computed: the temperatures of a calibration fitted on transformers'."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlalign.reward.adaptive import AdaptiveTemperature, Projection, Training, token_batches
from tests.engine.conftest import bare_engine, build_model

DRAWN = torch.Generator().manual_seed(0)
PROMPTS = [torch.randint(3, 280, (8 + i % 5,), generator=DRAWN).tolist() for i in range(24)]
STARTS = [3] * len(PROMPTS)


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    """(folder's Projection, states by transformers, states by vLLM), one [L, D] per prompt."""
    from vllm.config import PoolerConfig

    folder = build_model(tmp_path_factory.mktemp("policy"), tied=False)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        ours = [model.base_model(torch.tensor([p])).last_hidden_state[0] for p in PROMPTS]
    # token_embed divides every state by its length unless told otherwise; the head reads the states themselves
    llm = bare_engine(
        folder, dtype="float32", runner="pooling", convert="embed", additional_config={}, worker_extension_cls="",
        pooler_config=PoolerConfig(use_activation=False),
    )  # fmt: skip
    outputs = llm.encode([{"prompt_token_ids": p} for p in PROMPTS], pooling_task="token_embed", use_tqdm=False)
    theirs = [output.outputs.data.float() for output in outputs]
    llm.llm_engine.engine_core.shutdown()
    return Projection.of(model), ours, theirs


def test_a_calibration_holds_on_vllms_hidden_states(states):
    projection, ours, theirs = states
    made = [token_batches(each, PROMPTS, STARTS, projection, batch_size=8) for each in (ours, theirs)]
    calibrator = AdaptiveTemperature(head="transformer", num_heads=4, training=Training(epochs=3)).fit(made[0])
    for mine, engines in zip(*made, strict=True):
        a, b = calibrator.confidence(mine), calibrator.confidence(engines)
        torch.testing.assert_close(a.temperature_N, b.temperature_N, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(a.top_N, b.top_N, rtol=1e-3, atol=1e-5)
        assert float(a.temperature_N.log().std()) > 0.05


def test_a_fit_on_vllms_hidden_states_is_the_fit_on_transformers(states):
    projection, ours, theirs = states
    a, b = (
        AdaptiveTemperature(head="linear", training=Training(epochs=3)).fit(
            token_batches(each, PROMPTS, STARTS, projection, batch_size=8)
        )
        for each in (ours, theirs)
    )
    assert a.diagnostics_.loss_after == pytest.approx(b.diagnostics_.loss_after, rel=1e-3)
    assert a.diagnostics_.loss_after < 0.98 * a.diagnostics_.loss_before
    for mine, engines in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.temperatures(mine[None]), b.temperatures(engines[None]), rtol=2e-2, atol=1e-3)
