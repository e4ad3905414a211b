"""rlalign replay without engines: what is saved comes back bit for bit, and every reason not to replay has its own sentence."""

import json
import math

import pytest
import torch

from rlalign import cli
from rlalign.diagnose.replay import Answer, Replay, replay, report
from rlalign.tracking import token_files
from rlalign.tracking.run_directory import Run
from rlalign.types import LogprobSpec, Rollout, collate


def batch_of(seed=0):
    generator = torch.Generator().manual_seed(seed)
    rollouts = [
        Rollout(
            token_ids=torch.randint(1, 9, (n + 2,), generator=generator).tolist(),
            loss_mask=[False, False] + [True] * n,
            rollout_logprobs=[0.0, 0.0, *(-torch.rand(n, generator=generator)).tolist()],
            prompt_id=7,
            group_id=0,
            finish_reason="stop",
            version_spans=[(2, n + 2, 3)],
        )
        for n in (2, 5)
    ]
    return collate(rollouts, pad_token_id=0, spec=LogprobSpec(temperature=0.7, head_dtype="master"))


def run_of(folder, *, config=None, steps=5):
    with Run(folder, config=config or {"name": "x"}, wandb_mode="disabled", project="p", name="x") as run:
        for step in range(steps):
            run.log(step, {"mismatch/lag0/k3": 1e-5})
        run.finish({})
    return folder


def save(run, step, *, whole=True):
    master = torch.randn(4, 3)
    token_files.save_weights(run, step, save=lambda folder: folder.mkdir(), master_VD=master)
    batch = batch_of()
    old = torch.randn(batch.token_ids_BL.shape)
    if whole:
        token_files.save_batch(run, step, batch, old, version=3, trainer_ranks=2)
    return batch, old, master


def test_a_step_comes_back_bit_for_bit(tmp_path):
    batch, old, master = save(tmp_path, 4)
    found = token_files.read_step(tmp_path, 4)
    for name in ("token_ids_BL", "rollout_logprobs_BL", "loss_mask_BL", "policy_version_BL", "prompt_id_B"):
        assert torch.equal(getattr(found.batch, name), getattr(batch, name))
    assert found.batch.spec == batch.spec and (found.step, found.version, found.trainer_ranks) == (4, 3, 2)
    assert torch.equal(found.old_logprobs_BL, old) and torch.equal(found.master_VD, master)


def test_every_step_that_cannot_be_replayed_says_why(tmp_path):
    with pytest.raises(ValueError, match="no such run directory"):
        replay(tmp_path / "nowhere", 0)
    run = run_of(tmp_path / "run")
    with pytest.raises(ValueError, match="step 9 was not logged; it logged steps 0 to 4"):
        replay(run, 9)
    with pytest.raises(
        ValueError, match=r"weights of step 3 were not saved \(it saved none\).*tracking.replay_every=N"
    ):
        replay(run, 3)
    save(run, 0), save(run, 2), save(run, 4, whole=False)
    with pytest.raises(ValueError, match=r"steps that can be replayed: 0, 2"):
        replay(run, 3)
    with pytest.raises(ValueError, match="the run ended before this step was saved whole; saved steps: 0, 2"):
        replay(run, 4)


def test_other_libraries_are_named_and_not_ignored(tmp_path):
    run = run_of(tmp_path / "run")
    save(run, 0)
    file = run / "environment.json"
    there = json.loads(file.read_text())
    there["versions"] |= {"vllm": "0.28.0", "wandb": "0.1"}
    file.write_text(json.dumps(there))
    with pytest.raises(ValueError, match=r"ran on other libraries \(vllm 0.28.0 then, .* now\).*--any-version"):
        replay(run, 0)
    with pytest.raises(
        ValueError, match="is not one of this version"
    ):  # past that check: the configuration is the next
        replay(run, 0, any_version=True)


def test_runs_of_other_versions_of_rlalign(tmp_path):
    run = run_of(tmp_path / "run", config={"name": "x", "rollout": {"gone": 1}})
    save(run, 0)
    with pytest.raises(ValueError, match=r"its configuration, by rlalign 0\.1\.0, is not one of this version: .*gone"):
        replay(run, 0)
    header = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(header | {"schema_version": 0}))
    with pytest.raises(ValueError, match="run directory of schema 0"):
        replay(run, 0)


def test_damaged_and_foreign_files(tmp_path):
    save(tmp_path, 0)
    file = token_files.folder_of(tmp_path, 0) / token_files.BATCH
    whole = file.read_bytes()
    file.write_bytes(whole[:40])
    with pytest.raises(ValueError, match="is damaged"):
        token_files.read_step(tmp_path, 0)
    file.write_bytes(whole.replace(b'\\"format\\": 1', b'\\"format\\": 9'))
    with pytest.raises(ValueError, match="saved in format 9, this rlalign reads 1"):
        token_files.read_step(tmp_path, 0)


def test_the_command_ends_with_one_line(tmp_path, capsys):
    assert cli.main(["replay", str(run_of(tmp_path / "run")), "--step", "3"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("rlalign: ") and error.count("\n") == 1


def answer(**changes):
    found = {"name": "x", "tokens": 9, "compared": 9, "equal": 9, "mean": 0.0, "worst": 0.0, "floor": 0.0}
    return Answer(**found | changes)


def test_verdicts():
    assert answer().verdict == "bit for bit"
    assert answer(equal=8, mean=1e-9).verdict == "differs", "a floor of zero excuses nothing"
    assert answer(equal=3, mean=2e-6, floor=1e-6).verdict == "within the floor"
    assert answer(equal=3, mean=2.1e-6, floor=1e-6).verdict == "differs"
    assert answer(compared=0, equal=0, mean=math.nan).verdict == "differs"
    assert answer(compared=5, equal=5).verdict == "within the floor", "the same bits until sampling took another way"


def test_a_log_that_its_own_tokens_contradict_does_not_reproduce():
    shared = {"run": "r", "step": 1, "version": 1, "answers": (answer(), answer()), "notes": ()}
    good = Replay(**shared, metrics={"k3": (1e-5, 1e-5, 1e-5)})
    bad = Replay(**shared, metrics={"k3": (1e-5, 2e-5, 2e-5)})
    assert good.reproduced and report(good).endswith("\nthe step reproduces")
    assert not bad.reproduced and report(bad).endswith("NOT reproduce")
