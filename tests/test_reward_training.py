"""The reward-model trainer on tiny models: rows, objectives, the network HFScorer reads back, and what is written beside it."""

import json
import math

import numpy as np
import pytest
import torch

from rlalign.calibration.calibrators import Calibrator
from rlalign.reward.training import Labelled, Pair, Recipe, pairs_of, read_rows, split, train_reward_model, write_rows
from rlalign.reward.training.fit import (
    Item,
    RewardNetwork,
    _loss,
    accumulation,
    bradley_terry_loss,
    fit,
    load,
    padded,
    pointwise_loss,
    tokenised,
)
from rlalign.scoring.hf import HFScorer
from rlalign.tiny_policy.tokenizer import byte_tokenizer

SMALL = {"batch_size": 16, "micro_batch_size": 16, "learning_rate": 3e-3, "max_length": 32, "held_out": 0.25}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A random causal language model whose pad token is its end token, as in many real ones."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    tokenizer = byte_tokenizer(64)
    tokenizer.pad_token = tokenizer.eos_token
    config = Qwen3Config(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        head_dim=16, max_position_embeddings=64, initializer_range=0.2, pad_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rows_of(prompts=48):
    """A completion is right when it says "yes"."""
    words = [("yes", 1.0), ("yes", 1.0), ("no", 0.0), ("maybe", 0.0)]
    return [Labelled(prompt=f"question {i}?", completion=f" {w}", label=y) for i in range(prompts) for w, y in words]


# objectives


def test_bradley_terry_is_its_formula_and_centring_moves_only_the_level():
    random = np.random.default_rng(0)
    chosen, rejected = random.normal(size=9), random.normal(size=9)
    weights = random.random(9)
    want = weights * (np.log1p(np.exp(-(chosen - rejected))) + 0.1 * (chosen + rejected) ** 2)
    got = bradley_terry_loss(*map(torch.tensor, (chosen, rejected)), centring=0.1, weights_N=torch.tensor(weights))
    assert got.item() == pytest.approx(want.mean(), rel=1e-12)
    shifted = bradley_terry_loss(torch.tensor(chosen + 5), torch.tensor(rejected + 5))
    assert shifted.item() == pytest.approx(bradley_terry_loss(torch.tensor(chosen), torch.tensor(rejected)).item())
    assert bradley_terry_loss(torch.tensor([1e4]), torch.tensor([-1e4])).item() == 0.0
    assert math.isfinite(bradley_terry_loss(torch.tensor([-1e4]), torch.tensor([1e4])).item())


def test_pointwise_is_the_cross_entropy_of_soft_labels_and_weights_are_repetitions():
    rewards, labels = torch.tensor([0.3, -2.0, 1.0]), torch.tensor([1.0, 0.25, 0.0])
    p = rewards.double().sigmoid().numpy()
    want = -(labels.numpy() * np.log(p) + (1 - labels.numpy()) * np.log(1 - p))
    assert pointwise_loss(rewards, labels).item() == pytest.approx(want.mean(), rel=1e-6)
    twice, weights = [0, 0, 1, 2], torch.tensor([2.0, 1.0, 1.0]) * 3 / 4  # mean 1
    repeated = pointwise_loss(rewards[twice], labels[twice]).item()
    assert pointwise_loss(rewards, labels, weights_N=weights).item() == pytest.approx(repeated)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: bradley_terry_loss(x[:0], x[:0]), "N >= 1"),
        (lambda x: bradley_terry_loss(x, x[:2]), "must be"),
        (lambda x: bradley_terry_loss(x, x, centring=-1.0), "cannot be negative"),
        (lambda x: pointwise_loss(x, x + 2), "in \\[0, 1\\]"),
        (lambda x: pointwise_loss(x, x, weights_N=-x - 1), "not negative"),
    ],
)
def test_objectives_refuse_what_has_no_meaning(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(3))


# rows


def test_rows_survive_their_file_and_bad_lines_are_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    for rows in (
        [Labelled(prompt="", completion="x", label=0.25, weight=2.0)],
        [Pair(prompt="p", chosen="a", rejected="b")],
    ):
        write_rows(path, rows)
        assert read_rows(path) == rows
    good = {"prompt": "p", "completion": "c", "label": 1}
    for change, message in {
        "label": (good | {"label": 1.5}, "label must be a number from 0 to 1, got 1.5"),
        "empty": (good | {"completion": ""}, "completion must be text that is not empty"),
        "field": (good | {"colour": "red"}, "fields \\['colour', 'completion', 'label', 'prompt'\\]; expected"),
        "same": ({"prompt": "p", "chosen": "a", "rejected": "a"}, "the same text"),
        "kinds": ({"prompt": "p", "chosen": "a", "rejected": "b"}, "in one file"),
        "weight": (good | {"weight": -1}, "weight must be a number from 0"),
        "list": ([1], "expected a JSON object"),
    }.values():
        path.write_text(json.dumps(good) + "\n" + json.dumps(change) + "\n")
        with pytest.raises(ValueError, match=f"rows.jsonl:2: .*{message}"):
            read_rows(path)


def test_pairs_are_right_against_wrong_of_one_prompt():
    rows = [*rows_of(3), Labelled(prompt="all right", completion=" yes", label=1.0)]
    pairs = pairs_of(rows, per_prompt=10)
    assert len(pairs) == 3 * 4 and all(p.chosen == " yes" and p.rejected in (" no", " maybe") for p in pairs)
    assert {p.prompt for p in pairs} == {f"question {i}?" for i in range(3)}
    assert len(pairs_of(rows, per_prompt=2)) == 6
    with pytest.raises(ValueError, match="no pairs to learn from"):
        pairs_of(rows[-1:])


def test_no_prompt_is_on_both_sides_of_the_split():
    training, held_out = split(rows_of(20), held_out=0.25)
    assert not {r.prompt for r in training} & {r.prompt for r in held_out}
    assert len({r.prompt for r in held_out}) == 5 and len(training) + len(held_out) == 80
    with pytest.raises(ValueError, match="one side is empty"):
        split(rows_of(1), held_out=0.25)


# the network


def test_the_network_reads_what_hf_scorer_reads_though_pad_is_the_end_token(base, tmp_path):
    network, tokenizer = load(base, seed=1)
    texts = [("a question", " answer"), ("b", f" ends with {tokenizer.eos_token}"), ("longer question", " x")]
    ids = tokenised(tokenizer, texts, max_length=64, chat=False, model="base")
    assert ids[1][-1] == tokenizer.pad_token_id
    with torch.no_grad():
        together = network(*padded(ids, pad_token_id=tokenizer.pad_token_id, device=torch.device("cpu")))
    network.model.save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    scorer = HFScorer(str(tmp_path / "rm"))
    alone = [scorer.score(prompt, [completion]).logits[0][0] for prompt, completion in texts]
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_mixed_precision_stops_before_the_head(base):
    """A reward in bf16 has eight bits: differences between good answers would be rounded away."""
    network, tokenizer = load(base, seed=1)
    texts = [("a question", f" answer {i}") for i in range(8)]
    ids = tokenised(tokenizer, texts, max_length=64, chat=False, model="base")
    batch = padded(ids, pad_token_id=0, device=torch.device("cpu"))
    plain = network(*batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = network(*batch)
        mixed.sum().backward()
    assert mixed.dtype == torch.float32 and (mixed.bfloat16().float() != mixed).any()
    torch.testing.assert_close(mixed, plain, rtol=0.05, atol=0.05)
    assert network.model.score.weight.grad.isfinite().all()


def test_rows_that_are_too_long_are_left_out_and_never_cut(base):
    _, tokenizer = load(base, seed=0)
    ids = tokenised(tokenizer, [("ab", "c"), ("ab", "c" * 40)], max_length=16, chat=False, model="base")
    assert len(ids[0]) == 4 and ids[1] is None


def test_chats_are_tokenised_as_hf_scorer_does(base, tmp_path):
    network, tokenizer = load(base, seed=1)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<eos>"
    (ids,) = tokenised(tokenizer, [("q", "a")], max_length=64, chat=True, model="base")
    network.model.save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    with torch.no_grad():
        ours = network(*padded([ids], pad_token_id=tokenizer.pad_token_id, device=torch.device("cpu")))
    chat = HFScorer(str(tmp_path / "rm")).score_conversations(
        [[{"role": "user", "content": "q"}]], [[{"role": "assistant", "content": "a"}]]
    )
    np.testing.assert_allclose(ours, chat.logits[0], atol=1e-5)


# the optimisation


class Linear(RewardNetwork):
    """Reward = weight of the last token: small enough to step by hand."""

    def __init__(self):
        torch.nn.Module.__init__(self)
        self.table = torch.nn.Parameter(torch.zeros(8))

    def forward(self, ids_NL, lengths_N):
        return self.table[ids_NL[torch.arange(len(ids_NL)), lengths_N - 1]]


def stepped(micro_batch_size, **changes):
    from accelerate import Accelerator

    recipe = Recipe(batch_size=8, micro_batch_size=micro_batch_size, learning_rate=0.1, warmup=0.0, **changes)
    random, network = np.random.default_rng(0), Linear()
    items = [
        Item(
            row=Labelled(prompt="p", completion="c", label=float(i % 2), weight=float(1 + i % 3)),
            sequences=([1, int(t)],),
        )
        for i, t in enumerate(random.integers(2, 8, 24))
    ]
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation(recipe, 1))
    steps = fit(network, items, recipe, accelerator, pad=0, say=lambda line: None)
    return steps, network.table.detach()


def test_micro_batches_add_up_to_the_batch():
    (steps, whole), (_, parts) = stepped(8), stepped(2)
    assert steps == 3 and whole.abs().max() > 0.05
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


def test_gradients_are_clipped_before_they_are_used():
    _, table = stepped(8, grad_clip=1e-12)  # far below AdamW's epsilon
    assert table.abs().max() < 1e-3


def test_a_weight_counts_against_the_mean_weight_of_the_data_set():
    items = [
        Item(row=Labelled(prompt="p", completion="c", label=1.0, weight=w), sequences=([1, t],))
        for w, t in ((1.0, 2), (3.0, 3))
    ]
    network, recipe = Linear(), Recipe()
    network.table.data = torch.tensor([0.0, 0.0, 1.0, -1.0, 0.0, 0.0, 0.0, 0.0])
    got = _loss(network, items, recipe, 2.0, pad=0, device=torch.device("cpu"))
    want = (0.5 * math.log1p(math.exp(-1.0)) + 1.5 * math.log1p(math.exp(1.0))) / 2
    assert got.item() == pytest.approx(want)


def test_batches_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="batch_size=8 must be a multiple of micro_batch_size=3 x 2 processes"):
        accumulation(Recipe(batch_size=8, micro_batch_size=3), 2)
    with pytest.raises(ValueError, match="epochs=0"):
        Recipe(epochs=0)


# the whole


@pytest.fixture(scope="module", params=["pairs", "labels"])
def trained(request, base, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param) / "rm"
    options = {"objective": request.param, "recipe": Recipe(epochs=4, **SMALL), "say": lambda line: None}
    record = train_reward_model(rows_of(), base=base, out=out, **options)
    return out, record


@pytest.mark.slow
def test_it_learns_what_makes_an_answer_right_on_prompts_it_never_saw(trained):
    out, record = trained
    assert record["quality"]["auroc"] > 0.95 and record["quality"]["held_out_scored"] == 48
    right, wrong = HFScorer(str(out)).score("question 999?", [" yes", " no"]).rewards()
    assert right > wrong + 1


def test_the_calibration_in_the_folder_is_of_these_scores_and_this_model(trained):
    out, record = trained
    calibrator = Calibrator.load(out / "calibration.json")
    first = json.loads((out / "scores.jsonl").read_text().splitlines()[0])
    assert calibrator.calibration_id == record["quality"]["calibration"]
    assert calibrator.model_.id == str(out.resolve()) and calibrator.model_.head_dtype == "float32"
    again = HFScorer(str(out)).score(first["group"], [" yes", " no", " maybe"]).rewards()
    assert min(abs(first["logit"] - s) for s in again) < 1e-5
    assert json.loads((out / "reward_model.json").read_text()) == record


def test_nothing_is_overwritten_and_pairs_have_no_labels(base, tmp_path):
    with pytest.raises(ValueError, match="no config.json there"):
        load(tmp_path, seed=0)
    with pytest.raises(ValueError, match="exists; choose another folder"):
        train_reward_model(rows_of(), base=base, out=tmp_path, objective="pairs", recipe=Recipe(**SMALL))
    pairs = [Pair(prompt=f"{i}", chosen="a", rejected="b") for i in range(40)]
    with pytest.raises(ValueError, match="objective=labels needs labelled completions"):
        train_reward_model(pairs, base=base, out=tmp_path / "rm", objective="labels", recipe=Recipe(**SMALL))
    with pytest.raises(ValueError, match="fewer than batch_size=64"):
        train_reward_model(pairs, base=base, out=tmp_path / "rm", objective="pairs", recipe=Recipe(max_length=32))


def test_preferences_alone_give_a_scale_and_no_level(base, tmp_path):
    pairs = [Pair(prompt=f"question {i}?", chosen=" yes", rejected=" no") for i in range(200)]
    pairs += [Pair(prompt=f"odd {i}?", chosen=" no", rejected=" yes") for i in range(40)]
    record = train_reward_model(
        pairs,
        base=base,
        out=tmp_path / "rm",
        objective="pairs",
        recipe=Recipe(**SMALL),
        model_id="me/rm",
        say=lambda _: None,
    )
    assert 0.5 < record["quality"]["pair_accuracy"] <= 1.0
    calibrator = Calibrator.load(tmp_path / "rm" / "calibration.json")
    assert calibrator.method == "temperature" and calibrator.diagnostics_.pairs and calibrator.model_.id == "me/rm"
