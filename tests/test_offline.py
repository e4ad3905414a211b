"""`rlalign mismatch FILE`: every layout gives the numbers `compare` gives, and bad files say what is wrong."""

import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from rlalign import cli, mismatch
from rlalign.diagnose import offline, offline_files

LENGTHS = (5, 17, 9, 30, 12, 12)
STEPS = (0, 0, 1, 1, 1, 2)


def data(seed=0):
    """Per sequence: old, rollout, mask, ids."""
    r = np.random.default_rng(seed)
    rows = []
    for n in LENGTHS:
        rollout = -r.exponential(0.7, n).astype(np.float32)
        rows.append((rollout + r.normal(0, 0.1, n).astype(np.float32), rollout, np.arange(n) >= 2, r.integers(0, 9, n)))
    return rows


def padded(rows):
    def pad(k, dtype):
        out = np.zeros((len(rows), max(LENGTHS)), dtype)
        for i, row in enumerate(rows):
            out[i, : len(row[k])] = row[k]
        return torch.from_numpy(out)

    return pad(0, np.float32), pad(1, np.float32), pad(2, bool)


def ours(path, rows):
    """rlalign's own parquet: one row per token."""
    flat = {
        k: np.concatenate([r[i] for r in rows])
        for i, k in enumerate(("old_logprob", "rollout_logprob", "loss_mask", "token_id"))
    }
    n = np.array(LENGTHS)
    first = {s: STEPS.index(s) for s in STEPS}
    flat |= {
        "step": np.repeat(STEPS, n), "sequence": np.repeat([i - first[s] for i, s in enumerate(STEPS)], n),
        "position": np.concatenate([np.arange(k) for k in n]), "policy_version": np.repeat([0, 0, 1, 0, 1, 2], n),
        "token": [["7", "the", "<eos>", " ", "x"][i % 5] for i in flat["token_id"]], 
        "group_id": np.repeat([0, 0, 1, 1, 1, 2], n),
    }  # fmt: skip
    pq.write_table(pa.table(flat), path, row_group_size=20)


def prime_rl(path, rows):
    lines = [
        {
            "schema_version": 1, "step": s, "rank": 0, "run_id": None, "env_name": "math", "token_ids": ids.tolist(),
            "loss_mask": mask.tolist(), "losses": [{"rl": {"advantage": 1.0, "mask": True}}] * len(old),
            "inference_logprobs": [None if math.isnan(x) else x for x in rollout.tolist()],
            "trainer_logprobs": old.tolist(), "entropy": np.abs(old).tolist(), "mismatch_kl": [0.0] * len(old),
        }
        for s, (old, rollout, mask, ids) in zip(STEPS, rows, strict=True)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(x, separators=(",", ":"), allow_nan=False) + "\n" for x in lines))


def lists(names):
    def write(path, rows):
        old, rollout, mask, ids = names
        columns = {old: 0, rollout: 1, mask: 2, ids: 3}
        table = {n: [r[i].astype(int).tolist() if i >= 2 else r[i].tolist() for r in rows] for n, i in columns.items()}
        table["step"] = list(STEPS)
        if path.suffix == ".parquet":
            pq.write_table(pa.table(table), path)
        else:
            path.write_text("".join(json.dumps({k: v[i] for k, v in table.items()}) + "\n" for i in range(len(rows))))

    return write


VERL = lists(("old_log_probs", "rollout_log_probs", "response_mask", "responses"))
TRL = lists(("old_per_token_logps", "sampling_per_token_logps", "completion_mask", "completion_ids"))
DUMPS = [
    ("ours.parquet", ours), ("rank_0.jsonl", prime_rl), ("verl.jsonl", VERL), ("verl.parquet", VERL),
    ("trl.jsonl", TRL), ("trl.parquet", TRL),
]  # fmt: skip


@pytest.mark.parametrize("name, write", DUMPS)
@pytest.mark.parametrize("chunk", [20, 1 << 16])
def test_every_layout_gives_what_compare_gives(tmp_path, monkeypatch, name, write, chunk):
    monkeypatch.setattr(offline, "CHUNK_TOKENS", chunk)
    monkeypatch.setattr(offline_files, "BLOCK_BYTES", 500)
    rows = data()
    write(tmp_path / name, rows)
    found = offline.analyse(tmp_path / name)
    assert found.overall == pytest.approx(mismatch.compare(*padded(rows)), rel=1e-6, abs=1e-9, nan_ok=True)
    for step in set(STEPS):
        alone = mismatch.compare(*(x[torch.tensor(STEPS) == step] for x in padded(rows)))
        assert found.by_step[step] == pytest.approx(alone, rel=1e-6, abs=1e-9, nan_ok=True)
    old, rollout, mask = padded(rows)
    worst = (old - rollout).abs().masked_fill(~mask, -1)
    place = divmod(int(worst.argmax()), worst.shape[1])
    assert (found.worst[0].at.sequence, found.worst[0].at.position) == place
    assert found.worst[0].at.token_id == rows[place[0]][3][place[1]] and found.worst[0].step == STEPS[place[0]]


def test_tables_by_class_version_group_and_entropy(tmp_path):
    rows = data()
    ours(tmp_path / "o.parquet", rows)
    prime_rl(tmp_path / "p.jsonl", rows)
    tables = offline.analyse(tmp_path / "o.parquet").tables
    tokens = sum(int(r[2].sum()) for r in rows)
    assert tables["token class"].keys() == {"other", "special", "digits", "space"}
    digits = sum(int((r[2] & (r[3] % 5 == 0)).sum()) for r in rows)
    assert tables["token class"]["digits"]["tokens"] == digits
    assert tables["versions behind the newest of its step"]["1"]["tokens"] == rows[3][2].sum()
    assert sum(r["tokens"] for r in tables["worst of 3 groups"].values()) == tokens
    entropy = offline.analyse(tmp_path / "p.jsonl").tables["entropy decile"]
    assert sum(r["tokens"] for r in entropy.values()) == tokens and len(entropy) == 10


def test_null_logprobs_are_counted_with_their_tokens(tmp_path):
    rows = data()
    rows[3][1][4] = math.nan
    prime_rl(tmp_path / "p.jsonl", rows)
    found = offline.analyse(tmp_path / "p.jsonl")
    assert found.overall["nonfinite_rollout"] == 1 == found.overall["nonfinite"]
    assert [(r.at.sequence, r.at.position) for r in found.nonfinite] == [(3, 4)]


def test_a_lag_column_separates_staleness(tmp_path):
    rows = data()
    n = sum(LENGTHS)
    lag = np.arange(n) % 2
    flat = {"old_logprob": np.concatenate([r[0] for r in rows]),
            "rollout_logprob": np.concatenate([r[1] for r in rows]), "loss_mask": np.ones(n, bool),
            "sequence": np.repeat(np.arange(6), LENGTHS), "lag": lag}  # fmt: skip
    pq.write_table(pa.table(flat), tmp_path / "l.parquet")
    found = offline.analyse(tmp_path / "l.parquet")
    assert found.overall["lag0/tokens"] + found.overall["lag1/tokens"] == n
    d = (flat["rollout_logprob"].astype(float) - flat["old_logprob"])[lag == 0]
    assert found.overall["lag0/k1"] == pytest.approx(d.mean())


def test_run_prints_writes_and_gates(tmp_path, capsys):
    ours(tmp_path / "o.parquet", data())
    dump, page, picture = (str(tmp_path / name) for name in ("o.parquet", "r.json", "r.png"))
    status = cli.main(["mismatch", dump, "--json", page, "--plot", picture, "--k3-limit", "1e-6"])
    text = capsys.readouterr().out
    assert status == 1 and "over the limit" in text and "| step |" in text and "worst tokens" in text
    written = json.loads((tmp_path / "r.json").read_text())
    assert written["overall"]["tokens"] == sum(n - 2 for n in LENGTHS) and len(written["steps"]) == 3
    assert (tmp_path / "r.png").stat().st_size > 10_000
    assert cli.main(["mismatch", dump, "--k3-limit", "1.0"]) == 0


def test_other_column_names_can_be_mapped(tmp_path, capsys):
    rows = data()
    lists(("p", "q", "m", "i"))(tmp_path / "x.jsonl", rows)
    with pytest.raises(ValueError, match=r"no old_logprobs.*--column old_logprobs=NAME.*Text dumps"):
        offline.analyse(tmp_path / "x.jsonl")

    def told(*columns):
        status = cli.main(["mismatch", str(tmp_path / "x.jsonl"), *(f"--column={column}" for column in columns)])
        return status, capsys.readouterr().err

    assert told("old_logprobs=p", "rollout_logprobs=q", "loss_mask=m")[0] == 0
    for column, what in (("old=p", "unknown field"), ("old_logprobs=zz", "no column"), ("old_logprobs", "field=name")):
        status, said = told(column)
        assert status == 2 and what in said


@pytest.mark.parametrize(
    "name, content, match",
    [
        ("a.csv", "x", "read .parquet, .jsonl"),
        ("a.jsonl", "", "first line"),
        ("a.jsonl", "not json\n", "a.jsonl"),
        ("a.jsonl", '{"old_logprobs": [1.0], "rollout_logprobs": [1.0, 2.0], "loss_mask": [1]}\n', "differ in length"),
        ("a.jsonl", '{"old_logprobs": [], "rollout_logprobs": [], "loss_mask": []}\n', "no tokens"),
        ("a.jsonl", '{"old_logprob": 1.0, "rollout_logprob": 1.0, "loss_mask": 1}\n', "sequence column"),
        ("a.jsonl", '{"input": "2+2", "output": "4", "score": 1.0}\n', "hold no log-probabilities"),
    ],
)
def test_files_that_cannot_be_read_say_why(tmp_path, name, content, match):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=match):
        offline.analyse(tmp_path / name)
    with pytest.raises(ValueError, match="no such file"):
        offline.analyse(tmp_path / "absent.jsonl")
