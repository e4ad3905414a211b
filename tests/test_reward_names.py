"""rlalign.scoring: public names load on first use, and importing it alone loads nothing heavy."""

import subprocess
import sys

import pytest

import rlalign.scoring


def test_importing_rewards_loads_nothing_heavy():
    heavy = "('torch', 'numpy', 'scipy', 'transformers', 'vllm', 'msgspec', 'fastapi')"
    code = f"import sys, rlalign.scoring; dir(rlalign.scoring); print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "name", ["ScoringParams", "ScoreResult", "HFScorer", "HTTPScorer", "VLLMScorer", "with_calibration"]
)
def test_public_names_are_there(name):
    assert getattr(rlalign.scoring, name).__name__ == name
    assert name in rlalign.scoring.__all__ and name in dir(rlalign.scoring)


def test_parameters_alone_need_no_torch():
    """A client or a server's front checks requests without the weight of a model's libraries."""
    code = "import sys; from rlalign.scoring import ScoringParams; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Scorer'"):
        _ = rlalign.scoring.Scorer
