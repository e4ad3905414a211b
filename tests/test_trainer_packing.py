"""Micro-batches of the trainer: who goes where, and packed rows that are as good as each sequence alone."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rlalign.config import load
from rlalign.head import widened
from rlalign.trainer import attention, packing
from rlalign.trainer.packing import pack, plan
from rlalign.types import LogprobSpec, Rollout, collate

LENGTHS = (7, 7, 9, 1, 4, 4, 4, 12)
SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES = {
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "llama": {"num_key_value_heads": 4},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 5},  # shorter than most sequences
    "qwen3_moe": {
        "num_key_value_heads": 2, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    },
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32},
}  # fmt: skip
ROPE = {"rope_theta": 10000.0}


def model(family: str, *, dtype: torch.dtype = torch.float64, **more: object) -> torch.nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(SMALL | FAMILIES.get(family, {}) | more))
    network = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    network.set_experts_implementation("eager")  # the others know no float64
    attention.install(network)
    return network


def batch_of(lengths):
    generator = torch.Generator().manual_seed(1)
    rollouts = [
        Rollout(
            token_ids=torch.randint(3, 60, (n,), generator=generator).tolist(),
            loss_mask=[False] + [True] * (n - 1),
            rollout_logprobs=[0.0] * n,
            prompt_id=i,
            group_id=i,
            finish_reason="stop",
            version_spans=[(1, n, 0)] if n > 1 else [],
        )
        for i, n in enumerate(lengths)
    ]
    return collate(rollouts, pad_token_id=0, spec=LogprobSpec())


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=40),
    st.integers(1, 4),
    st.integers(1, 9),
    st.sampled_from([0, 20, 64]),
)
@example([11, 11, 11], 2, 1, 20)  # no two fit together: the number of groups must grow by whole ranks
def test_every_sequence_goes_through_one_rank_once(lengths, ranks, rows, tokens):
    lengths = lengths * ranks
    plans = [plan(lengths, rank=r, ranks=ranks, rows=rows, tokens=tokens) for r in range(ranks)]
    assert len({len(micro_batches) for micro_batches in plans}) == 1
    groups = [micro.index_b.tolist() for micro_batches in plans for micro in micro_batches]
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    for micro in (micro for micro_batches in plans for micro in micro_batches):
        of_group = [lengths[row] for row in micro.index_b]
        assert micro.length == of_group[0] and of_group == sorted(of_group, reverse=True)
        assert len(of_group) == 1 or (sum(of_group) <= tokens if tokens else len(of_group) <= rows)
    if tokens:  # Graham's bound for any list order; the longest first can only be better
        used = [sum(lengths[row] for row in group) for group in groups]
        assert max(used) <= sum(lengths) / len(used) + max(lengths)


def test_similar_lengths_share_their_padding_and_ranks_get_similar_work():
    lengths = [3, 30] * 32
    padded = [len(m.index_b) * m.length for m in plan(lengths, rank=0, ranks=1, rows=8, tokens=0)]
    assert sum(padded) == sum(lengths)
    of_ranks = [
        sum(m.length * len(m.index_b) for m in plan(lengths, rank=r, ranks=2, rows=8, tokens=0)) for r in (0, 1)
    ]
    assert of_ranks[0] == of_ranks[1]


def test_ranks_that_cannot_all_have_as_many_micro_batches_are_refused():
    with pytest.raises(ValueError, match="5 sequences cannot be divided evenly among 2 trainer ranks"):
        plan([4] * 5, rank=0, ranks=2, rows=8, tokens=64)


def test_unpack_is_the_inverse_of_pack_and_so_is_its_gradient():
    batch = batch_of(LENGTHS)
    row = pack(batch, torch.device("cpu"))
    assert row.runs == ((2, 7), (1, 9), (1, 1), (3, 4), (1, 12))
    assert torch.equal(row.unpack(row.token_ids_1T), torch.where(batch.attention_mask_BL, batch.token_ids_BL, 0))
    values = torch.randn(1, sum(LENGTHS), requires_grad=True)
    weights_BL = torch.randn(batch.token_ids_BL.shape)
    (row.unpack(values) * weights_BL).sum().backward()
    assert torch.equal(values.grad[0], weights_BL[batch.attention_mask_BL])


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_states_and_gradients_are_those_of_each_sequence_alone(family):
    network, batch = model(family), batch_of(LENGTHS)
    packing.require(network)
    row = pack(batch, torch.device("cpu"))
    given = packing.inputs(row, network.config._attn_implementation)
    weights_TD = torch.randn(sum(LENGTHS), 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def gradients(states_TD):
        network.zero_grad()
        (states_TD * weights_TD).sum().backward()
        return [p.grad.clone() for p in network.base_model.parameters() if p.grad is not None]

    packed_TD = network.base_model(**given, use_cache=False).last_hidden_state[0]
    ids = [batch.token_ids_BL[i, :n][None] for i, n in enumerate(LENGTHS)]
    alone_TD = torch.cat([network.base_model(input_ids=i, use_cache=False).last_hidden_state[0] for i in ids])
    torch.testing.assert_close(packed_TD, alone_TD, rtol=1e-11, atol=1e-11)
    for mine, theirs in zip(gradients(packed_TD), gradients(alone_TD), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("family", "more", "reason"),
    [
        ("qwen3_next", {"head_dim": 8, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2,
                        "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_hidden_layers": 4},
         "layers of type linear_attention do not keep sequences apart"),
        ("llama", {"rope_parameters": ROPE | {"rope_type": "dynamic", "factor": 2.0}}, "of type dynamic depend on the length"),
        ("bloom", {"n_head": 4, "n_layer": 2}, "computes attention in its own way"),
    ],
)  # fmt: skip
def test_models_that_cannot_are_refused_with_the_reason(family, more, reason):
    with pytest.raises(ValueError, match=rf"trainer.pack_tokens: .* cannot train on packed rows: .*{reason}"):
        packing.require(model(family, dtype=torch.float32, **more))


def test_eager_attention_is_refused():
    network = model("llama")
    network.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="attention 'eager' cannot be told where sequences begin"):
        packing.require(network)


def test_a_model_that_ignores_where_sequences_begin_is_found_out():
    network = model("qwen3", dtype=torch.float32)

    def body(inputs, *, deaf=False):
        heard = {name: value for name, value in inputs.items() if not (deaf and name == "runs")}
        return network.base_model(**heard, use_cache=False).last_hidden_state

    packing.confirm(network, body, torch.device("cpu"))
    with pytest.raises(ValueError, match="measured: packed states are off by"):
        packing.confirm(network, lambda inputs: body(inputs, deaf=True), torch.device("cpu"))


@pytest.mark.parametrize("masked", [False, True])
def test_short_sequences_keep_their_forward_bits_and_get_a_better_gradient(masked):
    """On CPU torch's own bf16 gradient of short sequences takes ten times as long as one through float32."""
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    generator = torch.Generator().manual_seed(0)
    query, key, value, above = (torch.randn(3, heads, 17, 16, generator=generator).bfloat16() for heads in (4, 2, 2, 4))
    mask = (torch.ones(17, 17).tril() * (torch.arange(17) < 11)).bool().expand(3, 1, 17, 17) if masked else None

    def run(attend, dtype):
        given = [x.to(dtype).requires_grad_() for x in (query, key, value)]
        found, _ = attend(module, *given, mask, scaling=0.25)
        return found, torch.cat(
            [g.double().flatten() for g in torch.autograd.grad(found, given, above.transpose(1, 2).to(dtype))]
        )

    (ours, our_gradient), (own, own_gradient) = (
        run(attention.sdpa, torch.bfloat16),
        run(sdpa_attention_forward, torch.bfloat16),
    )
    exact = run(sdpa_attention_forward, torch.float64)[1]
    assert torch.equal(ours, own)
    ours_off, own_off = (our_gradient - exact).norm(), (own_gradient - exact).norm()
    if widened.is_widened(torch.bfloat16):  # then torch's own is computed in float32 too
        assert ours_off <= own_off * (1 + 1e-3)
    else:
        assert ours_off < own_off
    assert own_off < 0.01 * exact.norm()


def test_a_budget_that_one_sequence_may_break_is_refused():
    run = {"model": {"path": "x"}, "task": {"name": "x"}, "rollout": {"max_model_len": 512, "max_tokens": 99}}
    with pytest.raises(
        ValueError, match="trainer.pack_tokens=256 is less than one sequence may have .*max_model_len=512"
    ):
        load(run | {"trainer": {"pack_tokens": 256}})
    assert load(run | {"trainer": {"pack_tokens": 512}}).trainer.pack_tokens == 512
