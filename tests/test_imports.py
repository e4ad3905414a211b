"""The import contract of the house: its rooms' layers, one home per heavy package, and a light `import rlalign`."""

import ast
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from setuptools import find_packages

TREE = Path(__file__).parents[1]
ROOT = TREE / "rlalign"
HOMES = {
    "triton": ("head.triton",),
    "vllm": ("rollout", "weights.groups", "diagnose", "tracking.environment", "scoring.vllm_scorer"),
    "deepspeed": ("trainer", "tracking.environment"),
    "wandb": ("tracking", "report.dashboard"),
    "wandb_workspaces": ("tracking.dashboard", "report.dashboard"),
    "jinja2": ("report",),
    "trackio": ("tracking.trackio_run",),
    "prometheus_client": ("tracking.prometheus", "serve"),
    "hydra": ("config.run",),
    "omegaconf": ("config",),
    "reasoning_gym": ("tasks",),
    "trl": ("integrations",),
    "verl": ("integrations",),
    "openrlhf": ("integrations",),
    "skyrl": ("integrations",),
    "prime_rl": ("integrations",),
    "ray": ("integrations",),
    "fastapi": ("serve",),
    "httpx": ("scoring.http", "rollout.server"),
    "uvicorn": ("serve", "commands.serve"),
}
MODULES = sorted(p for p in ROOT.rglob("*.py") if p.read_text())


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Absolute names imported anywhere in the file, inside functions too, but not under TYPE_CHECKING."""
    found = set()
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_imports_point_down_and_never_in_circles(tmp_path):
    command = [
        str(Path(sys.executable).with_name("lint-imports")),
        "--config",
        str(TREE / "pyproject.toml"),
        "--no-cache",
    ]
    environment = os.environ | {
        "PYTHONPATH": str(TREE)
    }  # a process of its own: it switches off the loggers of this one
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_heavy_packages_stay_in_their_rooms(path):
    module = name_of(path)
    for package in {target.split(".")[0] for target in imports(path)} & HOMES.keys():
        homes = HOMES[package]
        assert any(module == h or module.startswith(f"{h}.") for h in homes), (
            f"{module} imports {package}, whose home is {homes}"
        )


def test_no_two_files_have_one_name():
    """A traceback, a search or an editor's tab names the file alone. Sections of the configuration are called as their rooms."""
    places = defaultdict(list)
    for path in MODULES:
        if path.name != "__init__.py" and path.parent != ROOT / "config":
            places[path.name].append(name_of(path))
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


def test_every_folder_of_code_ships():
    found = set(find_packages(str(TREE), include=["rlalign", "rlalign.*"]))
    assert found == {".".join(["rlalign", *p.parent.relative_to(ROOT).parts]) for p in ROOT.rglob("*.py")}


def test_importing_the_package_loads_nothing_heavy():
    heavy = "('torch', 'vllm', 'hydra', 'numpy', 'wandb')"
    code = f"import sys, rlalign, rlalign.types, rlalign.cli; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_the_plugin_entry_point_is_light():
    """vLLM only logs a plugin whose import fails: the less it imports, the less can fail."""
    code = "import sys, rlalign.rollout.head_plugin; print('torch' in sys.modules, 'vllm' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False False"
