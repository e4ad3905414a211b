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


FORKED = """
import os, sys, traceback
import torch, transformers, rlalign  # once; of ours nothing is loaded yet

for name, home in (word.split("=") for word in sys.argv[1:]):
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0, name
        continue
    try:
        value = getattr(rlalign, name)
        assert value is sys.modules[home] or value is getattr(sys.modules[home], name)
        space = {}
        exec(f"from rlalign import {name} as again", space)
        assert space["again"] is value
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
"""


def test_a_public_name_is_what_its_room_calls_so():
    """Each asked for first, in a process that has loaded none of the others."""
    words = [f"{name}={home}" for name, home in PUBLIC.items()]
    done = subprocess.run([sys.executable, "-c", FORKED, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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
