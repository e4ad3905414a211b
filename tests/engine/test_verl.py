"""verl's released actor worker with rlalign's head: float64's numbers, verl's own gradients, and settings refused by name."""

import asyncio
import os
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests import verl_cpu
from tests.engine.conftest import build_model

HEAT, ROWS, REAL = 0.8, 288, 268  # rows of the lm_head, of which the tokenizer knows fewer
GENERATOR = torch.Generator().manual_seed(3)
PROMPTS = [4, 3, 5, 2]
SEQUENCES = [torch.randint(5, 260, (n,), generator=GENERATOR).tolist() for n in (9, 7, 12, 6)]


@pytest.fixture(scope="module")
def verl():
    """verl's own workers, and then the adapter switched on: what is built under `stock` before it is verl's alone."""
    before = dict(os.environ)
    with verl_cpu.platform():
        from verl.workers.engine import EngineRegistry

        yield EngineRegistry
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_model(tmp_path_factory.mktemp("model") / "untied", tied=False)


@pytest.fixture(scope="module")
def adapter(verl):
    import rlalign.integrations.verl as adapter

    return adapter


def exact(folder, real):
    """float64: log-probabilities over the first `real` ids of every token but the first, and entropies before them."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    found = []
    for ids in SEQUENCES:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1, :real] / HEAT
        logprobs = logits.log_softmax(-1)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        found.append((logprobs.gather(1, torch.tensor(ids)[1:, None])[:, 0], entropy))
    return found


def infer(worker, temperature=HEAT):
    from verl.utils import tensordict_utils as tu

    data = verl_cpu.batch(SEQUENCES, PROMPTS, temperature)
    tu.assign_non_tensor(data, calculate_entropy=True, compute_loss=False)
    output = worker.infer_batch(data)
    return [(p[:-1], e[:-1]) for p, e in zip(output["log_probs"].unbind(), output["entropy"].unbind(), strict=True)]


@pytest.mark.proves("verl actor, fsdp and fsdp2", "log_probs and entropy are float64's in float32, packed and padded")
@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
@pytest.mark.parametrize("packed", [False, True])
def test_log_probs_are_float64s_over_the_ids_that_the_rollout_can_sample(adapter, folder, strategy, packed):
    worker = verl_cpu.worker(
        folder,
        strategy=strategy,
        model={"use_remove_padding": packed},
        engine={"mixed_precision": {"param_dtype": "fp32"}},
    )
    assert type(worker.engine).__name__ == "AlignedFSDPEngineWithLMHead"
    per_sample = torch.full((len(SEQUENCES),), HEAT)
    for temperature in (HEAT, per_sample):
        for (logprobs, entropy), (wanted, spread) in zip(infer(worker, temperature), exact(folder, REAL), strict=True):
            assert logprobs.dtype == torch.float32
            torch.testing.assert_close(logprobs.double(), wanted, rtol=0, atol=2e-5)
            torch.testing.assert_close(entropy.double(), spread, rtol=0, atol=2e-5)


def updated(worker):
    """Parameters after one real update of verl's PPO loss, and its metrics."""
    generator, rows = (
        torch.Generator().manual_seed(5),
        [(ids[:n], ids[n:], []) for ids, n in zip(SEQUENCES, PROMPTS, strict=True)],
    )
    old_BL = -3 * torch.rand(len(rows), 12, generator=generator)
    advantages_BL = torch.randn(len(rows), 12, generator=generator)
    metrics = verl_cpu.update(worker, rows, HEAT, old_BL, advantages_BL, entropy_coeff=0.01)
    with torch.no_grad():
        named = {n: t.clone() for n, t in worker.engine.get_per_tensor_param()[0]}
    return named, metrics


@pytest.mark.proves("verl actor, fsdp and fsdp2", "one update by its PPO loss moves every weight as its own head does")
def test_one_update_is_verls_own_where_all_is_float32(verl, adapter, tmp_path):
    """Same logits, same loss: after a step of SGD-like size the weights agree, head and embedding included."""
    model = AutoModelForCausalLM.from_pretrained(build_model(tmp_path / "padded", tied=False), dtype=torch.float32)
    model.resize_token_embeddings(REAL)
    model.save_pretrained(tmp_path / "fits")
    for file in (tmp_path / "padded").glob("*token*"):
        (tmp_path / "fits" / file.name).write_bytes(file.read_bytes())
    settings = {"strategy": "fsdp2", "engine": {"mixed_precision": {"param_dtype": "fp32"}}}
    ours, metrics = updated(verl_cpu.worker(tmp_path / "fits", **settings))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VERL_ENGINE_VENDOR", "nobody")  # verl's own engine, which is registered for no vendor
        worker = verl_cpu.worker(tmp_path / "fits", **settings)
        assert not hasattr(worker.engine, "mirror")
        theirs, wanted = updated(worker)
    assert metrics["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-4)
    before = model.state_dict()
    assert not torch.equal(theirs["lm_head.weight"], before["lm_head.weight"])
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=2e-5, msg=name)


def test_bf16_rounds_verls_own_logits_and_not_ours(adapter, folder):
    """The default precision: bf16 body, float32 head. verl's own log_probs are bf16 numbers."""
    ours = infer(verl_cpu.worker(folder, strategy="fsdp2"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VERL_ENGINE_VENDOR", "nobody")
        theirs = infer(verl_cpu.worker(folder, strategy="fsdp2"))
    assert ours[0][0].dtype == torch.float32 and theirs[0][0].dtype == torch.bfloat16
    assert any((logprobs != logprobs.bfloat16()).any() for logprobs, _ in ours)


@pytest.mark.parametrize(
    "model, said",
    [
        ({"use_fused_kernels": True}, "it passes the lm_head by; leave it False"),
        ({"lora_rank": 4}, r"LoRA as an adapter of the rollout.*model\.lora\.merge=True"),
        ({"load_tokenizer": False}, "ids beyond the tokenizer's no probability"),
    ],
)
def test_settings_that_leave_the_sides_apart_are_refused(adapter, folder, model, said):
    with pytest.raises(ValueError, match=f"rlalign.integrations.verl: .*{said}"):
        verl_cpu.worker(folder, strategy="fsdp2", model=model)


class Worker:
    """In the place of vLLM's: verl's own receiver, and what it was given. drop: a name that is lost on the way."""

    def __init__(self, dtype):
        self.held, self.drop, self.compared = {}, None, []
        self.model_config = SimpleNamespace(dtype=dtype)

    def reset_prefix_cache(self):
        pass

    def collective_rpc(self, method, args=(), kwargs=None):
        return [getattr(self, method)(*args, **(kwargs or {}))]

    def update_weights_from_ipc(self, use_shm):
        from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightReceiver

        handle = f"ipc:///tmp/rl-colocate-zmq-{os.environ['VERL_RAY_JOB_ID']}-replica-0-rank-0.sock"
        taken = lambda weights, is_last: self.held.update((n, t.clone()) for n, t in weights if n != self.drop)  # noqa: E731
        BucketedWeightReceiver(handle, torch.device("cpu"), use_shm=use_shm).receive_weights(taken)

    def rlalign_require_landed(self, file, turn):
        sent = load_file(file)
        self.compared += sent
        if wrong := [
            name for name, tensor in sent.items() if not torch.equal(self.held[name], tensor.bfloat16().float())
        ]:
            raise RuntimeError(f"does not compute with {wrong[0]}")


@pytest.mark.proves(
    "verl ServerAdapter", "its push over shared memory is compared, every tensor in its turn; a lost one is named"
)
def test_every_tensor_of_a_push_has_its_turn(adapter, folder, monkeypatch):
    from verl.workers.rollout.vllm_rollout import ServerAdapter

    from rlalign.integrations import verl_rollout

    monkeypatch.setattr(verl_rollout, "TURNS", 4)
    actor, worker = verl_cpu.worker(folder, strategy="fsdp2"), Worker(torch.float32)
    with torch.no_grad():
        for parameter in actor.engine.module.parameters():
            parameter.copy_(parameter.bfloat16())
    rollout = verl_cpu.rollout(folder, worker)
    assert isinstance(rollout, ServerAdapter) and type(rollout) is not ServerAdapter
    names = {name for name, _ in actor.engine.get_per_tensor_param()[0]}
    for step in range(4):
        verl_cpu.push(rollout, actor, step)
    assert sorted(worker.compared) == sorted(names) == sorted(worker.held) and rollout.server_handle.global_steps == 3
    worker.drop = "model.norm.weight"
    with torch.no_grad():
        actor.engine.module.model.norm.weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"does not compute with model\.norm\.weight"):
        for step in range(4):
            verl_cpu.push(rollout, actor, step)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"logprobs_mode": "raw_logprobs"}, "raw against processed logprobs: rollout.logprobs_mode=raw_logprobs"),
        ({"calculate_log_probs": False}, "vLLM gives no logprobs, and nothing is compared"),
        ({"top_p": 0.9}, "rollout.top_p=0.9.* scores the whole distribution"),
        ({"top_k": 5}, "top_k=5"),
        ({"repetition_penalty": 1.1}, "repetition_penalty=1.1"),
        ({"quantization": "fp8"}, "rollout.quantization=fp8: vLLM computes with other weights"),
        ({"name": "sglang"}, "rollout.name=sglang would leave a float32 head on the trainer's side alone"),
    ],
)
@pytest.mark.proves(
    "verl rollout settings", "raw logprobs, truncated sampling, a penalty, another engine: refused by name"
)
def test_settings_of_the_rollout_are_refused(adapter, folder, changes, said):
    with pytest.raises(ValueError, match=f"rlalign.integrations.verl.*{said}"):
        verl_cpu.rollout(folder, Worker(torch.float32), **changes)


@pytest.mark.proves(
    "verl actor, fsdp and fsdp2", "another temperature than the rollout's is refused before its forward"
)
def test_another_temperature_is_named(adapter, folder):
    actor = verl_cpu.worker(folder, strategy="fsdp2")
    verl_cpu.rollout(folder, Worker(torch.float32), temperature=HEAT)
    with pytest.raises(ValueError, match=r"another temperature: rollout\.temperature=0\.8, .* by 1\.3"):
        infer(actor, 1.3)


def test_deltas_have_nothing_whole_to_compare(adapter, folder):
    rollout = verl_cpu.rollout(folder, Worker(torch.float32))
    with pytest.raises(ValueError, match="compares whole tensors; the checkpoint engine sends delta_flush"):
        asyncio.run(rollout.update_weights(iter([]), wire_format="delta_flush"))


def test_an_engine_without_a_mirror_is_refused_by_its_name(adapter):
    with pytest.raises(
        ValueError, match=r"mirrors the head of fsdp, fsdp2; actor\.strategy=megatron would leave a float32"
    ):
        adapter.refusing("megatron")(model_config=None)


@pytest.mark.parametrize("name", ["calculate_sum_pi_squared", "distillation_use_topk"])
def test_what_needs_logits_is_refused(adapter, folder, name):
    from verl.utils import tensordict_utils as tu

    data = verl_cpu.batch(SEQUENCES, PROMPTS, HEAT)
    tu.assign_non_tensor(data, **{name: True})
    with pytest.raises(ValueError, match=f"builds no logits, which {name} needs"):
        adapter._require_request(data)


def test_another_head_and_an_untested_version_are_refused(adapter, monkeypatch):
    monkeypatch.setenv("RLALIGN_HEAD", "master")
    with pytest.raises(ValueError, match="RLALIGN_HEAD='master'.*carries no unrounded lm_head"):
        adapter.switch_on()
    with pytest.raises(
        RuntimeError, match=r"verl 0\.10\.0 was not tried.*RLALIGN_ALLOW_UNTESTED_VERL=1.*rlalign\.mirror"
    ):
        adapter.require_version("0.10.0")
    monkeypatch.setenv("RLALIGN_ALLOW_UNTESTED_VERL", "1")
    adapter.require_version("0.10.0")


def noisy():
    """Logprobs of both sides and a mask, [3, 8]."""
    generator = torch.Generator().manual_seed(1)
    rollout_BL = -2 * torch.rand(3, 8, generator=generator)
    mask_BL = torch.ones(3, 8, dtype=torch.long)
    mask_BL[0, 5:] = 0
    return rollout_BL + 0.05 * torch.randn(3, 8, generator=generator), rollout_BL, mask_BL


@pytest.mark.proves(
    "verl metrics", "mismatch/... beside its training/rollout_probs_diff and rollout_corr, to the same k3"
)
def test_our_metrics_are_beside_verls_own(adapter):
    from verl.trainer.ppo.rollout_corr_helper import compute_offpolicy_metrics

    old_BL, rollout_BL, mask_BL = noisy()
    found = verl_cpu.debug_metrics(old_BL, rollout_BL, mask_BL, sampled=[6, 6, 6], global_steps=7)
    theirs = compute_offpolicy_metrics(old_BL, rollout_BL, mask_BL)
    assert found["mismatch/lag0/k3"] == pytest.approx(theirs["k3_kl"], rel=1e-4)
    size = (old_BL - rollout_BL)[mask_BL.bool()].abs().mean()
    assert found["mismatch/lag0/abs_mean"] == pytest.approx(float(size), rel=1e-5)
    assert found["training/rollout_probs_diff_valid"] == 1


def test_only_lag_zero_is_called_engine_mismatch(adapter):
    unknown = verl_cpu.debug_metrics(*noisy())
    assert "mismatch/k3" in unknown and "mismatch/lag0/k3" not in unknown
    stale = verl_cpu.debug_metrics(*noisy(), sampled=[4, 5, 5], global_steps=7)
    assert "mismatch/k3" in stale and "mismatch/lag0/k3" not in stale
