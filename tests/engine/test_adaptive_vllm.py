"""Adaptive temperature on hidden states that vLLM computed: the temperatures of a calibration fitted on transformers'."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlalign.calibration.adaptive import AdaptiveTemperature, Projection, Training, token_batches
from tests.engine.conftest import bare_engine, build_model

START = 3


def sequences(model) -> list[list[int]]:
    """Random tokens, wrong wherever they are judged, and every other time the model's own, so right: T has to differ."""
    drawn, found = torch.Generator().manual_seed(0), []
    for i in range(24):
        ids = torch.randint(3, 280, (8 + i % 5,), generator=drawn).tolist()
        for at in range(START, len(ids) if i % 2 else 0):
            with torch.no_grad():
                ids[at] = int(model(torch.tensor([ids[:at]])).logits[0, -1].argmax())
        found.append(ids)
    return found


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    """Batches of the same sequences with states by transformers and by vLLM."""
    from vllm.config import PoolerConfig

    folder = build_model(tmp_path_factory.mktemp("policy"), tied=False)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = sequences(model)
    with torch.no_grad():
        ours = [model.base_model(torch.tensor([each])).last_hidden_state[0] for each in ids]
    # token_embed divides every state by its length unless told otherwise; the head reads the states themselves
    llm = bare_engine(
        folder, dtype="float32", runner="pooling", convert="embed", additional_config={}, worker_extension_cls="",
        pooler_config=PoolerConfig(task="token_embed", use_activation=False),
    )  # fmt: skip
    outputs = llm.encode([{"prompt_token_ids": each} for each in ids], pooling_task="token_embed", use_tqdm=False)
    theirs = [output.outputs.data.float() for output in outputs]
    llm.llm_engine.engine_core.shutdown()
    starts, projection = [START] * len(ids), Projection.of(model)
    return [token_batches(each, ids, starts, projection, batch_size=8) for each in (ours, theirs)]


def test_a_calibration_holds_on_vllms_hidden_states(states):
    calibrator = AdaptiveTemperature(head="transformer", num_heads=4, training=Training(epochs=3)).fit(states[0])
    found = [[calibrator.confidence(b) for b in each] for each in states]
    for mine, engines in zip(*found, strict=True):
        torch.testing.assert_close(mine.temperature_N, engines.temperature_N, rtol=2e-3, atol=1e-4)
        torch.testing.assert_close(mine.top_N, engines.top_N, rtol=2e-3, atol=1e-5)
    assert float(torch.cat([c.temperature_N for c in found[1]]).log().std()) > 0.1


def test_a_fit_on_vllms_hidden_states_is_the_fit_on_transformers(states):
    training = Training(epochs=3, least_steps=30)
    a, b = (AdaptiveTemperature(head="linear", training=training).fit(each) for each in states)
    assert a.diagnostics_.loss_after == pytest.approx(b.diagnostics_.loss_after, rel=1e-3)
    assert a.diagnostics_.loss_after < 0.9 * a.diagnostics_.loss_before
    for mine, engines in zip(*states, strict=True):
        torch.testing.assert_close(a.temperature_of(mine), b.temperature_of(engines), rtol=2e-2, atol=1e-3)
