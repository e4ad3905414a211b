"""The documentation site builds without a warning, and its generated pages say what the code says."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlalign.config import RunConfig, TrainerConfig, load, to_plain

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("docs_site", ROOT / "scripts" / "docs_site.py")
docs_site = importlib.util.module_from_spec(spec)
spec.loader.exec_module(docs_site)


def flat(tree: dict, prefix: str = "") -> set[str]:
    """Dotted names of the leaves; a mapping of named things is a leaf."""
    found = set()
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}"}
    return found


def test_every_configuration_key_is_in_the_reference():
    text = docs_site.configuration_reference()
    given = to_plain(load({"model": {"path": "DIR"}, "task": {"name": "chain_sum"}}))
    missing = [key for key in flat(given) if f"`{key}`" not in text and f"## {key}.NAME" not in text]
    assert missing == []


def test_a_comment_beside_or_above_a_key_is_its_explanation():
    assert docs_site.comments(RunConfig)["steps"] == "batches of rollouts"
    about = docs_site.comments(TrainerConfig)
    assert about["attention"].startswith("auto: transformers' choice") and about["grad_clip"] == "2-norm"
    assert not about["body"].startswith("auto") and about["body"].startswith("model: as transformers rounds")


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    made = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path)],
        cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr[-3000:]
    assert "token_logprobs" in (tmp_path / "api.html").read_text()
    assert "rollout.group_size" in (tmp_path / "reference" / "configuration.html").read_text()
