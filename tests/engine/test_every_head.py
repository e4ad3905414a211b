"""Heads of other architectures through the real engine: bias, soft cap, logit scale, ties, drafts, pooling, quantisation."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf

from rlalign.head.transform import HeadTransform
from rlalign.rollout.head.logits_processor import HeadMode
from tests.engine.conftest import (
    PROMPTS,
    bare_engine,
    build_model,
    byte_tokenizer,
    logits_through,
    worker_of,
)

BODY = {
    "vocab_size": 288, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
HEADS = {
    "Gemma2, tied, soft cap": (
        hf.Gemma2ForCausalLM,
        hf.Gemma2Config(**BODY, head_dim=32, final_logit_softcapping=5.0, query_pre_attn_scalar=32, sliding_window=256),
    ),
    "Gemma3, tied, soft cap": (
        hf.Gemma3ForCausalLM,
        hf.Gemma3TextConfig(**BODY, head_dim=32, final_logit_softcapping=5.0, query_pre_attn_scalar=32),
    ),
    "Cohere, tied, scale": (hf.CohereForCausalLM, hf.CohereConfig(**BODY, logit_scale=0.25, use_qk_norm=False)),
    "Granite, untied, scale": (
        hf.GraniteForCausalLM,
        hf.GraniteConfig(**BODY, logits_scaling=3.0, tie_word_embeddings=False),
    ),
    "Llama, untied": (hf.LlamaForCausalLM, hf.LlamaConfig(**BODY, tie_word_embeddings=False)),
    "Qwen3, tied": (hf.Qwen3ForCausalLM, hf.Qwen3Config(**BODY, head_dim=32, tie_word_embeddings=True)),
    "GPT-J, bias": (
        hf.GPTJForCausalLM,
        hf.GPTJConfig(vocab_size=288, n_positions=256, n_embd=128, n_layer=2, n_head=4, rotary_dim=32),
    ),
}


def save(model, folder):
    tokenizer = byte_tokenizer(256)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.config, name, getattr(tokenizer, name))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=HEADS, ids=list(HEADS))
def architecture(request, tmp_path_factory):
    """A random model with logits of realistic size: (folder, the transformers model in float32)."""
    torch.manual_seed(0)
    kind, config = HEADS[request.param]
    model = kind(config).float().eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(6.0)
        if model.get_output_embeddings().bias is not None:
            model.get_output_embeddings().bias.normal_()
    return save(model, tmp_path_factory.mktemp("model")), model


def sampled(llm, request=None):
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=10, seed=3, logprobs=0)
    outputs = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], params, use_tqdm=False, lora_request=request)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        chosen = output.outputs[0]
        pairs = zip(chosen.token_ids, chosen.logprobs, strict=True)
        yield prompt, list(chosen.token_ids), [entry[token].logprob for token, entry in pairs]


@torch.no_grad()
def recomputed(model, prompt, tokens):
    logprobs = model(torch.tensor([[*prompt, *tokens]])).logits[0].float().log_softmax(-1)
    return [float(logprobs[len(prompt) - 1 + i, token]) for i, token in enumerate(tokens)]


def worst_error(llm, model, request=None):
    return max(
        abs(a - b)
        for prompt, tokens, logprobs in sampled(llm, request)
        for a, b in zip(logprobs, recomputed(model, prompt, tokens), strict=True)
    )


def close(llm):
    llm.llm_engine.engine_core.shutdown()


def test_logprobs_equal_transformers_in_float32(architecture):
    folder, model = architecture
    llm = bare_engine(folder, dtype="float32")
    assert worst_error(llm, model) < 2e-5
    (status,) = llm.collective_rpc("rlalign_status")
    assert status["mode"] == "cached" and status["calls"] > 0
    close(llm)


@pytest.mark.parametrize("copies", [False, True], ids=["as the host chooses", "copy"])
def test_a_bf16_head_gives_float32_logits_with_bias_cap_and_scale(architecture, copies, tmp_path, request):
    if copies:
        request.getfixturevalue("fp32_copies")
    folder, model = architecture
    llm = bare_engine(folder)
    hidden = torch.randn(20, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    lm_head, transform = model.get_output_embeddings(), HeadTransform.of(model.config)
    weight = lm_head.weight.detach().bfloat16().double()
    exact = hidden.double() @ weight.t()
    if lm_head.bias is not None:
        exact += lm_head.bias.detach().bfloat16().double()
    exact = transform.apply(exact)
    errors = {}
    for mode in ("cached", "master", "native", "off"):
        llm.collective_rpc("rlalign_set_head", args=(mode,))
        errors[mode] = float((logits_through(llm, hidden, tmp_path) - exact).abs().max())
    close(llm)
    assert max(errors["cached"], errors["master"], errors["native"]) < 1e-5 * exact.abs().max()
    assert errors["off"] > 50 * errors["cached"], "vLLM's own bf16 head is as exact: this model shows nothing"


# --- heads that are not ours to change, or cannot be ---


NGRAM = """
import sys, torch
from pathlib import Path
from tests.engine.conftest import bare_engine, perturbed
from tests.engine.test_every_head import worst_error
folder = Path(sys.argv[1])
drafts = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
llm = bare_engine(folder, dtype="float32", speculative_config=drafts)
print("RESULT", worst_error(llm, perturbed(folder, seed=0, size=0.0, dtype=torch.float32)))
"""


@pytest.mark.nightly  # numba compiles the proposer for a minute
def test_drafts_without_a_network_share_the_head(untied):
    """In a process of its own: after the n-gram proposer has run, vLLM 0.32 cannot start another engine in the process."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", NGRAM, str(untied)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(root)}, cwd=root)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT")] or [done.stderr[-3000:]]
    assert float(line.split()[1]) < 2e-5


def test_a_draft_network_is_refused_where_its_head_could_go_stale(untied):
    from types import SimpleNamespace

    from rlalign.rollout.head import logits_processor

    config = SimpleNamespace(speculative_config=SimpleNamespace(method="eagle"))
    for mode in HeadMode:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(logits_processor, "get_current_vllm_config", lambda: config)
            if mode in (HeadMode.OFF, HeadMode.NATIVE):
                logits_processor._require_no_draft_head(mode, config)
                continue
            with pytest.raises(ValueError, match="method 'eagle' brings a draft network.*use ngram"):
                logits_processor._require_no_draft_head(mode, config)


def test_a_quantised_head_is_refused_by_name(tmp_path):
    """GPTQ on the lm_head alone, dummy weights. With head_dtype=model the same model runs."""
    folder = build_model(tmp_path / "model", tied=False)
    config = json.loads((folder / "config.json").read_text())
    only_lm_head = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "desc_act": False,
        "sym": True,
        "lm_head": True,
    }
    config["quantization_config"] = only_lm_head | {"dynamic": {"-:model.*": {}}}
    (folder / "config.json").write_text(json.dumps(config))

    with pytest.raises(ValueError, match=r"lm_head is quantised by \w*GPTQ\w*.*ignore=\['lm_head'\].*head_dtype=model"):
        bare_engine(folder, load_format="dummy")
    llm = bare_engine(folder, load_format="dummy", head_dtype="model")
    (status,) = llm.collective_rpc("rlalign_status")
    assert status["mode"] == "off" and "GPTQ" in status["head"] and status["fingerprint"] is None
    close(llm)


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    torch.manual_seed(1)
    config = hf.Qwen3Config(**BODY, head_dim=32, num_labels=1, tie_word_embeddings=False)
    model = hf.Qwen3ForSequenceClassification(config).float().eval()
    return save(model, tmp_path_factory.mktemp("reward")), model


@pytest.mark.parametrize("settings", [True, False], ids=["with our settings", "without"])
def test_pooling_models_are_left_alone(reward_model, settings):
    from vllm import PoolingParams

    folder, model = reward_model
    arguments = {} if settings else {"additional_config": {}, "worker_extension_cls": ""}
    llm = bare_engine(folder, dtype="float32", runner="pooling", **arguments)
    prompts = [{"prompt_token_ids": p} for p in PROMPTS]
    outputs = llm.classify(prompts, pooling_params=PoolingParams(use_activation=False), use_tqdm=False)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        with torch.no_grad():
            assert abs(float(model(torch.tensor([prompt])).logits) - output.outputs.probs[0]) < 1e-5
    close(llm)


def test_an_engine_without_our_settings_keeps_its_own_head(untied):
    llm = bare_engine(untied, additional_config={})
    (status,) = llm.collective_rpc("rlalign_status")
    assert status["mode"] == "off" and status["route"] is None
    close(llm)


def test_padding_of_the_vocabulary_carries_no_probability(tmp_path):
    folder = build_model(tmp_path / "model", tied=False)
    llm = bare_engine(folder)
    logits = logits_through(llm, torch.randn(5, 128).bfloat16(), tmp_path)
    assert logits.shape == (5, 288) and worker_of(llm)._rlalign_named_head()[1].weight.shape[0] == 320
    close(llm)
