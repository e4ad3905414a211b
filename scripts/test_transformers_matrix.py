"""Run the trainer's and the scorers' tests on releases of transformers and torch beyond the locked ones, and write the table.

    python scripts/test_transformers_matrix.py [--rows 5.24.0,5.24.0+torch2.14.1] [--home FOLDER] [--out FILE]

Run it with the main environment's Python. A row's own packages lie in a folder in front of the main environment's: transformers
alone, or with a torch that brings its own libraries (then nothing compiled for another torch is imported: no engine, no DeepSpeed).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from test_vllm_matrix import ROOT, pip, said_of, variables

ROWS = ("5.20.2", "5.21.1", "5.22.2", "5.23.0", "5.24.0", "5.24.0+torch2.14.1")
TESTS = (
    "tests/test_live_mirror.py",
    "tests/test_packing.py",
    "tests/test_trainer_packing.py",
    "tests/test_forced_experts.py",
    "tests/test_body_rounding.py",
    "tests/test_quantised.py",
    "tests/test_hf_scorer.py",
    "tests/test_reward_loading.py",
    "tests/test_lora_targets.py",
    "tests/test_fsdp2.py",
    "tests/test_growth.py",
)
WITH_TRANSFORMERS = ("tests/engine/test_policy.py",)  # DeepSpeed
WITH_TORCH = ("tests/test_head.py", "tests/test_logprobs.py", "tests/test_triton_head.py", "tests/test_cuda_route.py")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--home", type=Path, default=Path(tempfile.gettempdir()) / "rlalign-transformers-matrix")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "transformers_matrix.md")
    options = parser.parse_args()
    lines, passed = [], True
    for row in options.rows.split(","):
        started = time.perf_counter()
        ok, result = run(row, options.home / row)
        passed &= ok
        version, _, torch_version = row.partition("+torch")
        lines.append(f"| {version} | {torch_version or 'locked'} | {result} | {time.perf_counter() - started:.0f} |")
        print(lines[-1], flush=True)
    if options.rows == parser.get_default("rows"):
        options.out.write_text(table(lines))
    return 0 if passed else 1


def run(row: str, folder: Path) -> tuple[bool, str]:
    """(passed, what to say) of the tests on these releases."""
    version, _, torch_version = row.partition("+torch")
    if not (folder / "ready").exists():
        if torch_version:
            pip("install", "--target", str(folder), f"torch=={torch_version}")
        pip("install", "--no-deps", "--upgrade", "--target", str(folder), f"transformers=={version}")
        (folder / "ready").touch()
    environment = variables()
    environment["PYTHONPATH"] = f"{folder}:{environment['PYTHONPATH']}"
    tests = (*TESTS, *(WITH_TORCH if torch_version else WITH_TRANSFORMERS))
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "not nightly", *tests]
    return said_of(subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True), folder / "log")


def table(lines: list[str]) -> str:
    """The committed Markdown."""
    import torch

    names = "`, `".join(Path(test).stem for test in TESTS)
    return "\n".join(
        [
            "# transformers releases",
            "",
            f"`python scripts/test_transformers_matrix.py`: `{names}`;",
            f"with the locked torch ({torch.__version__}) DeepSpeed's `test_policy` too, with another one the head, its Triton",
            "kernels and the logprobs. vLLM 0.32 itself wants transformers below 5.20, 0.33 below 5.21: newer ones are for a",
            "trainer in an environment of its own.",
            "",
            "| transformers | torch | result | seconds |",
            "|---|---|---|--:|",
            *lines,
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
