"""LoRA in real DeepSpeed against peft's own loop and merge, and in a run: the engine gets merged weights and the reward rises."""

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from rlalign.config import LoraConfig, TrainerConfig, compose, load
from rlalign.diagnose.replay import replay
from rlalign.run.train import train as run_training
from rlalign.trainer.lora import Adapters
from tests.engine.test_train import rows_of
from tests.engine.updates import LR, STEPS, make_advantages, make_batch, start_policy, train

LORA = LoraConfig(rank=4, alpha=16.0)


def trainer(zero_stage: int = 1, lora: LoraConfig = LORA, **changes) -> TrainerConfig:
    return TrainerConfig(zero_stage=zero_stage, micro_batch_size=5, lora=lora, **changes)


@pytest.fixture(scope="module")
def plain(untied):
    """peft and torch alone: gradient norms, and the merged weights after the steps."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(untied, dtype=torch.float32)
    settings = peft.LoraConfig(r=LORA.rank, lora_alpha=LORA.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(0)
    network, batch = peft.get_peft_model(base, settings), make_batch()
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    mask, norms = batch.loss_mask_BL[:, 1:], []
    for _ in range(STEPS):
        logits = network(batch.token_ids_BL, attention_mask=batch.attention_mask_BL).logits.double().log_softmax(-1)
        new = logits[:, :-1].gather(-1, batch.token_ids_BL[:, 1:, None])[..., 0]
        ratio = (new - new.detach()).exp()
        optimizer.zero_grad()
        (-(ratio * make_advantages(batch)[:, 1:].double())[mask].sum() / mask.sum()).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, 1.0)))
        optimizer.step()
    return norms, network.merge_and_unload().state_dict()


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_float32_updates_and_merged_weights_equal_pefts(untied, plain, zero_stage):
    policy = start_policy(untied, trainer(zero_stage), dtype="float32")
    found = train(policy)
    merged = dict(policy.named_weights())
    policy.close()
    norms, expected = plain
    if zero_stage:
        assert found["norms"] == pytest.approx(norms, rel=1e-4)
    assert merged.keys() == expected.keys()
    start = AutoModelForCausalLM.from_pretrained(untied, dtype=torch.float32).state_dict()
    moved = [name for name in merged if not torch.equal(merged[name], start[name])]
    assert moved == [n for n in merged if "_proj" in n], "every projection of the body, and nothing else"
    for name in moved:
        step = float((expected[name] - start[name]).abs().mean())
        assert float((merged[name] - expected[name]).abs().mean()) < 2e-3 * step, name


@pytest.mark.parametrize(("dtype", "zero_stage"), [("float32", 1), ("bfloat16", 3)])
def test_what_is_saved_is_what_peft_makes_of_base_and_adapter(untied, tmp_path, dtype, zero_stage):
    policy = start_policy(untied, trainer(zero_stage), dtype=dtype, kl_coef=0.1)
    first = policy.score_reference(make_batch())
    scored = train(policy, kl_coef=0.1)
    assert torch.equal(scored["logprobs"], first), "an adapter starts as nothing"
    before = policy.score(make_batch())[0]
    published = {n: w.clone() for n, w in policy.named_weights()}
    policy.save(tmp_path)
    assert torch.equal(policy.score(make_batch())[0], before), "merging changes nothing in the trainer"
    assert torch.equal(policy.score_reference(make_batch()), first), (
        "the reference is the base, whatever the adapters are"
    )
    assert not torch.equal(before, first)
    policy.close()
    kind = getattr(torch, dtype)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=kind).state_dict()
    base = AutoModelForCausalLM.from_pretrained(untied, dtype=kind)
    wide = peft.PeftModel.from_pretrained(base.double(), tmp_path / "adapter").double().merge_and_unload().state_dict()
    for name, weight in saved.items():
        assert torch.equal(weight, published[name]), name
        assert torch.equal(weight, wide[name].to(kind)) or dtype == "float32", f"{name}: rounded once"
        assert float((weight.double() - wide[name]).abs().max()) <= 1e-6 + 2**-8 * float(wide[name].abs().max()) * (
            dtype != "float32"
        )


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_a_checkpoint_brings_adapters_and_optimizer_back(untied, tmp_path, zero_stage):
    one = start_policy(untied, trainer(zero_stage), dtype="bfloat16")
    train(one)
    one.save_state(tmp_path)
    size = sum(file.stat().st_size for file in tmp_path.rglob("*.pt"))
    assert size < 0.8 * (untied / "model.safetensors").stat().st_size, "adapters and their optimizer, not the base"
    again = start_policy(untied, trainer(zero_stage), dtype="bfloat16")
    again.load_state(tmp_path)
    batch = make_batch()
    assert again.version == STEPS and torch.equal(again.score(batch)[0], one.score(batch)[0])
    one.version = again.version = 0
    continued = [train(policy) for policy in (one, again)]
    assert continued[0]["norms"] == continued[1]["norms"] and torch.equal(continued[0]["moved"], continued[1]["moved"])
    one.close()
    again.close()


def test_adapters_start_from_the_seed_alone(untied):
    found = []
    for drawn in (1, 2):
        torch.manual_seed(drawn)
        network = AutoModelForCausalLM.from_pretrained(untied)
        Adapters(network, LORA, model=untied, seed=7)
        found.append([p for name, p in network.named_parameters() if ".lora_A." in name])
    assert len(found[0]) == 14 and all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["lm_head"], "lm_head is the lm_head, whose product is not its own here"),
        (["embed_tokens"], "model.embed_tokens is no linear layer"),
        (["wq"], "Target modules .*wq.* not found"),
    ],
)
def test_targets_that_cannot_be_are_refused(untied, targets, message):
    with pytest.raises(ValueError, match=message):
        start_policy(untied, trainer(lora=LoraConfig(rank=4, targets=targets)), dtype="float32")


def test_a_run_learns_publishes_merged_weights_and_replays(tmp_path):
    """The demo's policy and task, ten steps."""
    run = tmp_path / "run"
    options = [
        "trainer.lora.rank=16",
        "algo.lr=2e-3",
        "mismatch.k3_limit=0.01",
        "tracking.replay_every=9",
        "tracking=off",
    ]
    summary = run_training(load(compose("demo", [*options, f"output_dir={run}", "steps=10"])))
    assert summary["eval_last"] > summary["eval_first"] + 0.1
    rows = rows_of(run)
    assert max(row["mismatch/lag0/k3"] for row in rows) < 2e-3, "the merged weight is rounded, the trainer's sum is not"
    found = replay(run, 9)
    assert [answer.verdict for answer in found.answers] == ["bit for bit", "bit for bit"]
