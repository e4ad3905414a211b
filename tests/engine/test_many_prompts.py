"""More prompts than one engine step holds: on CPU none may be prefilled in chunks, or vLLM ends with its seeded requests."""

from dataclasses import replace

from rlalign.rollout.engine.embedded import VLLMEngine
from tests.engine.conftest import ROLLOUT

LENGTH, COUNT = 60, 12


def test_prompts_that_fill_several_engine_steps_are_sampled(untied):
    config = replace(ROLLOUT, max_num_batched_tokens=ROLLOUT.max_model_len, max_tokens=4, prefix_caching=False)
    assert 2 * config.max_num_batched_tokens < LENGTH * COUNT and config.max_num_batched_tokens % LENGTH
    engine = VLLMEngine(untied, config, dtype="float32", head_dtype="float32", seed=0)
    try:
        prompts = [[1, *((i + j) % 200 + 40 for j in range(LENGTH - 1))] for i in range(COUNT)]
        rollouts = engine.generate(prompts, prompt_ids=range(COUNT), samples=2, seed=0)
        assert len(rollouts) == 2 * COUNT and {r.prompt_length for r in rollouts} == {LENGTH}
    finally:
        engine.close()
