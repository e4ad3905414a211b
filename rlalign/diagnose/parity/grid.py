"""What parity measures: bodies, tensor-parallel sizes, head modes, and the settings under which the engine is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product

HEAD_OF_MODE = {"off": "model", "native": "float32", "cached": "float32", "master": "master", "exact": "float32"}
MODES = ("off", "native", "cached", "master")  # between which one engine can be switched
FULL_TEMPERATURES, FULL_BATCHES, FULL_TENSOR_PARALLEL = (1.0, 0.6), (1, 4, 16), (1, 2)
LONGEST = 1024  # tokens of context in the full grid, or what the model allows


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One way of asking the rollout engine that should not change what it answers.

    path: "prefill" teacher-forces sampled tokens through prompt logprobs, which vLLM gives at temperature 1 only; "decode" takes
    the logprobs it sampled with. batch: sequences in the engine at once, 0 for all. context: prompt tokens, 0 for as they are.
    """

    path: str = "prefill"
    temperature: float = 1.0
    batch: int = 0
    context: int = 0


@dataclass(frozen=True, kw_only=True)
class Grid:
    """bodies: dtypes. modes: of the rollout head besides the engine's own and "off". noise_floor: every source of it."""

    bodies: tuple[str, ...] = ("bfloat16", "float32")
    tensor_parallel: tuple[int, ...] = (1,)
    modes: tuple[str, ...] = ()
    settings: tuple[Setting, ...] = ()
    noise_floor: bool = False
    prompts: int = 32
    longest: int = field(init=False)

    def __post_init__(self) -> None:
        too_large = max((s.batch for s in self.settings), default=0)
        if self.prompts < max(1, too_large):
            raise ValueError(
                f"parity: batches of {too_large} need as many prompts, got {self.prompts}; raise --prompts or lower --batch"
            )
        object.__setattr__(self, "longest", max((s.context for s in self.settings), default=0))


def settings(
    *, temperatures: Sequence[float] = (), batches: Sequence[int] = (), contexts: Sequence[int] = ()
) -> tuple[Setting, ...]:
    """One thing changed at a time: decoding at each temperature, then both paths at each batch size and context length.

    Raises ValueError for values that are not positive.
    """
    for name, values in (("temperature", temperatures), ("batch", batches), ("context", contexts)):
        if any(value <= 0 for value in values):
            raise ValueError(f"parity: every {name} must be positive, got {list(values)}")
    found = [Setting(path="decode", temperature=t) for t in temperatures]
    found += [Setting(path=path, batch=n) for n in batches for path in ("prefill", "decode")]
    found += [Setting(path=path, context=n) for n in contexts for path in ("prefill", "decode")]
    return tuple(found)


def rollout_modes(exact: bool, grid: Grid, body: str, own: str) -> tuple[str, ...]:
    """Head modes of the rollout side: vLLM's own, the run's (`own`), and those asked for; in exact mode there is one.

    A float32 weight is its own master.
    """
    if exact:
        return (own,)
    asked = [m for m in grid.modes if m != "master" or body != "float32"]
    return tuple(dict.fromkeys(("off", own, *asked)))


def stage_count(exact: bool, grid: Grid) -> int:
    """How many stages a grid has: both sides started, tokens sampled, every head, every setting under every head, the floor."""
    found = 0
    for size, body in product(grid.tensor_parallel, grid.bodies):
        heads = len(rollout_modes(exact, grid, body, "cached"))
        found += 3 + heads * (1 + len(grid.settings)) + (grid.noise_floor and size == grid.tensor_parallel[0])
    return found


COLUMNS = {
    "k1": "k1",
    "k3": "k3",
    "abs_mean": "abs_mean",
    "p99": "p99",
    "abs_max": "abs_max",
    "pearson": "pearson_prob",
}
ERRORS = ("rollout_error", "trainer_error", "bf16_error")  # of the head in isolation: mean distance from float64
