"""One reader of what a model does to its logits, with the bits of transformers and those of vLLM."""

import pytest
import torch
import transformers as hf

from rlalign.head.transform import HeadTransform
from rlalign.trainer import logit_check

BODY = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS = {
    "nothing": (hf.Qwen2ForCausalLM, hf.Qwen2Config(**BODY)),
    "cap": (hf.Gemma2ForCausalLM, hf.Gemma2Config(**BODY, head_dim=8, final_logit_softcapping=0.3)),
    "factor": (hf.CohereForCausalLM, hf.CohereConfig(**BODY, logit_scale=0.0625)),
    "divisor": (hf.GraniteForCausalLM, hf.GraniteConfig(**BODY, logits_scaling=3.0)),
}


def of_vllm(logits, config):
    """vLLM's LogitsProcessor, given soft_cap and scale as its model classes give them."""
    cap, scale = (
        config.get("final_logit_softcapping"),
        config.get("logit_scale") or 1 / (config.get("logits_scaling") or 1),
    )
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits * scale


@pytest.mark.parametrize("name", MODELS)
def test_both_ways_have_the_bits_of_their_library(name):
    kind, config = MODELS[name]
    torch.manual_seed(0)
    network = kind(config).eval()
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    transform = HeadTransform.of(config)
    with torch.no_grad():
        raw = network.get_output_embeddings()(network.base_model(ids).last_hidden_state)
        assert torch.equal(transform.apply_as_transformers(raw), network(ids).logits)
    assert torch.equal(transform.apply(raw), of_vllm(raw, config.to_dict()))
    assert torch.equal(transform.apply(raw), raw) == (name == "nothing")


def test_the_two_ways_differ_in_the_last_bits_of_a_divisor():
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    transform = HeadTransform(divisor=3.0)
    one, other = transform.apply(logits), transform.apply_as_transformers(logits)
    assert not torch.equal(one, other) and torch.allclose(one, other, rtol=2e-7)
    assert (
        HeadTransform.of({"logits_scaling": None, "logit_scale": 0, "final_logit_softcapping": None}) == HeadTransform()
    )


FAMILIES = {
    "factor under another name": ("falcon_h1", {"lm_head_multiplier": 0.5}),
    "multiplied by what Granite divides by": ("hyperclovax", {"logits_scaling": 0.4}),
    "hidden states divided": (
        "minicpm3",
        {"dim_model_base": 6, "q_lora_rank": 16, "kv_lora_rank": 8, "num_key_value_heads": 4},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_read_is_what_transformers_own_forward_does(name):
    kind, fields = FAMILIES[name]
    torch.manual_seed(0)
    network = hf.AutoModelForCausalLM.from_config(hf.AutoConfig.for_model(kind, **BODY | fields)).eval()
    transform = logit_check.transform_of(network)
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        hidden = network.base_model(ids).last_hidden_state
        raw = network.get_output_embeddings()(transform.hidden(hidden))
        assert torch.equal(transform.apply_as_transformers(raw), network(ids).logits)
        assert not torch.allclose(network.get_output_embeddings()(hidden), network(ids).logits)


def test_a_forward_that_calls_the_decoder_inside_its_body_is_seen():
    """OPT's goes past its own base model; a projection behind the layers is part of the body."""
    torch.manual_seed(0)
    network = hf.OPTForCausalLM(hf.OPTConfig(**BODY, ffn_dim=48, word_embed_proj_dim=16)).eval()
    assert logit_check.transform_of(network) == HeadTransform()
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(
            network.get_output_embeddings()(network.base_model(ids).last_hidden_state), network(ids).logits
        )


def test_a_field_that_is_not_read_is_refused_by_name():
    """As for a family that nobody has looked at: its forward multiplies, the reader finds nothing."""

    class Scaled(hf.LlamaForCausalLM):
        def forward(self, input_ids, **kwargs):
            found = super().forward(input_ids, **kwargs)
            found.logits = found.logits * self.config.output_boost
            return found

    network = Scaled(hf.LlamaConfig(**BODY, output_boost=0.37))
    with pytest.raises(ValueError, match=r"logits 0.37 times.*rlalign reads 1,.*likely output_boost=0.37"):
        logit_check.transform_of(network)
    assert "forward" not in network.get_output_embeddings().__dict__ and "forward" not in network.base_model.__dict__


def test_a_cap_and_a_factor_together_are_the_factor_first():
    transform, logits = HeadTransform(cap=5.0, factor=0.3), torch.linspace(-90, 90, 181, dtype=torch.float64)
    assert torch.allclose(transform.apply(logits), torch.tanh(logits * 0.3 / 5.0) * 5.0, rtol=1e-12)
    assert torch.allclose(transform.apply(logits), transform.apply_as_transformers(logits), rtol=1e-12)
