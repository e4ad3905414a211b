"""scripts/as_host hides from every process below it what it says, and refuses with a reason where it cannot."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "as_host" / "as_host.sh"
SEEN = """
import json, torch
flags = set(open("/proc/cpuinfo").read().split("flags", 1)[1].splitlines()[0].split())
print(json.dumps({
    "torch": torch.backends.cpu.get_cpu_capability(), "bf16": torch.cpu._is_avx512_bf16_supported(),
    "amx": torch.cpu._is_amx_tile_supported(), "flags": sorted(flags & {"avx2", "avx512f", "avx512_bf16", "amx_tile"}),
}))
"""
KINDS = {
    "avx2": {"torch": "AVX2", "bf16": False, "amx": False, "flags": ["avx2"]},
    "avx512": {"torch": "AVX512", "bf16": False, "amx": False, "flags": ["avx2", "avx512f"]},
    "avx512_bf16": {"torch": "AVX512", "bf16": True, "amx": False, "flags": ["avx2", "avx512_bf16", "avx512f"]},
}


def as_host(kind: str, *command: str) -> subprocess.CompletedProcess:
    return subprocess.run([SCRIPT, kind, *command], capture_output=True, text=True)


@pytest.fixture(params=[pytest.param(name, marks=[pytest.mark.slow] * (name != "avx2")) for name in KINDS])
def kind(request) -> str:
    """A kind that this host can play. 125 is the script's own refusal, whose reason it gives."""
    tried = as_host(request.param, "true")
    if tried.returncode == 125:
        pytest.skip(tried.stderr.strip())
    assert tried.returncode == 0, tried.stderr
    return request.param


@pytest.mark.slow
def test_children_see_the_lesser_processor_and_nothing_more(kind):
    # a shell between, so that what is hidden is also hidden from grandchildren
    done = as_host(kind, "sh", "-c", '"$0" -c "$1"', sys.executable, SEEN)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == KINDS[kind]


def test_a_programs_own_faults_and_exit_status_stay_its_own(kind):
    crash = "import ctypes, faulthandler; faulthandler.enable(); ctypes.string_at(0)"
    done = as_host(kind, sys.executable, "-c", crash)
    assert done.returncode == -11 or done.returncode == 139, done
    assert "Segmentation fault" in done.stderr and "string_at" in done.stderr
    assert as_host(kind, "sh", "-c", "exit 7").returncode == 7


@pytest.mark.parametrize(
    ("arguments", "why"), [(["zen9", "true"], "unknown kind 'zen9'"), (["avx2"], "expected a kind")]
)
def test_what_cannot_be_done_is_refused_with_a_reason(arguments, why):
    done = as_host(*arguments)
    assert done.returncode == 125 and why in done.stderr
