"""The servers of a run and what becomes of them: announced, greeted, examined after trouble, watched, taken in again.

A ready file is how a server is found without guessed ports: it writes one when it answers and removes it when it ends. One JSON a
server, url, host, pid, model, versions and key, readable by its owner alone: who may read it may steer the server.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from rlalign.rollout.server.client import Client, Unreachable
from rlalign.rollout.server.dispatch import ALIVE, Member, State
from rlalign.rollout.server.greeting import Greeting, Launch, greet, require_same_numbers

SUFFIX = ".server.json"
# Seconds for a sign of life: a server on a busy host is slow before it is dead; a dead one refuses at once
PATIENCE = 20.0
MISSED = 3  # health checks in a row without an answer: down
EXAMINED = 3  # attempts of an examination, at most a second apart
TOLD_EVERY = 30.0  # seconds of waiting for servers at the start
log = logging.getLogger("rlalign.rollout.server")


@dataclass(frozen=True, kw_only=True)
class Announcement:
    """A server that is ready. pid: of vLLM's HTTP process on `host`; key: None where none is asked for."""

    url: str
    host: str
    pid: int
    model: str
    vllm: str
    rlalign: str
    key: str | None = None


def announce(folder: Path, announced: Announcement) -> Path:
    """Announce a server; the file appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    name = announced.url.split("://")[1].replace(":", "-").replace("[", "").replace("]", "")
    file, partial = folder / f"{name}{SUFFIX}", folder / f".{name}.partial"
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as out:
        json.dump(asdict(announced), out, indent=1)
    partial.replace(file)
    return file


def announced_in(folder: Path) -> Iterator[Announcement]:
    """Every announced server, whether it still lives or not. Raises ValueError for a file that is no announcement."""
    for file in sorted(folder.glob(f"*{SUFFIX}")):
        try:
            yield Announcement(**json.loads(file.read_text()))
        except FileNotFoundError:  # its server ended just now
            continue
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file}: no announcement of `rlalign rollout-server` ({error}); remove it") from error


class Roster:
    """Members, by url. A server that comes back is greeted again, and joins at the next publish: until then it gets nothing."""

    def __init__(
        self,
        wanted: Launch,
        *,
        key: str | None,
        changed: Callable[[], None],
        left: Callable[[Member], None],
        say: Callable[[str], None],
    ) -> None:
        """changed: called after a member's state did; left: with a member that serves no more; say: of the run's events."""
        self._wanted, self._key, self._changed, self._left, self._say = wanted, key, changed, left, say
        config = self._config = wanted.config
        self._folder = Path(config.server_folder) if config.server_folder else None
        self._examinations: set[asyncio.Task] = set()
        self.members: list[Member] = []
        self.greetings: dict[str, Greeting] = {}

    def add(self, url: str, key: str | None = None) -> Member:
        """A server that has not been asked yet. key: its own, where its ready file has one."""
        member = Member(Client(url, key=key or self._key))
        self.members.append(member)
        return member

    def of(self, *states: State) -> list[Member]:
        return [m for m in self.members if m.state in states]

    async def assemble(self, urls: list[str], count: int) -> None:
        """Wait until `count` servers answer, and greet them all. Raises RuntimeError naming those that do not, or must not."""
        loop = asyncio.get_running_loop()
        end, tell = loop.time() + self._config.start_timeout_s, loop.time() + TOLD_EVERY
        for url in urls:
            self.add(url)
        while True:
            self._look_for_new()
            await asyncio.gather(*(self._try_to_join(m) for m in self.of(State.DOWN)))
            refused = self.of(State.REFUSED)
            if refused:
                raise RuntimeError("; ".join(m.why for m in refused))
            if len(self.of(State.JOINING)) >= count:
                return
            missing = "; ".join(m.describe() for m in self.of(State.DOWN)) or f"nothing else in {self._folder}"
            if loop.time() > tell:
                self.tell(f"waiting for rollout servers ({len(self.of(State.JOINING))} of {count}): {missing}")
                tell += TOLD_EVERY
            if loop.time() > end:
                raise RuntimeError(
                    f"{len(self.of(State.JOINING))} of {count} rollout servers were ready after "
                    f"rollout.start_timeout_s={self._config.start_timeout_s:g}: {missing}. Is `rlalign rollout-server` running "
                    "there, and can this host reach it?"
                )
            await asyncio.sleep(min(1.0, self._config.health_every_s))

    async def watch(self) -> None:
        """Ask every member for a sign of life, again and again; the pool cancels it."""
        while True:
            await asyncio.sleep(self._config.health_every_s)
            try:
                self._look_for_new()
                await asyncio.gather(*(self._check(m) for m in self.members))
            except Exception:  # a watch that ends watches nobody
                log.exception("watching the rollout servers")

    def examine(self, member: Member, reason: str) -> None:
        """A request failed at this member: give it nothing more until it is known to be alive, and the same process."""
        if member.state is State.SERVING:
            member.becomes(State.SUSPECT, reason)
            task = asyncio.create_task(self._examine(member, reason))
            self._examinations.add(task)
            task.add_done_callback(self._examinations.discard)

    def leaves(self, member: Member, state: State, why: str) -> None:
        """The member gets nothing more; what is in flight there is asked for elsewhere."""
        served, inside = member.state in ALIVE, len(member.calls)
        member.becomes(state, why)
        self._left(member)
        self._changed()
        if served:
            self.tell(f"{member.url} leaves the pool with {inside} requests in flight: {why}")

    def tell(self, message: str) -> None:
        """What whoever watches the run, or reads its files later, should know."""
        log.warning("%s", message)
        self._say(message)

    async def close(self) -> None:
        for task in self._examinations:
            task.cancel()
        await asyncio.gather(*self._examinations, return_exceptions=True)
        await asyncio.gather(*(m.client.close() for m in self.members))

    # --- inside ---

    def _look_for_new(self) -> None:
        if self._folder is None:
            return
        known = {m.url: m for m in self.members}
        for announced in announced_in(self._folder):
            member = known.get(announced.url)
            if member is None:
                self.add(announced.url, announced.key)
            elif announced.key and member.state in (State.DOWN, State.REFUSED):  # a later server on the same port
                member.client.use_key(announced.key)

    async def _check(self, member: Member) -> None:
        if member.state in (State.DOWN, State.REFUSED):
            await self._try_to_join(member)
            return
        why = await member.client.healthy(PATIENCE)
        if why is None:
            member.misses = 0
            return
        member.misses += 1
        if member.misses >= MISSED:
            self.leaves(member, State.DOWN, f"{MISSED} health checks without an answer: {why}")

    async def _try_to_join(self, member: Member) -> None:
        why = await member.client.healthy(PATIENCE)
        if why is not None:
            member.becomes(State.DOWN, why)
            return
        try:
            greeting = await greet(member.client, self._wanted)
            require_same_numbers(greeting, (g for url, g in self.greetings.items() if url != member.url))
        except Unreachable as error:
            member.becomes(State.DOWN, str(error))
        except RuntimeError as error:
            if member.why != str(error):
                self.tell(str(error))
            member.becomes(State.REFUSED, str(error))
        else:
            self.greetings[member.url], member.life = greeting, greeting.life
            member.becomes(State.JOINING, "it waits for the next publish: its weights are not this run's")
            self._changed()

    async def _examine(self, member: Member, reason: str) -> None:
        why: str | None = reason
        for _ in range(EXAMINED):
            why = await member.client.healthy(PATIENCE)
            if why is None:
                try:
                    (said, *_) = await member.client.rpc("rlalign_identity", (), 30.0)
                except RuntimeError as error:
                    why = str(error)
                else:
                    if member.state is not State.SUSPECT:
                        return
                    if said["life"] == member.life:
                        member.becomes(State.SERVING)
                        self._changed()
                    else:
                        self.leaves(member, State.DOWN, "it was restarted")
                    return
            await asyncio.sleep(min(1.0, self._config.health_every_s))
        if member.state is State.SUSPECT:
            self.leaves(member, State.DOWN, reason if why in reason else f"{why}, after {reason}")
