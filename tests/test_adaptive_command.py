"""rlalign calibrate-tokens on a real tiny model: streams and lists agree, prompts never cross a split, harm is not written."""

import json
import random

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from rlalign.calibration.adaptive import AdaptiveTemperature, Training
from rlalign.calibration.adaptive.batches import Completion, ModelBatches, encode, read_completions
from rlalign.calibration.calibrators import ModelIdentity
from rlalign.commands.calibrate_tokens import Options, calibrate_tokens, split
from rlalign.tiny_policy.tokenizer import byte_tokenizer

QUICK = Training(epochs=2, learning_rate=0.03, least_steps=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model whose head is sharp: sure of everything, right by chance."""
    path = tmp_path_factory.mktemp("policy")
    torch.manual_seed(0)
    tokenizer = byte_tokenizer(64)
    config = Qwen3Config(
        vocab_size=288, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=64, tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    model.lm_head.weight.data.mul_(20.0)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def loaded(folder):
    return Qwen3ForCausalLM.from_pretrained(folder), byte_tokenizer(64)


def greedy_rows(loaded, n: int) -> list[dict[str, str]]:
    """Prompts of letters, where the reference is what the model says, and of digits, where it is noise."""
    model, tokenizer = loaded
    rng = random.Random(0)
    rows = []
    for i in range(n):
        prompt = "".join(rng.choices("abcdef" if i % 2 else "0123456789", k=6))
        text = "".join(rng.choices("xyz", k=3))
        if i % 2:
            ids = torch.tensor([tokenizer.encode(prompt)])
            for _ in range(3):
                ids = torch.cat((ids, model(ids).logits[:, -1:, 33:120].argmax(-1) + 33), 1)
            text = tokenizer.decode(ids[0, -3:]).strip() or text
        rows.append({"prompt": prompt, "completion": text})
    return rows


@pytest.fixture(scope="module")
def data(loaded, tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "answers.jsonl"
    with torch.no_grad():
        path.write_text("".join(json.dumps(row) + "\n" for row in greedy_rows(loaded, 160)))
    return path


@pytest.mark.slow
def test_the_command_writes_what_it_judged_better(folder, data, tmp_path, capsys):
    out = tmp_path / "policy.ats.json"
    code = calibrate_tokens(
        folder,
        data,
        out,
        Options(head="linear", training=QUICK),
        revision="r1",
        plot=tmp_path / "p.png",
        json_path=tmp_path / "q.json",
    )
    assert code == 0 and "calibration:" in capsys.readouterr().out
    found = json.loads((tmp_path / "q.json").read_text())
    raw, one, head = (found["test"][name] for name in ("T = 1", "one T", "linear head"))
    assert head["brier"] < one["brier"] < raw["brier"]
    assert head["accuracy"] == raw["accuracy"]
    calibrator = AdaptiveTemperature.load(out, expect_model=ModelIdentity(id=str(folder), revision="r1"))
    assert calibrator.calibration_id == found["calibration_id"]
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_harm_is_not_written(folder, data, tmp_path, capsys, monkeypatch):
    from rlalign.commands import calibrate_tokens as command

    monkeypatch.setattr(command, "brier_score", lambda p, y: 0.2)  # no head is better than another
    out = tmp_path / "policy.ats.json"
    assert calibrate_tokens(folder, data, out, Options(head="linear", training=QUICK)) == 1
    assert "was not written" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_batches_made_when_asked_for_are_those_kept(loaded, data):
    """And padding and neighbours change nothing: batches of 1 and of 7 hold the same tokens and states."""
    model, tokenizer = loaded
    rows = encode(read_completions(data)[:20], tokenizer, longest=64)
    stream = ModelBatches(model, rows, batch_size=7)
    assert [len(b) for b in stream] == [len(b) for b in list(stream)]
    one = torch.cat([b.states() for b in ModelBatches(model, rows, batch_size=1)])
    torch.testing.assert_close(torch.cat([b.states() for b in stream]), one, rtol=1e-4, atol=1e-4)
    for row in rows[:3]:
        (alone,) = ModelBatches(model, [row])
        assert alone.token_ids[alone.mask].tolist() == row.token_ids[row.start :]
        assert row.token_ids[-1] == tokenizer.eos_token_id
        with torch.no_grad():
            logits = model(torch.tensor([row.token_ids])).logits[0, row.start - 1 : -1]
        assert torch.equal(alone.facts().top_id_N, logits.argmax(-1))


def test_rows_of_one_prompt_stay_in_one_part():
    rows = [Completion(where="", prompt=f"p{i % 60}", text=str(i)) for i in range(300)]
    parts = split(rows, Options())
    prompts = [{row.prompt for row in part} for part in parts.values()]
    assert sum(len(each) for each in prompts) == 60 == len(set.union(*prompts))
    assert sum(len(part) for part in parts.values()) == 300
    with pytest.raises(ValueError, match="at least 10"):
        split(rows[:40], Options())


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "empty"),
        ('{"prompt": "a"}\n', "completion"),
        ('{"prompt": "a", "completion": ""}\n', "completion"),
        ("not json\n", ":1: not JSON"),
        (json.dumps({"prompt": "a" * 70, "completion": "b"}) + "\n", r":1: 7\d tokens, the model has 64"),
    ],
)
def test_bad_files_name_their_line(lines, message, tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text(lines)
    with pytest.raises(ValueError, match=message):
        encode(read_completions(path), byte_tokenizer(64), longest=64)


def test_a_folder_without_a_model_is_refused(tmp_path, data):
    with pytest.raises(ValueError, match=r"config\.json"):
        calibrate_tokens(tmp_path, data, tmp_path / "o.json", Options())
