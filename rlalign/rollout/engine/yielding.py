"""On CPU, vLLM's processes leave the cores to who works: who waits for another process soon does so asleep.

vLLM (0.32) passes messages between an engine and its workers through shared memory, and who waits for one looks at it without a
pause for a whole second before it sleeps: the engine while a worker computes, the worker after each answer. With a GPU these
are idle cores. On CPU they are the cores that sample, train and take weights.
"""

from __future__ import annotations

import time

VARIABLE = "RLALIGN_YIELDING"  # set to 1 for the processes of engines that rlalign starts; others keep vLLM's way
SPIN_S = 0.001  # looked at without a pause: most answers to small calls come within it
LOOK_MS = 2  # then asleep until told, and at most so long: the telling gets lost now and then (vLLM itself looks again after 5 s)


def install() -> None:
    """Shorten the wait, in this process. Idempotent; nothing happens where the device is not the CPU."""
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
