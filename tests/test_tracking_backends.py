"""One run shown everywhere at once, stopped and resumed; every backend read back with its own reader."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from rlalign.config import TrackingConfig
from rlalign.tracking.backends import Places, places_of
from rlalign.tracking.run_directory import HISTOGRAMS, WORST, Run
from rlalign.tracking.token_files import sampled_tokens, worst_tokens

N = 40
EVIL = "|</td><script>_*`"


def columns() -> dict[str, np.ndarray | list[str]]:
    """Tokens whose log-ratios are 0, 0.01, 0.02, ...; token 7 has none, token 3 is not sampled."""
    numbers = {name: np.arange(N) for name in ("sequence", "position", "token_id", "prompt_id", "group_id")}
    numbers |= {name: np.zeros(N, int) for name in ("policy_version", "kv_version", "lag")}
    rollout = np.full(N, -1.0)
    rollout[7] = -math.inf
    floats = {"old_logprob": -1.0 + np.arange(N) / 100, "rollout_logprob": rollout, "reward": np.ones(N)}
    floats |= {"entropy": np.ones(N), "advantage": np.linspace(-1, 1, N)}
    return numbers | floats | {"token": [f"t{i}{EVIL}" for i in range(N)], "loss_mask": np.arange(N) != 3}


def metrics(step: int, value: float) -> dict[str, float]:
    return {"mismatch/lag0/k3": value, "reward/mean": 0.1 * step, "nan": math.nan, "worst": math.inf}


def write_everywhere(root: Path) -> None:
    """Steps 0 to 2, then a second process's worth that goes back after step 0 and runs 1 to 3 again."""
    names = {"group": "ab", "job_type": "fp32", "tags": ("one", "two")}
    places = Places(backends=("wandb", "tensorboard", "trackio"), wandb_mode="offline", **names)
    given = {"config": {"lr": 1e-4}, "project": "project", "name": "run", "places": places}
    with Run(root / "run", **given) as run:
        for step in range(3):
            run.log(step, metrics(step, 10.0))
        run.event("alert/warn", "k3 <b>rose</b>")
        time.sleep(1)  # ten samples of the machine, on a busy one at least one
        run.finish({})
    with Run(root / "run", resume=True, **given) as run:
        run.rewind(0)
        for step in (1, 2, 3):
            run.log(step, metrics(step, float(step)))
            run.log_tokens(step, columns())
        run.finish({"reward_last": 0.3})


@pytest.fixture(scope="module")
def everywhere(tmp_path_factory):
    """What `write_everywhere` leaves, by a process of its own: trackio fixes its folder when it is imported, and TRL imports it."""
    root = tmp_path_factory.mktemp("everywhere")
    environment = os.environ | {
        "TRACKIO_DIR": str(root / "trackio"),
        "WANDB_X_STATS_SAMPLING_INTERVAL": "0.1",
        "NETRC": str(root / "netrc"),
    }
    environment.pop("WANDB_API_KEY", None)
    script = f"from pathlib import Path; from {__name__} import write_everywhere; write_everywhere(Path({str(root)!r}))"
    subprocess.run([sys.executable, "-c", script], env=environment, cwd=Path(__file__).parents[1], check=True)
    return root


@pytest.fixture(scope="module")
def wandb_records(everywhere):
    """What wandb's own tool reads in the store of each process."""
    run, tool = everywhere / "run", Path(sys.executable).with_name("wandb")
    stores = sorted((run / "wandb").glob("offline-run-*"))
    read = [
        subprocess.run([tool, "leet", "inspect", "--json", s], capture_output=True, text=True, check=True)
        for s in stores
    ]
    return [[json.loads(line) for line in each.stdout.splitlines()] for each in read]


def of_kind(records: list[dict], kind: str) -> list[dict]:
    return [record[kind] for record in records if record["type"] == kind]


@pytest.mark.slow
def test_wandb_knows_group_definitions_and_system_metrics_and_a_resumed_run_keeps_its_id(everywhere, wandb_records):
    first, second = wandb_records
    (began,), (resumed,) = of_kind(first, "run"), of_kind(second, "run")
    assert (began["run_group"], began["job_type"], began["tags"]) == ("ab", "fp32", ["one", "two"])
    assert began["run_id"] == resumed["run_id"] == json.loads((everywhere / "run/run.json").read_text())["wandb"]["id"]
    defined = {m["name"]: m for m in of_kind(first, "metric") if "name" in m}
    assert defined["mismatch/lag0/k3"]["summary"] == {"max": True, "mean": True, "last": True}
    assert defined["mismatch/lag0/k3"]["step_metric"] == "step"
    assert any("memory_percent" in each["item"] for each in of_kind(first, "stats"))
    (alert,) = of_kind(first, "alert")
    assert alert["title"] == "run: alert/warn" and "after step 2: k3 <b>rose</b>" in alert["text"]


@pytest.mark.slow
def test_wandb_gets_the_rows_the_histograms_and_the_worst_tokens(everywhere, wandb_records):
    first, second = wandb_records
    rows = [each["item"] for each in of_kind(second, "history")]
    assert [row["step"] for row in rows] == [1, 2, 3] and [row["mismatch/lag0/k3"] for row in rows] == [1, 2, 3]
    assert of_kind(first, "history")[-1]["item"]["step"] == 2
    assert all(sum(rows[0][f"{name}.values"]) == N - 1 - (name in LOSES_ONE) for name in HISTOGRAMS)
    assert rows[0]["mismatch/log_ratio/nonfinite"] == 1
    (path, *_) = sorted((everywhere / "run").glob("wandb/*/files/media/table/mismatch/worst_tokens_1_*.table.json"))
    table = json.loads(path.read_text(), parse_constant=pytest.fail)
    tokens = [row[table["columns"].index("token")] for row in table["data"]]
    ratios = [row[table["columns"].index("log_ratio")] for row in table["data"]]
    assert tokens[:3] == [f"t7{EVIL}", f"t39{EVIL}", f"t38{EVIL}"] and len(tokens) == 20
    assert ratios[0] is None and ratios[1] == pytest.approx(0.39) and f"t3{EVIL}" not in tokens


LOSES_ONE = ("mismatch/log_ratio", "rollout/token_logprob")  # of the token whose rollout logprob is -inf


def test_a_step_behind_wandbs_own_counter_is_not_lost(monkeypatch):
    """Online, a resumed run counts on where it stood: a row under that number would be dropped without an error."""
    from rlalign.tracking import wandb_run

    class Online:
        step = 5
        logged: list = []  # noqa: RUF012

        def log(self, row, step):
            assert step >= self.step
            self.logged.append((step, row["step"]))

    run = object.__new__(wandb_run.WandbRun)
    run.run, run._offset = Online(), None
    for step in (3, 4, 5):
        run.log(step, {})
    assert Online.logged == [(5, 3), (6, 4), (7, 5)]


@pytest.mark.slow
def test_tensorboard_reads_back_every_number_and_hides_what_was_run_again(everywhere):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(everywhere / "run/tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    found.Reload()
    points = [(event.step, event.value) for event in found.Scalars("mismatch/lag0/k3")]
    assert points == [(0, 10.0), (1, 1.0), (2, 2.0), (3, 3.0)]
    assert math.isnan(found.Scalars("nan")[0].value) and found.Scalars("worst")[0].value == math.inf
    histogram = found.Histograms("mismatch/log_ratio")[-1].histogram_value
    assert histogram.num == N - 2 and histogram.max == pytest.approx(0.39)
    texts = {tag: found.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in found.Tags()["tensors"]}
    assert "k3 <b>rose" in texts["events/alert/warn/text_summary"] and '"lr": 0.0001' in texts["config/text_summary"]
    table = texts[f"{WORST}/text_summary"].splitlines()
    assert (
        len(table) == 22 and {line.count("|") for line in table} == {table[0].count("|")} and "<script" not in table[2]
    )


TRACKIO_READER = """
import json, trackio
(run,) = trackio.Api().runs("project")
print(json.dumps({"id": run.id, "config": run.config, "alerts": run.alerts()}))
"""


@pytest.mark.slow
def test_trackio_reads_back_rows_alerts_and_the_run_it_goes_on_with(everywhere):
    environment = os.environ | {"TRACKIO_DIR": str(everywhere / "trackio")}

    def asked(*command: str) -> dict:
        done = subprocess.run([sys.executable, "-c", *command], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    own_command = "from trackio.cli import main; main()"
    metric = ("--project", "project", "--json", "--run", "run", "--metric", "mismatch/lag0/k3")
    values = asked(own_command, "get", "metric", *metric)["values"]
    assert [(v["step"], v["value"]) for v in values][-3:] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    run = asked(TRACKIO_READER)
    assert run["id"] == json.loads((everywhere / "run/run.json").read_text())["trackio"]["id"]
    assert (run["config"]["_Group"], run["config"]["lr"]) == ("ab", 1e-4)
    (alert,) = [each for each in run["alerts"] if each["title"] == "alert/warn"]
    assert (alert["text"], alert["level"], alert["step"]) == ("k3 <b>rose</b>", "warn", 2)
    said = [json.loads(line) for line in (everywhere / "run/events.jsonl").read_text().splitlines()]
    assert str(everywhere / "trackio") in next(each["message"] for each in said if each["kind"] == "trackio")


def test_the_worst_tokens_are_the_sampled_ones_with_the_largest_ratio():
    rows = worst_tokens(4, sampled_tokens(columns()), count=3)
    assert [row["position"] for row in rows] == [7, 39, 38] and {row["step"] for row in rows} == {4}
    assert rows[0]["log_ratio"] == math.inf and type(rows[1]["lag"]) is int
    assert worst_tokens(0, sampled_tokens({name: column[:0] for name, column in columns().items()})) == []


@pytest.mark.parametrize(
    ("name", "extra"), [("tensorboard", "tensorboard"), ("trackio", "trackio"), ("wandb", "train")]
)
def test_a_missing_package_is_said_before_the_older_run_is_touched(tmp_path, monkeypatch, name, extra):
    with Run(tmp_path / "run", config={}, wandb_mode="disabled", project="p", name="n") as run:
        run.finish({})
    before = sorted(path.name for path in tmp_path.iterdir())
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        ValueError, match=rf"tracking.backends={name} needs the package {name}: pip install 'rlalign\[{extra}\]'"
    ):
        Run(tmp_path / "run", config={}, project="p", name="n", places=Places(backends=(name,)), overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_package_that_is_switched_off_need_not_be_there(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with Run(tmp_path / "run", config={}, wandb_mode="disabled", project="p", name="n") as run:
        run.finish({})
    assert json.loads((tmp_path / "run/run.json").read_text())["wandb"]["mode"] == "disabled"


def test_the_configuration_says_where_a_run_shows():
    places = places_of(TrackingConfig(backends=["trackio"], group="ab", tags=["x"], prometheus_port=9400))
    assert places == Places(backends=("trackio",), group="ab", tags=("x",), port=9400)
    assert places_of(TrackingConfig()) == Places()
    for wrong in ({"backends": ["tensorbord"]}, {"backends": ["wandb", "wandb"]}, {"prometheus_port": 70000}):
        with pytest.raises(ValueError, match=r"tracking\.(backends|prometheus_port)"):
            TrackingConfig(**wrong)
