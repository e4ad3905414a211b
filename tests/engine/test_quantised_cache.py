"""The real engine with an FP8 cache of keys and values against the fake-quantised model that budgets are measured on."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from vllm import SamplingParams

from rlalign.trainer.fake_quantised import Recipe, fake_quantised
from tests.engine.conftest import bare_engine

CPU_HAS_FP8_CACHES = torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported()  # vLLM's own condition
SEQUENCES = [[1, *range(40, 70)], [1, 60, 3, 99, 240, 11, 12], [1, *range(250, 80, -9)]]


@torch.no_grad()
def scores(model, ids):
    logprobs = model(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
    return logprobs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def engine_scores(llm):
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    for ids, output in zip(
        SEQUENCES, llm.generate([{"prompt_token_ids": s} for s in SEQUENCES], params, use_tqdm=False), strict=True
    ):
        yield torch.tensor(
            [step[token].logprob for token, step in zip(ids[1:], output.prompt_logprobs[1:], strict=True)]
        )


def test_a_real_fp8_cache_is_the_faked_one_and_vllm_rounds_on_cpu_towards_zero(untied):
    """To float32 rounding with `fp8_towards_zero`; a cache rounded to nearest is elsewhere, and closer to a plain one."""
    if not CPU_HAS_FP8_CACHES:
        with pytest.raises(NotImplementedError, match="FP8 KV cache on CPU requires x86 with AVX-512 or AMX"):
            bare_engine(untied, dtype="float32", kv_cache_dtype="fp8")
        return
    llm = bare_engine(untied, dtype="float32", kv_cache_dtype="fp8")
    model = AutoModelForCausalLM.from_pretrained(untied, dtype=torch.float32).eval()
    found = torch.cat(list(engine_scores(llm)))
    faked = {}
    for kv in ("", "fp8", "fp8_towards_zero"):
        with fake_quantised(model, Recipe(kv=kv)):
            faked[kv] = torch.cat([scores(model, ids) for ids in SEQUENCES])
    off = {kv: float((found - scored).abs().max()) for kv, scored in faked.items()}
    assert off["fp8_towards_zero"] < 1e-4 < 1e-2 < min(off[""], off["fp8"])
    assert (faked["fp8"] - faked[""]).norm() < (found - faked[""]).norm()
