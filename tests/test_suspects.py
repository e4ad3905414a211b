"""Ranking causes: the same cause once, the strongest evidence first, and what an attribution's points mean."""

from types import SimpleNamespace

import pytest
import torch

from rlalign.diagnose import suspects
from rlalign.diagnose.both_sides import head_logprobs, head_put_back
from rlalign.diagnose.suspects import Case, experiments, merged, report
from rlalign.mismatch.causes import Cause
from rlalign.trainer.head_mirror import mirror
from rlalign.types import LogprobSpec, Rollout, collate


def test_a_cause_found_twice_is_listed_once_with_both_reasons():
    causes = [Cause("a", "weak", "x", 0.3), Cause("b", "some", "y", 0.6), Cause("a", "strong", "z", 0.9)]
    first, second = merged(causes)
    assert first == Cause("a", "strong; weak", "z", 0.9) and second.name == "b"
    assert merged([causes[0], causes[0]])[0].why == "weak"


def test_a_report_is_numbered_and_says_what_to_run():
    assert report([Cause("a", "why", "run this", 0.9)]) == "1. a (0.90): why\n   confirm: run this"


def attribution(*points):
    found = [SimpleNamespace(point=p, kind=p.split(".")[-1], layer=n, excess=x, over_floor=x > 3) for p, n, x in points]
    return SimpleNamespace(routes={"prefill": SimpleNamespace(route="prefill", points=found)})


def test_the_first_step_over_its_floor_leads():
    causes = suspects.of_attribution(
        attribution(("layers.1.q", 1, 0.5), ("layers.1.mlp_norm", 1, 40.0), ("layers.2.gate", 2, 9e5), ("layers.3.up", 3, 9.0))
    )  # fmt: skip
    assert [(c.name, c.score) for c in causes] == [
        ("norm epsilon", suspects.FIRST),
        ("stale weights", suspects.FURTHER),
    ]
    assert "layers.1.mlp_norm is the first" in causes[0].why
    assert "in layer(s) 2, 3" in causes[1].why and "layers.2.gate, 9e+05 times" in causes[1].why


def test_steps_within_their_floor_are_no_cause():
    assert suspects.of_attribution(attribution(("layers.1.q", 1, 2.9))) == []


@pytest.mark.parametrize(
    "names, text",
    [
        (["lm_head.weight"], "lm_head.weight"),
        ([f"model.layers.{i}.mlp.up_proj.weight" for i in range(12)], "layer(s) 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11"),
        (["model.norm.weight", *(f"model.layers.{i}.x" for i in (10, 2, 2, 3))], "layer(s) 2, 3, 10; model.norm.weight"),
    ],
)  # fmt: skip
def test_many_weights_are_summed_up_by_layer(names, text):
    assert experiments._summary(names) == text


def test_frequencies_may_be_rounded_and_epsilons_may_not():
    exact = [10_000.0 ** (-j / 16) for j in range(16)]
    rounded = [f * (1 + 0.004 * (-1) ** j) for j, f in enumerate(exact)]
    other = [500_000.0 ** (-j / 16) for j in range(16)]
    assert (
        experiments._same(exact, rounded)
        and not experiments._same(exact, other)
        and not experiments._same(exact, exact[:8])
    )
    assert experiments._same([1e-6], [1e-6]) and not experiments._same([1e-6], [1e-5])
    assert experiments._theta(other) == "theta 5e+05"


@pytest.fixture(scope="module")
def sides():
    """A tiny trainer's model and a batch with padding, without an engine: only the trainer's calling is looked at."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, head_dim=16,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3, tie_word_embeddings=False,
    )  # fmt: skip
    network = Qwen3ForCausalLM(config).bfloat16().eval()
    generator = torch.Generator().manual_seed(1)
    rollouts = [
        Rollout(
            token_ids=torch.randint(3, 60, (n,), generator=generator).tolist(),
            loss_mask=[False] * 4 + [True] * (n - 4),
            rollout_logprobs=[0.0] * 4 + [-1.0] * (n - 4),
            prompt_id=0,
            group_id=0,
            finish_reason="stop",
            version_spans=[(4, n, 0)],
        )
        for n in (9, 20, 14)
    ]
    return network, rollouts


def called(sides, score, *, temperature=0.7):
    network, rollouts = sides
    spec = LogprobSpec(temperature=temperature)
    batch = collate(rollouts, pad_token_id=0, spec=spec)
    return experiments.of_calls(Case(engine=SimpleNamespace(spec=spec), network=network, batch=batch, score=score))


def scorer(sides, *, temperature=0.7, head="float32", **options):
    def score(batch):
        network = sides[0]
        with torch.no_grad():
            body = network.base_model(batch.token_ids_BL, **{"attention_mask": batch.attention_mask_BL} | options)
        with head_put_back(network):
            return head_logprobs(network, body.last_hidden_state, batch, head, temperature=temperature)

    return score


def test_a_trainer_in_good_order_is_not_blamed(sides):
    assert called(sides, scorer(sides)) == []
    in_parts = scorer(sides)
    assert called(sides, lambda b: torch.cat([in_parts(b.rows(slice(i, i + 1))) for i in range(len(b))])) == []


@pytest.mark.parametrize("scored, said", [(1.0, "temperature 1 "), (0.7**2, "temperature 0.49 ")])
def test_a_trainer_at_another_temperature(sides, scored, said):
    (cause,) = called(sides, scorer(sides, temperature=scored))
    assert cause.name == "temperature" and said in cause.why


def test_a_trainer_with_another_head(sides):
    (cause,) = called(sides, scorer(sides, head="model"))
    assert cause.name == "one-sided head" and "those of a model head" in cause.why


def test_a_trainer_that_passes_other_positions(sides):
    positions = torch.arange(20) + 9 * (torch.arange(20) >= 4)

    def score(batch):
        return scorer(sides, position_ids=positions[None, : batch.token_ids_BL.shape[1]])(batch)

    assert called(sides, score)[0].name == "position ids"


def test_a_trainer_that_attends_to_padding(sides):
    def score(batch):
        length = batch.token_ids_BL.shape[1]
        shift_B = (length - batch.attention_mask_BL.sum(1)).tolist()
        turned = torch.stack([ids.roll(n) for ids, n in zip(batch.token_ids_BL, shift_B, strict=True)])
        with torch.no_grad():
            hidden = sides[0].base_model(turned).last_hidden_state
        back = torch.stack([h.roll(-n, 0) for h, n in zip(hidden, shift_B, strict=True)])
        with head_put_back(sides[0]):
            return head_logprobs(sides[0], back, batch, "float32", temperature=0.7)

    first, _ = called(sides, score)
    assert (
        first.name == "attention mask" and "2 of 3 sequences are wrong, of those of the full length 20 0" in first.why
    )


def test_the_head_is_put_back(sides):
    network = sides[0]
    lm_head, hidden = network.get_output_embeddings(), torch.randn(2, 32).bfloat16()
    plain = lm_head(hidden)
    with head_put_back(network):
        mirror(network, head_dtype="float32", chunk=0)
        assert lm_head(hidden).dtype == torch.float32
    assert torch.equal(lm_head(hidden), plain) and "forward" not in lm_head.__dict__


def test_adapters_are_a_cause_only_where_nothing_merged_is_published():
    network = torch.nn.Module()
    network.lora_A = torch.nn.Linear(2, 2)
    case = SimpleNamespace(network=network, weights=None)
    (cause,) = experiments._adapters(case)
    assert cause.name == "LoRA not applied" and "2 adapter weights" in cause.why
    assert not list(experiments._adapters(SimpleNamespace(network=network, weights=lambda: [])))
