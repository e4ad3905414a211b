"""A real run, replayed offline: every bit comes back, and what was changed since is found on the side it was changed on."""

import json
import shutil
from dataclasses import replace

import pytest
from safetensors.torch import load_file, save_file

from rlalign import cli
from rlalign.diagnose.replay import replay as once_more
from rlalign.run import assembly
from rlalign.run.parties import MismatchLimitError
from tests.engine.test_train import lively, small_run

__all__ = ["lively"]  # a fixture


@pytest.fixture(scope="module")
def run(tmp_path_factory, untied):
    """Four steps away from the defaults: the master head, another temperature, two micro-batches."""
    directory = tmp_path_factory.mktemp("replay") / "run"
    options = ["head_dtype=master", "rollout.temperature=0.8", "trainer.micro_batch_size=8", "algo.lr=1e-3"]
    with pytest.MonkeyPatch.context() as patch:
        from rlalign.tasks import Task

        patch.setattr(Task, "reward", lambda self, prompt, completion: float(len(completion) % 2))
        small_run(untied, directory, *options, "tracking.replay_every=2", "algo.minibatches=2", steps=3)
    return directory


def test_every_bit_comes_back(run, tmp_path, capsys):
    file = tmp_path / "replay.json"
    assert cli.main(["replay", str(run), "--step", "2", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert [a["verdict"] for a in found["answers"]] == ["bit for bit", "bit for bit"]
    assert found["version"] == 4 and found["answers"][0]["tokens"] > 16
    for logged, stored, replayed in found["metrics"].values():
        assert logged == stored == replayed
    assert "the step reproduces" in capsys.readouterr().out


def test_weights_that_changed_show_on_both_sides(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (file,) = (copy / "replay" / "step-000002" / "model").glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.layers.1.mlp.down_proj.weight"][:, ::7] *= 1.05
    save_file(tensors, file, metadata={"format": "pt"})
    found = once_more(copy, 2)
    assert not found.reproduced and [a.verdict for a in found.answers] == ["differs", "differs"]


def test_numbers_of_one_side_that_changed_show_on_that_side(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    file = copy / "replay" / "step-000002" / "batch.safetensors"
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    row, column = tensors["loss_mask_BL"].nonzero()[-1].tolist()
    tensors["old_logprobs_BL"][row, column] -= 1e-3
    save_file(tensors, file, metadata=metadata)
    found = once_more(copy, 2)
    assert [a.verdict for a in found.answers] == ["bit for bit", "differs"]
    assert found.answers[1].tokens - found.answers[1].equal == 1 and not found.reproduced


def test_the_step_that_stopped_a_run_can_be_replayed_and_the_run_says_why(untied, tmp_path, lively, monkeypatch):
    """A trainer that scores at another temperature than the engine samples at: stopped, explained, and there again later."""
    real = assembly.start_policy

    def at_one(model, config, probed):
        return real(model, replace(config, rollout=replace(config.rollout, temperature=1.0)), probed)

    monkeypatch.setattr(assembly, "start_policy", at_one)
    with pytest.raises(MismatchLimitError):
        small_run(untied, tmp_path / "run", "rollout.temperature=0.6", "tracking.replay_every=100")
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    (diagnosis,) = [e["message"] for e in events if e["kind"] == "diagnosis"]
    assert diagnosis.startswith("1. temperature (1.00): the trainer's scores are its model's at temperature 1")
    found = once_more(tmp_path / "run", 0)
    assert [a.verdict for a in found.answers] == ["bit for bit", "differs"], (
        "offline the trainer scores at 0.6, as it should"
    )
