"""wandb offline: our keys, our step axis, no network, no login; read back with wandb's own reader."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from rlalign.tracking import wandb_run
from rlalign.tracking.run_directory import Run
from rlalign.tracking.wandb_run import resolve_mode


@pytest.fixture
def logged_out(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def test_auto_is_offline_without_a_login_and_online_with_one(logged_out, monkeypatch, tmp_path):
    assert resolve_mode("auto") == "offline"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password not-a-real-key\n")
    assert resolve_mode("auto") == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "http://wandb.example:8080")
    assert resolve_mode("auto") == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "not-a-real-key")
    assert resolve_mode("auto") == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert (resolve_mode("auto"), resolve_mode("offline")) == ("disabled", "offline")
    with pytest.raises(ValueError, match="dryrun"):
        resolve_mode("dryrun")


def test_a_login_without_a_network_is_recorded_offline_and_says_so(logged_out, monkeypatch, tmp_path):
    asked = []

    def unreachable(given, mode):
        asked.append(mode)
        if mode == "online":
            raise wandb_run.wandb.errors.CommError("no route to host")
        return wandb_run.wandb.init(mode="disabled", dir=str(given.directory))

    monkeypatch.setattr(wandb_run.WandbRun, "_init", staticmethod(unreachable))
    monkeypatch.setenv("WANDB_API_KEY", "not-a-real-key")
    given = {"config": {}, "project": "p", "name": "n"}
    run = Run(tmp_path / "auto", wandb_mode="auto", **given)
    assert asked == ["online", "offline"]
    assert "no route to host" in (tmp_path / "auto/events.jsonl").read_text()
    assert json.loads((tmp_path / "auto/run.json").read_text())["wandb"]["mode"] == "offline"
    run.finish({})
    with pytest.raises(wandb_run.wandb.errors.CommError):
        Run(tmp_path / "online", wandb_mode="online", **given)
    assert json.loads((tmp_path / "online/run.json").read_text())["status"] == "failed"


@pytest.mark.slow
def test_the_offline_store_holds_our_keys_and_histograms(logged_out, tmp_path, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", ModuleType("openai"))  # as beside vLLM: wandb then likes to advertise
    with Run(tmp_path / "run", config={"seed": 7}, wandb_mode="auto", project="p", name="n") as run:
        for step in range(3):
            run.log(step, {"mismatch/lag0/k3": 10.0**-step, "reward/mean": 0.5})
            run.log_histogram(step, "mismatch/log_ratio", np.array([0.0, 0.5, 1.0, np.nan]))
        run.finish({"reward_last": 0.5})
    printed = capfd.readouterr()
    assert "wandb" not in (printed.out + printed.err).lower()

    (store,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    wandb = Path(sys.executable).with_name("wandb")
    read = subprocess.run([wandb, "leet", "inspect", "--json", store], capture_output=True, text=True, check=True)
    records = [json.loads(line) for line in read.stdout.splitlines()]
    rows = [r["history"]["item"] for r in records if r["type"] == "history"]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert [row["mismatch/lag0/k3"] for row in rows] == [1.0, 0.1, 0.01]
    assert sum(rows[0]["mismatch/log_ratio.values"]) == 3 and rows[0]["mismatch/log_ratio/nonfinite"] == 1
    assert any(r["type"] == "metric" and "step" in json.dumps(r) for r in records)
