"""What is known of each server: whether it answers, whether it is the right one, and whether it has the current weights."""

from __future__ import annotations

import asyncio
import enum
from dataclasses import dataclass, field

from rlalign.rollout.server.client import Client


class State(enum.Enum):
    """Only a serving member gets requests."""

    SERVING = "serving"  # has the current weights
    SUSPECT = "suspect"  # a request failed there; it is being examined
    JOINING = "joining"  # the right server, but its weights are not this run's: the next publish takes it in
    DOWN = "down"  # does not answer
    REFUSED = "refused"  # answers, but is not what this run needs


@dataclass(eq=False)
class Member:
    """One server of the pool. why: of a state other than serving; life: of the process that passed the handshake."""

    client: Client
    state: State = State.DOWN
    why: str = "not asked yet"
    life: str = ""
    misses: int = 0  # health checks in a row without an answer
    tokens: int = 0  # that it was asked for and has not delivered, at most
    sequences: int = 0  # in flight there
    calls: set[asyncio.Future] = field(default_factory=set)  # of requests in flight there; completing one takes it back

    @property
    def url(self) -> str:
        return self.client.url

    def becomes(self, state: State, why: str = "") -> None:
        """Change state; whatever is in flight at a member that does not serve any more is taken back."""
        self.state, self.why, self.misses = state, why, 0
        if state in (State.DOWN, State.JOINING, State.REFUSED):
            for call in self.calls:
                if not call.done():
                    call.set_result(None)

    def describe(self) -> str:
        return f"{self.url} is {self.state.value}" + (f" ({self.why})" if self.why else "")
