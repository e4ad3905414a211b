"""An embedded vLLM in a process of its own: how one is started, who ends with whom, and how its death reaches who waits for it.

vLLM's synchronous client (up to 0.32) reads answers from a queue that nobody fills once the process was killed: it would wait
for ever. So the wait happens in a thread that may be left behind, and the caller looks at the processes meanwhile.
"""

from __future__ import annotations

import json
import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rlalign.exits import Lost
from rlalign.head import widened

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput, SamplingParams

T = TypeVar("T")
LOOK_S = 0.5  # seconds between two looks at the processes
GRACE_S = 10.0  # between asking an orphan to end and ending it
FOLLOWS = "RLALIGN_ENGINE_ENDS_WITH"  # the pid of the trainer
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
YIELDING = "RLALIGN_YIELDING"  # set to 1 for the processes of engines that rlalign starts; others keep vLLM's way
SPIN_S = 0.001  # looked at without a pause: most answers to small calls come within it
LOOK_MS = 2  # then asleep until told, and at most so long: the telling gets lost now and then (vLLM itself looks again after 5 s)


def model_config(model: Path) -> dict[str, Any]:
    """A model folder's config.json; empty where there is no such file."""
    file = model / "config.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def needed_for(model: Path) -> str | None:
    """Why an engine of this model folder may not share the trainer's process; None where it may.

    vLLM serves some architectures through transformers' own classes (its module `models.transformers`) and decorates them for the
    whole process: a trainer's model built there afterwards would be a decorated one, which fails outside of an engine.
    """
    from vllm.model_executor.models import ModelRegistry

    names = model_config(model).get("architectures") or []
    known = {
        name: str(getattr(ModelRegistry.models[name], "module_name", ""))
        for name in names
        if name in ModelRegistry.models
    }
    if names and not known:
        return f"vLLM has no model of its own for {', '.join(names)} and serves it through transformers' classes"
    through = [name for name, module in known.items() if "models.transformers" in module]
    return f"vLLM serves {', '.join(through)} through transformers' classes" if through else None


class EngineProcesses:
    """The process of an embedded engine; none where the engine lives in ours."""

    def __init__(self) -> None:
        self._processes: list[BaseProcess] = []

    @contextmanager
    def starting(self, wanted: bool) -> Iterator[None]:
        """An engine built inside gets a process of its own where wanted, whatever the environment says; that is put back."""
        if not wanted:
            yield
            return
        environment = ENVIRONMENT | {FOLLOWS: str(os.getpid())} | widened.environment()
        before = {name: os.environ.get(name) for name in environment}
        children = set(multiprocessing.active_children())
        os.environ.update(environment)
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
        self._processes = [p for p in multiprocessing.active_children() if p not in children]
        if not self._processes:
            raise RuntimeError(
                "vLLM started no process of its own, although VLLM_ENABLE_V1_MULTIPROCESSING=1 was set for it"
            )

    def __bool__(self) -> bool:
        return bool(self._processes)

    def watch(self, call: Callable[[], T]) -> T:
        """Its result. Raises Lost when one of the processes ends before it answers."""
        if not self._processes:
            return call()
        answer: Future[T] = Future()
        threading.Thread(target=_answer, args=(call, answer), name="waits for vLLM", daemon=True).start()
        while not wait([answer], timeout=LOOK_S).done:
            self._require_alive()
        if answer.exception() is not None:  # vLLM may notice a death before we do
            multiprocessing.connection.wait([p.sentinel for p in self._processes], timeout=LOOK_S)
            self._require_alive()
        return answer.result()

    def _require_alive(self) -> None:
        ended = [p for p in self._processes if p.exitcode is not None]
        if ended:
            found = ", ".join(f"{p.name} (pid {p.pid}) ended with code {p.exitcode}" for p in ended)
            raise Lost(
                f"the rollout engine died while it was asked for something: {found}. -9 is a kill, often for lack of memory; "
                "start again with checkpoint.resume=auto"
            )


def end_with_parent() -> None:
    """In an engine's process, called as the plugin loads: end when the trainer is gone, however it went.

    vLLM (up to 0.32) does that for its workers only; its engine core would hold memory and device for ever.
    """
    parent = multiprocessing.parent_process()
    if parent is None or os.environ.get(FOLLOWS) != str(parent.pid):
        return

    def follow() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE_S)
        os._exit(1)

    threading.Thread(target=follow, name="ends with the trainer", daemon=True).start()


def generate(
    llm: LLM, inputs: Sequence[dict[str, list[int]]], params: Sequence[SamplingParams]
) -> Sequence[RequestOutput]:
    """As `LLM.generate`, always in the same batches: nothing is scheduled before the last request has arrived.

    They arrive one by one, and which of them share the first steps would else be chance, and with it the last bits (vllm#33195).
    """
    llm.sleep(level=0)  # scheduling only
    try:
        llm.enqueue(inputs, params, use_tqdm=False)
    finally:
        llm.wake_up(tags=["scheduling"])
    return llm.wait_for_completion(use_tqdm=False)


def _answer(call: Callable[[], T], answer: Future[T]) -> None:
    try:
        answer.set_result(call())
    except BaseException as error:  # raised again where the answer is waited for
        answer.set_exception(error)


def yield_cores() -> None:
    """On CPU, let who waits for another process of vLLM soon do so asleep. Idempotent; nothing happens on other devices.

    vLLM (0.32) passes messages between an engine and its workers through shared memory, and who waits for one looks at it without
    a pause for a whole second before it sleeps. With a GPU these are idle cores; on CPU they sample, train and take weights.
    """
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or SpinCondition.wait.__module__ == __name__:
        return
    wait = SpinCondition.wait

    def briefly(self: SpinCondition, timeout_ms: int | None = None) -> None:
        since = time.monotonic() - self.last_read
        if since <= SPIN_S or since > self.busy_loop_s:  # as vLLM does it: look again, or sleep for long
            wait(self, timeout_ms)
        elif self.local_notify_socket in dict(self.poller.poll(LOOK_MS)):
            self.local_notify_socket.recv(copy=False)

    SpinCondition.wait = briefly
