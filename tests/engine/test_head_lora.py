"""LoRA adapters on the lm_head: their change reaches the float32 logits, and two defects of vLLM's are pinned."""

import json

import pytest
import torch
from safetensors.torch import save_file

from tests.engine.conftest import bare_engine, perturbed
from tests.engine.test_every_head import close, recomputed, sampled, worst_error


@pytest.fixture(scope="module")
def adapter(untied, tmp_path_factory):
    """A rank-4 adapter of the lm_head alone: (folder, the change of the weight in float64)."""
    folder = tmp_path_factory.mktemp("adapter")
    generator = torch.Generator().manual_seed(5)
    a, b = (torch.randn(shape, generator=generator).bfloat16() * 0.3 for shape in ((4, 128), (288, 4)))
    save_file(
        {"base_model.model.lm_head.lora_A.weight": a, "base_model.model.lm_head.lora_B.weight": b},
        folder / "adapter_model.safetensors",
    )
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["lm_head"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder, b.double() @ a.double()


@pytest.fixture(scope="module")
def lora(untied, adapter):
    from vllm.lora.request import LoRARequest

    llm = bare_engine(untied, dtype="float32", enable_lora=True, max_lora_rank=8)
    yield llm, LoRARequest("lm_head", 1, str(adapter[0]))
    close(llm)


def with_adapter(untied, adapter):
    model = perturbed(untied, seed=0, size=0.0, dtype=torch.float32)
    model.lm_head.weight.data += adapter[1].float()
    return model


def scored(llm, prompts, request):
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False, lora_request=request)
    return [
        [entry[t].logprob for entry, t in zip(o.prompt_logprobs[1:], p[1:], strict=True)]
        for o, p in zip(outputs, prompts, strict=True)
    ]


def furthest(model, prompts, scores):
    return max(
        abs(a - b)
        for prompt, given in zip(prompts, scores, strict=True)
        for a, b in zip(given, recomputed(model, prompt[:1], prompt[1:]), strict=True)
    )


def test_a_lora_of_the_lm_head_reaches_the_fp32_logits(untied, adapter, lora):
    llm, request = lora
    plain = perturbed(untied, seed=0, size=0.0, dtype=torch.float32)
    assert worst_error(llm, with_adapter(untied, adapter), request) < 5e-5
    assert worst_error(llm, plain, request) > 0.1
    (status,) = llm.collective_rpc("rlalign_status")
    assert status["head"].startswith("lm_head") and status["calls"] > 0


def test_prompt_logprobs_with_a_lora_of_the_lm_head(untied, adapter, lora):
    """vLLM 0.32 maps adapters to rows by sequence, also where the rows are the tokens of a prompt (vllm#51594, open): on CPU a
    prompt scored alone is right by broadcasting; the GPU kernels drop the change. Score adapters by generating, or merge them.
    """
    llm, request = lora
    prompt = list(range(10, 40))
    assert furthest(with_adapter(untied, adapter), [prompt], scored(llm, [prompt], request)) < 5e-5


def test_on_cpu_vllm_gives_a_request_without_adapter_the_last_one(untied, adapter, lora):
    """vllm#48421 (open): index -1, no adapter, reads the last slot. When this fails, vLLM has fixed it."""
    llm, request = lora
    list(sampled(llm, request))
    assert worst_error(llm, perturbed(untied, seed=0, size=0.0, dtype=torch.float32)) > 0.1
