"""Which head an engine was asked for, and by which way it gets there: read, refused and decided here, for driver and worker.

In vLLM's additional_config: {"rlalign": {"head_dtype": "float32", "mode": "auto"}}; what is left out has these defaults. Where that
says nothing, RLALIGN_HEAD=float32 (and RLALIGN_HEAD_MODE) in the environment of the process that builds the engine do, for stacks
that pass no additional_config on. Nothing of vLLM is imported: a driver decides here what a server's workers must say.
"""

from __future__ import annotations

import difflib
import enum
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rlalign.head import triton as gpu_head
from rlalign.rollout import SETTINGS_KEY
from rlalign.rollout.exact import MODE as EXACT

FIELDS_SPELLING = "fp32_lm_head"  # the same wish as other stacks write it, beside our key or inside it
MODES_OF = {  # head_dtype -> what mode may say beside it
    "float32": ("auto", "native", "cached", EXACT),
    "master": ("auto",),
    "model": ("auto", "off"),
}
KEYS = ("head_dtype", "mode", FIELDS_SPELLING)
VARIABLES = {"head_dtype": "RLALIGN_HEAD", "mode": "RLALIGN_HEAD_MODE"}
BESIDE = "RLALIGN_HEAD_KERNEL"  # begins alike and says something else: `rlalign.head.kernel`
NAMES = {
    SETTINGS_KEY: SETTINGS_KEY,
    FIELDS_SPELLING: FIELDS_SPELLING,
    "head_dtype": SETTINGS_KEY,
}  # meant -> where it goes
ALIKE = 0.8  # from this similarity on a key is a slip of one of NAMES


class HeadMode(enum.Enum):
    """How the rollout side reaches float32 logits."""

    OFF = "off"  # vLLM's own head in the body's dtype
    NATIVE = "native"  # vLLM's own float32 head: mm(out_dtype=float32) on CUDA, nothing to go stale
    CACHED = "cached"  # our product: straight from the weight where the host can, else from an fp32 copy of it
    MASTER = "master"  # the trainer's unrounded fp32 weight, published beside the 16-bit one
    EXACT = "exact"  # float32 from the lm_head's own blocked products, in an engine of exact mode


@dataclass(frozen=True, slots=True)
class HeadSettings:
    """head_dtype: "float32", "master" or "model" (the body's). mode: one of MODES_OF, "auto" for the platform's best.

    Raises ValueError for other values, and for two that contradict each other.
    """

    head_dtype: str = "float32"
    mode: str = "auto"

    def __post_init__(self) -> None:
        _check(self.head_dtype, self.mode, _where)

    @classmethod
    def of_run(cls, head_dtype: str, head_mode: str, *, exact: bool) -> HeadSettings:
        """What a run's configuration asks. head_mode is about float32 heads and says nothing of the others."""
        if exact:
            return cls(head_dtype, EXACT)
        return cls(head_dtype, head_mode if head_dtype == "float32" else "auto")

    @classmethod
    def of_engine(cls, additional_config: object) -> HeadSettings | None:
        """What vLLM's additional_config asks; None where nothing in it is ours.

        Raises ValueError for keys that look like ours and are not, unknown keys, wrong types, values and contradictions.
        """
        if not isinstance(additional_config, Mapping):
            return None
        _refuse_slips(additional_config)
        if not {SETTINGS_KEY, FIELDS_SPELLING} & additional_config.keys():
            return None
        given = additional_config.get(SETTINGS_KEY, {})
        if not isinstance(given, Mapping):
            raise ValueError(
                f'additional_config["{SETTINGS_KEY}"] is {given!r}; expected a dictionary such as '
                '{"head_dtype": "float32", "mode": "auto"}'
            )
        if unknown := [key for key in given if key not in KEYS]:
            raise ValueError(f"{_where(unknown[0])} is no setting; there are {_listed(KEYS)}")
        head_dtype = given.get("head_dtype", "float32")
        for place in (given, additional_config):
            if FIELDS_SPELLING in place:
                head_dtype = _translated(place[FIELDS_SPELLING], given.get("head_dtype"))
        return cls(_text("head_dtype", head_dtype), _text("mode", given.get("mode", "auto")))

    @classmethod
    def of_environment(cls, environment: Mapping[str, str]) -> HeadSettings | None:
        """What RLALIGN_HEAD and RLALIGN_HEAD_MODE ask; None where neither is set or both are empty.

        Raises ValueError for other values, contradictions, and other variables whose names begin with RLALIGN_HEAD.
        """
        known = {*VARIABLES.values(), BESIDE}
        for name in environment:
            if name.startswith(VARIABLES["head_dtype"]) and name not in known:
                raise ValueError(
                    f"{name} is read by nobody, and the head would stay in the body's dtype; there are {_listed(sorted(known))}"
                )
        given = {key: environment[name] for key, name in VARIABLES.items() if environment.get(name)}
        if not given:
            return None
        defaults = {"head_dtype": "float32", "mode": "auto"}
        _check(**(defaults | given), where=lambda key: VARIABLES[str(key)])
        return cls(**given)

    @classmethod
    def wanted(cls, additional_config: object, environment: Mapping[str, str] = os.environ) -> HeadSettings | None:
        """What an engine is asked: by its additional_config, else by the environment. None: nothing is asked of us."""
        given = cls.of_engine(additional_config)
        return cls.of_environment(environment) if given is None else given

    def as_dict(self) -> dict[str, str]:
        """For vLLM's additional_config."""
        return {"head_dtype": self.head_dtype, "mode": self.mode}

    def resolve(self, *, device: str) -> HeadMode:
        """The one decision. device: vLLM's word for where it runs ("cuda" for ROCm too).

        RLALIGN_GPU_HEAD=triton takes our product on CUDA, in the trainer's process as in the engine's: one kernel for both.
        """
        if self.head_dtype == "model":
            return HeadMode.OFF
        if self.head_dtype == "master":
            return HeadMode.MASTER
        if self.mode != "auto":
            return HeadMode(self.mode)
        native = device == "cuda" and gpu_head.asked() != gpu_head.TRITON
        return HeadMode.NATIVE if native else HeadMode.CACHED


def promised(mode: str, body_dtype: str) -> str:
    """The dtype of logits that a head in this mode gives, by its name."""
    return body_dtype if mode == HeadMode.OFF.value else "float32"


def _check(head_dtype: str, mode: str, where: Callable[[object], str]) -> None:
    every = sorted({mode for modes in MODES_OF.values() for mode in modes})
    if head_dtype not in MODES_OF:
        raise ValueError(f"{where('head_dtype')} is {head_dtype!r}; choose {_listed(MODES_OF)}")
    if mode not in every:
        raise ValueError(f"{where('mode')} is {mode!r}; choose {_listed(every)}")
    if mode not in MODES_OF[head_dtype]:
        raise ValueError(
            f"{where('mode')} {mode!r} contradicts head_dtype {head_dtype!r}: beside it choose {_listed(MODES_OF[head_dtype])}"
        )


def _translated(wanted: object, head_dtype: object) -> str:
    if not isinstance(wanted, bool):
        raise ValueError(f"additional_config: {FIELDS_SPELLING} is {wanted!r}; choose true or false")
    meant = "float32" if wanted else "model"
    if head_dtype not in (None, meant):
        raise ValueError(
            f"additional_config: {FIELDS_SPELLING}={str(wanted).lower()} means head_dtype {meant!r}, and head_dtype is "
            f"{head_dtype!r}; leave one out"
        )
    return meant


def _refuse_slips(additional_config: Mapping) -> None:
    """Raise ValueError for a key that would otherwise be passed over, and leave the head in 16 bits."""
    plain = {"".join(filter(str.isalnum, name)).lower(): name for name in NAMES}
    for key in additional_config:
        if key in (SETTINGS_KEY, FIELDS_SPELLING):
            continue
        letters = "".join(filter(str.isalnum, str(key))).lower()
        alike = difflib.get_close_matches(letters, plain, n=1, cutoff=ALIKE)
        if not alike and "fp32" in letters and "head" in letters:  # enable_fp32_lm_head, lm_head_fp32
            alike = [next(short for short, name in plain.items() if name == FIELDS_SPELLING)]
        if alike:
            meant = plain[alike[0]]
            how = f"{meant!r}" if NAMES[meant] == meant else f'{meant!r} inside {{"{SETTINGS_KEY}": {{...}}}}'
            raise ValueError(
                f"additional_config: {key!r} is read by nobody, and the head would stay in the body's dtype; did you mean {how}?"
            )


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        choices = MODES_OF if name == "head_dtype" else sorted({m for modes in MODES_OF.values() for m in modes})
        raise ValueError(f"{_where(name)} is {value!r}; choose {_listed(choices)}")
    return value


def _where(name: object) -> str:
    return f'additional_config["{SETTINGS_KEY}"]: {name!r}'


def _listed(names: Mapping | tuple[str, ...] | list[str]) -> str:
    *most, last = (f'"{name}"' for name in names)
    return f"{', '.join(most)} or {last}" if most else last
