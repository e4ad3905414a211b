"""Adapters that vLLM serves unmerged, on the real engine: what samples is what peft computes, and what is not is named by layer."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import rlalign
from tests.engine.conftest import bare_engine
from tests.engine.test_every_head import close, worst_error
from tests.engine.test_tensor_parallel import environment

FLOOR = 5e-5  # nats between two float32 forwards
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROMPT = [3 + i % 200 for i in range(200)]  # over one block of the KV cache


def trained(base, folder, seed, *, targets=LAYERS, **settings):
    """An adapter that moves its layers, in `folder`, and the model with it, as peft computes."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    told = {"r": 4, "lora_alpha": 6, "use_rslora": True} | settings
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, task_type="CAUSAL_LM", **told))
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draws) * 0.1)
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def served(untied):
    llm = bare_engine(
        untied, dtype="float32", enable_lora=True, max_lora_rank=8, max_loras=2, enable_prefix_caching=True,
        max_num_batched_tokens=1024,
    )  # fmt: skip
    yield llm, rlalign.attach(llm)
    close(llm)


def request(folder, number, **options):
    from vllm.lora.request import LoRARequest

    return LoRARequest(f"a{number}", number, str(folder), **options)


def cached(llm, wanted):
    from vllm import SamplingParams

    (output,) = llm.generate(
        [{"prompt_token_ids": PROMPT}], SamplingParams(max_tokens=1), use_tqdm=False, lora_request=wanted
    )
    return output.num_cached_tokens


def test_an_older_adapter_under_the_same_id_is_named_and_the_new_one_samples_as_pefts(untied, served, tmp_path):
    llm, engine = served
    first = trained(untied, tmp_path, 1)
    llm.llm_engine.add_lora(request(tmp_path, 1))
    report = engine.verify_adapter(tmp_path, 1, version=1)
    assert (report.tensors, report.ranks) == (28, 1) and engine.policy_version == 1
    assert worst_error(llm, first, request(tmp_path, 1)) < FLOOR
    cached(llm, request(tmp_path, 1))
    assert cached(llm, request(tmp_path, 1)) > 0
    second = trained(untied, tmp_path, 2)
    llm.llm_engine.add_lora(request(tmp_path, 1))  # vLLM has that id
    with pytest.raises(
        RuntimeError, match=r"rank 0: model\.layers\.0\.self_attn\.q_proj: .*another adapter.*load_inplace"
    ):
        engine.verify_adapter(tmp_path, 1)
    with pytest.raises(RuntimeError, match="must not generate"):
        llm.generate([{"prompt_token_ids": [1, 2]}], use_tqdm=False)
    llm.llm_engine.add_lora(request(tmp_path, 1, load_inplace=True))
    engine.verify_adapter(tmp_path, 1)
    assert cached(llm, request(tmp_path, 1)) == 0, "keys and values of the adapter before"
    assert worst_error(llm, second, request(tmp_path, 1)) < FLOOR < 0.01 < worst_error(llm, first, request(tmp_path, 1))


def test_vllms_prefix_cache_outlives_an_adapter_until_a_version_is_stamped(untied, served, tmp_path):
    """Blocks are found by the adapter's name and path. When the first assertion fails, vLLM has changed that."""
    llm, engine = served
    trained(untied, tmp_path, 3)
    llm.llm_engine.add_lora(request(tmp_path, 2))
    cached(llm, request(tmp_path, 2))
    trained(untied, tmp_path, 4)
    llm.llm_engine.add_lora(request(tmp_path, 2, load_inplace=True))
    assert cached(llm, request(tmp_path, 2)) > 0
    engine.verify_adapter(tmp_path, 2, version=7)
    assert cached(llm, request(tmp_path, 2)) == 0 and engine.policy_version == 7


def test_two_adapters_of_one_batch_are_each_their_own(untied, served, tmp_path):
    from vllm import SamplingParams

    llm, engine = served
    models = {
        1: trained(untied, tmp_path / "1", 5),
        2: trained(untied, tmp_path / "2", 6, targets=["q_proj", "down_proj"], r=2, use_rslora=False),
    }
    wanted = [request(tmp_path / str(number), number, load_inplace=True) for number in models]
    for each in wanted:
        llm.llm_engine.add_lora(each)
        engine.verify_adapter(each.lora_path, each.lora_int_id, version=8)
    params = SamplingParams(max_tokens=8, seed=1, logprobs=0)
    inputs = [{"prompt_token_ids": [1, 40 + i, 41]} for i in range(2)]
    asked = [request(tmp_path / str(number), number) for number in models]
    for prompt, model, output in zip(
        inputs, models.values(), llm.generate(inputs, params, use_tqdm=False, lora_request=asked), strict=True
    ):
        said = output.outputs[0]
        ids = torch.tensor([[*prompt["prompt_token_ids"], *said.token_ids]])
        with torch.no_grad():
            told = model(ids).logits[0, 2:-1].double().log_softmax(-1)
        for row, token, entry in zip(told, said.token_ids, said.logprobs, strict=True):
            assert abs(float(row[token]) - entry[token].logprob) < FLOOR
    with pytest.raises(
        RuntimeError, match=r"adapter 2: .*layers\.0\.self_attn\.k_proj: the engine has no adapter here"
    ):
        engine.verify_adapter(tmp_path / "1", 2, hold=False)
    with pytest.raises(RuntimeError, match=r"layers\.0\.self_attn\.k_proj: the trainer has no adapter here"):
        engine.verify_adapter(tmp_path / "2", 1, hold=False)
    with pytest.raises(RuntimeError, match=r"adapter 9 is in no slot of this engine \(loaded: 1, 2\)"):
        engine.verify_adapter(tmp_path / "1", 9, hold=False)


def test_lm_head_embedding_and_scaling_are_compared_too(untied, served, tmp_path):
    llm, engine = served
    trained(untied, tmp_path, 7, targets=["q_proj", "lm_head", "embed_tokens"])
    llm.llm_engine.add_lora(request(tmp_path, 1, load_inplace=True))
    assert engine.verify_adapter(tmp_path, 1, version=9).tensors == 8
    settings, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"use_rslora": False}))
    with pytest.raises(RuntimeError, match=r"embed_tokens: the engine scales it by 2 times what the trainer does"):
        engine.verify_adapter(tmp_path, 1, hold=False)
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"use_rslora": True}))
    for part, name in (("lm_head", "lm_head"), ("embed_tokens", "model.embed_tokens")):
        tensors = load_file(weights)
        moved = {n: t + 0.1 * (part in n and "B" in n) for n, t in tensors.items()}
        save_file(moved, weights)
        with pytest.raises(RuntimeError, match=rf"rank 0: {name}: the engine computes with another adapter") as found:
            engine.verify_adapter(tmp_path, 1, hold=False)
        assert "q_proj" not in str(found.value)
        save_file(tensors, weights)


def test_files_that_cannot_be_compared_are_refused(untied, served, tmp_path):
    _, engine = served
    trained(untied, tmp_path, 8)
    settings = tmp_path / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"use_dora": True}))
    with pytest.raises(ValueError, match=r"rank 0: .*use_dora is set; only matrices A and B"):
        engine.verify_adapter(tmp_path, 1)
    settings.unlink()
    with pytest.raises(ValueError, match=r"rank 0: .*adapter_config\.json"):
        engine.verify_adapter(tmp_path, 1)
    engine.require_sound()


PROGRAM = """
import sys


def main():
    import rlalign
    from vllm.lora.request import LoRARequest
    from tests.engine.conftest import bare_engine

    model, first, second = sys.argv[1:4]
    llm = bare_engine(model, dtype="float32", enable_lora=True, max_lora_rank=8, tensor_parallel_size=2)
    engine = rlalign.attach(llm)
    llm.llm_engine.add_lora(LoRARequest("a", 1, first))
    print("RESULT", engine.verify_adapter(first, 1).ranks)
    try:
        engine.verify_adapter(second, 1)
    except RuntimeError as error:
        print("ERROR", error)


if __name__ == "__main__":
    main()
"""


@pytest.mark.nightly
def test_each_rank_of_two_holds_its_shard(untied, tmp_path):
    program, folders = tmp_path / "program.py", [tmp_path / "1", tmp_path / "2"]
    program.write_text(PROGRAM)
    for seed, folder in enumerate(folders):
        trained(untied, folder, seed, r=8)
    done = subprocess.run(
        [sys.executable, program, untied, *folders], capture_output=True, text=True, env=environment(), timeout=1200
    )
    assert "RESULT 2\n" in done.stdout, done.stderr[-3000:]
    assert "rank 0: model.layers.0" in done.stdout and "another adapter" in done.stdout
