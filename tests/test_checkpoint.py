"""A checkpoint is whole or absent; the newest whole one is found; nothing is removed before its successor is complete."""

import json
import os
import subprocess

import pytest
import torch

from rlalign.run import checkpointing
from rlalign.run.checkpointing import MANIFEST, newest, require_same, save

CONFIG = {"seed": 0, "steps": 10, "algo": {"lr": 1e-3, "loss": "grpo"}}


def write(text="weights"):
    def into(folder):
        (folder / "policy").mkdir()
        (folder / "policy" / "state.pt").write_text(text)

    return into


def saved(run, step, *, keep=2, text="weights"):
    return save(run, step, config=CONFIG, state={"version": step + 1}, write=write(text), keep=keep)


def test_what_was_saved_is_found_again(tmp_path):
    saved(tmp_path, 4)
    found, passed_over = newest(tmp_path)
    assert (found.step, found.ranks, found.config, found.state) == (4, 1, CONFIG, {"version": 5})
    assert (found.folder / "policy" / "state.pt").read_text() == "weights" and passed_over == []


def test_the_newest_few_are_kept(tmp_path):
    for step in (1, 3, 5, 7):
        saved(tmp_path, step)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-000005", "step-000007"]


def test_a_run_without_checkpoints_has_none(tmp_path):
    assert newest(tmp_path) == (None, [])


def damage_a_byte(folder):
    file = folder / "policy" / "state.pt"
    file.write_bytes(b"Weights")  # same size, one bit


def lose_a_file(folder):
    (folder / "policy" / "state.pt").unlink()


def tear_the_manifest(folder):
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text[: len(text) // 2])


def another_format(folder):
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"format": 99}))


@pytest.mark.parametrize(
    "damage, said",
    [
        (damage_a_byte, "missing or changed: policy/state.pt"),
        (lose_a_file, "missing or changed: policy/state.pt"),
        (tear_the_manifest, "no readable checkpoint.json"),
        (another_format, "format 99, this version reads 2"),
    ],
)
def test_a_damaged_one_is_passed_over_and_said(tmp_path, damage, said):
    saved(tmp_path, 1)
    damage(saved(tmp_path, 3))
    found, passed_over = newest(tmp_path)
    assert found.step == 1
    assert passed_over[0].startswith("step-000003: ") and said in passed_over[0]


def test_a_failure_while_writing_leaves_the_older_ones(tmp_path):
    saved(tmp_path, 1)

    def full(folder):
        (folder / "half").write_text("x")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 3, config=CONFIG, state={}, write=full, keep=1)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]
    assert newest(tmp_path)[0].step == 1


def test_a_process_killed_while_writing_leaves_what_nobody_reads(tmp_path, monkeypatch):
    """The rename is the last thing: without it the folder stays hidden, and the next save of that step replaces it."""
    saved(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpointing.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            saved(tmp_path, 3)
    assert newest(tmp_path)[0].step == 1
    saved(tmp_path, 3, text="again")
    assert (newest(tmp_path)[0].folder / "policy" / "state.pt").read_text() == "again"
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-000001", "step-000003"]


def test_another_configuration_is_refused_by_name_unless_accepted(tmp_path):
    saved(tmp_path, 1)
    found, _ = newest(tmp_path)
    longer = CONFIG | {"steps": 99, "output_dir": "elsewhere", "tracking": {"eval_every": 3}}
    assert require_same(found, longer, accept_changes=False) == []
    other = CONFIG | {"algo": {"lr": 1e-4, "loss": "grpo"}}
    with pytest.raises(ValueError, match=r"algo.lr: 0.001 -> 0.0001.*checkpoint.accept_changes=true"):
        require_same(found, other, accept_changes=False)
    assert require_same(found, other, accept_changes=True) == ["algo.lr: 0.001 -> 0.0001"]


def test_another_number_of_ranks_is_refused(tmp_path, monkeypatch):
    saved(tmp_path, 1)
    found, _ = newest(tmp_path)
    monkeypatch.setattr(checkpointing.ranks, "world_size", lambda: 4)
    with pytest.raises(ValueError, match="written by 1 trainer ranks, this run has 4; resume with 1"):
        require_same(found, CONFIG, accept_changes=True)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 512 KiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a file system needs root")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(tmp_path)], check=True)
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_disk_that_fills_up_keeps_the_older_one_and_gives_the_space_back(small_disk):
    saved(small_disk, 1, text="w" * 200_000)
    for writer in (write("w" * 400_000), lambda folder: torch.save(torch.ones(100_000), folder / "state.pt")):
        with pytest.raises(
            OSError, match="No space left on device for the checkpoint of step 3; the older ones are kept"
        ):
            save(small_disk, 3, config=CONFIG, state={}, write=writer, keep=1)
    assert os.listdir(small_disk / "checkpoints") == ["step-000001"]
    assert newest(small_disk)[0].step == 1
    saved(small_disk, 3, keep=1, text="w" * 200_000)
    assert newest(small_disk)[0].step == 3


def test_what_a_killed_run_was_writing_is_cleared_by_the_next_save_of_any_step(tmp_path):
    left = tmp_path / "checkpoints" / ".step-000004.writing"
    left.mkdir(parents=True)
    (left / "half").write_text("x")
    saved(tmp_path, 9)
    assert os.listdir(tmp_path / "checkpoints") == ["step-000009"]


def test_nothing_becomes_visible_before_every_rank_has_written(tmp_path, monkeypatch):
    """Rank 0 of two, and the other one dies while it writes its shards."""
    saved(tmp_path, 1)

    def other_died():
        raise RuntimeError("Connection closed by peer")

    with monkeypatch.context() as patch:
        patch.setattr(checkpointing.ranks, "world_size", lambda: 2)
        patch.setattr(checkpointing.ranks, "on_first", lambda action: action())
        patch.setattr(checkpointing.ranks, "wait_for_all", other_died)
        with pytest.raises(RuntimeError, match="closed by peer"):
            saved(tmp_path, 3, keep=1)
    assert newest(tmp_path)[0].step == 1


def test_where_servers_are_may_change_between_a_checkpoint_and_its_resume(tmp_path):
    before = CONFIG | {
        "rollout": {"servers": ["http://a:1"], "max_tokens": 8},
        "weights": {"shared": "/a", "transport": "gloo"},
    }
    save(tmp_path, 1, config=before, state={}, write=write(), keep=1)
    found, _ = newest(tmp_path)
    elsewhere = before | {
        "rollout": {"servers": ["http://b:2"], "max_tokens": 8},
        "weights": {"shared": "/b", "transport": "gloo"},
    }
    assert require_same(found, elsewhere, accept_changes=False) == []
    with pytest.raises(ValueError, match="rollout.max_tokens: 8 -> 9"):
        require_same(found, before | {"rollout": {"servers": [], "max_tokens": 9}}, accept_changes=False)
