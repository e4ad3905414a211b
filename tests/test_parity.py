"""parity without an engine: what a grid holds, what a baseline refuses, whose prompts are read, what a master rounds to."""

import argparse
import copy
import json

import pytest
import torch
from torch import nn

from rlalign.commands import parity
from rlalign.config import ModelConfig, RunConfig, TaskConfig
from rlalign.diagnose.both_sides import lengthened, read_prompts
from rlalign.diagnose.parity import baseline, grid, measuring
from rlalign.rollout.engine.noise_floor import KEPT


def options(*arguments):
    parser = argparse.ArgumentParser()
    parity.add_options(parser)
    return parser.parse_args(arguments)


def config(model="nowhere"):
    return RunConfig(task=TaskConfig(name="x"), model=ModelConfig(path=model))


def row(**changes):
    found = {
        "body_dtype": "bfloat16", "tensor_parallel": 1, "path": "prefill", "temperature": 1.0, "batch": 0, "context": 0,
        "rollout_head": "float32", "mode": "cached", "trainer_head": "float32", "k1": 0.0, "k3": 1e-5, "abs_mean": 5e-3,
        "p99": 0.05, "abs_max": 0.1, "pearson": 0.9999, "floor_k3": 0.0, "floor_abs_mean": 0.0, "rollout_error": 1e-7,
        "trainer_error": 1e-7, "bf16_error": 4e-3, "tokens": 9, "rounding_k3": 1e-5, "rounding_abs_mean": 5e-3,
        "rollout_rounding_abs_mean": 5e-3,
    }  # fmt: skip
    return found | changes


def result(*rows, settings=()):
    identity = {"architecture": "a" * 16, "versions": {"vllm": "0.32.0", "torch": "2.13.0"}}
    shared = {"model": "m", "identity": identity, "tokens": {"bfloat16": 9}, "notes": []}
    return shared | {"rows": list(rows), "settings": list(settings), "head_isolated": []}


def test_the_default_grid_is_the_plain_table():
    found = parity.grid_of(config(), options())
    assert (found.modes, found.settings, found.tensor_parallel, found.noise_floor) == ((), (), (1,), False)


def test_a_setting_changes_one_thing():
    base = grid.Setting()
    for setting in grid.settings(temperatures=(1.0, 0.6), batches=(1, 4), contexts=(300,)):
        differing = [n for n in ("temperature", "batch", "context") if getattr(setting, n) != getattr(base, n)]
        assert len(differing) <= 1 and (setting.path == "decode" or setting.temperature == 1.0)


def test_values_that_cannot_be_measured_are_refused():
    with pytest.raises(ValueError, match="every temperature must be positive"):
        parity.grid_of(config(), options("--temperature", "0"))
    with pytest.raises(ValueError, match="batches of 16 need as many prompts, got 4"):
        parity.grid_of(config(), options("--batch", "16", "--prompts", "4"))


def test_a_result_is_no_worse_than_itself():
    here = result(row(), row(mode="off", rollout_head="model"))
    assert baseline.regressions(here, here, tolerance=1.0) == []


@pytest.mark.parametrize("worse", [9e-3, float("nan"), float("inf")])
def test_a_larger_mean_is_a_regression(worse):
    found = baseline.regressions(result(row(abs_mean=worse)), result(row()), tolerance=1.5)
    assert len(found) == 1 and "was 0.005 (bar 0.0075)" in found[0]


def test_the_floor_and_rounding_are_no_regression():
    was = result(row(abs_mean=1e-9))
    assert baseline.regressions(result(row(abs_mean=9e-7)), was, tolerance=1.5) == []
    assert baseline.regressions(result(row(abs_mean=4e-3, floor_abs_mean=3e-3)), was, tolerance=1.5) == []
    assert baseline.regressions(result(row(abs_mean=5e-3, floor_abs_mean=3e-3)), was, tolerance=1.5)


def test_a_figure_that_is_gone_is_a_regression_and_a_new_one_is_not():
    slow = row(path="decode", temperature=0.6)
    gone = baseline.regressions(result(row()), result(row(), settings=[slow]), tolerance=1.5)
    assert len(gone) == 1 and "decode, temperature 0.6" in gone[0] and "not measured now" in gone[0]
    assert baseline.regressions(result(row(), settings=[slow]), result(row()), tolerance=1.5) == []


def test_changed_versions_are_said():
    was, now = result(row()), copy.deepcopy(result(row()))
    assert baseline.changed_versions(now, was) == ""
    now["identity"]["versions"]["vllm"] = "0.33.0"
    assert baseline.changed_versions(now, was) == "vllm 0.32.0 -> 0.33.0"


def test_a_baseline_of_something_else_is_refused(tmp_path):
    file = tmp_path / "x.json"
    with pytest.raises(ValueError, match=r"x\.json: cannot be read"):
        baseline.read(file)
    file.write_text('{"rows": []}')
    with pytest.raises(ValueError, match="not a result of this `rlalign parity`"):
        baseline.read(file)
    (tmp_path / "config.json").write_text('{"hidden_size": 8, "transformers_version": "5"}')
    with pytest.raises(ValueError, match="measured on m with another architecture"):
        baseline.check_same_model(result(row()), tmp_path)
    same = result(row())
    same["identity"] = baseline.identity(tmp_path)
    (tmp_path / "config.json").write_text('{"transformers_version": "6", "hidden_size": 8}')
    baseline.check_same_model(same, tmp_path)


def test_a_hard_limit_is_for_equal_heads_of_ours():
    rows = [row(k3=1.0, trainer_head="model"), row(k3=1.0, rollout_head="model", mode="off", trainer_head="model")]
    assert parity.over_limit(result(*rows), 1e-3) == parity.over_limit(result(*rows)) == []
    over = [row(k3=float("nan")), row(k3=2e-3, rollout_head="master", mode="master", trainer_head="master")]
    assert len(parity.over_limit(result(*over, settings=[row(k3=2e-3, path="decode")]), 1e-3)) == 3


def test_without_a_hard_limit_rounding_is_the_bar():
    """One k3 is ordinary for a model that rounds as much, and far too much for one that does not."""
    ordinary = row(k3=2.3e-3, abs_mean=4e-2, rounding_k3=1.2e-3, rounding_abs_mean=3e-2, rollout_rounding_abs_mean=3e-2)
    assert parity.over_limit(result(ordinary)) == []
    (line,) = parity.over_limit(result(ordinary | {"rounding_k3": 1e-5, "rounding_abs_mean": 3e-3}))
    assert "more than rounding explains" in line and "10.0 times as far from the float32 body as the trainer" in line
    for worse in ({"abs_mean": 0.2}, {"k3": 0.1}, {"k3": float("nan")}, {"abs_mean": float("nan")}):
        assert len(parity.over_limit(result(ordinary | worse))) == 1
    noisy = ordinary | {"rounding_k3": 0.0, "rounding_abs_mean": 0.0, "floor_k3": 1e-3, "floor_abs_mean": 2e-2}
    assert parity.over_limit(result(noisy | {"rounding_abs_mean": 1e-9})) == [], (
        "an engine that differs from itself as much"
    )


def test_a_head_alone_is_judged_where_the_body_hides_it():
    both = result(row(k3=1.7e-3, rounding_k3=1e-3, abs_mean=4e-2, rounding_abs_mean=3e-2))
    both["head_isolated"] = [row(rollout_error=1e-7, trainer_error=2e-7), row(trainer_head="model", trainer_error=4e-3)]
    assert parity.over_limit(both) == []
    for side in ("rollout", "trainer"):
        both["head_isolated"][0] = row(**{f"{side}_error": 4.2e-3})
        (line,) = parity.over_limit(both)
        assert f"the {side}'s head is 0.0042 nats from the float64 head" in line and "not multiply in float32" in line
        assert parity.over_limit(both, head_limit=1e-2) == []


def test_the_markdown_holds_every_figure_once():
    slow = [row(path="decode", temperature=0.6, k3=3e-4), row(path="decode", temperature=0.6, k3=7e-4, mode="native")]
    text = baseline.markdown(result(row(k3=1.25e-5), settings=slow))
    for figure in ("1.25e-05", "3.00e-04 (0.0e+00)", "7.00e-04 (0.0e+00)"):
        assert text.count(figure) == 1
    widths = {line.count("|") for line in text.splitlines() if "0.6" in line or "temperature" in line}
    assert len(widths) == 1, "header and rows of the settings have one width"


class Words:
    """A tokenizer of single characters."""

    def encode(self, text):
        return [ord(c) for c in text]

    def __len__(self):
        return 128


def test_prompts_of_the_users_own(tmp_path):
    text, lines = tmp_path / "p.txt", tmp_path / "p.jsonl"
    text.write_text("ab\n\ncd\nef\n")
    assert read_prompts(text, Words(), chat=False, limit=2) == [[97, 98], [99, 100]]
    lines.write_text(json.dumps({"prompt": "ab"}) + "\n" + json.dumps({"token_ids": [3, 4]}))
    assert read_prompts(lines, Words(), chat=False, limit=9) == [[97, 98], [3, 4]]
    for bad, match in (({"token_ids": [3, 400]}, r"p\.jsonl:1: token_ids must be a list of ids below 128"),
                       ({"token_ids": []}, "token_ids must be"), ({"text": "x"}, "no field 'prompt'")):  # fmt: skip
        lines.write_text(json.dumps(bad))
        with pytest.raises(ValueError, match=match):
            read_prompts(lines, Words(), chat=False, limit=9)
    text.write_text("\n")
    with pytest.raises(ValueError, match="holds no prompts"):
        read_prompts(text, Words(), chat=False, limit=9)
    with pytest.raises(ValueError, match="does not exist"):
        read_prompts(tmp_path / "none.txt", Words(), chat=False, limit=9)


def test_long_prompts_have_the_length_asked_and_differ():
    found = lengthened([[1, 2], [3], [4, 5, 6]], 7, count=3)
    assert found == [[1, 2, 3, 4, 5, 6, 1], [3, 4, 5, 6, 1, 2, 3], [4, 5, 6, 1, 2, 3, 4]]


class Network(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.lm_head = nn.Linear(*weight.shape[::-1], bias=False, dtype=torch.bfloat16)
        self.lm_head.weight.data = weight.bfloat16()

    def get_output_embeddings(self):
        return self.lm_head


def test_a_made_up_master_rounds_to_the_weight_and_uses_the_room(tmp_path):
    exponents = torch.arange(-120, 121, dtype=torch.float32)
    weight = torch.cat([torch.exp2(exponents), -torch.exp2(exponents) * 1.9921875, torch.zeros(6)]).view(-1, 8)
    found, source = measuring.unrounded(Network(weight), tmp_path)
    assert torch.equal(found.bfloat16(), weight.bfloat16()) and "made up" in source
    moved = ((found - weight) / weight.abs().clamp_min(1e-38)).abs()
    assert moved.max() > 0.9 * measuring.HALF_ULP and moved.mean() > 0.3 * measuring.HALF_ULP


def test_a_float32_checkpoint_brings_its_own_master(tmp_path):
    from safetensors.torch import save_file

    weight = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    save_file({"lm_head.weight": weight}, tmp_path / "model.safetensors")
    found, source = measuring.unrounded(Network(weight), tmp_path)
    assert torch.equal(found, weight) and "checkpoint's own" in source
    save_file({"lm_head.weight": weight * 2}, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match="does not round to the network's weight"):
        measuring.unrounded(Network(weight), tmp_path)


def test_the_trainers_floor_is_what_its_own_ways_differ_by():
    """A trainer that is off by 0.1 nats alone, by 0.2 with padding and by 0.3 in its update has these in its floor."""
    from rlalign.diagnose import body_rounding
    from rlalign.types import LogprobSpec, Rollout, collate

    rollouts = [
        Rollout(
            token_ids=[1, 2, *range(length)], loss_mask=[False, False] + [True] * length, prompt_id=0, group_id=0,
            rollout_logprobs=[0.0] * (length + 2), finish_reason="stop", version_spans=[(2, length + 2, 0)],
        )
        for length in (4, 9)
    ]  # fmt: skip
    batch = collate(rollouts, pad_token_id=0, spec=LogprobSpec())
    width = batch.token_ids_BL.shape[1]

    def score(part, *, rows=0, chunk=0, exact=True):
        off = 0.1 * (len(part) == 1) + 0.2 * (part.token_ids_BL.shape[1] > width) + 0.3 * (not exact)
        return torch.where(part.loss_mask_BL, -2.0 + off, 0.0)

    found = body_rounding.trainer_floor(score, batch)
    assert {name: pytest.approx(of["abs_max"], abs=1e-6) for name, of in found.items()} == {
        "trainer_batch_of_one": 0.1, "trainer_padding": 0.2, "trainer_tiles": 0.0, "trainer_update": 0.3,
    }  # fmt: skip
    engine = dict.fromkeys(("repeat", "floor"), dict.fromkeys(KEPT, 0.5))
    assert body_rounding.with_trainer_floor(engine, found)["floor"]["abs_max"] == pytest.approx(0.8, abs=1e-6)
