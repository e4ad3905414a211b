"""The tokenizer gives text back exactly; a recipe names its folder; only finished folders count."""

import dataclasses
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlalign import tiny_policy
from rlalign.tasks import load_task
from rlalign.tiny_policy import cached_policy, make_tiny_policy, teaching
from rlalign.tiny_policy.teaching import IGNORED, TinyRecipe, _encode, _expected_accuracy, accuracy
from rlalign.tiny_policy.tokenizer import byte_tokenizer

TWO_STEPS = TinyRecipe(
    train_size=64,
    eval_size=16,
    hidden_size=32,
    intermediate_size=32,
    layers=1,
    heads=1,
    batch_size=8,
    max_steps=2,
    check_every=1,
    accept_from=0.0,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("policies")
    return {tied: make_tiny_policy(root, dataclasses.replace(TWO_STEPS, tied=tied)) for tied in (False, True)}


@pytest.mark.parametrize(
    "text",
    [
        "".join(map(chr, range(128))),
        "43 + 21 = 64",
        "a , b . it 's  !\n\t two  spaces ",
        " + +  = =+-*/ - * / ",
        "h\u00e9llo \u4e16\u754c \U0001f600 \ud7ff\u0000",
        "",
    ],
)
def test_text_survives_the_saved_tokenizer(made, text):
    tokenizer = AutoTokenizer.from_pretrained(made[False])
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_every_byte_is_a_token_and_signs_are_short():
    tokenizer = byte_tokenizer(64)
    assert len(tokenizer("12 + 34 =").input_ids) == 7
    assert len({tokenizer(chr(code), add_special_tokens=False).input_ids[0] for code in range(128)}) == 128
    assert tokenizer("<eos>", add_special_tokens=False).input_ids == [tokenizer.eos_token_id]


def test_the_folder_is_an_ordinary_checkpoint(made):
    for tied, folder in made.items():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert model.dtype == torch.bfloat16
        assert (model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()) == tied
        assert max(tokenizer.get_vocab().values()) < model.config.vocab_size
        assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id
        assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id


def test_every_field_of_the_recipe_changes_the_folder(monkeypatch):
    other = {bool: lambda v: not v, int: lambda v: v + 1, float: lambda v: v + 0.01, str: lambda v: v + "s"}
    other[dict] = lambda v: v | {"max_digits": 3}
    names = {TinyRecipe().folder}
    for f in dataclasses.fields(TinyRecipe):
        value = other[type(getattr(TinyRecipe(), f.name))](getattr(TinyRecipe(), f.name))
        names.add(dataclasses.replace(TinyRecipe(), **{f.name: value}).folder)
    monkeypatch.setattr(teaching, "RECIPE_VERSION", -1)
    names.add(TinyRecipe().folder)
    monkeypatch.setattr(teaching, "version", lambda _: "99.1.0")
    names.add(TinyRecipe().folder)
    assert len(names) == len(dataclasses.fields(TinyRecipe)) + 3
    monkeypatch.setattr(teaching, "version", lambda _: "99.1.7")
    assert TinyRecipe().folder in names


def test_the_same_recipe_gives_the_same_weights_and_leaves_no_trace(tmp_path, made):
    torch.manual_seed(7)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    folder = make_tiny_policy(tmp_path, TWO_STEPS)
    assert torch.equal(torch.get_rng_state(), before) and torch.get_num_threads() == threads
    assert (folder / "model.safetensors").read_bytes() == (made[False] / "model.safetensors").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == [TWO_STEPS.folder]


def test_the_second_call_builds_nothing(made, monkeypatch):
    monkeypatch.setattr(tiny_policy, "_build", lambda *_: pytest.fail("built again"))
    assert make_tiny_policy(made[False].parent, TWO_STEPS) == made[False]


@pytest.mark.parametrize("lost", ["tiny_policy.json", "model.safetensors", "tokenizer.json", "config.json"])
def test_a_torn_folder_is_built_again(tmp_path, made, monkeypatch, lost):
    def write_whole(folder, recipe, progress):
        for path in made[False].iterdir():
            (folder / path.name).write_bytes(path.read_bytes())

    monkeypatch.setattr(tiny_policy, "_build", write_whole)
    folder = make_tiny_policy(tmp_path, TWO_STEPS)
    (folder / lost).unlink()
    assert make_tiny_policy(tmp_path, TWO_STEPS) == folder
    assert (folder / lost).read_bytes() == (made[False] / lost).read_bytes()


def test_a_build_that_is_cut_off_leaves_nothing(tmp_path, monkeypatch):
    def die(folder, recipe, progress):
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(tiny_policy, "_build", die)
    with pytest.raises(KeyboardInterrupt):
        make_tiny_policy(tmp_path, TWO_STEPS)
    assert list(tmp_path.iterdir()) == []


def test_a_faster_process_wins(tmp_path, made, monkeypatch):
    def build_both(folder, recipe, progress):
        for target in (folder, tmp_path / recipe.folder):
            target.mkdir(exist_ok=True)
            for path in made[False].iterdir():
                (target / path.name).write_bytes(path.read_bytes())

    monkeypatch.setattr(tiny_policy, "_build", build_both)
    assert make_tiny_policy(tmp_path, TWO_STEPS) == tmp_path / TWO_STEPS.folder
    assert [path.name for path in tmp_path.iterdir()] == [TWO_STEPS.folder]


def test_a_policy_that_does_not_learn_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match=r"held-out accuracy 0\.\d\d after 2 steps, expected at least 0\.25"):
        make_tiny_policy(tmp_path, dataclasses.replace(TWO_STEPS, accept_from=0.25))
    assert list(tmp_path.iterdir()) == []


def test_the_user_cache_is_used_and_kinds_are_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("RLALIGN_CACHE", str(tmp_path))
    monkeypatch.setattr(tiny_policy, "make_tiny_policy", lambda root, recipe, *, progress: (root, recipe))
    assert cached_policy("tied") == (tmp_path / "policies", TinyRecipe(tied=True))
    with pytest.raises(ValueError, match=r"unknown tiny policy 'big'; choose untied or tied"):
        cached_policy("big")


def test_only_answers_and_their_end_are_learned():
    tokenizer = byte_tokenizer(64)
    task = load_task(TWO_STEPS.task, TWO_STEPS.task_params, train_size=20, eval_size=0, seed=0)
    ids_BL, labels_BL = _encode(list(task.train), tokenizer)
    for prompt, ids, labels in zip(task.train, ids_BL, labels_BL, strict=True):
        assert tokenizer.decode(labels[labels != IGNORED]) == prompt.answer + "<eos>"
        learned = (labels != IGNORED).nonzero()[:, 0]
        assert torch.equal(ids[learned + 1], labels[learned])
        assert tokenizer.decode(ids[: learned[0] + 1], skip_special_tokens=True) == prompt.text


def test_expected_accuracy_is_what_sampling_gives():
    """A model that writes the digit 7 or ends, whatever it reads: an answer "7" has probability p(7) * p(end)."""
    tokenizer = byte_tokenizer(64)
    recipe = dataclasses.replace(TWO_STEPS, tied=False)
    model = tiny_policy._new_model(recipe, tokenizer).eval()
    seven = tokenizer("7", add_special_tokens=False).input_ids[0]
    # A constant hidden state of ones: blocks add nothing, and the final norm maps any constant row to itself.
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(1.0)
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        model.lm_head.weight.fill_(-1.0)
        model.lm_head.weight[seven] = 1.0
        model.lm_head.weight[tokenizer.eos_token_id] = 1.0
    prompts = [p for p in _one_digit_sums() if p.answer == "7"]
    assert _expected_accuracy(model, *_encode(prompts, tokenizer)) == pytest.approx(0.25, abs=1e-4)
    task = dataclasses.replace(_one_digit_task(), held_out=tuple(prompts), train=_one_digit_task().held_out)
    torch.manual_seed(0)
    share = sum(accuracy(model, tokenizer, task, greedy=False) for _ in range(40)) / 40
    assert share == pytest.approx(0.25, abs=0.1)


def _one_digit_task():
    params = TWO_STEPS.task_params | {"min_digits": 1, "max_digits": 1}
    return load_task(TWO_STEPS.task, params, train_size=120, eval_size=1, seed=0)


def _one_digit_sums():
    return [prompt for prompt in _one_digit_task().train if prompt.prompt_id > 0]


def test_the_record_tells_what_was_made(made):
    record = json.loads((made[True] / "tiny_policy.json").read_text())
    assert record["recipe"]["tied"] is True and record["steps"] == 2
    assert 0.0 <= record["sampled"] <= 1.0 and 0.0 <= record["greedy"] <= 1.0
