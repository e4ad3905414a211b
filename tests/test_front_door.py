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


ROOMS = [
    "",
    ".mismatch",
    ".logprobs",
    ".objective",
    ".head",
    ".types",
    ".scoring",
    ".calibration",
    ".weights",
    ".config",
]
FORKED = """
import importlib, os, sys, traceback
import torch, numpy, transformers.models.auto.modeling_auto, transformers.modeling_utils, torch._dynamo, omegaconf
import rlalign  # others' libraries once; of ours nothing is loaded yet

def asked(name, home):
    value = getattr(rlalign, name)
    assert value is sys.modules[home] or value is getattr(sys.modules[home], name)
    space = {}
    exec(f"from rlalign import {name} as again", space)
    assert space["again"] is value

def opened(name):
    module = importlib.import_module("rlalign" + name)
    for public in getattr(module, "__all__", ()):
        assert hasattr(module, public), (name, public)

assert not [m for m in sys.modules if m.startswith("rlalign.")]
for word in sys.argv[1:]:
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0, word
        continue
    try:
        asked(*word.split("=")) if "=" in word else opened(word)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
"""


@pytest.mark.slow
def test_a_public_name_is_what_its_room_calls_so_and_is_there():
    """Each name of the front door and each room asked for first, in a process that has loaded none of the others."""
    words = [f"{name}={home}" for name, home in PUBLIC.items()]
    done = subprocess.run([sys.executable, "-c", FORKED, *words, *ROOMS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_unknown_name_is_answered_with_the_known():
    with pytest.raises(AttributeError, match="no attribute 'projekt'; public are LogprobSpec, Monitor, attach"):
        rlalign.projekt  # noqa: B018


def test_the_types_are_announced():
    assert (Path(rlalign.__file__).parent / "py.typed").exists()


def test_one_version():
    written = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["version"]
    assert rlalign.__version__ == written == version("rlalign")
