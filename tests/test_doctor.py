"""The doctor's checks without an engine: which versions bite whom, what a disk, a clock and a head need, which token is which."""

import json
import shutil
import time
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from rlalign.config import (
    Dtype,
    HeadDtype,
    ModelConfig,
    RolloutConfig,
    RunConfig,
    TaskConfig,
    TrackingConfig,
    TrainerConfig,
    WeightsConfig,
)
from rlalign.diagnose.doctor import check, machine, tokens
from rlalign.diagnose.doctor.machine import KNOWN, Surroundings, numbers
from rlalign.tiny_policy.tokenizer import byte_tokenizer


def config(folder, **sections):
    return RunConfig(task=TaskConfig(name="x"), **({"model": ModelConfig(path=str(folder))} | sections))


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    tokenizer = byte_tokenizer(256)
    tokenizer.save_pretrained(folder)
    ids = {n: getattr(tokenizer, n) for n in tokens.SPECIAL}
    (folder / "config.json").write_text(json.dumps({"vocab_size": 1000, "hidden_size": 64, **ids}))
    save_file({f"w{i}": torch.zeros(2**18) for i in range(3)}, folder / "model.safetensors")
    return folder


def around(folder, *, on_gpu=False, trainer_ranks=1, model=None, **sections):
    return Surroundings(
        config=config(folder, **sections), on_gpu=on_gpu, model=model or {}, trainer_ranks=trainer_ranks
    )


def biting(found, surroundings):
    return [line for line in machine._known_issues(found, surroundings) if line.state == "problem"]


HERE = {"vllm": "0.32.0", "deepspeed": "0.19.8", "torch": "2.13.0"}


def test_what_is_installed_here_is_fine_on_one_rank_without_a_gpu(model):
    (line,) = machine._known_issues(HERE, around(model))
    assert line.state == "ok" and "vllm-project/vllm#41670" in line.found, "those that do not bite are still named"


@pytest.mark.parametrize(
    "found, surroundings, upstream",
    [
        ({"vllm": "0.28.1"}, {"on_gpu": True}, "vllm-project/vllm#52626"),
        ({"vllm": "0.32.0"}, {"on_gpu": True, "model": {"quantization_config": {"bits": 8}}}, "vllm-project/vllm#41670"),
        ({"deepspeed": "0.19.3"}, {"trainer_ranks": 2, "trainer": TrainerConfig(zero_stage=2)}, "deepspeedai/DeepSpeed#8224"),
    ],
)  # fmt: skip
def test_a_known_issue_bites_only_where_it_can(model, found, surroundings, upstream):
    (line,) = biting(HERE | found, around(model, **surroundings))
    assert upstream in line.found and line.remedy
    eager = {"rollout": RolloutConfig(enforce_eager=True), "trainer": TrainerConfig(zero_stage=1)}
    assert biting(HERE | found, around(model, **surroundings | eager)) == []
    assert biting(HERE | found, around(model, **surroundings | {"on_gpu": False, "trainer_ranks": 1})) == []


def test_the_batch_invariant_switch_on_cpu(model, monkeypatch):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert "unset VLLM_BATCH_INVARIANT" in biting(HERE, around(model))[0].remedy
    assert biting(HERE, around(model, on_gpu=True)) == []


@pytest.mark.parametrize(
    ("capability", "size", "bites"), [("AVX2", 16, True), ("AVX2", 64, False), ("AVX512", 16, False)]
)
def test_flex_attention_on_a_cpu_where_torch_computes_it_wrongly(model, monkeypatch, capability, size, bites):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    asked = {"model": {"head_dim": size}, "trainer": TrainerConfig(attention="flex_attention")}
    assert ["AVX2" in line.found for line in biting(HERE, around(model, **asked))] == [True] * bites
    assert biting(HERE, around(model, **asked, on_gpu=True)) == biting(HERE, around(model, model=asked["model"])) == []


def test_every_entry_names_its_source_and_has_a_range():
    for issue in KNOWN:
        assert "#" in issue.upstream or "measured" in issue.upstream
        assert not issue.until or numbers(issue.since) <= numbers(issue.until)


def test_lora_needs_peft_and_nothing_else_does(monkeypatch):
    def installed(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(machine, "version", installed)
    (check,) = machine._for_lora()
    assert (check.name, check.state, check.remedy) == ("peft", "problem", "pip install 'rlalign[lora]'")
    monkeypatch.setattr(machine, "version", lambda name: "0.21.7")
    assert [check.state for check in machine._for_lora()] == ["ok"]


def test_version_numbers():
    assert numbers("0.32.0rc1+cpu") == (0, 32, 0) and numbers("2.13.0+cpu") == (2, 13, 0) and numbers("5.dev") == (5,)
    assert numbers("0.19.10") > numbers("0.19.8"), "numbers, not text"


def test_an_untested_version_is_unknown_and_not_a_problem():
    assert machine._tested("torch", "2.13.0+cpu", "2.11", "2.13").state == "ok"
    for found in ("2.10.0", "2.14.0", "3.0.0"):
        line = machine._tested("torch", found, "2.11", "2.13")
        assert line.state == "unknown" and "tested with 2.11 to 2.13" in line.found


def test_disks(model, tmp_path, monkeypatch):
    Usage = type(shutil.disk_usage(tmp_path))
    free = {"bytes": 2 * 2**30}
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(0, 0, free["bytes"]))
    plain = config(model, output_dir=str(tmp_path / "a" / "b"))
    assert [c.state for c in machine.disks(plain)] == ["ok", "ok"]
    kept = config(model, output_dir=str(tmp_path), steps=1000, tracking=TrackingConfig(replay_every=1))
    run, _ = machine.disks(kept)
    assert run.state == "problem" and "1000 copies of the weights for replays need 2.9 GiB" in run.found
    free["bytes"] = 3 * 2**20
    assert [c.state for c in machine.disks(plain)] == ["problem", "ok"]


@pytest.mark.parametrize(
    ("elements", "mib", "sections", "why"),
    [
        ([2**19] * 10, 10, {}, "all weights, which are less than two buckets"),
        ([2**19] * 10, 4, {"weights": WeightsConfig(bucket_mib=2)}, "two buckets of weights.bucket_mib=2"),
        ([2**19] * 10 + [2**21], 8, {"weights": WeightsConfig(bucket_mib=2)}, "two of the largest tensor"),
        ([2**19] * 10, 8, {"weights": WeightsConfig(bucket_mib=4), "head_dtype": HeadDtype.master}, "two buckets"),
    ],
)
def test_the_shared_folder_needs_room_for_two_buckets(model, tmp_path, monkeypatch, elements, mib, sections, why):
    """Never for a whole copy of the weights: tests/test_weights.py holds the transport to the same bound."""
    save_file(
        {f"w{i}": torch.zeros(n, dtype=torch.bfloat16) for i, n in enumerate(elements)}, model / "model.safetensors"
    )
    Usage, free = type(shutil.disk_usage(tmp_path)), {}
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(0, 0, free["bytes"]))
    run = config(model, output_dir=str(tmp_path), **sections)
    for room, state in ((1.2, "ok"), (1.05, "problem")):
        free["bytes"] = int(room * mib * 2**20)
        _, folder = machine.disks(run)
        assert folder.state == state and f"a publish needs {mib} MiB there: {why}" in folder.found
    run.weights = WeightsConfig(transport="gloo")
    assert [c.state for c in machine.disks(run)][1] == "ok"


def test_a_checkpoint_that_is_cut_short_is_named(model, tmp_path):
    (model / "model.safetensors").write_bytes(bytes(100))
    with pytest.raises(ValueError, match="model.safetensors has no safetensors header"):
        list(machine.disks(config(model, output_dir=str(tmp_path))))


def test_clocks(model, tmp_path, monkeypatch):
    here = config(model, output_dir=str(tmp_path))
    assert [c.state for c in machine.clock(here)] == ["ok"]
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() - 60)
    (line,) = machine.clock(here)
    assert line.state == "problem" and "ahead of this machine" in line.found
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert "it says 1970-01-01" in next(machine.clock(here)).found


def test_memory_of_the_head(model, monkeypatch):
    whole = 4 * 1000 * 64
    assert machine.head_bytes(config(model))[0] == whole
    assert machine.head_bytes(config(model, rollout=RolloutConfig(tensor_parallel_size=2)))[0] == whole // 2
    assert machine.head_bytes(config(model, head_dtype=HeadDtype.master))[0] == whole
    for nothing in (
        {"head_dtype": HeadDtype.model},
        {"model": ModelConfig(path=str(model), dtype=Dtype.float32)},
        {"rollout": RolloutConfig(head_mode="native")},
    ):
        assert machine.head_bytes(config(model, **nothing))[0] == 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert machine.head_bytes(config(model))[0] == 0, "native on a GPU"
    assert machine.head_bytes(config(model, head_dtype=HeadDtype.master))[0] == whole
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (100_000, 200_000))
    (line,) = machine.head_memory(config(model, head_dtype=HeadDtype.master))
    assert line.state == "problem" and "rollout.gpu_memory_utilization" in line.remedy


def test_special_tokens_of_the_tokenizer_and_the_checkpoint(model):
    ours = byte_tokenizer(256)
    assert tokens.special_tokens(model, ours).state == "ok"
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, ours.eos_token_id]}))
    assert tokens.special_tokens(model, ours).state == "ok", "one of several ends"
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    line = tokens.special_tokens(model, ours)
    assert (
        line.state == "problem"
        and f"eos_token_id {ours.eos_token_id} in the tokenizer, 7 in generation_config" in line.found
    )


def test_two_tokenizers_are_equal_or_said_to_differ():
    one, other = byte_tokenizer(256), byte_tokenizer(256)
    assert tokens.both_sides(one, other).state == "ok"
    other.pad_token = other.eos_token
    assert tokens.both_sides(one, other).state == "ok", "padding reaches no model"
    other.eos_token = other.bos_token
    assert "special tokens or chat template differ" in tokens.both_sides(one, other).found
    other = byte_tokenizer(256)
    other.chat_template = "x"
    assert tokens.both_sides(one, other).state == "problem"
    other = byte_tokenizer(256)
    other.add_tokens(["<new>"])
    assert "'<new>' None against" in tokens.both_sides(one, other).found


def test_a_round_trip_counts_completions_that_encode_to_other_ids():
    ours = byte_tokenizer(256)
    ids = ours.encode("12", add_special_tokens=False)
    rollouts = [SimpleNamespace(token_ids=[1, *ids], prompt_length=1, text=t) for t in ("12", "13")]
    assert tokens.round_trip(rollouts, ours).found.startswith("1 of 2")


def test_a_group_that_fails_ends_alone_and_keeps_what_it_found():
    def broken():
        yield check.Check("first", "ok", "x")
        raise OSError("no such device")

    found = check.guarded("group", broken)
    assert [(c.name, c.state) for c in found] == [("first", "ok"), ("group", "problem")]
    text = check.report([*found, check.judged("third", False, "y", "do this")])
    assert "-> do this" in text and text.endswith("1 ok, 2 problem, 0 unknown")
    assert json.loads(check.as_json(found))[1]["found"] == "no such device"


def test_rows_without_a_token_are_counted_and_barred_only_behind_the_last():
    from rlalign.rollout.engine.completions import UnknownIds

    class Words:
        def __init__(self, ids):
            self.ids = ids

        def get_vocab(self):
            return {str(i): i for i in self.ids}

    behind = UnknownIds.of(Words([0, 1, 2, 9]), 8)  # id 9 is a placeholder behind the model's last row
    assert (behind.first, behind.behind, behind.between) == (3, 5, 0) and behind.bar() == 3
    assert behind.describe(8).startswith("5 of the model's 8 rows are ids that no text has")
    assert UnknownIds.of(Words(range(8)), 8).bar() == 0
    with pytest.raises(ValueError, match="1 ids below the tokenizer's last one"):
        UnknownIds.of(Words([0, 2]), 8).bar()
