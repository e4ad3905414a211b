"""Which server gets which request, and what becomes of the requests of one that dies: each is answered exactly once.

One event loop, no locks. Requests wait in one queue and go to the serving member with the fewest tokens outstanding as soon as it
has room, so that the servers finish together. A request is a pure function of prompt, seed and weights: asking again is safe.
"""

from __future__ import annotations

import asyncio
import enum
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rlalign.config import RolloutConfig
from rlalign.exits import Lost
from rlalign.rollout.server.client import Client, Refused, Unreachable
from rlalign.rollout.server.wire import Completion, Request

ATTEMPTS = 5  # of one request, before it is taken for the cause of the failures
Answer = tuple[list[Completion], list[list[int]]]  # completions, and the version of every span of each


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


ALIVE = (State.SERVING, State.SUSPECT)


class Dispatcher:
    """The queue and the balance. State: who waits, and why nobody may be served."""

    def __init__(
        self,
        config: RolloutConfig,
        *,
        refusal: str,
        read: Callable[[Member, Sequence[Completion]], list[list[int]]],
        trouble: Callable[[Member, str], None],
    ) -> None:
        """refusal: why nothing may be sampled before the first `release`.

        read: the versions of an answer; raises Unreachable for weights that the member must not have.

        trouble: told of a member that failed a request.
        """
        self._config = config
        self._read, self._trouble = read, trouble
        self._room = config.concurrency or 2 * config.max_num_seqs
        self._waiting: deque[tuple[Request, asyncio.Future[Member]]] = deque()
        self.members: list[Member] = []
        self._refusal: str | None = refusal
        self._held = False  # during an update of the weights
        self.reissued = 0  # requests that were asked for again

    async def run(self, requests: Sequence[Request]) -> list[Answer]:
        """Every request's answer, in order. The first error that is not a server's death ends them all."""
        tasks = [asyncio.create_task(self._answer(request)) for request in requests]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def hold(self) -> None:
        """Give out no more requests; those in flight stay where they are."""
        self._held = True

    def release(self) -> None:
        """Go on; nothing is refused any more. Where no member serves, the waiting requests learn it."""
        self._held, self._refusal = False, None
        self.pump()

    def refuse(self, reason: str) -> None:
        """End every request that waits or runs, and every later one, with this reason, until `release`."""
        self._refusal = reason
        self._fail(self._error())

    def pump(self) -> None:
        """Give waiting requests to members with room."""
        while self._waiting and not self._held:
            if not any(m.state in ALIVE for m in self.members):
                self._fail(Lost(f"no rollout server is left to sample: {self.describe()}"))
                return
            request, place = self._waiting[0]
            member = self._best(request)
            if member is None:
                return
            self._waiting.popleft()
            if not place.done():
                member.tokens += request.tokens
                member.sequences += request.count
                place.set_result(member)

    def describe(self) -> str:
        return "; ".join(m.describe() for m in self.members) or "none is known"

    # --- inside ---

    def _error(self) -> RuntimeError:
        return RuntimeError(f"the rollout servers refuse to run: {self._refusal}")

    def _fail(self, error: Exception) -> None:
        for _, place in self._waiting:
            if not place.done():
                place.set_exception(error)
        self._waiting.clear()
        for member in self.members:
            for call in member.calls:
                if not call.done():
                    call.set_exception(error)

    def _best(self, request: Request) -> Member | None:
        free = [
            m
            for m in self.members
            if m.state is State.SERVING and (m.sequences == 0 or m.sequences + request.count <= self._room)
        ]
        return min(free, key=lambda m: m.tokens, default=None)

    async def _answer(self, request: Request) -> Answer:
        failures: list[str] = []
        while True:
            member = await self._place(request)
            try:
                return await self._ask(member, request)
            except Unreachable as error:
                failures.append(str(error))
                self.reissued += 1
                self._trouble(member, str(error))
            except Refused as error:
                if error.status < 500:
                    raise RuntimeError(
                        f"{member.url} refused a request of prompt {request.prompt_id}: {error}"
                    ) from error
                failures.append(str(error))  # the engine behind it may be dead, or this request may have killed it
                self.reissued += 1
                self._trouble(member, str(error))
            finally:
                member.tokens -= request.tokens
                member.sequences -= request.count
                self.pump()
            if len(failures) == ATTEMPTS:
                raise RuntimeError(
                    f"prompt {request.prompt_id} ({len(request.prompt)} tokens) failed {ATTEMPTS} times: "
                    + "; ".join(failures)
                )

    async def _place(self, request: Request) -> Member:
        """A member with room, already charged with the request."""
        if self._refusal is not None:
            raise self._error()
        place: asyncio.Future[Member] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, place))
        self.pump()
        try:
            return await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled() and place.exception() is None:
                place.result().tokens -= request.tokens
                place.result().sequences -= request.count
            raise

    async def _ask(self, member: Member, request: Request) -> Answer:
        """Its answer, unless the member is given up first: a server that hangs never closes the connection."""
        if self._refusal is not None:  # since the place was given
            raise self._error()
        if member.state not in ALIVE:
            raise Unreachable(member.describe())
        body, timeout = request.body(self._config), self._config.request_timeout_s
        call = asyncio.create_task(member.client.generate(body, timeout))
        taken_back = asyncio.get_running_loop().create_future()
        member.calls.add(taken_back)
        try:
            await asyncio.wait({call, taken_back}, return_when=asyncio.FIRST_COMPLETED)
            if call.done():
                completions = call.result()
                _require_complete(member, request, completions)
                return completions, self._read(member, completions)
            taken_back.result()
            raise Unreachable(member.describe())
        finally:
            member.calls.discard(taken_back)
            if not taken_back.cancel() and not taken_back.cancelled():
                taken_back.exception()  # looked at: asyncio complains of errors that nobody saw
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)


def _require_complete(member: Member, request: Request, completions: Sequence[Completion]) -> None:
    if [c.index for c in completions] != list(range(request.count)):
        raise Refused(
            f"{member.url}: {request.count} completions were asked for, it gave {[c.index for c in completions]}"
        )
    for c in completions:
        if c.weight_versions is None or len(c.logprobs.content) != len(c.token_ids):
            raise Refused(
                f"{member.url}: an answer without a logprob or a weight version for every token; vLLM 0.32 or later gives both"
            )
