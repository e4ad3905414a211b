"""prime-rl's released heads: its trainer's aligned with its vLLM's, which rlalign leaves alone or refuses beside its own."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

import rlalign
from rlalign.integrations import prime_rl as adapter
from tests import released
from tests.engine.conftest import build_model

pytestmark = pytest.mark.nightly
GENERATOR = torch.Generator().manual_seed(0)
HIDDEN = torch.randn(2, 7, 32, generator=GENERATOR)
WEIGHT = torch.randn(96, 32, generator=GENERATOR) / 2
LABELS = torch.randint(0, 96, (2, 7), generator=GENERATOR)
HEAT = 0.5 + torch.rand(2, 7, generator=GENERATOR)
EXTENSION = "prime_rl.inference.vllm.worker.filesystem.FileSystemWeightUpdateWorker"


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """{name: a head of each released class, made by `made(dtype)`}, and their own forwards."""
    with released.prime_rl(tmp_path_factory.mktemp("prime-rl")):
        from prime_rl.trainer.models.layers import lm_head, lm_head_gemma

        yield {
            "fused": lambda: lm_head.FusedOutputLinear(32, 96, chunk_size=4),
            "fused, soft cap": lambda: lm_head_gemma.GemmaFusedOutputLinear(32, 96, chunk_size=4, softcap=3.0),
            "vanilla": lambda: lm_head.VanillaOutputLinear(32, 96),
            "vanilla, soft cap": lambda: lm_head_gemma.GemmaVanillaOutputLinear(32, 96, softcap=3.0),
        }


@pytest.fixture
def aligned(heads, monkeypatch):
    monkeypatch.setattr(adapter, "version", lambda _: released.VERSIONS["prime-rl"])
    for make in heads.values():
        monkeypatch.setattr(type(make()), "forward", type(make()).forward)  # put back afterwards
    return adapter.switch_on


def scored(make, dtype):
    """[B, L] logprobs as prime-rl's trainer takes them, and the operands with their gradients."""
    head = make().to(dtype)
    with torch.no_grad():
        head.weight.copy_(WEIGHT)
    hidden = HIDDEN.to(dtype).requires_grad_()
    output = head(hidden, LABELS, HEAT)
    logprobs = output.get("logprobs")
    if logprobs is None:
        logprobs = (output["logits"] / HEAT[..., None]).log_softmax(-1).gather(-1, LABELS[..., None])[..., 0]
    (logprobs * torch.linspace(-1, 2, 7)).sum().backward()
    return logprobs.detach(), hidden.grad, head.weight.grad, output.get("entropy")


def exact(dtype, cap):
    logits = HIDDEN.to(dtype).double() @ WEIGHT.to(dtype).double().t()
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    every = (logits / HEAT[..., None].double()).log_softmax(-1)
    return every.gather(-1, LABELS[..., None])[..., 0], -(every.exp() * every).sum(-1)


@pytest.mark.proves(
    "prime-rl lm_head classes", "aligned: logprobs and entropy are float64's in bf16, theirs are rounded"
)
@pytest.mark.parametrize("name", ["fused", "fused, soft cap", "vanilla", "vanilla, soft cap"])
def test_the_trainers_heads_round_no_more(name, heads, aligned):
    wanted, entropy = exact(torch.bfloat16, 3.0 if "cap" in name else None)
    theirs = scored(heads[name], torch.bfloat16)[0]
    aligned()
    ours, *_, given = scored(heads[name], torch.bfloat16)
    assert ours.dtype == torch.float32
    assert (ours - wanted).abs().max() < 2e-5 and (theirs - wanted).abs().max() > 1e-3
    if "fused" in name:
        assert (given - entropy).abs().max() < 2e-5 and not given.requires_grad


@pytest.mark.proves("prime-rl lm_head classes", "aligned: gradients are its own where all is float32")
@pytest.mark.parametrize("name", ["fused", "fused, soft cap", "vanilla", "vanilla, soft cap"])
def test_gradients_are_prime_rls_own(name, heads, aligned):
    theirs = scored(heads[name], torch.float32)
    aligned()
    ours = scored(heads[name], torch.float32)
    for mine, own in zip(ours[:3], theirs[:3], strict=True):
        torch.testing.assert_close(mine, own, rtol=1e-4, atol=1e-5)


@pytest.mark.proves("prime-rl lm_head classes", "aligned: its model's logprobs are the mirror's, bit for bit")
def test_a_whole_model_scores_as_our_mirror(heads, aligned, tmp_path):
    from prime_rl.trainer.models.layers.lm_head import inject_prime_lm_head

    folder = build_model(tmp_path / "untied", tied=False)
    ids = torch.randint(5, 250, (1, 12), generator=torch.Generator().manual_seed(1))
    plain, theirs = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16) for _ in range(2))
    positions = torch.arange(12)[None]
    with rlalign.mirror(plain) as mirrored:
        mask = torch.arange(12)[None] > 0
        ours, _ = mirrored.token_logprobs({"input_ids": ids, "position_ids": positions}, mask, temperature=0.8)
    inject_prime_lm_head(theirs, chunk_size=8)
    aligned()
    found = theirs(ids, position_ids=positions, labels=ids.roll(-1, 1), temperature=torch.full((1, 12), 0.8))
    assert torch.equal(found["logprobs"][:, :-1], ours[:, 1:])
    with pytest.raises(ValueError, match="its lm_head is prime_rl.trainer.models.layers.lm_head.FusedOutputLinear"):
        rlalign.mirror(theirs)


def test_a_head_that_is_not_told_the_tokens_says_so(heads, aligned):
    aligned()
    with pytest.raises(ValueError, match="needs labels and temperature"):
        heads["fused"]()(HIDDEN)


def vllm_config(folder, **asked):
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(str(folder), enforce_eager=True, **asked).create_engine_config()


@pytest.fixture
def patched(heads, monkeypatch):
    """vLLM's layer as prime-rl's worker extension leaves it."""
    from vllm.model_executor.layers.logits_processor import LogitsProcessor
    from vllm.plugins import load_general_plugins

    from rlalign.rollout.engine.embedded import EMBEDDED_ENVIRONMENT

    for name, value in EMBEDDED_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    load_general_plugins()
    for name in ("__init__", "_get_logits"):
        monkeypatch.setattr(LogitsProcessor, name, getattr(LogitsProcessor, name))
    from prime_rl.inference import patches

    patches.monkey_patch_fp32_lm_head()


@pytest.mark.proves(
    "prime-rl fp32_lm_head", "under its worker extension its own head makes the logits, through rlalign's plugin"
)
def test_its_own_head_is_left_to_it(patched, tmp_path, monkeypatch):
    """On a CPU torch has no mm with an out_dtype: float64's stands for it, which is how the test knows that theirs ran."""
    from vllm.config import set_current_vllm_config

    from rlalign.rollout.head.logits_processor import AlignedLogitsProcessor, HeadMode

    config = vllm_config(
        build_model(tmp_path / "untied", tied=False), worker_extension_cls=EXTENSION,
        additional_config={"fp32_lm_head": True},
    )  # fmt: skip
    with set_current_vllm_config(config):
        layer = AlignedLogitsProcessor(96)
    assert layer.settings is None and layer.mode is HeadMode.OFF
    product = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out_dtype: product(a.double(), b.double()).to(out_dtype))
    monkeypatch.setattr(layer, "_gather_logits", lambda logits: logits)
    hidden = HIDDEN[0].bfloat16()
    logits = layer._get_logits(hidden, SimpleNamespace(weight=WEIGHT.bfloat16()), None)
    assert torch.equal(logits, (hidden.double() @ WEIGHT.bfloat16().double().t()).float())


@pytest.mark.proves("prime-rl fp32_lm_head", "beside rlalign's own it ends the engine at its start, with both names")
def test_two_heads_at_once_are_refused(patched, tmp_path, monkeypatch):
    folder = build_model(tmp_path / "untied", tied=False)
    with pytest.raises(RuntimeError, match=r"_get_logits \(now of prime_rl.inference.patches\).*its worker extension"):
        vllm_config(folder, additional_config={"rlalign": {"head_dtype": "float32"}})
    both = f"the worker extension {EXTENSION} writes prime-rl's own"
    with pytest.raises(RuntimeError, match=both):
        vllm_config(folder, worker_extension_cls=EXTENSION, additional_config={"rlalign": {"head_dtype": "float32"}})
    monkeypatch.setenv("RLALIGN_HEAD", "float32")
    with pytest.raises(RuntimeError, match=both):
        vllm_config(folder, worker_extension_cls=EXTENSION, additional_config={"fp32_lm_head": True})
