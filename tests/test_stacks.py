"""Released model wrappers of OpenRLHF and SkyRL, and a model patched by Liger, with a mirrored head; their metrics beside ours."""

import typing
from functools import partial

import pytest
import torch
import typing_extensions
from transformers import AutoModelForCausalLM

import rlalign
from rlalign import mismatch
from tests.released import released

HEAT = 0.8
IDS = torch.randint(5, 250, (3, 12), generator=torch.Generator().manual_seed(0))
ATTENTION = torch.ones_like(IDS)
ATTENTION[1, :3] = 0  # left padding, as both have it
ACTIONS = torch.ones(3, 5, dtype=torch.long)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from tests.engine.conftest import build_model

    return build_model(tmp_path_factory.mktemp("model") / "untied", tied=False)


def by_hand(model):
    """float64 logprobs of the last five tokens, from the hidden states that the model computes in its own dtype."""
    positions = (ATTENTION.cumsum(-1) - 1).masked_fill(ATTENTION == 0, 1)
    with torch.no_grad():
        hidden = model.model(IDS, attention_mask=ATTENTION, position_ids=positions).last_hidden_state[:, :-1]
    logits = hidden.double() @ model.lm_head.weight.detach().double().T / HEAT
    return logits.log_softmax(-1).gather(2, IDS[:, 1:, None])[:, -5:, 0]


def the_same_through_a_mirrored_head(wrapper, model, plain, with_entropy):
    """Scores are float64's and gradients the wrapper's own. plain: what it scores; with_entropy: the same and the entropy."""
    plain().sum().backward()
    wanted = {name: p.grad.clone() for name, p in wrapper.named_parameters()}
    wrapper.zero_grad()
    with rlalign.mirror(model) as mirrored:
        ours, entropy = with_entropy()
        ours.sum().backward()
        assert mirrored.status.calls == 1 and entropy.dtype == torch.float32
    torch.testing.assert_close(ours.double(), by_hand(model), rtol=0, atol=2e-5)
    for name, parameter in wrapper.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-4, msg=name)


@torch.no_grad()
def rounded_no_more(model, score):
    """Of a bf16 model: mirrored, scores are float64's of its own hidden states, which they are not without. Returns the latter."""
    theirs = score()
    with rlalign.mirror(model):
        ours = score()
    wanted = by_hand(model)
    assert ours.dtype == torch.float32
    assert (ours - wanted).abs().max() < 2e-5 and (theirs - wanted).abs().max() > 1e-3
    return theirs


@pytest.fixture(scope="module")
def openrlhf(tmp_path_factory):
    absent = ("flash_attn", "ring_flash_attn", "pylatexenc", "optimum", "bitsandbytes")
    with released("openrlhf", tmp_path_factory.mktemp("openrlhf"), absent=absent):
        from openrlhf.models.actor import Actor
        from openrlhf.models.loss import PolicyLoss

        yield Actor, PolicyLoss


@pytest.mark.nightly
@pytest.mark.proves("OpenRLHF Actor", "mirrored in float32: log_probs are float64's, gradients its own")
def test_openrlhfs_actor_scores_through_the_mirrored_head(openrlhf, folder):
    Actor, _ = openrlhf
    actor = Actor(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), temperature=HEAT)
    actor.packing_samples = False  # which it sets only where it loads the model itself, in 16 bits

    def with_entropy():
        scores, output = actor(IDS, ACTIONS, attention_mask=ATTENTION, return_output=True, return_entropy=True)
        return scores, output.entropy

    plain = partial(actor, IDS, ACTIONS, attention_mask=ATTENTION)
    the_same_through_a_mirrored_head(actor, actor.model, plain, with_entropy)


@pytest.mark.nightly
@pytest.mark.proves("OpenRLHF Actor", "mirrored in bf16: log_probs are float64's of its own hidden states")
def test_openrlhfs_bf16_logits_are_rounded_no_more(openrlhf, folder):
    Actor, _ = openrlhf
    actor = Actor(str(folder), attn_implementation="sdpa", param_dtype="bf16", temperature=HEAT)
    rounded_no_more(actor.model, partial(actor, IDS, ACTIONS, attention_mask=ATTENTION))


@pytest.mark.nightly
@pytest.mark.proves("OpenRLHF PolicyLoss", "its vllm_kl is our k1 with the sign of its convention")
def test_openrlhfs_vllm_kl_is_ours(openrlhf):
    _, PolicyLoss = openrlhf
    generator = torch.Generator().manual_seed(1)
    rollout_BL = -2 * torch.rand(3, 8, generator=generator)
    old_BL = rollout_BL + 0.1 * torch.randn(3, 8, generator=generator)
    mask_BL = torch.arange(8) < torch.tensor([[5], [8], [2]])
    loss = PolicyLoss(is_correction_level="token", is_correction_mode="clip")
    *_, theirs, _ = loss(old_BL, old_BL, torch.ones(3, 8), action_mask=mask_BL, rollout_log_probs=rollout_BL)
    found = mismatch.compare(old_BL, rollout_BL, mask_BL)
    assert float(theirs) == pytest.approx(found["k1"], rel=1e-4)


@pytest.fixture(scope="module")
def skyrl(tmp_path_factory):
    absent = ("flash_attn", "jaxtyping", "loguru", "polars")
    with released("skyrl", tmp_path_factory.mktemp("skyrl"), absent=absent), pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            typing, "TypedDict", typing_extensions.TypedDict
        )  # without it SkyRL imports from Python 3.12 on only
        from skyrl.backends.skyrl_train.workers.model_wrapper import HFModelWrapper

        yield HFModelWrapper


def scored(wrapper):
    scores, output = wrapper(
        IDS, 5, attention_mask=ATTENTION, temperature=HEAT, compute_entropy=True, return_output=True
    )
    return scores, output["entropy"]


@pytest.mark.nightly
@pytest.mark.proves("SkyRL HFModelWrapper", "mirrored in float32: log_probs are float64's, gradients its own")
def test_skyrls_wrapper_scores_through_the_mirrored_head(skyrl, folder):
    wrapper = skyrl(str(folder), bf16=False)
    the_same_through_a_mirrored_head(wrapper, wrapper.model, lambda: scored(wrapper)[0], lambda: scored(wrapper))


@pytest.mark.nightly
@pytest.mark.proves("SkyRL HFModelWrapper", "mirrored in bf16: log_probs are float64's of its own hidden states")
def test_skyrls_bf16_log_probs_are_rounded_no_more(skyrl, folder):
    wrapper = skyrl(str(folder), bf16=True)
    assert rounded_no_more(wrapper.model, lambda: scored(wrapper)[0]).dtype == torch.bfloat16


@pytest.mark.nightly
def test_a_model_that_liger_has_patched_is_mirrored(tmp_path, folder):
    """Its forward of a causal LM, which makes logits where no labels are given; its other kernels are for GPUs."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    mask = torch.ones_like(IDS, dtype=torch.bool).index_fill(1, torch.tensor([0]), False)
    with released("liger_kernel", tmp_path, absent=()), torch.no_grad():
        from liger_kernel.transformers import apply_liger_kernel_to_qwen3

        off = dict.fromkeys(("rope", "rms_norm", "swiglu", "cross_entropy"), False)
        apply_liger_kernel_to_qwen3(model=model, fused_linear_cross_entropy=True, **off)
        exact = model.model(IDS).last_hidden_state.double() @ model.lm_head.weight.double().T
        theirs = model(IDS).logits
        with rlalign.mirror(model) as mirrored:
            ours = model(IDS).logits
            logprobs, _ = mirrored.token_logprobs({"input_ids": IDS}, mask)
        again = model(IDS).logits
    assert model.forward.__func__.__module__.startswith("liger_kernel.")
    assert ours.dtype == torch.float32 and (ours - exact).abs().max() < 2e-5 < (theirs - exact).abs().max()
    wanted = exact[:, :-1].log_softmax(-1).gather(2, IDS[:, 1:, None])[..., 0]
    torch.testing.assert_close(logprobs[:, 1:].double(), wanted, rtol=0, atol=2e-5)
    assert torch.equal(again, theirs), "given back"
