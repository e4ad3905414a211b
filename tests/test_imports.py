"""The import contract of the house: levels, one home per heavy package, and a light `import rlalign`."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "rlalign"
# Modules by level; a folder stands for everything inside. A module may import its own level (level 1 and 4) or lower ones.
LEVELS = {
    0: {"types", "config", "install_check", "exits", "cache_folder"},
    1: {
        "aligned", "attention", "blocked", "exact", "head", "head_cache", "head_kernel", "products", "multiplied", "routes",
        "logprobs",
        "mismatch", "corrections", "presets", "surrogate", "losses", "objective", "advantages", "reference_kl", "ranks",
        "widened", "reward.calibration", "reward.adaptive", "reward.metrics",
    },
    2: {
        "weights", "checkpoint", "tracking", "report", "tasks", "tiny_policy", "reward",
        "reward.adaptive.model_batches", "reward.adaptive.command",
    },
    3: {"rollout", "trainer", "reward.vllm_scorer", "reward.http_scorer"},
    4: {
        "loop", "sampler", "gate", "parties", "step_metrics", "train", "assemble", "fitting", "observe", "watch",
        "verified_samples", "resume", "joining", "cli", "commands", "compose", "diagnose",
    },
}  # fmt: skip
HOMES = {
    "vllm": ("rollout", "weights.nccl", "diagnose", "tracking.environment", "reward.vllm_scorer"),
    "deepspeed": ("trainer", "tracking.environment"),
    "wandb": ("tracking", "report.dashboard"),
    "wandb_workspaces": ("report.dashboard",),
    "jinja2": ("report",),
    "trackio": ("tracking.trackio_run",),
    "prometheus_client": ("tracking.prometheus", "reward.server"),
    "hydra": ("compose",),
    "omegaconf": ("config", "compose"),
    "reasoning_gym": ("tasks",),
    "fastapi": ("reward.server",),
    "httpx": ("reward.http_scorer", "rollout.server"),
    "uvicorn": ("reward.server",),
}
MODULES = sorted(p for p in ROOT.rglob("*.py") if p.read_text())


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def level_of(module: str) -> int:
    parts = module.split(".")
    for depth in range(len(parts), 0, -1):
        for level, members in LEVELS.items():
            if ".".join(parts[:depth]) in members:
                return level
    raise AssertionError(f"rlalign.{module} is in no level: place it in LEVELS")


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


def known(target: str) -> str | None:
    """The rlalign module that an imported name belongs to, or None for the package itself and names inside it."""
    parts = target.split(".")[1:]
    for depth in range(len(parts), 0, -1):
        if (ROOT.joinpath(*parts[:depth]).with_suffix(".py")).exists():
            return ".".join(parts[:depth])
        if (ROOT.joinpath(*parts[:depth]) / "__init__.py").exists():
            return ".".join(parts[:depth])
    return None


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_arrows_point_down(path):
    module = name_of(path)
    for target in imports(path):
        other = known(target) if target.split(".")[0] == "rlalign" else None
        if other is None or other.split(".")[0] == module.split(".")[0]:
            continue
        assert level_of(other) <= level_of(module), f"{module} (level {level_of(module)}) imports {other}"
        rooms = {module.split(".")[0], other.split(".")[0]}
        assert rooms != {"trainer", "rollout"}, f"{module} imports {other}: trainer and rollout meet only in the loop"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_heavy_packages_stay_in_their_rooms(path):
    module = name_of(path)
    for package in {target.split(".")[0] for target in imports(path)} & HOMES.keys():
        homes = HOMES[package]
        assert any(module == h or module.startswith(f"{h}.") for h in homes), (
            f"{module} imports {package}, whose home is {homes}"
        )


def test_tracking_knows_no_page():
    for path in (ROOT / "tracking").rglob("*.py"):
        assert not any(target.startswith("rlalign.report") for target in imports(path)), (
            f"{path}: report stands on tracking"
        )


def test_corrections_never_see_rewards():
    for path in [ROOT / "corrections.py", *(ROOT / "mismatch").glob("*.py")]:
        assert not any("reward" in target for target in imports(path))


def test_every_package_ships():
    import tomllib

    listed = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {
        "rlalign.configs",
        *(".".join(["rlalign", *p.parent.relative_to(ROOT).parts]) for p in ROOT.rglob("__init__.py")),
    }
    assert set(listed) == found


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
