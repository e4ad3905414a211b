"""Which linear layers "all-linear" adapts, family by family, and that what is published computes what the trainer computes."""

import logging

import pytest
import torch
from peft.tuners.lora import LoraLayer
from transformers import AutoConfig, AutoModelForCausalLM

from rlalign.config import LoraConfig
from rlalign.diagnose.families import building, family_table
from rlalign.trainer.checkpoint_names import named_weights
from rlalign.trainer.lora import FOLDER, Adapters, put_in

LEFT_OUT = {  # family: (what has an adapter, what the log says has none)
    "llama": ({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}, ""),
    "qwen3-moe": ({"q_proj", "k_proj", "v_proj", "o_proj"}, "experts, routers of Qwen3MoeForCausalLM"),
    "mixtral": ({"q_proj", "k_proj", "v_proj", "o_proj"}, "experts, routers of MixtralForCausalLM"),
    "deepseek-v3": (
        {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"},
        "down_proj, experts, gate_proj, routers, up_proj of DeepseekV3ForCausalLM",
    ),
    "gpt2": ({"c_attn", "c_proj", "c_fc"}, ""),
    "mamba2": ({"in_proj"}, "out_proj of Mamba2ForCausalLM"),
    "falcon-h1": (
        {"in_proj", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
        "out_proj of FalconH1ForCausalLM",
    ),
}


def network_of(family: str):
    recipe = family_table.RECIPES[family]
    torch.manual_seed(0)
    config = AutoConfig.for_model(recipe.model_type, **recipe.arguments())
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("family", LEFT_OUT)
def test_merged_weights_compute_what_the_adapted_network_does(family, tmp_path, caplog):
    wanted, said = LEFT_OUT[family]
    plain, network, ids = network_of(family), network_of(family), torch.tensor(building.probes())
    with caplog.at_level(logging.WARNING):
        adapters = Adapters(network, LoraConfig(rank=4), model=tmp_path, seed=0)
    assert {name.rpartition(".")[2] for name in adapters.layers} == wanted
    assert (f"no adapters in {said}" if said else "") in caplog.text and bool(said) == ("no adapters" in caplog.text)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in adapters.layers.values():
            weight = layer.lora_B["default"].weight
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.05)
        merged = dict(named_weights(network, network))
        before = plain(ids, use_cache=False).logits
        plain.load_state_dict(merged, strict=False)
        assert merged.keys() == dict(plain.named_parameters()).keys()
        found, adapted = plain(ids, use_cache=False).logits, network(ids, use_cache=False).logits
    assert float((found - adapted).abs().max()) < 1e-4 * float(adapted.abs().max())
    assert float((found - before).abs().max()) > 1e-2 * float(adapted.abs().max()), "the adapters do nothing"


def test_a_projection_that_fused_kernels_read_is_refused_by_name(tmp_path):
    """GraniteMoeHybrid's, which peft lets through."""
    with pytest.raises(ValueError, match=r"mamba\.out_proj is read by fused kernels past an adapter"):
        Adapters(network_of("granitemoehybrid"), LoraConfig(rank=4, targets=["out_proj"]), model=tmp_path, seed=0)
    network = network_of("granitemoehybrid")
    Adapters(network, LoraConfig(rank=4), model=tmp_path, seed=0)
    adapted = {name.rpartition(".")[2] for name, m in network.named_modules() if isinstance(m, LoraLayer)}
    assert adapted == {"in_proj", "q_proj", "k_proj", "v_proj", "o_proj", "input_linear", "output_linear"}


def test_a_rank_stabilised_adapter_is_scaled_by_the_root_of_its_rank(tmp_path):
    """Merged, and in what peft reads back: four times alpha / rank at rank 16."""
    changes = []
    for stabilised in (False, True):
        network = network_of("qwen3")
        adapters = Adapters(network, LoraConfig(rank=16, rank_stabilised=stabilised), model=tmp_path, seed=0)
        before = dict(network_of("qwen3").named_parameters())
        for layer in adapters.layers.values():
            torch.nn.init.constant_(layer.lora_B["default"].weight, 0.01)
        changes.append({n: w - before[n] for n, w in named_weights(network, network) if "_proj" in n})
        adapters.save(tmp_path)
    assert len(changes[0]) == 14 and all(
        torch.allclose(big, 4.0 * changes[0][n], atol=1e-6) for n, big in changes[1].items()
    )
    again = put_in(network_of("qwen3"), tmp_path / FOLDER)
    assert dict(again.model.layers[0].self_attn.q_proj.scaling) == {"default": 32 / 4}
