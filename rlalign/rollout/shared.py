"""SharedEngine: one rollout engine, or one pool of servers, held by the first trainer rank and seen by all of them.

Every rank makes the same calls in the same order; the first one talks to vLLM, and its answer or its error reaches all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from rlalign import ranks
from rlalign.types import Rollout

if TYPE_CHECKING:
    from rlalign.rollout.engine.embedded import VLLMEngine
    from rlalign.rollout.server.pool import ServerPool


class Samples(Protocol):
    """Makes completions of prompts."""

    def generate(
        self, prompts: Sequence[Sequence[int]], *, prompt_ids: Sequence[int], samples: int, seed: int
    ) -> list[Rollout]: ...


class SharedEngine:
    """What the loop needs of a `VLLMEngine` or a `ServerPool`, on every rank."""

    def __init__(self, start: Callable[[], VLLMEngine | ServerPool]) -> None:
        """start: makes the engine; called on the first rank alone. Raises on every rank what it raises there."""
        self._engine: VLLMEngine | ServerPool | None = None

        def begin() -> tuple:
            self._engine = start()
            e = self._engine
            return e.spec, e.mode, e.version, e.in_flight_updates

        self.through: Callable[[VLLMEngine | ServerPool], Samples] = lambda engine: engine
        self.spec, self.mode, self.version, self.in_flight_updates = ranks.on_first(begin)

    @property
    def policy_version(self) -> int:
        """The version that the engine's weights have."""
        return ranks.on_first(lambda: self.local.policy_version)

    @property
    def local(self) -> VLLMEngine | ServerPool:
        """The engine itself; on the first rank only, inside `ranks.on_first`."""
        assert self._engine is not None, "only the first rank holds the engine"
        return self._engine

    @property
    def sampling(self) -> Samples:
        """What completions come from: the engine, or what `through` makes of it, such as conversations. On the first rank only."""
        return self.through(self.local)

    def generate(
        self, prompts: Sequence[Sequence[int]], *, prompt_ids: Sequence[int], samples: int, seed: int
    ) -> list[Rollout]:
        """As `VLLMEngine.generate`; every rank gets all rollouts."""
        return ranks.on_first(
            lambda: self.sampling.generate(prompts, prompt_ids=prompt_ids, samples=samples, seed=seed)
        )

    def ask(self, method: str, *args: object) -> list[dict]:
        """As `VLLMEngine.ask`; every rank gets all answers."""
        return ranks.on_first(lambda: self.local.ask(method, *args))

    def ask_each(self, method: str, args_of_engine: Sequence[tuple]) -> list[dict]:
        """As `VLLMEngine.ask_each`; every rank gets all answers."""
        return ranks.on_first(lambda: self.local.ask_each(method, args_of_engine))

    @property
    def engines(self) -> list[str]:
        """As `VLLMEngine.engines`; servers come and go."""
        return ranks.on_first(lambda: self.local.engines)

    def status(self) -> list[dict]:
        """As `VLLMEngine.status`."""
        return ranks.on_first(lambda: self.local.status())

    def head_logits(self, hidden_file: Path, *, batch: int) -> Path:
        """As `VLLMEngine.head_logits`; inside `ranks.on_first` already."""
        return self.local.head_logits(hidden_file, batch=batch)

    def close(self) -> None:
        """Stop the engine, where there is one."""
        if self._engine is not None:
            self._engine.close()
