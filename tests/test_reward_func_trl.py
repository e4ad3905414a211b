"""The reward function under TRL's released GRPO trainer: its own `_calculate_rewards` calls it and reads the answer."""

import asyncio
import logging
import threading
from types import SimpleNamespace

import pytest
import torch

from tests.peers import without_transport
from tests.reward_models import scorer_of

pytestmark = pytest.mark.engine  # importing TRL's trainer takes seconds


@pytest.fixture(scope="module")
def trl_module():
    with without_transport():
        import trl.trainer.grpo_trainer as module
    return module


@pytest.fixture
def loop():
    running = asyncio.new_event_loop()
    thread = threading.Thread(target=running.run_forever, daemon=True)
    thread.start()
    yield running
    running.call_soon_threadsafe(running.stop)
    thread.join()
    running.close()


def rewards(module, monkeypatch, loop, functions, prompts, completions, metrics):
    """[B, F] rewards as the trainer collects them, in one process."""
    monkeypatch.setattr(module, "gather", lambda tensor: tensor)
    monkeypatch.setattr(module, "logger", logging.getLogger("trl"))  # accelerate's wants a started accelerator
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device=torch.device("cpu"), is_main_process=True),
        args=SimpleNamespace(report_to=[]), state=SimpleNamespace(global_step=3), environments=None, async_loop=loop,
        reward_funcs=functions, reward_processing_classes=[None] * len(functions),
        reward_func_names=[module.get_callable_name(f) for f in functions],
        _log_completion_extra=lambda *a: None, _log_metric=metrics.__setitem__,
        _metrics={"train": {}}, model=SimpleNamespace(training=True),
    )  # fmt: skip
    inputs = [{"prompt": p, "answer": "4"} for p in prompts]
    ids = [[1, 2]] * len(prompts)
    return module.GRPOTrainer._calculate_rewards(trainer, inputs, prompts, completions, ids)


def test_trl_gets_our_rewards_and_leaves_failed_samples_out(trl_module, monkeypatch, loop):
    scorer, metrics = scorer_of("one_label"), {}
    prompts, completions = ["2 + 2 ="] * 4, [" 4", " five", "", " six"]
    found = rewards(trl_module, monkeypatch, loop, [scorer.as_reward_func()], prompts, completions, metrics)
    expected = scorer.score_conversations(prompts, completions).rewards()
    assert found[2].isnan().all()  # TRL's spelling of None: nothing is added, nothing is zero
    torch.testing.assert_close(found[[0, 1, 3], 0], torch.tensor([expected[i] for i in (0, 1, 3)]))
    assert metrics == {"one_label/failed_frac": 0.25}


def test_two_reward_models_run_side_by_side(trl_module, monkeypatch, loop):
    functions = [scorer_of("one_label").as_reward_func(), scorer_of("three_labels").as_reward_func(label_index=2)]
    found = rewards(trl_module, monkeypatch, loop, functions, ["a", "b"], ["c", "d"], {})
    second = scorer_of("three_labels").score("b", "d").scores[0][2]
    assert found.shape == (2, 2) and float(found[1, 1]) == pytest.approx(float(second), abs=1e-5)
