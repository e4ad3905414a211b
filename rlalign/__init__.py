"""rlalign: rollout engine and trainer agree on log-probabilities. Importing it loads nothing heavy.

Every public name is loaded from its room when it is first used (PEP 562).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlalign import mismatch
    from rlalign.head.projection import project
    from rlalign.logprobs import token_logprobs
    from rlalign.loops import Monitor, mirror, mirror_check, write_tokens
    from rlalign.mismatch import compare
    from rlalign.objective import corrections, losses, presets
    from rlalign.objective.corrections import correct
    from rlalign.rollout.attached import attach
    from rlalign.types import LogprobSpec

__version__ = "0.1.0"
__all__ = [
    "LogprobSpec",
    "Monitor",
    "__version__",
    "attach",
    "compare",
    "correct",
    "corrections",
    "losses",
    "mirror",
    "mirror_check",
    "mismatch",
    "presets",
    "project",
    "token_logprobs",
    "write_tokens",
]

_HOMES = {  # public name: where it is; a module of its own name, or a name inside one
    "LogprobSpec": "rlalign.types",
    "Monitor": "rlalign.loops",
    "attach": "rlalign.rollout.attached",
    "compare": "rlalign.mismatch",
    "correct": "rlalign.objective.corrections",
    "corrections": "rlalign.objective.corrections",
    "losses": "rlalign.objective.losses",
    "mirror": "rlalign.loops",
    "mirror_check": "rlalign.loops",
    "mismatch": "rlalign.mismatch",
    "presets": "rlalign.objective.presets",
    "project": "rlalign.head.projection",
    "token_logprobs": "rlalign.logprobs",
    "write_tokens": "rlalign.loops",
}


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'rlalign' has no attribute {name!r}; public are {', '.join(sorted(_HOMES))}")
    module = importlib.import_module(home)
    value = module if home.endswith(f".{name}") else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
