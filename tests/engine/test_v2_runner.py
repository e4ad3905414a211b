"""vLLM's V2 model runner, the one GPUs run by default, with our head: its kernels interpreted, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlalign.logprobs.truncation import Truncation, kept_mask
from tests.engine.conftest import perturbed
from tests.engine.test_routed_experts import build

pytestmark = pytest.mark.nightly


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("mixture"))


@pytest.fixture(scope="module")
def found(untied, mixture, tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("v2") / "found.json"
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.v2_runner", str(untied), str(mixture), str(out)], cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text())


@torch.no_grad()
def logprobs(model, token_ids, temperature):
    """[L - 1, V]: transformers' own."""
    return (model(torch.tensor([token_ids])).logits[0, :-1].float() / temperature).log_softmax(-1)


def test_the_engine_ran_the_v2_runner_with_our_head_and_it_multiplied_in_float32(found):
    assert "vllm.v1.worker.gpu.model_runner.GPUModelRunner" in found["runner"]
    status = found["status"]
    assert status["class"].endswith("AlignedLogitsProcessor") and status["calls"] > 0
    assert [status["multiplied"][kind]["dtype"] for kind in ("probe", "sampled")] == ["float32", "float32"]


@pytest.mark.parametrize(("key", "version"), [("before", 0), ("after", 2)])
def test_sampled_logprobs_are_those_of_transformers_before_and_after_two_publishes(found, untied, key, version):
    model = perturbed(untied, seed=version, size=0.02 if version else 0.0).float().eval()
    for rollout in found[key]:
        start, ids = rollout["prompt_length"], rollout["token_ids"]
        wanted = logprobs(model, ids, 0.7)[start - 1 :].gather(1, torch.tensor(ids[start:])[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(rollout["rollout_logprobs"][start:]), wanted, rtol=0, atol=1e-5)
        assert rollout["version_spans"] == [[start, len(ids), version]]
    assert found["changed"]


def test_given_sequences_are_scored(found, untied):
    model = perturbed(untied, seed=2).float().eval()
    for rollout, scores in zip(found["after"], found["scored"], strict=True):
        ids = torch.tensor(rollout["token_ids"])
        wanted = logprobs(model, ids.tolist(), 1.0).gather(1, ids[1:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(scores[1:]), wanted, rtol=0, atol=1e-5)


def test_its_sampling_masks_are_the_sets_that_we_read_off_its_logprobs_and_that_we_compute(found, untied):
    model, cut = perturbed(untied, seed=0, size=0.0).float().eval(), Truncation(**found["truncated"])
    for prompt, output in zip(([1, 40, 41, 42], [1, 60], [1, 70, 71]), found["masks"], strict=True):
        ids = [*prompt, *output["token_ids"]]
        kept = kept_mask(logprobs(model, ids, 0.7)[len(prompt) - 1 :], cut)
        for mask, logprob, computed in zip(output["mask"], output["logprobs"], kept, strict=True):
            assert mask == sorted(int(i) for i, value in logprob.items() if value > -torch.inf)
            assert mask == computed.nonzero()[:, 0].tolist()


@torch.no_grad()
def chosen(model, token_ids) -> torch.Tensor:
    """[L, layers, K]: experts that transformers' own gates choose, ascending."""
    found = []
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda m, a, out: found.append(out[-1])) for layer in model.model.layers
    ]
    model(torch.tensor([token_ids]))
    for hook in hooks:
        hook.remove()
    return torch.stack(found, 1).sort(-1).values


def test_its_routed_experts_are_those_of_transformers_gates_from_the_prefix_cache_and_after_a_publish_too(
    found, mixture
):
    routed = found["routed"]
    for key, change in (("cold", 0.0), ("warm", 0.0), ("published", 0.02)):
        model, differ, total = perturbed(mixture, seed=1, size=change).float().eval(), 0, 0
        for rollout in routed[key]:
            ids = rollout["token_ids"]
            assert rollout["shape"] == [4, 2] and len(rollout["experts"]) == 8 * (len(ids) - 1)
            got = torch.tensor(rollout["experts"]).view(-1, 4, 2).sort(-1).values
            differ += int((got != chosen(model, ids)[:-1]).sum())
            total += got.numel()
        assert differ < 2e-3 * total, key  # two float32 forwards; a gate may be undecided
    first = [[r["experts"][: 8 * r["prompt_length"]] for r in routed[key]] for key in ("cold", "published")]
    assert first[0] != first[1]  # the prompts' too: nothing outlived its weights


def test_capture_refuses_it_by_name(found):
    assert (
        "reads the state of vLLM's V1 model runner" in found["capture"]
        and "VLLM_USE_V2_MODEL_RUNNER=0" in found["capture"]
    )
