"""How an engine that somebody else started is reached: a live `LLM`, a live `AsyncLLM`, a server's address, Ray actors."""

from __future__ import annotations

import asyncio
import sys
import uuid
from collections.abc import Callable, Sequence

from rlalign.rollout.engine.surface import EMBEDDED, forcing, labelled, of_prompt
from rlalign.rollout.server.client import Client
from rlalign.rollout.server.pool import LoopThread

PATIENCE = 600.0  # seconds for an answer: a worker may be compiling, or taking a large bucket
MISSING = (
    "{engine} has no worker RPC {method}: rlalign's plugin was not loaded in its workers. Install rlalign in the environment that "
    "runs them, and let VLLM_PLUGINS name rlalign or be unset"
)
GENERATES = ("generate", "chat", "enqueue", "beam_search")  # of an LLM: refused while its weights are in doubt


class Line:
    """The way to one engine: asks all its workers, holds its generation while its weights are in doubt, and lets it go on."""

    def __init__(self, name: str) -> None:
        self.name = name

    def ask(self, method: str, args: tuple) -> list[dict]:
        """One answer of every worker. Raises RuntimeError for an engine without our RPCs."""
        try:
            answers = self._rpc(method, args)
        except Exception as error:
            if isinstance(error, AttributeError | NotImplementedError) or method in str(error):
                raise RuntimeError(MISSING.format(engine=self.name, method=method)) from error
            raise
        return [labelled(answer, rank, self.name, method) for rank, answer in enumerate(answers)]

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Logprobs of given tokens in one prefill each, entry 0 is 0.0; vLLM applies no temperature to them."""
        raise NotImplementedError

    def hold(self, reason: str) -> None:
        """No token from now on, where the line can see to it."""

    def release(self, version: int) -> None:
        """Tokens again, without any key or value of older weights, labelled with this version where vLLM does that."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of what the line itself holds; the engine stays."""

    def _rpc(self, method: str, args: tuple) -> list:
        raise NotImplementedError


class LLMLine(Line):
    """A `vllm.LLM` in this process; its workers may be elsewhere."""

    def __init__(self, llm: object) -> None:
        super().__init__(EMBEDDED)
        self._llm = llm

    def _rpc(self, method: str, args: tuple) -> list:
        return self._llm.collective_rpc(method, args=args)

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        prompts = [{"prompt_token_ids": list(each)} for each in sequences]
        outputs = self._llm.generate(prompts, forcing(), use_tqdm=False)
        return [of_prompt(o, each) for o, each in zip(outputs, sequences, strict=True)]

    def hold(self, reason: str) -> None:
        """The object's own methods refuse meanwhile."""

        def refuse(*args: object, **kwargs: object) -> None:
            raise RuntimeError(f"this engine must not generate: {reason}")

        for name in GENERATES:
            if hasattr(type(self._llm), name):
                setattr(self._llm, name, refuse)

    def release(self, version: int) -> None:
        """Raises RuntimeError where requests still hold blocks of the old weights."""
        if not self._llm.reset_prefix_cache():
            raise RuntimeError(
                "vLLM did not reset its prefix cache: requests that are still running use keys and values of the old weights; "
                "let them finish first"
            )
        if hasattr(self._llm, "update_weight_version"):
            self._llm.update_weight_version(str(version))
        for name in GENERATES:
            vars(self._llm).pop(name, None)


class AsyncLine(Line):
    """An `AsyncLLM`, asked on the event loop that it lives on, from any other thread."""

    def __init__(self, engine: object, loop: asyncio.AbstractEventLoop | None) -> None:
        if loop is None or loop is asyncio._get_running_loop():
            raise ValueError(
                "an AsyncLLM is attached from outside of its event loop, which would otherwise wait for itself: inside it write "
                "`engine = await asyncio.to_thread(rlalign.attach, llm, loop=asyncio.get_running_loop())`, and call the handle's "
                "methods through asyncio.to_thread as well"
            )
        super().__init__("async")
        self._engine, self._loop = engine, loop

    def _rpc(self, method: str, args: tuple) -> list:
        return self._run(self._engine.collective_rpc(method, timeout=PATIENCE, args=args))

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        async def one(ids: Sequence[int]) -> object:
            prompt, name = {"prompt_token_ids": list(ids)}, f"rlalign-{uuid.uuid4().hex}"
            return [output async for output in self._engine.generate(prompt, forcing(), name)][-1]

        async def every() -> list:
            return await asyncio.gather(*map(one, sequences))

        return [of_prompt(o, each) for o, each in zip(self._run(every()), sequences, strict=True)]

    def hold(self, reason: str) -> None:
        """Running requests stay, between two engine steps; their keys and values are computed again."""
        self._run(self._engine.pause_generation(mode="keep", clear_cache=True))

    def release(self, version: int) -> None:
        self._run(self._engine.update_weight_version(str(version)))
        self._run(self._engine.resume_generation())

    def _run(self, coroutine: object) -> object:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(PATIENCE)


class UrlLine(Line):
    """A `vllm serve` with its development routes on (VLLM_SERVER_DEV_MODE=1)."""

    def __init__(self, url: str, key: str | None) -> None:
        self._loop = LoopThread("rlalign-attached")
        self._client = self._loop.call(_client(url, key))
        super().__init__(self._client.url)

    def ask(self, method: str, args: tuple) -> list[dict]:
        return self._loop.call(self._client.rpc(method, args, PATIENCE))

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        return self._loop.call(self._client.prompt_logprobs(sequences, PATIENCE))

    def hold(self, reason: str) -> None:
        self._loop.call(self._client.pause(PATIENCE))

    def release(self, version: int) -> None:
        self._loop.call(self._client.stamp(str(version), PATIENCE))
        self._loop.call(self._client.resume(PATIENCE))

    def close(self) -> None:
        self._loop.call(self._client.close())
        self._loop.close()


class ActorLine(Line):
    """A Ray actor around an engine, with `collective_rpc(method, args=...)` and `reset_prefix_cache()` among its methods.

    Holding it is the caller's: nothing stops an actor that is asked to generate meanwhile.
    """

    def __init__(self, actor: object, index: int, get: Callable[[object], object]) -> None:
        for method in ("collective_rpc", "reset_prefix_cache"):
            if not hasattr(actor, method):
                raise ValueError(
                    f"the Ray actor {index} has no method {method}: attach needs collective_rpc(method, args=...) and "
                    "reset_prefix_cache() to reach vLLM inside it; add them to the actor's class"
                )
        super().__init__(f"actor {index}")
        self._actor, self._get = actor, get

    def _rpc(self, method: str, args: tuple) -> list:
        return self._get(self._actor.collective_rpc.remote(method, args=args))

    def release(self, version: int) -> None:
        if self._get(self._actor.reset_prefix_cache.remote()) is False:
            raise RuntimeError(f"{self.name}: vLLM did not reset its prefix cache; let running requests finish first")


def lines_to(engine: object, *, loop: asyncio.AbstractEventLoop | None, key: str | None) -> list[Line]:
    """One line for every engine given. Raises ValueError for what is none."""
    if isinstance(engine, str):
        return [UrlLine(engine, key)]
    if isinstance(engine, Sequence):
        if not engine:
            raise ValueError("attach: an empty list holds no engine")
        return [
            ActorLine(each, index, _ray_get()) if _is_actor(each) else lines_to(each, loop=loop, key=key)[0]
            for index, each in enumerate(engine)
        ]
    if _is_actor(engine):
        return [ActorLine(engine, 0, _ray_get())]
    if asyncio.iscoroutinefunction(getattr(engine, "collective_rpc", None)):
        return [AsyncLine(engine, loop)]
    if hasattr(engine, "collective_rpc") and hasattr(engine, "llm_engine"):
        return [LLMLine(engine)]
    raise ValueError(
        f"attach: {type(engine).__name__} is no engine that is known here; give a vllm.LLM, an AsyncLLM, the address of a "
        "`vllm serve`, a Ray actor that has collective_rpc, or a list of them"
    )


async def _client(url: str, key: str | None) -> Client:
    return Client(url, key=key)


def _is_actor(engine: object) -> bool:
    return type(engine).__module__.split(".")[0] == "ray"


def _ray_get() -> Callable[[object], object]:
    return sys.modules["ray"].get  # whoever holds an actor has imported it
