"""Weights into the real engine: what was published is what it computes with, and every failure is noticed and survivable."""

from pathlib import Path

import pytest
import torch

from rlalign.weights import publish
from rlalign.weights.file_transport import FileTransport
from tests import routes_run
from tests.engine.conftest import ROLLOUT, logprobs_of, perturbed, sample, start, worker_of

KINDS = [
    ("tied", "bfloat16", "float32"),
    ("tied", "bfloat16", "model"),
    *(
        pytest.param(kind, marks=pytest.mark.nightly)
        for kind in [("untied", "bfloat16", "float32"), ("tied", "float32", "float32")]
    ),
]


@pytest.fixture(params=KINDS, ids=lambda kind: "-".join(kind))
def kind(request):
    tie, dtype, head_dtype = request.param
    return request.getfixturevalue(tie), dtype, head_dtype


def multiplies_by_a_copy(lm_head) -> bool:
    """Whether vLLM packs its head on this host: its product then does not notice that the parameter was written to."""
    one_hot = torch.eye(lm_head.weight.shape[1], dtype=lm_head.weight.dtype)[:4]
    before, kept = lm_head.quant_method.apply(lm_head, one_hot), lm_head.weight.detach().clone()
    lm_head.weight.data.add_(1.0)
    after = lm_head.quant_method.apply(lm_head, one_hot)
    lm_head.weight.data.copy_(kept)
    packed = torch.equal(before, after)
    if lm_head.weight.dtype == torch.bfloat16:
        routes_run.took(routes_run.VLLM_HEAD, "packed" if packed else "read where it lies")
    return packed


def test_after_two_publishes_the_engine_equals_a_fresh_one_exactly(kind, tmp_path):
    """A tied head is repaired once a publish where this host makes vLLM multiply by a packed copy of it, and nowhere else."""
    folder, dtype, head_dtype = kind
    engine = start(folder, dtype=dtype, head_dtype=head_dtype)
    tied = folder.name.startswith("tied")
    with torch.inference_mode():
        packed = tied and multiplies_by_a_copy(worker_of(engine._llm).get_model().lm_head)
    before = logprobs_of(sample(engine))
    for version in (1, 2):
        model = perturbed(folder, seed=version, dtype=getattr(torch, dtype))
        report = publish(model.named_parameters(), version, receiver=engine, shared=tmp_path)
        assert report.tensors == len(list(model.named_parameters()))
        assert report.repaired == packed
    after = sample(engine)
    engine.close()
    assert {span for r in after for span in r.version_spans} == {(r.prompt_length, len(r.token_ids), 2) for r in after}

    model.save_pretrained(tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "checkpoint" / "tokenizer_config.json").write_bytes((folder / "tokenizer_config.json").read_bytes())
    fresh = start(tmp_path / "checkpoint", dtype=dtype, head_dtype=head_dtype)
    assert [r.token_ids for r in sample(fresh)] == [r.token_ids for r in after]
    assert logprobs_of(sample(fresh)) == logprobs_of(after)
    assert logprobs_of(after) != before
    fresh.close()


def test_vllm_leaves_a_packed_tied_head_stale_and_publish_repairs_it(tied, tmp_path):
    """vLLM 0.32 on CPU: `reload_weights` re-packs embed_tokens only, and a packed lm_head keeps multiplying by the old weight.

    Where vLLM packs nothing (no instructions for bf16), the head reads the parameter, and there is nothing to repair.
    """
    from rlalign.rollout.worker import readback

    engine = start(tied, head_dtype="model")
    worker = engine._llm.llm_engine.model_executor.driver_worker.worker
    model = perturbed(tied, seed=1)
    lm_head = worker.get_model().lm_head
    with torch.inference_mode():
        packed = multiplies_by_a_copy(lm_head)
    worker.reload_weights(weights_iterator=iter([(n, p.data) for n, p in model.named_parameters()]))
    assert torch.equal(lm_head.weight[:288], model.lm_head.weight), "the parameter itself was updated"
    assert readback.head_is_stale(lm_head, offset=0) == packed, "vLLM now refreshes a packed head: the repair can go"
    stale = logprobs_of(sample(engine))

    report = publish(model.named_parameters(), 1, receiver=engine, shared=tmp_path)
    assert report.repaired == packed and not readback.head_is_stale(lm_head, offset=0)
    repaired = sample(engine)
    scored = engine.score([r.token_ids for r in repaired])
    agrees(model, repaired, within=0.05)
    assert len(scored) == len(repaired) and (stale != logprobs_of(repaired)) == packed
    engine.close()


def scores_of(model, rollouts):
    for rollout in rollouts:
        logits = model(torch.tensor([rollout.token_ids])).logits[0].float().log_softmax(-1)
        yield [0.0] + [float(logits[t - 1, token]) for t, token in enumerate(rollout.token_ids) if t]


@pytest.fixture(scope="module")
def engine(untied):
    engine = start(untied)
    yield engine
    engine.close()


def test_a_weight_that_did_not_land_is_named_and_the_engine_recovers(engine, untied, tmp_path, monkeypatch):
    """One layer keeps its old weight: only reading back through the kernel can see it, since the parameter is packed away."""
    stale = "model.layers.1.mlp.up_proj.weight"
    old = dict(perturbed(untied, seed=0, size=0.0).named_parameters())[stale].data
    vllm_model = worker_of(engine._llm).get_model()
    load_weights = type(vllm_model).load_weights

    def forgetful(self, weights):
        return load_weights(self, ((n, old if n == stale else t) for n, t in weights))

    model = perturbed(untied, seed=1)
    with monkeypatch.context() as patch:
        patch.setattr(type(vllm_model), "load_weights", forgetful)
        with pytest.raises(RuntimeError, match=f"rank 0: {stale}: the engine computes with something else"):
            publish(model.named_parameters(), 1, receiver=engine, shared=tmp_path)
    with pytest.raises(RuntimeError, match="refuses to run: publishing policy version 1 failed"):
        sample(engine)
    assert engine.policy_version == 0
    publish(model.named_parameters(), 1, receiver=engine, shared=tmp_path)
    assert sample(engine)[0].policy_version == 1


def small_buckets(folder: Path) -> FileTransport:
    """Every fused projection is torn over several of these."""
    return FileTransport(folder, bucket_bytes=2**13)


@pytest.mark.parametrize("dies_at", [1, 3, 8])
def test_a_load_that_dies_in_the_middle_leaves_a_known_state(engine, untied, tmp_path, monkeypatch, dies_at):
    """Also between the parts of a fused projection, where vLLM keeps the first part: the next update must not count it."""
    vllm_model, seen = worker_of(engine._llm).get_model(), []
    load_weights = type(vllm_model).load_weights

    def dying(self, weights):
        for name, tensor in weights:
            if len(seen) == dies_at:
                raise OSError("shared memory went away")
            seen.append(name)
            load_weights(self, [(name, tensor)])

    model = perturbed(untied, seed=2 + dies_at)
    with monkeypatch.context() as patch:
        patch.setattr(type(vllm_model), "load_weights", dying)
        with pytest.raises(RuntimeError, match="rank 0: OSError on .*: shared memory went away"):
            publish(model.named_parameters(), 2, receiver=engine, transport=small_buckets(tmp_path))
    with pytest.raises(RuntimeError, match="refuses to run: publishing policy version 2 failed"):
        sample(engine)
    assert list(tmp_path.iterdir()) == []
    assert not any(p.is_meta for p in vllm_model.parameters()), "a stray request would kill the engine"

    with pytest.raises(RuntimeError, match="not published, and this worker's own is not to be trusted"):
        publish([("lm_head.weight", model.lm_head.weight)], 2, receiver=engine, shared=tmp_path)
    report = publish(model.named_parameters(), 2, receiver=engine, transport=small_buckets(tmp_path))
    assert report.buckets > 15 and report.tensors == 25
    agrees(model, sample(engine), within=0.1)


def test_an_update_that_nobody_ended_is_ended_by_the_next(engine, untied, tmp_path, monkeypatch):
    """The trainer was interrupted between two buckets, in the middle of a fused projection, and could not say so."""
    ask, taken = engine.ask, []

    def interrupted(method, *args):
        taken.append(method)
        if taken.count("rlalign_take") == 3:
            raise KeyboardInterrupt
        return ask(method, *args)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "ask", interrupted)
        with pytest.raises(KeyboardInterrupt):
            publish(perturbed(untied, seed=8).named_parameters(), 2, receiver=engine, transport=small_buckets(tmp_path))
    assert taken[-1] == "rlalign_take"
    with pytest.raises(RuntimeError, match="publishing policy version 2 did not finish"):
        sample(engine)
    model = perturbed(untied, seed=9)
    publish(model.named_parameters(), 2, receiver=engine, transport=small_buckets(tmp_path))
    agrees(model, sample(engine), within=0.1)


def agrees(model, rollouts, *, within):
    with torch.no_grad():
        for rollout, scores in zip(rollouts, scores_of(model, rollouts), strict=True):
            found = zip(rollout.rollout_logprobs, scores, rollout.loss_mask, strict=True)
            assert max(abs(a - b) for a, b, m in found if m) < within


def test_an_unknown_weight_is_refused(engine, untied, tmp_path):
    model = perturbed(untied, seed=3)
    weights = [*model.named_parameters(), ("model.layers.0.adapter.weight", torch.ones(2, 2))]
    with pytest.raises(Exception, match="adapter"):
        publish(weights, 3, receiver=engine, shared=tmp_path)
    publish(model.named_parameters(), 3, receiver=engine, shared=tmp_path)


def test_a_partial_publish_updates_only_what_it_names(engine, untied, tmp_path):
    publish(perturbed(untied, seed=4).named_parameters(), 4, receiver=engine, shared=tmp_path)
    model = perturbed(untied, seed=4)
    model.lm_head.weight.data.mul_(1.5)
    report = publish([("lm_head.weight", model.lm_head.weight)], 5, receiver=engine, shared=tmp_path)
    assert report.tensors == 1
    agrees(model, sample(engine), within=0.15)


def test_the_prefix_cache_does_not_survive_a_publish(untied, tmp_path):
    from dataclasses import replace

    prompt = [1, *range(10, 160)]

    def first_logprob(engine):
        return engine.generate([prompt], prompt_ids=[0], samples=2, seed=0)[0].rollout_logprobs

    engine = start(untied, rollout=replace(ROLLOUT, prefix_caching=True))
    first_logprob(engine)  # fills the cache with the old weights
    model = perturbed(untied, seed=6)
    publish(model.named_parameters(), 1, receiver=engine, shared=tmp_path)
    cached = first_logprob(engine)
    engine.close()
    plain = start(untied, rollout=replace(ROLLOUT, prefix_caching=False))
    publish(model.named_parameters(), 1, receiver=plain, shared=tmp_path)
    assert first_logprob(plain) == cached
    plain.close()
