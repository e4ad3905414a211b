"""Proof that every rollout rank runs the head this run asked for. A missing or different answer stops the run.

vLLM logs a plugin that fails to import and carries on without it, and leaves plugins out that VLLM_PLUGINS does not name. So
the driver looks before it starts an engine, asks every rank afterwards, and checks again that the head really was called.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points

import rlalign
from rlalign.head import multiplied
from rlalign.head.routes import law
from rlalign.rollout import SLOT
from rlalign.rollout.engine.surface import EMBEDDED
from rlalign.rollout.exact import MODE as EXACT
from rlalign.rollout.exact import VARIABLE
from rlalign.rollout.head.head_settings import promised

GROUP, NAME = "vllm.general_plugins", "rlalign"
LAYER = "rlalign.rollout.head.logits_processor.AlignedLogitsProcessor"


def preflight() -> None:
    """Before an engine starts: can vLLM find and import the plugin at all? Raises RuntimeError saying what prevents it."""
    found = entry_points(group=GROUP, name=NAME)
    if not found:
        raise RuntimeError(
            f"no entry point {NAME!r} in {GROUP!r}: vLLM will not load rlalign's head. "
            "Install the package in this environment (pip install -e . in a checkout)."
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and NAME not in allowed.split(","):
        raise RuntimeError(
            f"VLLM_PLUGINS={allowed!r} leaves out {NAME!r}, so vLLM would start with its own head. Add it, or unset VLLM_PLUGINS."
        )
    try:
        next(iter(found)).load()
    except Exception as error:  # any failure here is one that vLLM would only log
        raise RuntimeError(
            f"rlalign's vLLM plugin cannot be imported ({type(error).__name__}: {error}); vLLM would log this and start without it."
        ) from error


def require(statuses: Sequence[dict], *, mode: str, ranks: int) -> None:
    """Check the answers of `rlalign_status` against what the run needs. Raises RuntimeError naming the rank and the reason.

    mode: "off", "native", "cached", "master" or "exact"; ranks: how many workers must have answered.
    """
    if len(statuses) != ranks:
        raise RuntimeError(f"{len(statuses)} of {ranks} rollout ranks answered the handshake")
    for status in statuses:
        reason = _wrong(status, mode)
        if reason:
            raise RuntimeError(f"{_who(status)}: {reason}")
    require_same_bits(proofs_of(statuses))


def require_called(statuses: Sequence[dict]) -> None:
    """After the first generation: the patched head must have been executed on every rank."""
    for status in statuses:
        if status["calls"] == 0:
            raise RuntimeError(
                f"{_who(status)} generated tokens without calling {LAYER}._apply_head: its model bypasses "
                "vLLM's LogitsProcessor, so rlalign does not control its head"
            )


def require_multiplied(statuses: Sequence[dict]) -> None:
    """The dtype that logits were found in must be the one that the head's mode promises. Raises RuntimeError naming the rank."""
    for status in statuses:
        reason = _other_dtype(status)
        if reason:
            raise RuntimeError(f"{_who(status)}: {reason}")


def require_same_bits(proofs: Mapping[str, Mapping]) -> None:
    """Every process that makes logits of its own must make them with the same bits. Raises RuntimeError naming two that do not.

    proofs: {who: its "route", "kernel" and "bits"}; a route or bits of None (vLLM's own head, another device) prove nothing and
    are left out.
    """
    heads = {who: proof for who, proof in proofs.items() if proof.get("route") and proof.get("bits")}
    for other, theirs in list(heads.items())[1:]:
        first, mine = next(iter(heads.items()))
        if (law(mine["route"]), mine["bits"]) != (law(theirs["route"]), theirs["bits"]):
            raise RuntimeError(
                f"two ways of making float32 logits in one job: {first} has {_described(mine)}, {other} has {_described(theirs)}; "
                "their last bits differ, so the heads alone would make a mismatch. Run `rlalign build-kernel` on both hosts (it "
                "needs a C compiler), with the same torch; hosts of different kinds agree with RLALIGN_HEAD_KERNEL=avx2 on all"
            )


def proofs_of(statuses: Sequence[dict]) -> dict[str, dict]:
    """The ranks' answers to `rlalign_status`, by the name of the rank."""
    return {_who(status): status for status in statuses}


def _described(proof: Mapping) -> str:
    kernel = f" ({proof['kernel']})" if proof.get("kernel") else ""
    return f"route {proof['route']}{kernel}, bits {proof['bits']}"


def _who(status: dict) -> str:
    engine = status.get("engine", EMBEDDED)
    return f"rollout rank {status['rank']}" + ("" if engine == EMBEDDED else f" of {engine}")


def _wrong(status: dict, mode: str) -> str | None:
    if status["class"] != LAYER:
        if status["slot_holder"] not in (None, LAYER):
            return f"another plugin holds vLLM's {SLOT} slot ({status['slot_holder']}); only one of the two can run"
        return (
            f"its model was built with {status['class']}: the rlalign plugin did not register in that process "
            f"(VLLM_PLUGINS={status['vllm_plugins']!r}; look for 'Failed to load plugin' in its log)"
        )
    if status["rlalign"] != rlalign.__version__:
        return f"it runs rlalign {status['rlalign']}, the driver {rlalign.__version__}; install the same version everywhere"
    if status["mode"] != mode:
        return f"its head runs in mode {status['mode']!r}, this run needs {mode!r}"
    if mode == EXACT and status["not_exact"]:
        return (
            f"exact mode, but it still computes with {', '.join(status['not_exact'])}: either exact mode does not know that "
            f"layer, or the engine was built in a process without {VARIABLE}=1"
        )
    return _other_dtype(status)


def _other_dtype(status: dict) -> str | None:
    if "multiplied" not in status:
        return "it says nothing of the dtype its logits were multiplied in; install the same rlalign everywhere"
    wanted = promised(status["mode"], status["body_dtype"])
    for where, found in status["multiplied"].items():
        if found is None or found["dtype"] is None or found["dtype"] == wanted:
            continue
        if found["dtype"] == multiplied.OTHER and wanted != "float32":
            continue  # a 16-bit kernel may round more than once
        source = "a probe" if where == "probe" else "a call of this run"
        return (
            f"its head runs in mode {status['mode']!r}, which promises {wanted} logits; measured in {source}: "
            f"{multiplied.said(found)}. Something computes in another dtype than it says, such as another plugin or patch around "
            "vLLM's LogitsProcessor; remove it, or run with the head_dtype that it has"
        )
    return None
