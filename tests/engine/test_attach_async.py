"""attach() on a real AsyncLLM, whose engine and worker run in processes of their own, from beside its event loop."""

import asyncio

import pytest
import torch

import rlalign
from tests.engine.conftest import perturbed

pytestmark = pytest.mark.nightly
ENVIRONMENT = {"RLALIGN_HEAD": "float32", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


async def proved_published_and_verified(folder):
    """The reports of a publish and of two verifications, and what the last, of weights that nobody pushed, raised."""
    from vllm import AsyncEngineArgs, SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

    asked = AsyncEngineArgs(
        str(folder), dtype="bfloat16", enforce_eager=True, max_model_len=64, max_num_seqs=4,
        logprobs_mode="processed_logprobs",
    )  # fmt: skip
    llm, loop = AsyncLLM.from_engine_args(asked), asyncio.get_running_loop()
    try:
        engine = await asyncio.to_thread(rlalign.attach, llm, loop=loop)
        async for output in llm.generate(
            {"prompt_token_ids": [5, 6, 7]}, SamplingParams(max_tokens=4, logprobs=0), "0"
        ):
            last = output
        assert len(last.outputs[0].token_ids) > 0
        (status,) = await asyncio.to_thread(engine.prove)
        new, other = (list(perturbed(folder, seed=s, dtype=torch.float32).named_parameters()) for s in (1, 2))
        published = await asyncio.to_thread(engine.publish, new, 1)
        verified = await asyncio.to_thread(engine.verify, new)
        sampled = await asyncio.to_thread(engine.verify, new, sample=4)
        with pytest.raises(RuntimeError, match="the engine computes with something else"):
            await asyncio.to_thread(engine.verify, other)
        return status, published, verified, sampled
    finally:
        llm.shutdown()


@pytest.mark.proves(
    "vLLM AsyncLLM", "attached beside its event loop: head proved, weights published, verified, stale ones named"
)
def test_a_real_async_engine_is_attached(untied, monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    status, published, verified, sampled = asyncio.run(proved_published_and_verified(untied))
    assert status["mode"] == "cached" and status["multiplied"]["sampled"]["dtype"] == "float32"
    assert published.version == 1 and verified.complete and sampled.tensors == 4 < sampled.offered
