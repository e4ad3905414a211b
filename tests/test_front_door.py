"""The public names of rlalign: what is promised, that each can be had, and that nothing is loaded before it is asked for."""

import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

import rlalign

# A name that leaves this table was deprecated in a release before: docs/api.md says how.
PUBLIC = {
    "LogprobSpec": "rlalign.types",
    "Monitor": "rlalign.loops",
    "attach": "rlalign.rollout.attached",
    "compare": "rlalign.mismatch",
    "correct": "rlalign.objective.corrections",
    "corrections": "rlalign.objective.corrections",
    "losses": "rlalign.objective.losses",
    "mirror": "rlalign.loops",
    "mirror_check": "rlalign.loops",
    "mismatch": "rlalign.mismatch",
    "presets": "rlalign.objective.presets",
    "project": "rlalign.head.projection",
    "token_logprobs": "rlalign.logprobs",
    "write_tokens": "rlalign.loops",
}


def test_the_public_names_are_these():
    assert set(rlalign.__all__) == {*PUBLIC, "__version__"}
    assert set(PUBLIC) <= set(dir(rlalign))


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_is_what_its_room_calls_so(name):
    code = (
        f"import rlalign, sys; value = rlalign.{name}\n"
        f"home = sys.modules[{PUBLIC[name]!r}]\n"
        f"assert value is home or value is getattr(home, {name!r})\n"
        f"from rlalign import {name} as again; assert again is value"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_name_is_answered_with_the_known():
    with pytest.raises(AttributeError, match="no attribute 'projekt'; public are LogprobSpec, Monitor, attach"):
        rlalign.projekt  # noqa: B018


def test_every_name_that_a_module_says_is_public_is_there():
    root = Path(rlalign.__file__).parent
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    module = importlib.import_module(name)\n"
        "    for public in getattr(module, '__all__', ()):\n"
        "        assert hasattr(module, public), (name, public)\n"
    )
    rooms = ["mismatch", "logprobs", "objective", "head", "types", "scoring", "calibration", "weights", "config"]
    subprocess.run([sys.executable, "-c", code, "rlalign", *(f"rlalign.{room}" for room in rooms)], check=True)
    assert (root / "py.typed").exists()


def test_one_version():
    written = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["version"]
    assert rlalign.__version__ == written == version("rlalign")
