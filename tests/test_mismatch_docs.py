"""docs/metrics.md has every key there is, and none that is not."""

import re
from fnmatch import fnmatch
from pathlib import Path

import torch

from rlalign import mismatch
from rlalign.objective import corrections

TEXT = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text()


def expand(pattern):
    """`a{b,c}d` -> abd, acd; `{0..9}` and `{v}` -> wildcards."""
    pattern = re.sub(r"\{\d\.\.\d\}|\{v\}", "*", pattern)
    found = re.match(r"(.*?)\{(.*?)\}(.*)", pattern)
    return [pattern] if not found else [n for x in found[2].split(",") for n in expand(found[1] + x + found[3])]


def documented():
    names, last = [], ""
    table = TEXT.split("## Keys")[1].split("By entropy decile")[0]
    for cell in re.findall(r"^\| (`.*?) \| ", table, re.M):
        for name in re.findall(r"`(.*?)`", cell):
            if name.startswith("_"):
                names += [last + name, last.rpartition("_")[0] + name]
            else:
                names += expand(name)
                last = name
    general = (
        "tokens",
        "sequences",
        "nonfinite",
        "nonfinite_old",
        "nonfinite_rollout",
        "clamped_tokens",
        "clamped_sequences",
    )
    return [*names, *(n for n in general if f"`{n}`" in TEXT)]


def measured():
    g = torch.Generator().manual_seed(0)
    rollout = -torch.rand(4, 30, generator=g)
    old = rollout + 0.1 * torch.randn(4, 30, generator=g)
    mask = torch.ones(4, 30, dtype=torch.bool)
    return (
        old,
        rollout,
        mask,
        mismatch.compare(old, rollout, mask, lag_B=torch.zeros(4).long(), group_B=torch.arange(4)),
    )


def test_every_key_is_documented():
    patterns = documented()
    missing = [key for key in measured()[3] if not any(fnmatch(key, p.replace("...", "*")) for p in patterns)]
    assert missing == []


def test_every_key_of_describe_is_documented():
    old, rollout, mask, _ = measured()
    section = TEXT.split("After a correction")[1].split("## Translation")[0]
    names = [n for pattern in re.findall(r"`(.*?)`", section) for n in expand(pattern)]
    described = corrections.describe(corrections.identity(old, rollout, mask), old, rollout, mask)
    assert set(described) <= set(names)


def test_translations_lead_to_keys_that_exist():
    old, rollout, mask, metrics = measured()
    known = set(metrics) | set(corrections.describe(corrections.identity(old, rollout, mask), old, rollout, mask))
    cells = re.findall(r"^\| [^|]*`[^|]* \| (`[^|]*?) \| ", TEXT.split("## Translation")[1].split("## Where")[0], re.M)
    names = [n for cell in cells for raw in re.findall(r"`(.*?)`", cell) for n in expand(raw.lstrip("-"))]
    elsewhere = {
        "describe", "reject", "veto", "tis", "opsm", "dppo_tv", "ratio", "ref_k3", "normalized", "token_lags",
        "staleness/policy/*", "staleness/kv/*",
        'correct(mode="mask")', "rlalign mismatch FILE",
    }  # fmt: skip
    unknown = [
        n for n in names if not n.startswith("_") and n not in elsewhere and not any(fnmatch(k, n) for k in known)
    ]
    assert len(names) > 80 and unknown == []
