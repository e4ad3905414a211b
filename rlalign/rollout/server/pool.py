"""ServerPool: one or many vLLM servers behind the surface of one engine. Tokens in, rollouts out, weights in, proof on demand."""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import TypeVar

from rlalign.exits import Lost
from rlalign.rollout.engine import handshake
from rlalign.rollout.engine.surface import require_room, spec_of
from rlalign.rollout.server import wire
from rlalign.rollout.server.client import Unreachable
from rlalign.rollout.server.dispatch import Dispatcher, Member, State
from rlalign.rollout.server.greeting import Launch
from rlalign.rollout.server.roster import Roster
from rlalign.rollout.server.wire import Completion
from rlalign.types import Rollout

LAST = 2.0  # seconds that coroutines may take to end by themselves
T = TypeVar("T")
SURE = 4  # completions for every further engine of a server, after which each of them has had one
NOT_YET = "no weights were published to the servers yet"
Answered = TypeVar("Answered")


class LoopThread:
    """Runs coroutines for other threads until closed."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def call(self, coroutine: Coroutine[object, object, T]) -> T:
        """Its result. An interrupt of the caller cancels it."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def spawn(self, coroutine: Coroutine[object, object, None]) -> asyncio.Future:
        """Start it and go on."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def close(self) -> None:
        """Stop the loop; whoever still waits for a coroutine gets its result, or CancelledError. Safe to call twice."""
        if not self._loop.is_closed():
            self.call(_finish())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()


async def _finish() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    if others:
        _, late = await asyncio.wait(others, timeout=LAST)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
    await asyncio.sleep(0)  # their callbacks carry the results to the other threads


class ServerPool:
    """The servers of a run. Refuses to generate before the first publish, and while the weights are in doubt.

    generate may run in one thread while weights are published from another: requests in flight stay where they are, paused, and
    go on with the new weights; requests that have not been sent wait.
    """

    in_flight_updates = True

    def __init__(
        self,
        urls: Sequence[str],
        wanted: Launch,
        *,
        count: int,
        key: str | None = None,
        stop: Callable[[], None] = lambda: None,
        say: Callable[[str], None] = lambda message: None,
    ) -> None:
        """Greet `count` servers, which are as `wanted`: those at `urls` and those announced in rollout.server_folder.

        key: of servers that ask for one; stop: ends servers that were started for this pool, when it is closed; say: writes down
        what became of servers and requests, from any thread.
        Raises RuntimeError naming each server that does not answer, or that this run must not use.
        """
        config = self.config = wanted.config
        self.spec = spec_of(config, wanted.head_dtype)
        self.policy_version = 0
        self.engines: list[str] = []
        self._run = uuid.uuid4().hex[:8]  # whose weights a server has: part of every label
        self._update: asyncio.TimerHandle | None = None  # under way; its timer ends the patience of those who wait
        self._answered: Counter[str] = Counter()  # completions that each life has delivered
        self._proven_live: set[str] = set()  # lives of the processes whose head was seen called
        self._watching: asyncio.Future | None = None
        self._stop = stop
        self._closed = False
        self._served = False  # there was an acknowledged version
        self._told = 0  # of `reissued`, those that were written down
        self._dispatcher = Dispatcher(
            config, refusal=NOT_YET, read=self._versions, trouble=lambda m, why: self._roster.examine(m, why)
        )
        self._roster = Roster(wanted, key=key, changed=self._dispatcher.pump, left=self._left, say=say)
        self._dispatcher.members = self._roster.members
        self._loop = LoopThread("rlalign-rollout-servers")
        try:
            self._loop.call(self._roster.assemble(list(urls), count))
        except BaseException:
            self.close()
            raise
        self.engines = [m.url for m in self._roster.of(State.JOINING)]
        greeting = self._roster.greetings[self.engines[0]]
        self.version, self.mode = greeting.version, greeting.mode
        self._watching = self._loop.spawn(self._roster.watch())

    def generate(
        self, prompts: Sequence[Sequence[int]], *, prompt_ids: Sequence[int], samples: int, seed: int
    ) -> list[Rollout]:
        """As `VLLMEngine.generate`, with the same seeds: which server answers does not matter.

        Waits while the servers are paused, at most rollout.pause_timeout_s. Raises ValueError for a prompt that leaves no room,
        RuntimeError while the weights are in doubt, or when no server is left.
        """
        if self._closed:
            raise RuntimeError("the pool of rollout servers was closed")
        require_room(prompts, prompt_ids, self.config)
        requests = wire.cut(prompts, prompt_ids, samples=samples, seed=seed, config=self.config)
        answers = self._loop.call(self._dispatcher.run(requests))
        again, self._told = self.reissued - self._told, self.reissued
        if again:
            self._roster.tell(f"{again} requests were asked for again, after a server did not answer them")
        rollouts = [
            rollout
            for request, (completions, versions) in zip(requests, answers, strict=True)
            for rollout in wire.rollouts_of(request, completions, versions)
        ]
        self._prove_live()
        return rollouts

    # --- what everything about workers is built on ---

    def ask(self, method: str, *args: object) -> list[dict]:
        """One RPC of the worker extension on every rank of `engines`; each answer with its "rank" and its "engine".

        A server that dies meanwhile leaves the pool, and `engines`, and has no answer here. Raises RuntimeError naming the
        server where a worker fails, or where no server is left.
        """
        return self._ask(method, dict.fromkeys(list(self.engines), args))

    def ask_each(self, method: str, args_of_engine: Sequence[tuple]) -> list[dict]:
        """`ask` with a tuple of arguments for each of `engines`, in their order."""
        return self._ask(method, dict(zip(self.engines, args_of_engine, strict=True)))

    # --- the receiving side of weights.publish ---

    def suspend(self, reason: str) -> None:
        """Pause every server, without a key/value block left, and take in those that came back: they get the next weights.

        `engines` is who takes part from now on. A second call before `acknowledge` says that the update failed: whoever waits
        for it is told.
        """
        self._loop.call(self._suspend(reason))

    def acknowledge(self, version: int) -> None:
        """Stamp `version` on everything sampled from now on, then let every server go on."""
        self._loop.call(self._acknowledge(version))

    # --- evidence ---

    def status(self) -> list[dict]:
        """What the head of each rank of each server is and did (see WorkerExtension.rlalign_status)."""
        return self.ask("rlalign_status")

    def servers(self) -> dict[str, str]:
        """{url: its state, and why it is not serving}."""
        return {m.url: m.describe() for m in self._roster.members}

    @property
    def reissued(self) -> int:
        """Requests that had to be asked for again, since the start."""
        return self._dispatcher.reissued

    def head_logits(self, hidden_file: Path, *, batch: int) -> Path:
        """Project stored hidden states through the first server's head; returns the file of logits.

        The file must lie where that server can read and write: in weights.shared, on a folder that both hosts share.
        """
        return Path(self.ask("rlalign_head_logits", str(hidden_file), batch)[0]["file"])

    def close(self) -> None:
        """Let go of the servers, and end those that were started for this pool. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        try:
            self._loop.call(self._end())
            self._loop.close()
        finally:
            self._stop()

    # --- inside; coroutines run on the pool's own loop ---

    def _ask(self, method: str, args_of: dict[str, tuple]) -> list[dict]:
        timeout = self.config.pause_timeout_s
        answers = self._loop.call(
            self._of_all(list(args_of), lambda m: m.client.rpc(method, args_of[m.url], timeout), method)
        )
        return [answer for one in answers for answer in one]

    async def _of_all(
        self, urls: Sequence[str], action: Callable[[Member], Awaitable[Answered]], what: str
    ) -> list[Answered]:
        """Do it at every one of these members at once. One that does not answer leaves the pool."""
        members = [m for m in self._roster.members if m.url in urls]
        found = await asyncio.gather(*(action(m) for m in members), return_exceptions=True)
        answers: list[Answered] = []
        failures: list[BaseException] = []
        for member, answer in zip(members, found, strict=True):
            if isinstance(answer, Unreachable):
                self._roster.leaves(member, State.DOWN, f"{what}: {answer}")
            elif isinstance(answer, BaseException):
                failures.append(answer)
            else:
                answers.append(answer)
        if failures:
            raise failures[0]
        if not answers:
            raise Lost(f"no rollout server answered {what}: {self._dispatcher.describe()}")
        return answers

    def _left(self, member: Member) -> None:
        self.engines = [url for url in self.engines if url != member.url]

    async def _suspend(self, reason: str) -> None:
        self._dispatcher.hold()
        if self._update is None:
            patience = self.config.pause_timeout_s
            late = f"{reason}, and rollout.pause_timeout_s={patience:g} is over"
            self._update = asyncio.get_running_loop().call_later(patience, self._dispatcher.refuse, late)
        else:
            self._update.cancel()
            self._dispatcher.refuse(reason)
        self.engines = [m.url for m in self._roster.of(State.SERVING, State.SUSPECT, State.JOINING)]
        await self._of_all(self.engines, lambda m: m.client.pause(self.config.pause_timeout_s), "pause")

    async def _acknowledge(self, version: int) -> None:
        timeout = self.config.pause_timeout_s

        async def told(member: Member) -> None:
            workers = member.client.rpc("rlalign_acknowledge", (version,), timeout)
            label = member.client.stamp(f"{self._run}/{version}", timeout)
            for answer in await asyncio.gather(workers, label, return_exceptions=True):
                if isinstance(answer, BaseException):
                    raise answer

        await self._of_all(self.engines, told, "acknowledge")
        self.policy_version = version
        await self._of_all(self.engines, lambda m: m.client.resume(timeout), "resume")
        for member in self._roster.members:
            if member.url in self.engines:
                if member.state is State.JOINING and self._served:
                    self._roster.tell(f"{member.url} joins the pool with policy version {version}")
                member.becomes(State.SERVING)
        self._served = True
        if self._update is not None:
            self._update.cancel()
        self._update = None
        self._dispatcher.release()

    def _versions(self, member: Member, completions: Sequence[Completion]) -> list[list[int]]:
        """Of every span. A label that this pool did not give means weights that nobody here knows."""
        labels = {span.version for c in completions for span in c.weight_versions or ()}
        foreign = [label for label in labels if not self._is_ours(label)]
        if foreign:
            why = (
                f"it sampled with weights labelled {foreign[0]!r}, this run's are {self._run}/{self.policy_version}: it was "
                "restarted, or another run publishes to it"
            )
            self._roster.leaves(member, State.JOINING, why)
            raise Unreachable(f"{member.url}: {why}")
        self._answered[member.life] += len(completions)
        return [[int(span.version.split("/")[1]) for span in c.weight_versions or ()] for c in completions]

    def _is_ours(self, label: str) -> bool:
        run, _, version = label.partition("/")
        return run == self._run and version.isdigit() and int(version) <= self.policy_version

    def _prove_live(self) -> None:
        """After a server's first answers: its patched head must have been executed on every rank, of every engine."""
        life_of = {m.url: m.life for m in self._roster.members}
        new = [url for url in self.engines if life_of[url] in self._answered.keys() - self._proven_live]
        if new:
            statuses = self._ask("rlalign_status", dict.fromkeys(new, ()))
            idle = {s["engine"] for s in statuses if not s["calls"]}
            engines = {url: self._roster.greetings[url].engines for url in new}
            due = {url for url in new if self._answered[life_of[url]] > SURE * (engines[url] - 1)}
            handshake.require_called([s for s in statuses if s["engine"] in due])
            handshake.require_multiplied(statuses)
            self._proven_live.update(life_of[url] for url in new if url not in idle)

    async def _end(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
        if self._update is not None:
            self._update.cancel()
        self._dispatcher.refuse("the pool was closed")
        await self._roster.close()
