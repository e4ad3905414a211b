"""Splits that never overlap, a training order that can be resumed, and verifiers that pay for right answers alone."""

import json
import sys
import types

import pytest

from rlalign.tasks import Prompt, Task, load_task

ADDITION = {
    "min_terms": 2,
    "max_terms": 2,
    "min_digits": 2,
    "max_digits": 2,
    "operators": ["+"],
    "allow_parentheses": False,
    "prompt_field": "expression",
    "template": "{prompt} =",
}
ONE_DIGIT = ADDITION | {"min_digits": 1, "max_digits": 1}  # operands 0..10: 121 prompts


def addition(train_size=300, eval_size=50, seed=0):
    return load_task("basic_arithmetic", ADDITION, train_size=train_size, eval_size=eval_size, seed=seed)


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"jsonl:{path}"


def load(name, params=None, train_size=2, eval_size=1):
    return load_task(name, params or {}, train_size=train_size, eval_size=eval_size, seed=0)


def test_splits_are_disjoint_by_text_and_answers_are_right():
    task = addition()
    texts = [p.text for p in (*task.train, *task.held_out)]
    assert len(texts) == len(set(texts)) == 350
    assert len({p.prompt_id for p in (*task.train, *task.held_out)}) == 350
    for p in task.train:
        left, right = p.text.removesuffix(" =").split(" + ")
        assert int(left) + int(right) == int(p.answer)


def test_the_whole_task_can_be_split_and_not_one_prompt_more():
    everything = load_task("reasoning_gym:basic_arithmetic", ONE_DIGIT, train_size=100, eval_size=21, seed=3)
    assert {p.text for p in (*everything.train, *everything.held_out)} == {
        f"{a} + {b} =" for a in range(11) for b in range(11)
    }
    with pytest.raises(ValueError, match=r"found 121 distinct prompts, need 122 \(train_size 100 \+ eval_size 22\)"):
        load_task("basic_arithmetic", ONE_DIGIT, train_size=100, eval_size=22, seed=3)


def test_held_out_prompts_follow_the_seed_and_not_the_train_size():
    held_out = [p.text for p in addition().eval_prompts()]
    assert [p.text for p in addition(train_size=900).eval_prompts()] == held_out
    assert [p.text for p in addition(seed=10_000).eval_prompts()] != held_out


def test_training_prompts_are_a_function_of_seed_and_step():
    once, again, other = addition(), addition(), addition(seed=1)
    backwards = [again.train_prompts(step, 16) for step in reversed(range(40))][::-1]
    assert [once.train_prompts(step, 16) for step in range(40)] == backwards
    assert once.train_prompts(3, 16) != other.train_prompts(3, 16)


@pytest.mark.parametrize("count", [7, 60, 299, 300])
def test_every_epoch_visits_every_prompt_once_in_its_own_order(count):
    task = addition()
    stream = [p.prompt_id for step in range(900 // count + 1) for p in task.train_prompts(step, count)][:900]
    epochs = [stream[at : at + 300] for at in (0, 300, 600)]
    assert all(sorted(epoch) == sorted(p.prompt_id for p in task.train) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_more_prompts_than_the_split_holds_are_refused():
    with pytest.raises(ValueError, match=r"step 0 asks for 301 of 300"):
        addition().train_prompts(0, 301)


@pytest.mark.parametrize(
    ("written", "reward"),
    [("{}", 1.0), ("  {}\n", 1.0), ("x {}", 0.0), ("{}0", 0.0), ("{} {}", 0.0), ("", 0.0), (" \n", 0.0), ("junk", 0.0)],
)
def test_reward_strips_white_space_and_pays_nothing_for_parts(written, reward):
    task = addition()
    for prompt in task.train[:20]:
        assert task.reward(prompt, written.replace("{}", prompt.answer)) == reward
        assert task.reward(prompt, None) == 0.0


def test_a_scorer_that_raises_on_junk_says_wrong_and_still_accepts_the_answer():
    task = load("prime_factorization", train_size=4)
    prompt = task.train[0]
    assert task.reward(prompt, "x 7") == 0.0
    assert task.reward(prompt, "9" * 5000) == 0.0
    assert task.reward(prompt, prompt.answer) == 1.0


def test_a_scorer_that_fails_on_its_own_answer_stops_the_run():
    task = load("prime_factorization", train_size=4)
    prompt = task.train[0]
    broken = Prompt(prompt_id=0, text=prompt.text, answer="?", source={"answer": "?", "metadata": {}})
    with pytest.raises(RuntimeError, match=r"scorer of reasoning-gym task 'prime_factorization' fails on its own"):
        task.reward(broken, "2 x 2")


def test_a_task_without_one_reference_answer_is_still_verified():
    task = load("rubiks_cube", {"min_scramble_steps": 1, "max_scramble_steps": 1}, train_size=2, eval_size=0)
    assert task.train[0].answer == ""
    assert task.reward(task.train[0], "") == 0.0


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("basic_arithmetics", {}, r"unknown reasoning-gym task 'basic_arithmetics'; did you mean basic_arithmetic"),
        ("basic_arithmetic", {"digits": 2}, r"has no parameter digits; it takes .*min_digits"),
        ("basic_arithmetic", {"seed": 2}, r"has no parameter seed"),
        ("basic_arithmetic", {"min_terms": 0}, r"rejects .*min_terms must be positive"),
        ("basic_arithmetic", {"prompt_field": "text"}, r"no text in 'text'; prompt_field is one of .*'expression'"),
        ("basic_arithmetic", {"template": "Q:"}, r"template 'Q:' does not contain \{prompt\}"),
        ("basic_arithmetic", {"template": 3}, r"template must be text, got 3"),
        ("csv:a.csv", {}, r"unknown kind 'csv'"),
        ("jsonl:/nowhere.jsonl", {}, r"/nowhere.jsonl: no such file"),
        ("jsonl:/nowhere.jsonl", {"match": "close"}, r"match 'close' is not one of exact, numeric, last_number"),
        ("jsonl:/nowhere.jsonl", {"field": "q"}, r"has no parameter field"),
    ],
)
def test_bad_tasks_are_named(name, params, message):
    with pytest.raises(ValueError, match=message):
        load(name, params)


@pytest.mark.parametrize(("train_size", "eval_size"), [(0, 1), (1, -1)])
def test_sizes_must_make_sense(train_size, eval_size):
    with pytest.raises(ValueError, match=r"train_size .* must be >= 1"):
        load("basic_arithmetic", train_size=train_size, eval_size=eval_size)


def test_a_task_refuses_overlapping_splits():
    prompt = Prompt(prompt_id=0, text="1 + 1 =", answer="2", source={})
    same = Prompt(prompt_id=1, text="1 + 1 =", answer="2", source={})
    with pytest.raises(ValueError, match=r"prompts 0 and 1 have the same text"):
        Task(name="t", seed=0, train=(same,), held_out=(prompt,), verify=lambda p, a: True)
    with pytest.raises(ValueError, match=r"no training prompts"):
        Task(name="t", seed=0, train=(), held_out=(prompt,), verify=lambda p, a: True)


def test_jsonl_with_named_fields_and_template(tmp_path):
    name = jsonl(tmp_path / "t.jsonl", [{"q": f"{n}*{n}", "a": n * n} for n in range(5)])
    task = load(name, {"prompt_field": "q", "answer_field": "a", "template": "Q {prompt}\nA"}, train_size=4)
    by_text = {p.text: p for p in (*task.train, *task.held_out)}
    assert set(by_text) == {f"Q {n}*{n}\nA" for n in range(5)}
    assert task.reward(by_text["Q 3*3\nA"], " 9\n") == 1.0
    assert task.reward(by_text["Q 3*3\nA"], "9.0") == 0.0


@pytest.mark.parametrize(
    ("match", "right", "wrong"),
    [
        ("numeric", ["1234", "1,234", " 1234.0 "], ["1234 eggs", "1235", "", "nan", "1234 1234"]),
        ("last_number", ["1234", "so 3 + 1 makes 1,234.", "$1234.00"], ["1234 of 5", "none", "-1234"]),
    ],
)
def test_numeric_matches(tmp_path, match, right, wrong):
    name = jsonl(tmp_path / "t.jsonl", [{"prompt": "q", "answer": "because 7 #### 1,234"}])
    task = load(name, {"match": match, "answer_after": "####"}, train_size=1, eval_size=0)
    assert [task.reward(task.train[0], text) for text in right] == [1.0] * len(right)
    assert [task.reward(task.train[0], text) for text in wrong] == [0.0] * len(wrong)


GOOD = {"prompt": "a", "answer": "1"}


@pytest.mark.parametrize(
    ("lines", "params", "message"),
    [
        ([], {}, r"is empty: no rows"),
        ([GOOD, {"prompt": "b"}], {}, r"t.jsonl:2: no field 'answer'; it has prompt"),
        ([GOOD, {"prompt": "b", "answer": None}], {}, r"t.jsonl:2: field 'answer' must be non-empty text or a number"),
        ([GOOD, {"prompt": " ", "answer": "1"}], {}, r"t.jsonl:2: field 'prompt' must be non-empty"),
        ([GOOD, ["b", "1"]], {}, r"t.jsonl:2: expected a JSON object"),
        ([GOOD, GOOD], {}, r"t.jsonl:2: same prompt as \S+t.jsonl:1: 'a'"),
        ([GOOD, {"prompt": "b", "answer": "x"}], {"match": "numeric"}, r"t.jsonl:2: answer 'x' is not a number"),
        ([GOOD], {"answer_after": "####"}, r"t.jsonl:1: answer_after '####' does not occur"),
        ([{"prompt": "a", "answer": "1 ####"}], {"answer_after": "####"}, r"t.jsonl:1: nothing follows"),
        ([GOOD, {"prompt": "b", "answer": 2}], {}, r"found 2 distinct prompts, need 3"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(tmp_path, lines, params, message):
    with pytest.raises(ValueError, match=message):
        load(jsonl(tmp_path / "t.jsonl", lines), params)


def test_a_broken_line_is_named(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"prompt": "a", "answer": "1"}\n\n{"prompt": \n')
    with pytest.raises(ValueError, match=r"t.jsonl:3: not JSON"):
        load(f"jsonl:{tmp_path}/t.jsonl")


def test_a_missing_datasets_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RuntimeError, match=r"task hf:some/set needs the package: pip install"):
        load("hf:some/set")


class FakeDatasetDict(dict):
    pass


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the `datasets` package that records how it is asked."""
    asked = []
    rows = [{"question": f"{n}", "answer": f"{n} #### {n}"} for n in range(3)]

    def load_dataset(place, subset, *, split):
        asked.append((place, subset, split))
        if split == "dev":
            raise ValueError('Unknown split "dev"')
        return rows

    def load_from_disk(place):
        asked.append(place)
        return FakeDatasetDict(train=rows)

    fake = types.SimpleNamespace(load_dataset=load_dataset, load_from_disk=load_from_disk, DatasetDict=FakeDatasetDict)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return asked


GSM = {"prompt_field": "question", "answer_after": "####", "match": "last_number"}


def test_a_hub_dataset_is_a_task(hub):
    task = load("hf:openai/gsm8k", GSM | {"subset": "main", "split": "test"})
    assert hub == [("openai/gsm8k", "main", "test")]
    assert task.reward(task.train[0], f"so {task.train[0].answer}.") == 1.0
    with pytest.raises(ValueError, match=r"split 'dev', subset ''\) cannot be loaded: Unknown split"):
        load("hf:openai/gsm8k", GSM | {"split": "dev"})
    with pytest.raises(ValueError, match=r"openai/gsm8k\[train\] row 0: no field 'prompt'"):
        load("hf:openai/gsm8k")


def test_a_saved_dataset_is_read_from_disk(hub, tmp_path):
    (tmp_path / "dataset_dict.json").write_text("{}")
    assert len(load(f"hf:{tmp_path}", GSM).train) == 2
    assert hub == [str(tmp_path)]
    with pytest.raises(ValueError, match=r"split 'validation'"):
        load(f"hf:{tmp_path}", GSM | {"split": "validation"})
