"""Prompts that cannot be used are found before the first step: refused by name, or dropped and counted."""

import json

import pytest

from rlalign.config import ModelConfig, RolloutConfig, RunConfig, TaskConfig
from rlalign.diagnose.doctor import tokens
from rlalign.run import assembly
from rlalign.tasks import Prompt, Task
from rlalign.tiny_policy.tokenizer import byte_tokenizer

ROOM = 10


def task(*train, held_out=("h",)):
    made = [Prompt(prompt_id=i, text=t, answer="1", source={}) for i, t in enumerate([*train, *held_out])]
    return Task(
        name="t", seed=0, train=tuple(made[: len(train)]), held_out=tuple(made[len(train) :]), verify=lambda *_: True
    )


def config(unusable="stop", **rollout):
    room = {"max_model_len": ROOM + 6, "max_tokens": 6, "prompts_per_step": 2} | rollout
    return RunConfig(task=TaskConfig(name="x", unusable_prompts=unusable), rollout=RolloutConfig(**room))


def encode(text):
    return [ord(c) for c in text]


def test_prompts_that_fit_are_left_alone():
    whole = task("a" * ROOM, "b")
    assert assembly.fitted(whole, config(), encode, 128) == (whole, 0)


@pytest.mark.parametrize(
    "bad, why", [("a" * (ROOM + 1), "11 tokens"), ("\x80", "token id 128, the model has 128 rows"), ("", "no token")]
)
def test_one_that_does_not_fit_stops_or_is_dropped_wherever_it_is(bad, why):
    for whole in (task("x", "y", bad), task("x", "y", held_out=("h", bad))):
        with pytest.raises(
            ValueError, match=f"1 of 4 prompts cannot be used .room for {ROOM} tokens.*{why}.*unusable_prompts=drop"
        ):
            assembly.fitted(whole, config(), encode, 128)
        left, dropped = assembly.fitted(whole, config("drop"), encode, 128)
        assert dropped == 1 and [p.text for p in (*left.train, *left.held_out)] == ["x", "y", "h"]


def test_too_few_that_are_left_stop_the_run():
    for whole in (task("x", "a" * 99), task("x", "y", held_out=("a" * 99,))):
        with pytest.raises(ValueError, match="are left, and a run needs rollout.prompts_per_step=2 and 1"):
            assembly.fitted(whole, config("drop"), encode, 128)
    with pytest.raises(ValueError, match="choose one of stop, drop"):
        TaskConfig(name="x", unusable_prompts="skip")


@pytest.fixture
def folder(tmp_path):
    byte_tokenizer(256).save_pretrained(tmp_path)
    return tmp_path


def text_config(folder, size, **more):
    about = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "vocab_size": size}, **more}
    (folder / "config.json").write_text(json.dumps(about))


def test_a_multimodal_folder_has_its_vocabulary_in_its_text_config(folder):
    ours = byte_tokenizer(256)
    text_config(folder, len(ours))
    assert len(assembly.load_tokenizer(folder)) == len(ours)
    text_config(folder, 100)
    with pytest.raises(ValueError, match="the model only 100 rows of embeddings"):
        assembly.load_tokenizer(folder)


def test_a_placeholder_behind_the_last_row_is_no_wrong_tokenizer(folder):
    ours = byte_tokenizer(256)
    size = len(ours)
    ours.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    ours.save_pretrained(folder)
    text_config(folder, size)
    loaded = assembly.load_tokenizer(folder)
    ids = assembly.encode(loaded, "1<image_soft_token>", chat=False)
    assert max(ids) == size
    with pytest.raises(ValueError, match=f"token id {size}, the model has {size} rows"):
        assembly.fitted(
            task("x", "y", "1<image_soft_token>"), config(), lambda t: assembly.encode(loaded, t, chat=False), size
        )
    ours.add_tokens(["<a word>"])
    ours.save_pretrained(folder)
    with pytest.raises(ValueError, match="do not belong together"):
        assembly.load_tokenizer(folder)


def test_the_doctor_looks_at_every_prompt(folder, tmp_path):
    ours = byte_tokenizer(256)
    text_config(folder, len(ours))
    rows = [{"prompt": f"{n}", "answer": "1"} for n in range(30)] + [{"prompt": "9" * 200, "answer": "1"}]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    for unusable, state in (("stop", "problem"), ("drop", "ok")):
        run = RunConfig(
            model=ModelConfig(path=str(folder)),
            task=TaskConfig(name=f"jsonl:{file}", train_size=29, eval_size=2, unusable_prompts=unusable),
            rollout=RolloutConfig(max_model_len=64, max_tokens=32),
        )
        check = tokens.prompts_fit(run, folder, ours)
        assert check.state == state and "1 of 31 prompts cannot be used" in check.found
