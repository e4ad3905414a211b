"""Weights travel as `save_pretrained` writes them, and a sum that no order of the elements changes."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlalign.diagnose.families import building, family_table
from rlalign.trainer import checkpoint_names
from rlalign.weights.digest import shuffled_sum


@pytest.mark.parametrize("family", ["qwen3-moe", "mixtral", "gpt2"])
def test_what_travels_is_what_a_saved_folder_holds(family, tmp_path):
    folder = building.build(family_table.RECIPES[family], tmp_path / family)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    saved = load_file(folder / "model.safetensors")
    sent = dict(checkpoint_names.as_checkpoint(model, model.named_parameters()))
    missing = saved.keys() - sent.keys()
    assert all(not torch.is_floating_point(saved[n]) or "bias" in n for n in missing), "buffers, which nobody trains"
    for name, tensor in sent.items():
        assert torch.equal(tensor, saved[name]), name


def test_experts_that_transformers_fused_travel_apart(tmp_path):
    folder = building.build(family_table.RECIPES["mixtral"], tmp_path / "mixtral")
    model = AutoModelForCausalLM.from_pretrained(folder)
    own = {name for name, _ in model.named_parameters()}
    sent = {name for name, _ in checkpoint_names.as_checkpoint(model, model.named_parameters())}
    assert any("mlp.experts.gate_up_proj" in n for n in own) and any("experts.3.w1.weight" in n for n in sent)


def test_weights_that_need_each_other_are_converted_a_layer_at_a_time(tmp_path, monkeypatch):
    """The way taken where several tensors make one: the same names and tensors."""
    folder = building.build(family_table.RECIPES["qwen3-moe"], tmp_path / "qwen3-moe")
    model = AutoModelForCausalLM.from_pretrained(folder)
    alone = dict(checkpoint_names.as_checkpoint(model, model.named_parameters()))
    monkeypatch.setitem(checkpoint_names._ALONE, model, False)
    together = dict(checkpoint_names.as_checkpoint(model, model.named_parameters()))
    assert alone.keys() == together.keys() and all(torch.equal(t, together[n]) for n, t in alone.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_shuffled_sum_sees_elements_and_not_their_order(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 48, generator=generator).to(dtype)
    order = torch.randperm(x.numel(), generator=generator)
    assert shuffled_sum(x) == shuffled_sum(x.t()) == shuffled_sum(x.reshape(-1)[order])
    assert sum(map(shuffled_sum, x.chunk(5))) % 2**64 == shuffled_sum(x)
    y = x.clone()
    y[3, 4] = torch.nextafter(y[3, 4].float(), torch.tensor(9.0)).to(dtype) if dtype == torch.float32 else y[3, 4] + 1
    assert shuffled_sum(y) != shuffled_sum(x)
    z = x.clone()
    z[0, 0], z[0, 1] = x[0, 1], x[0, 1]  # one element twice in place of another
    assert shuffled_sum(z) != shuffled_sum(x)


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "opt"])  # scaled by the head, by 1 + a norm's weight, by a norm
def test_a_recipe_is_a_model_with_realistic_logits_and_a_padded_vocabulary(family, tmp_path):
    folder = building.build(family_table.RECIPES[family], tmp_path / family)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor(building.probes()), use_cache=False).logits
    assert 0.5 * building.SPREAD < float(logits.std(-1).mean()) < 2 * building.SPREAD
    assert model.config.vocab_size == family_table.VOCABULARY > len(building.byte_tokenizer(family_table.CONTEXT))
