"""Who else has put hands on vLLM's LogitsProcessor in this process: a plugin in its slot, or functions written over its methods."""

from __future__ import annotations

from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.logits_processor import LogitsProcessor

from rlalign.rollout.names import SLOT

METHODS = ("forward", "_get_logits", "_apply_head", "_gather_logits", "get_top_tokens")
OURS_OR_VLLMS = ("vllm", "rlalign")


def holder() -> str | None:
    """The class that another plugin has registered in the slot, by its full name; None where it is ours or nobody's."""
    found = op_registry_oot.get(SLOT)
    if found is None or found.__module__.split(".")[0] == "rlalign":
        return None
    return f"{found.__module__}.{found.__qualname__}"


def patched() -> list[str]:
    """Methods of vLLM's class that somebody wrote over, each with the module that its function comes from."""
    found = {name: vars(LogitsProcessor).get(name) for name in METHODS}
    return [
        f"{name} (now of {function.__module__})"
        for name, function in found.items()
        if function is not None and function.__module__.split(".")[0] not in OURS_OR_VLLMS
    ]


def require_none() -> None:
    """Raise RuntimeError naming the rival of our head in this process, if there is one."""
    if (other := holder()) is not None:
        raise RuntimeError(
            f"rlalign's head was asked for, and another plugin holds vLLM's {SLOT} slot: {other}. Only one of the two can make the "
            "logits: leave that plugin out of VLLM_PLUGINS, or ask rlalign for nothing (unset RLALIGN_HEAD; no additional_config)"
        )
    if names := patched():
        raise RuntimeError(
            f"rlalign's head was asked for, and something has written over vLLM's {SLOT}: {', '.join(names)}. Its logits would be "
            "neither's: switch that patch off (prime-rl's comes with its plugin: leave it out of VLLM_PLUGINS), or ask rlalign for "
            "nothing (unset RLALIGN_HEAD; no additional_config)"
        )
