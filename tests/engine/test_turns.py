"""Conversations on the real engine, in a run: sampled ids are never encoded again, and both sides agree on every turn."""

from __future__ import annotations

import json
import math
import shutil

from transformers import AutoTokenizer

from rlalign.config import compose, load
from rlalign.diagnose.replay import replay
from rlalign.rollout.engine.embedded import VLLMEngine
from rlalign.run.train import train
from rlalign.tiny_policy import cached_policy

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


def test_a_run_talks_with_its_environment_and_trains_on_every_turn(tmp_path, monkeypatch):
    model = tmp_path / "model"
    shutil.copytree(cached_policy("untied"), model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(model)
    asked, generate = [], VLLMEngine.generate

    def heard(self, prompts, **named):
        found = generate(self, prompts, **named)
        asked.append([(list(prompt), rollout.token_ids) for prompt, rollout in zip(prompts, found, strict=True)])
        return found

    monkeypatch.setattr(VLLMEngine, "generate", heard)
    small = [
        "rollout.prompts_per_step=4",
        "rollout.group_size=4",
        "task.train_size=32",
        "task.eval_size=8",
        "tracking=off",
    ]
    run = [f"model.path={model}", f"output_dir={tmp_path / 'run'}", "steps=2", "model.dtype=float32", *small]
    talks = [
        "task.environment=tests.talks:TwoSums",
        "task.max_turns=3",
        "tracking.eval_samples=1",
        "tracking.trace_every=1",
        "tracking.replay_every=1",
    ]
    summary = train(load(compose("demo", [*run, *talks])))

    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert summary["mismatch"]["lag0"]["k3_max"] < 1e-9
    for row in rows:
        ended = {key.rpartition("/")[2]: share for key, share in row.items() if key.startswith("turns/ended/")}
        assert (
            math.isclose(sum(ended.values()), 1.0) and ended.keys() <= {"done", "error", "cut"} and ended["done"] > 0.3
        )
        apart = {key: value for key, value in row.items() if key.startswith("trace/apart/")}
        assert row["trace/norm/layer01"] > 0 < row["trace/logit_std"] and len(apart) > 0 and max(apart.values()) < 1e-4
        assert row["turns/max"] == 2 and row["mismatch/turn1/k3"] < 1e-9 and row["mismatch/turn2/k3"] < 1e-9
        assert row["mismatch/turn1/tokens"] + row["mismatch/turn2/tokens"] == row["rollout/tokens"]
        assert (
            16 * ended.get("error", 0) <= row["reward/failed"] <= 16 * (1.0 - ended["done"])
        )  # cut ones keep what they have
    assert max(row["train/grad_norm"] for row in rows) > 0  # a step whose groups have equal rewards teaches nothing

    firsts = [ids for batch in asked for prompt, ids in batch]
    seconds = [prompt for batch in asked for prompt, _ in batch if prompt.count(tokenizer.eos_token_id)]
    second = tokenizer.encode("12 + 25 =", add_special_tokens=False)
    assert seconds and all(prompt[: -len(second)] in firsts and prompt[-len(second) :] == second for prompt in seconds)

    found = replay(tmp_path / "run", 1)
    assert found.reproduced and [answer.verdict for answer in found.answers] == ["bit for bit", "bit for bit"]
    assert found.answers[0].compared == found.answers[0].tokens == rows[1]["rollout/tokens"]
