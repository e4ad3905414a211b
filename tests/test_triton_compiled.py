"""What Triton and its assembler make of the kernels for an H100 or H200, which this host need not have, and the committed table."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE = """
import json
from dataclasses import asdict
from benchmarks.triton_compiled import SHARED, MEANT, compiled, fingerprint, variants
chosen = [v for v in variants(90) if not v.from_memory and not v.capped and v.kernel != "merge_kernel" and v.dtype == "bf16"]
chosen = [v for v in chosen if v.kernel == "logits_kernel" or v.described]
found = {v.name: asdict(compiled(v, 90)) | {"steps": v.plan.inner // 16, "kernel": v.kernel} for v in chosen}
print(json.dumps({"found": found, "shared": SHARED[90], "meant": MEANT[90], "sources": fingerprint()}))
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Of a process of its own: here the kernels may be defined for the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    out = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert out.returncode == 0, out.stderr[-2000:]
    return json.loads(out.stdout.splitlines()[-1])


@pytest.mark.slow
def test_every_kernel_makes_a_logit_by_the_same_instructions(made):
    """The law of its bits, read in PTX: one instruction, as many times, whatever the tile, the loads and what follows."""
    assert {name.split(",")[0] for name in made["found"]} == {"logits", "sums", "gradient"}
    for name, kernel in made["found"].items():
        assert len(kernel["products"]) == 1, name
        ((instruction, count),) = kernel["products"].items()
        assert instruction.startswith(made["meant"]) and count == kernel["steps"], name
        assert kernel["loads"] == ("TMA" if "TMA" in name else "cp.async"), name


@pytest.mark.slow
def test_nothing_spills_and_shared_memory_suffices(made):
    for name, kernel in made["found"].items():
        assert kernel["spilled_bytes"] == 0, name
        assert kernel["shared_bytes"] <= made["shared"], name


@pytest.mark.slow
def test_the_committed_table_is_of_these_sources(made):
    table = (ROOT / "benchmarks/results/triton_compiled.md").read_text()
    assert f"Sources {made['sources']}." in table, "run python -m benchmarks.triton_compiled --markdown FILE"
    for target in ("sm_80", "sm_90", "sm_100"):
        assert f"| {target} (" in table
