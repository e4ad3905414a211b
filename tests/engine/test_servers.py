"""rollout.backend=server on two real vLLM servers, against the embedded engine on the same weights."""

import os
import signal
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlalign.head.projection import project
from rlalign.run.conversation import converse
from rlalign.types import collate
from rlalign.weights import publish
from tests.engine.conftest import PROMPTS, ROLLOUT, perturbed, sample, start
from tests.talks import AlwaysRight, TwoSums

FLOOR = 1e-5  # nats: the embedded engine itself moves by 2e-6 in float32 when a prompt is decoded alone or among others


@pytest.fixture(scope="module")
def embedded(untied):
    engine = start(untied, dtype="float32", rollout=replace(ROLLOUT))
    yield engine
    engine.close()


@contextmanager
def closing(pool):
    try:
        yield pool
    finally:
        pool.close()


def publish_both(model, version: int, *receivers, shared) -> None:
    for receiver in receivers:
        publish(model.named_parameters(), version, receiver=receiver, shared=shared)


def same(found, expected) -> bool:
    """Equal in tokens, texts, reasons and versions; in logprobs up to FLOOR."""
    without = {"rollout_logprobs": None}
    assert [asdict(r) | without for r in found] == [asdict(r) | without for r in expected]
    assert (flat(found) - flat(expected)).abs().max() < FLOOR
    return True


def flat(rollouts) -> torch.Tensor:
    return torch.tensor([p for r in rollouts for p in r.rollout_logprobs])


@pytest.mark.parametrize("samples_per_request", [0, 1])
def test_the_servers_sample_what_the_embedded_engine_samples_before_and_after_a_publish(
    two_servers, embedded, untied, tmp_path, samples_per_request
):
    before = AutoModelForCausalLM.from_pretrained(untied, dtype=torch.float32)
    after = perturbed(untied, seed=1 + samples_per_request, dtype=torch.float32)
    with closing(two_servers.pool(samples_per_request=samples_per_request)) as pool:
        publish_both(before, 1, embedded, pool, shared=tmp_path)
        first = sample(pool)
        assert same(first, sample(embedded))
        publish_both(after, 2, embedded, pool, shared=tmp_path)
        second = sample(pool)
        assert same(second, sample(embedded)) and (flat(second[:1]) - flat(first[:1])).abs().max() > 0.01
        assert {r.policy_version for r in second} == {2}
        assert all(s["calls"] > 0 for s in pool.status()) and len(pool.status()) == 2


def test_conversations_over_servers_are_those_over_the_embedded_engine(two_servers, embedded, untied, tmp_path):
    tokenizer = embedded.tokenizer()
    template = (
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    )
    asked = [[{"role": "user", "content": f"{i} + 5 ="}] for i in range(4)]
    weights = AutoModelForCausalLM.from_pretrained(untied, dtype=torch.float32)
    weights.lm_head.weight.data[tokenizer.eos_token_id] *= 4.0  # answers end: a random model's seldom do

    def played(engine):
        return converse(
            engine, tokenizer, asked, [TwoSums(None, AlwaysRight()) for _ in asked], seed=5, max_turns=2, room=40,
            chat_template=template,
        )  # fmt: skip

    with closing(two_servers.pool()) as pool:
        publish_both(weights, 1, embedded, pool, shared=tmp_path)
        there, here = played(pool), played(embedded)
    assert [(c.outcome, c.messages) for c in there] == [(c.outcome, c.messages) for c in here]
    assert same([c.rollout() for c in there], [c.rollout() for c in here]) and any(len(c.turns) == 2 for c in here)
    for c in there:
        for before, after in pairwise(c.turns):
            assert after.token_ids[: len(before.token_ids)] == before.token_ids


def test_an_update_in_flight_recomputes_the_keys_and_names_both_versions(two_servers, untied, tmp_path):
    old = AutoModelForCausalLM.from_pretrained(untied, dtype=torch.float32)
    new = perturbed(untied, seed=7, dtype=torch.float32)
    with closing(two_servers.pool(max_tokens=240)) as pool:
        publish(old.named_parameters(), 1, receiver=pool, shared=tmp_path)
        found = []
        sampling = threading.Thread(target=lambda: found.extend(sample(pool, samples=16)))
        sampling.start()
        time.sleep(0.4)
        publish(new.named_parameters(), 2, receiver=pool, shared=tmp_path)
        sampling.join()
    crossed = [r for r in found if len(r.version_spans) == 2]
    assert len(found) == 16 * len(PROMPTS) and crossed
    for rollout in crossed:
        (_, switch, first), (start_of_new, end, second) = rollout.version_spans
        assert (first, second, start_of_new, end) == (1, 2, switch, len(rollout.token_ids)) and rollout.kv_recomputed
        for model, part in ((old, slice(rollout.prompt_length, switch)), (new, slice(switch, end))):
            assert (torch.tensor(rollout.rollout_logprobs[part]) - forced(model, rollout)[part]).abs().max() < 1e-4
    batch = collate(found, pad_token_id=0, spec=pool.spec)
    assert torch.equal(batch.kv_version_BL, batch.policy_version_BL)


@torch.no_grad()
def forced(model, rollout) -> torch.Tensor:
    """Logprobs [L] of the whole sequence by one model, every key and value its own; entry 0 is 0."""
    ids = torch.tensor([rollout.token_ids])
    logprobs_LV = model(ids).logits[0, :-1].log_softmax(-1)
    return torch.cat([torch.zeros(1), logprobs_LV.gather(-1, ids[0, 1:, None])[:, 0]])


def test_a_server_killed_in_the_middle_of_a_batch_costs_nothing_and_comes_back_at_a_publish(
    two_servers, embedded, untied, tmp_path
):
    weights = perturbed(untied, seed=3, dtype=torch.float32)
    with closing(two_servers.pool(max_tokens=200)) as pool:
        publish_both(weights, 1, embedded, pool, shared=tmp_path)
        found = []
        sampling = threading.Thread(target=lambda: found.extend(sample(pool, samples=16)))
        sampling.start()
        time.sleep(0.3)
        os.kill(two_servers.processes[1].process.pid, signal.SIGKILL)
        sampling.join()
        assert pool.reissued > 0, "it was killed after the batch"
        assert [r.group_id for r in found] == [group for group in range(len(PROMPTS)) for _ in range(16)]
        assert len({tuple(r.token_ids) for r in found}) == len(found)
        for r in found:
            assert (torch.tensor(r.rollout_logprobs) - forced(weights, r))[r.prompt_length :].abs().max() < 1e-4
        embedded.config.max_tokens = 200
        again = zip(found, sample(embedded, samples=16), strict=True)
        embedded.config.max_tokens = 12
        equal = [a.token_ids == b.token_ids for a, b in again]  # over 200 tokens, the floor can turn a draw
        assert sum(equal) >= 0.9 * len(equal)

        two_servers.restart(1)
        wait_until(lambda: "joining" in pool.servers()[two_servers.urls[1]], two_servers.patience_s)
        sample(pool)
        assert [s["engine"] for s in pool.status()] == two_servers.urls[:1]
        publish(weights.named_parameters(), 2, receiver=pool, shared=tmp_path)
        assert pool.engines == two_servers.urls
        again = sample(pool, samples=16)
        assert {r.version_spans[0][2] for r in again} == {2} and all(s["calls"] > 0 for s in pool.status())
        for r in again:
            assert (torch.tensor(r.rollout_logprobs) - forced(weights, r))[r.prompt_length :].abs().max() < 1e-4


def wait_until(condition, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.05)


def test_the_head_of_a_server_is_the_embedded_engines(two_servers, embedded, untied, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = perturbed(untied, seed=5, dtype=torch.float32)
    hidden_ND = torch.randn(6, 128, generator=torch.Generator().manual_seed(0))
    save_file({"hidden_ND": hidden_ND}, tmp_path / "hidden.safetensors")
    with closing(two_servers.pool()) as pool:
        publish(weights.named_parameters(), 1, receiver=pool, shared=tmp_path)
        logits_NV = load_file(pool.head_logits(tmp_path / "hidden.safetensors", batch=4))["logits_NV"]
    expected_NV = project(hidden_ND, weights.lm_head.weight.detach())
    torch.testing.assert_close(logits_NV, expected_NV, rtol=1e-5, atol=1e-4)


def test_a_server_of_another_model_is_refused_by_name(two_servers, tied):
    with pytest.raises(
        RuntimeError, match=rf"{two_servers.urls[0]} \(host .*serves another model: rank 0 has .*untied"
    ):
        two_servers.pool(model=tied)
    with pytest.raises(
        RuntimeError, match="takes sequences of 256 tokens .* needs 512; start it with rollout.max_model_len=512"
    ):
        two_servers.pool(max_model_len=512)
    with pytest.raises(RuntimeError, match=r"1 of 2 rollout servers were ready .*127.0.0.1:9 is down .*connection"):
        two_servers.pool(two_servers.urls[0], "http://127.0.0.1:9", start_timeout_s=5)


def test_a_foreign_server_is_attached_published_to_and_checked(two_servers, untied, capsys):
    import rlalign
    from rlalign.cli import main

    url = two_servers.urls[0]
    handle = rlalign.attach(url, after_generation=True)
    assert handle.spec({"temperature": 0.5}).temperature == 0.5
    model = perturbed(untied, seed=21)
    report = handle.publish(model.named_parameters(), 5)
    assert report.version == handle.status()[0]["policy_version"] == 5
    assert handle.verify(model.named_parameters()).complete
    with pytest.raises(RuntimeError, match="attached already"):
        rlalign.attach(url, after_generation=True)
    handle.detach()
    assert main(["attach-check", url, "--model", str(untied)]) == 1
    assert "does not compute with the trainer's" in capsys.readouterr().err
    handle = rlalign.attach(url, after_generation=True)
    handle.publish(perturbed(untied, seed=21, size=0.0).named_parameters(), 6)
    handle.detach()
    assert main(["attach-check", url, "--model", str(untied)]) == 0
    printed = capsys.readouterr().out
    assert "cached  float32  float32" in printed and "are what 1 ranks compute with" in printed
