"""rlalign.mirror on models as loops wrap them: float32 logits, the same logprobs and gradients as float64, and the way back."""

import copy

import pytest
import torch
from torch import nn
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import rlalign
from rlalign.trainer import head_mirror
from rlalign.trainer.live_mirror import _tensors, causal_model

SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64,
}  # fmt: skip
IDS = torch.randint(0, 96, (3, 12), generator=torch.Generator().manual_seed(0))
MASK = torch.ones(3, 12, dtype=torch.bool)
MASK[:, :3] = False
INPUTS = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


def qwen(dtype=torch.bfloat16, **changes):
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**(SIZES | {"tie_word_embeddings": False} | changes)))
    model.get_output_embeddings().weight.data.mul_(20.0 if not model.config.tie_word_embeddings else 1.0)
    return model.to(dtype).eval()


class ValueHead(nn.Module):
    """As TRL's wrapper of its PPO trainer: a causal model by this name, a tuple out."""

    def __init__(self, model):
        super().__init__()
        self.pretrained_model, self.v_head = model, nn.Linear(32, 1)

    def forward(self, **inputs):
        output = self.pretrained_model(**inputs, output_hidden_states=True)
        return output.logits.float(), None, self.v_head(output.hidden_states[-1].float())


def lora(model):
    import peft

    model = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    return model.bfloat16().eval()


WRAPPERS = {
    "plain": lambda model: model,
    "peft": lora,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "value head": ValueHead,
}


def exact(model, temperature):
    """float64 logprobs of IDS given what the body, run as it is, hands to the head."""
    inner = causal_model(model)
    with torch.no_grad():
        hidden = inner.base_model(**INPUTS).last_hidden_state.double()
        logits = hidden @ inner.get_output_embeddings().weight.double().t()
    chosen = (logits[:, :-1] / temperature).log_softmax(-1).gather(-1, IDS[:, 1:, None])[..., 0]
    return nn.functional.pad(chosen, (1, 0)) * MASK, logits


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "compiled")) for n in WRAPPERS])
def test_logits_and_logprobs_are_float32_through_every_wrapper_and_go_back(name, compiling):
    model = WRAPPERS[name](qwen(num_hidden_layers=1))
    with torch.no_grad():
        before = next(iter(_tensors(model(**INPUTS))))
    wanted, logits = exact(model, 0.7)
    with rlalign.mirror(model) as mirrored:
        with torch.no_grad():
            found = next(iter(_tensors(model(**INPUTS))))
            logprobs, entropy = mirrored.token_logprobs(INPUTS, MASK, temperature=0.7)
        assert found.dtype == logprobs.dtype == torch.float32
        error, rounded = (found.double() - logits).abs().max(), (before.double() - logits).abs().max()
        assert error < 1e-5 and rounded > 1e-3, (error, rounded)
        assert (logprobs.double() - wanted).abs().max() < 1e-5 and (logprobs[~MASK] == 0).all()
        assert (entropy[MASK] > 0).all() and mirrored.status.multiplied.dtype == "float32"
    with torch.no_grad():
        assert torch.equal(next(iter(_tensors(model(**INPUTS)))), before)
    with pytest.raises(RuntimeError, match="was restored"):
        mirrored.token_logprobs(INPUTS, MASK)


def test_gradients_are_those_of_the_logits():
    """Of a float32 model, where the unmirrored way is a reference as good."""
    model = qwen(torch.float32)
    twin = copy.deepcopy(model)
    logits = twin(**INPUTS).logits
    chosen = logits[:, :-1].log_softmax(-1).gather(-1, IDS[:, 1:, None])[..., 0]
    (chosen * MASK[:, 1:]).sum().backward()
    rlalign.mirror(model).token_logprobs(INPUTS, MASK)[0].sum().backward()
    for (name, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("kind", ["cap", "scale"])
def test_what_a_model_does_to_its_logits_is_in_the_logprobs(kind):
    torch.manual_seed(0)
    if kind == "cap":
        model = Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=3.0, query_pre_attn_scalar=16))
    else:
        model = Cohere2ForCausalLM(Cohere2Config(**SIZES, logit_scale=0.25))
    model.eval()
    with torch.no_grad():
        logits = model(**INPUTS).logits
        chosen = logits[:, :-1].log_softmax(-1).gather(-1, IDS[:, 1:, None])[..., 0]
        found, _ = rlalign.mirror(model).token_logprobs(INPUTS, MASK)
    torch.testing.assert_close(found[:, 1:], chosen * MASK[:, 1:], rtol=1e-5, atol=1e-5)


def test_float32_parameters_under_autocast_are_multiplied_as_the_engine_holds_them():
    model = qwen(torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        hidden = model.base_model(**INPUTS).last_hidden_state
    rounded = model.lm_head.weight.detach().bfloat16()
    wanted = (hidden.bfloat16().double() @ rounded.double().t()).float()
    unrounded = hidden.bfloat16().double() @ model.lm_head.weight.detach().double().t()
    mirrored = rlalign.mirror(model)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(**INPUTS).logits
    if hidden.dtype == torch.bfloat16:  # what the final norm hands over decides the operand
        assert (logits - wanted).abs().max() < 1e-5 < (unrounded - wanted).abs().max()
    else:
        assert (logits - hidden.double() @ model.lm_head.weight.double().t()).abs().max() < 1e-5
    logits.sum().backward()
    assert model.lm_head.weight.grad.dtype == torch.float32 and model.lm_head.weight.grad.abs().sum() > 0
    mirrored.restore()


def test_every_head_that_it_cannot_be_is_refused_by_name():
    with pytest.raises(ValueError, match="Linear: found no causal language model"):
        rlalign.mirror(nn.Linear(2, 2))
    model = qwen()
    with pytest.raises(ValueError, match='head_dtype is \'model\'; choose "float32" or "master"'):
        rlalign.mirror(model, head_dtype="model")
    first = rlalign.mirror(model)
    with pytest.raises(ValueError, match="mirrored already; use that mirror, or restore"):
        rlalign.mirror(model)
    model.lm_head.forward = lambda hidden: hidden  # as a library that comes later
    with pytest.raises(
        RuntimeError, match=r"lm_head\.forward was replaced after it was mirrored, by tests\.test_live_mirror"
    ):
        first.token_logprobs(INPUTS, MASK)
    with pytest.raises(
        ValueError, match=r"was replaced by tests\.test_live_mirror; two patches.*cast_lm_head_to_fp32=False"
    ):
        rlalign.mirror(model)
    odd = qwen()
    odd.lm_head = nn.Sequential(odd.lm_head)
    with pytest.raises(
        ValueError, match="its lm_head is torch.nn.modules.container.Sequential; the mirror covers a plain"
    ):
        rlalign.mirror(odd)


@pytest.mark.parametrize("head_dtype", ["model", "float32"])
def test_the_head_of_a_copy_multiplies_by_the_copys_weight(head_dtype):
    model = qwen()
    head_mirror.mirror(model, head_dtype=head_dtype, chunk=0)
    twin = copy.deepcopy(model)
    twin.lm_head.weight.data.zero_()
    assert model(**INPUTS).logits.abs().max() > 0 and twin(**INPUTS).logits.abs().max() == 0


def test_adapters_are_merged_for_the_engine_and_stay_apart_in_the_model():
    model = lora(qwen())
    weights = dict(rlalign.mirror(model).named_weights())
    assert weights.keys() == dict(qwen().named_parameters()).keys()
    exact = copy.deepcopy(model).double().merge_and_unload()
    changed = 0
    for (name, found), base in zip(weights.items(), qwen().parameters(), strict=True):
        assert torch.equal(found, exact.get_parameter(name).bfloat16()), name  # rounded once
        changed += not torch.equal(found, base)
    assert changed == 4


@pytest.mark.parametrize(
    ("targets", "more"),
    [(["q_proj"], {"use_dora": True}), (["q_proj"], {"lora_bias": True}), (["embed_tokens"], {})],
)
def test_other_adapters_than_plain_lora_are_refused_by_name(targets, more):
    import peft

    odd = peft.get_peft_model(qwen(), peft.LoraConfig(r=2, target_modules=targets, **more))
    with pytest.raises(ValueError, match=rf"{targets[0]} is a \w+: only plain LoRA adapters are merged"):
        list(rlalign.mirror(odd).named_weights())


def test_adapters_of_square_transposed_layers_are_merged_the_way_they_compute():
    """GPT-2's Conv1D holds [inputs, outputs]; of a square one a transposed product would fit, too."""
    import peft

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=2, n_positions=32)).bfloat16()
    config = peft.LoraConfig(r=2, target_modules=["attn.c_proj"], init_lora_weights=False, fan_in_fan_out=True)
    model = peft.get_peft_model(model, config).bfloat16().eval()
    name = "transformer.h.0.attn.c_proj.weight"
    exact = copy.deepcopy(model).double().merge_and_unload().get_parameter(name)
    assert torch.equal(dict(rlalign.mirror(model).named_weights())[name], exact.bfloat16())


def test_an_adapter_on_the_head_is_refused():
    import peft

    model = peft.get_peft_model(qwen(), peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ValueError, match="its lm_head carries an adapter"):
        rlalign.mirror(model)


def test_a_model_that_passes_its_head_by_is_noticed():
    class Fused(Qwen3ForCausalLM):
        def forward(self, input_ids, attention_mask):
            return self.model(input_ids=input_ids, attention_mask=attention_mask)

    model = Fused(Qwen3Config(**SIZES)).eval()
    with pytest.raises(ValueError, match="the forward of Fused called its lm_head 0 times"):
        rlalign.mirror(model).token_logprobs(INPUTS, MASK)
    with pytest.raises(ValueError, match="inputs need input_ids.*got ids"):
        rlalign.mirror(qwen()).token_logprobs({"ids": IDS}, MASK)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    if torch.distributed.is_initialized():
        yield
        return
    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("ranks") / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def fsdp1(model, **options):
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **options)


def fsdp2(model):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh

    mesh = init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


SHARDING = {
    "ddp": nn.parallel.DistributedDataParallel,
    "fsdp1, flat parameters": lambda model: fsdp1(model, use_orig_params=False),
    "fsdp1, original parameters": lambda model: fsdp1(model, use_orig_params=True),
    "fsdp2": fsdp2,
}


@pytest.mark.parametrize("name", SHARDING)
def test_sharded_models_score_and_learn_as_the_whole_one(name, one_rank):
    whole = qwen(torch.float32)
    logits = whole(**INPUTS).logits
    wanted = logits[:, :-1].log_softmax(-1).gather(-1, IDS[:, 1:, None])[..., 0] * MASK[:, 1:]
    wanted.sum().backward()
    model = SHARDING[name](qwen(torch.float32))
    mirrored = rlalign.mirror(model)
    for (mine, tensor), (theirs, expected) in zip(mirrored.named_weights(), whole.named_parameters(), strict=True):
        assert mine == theirs and torch.equal(tensor, expected)
    found, _ = mirrored.token_logprobs(INPUTS, MASK)
    torch.testing.assert_close(found[:, 1:], wanted.detach(), rtol=1e-5, atol=1e-5)
    found.sum().backward()
    total = sum(float(p.grad.double().square().sum()) for p in whole.parameters())
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    grads = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads]
    assert abs(sum(float(g.double().square().sum()) for g in grads) / total - 1.0) < 1e-4
