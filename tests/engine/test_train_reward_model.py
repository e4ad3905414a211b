"""A genuine reward model, from vLLM's own verified samples to the reward of a run: in process, by URL, and on two ranks."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rlalign.config import compose, load
from rlalign.ranks import environment_without_launcher, free_port
from rlalign.reward.mixture import Sample
from rlalign.reward.training.fit import bradley_terry_loss
from rlalign.run.assembly import SharedReward
from rlalign.run.train import train
from rlalign.tiny_policy import cached_policy

ROOT = Path(__file__).parents[2]
TRAINING = [
    "--batch-size",
    "64",
    "--micro-batch-size",
    "64",
    "--learning-rate",
    "1e-3",
    "--max-length",
    "64",
    "--save-dtype",
    "float32",
]
RUN = ["tracking=off", "rollout.prompts_per_step=16", "task.eval_size=64", "reward=tiny"]


def python(*arguments, **options):
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment_without_launcher(), capture_output=True, text=True, **options
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    path = tmp_path_factory.mktemp("samples") / "samples.jsonl"
    python("scripts/verified_samples.py", "--out", path, "--prompts", 1024, "--config-name", "demo")
    return path


@pytest.fixture(scope="module")
def reward_model(samples, tmp_path_factory):
    out = tmp_path_factory.mktemp("rm") / "rm"
    python(
        "scripts/train_reward_model.py", "--rows", samples, "--base", cached_policy("untied"), "--out", out, *TRAINING
    )
    return out


def rows_of(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def run(directory, *overrides, steps=3):
    return train(load(compose("demo", [f"output_dir={directory}", f"steps={steps}", *RUN, *overrides])))


def test_the_samples_are_the_policys_and_the_verifiers(samples):
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len({row["prompt"] for row in rows}) == 1024 and 0.3 < sum(row["label"] for row in rows) / len(rows) < 0.6
    for row in rows[:200]:
        a, b = (int(n) for n in row["prompt"].rstrip("= ").split("+"))
        assert row["label"] == float(row["completion"].strip() == str(a + b))


def test_the_reward_model_tells_right_from_wrong_on_prompts_it_never_saw(reward_model):
    quality = json.loads((reward_model / "reward_model.json").read_text())["quality"]
    assert quality["auroc"] > 0.6 and quality["calibration"].startswith("platt-")


@pytest.fixture(scope="module")
def learned(reward_model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("learned") / "run"
    run(
        directory,
        f"+reward.models.rm={{path: {reward_model}, shape: probability, calibration: own, empty: -5.0}}",
        steps=20,
    )
    return directory


def slope_of(values: list[float]) -> tuple[float, float]:
    """Least-squares rise per step, and its standard error from the values' own scatter around the line."""
    steps = torch.arange(len(values), dtype=torch.float64)
    y = torch.tensor(values, dtype=torch.float64)
    spread = (steps - steps.mean()).square().sum()
    rise = ((steps - steps.mean()) * y).sum() / spread
    left = y - y.mean() - rise * (steps - steps.mean())
    return float(rise), float((left.square().sum() / (len(values) - 2) / spread).sqrt())


def test_the_policy_learns_what_the_reward_model_alone_rewards(learned):
    """Its rewards rise by more than they scatter. Nothing is asked of the verifier's, which no sample is trained on."""
    rows = rows_of(learned)
    rise, error = slope_of([row["reward/rm/mean"] for row in rows])
    assert rise > 2 * error, "no more than the steps differ among themselves"
    assert all(row["reward/mean"] == row["reward/rm/mean"] != row["reward/verifier/mean"] for row in rows)
    assert all(row["reward/failed"] == 0 and 0 < row["reward/rm/mean"] < 1 for row in rows)
    assert (learned / "report.html").exists()


@pytest.fixture
def server(reward_model, tmp_path):
    port = free_port("127.0.0.1")
    log = (tmp_path / "server.log").open("w")
    command = [sys.executable, "-m", "rlalign.cli", "serve", str(reward_model), "--port", str(port)]
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
    url = f"http://127.0.0.1:{port}"
    for _ in range(6000):
        try:
            urllib.request.urlopen(f"{url}/health", timeout=1)
            break
        except OSError:
            assert process.poll() is None, (tmp_path / "server.log").read_text()
            time.sleep(0.1)
    else:
        pytest.fail(f"the server did not come up: {(tmp_path / 'server.log').read_text()}")
    yield SimpleNamespace(url=url, process=process)
    process.kill()
    process.wait()


def served(server, reward_model) -> list[str]:
    where = {"url": server.url, "model": reward_model, "raw": "true", "timeout_s": 3, "tokenizer": reward_model}
    return [
        "reward.models.rm.path=''",
        f"reward.models.rm.calibration={reward_model}/calibration.json",
        *(f"reward.models.rm.server.{name}={value}" for name, value in where.items()),
    ]


def test_a_served_model_gives_the_rewards_of_the_one_in_process(server, reward_model, learned, tmp_path):
    run(tmp_path / "there", *served(server, reward_model), steps=1)
    here, there = rows_of(learned)[0], rows_of(tmp_path / "there")[0]
    for key in ("reward/rm/raw_mean", "reward/rm/raw_std", "reward/mean", "train/grad_norm"):
        assert there[key] == pytest.approx(here[key], abs=1e-4), key


def test_a_server_killed_in_the_middle_gives_reasons_and_never_zeros(server, reward_model):
    reward = SharedReward(load(compose("demo", [*RUN, *served(server, reward_model)])), say=lambda line: None)
    batch = [Sample(prompt="12 + 13 =", completion=f" {n}", verified=0.0, group=0, tokens=3) for n in range(20, 28)]
    assert reward(batch).known_B.all()
    os.kill(server.process.pid, signal.SIGKILL)
    server.process.wait()
    with pytest.raises(
        RuntimeError, match="8 of 8 samples have no reward: rm: server: .*Nothing was trained on this step"
    ):
        reward(batch)


@pytest.mark.nightly
def test_two_ranks_train_the_model_of_one(samples, tmp_path):
    few = tmp_path / "few.jsonl"
    few.write_text("".join(samples.read_text().splitlines(keepends=True)[:700]))
    common = ["scripts/train_reward_model.py", "--rows", few, "--base", cached_policy("untied")]
    one = [*TRAINING[:2], "--micro-batch-size", "32", *TRAINING[4:]]
    python(*common, "--out", tmp_path / "one", *one)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    python(*launch, *common, "--out", tmp_path / "two", *one)
    from safetensors.torch import load_file

    alone, together = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, weight in alone.items():
        torch.testing.assert_close(
            together[name], weight, rtol=2e-3, atol=2e-4, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("centring", [None, 0.01])
def test_the_pair_loss_is_that_of_trls_released_trainer(centring):
    from tests.peers import without_transport

    with without_transport():
        from trl.trainer.reward_trainer import RewardTrainer
    logits = torch.randn(10, 1, generator=torch.Generator().manual_seed(0)) * 3
    metrics = {"eval": {name: [] for name in ("min_reward", "mean_reward", "max_reward", "accuracy", "margin")}}
    same = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False), args=SimpleNamespace(center_rewards_coefficient=centring), accelerator=same,
        _metrics=metrics, _total_train_tokens=0,
    )  # fmt: skip
    theirs = RewardTrainer.compute_loss(trainer, lambda **_: SimpleNamespace(logits=logits.clone()), {})
    chosen, rejected = logits[:, 0].chunk(2)
    assert bradley_terry_loss(chosen, rejected, centring=centring or 0.0).item() == pytest.approx(theirs.item())
