"""Dumps as stacks write them: every mask rule, compression, many files, and what a broken one says."""

import gzip
import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from rlalign.cli import main
from rlalign.diagnose import offline

OLD, ROLLOUT = [-0.1, -0.5, -0.9, -1.5], [-0.3, -0.4, -1.0, -1.4]


def k3(*kept):
    d = np.array(OLD, np.float32).astype(float)[list(kept)] - np.array(ROLLOUT, np.float32).astype(float)[list(kept)]
    return float((np.expm1(d) - d).mean())


def row(**more):
    return {"old_log_probs": OLD, "rollout_log_probs": ROLLOUT} | more


def written(folder, *rows, name="dump.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(x) + "\n" for x in rows))
    return path


def test_a_report_with_undefined_numbers_is_a_report(tmp_path, capsys):
    one = written(tmp_path, {"old_log_probs": [-0.1], "rollout_log_probs": [-0.2], "response_mask": [1]})
    assert main(["mismatch", str(one), "--json", str(tmp_path / "r.json"), "--k3-limit", "1"]) == 0
    assert "| nan |" in capsys.readouterr().out
    assert json.loads((tmp_path / "r.json").read_text())["overall"]["pearson_prob"] is None
    nothing = written(
        tmp_path, row(response_mask=[1] * 4, step=0), row(rollout_log_probs=[None] * 4, response_mask=[1] * 4, step=1)
    )
    assert main(["mismatch", str(nothing), "--plot", str(tmp_path / "p.png")]) == 0
    only = written(tmp_path, row(rollout_log_probs=[None] * 4, response_mask=[1] * 4))
    assert main(["mismatch", str(only), "--k3-limit", "1"]) == 1
    assert "undefined, which passes no limit" in capsys.readouterr().out


def test_without_a_mask_nothing_is_guessed(tmp_path):
    path = written(tmp_path, row())
    with pytest.raises(ValueError, match=r"no loss mask.*response_mask.*--all-tokens"):
        offline.analyse(path)
    assert offline.analyse(path, all_tokens=True).overall["k3"] == pytest.approx(k3(0, 1, 2, 3), rel=1e-5)
    assert offline.analyse(path, all_tokens=True).masked_by == "nothing: every token counts"


def test_a_mask_that_starts_in_a_later_row_is_no_guess_either(tmp_path):
    path = written(tmp_path, row(), row(response_mask=[0, 1, 1, 0]))
    with pytest.raises(ValueError, match=r"no response_mask, and nothing says whether"):
        offline.analyse(path)
    path = written(tmp_path, row(response_mask=[0, 1, 1, 0]), row(entropy=[1.0] * 4, response_mask=[0, 0, 1, 0]))
    assert offline.analyse(path).overall["tokens"] == 3
    assert "entropy decile" in offline.analyse(path).tables


def test_trl_masks_tools_and_prime_rl_weights_of_zero(tmp_path):
    trl = {
        "old_per_token_logps": OLD, "sampling_per_token_logps": [-0.3, 0.0, -1.0, 0.0],
        "completion_mask": [1, 1, 1, 0], "tool_mask": [1, 0, 1, 1],
    }  # fmt: skip
    found = offline.analyse(written(tmp_path, trl))
    assert found.overall["k3"] == pytest.approx(k3(0, 2), rel=1e-5)
    assert (found.masked_by, found.masked_out) == ("completion_mask * tool_mask", 2)
    prime = {
        "trainer_logprobs": OLD, "inference_logprobs": ROLLOUT, "loss_mask": [True] * 4, "rl_weights": [0.0, 0.5, 0.0, -1.0],
    }  # fmt: skip
    found = offline.analyse(written(tmp_path, prime))
    assert found.overall["k3"] == pytest.approx(k3(1, 3), rel=1e-5) and found.masked_by == "loss_mask * rl_weights"
    named = offline.analyse(written(tmp_path, prime), columns={"loss_mask": "loss_mask"})
    assert named.overall["tokens"] == 4 and named.masked_by == "loss_mask"


def test_nemo_rl_nests_each_row_in_a_list_and_numbers_its_files(tmp_path):
    for step in (2, 10):
        nemo = {
            "prev_logprobs": [OLD], "generation_logprobs": [ROLLOUT], "token_loss_mask": [[0.0, 1.0, 1.0, 0.0]],
            "sample_loss_mask": [1.0], "content": ["text"],
        }  # fmt: skip
        written(tmp_path, nemo, {**nemo, "sample_loss_mask": [0.0]}, name=f"train_data_step{step}.jsonl")
    found = offline.analyse(tmp_path)
    assert list(found.by_step) == [2, 10] and found.overall["tokens"] == 4
    assert found.by_step[10]["k3"] == pytest.approx(k3(1, 2), rel=1e-5)


def test_slime_writes_tensors_of_the_response(tmp_path):
    data = {
        "tokens": [torch.arange(6), torch.arange(9)], "response_lengths": [4, 4],
        "loss_masks": [torch.tensor([0, 1, 1, 1]), torch.ones(4)], "log_probs": [torch.tensor(OLD)] * 2,
        "rollout_log_probs": [torch.tensor(ROLLOUT)] * 2, "rewards": [0.0, 1.0],
    }  # fmt: skip
    for rank in (0, 1):
        torch.save({"rollout_id": 7, "rank": rank, "rollout_data": data}, tmp_path / f"7_{rank}.pt")
    found = offline.analyse(tmp_path)
    assert found.overall["tokens"] == 14 and found.overall["sequences"] == 4 and list(found.by_step) == [7]
    worst = found.worst[0].at  # of the second sequence, whose first response token is the 5
    assert (worst.sequence, worst.position, worst.token_id) == (1, 0, 5) and worst.log_ratio == pytest.approx(0.2)
    torch.save({"samples": []}, tmp_path / "8_0.pt")
    with pytest.raises(ValueError, match=r"8_0.pt is not slime's training data.*save-debug-train-data"):
        offline.analyse(tmp_path)


@pytest.mark.parametrize("kind", ["array", "gz", "zst", "python", "glob", "directory"])
def test_the_same_tokens_in_every_wrapping(tmp_path, kind):
    rows = [row(response_mask=[0, 1, 1, 1], uid=None), row(response_mask=[1, 1, 0, 1], uid="a")]
    if kind == "array":
        path = tmp_path / "d.json"
        path.write_text(json.dumps(rows, indent=1))
    elif kind == "gz":
        path = tmp_path / "d.jsonl.gz"
        path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    elif kind == "zst":
        path = tmp_path / "d.jsonl.zst"
        with pa.CompressedOutputStream(str(path), "zstd") as file:
            file.write("\n".join(map(json.dumps, rows)).encode())
    elif kind == "python":  # json.dumps of a NaN
        rows[0]["old_log_probs"] = [math.nan, *OLD[1:]]
        path = written(tmp_path, *rows)
        assert "NaN" in path.read_text()
    else:
        written(tmp_path, rows[0], name="rank0.jsonl")
        written(tmp_path, rows[1], name="rank1.jsonl")
        path = tmp_path / "rank*.jsonl" if kind == "glob" else tmp_path
    found = offline.analyse(path)
    masked = np.array([k3(1, 2, 3) * 3, k3(0, 1, 3) * 3]).sum() / 6
    assert found.overall["k3"] == pytest.approx(masked, rel=1e-5) and found.overall["sequences"] == 2
    assert found.tables["worst of 2 groups"].keys() == {"", "a"}


def test_our_own_token_files_are_a_directory(tmp_path):
    for step in (0, 1, 10):
        table = {
            "old_logprob": OLD, "rollout_logprob": ROLLOUT, "loss_mask": [False, True, True, True], "sequence": [0, 0, 1, 1],
            "step": [step] * 4,
        }  # fmt: skip
        pq.write_table(pa.table(table), tmp_path / f"step_{step}.parquet")
    found = offline.analyse(tmp_path)
    assert list(found.by_step) == [0, 1, 10] and found.overall["sequences"] == 6


GOOD = json.dumps(row(response_mask=[1] * 4)) + "\n"


@pytest.mark.parametrize(
    "name, content, match",
    [
        ("a.jsonl", GOOD + "{broken\n", r"a.jsonl, line 2 is not a JSON object"),
        ("a.jsonl", GOOD + json.dumps(row(response_mask="x")), r"line 2: response_mask was"),
        ("a.jsonl", json.dumps(row(response_mask=["a"] * 4)), r"a.jsonl: the column response_mask holds string"),
        ("a.jsonl", json.dumps(row(old_log_probs=[OLD, OLD], response_mask=[1] * 4)), "old_log_probs holds lists of lists"),
        ("a.parquet", "not parquet", "a.parquet is not a parquet file"),
        ("a.jsonl.gz", "not gz", "a.jsonl.gz cannot be read"),
        ("a.json", "[{]", "a.json cannot be read"),
        ("a.pt", "nothing", "a.pt cannot be read"),
    ],
)  # fmt: skip
def test_a_broken_file_is_named_with_its_column(tmp_path, name, content, match):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=match):
        offline.analyse(tmp_path / name)


def test_a_folder_without_dumps_says_what_it_looked_for(tmp_path):
    with pytest.raises(ValueError, match=r"no file in it ends in .parquet, .jsonl"):
        offline.analyse(tmp_path)
    written(tmp_path, row(response_mask=[1] * 4), name="a.jsonl")
    written(tmp_path, row(), name="b.jsonl")
    with pytest.raises(ValueError, match=r"b.jsonl has no column \['response_mask'\]"):
        offline.analyse(tmp_path)
