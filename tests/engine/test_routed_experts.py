"""Routed experts on the real engine: every token the trainer scores goes where the rollout sent it, cached prompts included."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rlalign import mismatch
from rlalign.config import TrainerConfig, compose, load
from rlalign.diagnose.families.family_table import RECIPES
from rlalign.run.step import scored
from rlalign.run.train import train
from rlalign.tasks import Task
from rlalign.tiny_policy.tokenizer import byte_tokenizer
from rlalign.types import collate
from tests.engine.conftest import ROLLOUT, start
from tests.engine.updates import start_policy

LAYERS, K, EXPERTS = 4, 2, 16


def build(folder, family="qwen3-moe", *, sharp=20.0):
    """A random mixture whose gates are scaled up until they decide sharply."""
    tokenizer, recipe = byte_tokenizer(256), RECIPES[family]
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    sizes = {"num_hidden_layers": LAYERS, "num_experts": EXPERTS, "num_local_experts": EXPERTS}
    config = AutoConfig.for_model(recipe.model_type, **recipe.arguments() | special | sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.lm_head.weight.data.mul_(6.0)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.mlp.gate.weight, std=0.02 * sharp)
        layer.mlp.experts.down_proj.data.mul_(20.0)
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    return build(tmp_path_factory.mktemp("mixture"))


def rollouts_of(engine, samples=4):
    """Prompts longer than a block of the KV cache, most of which later completions take from the prefix cache."""
    prompt = torch.randint(3, 250, (150,), generator=torch.Generator().manual_seed(5)).tolist()
    prompts = [prompt, [*prompt[:140], 7], [1, 40, 41]]
    return engine.generate(prompts, prompt_ids=range(3), samples=samples, seed=3)


def k3(old_BL, batch):
    lag_B = torch.zeros(len(batch), dtype=torch.int64)
    return mismatch.compare(old_BL, batch.rollout_logprobs_BL, batch.loss_mask_BL, lag_B=lag_B, positions=False)[
        "lag0/k3"
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_trainer_takes_the_rollouts_experts_and_k3_falls(mixture, dtype):
    engine = start(mixture, dtype=dtype, rollout=replace(ROLLOUT, replay_experts="all"))
    policy = start_policy(mixture, TrainerConfig(pack_tokens=600), dtype=dtype, replay_experts="known")
    try:
        cold, warm = rollouts_of(engine), rollouts_of(engine)  # the second time, prompts are cached
        batch = collate(cold + warm, pad_token_id=0, spec=engine.spec)
        assert batch.routes.count_B.tolist() == [len(r.token_ids) - 1 for r in cold + warm]
        assert batch.routes.experts_ELK.shape[1:] == (LAYERS, K) and engine.routed.bytes_per_token == LAYERS * K
        _, old_BL, _, metrics = scored(policy, batch)
        own_BL = scored(policy, replace(batch, routes=None))[1]
        assert metrics["routes/own"] == 0.0 and metrics["routes/bytes_per_token"] == LAYERS * K
        if dtype == "float32":  # both sides route alike, so that routes of other tokens would show
            assert metrics["routes/differ"] < 2e-3 and k3(old_BL, batch) < 1e-8
        else:
            assert metrics["routes/tokens_differ"] > 0.02 and k3(old_BL, batch) < 0.7 * k3(own_BL, batch)
            again = scored(policy, batch)[1]
            assert torch.equal(old_BL, again)
    finally:
        policy.close()
        engine.close()


@pytest.mark.parametrize("schedule", ["synchronous", pytest.param("one_step_off", marks=pytest.mark.nightly)])
def test_a_run_replays_the_routes_of_every_version_in_every_form(mixture, tmp_path, monkeypatch, schedule):
    """ZeRO-3, packed rows, activation checkpoints, after publishes; ahead: lag 1, and batches in checkpoints keep their routes."""
    monkeypatch.setattr(Task, "reward", lambda self, prompt, completion: float(len(completion) % 2))
    folder, ahead = tmp_path / "run", schedule != "synchronous"
    options = [
        f"model.path={mixture}", f"output_dir={folder}", "steps=3", "model.dtype=float32", "algo.lr=1e-4", "algo=tis",
        "rollout.prompts_per_step=4", "rollout.group_size=4", "task.train_size=32", "task.eval_size=4", "tracking=off",
        "rollout.replay_experts=all", "trainer.zero_stage=3", "trainer.gradient_checkpointing=true", "trainer.pack_tokens=512",
        f"schedule.mode={schedule}",
    ]  # fmt: skip
    options += ["schedule.probe_every=1", "schedule.k3_limit=10", "checkpoint.every=2"] if ahead else []

    def run(*more):
        train(load(compose("demo", [*options, *more])))
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        rows = list({row["step"]: row for row in lines}.values())  # the last of each step
        timed = ("time/", "seconds", "_per_s")
        return [{k: v for k, v in row.items() if not any(t in k for t in timed)} for row in rows]

    rows = run()
    assert [row["rollout/policy_version"] for row in rows] == ([0, 0, 1] if ahead else [0, 1, 2])
    assert all(row["routes/own"] == 0 and row["mismatch/lag0/k3"] < 1e-8 and row["train/grad_norm"] > 0 for row in rows)
    differ = [row["routes/differ"] for row in rows]
    if ahead:
        assert differ[0] < 2e-3 < min(differ[1:]), "the gates moved on; tokens of an older version keep their experts"
        assert run("checkpoint.resume=must") == rows
    else:
        assert max(differ) < 2e-3, (
            "float32: every publish brings the gates to the engine, and routes are of the new ones"
        )


def test_a_dense_model_has_nothing_to_replay(untied):
    with pytest.raises(Exception, match="has no mixture of experts; use rollout.replay_experts=off"):
        start(untied, rollout=replace(ROLLOUT, replay_experts="all"))
