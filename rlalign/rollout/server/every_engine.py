"""Data-parallel engines behind one server: a worker RPC is answered by every worker of every engine.

vLLM (0.32) sends an RPC to all engines and returns what the first of them said: a publish would be proved on that one alone. It
returns all of them for its own `compute_weight_checksums`, and this does the same for ours. Runs in the server's HTTP process.
"""

from __future__ import annotations

ENGINES = "engines"  # in every answer: how many engines were asked; missing where this was not installed
OURS = "rlalign_"


def install() -> None:
    """Give vLLM's client for servers our way of asking, for our methods alone. Idempotent."""
    from vllm.v1.engine.core_client import AsyncMPClient

    if AsyncMPClient.collective_rpc_async is not _ask_every_engine:
        AsyncMPClient.collective_rpc_async = _ask_every_engine


async def _ask_every_engine(
    self: object, method: str, timeout: float | None = None, args: tuple = (), kwargs: dict | None = None
) -> list:
    """One answer a worker, engine by engine, numbered through: rank counts over all engines. Other methods as in vLLM."""
    if not isinstance(method, str) or not method.startswith(OURS):
        return await self.call_utility_async("collective_rpc", method, timeout, args, kwargs)
    engines = await self.call_utility_all_async("collective_rpc", method, timeout, args, kwargs)
    return [
        answer | {"rank": index * len(answers) + rank, ENGINES: len(engines)} if isinstance(answer, dict) else answer
        for index, answers in enumerate(engines)
        for rank, answer in enumerate(answers)
    ]
