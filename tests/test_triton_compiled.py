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
plain = [v for v in variants(90) if not (v.from_memory or v.capped or v.barred) and v.dtype == "bf16"]
chosen = [v for v in plain if v.kernel == "logits_kernel" or (v.described and v.kernel != "merge_kernel")]
found = {v.name: asdict(compiled(v, 90)) | {"steps": v.plan.inner // 16, "kernel": v.kernel} for v in chosen}
print(json.dumps({"found": found, "shared": SHARED[90], "meant": MEANT[90], "sources": fingerprint()}))
"""


CALLS = """
import json
from types import SimpleNamespace
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit
from rlalign.head import triton as gpu_head
from rlalign.head.projection import project
from rlalign.head.products import Route
from rlalign.head.triton import launches
from rlalign.logprobs import backward, token_logprobs

driver.set_active(SimpleNamespace(
    get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0, get_current_stream=lambda device: 0
))
made, run = {}, jit.JITFunction.run

def compile_only(self, *arguments, grid, warmup, **options):
    kernel = run(self, *arguments, grid=grid, warmup=True, **options)
    made[kernel.hash] = (self.__name__, kernel.metadata.shared)

jit.JITFunction.run = compile_only
gpu_head.sums_on = lambda device: True
backward.backward_route = lambda route, dtype: Route.STRICT_FP32
aligned = lambda x: x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0
launches._describable, launches._grid = aligned, lambda *_: (1,)

def score(n, v, d, **options):
    hidden, weight = torch.randn(1, n, d).bfloat16().requires_grad_(), torch.randn(v, d).bfloat16().requires_grad_()
    ids = torch.arange(n)[None] % v
    if options.pop("kept", False):
        options["kept"] = torch.stack([ids, (ids + 1) % v], -1)
    got = token_logprobs(hidden, weight, ids, **options)
    sum(x.sum() for x in (got if isinstance(got, tuple) else (got,))).backward()

for n in (1, 16, 200):
    for d in (8, 70, 1024):
        for dtype in (torch.bfloat16, torch.float16):
            project(torch.randn(n, d).to(dtype), torch.randn(301, d).to(dtype))
everything = dict(temperature=torch.ones(1, 17), soft_cap=3.0, logit_scale=0.5, entropy=True)
for way in (gpu_head.TRITON, gpu_head.ONE_PASS):
    gpu_head.asked = lambda way=way: way
    gpu_head.multiplies_on = lambda device, way=way: way == gpu_head.TRITON
    score(17, 512, 64)
    score(17, 301, 64, bias=torch.zeros(301, requires_grad=True), keep_mib=1, **everything)
    score(17, 301, 64, kept=True, mode="exact_mirror")
print(json.dumps(list(made.values())))
"""


def in_a_process(code: str, folder: Path):
    """What the code prints last, in a process of its own: here the kernels may be defined for the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder)
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert out.returncode == 0, out.stderr[-2000:]
    return json.loads(out.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return in_a_process(CODE, tmp_path_factory.mktemp("triton"))


@pytest.mark.nightly
def test_every_call_is_bound_and_compiled_as_on_a_gpu(tmp_path):
    """By Triton's own binder: arguments that are None, one, or divisible make kernels of their own, which no table lists."""
    found = in_a_process(CALLS, tmp_path)
    assert {name for name, _ in found} == {"logits_kernel", "sums_kernel", "merge_kernel", "gradient_kernel"}
    assert max(shared for _, shared in found) <= 232448


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
