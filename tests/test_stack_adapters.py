"""The adapters of OpenRLHF, SkyRL and prime-rl, as far as they need no wheel: versions, settings, what they put where."""

from types import SimpleNamespace

import pytest
import torch

from rlalign.integrations import openrlhf, prime_rl, skyrl
from rlalign.integrations.ray_actors import plain, verify_push
from tests.stack_cpu import ActorClass, openrlhf_settings


@pytest.mark.parametrize("adapter, start", [(openrlhf, "switch_on"), (skyrl, "main"), (prime_rl, "switch_on")])
def test_another_version_is_refused_with_a_way_round(monkeypatch, adapter, start):
    monkeypatch.setattr(adapter, "version", lambda _: "9.1.0")
    with pytest.raises(RuntimeError, match=f"{adapter.ALLOW_UNTESTED}=1 and read the first step's"):
        getattr(adapter, start)()
    monkeypatch.setenv(adapter.ALLOW_UNTESTED, "1")
    with pytest.raises(ModuleNotFoundError):  # the stack itself, which is not here
        getattr(adapter, start)()


@pytest.mark.parametrize(
    "at, name, value, said",
    [
        ("algo.advantage", "is_correction_level", "off", "vLLM is asked for no logprobs"),
        ("ds.lora", "rank", 8, "ds.lora.rank"),
        ("ds", "load_in_4bit", True, "ds.load_in_4bit"),
        ("ds", "tensor_parallel_size", 2, "DeepSpeed splits the lm_head"),
    ],
)
def test_settings_of_openrlhf_that_leave_the_sides_apart_are_refused(at, name, value, said):
    args = openrlhf_settings(prompts=2, group=2, temperature=1.0, lr=1e-4)
    openrlhf.require_settings(args)
    inner = args
    for part in at.split("."):
        inner = getattr(inner, part)
    setattr(inner, name, value)
    with pytest.raises(ValueError, match=said):
        openrlhf.require_settings(args)


@pytest.mark.parametrize(
    "path, value, said",
    [
        ("trainer.strategy", "megatron", "its head is not mirrored"),
        ("trainer.policy.model.lora.rank", 8, "lora.rank above 0"),
        ("generator.sampling_params.logprobs", None, "asked for no logprobs"),
        (
            "generator.inference_engine.engine_init_kwargs",
            {"logprobs_mode": "raw_logprobs"},
            "raw against processed logprobs",
        ),
        ("trainer.algorithm.temperature", 1.0, "another temperature"),
        ("generator.sampling_params.top_p", 0.9, "truncated sampling"),
    ],
)
def test_settings_of_skyrl_that_leave_the_sides_apart_are_refused(monkeypatch, path, value, said):
    monkeypatch.setattr(skyrl, "sampling", lambda backend, params: dict(vars(params)))
    cfg = skyrl_settings()
    skyrl.configure(cfg)
    asked = cfg.generator.inference_engine.engine_init_kwargs
    assert asked == {"logprobs_mode": "processed_logprobs", "additional_config": {"rlalign": {"head_dtype": "float32"}}}
    cfg, (*parts, name) = skyrl_settings(), path.split(".")
    inner = cfg
    for part in parts:
        inner = getattr(inner, part)
    setattr(inner, name, value)
    with pytest.raises(ValueError, match=said):
        skyrl.configure(cfg)


def skyrl_settings():
    return SimpleNamespace(
        generator=SimpleNamespace(
            inference_engine=SimpleNamespace(backend="vllm", engine_init_kwargs={}),
            sampling_params=SimpleNamespace(temperature=0.8, top_p=1.0, logprobs=1),
        ),
        trainer=SimpleNamespace(
            strategy="fsdp", algorithm=SimpleNamespace(temperature=0.8),
            policy=SimpleNamespace(model=SimpleNamespace(lora=SimpleNamespace(rank=0))),
        ),
    )  # fmt: skip


def test_the_class_behind_an_actor_class_is_found():
    class Actor:
        pass

    assert plain(ActorClass(Actor)) is Actor and plain(Actor) is Actor


@pytest.mark.parametrize("first, known, count", [(True, False, 32), (True, True, 8), (False, False, 0)])
def test_every_rank_gathers_and_the_first_compares(first, known, count):
    gathered, compared = [], []

    def weights():
        for i in range(40):
            gathered.append(i)
            yield str(i), torch.zeros(1)

    engine = SimpleNamespace(
        verify=lambda weights, sample: compared.extend(next(weights) for _ in range(sample)),
        every_tensor_had_its_turn=known,
    )
    verify_push(engine if first else None, weights())
    assert len(gathered) == 40 and len(compared) == count
