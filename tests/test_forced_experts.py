"""Forced experts: the gate's own weights on the engine's set, gradients included; what is not covered is an error or is counted."""

from __future__ import annotations

from array import array
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rlalign.config import TrainerConfig, compose, load
from rlalign.diagnose.families.family_table import RECIPES
from rlalign.diagnose.replay import _Trainer
from rlalign.ragged import Routes
from rlalign.rollout.worker.expert_routes import Kept
from rlalign.tracking.token_files import SavedStep
from rlalign.trainer.forced_experts import ForcedExperts, routers
from rlalign.trainer.passes import Passes
from rlalign.types import LogprobSpec, Rollout, collate

MIXTURES = ["qwen3-moe", "mixtral", "deepseek-v3", "gpt-oss"]


def network_of(family, dtype=torch.float64):
    config = AutoConfig.for_model(RECIPES[family].model_type, **RECIPES[family].arguments())
    torch.manual_seed(0)
    found = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager").eval()
    found.set_experts_implementation("eager")  # the grouped product knows no float64
    for router in routers(found).values():
        torch.nn.init.normal_(router.weight)
    return found


def batch_of(experts_of, layers, lengths=(9, 6), known=None):
    """Random sequences; experts_of: (positions) -> [positions, layers, K]."""
    torch.manual_seed(1)
    rollouts = []
    for length in lengths:
        routes = experts_of(length - 1)[: length - 1 if known is None else known]
        rollouts.append(
            Rollout(
                token_ids=torch.randint(3, 280, (length,)).tolist(), loss_mask=[False] * 3 + [True] * (length - 3),
                rollout_logprobs=[0.0] * length, prompt_id=0, group_id=0, finish_reason="stop", version_spans=[(3, length, 0)],
                experts=array("B", routes.flatten().tolist()), experts_shape=(layers, routes.shape[2]),
            )
        )  # fmt: skip
    return collate(rollouts, pad_token_id=0, spec=LogprobSpec())


def random_experts(layers, k=2, experts=4):
    generator = torch.Generator().manual_seed(2)

    def of(positions):
        return torch.rand(positions, layers, experts, generator=generator).argsort(-1)[..., :k]

    return of


def taken_by(network, forced, batch):
    """[layers] of [B, L, K]: what each layer's experts were handed."""
    seen = []
    handles = [
        m.register_forward_pre_hook(lambda _, args, kwargs: seen.append((*args, *kwargs.values())[1]), with_kwargs=True)
        for name, m in network.named_modules()
        if name.endswith(".experts")
    ]
    with forced.of(batch, None), torch.no_grad():
        network(batch.token_ids_BL, attention_mask=batch.attention_mask_BL)
    for handle in handles:
        handle.remove()
    return [given.view(*batch.token_ids_BL.shape, -1) for given in seen]


@pytest.mark.parametrize("family", MIXTURES)
def test_every_known_position_goes_to_the_experts_of_its_route_in_every_layer(family):
    network = network_of(family)
    forced = ForcedExperts(network)
    batch = batch_of(random_experts(forced.layers), forced.layers)
    forced.require(batch)
    entry_BL = batch.routes.entries(batch.token_ids_BL.shape[1])
    given = taken_by(network, forced, batch)
    assert len(given) == forced.layers > 0
    for layer, given_BLK in enumerate(given):
        assert torch.equal(
            given_BLK[entry_BL >= 0].sort().values, batch.routes.experts_ELK[:, layer].long().sort().values
        )
    counts = forced.take()
    assert counts["choices"] == len(batch.routes.experts_ELK) * forced.layers * 2 and counts["differ"] > 0
    assert 0 < counts["tokens_differ"] <= counts["tokens"] == len(batch.routes.experts_ELK)


@pytest.mark.parametrize("family", MIXTURES)
def test_a_model_forced_to_its_own_choice_is_the_model_and_agrees_with_itself(family):
    network = network_of(family)
    layers = len(routers(network))
    batch = batch_of(random_experts(layers), layers)
    own = {}
    handles = [
        router.register_forward_hook(lambda _, args, out, layer=layer: own.update({layer: out[2]}))
        for layer, router in enumerate(routers(network).values())
    ]
    with torch.no_grad():
        plain = network(batch.token_ids_BL, attention_mask=batch.attention_mask_BL).logits
    for handle in handles:
        handle.remove()
    known = batch.routes.entries(batch.token_ids_BL.shape[1]) >= 0
    own_ELK = torch.stack([own[layer].view(*known.shape, -1)[known] for layer in range(layers)], 1).to(torch.uint8)
    batch = replace(batch, routes=Routes(experts_ELK=own_ELK, count_B=batch.routes.count_B))
    forced = ForcedExperts(network)
    with forced.of(batch, None), torch.no_grad():
        again = network(batch.token_ids_BL, attention_mask=batch.attention_mask_BL).logits
    assert torch.equal(plain, again) and forced.take()["differ"] == 0


@pytest.mark.parametrize(("family", "normalised"), [("qwen3-moe", True), ("mixtral", True), ("qwen3-moe", False)])
def test_the_gates_weights_and_gradients_are_those_of_the_softmax_over_the_forced_set(family, normalised):
    """Written out in float64 and independently of the model's own router: softmax over all, gather, renormalise."""
    router = next(iter(routers(network_of(family)).values()))
    router.norm_topk_prob = normalised
    holder = torch.nn.ModuleDict({"gate": router})
    forced = ForcedExperts(holder)
    experts_TK = torch.tensor([[3, 0], [1, 2], [0, 1], [2, 3]])
    batch = batch_of(lambda n: experts_TK[:n, None], 1, lengths=(5,))
    hidden_TD = torch.randn(5, router.weight.shape[1], dtype=torch.float64)
    with forced.of(batch, None):
        _, weights_TK, chosen_TK = router(hidden_TD)
    assert torch.equal(chosen_TK[:4], experts_TK)
    gate_ED = router.weight.detach().clone().requires_grad_()
    logits_TE = hidden_TD @ gate_ED.T
    probs_TK = (logits_TE.exp() / logits_TE.exp().sum(1, keepdim=True)).gather(1, chosen_TK)
    wanted_TK = probs_TK / probs_TK.sum(1, keepdim=True) if normalised else probs_TK
    torch.testing.assert_close(weights_TK.double(), wanted_TK, rtol=1e-5, atol=1e-6)  # the router's softmax is float32
    slope_TK = torch.randn(wanted_TK.shape, dtype=torch.float64)
    (weights_TK.double() * slope_TK).sum().backward()
    (wanted_TK * slope_TK).sum().backward()
    torch.testing.assert_close(router.weight.grad, gate_ED.grad, rtol=1e-4, atol=1e-5)
    assert float(router.weight.grad.norm()) > 1e-3


@pytest.mark.parametrize("family", ["deepseek-v2", "deepseek-v3"])
def test_an_expert_of_a_group_that_the_gate_would_mask_keeps_its_weight_and_gradient(family):
    recipe = RECIPES[family]
    grouped = {"n_group": 2, "topk_group": 1, "n_routed_experts": 4, "num_experts_per_tok": 2}
    grouped |= {"topk_method": "group_limited_greedy"} if family == "deepseek-v2" else {}
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(recipe.model_type, **recipe.arguments() | grouped), dtype=torch.float32
    )
    router = next(iter(routers(network).values()))
    torch.nn.init.normal_(router.weight)
    hidden_TD = torch.randn(9, router.weight.shape[1])
    own_TK = router(hidden_TD)[2]
    apart_TK = torch.where(own_TK.amin(1, keepdim=True) >= 2, torch.tensor([0, 1]), torch.tensor([2, 3]))
    batch = batch_of(lambda n: apart_TK[:n, None], 1, lengths=(9,))
    with ForcedExperts(torch.nn.ModuleDict({"gate": router})).of(batch, None):
        _, weights_TK, chosen_TK = router(hidden_TD)
    assert torch.equal(chosen_TK[:8], apart_TK[:8]) and torch.equal(
        chosen_TK[8:].sort(1).values, own_TK[8:].sort(1).values
    )
    logits_TE = hidden_TD.double() @ router.weight.double().T
    scores_TE = logits_TE.softmax(1) if family == "deepseek-v2" else logits_TE.sigmoid()
    wanted_TK = scores_TE.gather(1, chosen_TK)
    wanted_TK = wanted_TK if family == "deepseek-v2" else wanted_TK / wanted_TK.sum(1, keepdim=True)
    torch.testing.assert_close(weights_TK.double(), wanted_TK * router.routed_scaling_factor, rtol=1e-4, atol=1e-7)
    weights_TK[:8, 0].sum().backward()
    assert float(router.weight.grad.norm()) > 1e-4


class Scorer(torch.nn.Module):
    """Logprobs of the tokens from a plain network, as `Passes` calls it."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, inputs, tokens, *, exact=False):
        logits = self.network(**inputs, use_cache=False).logits[:, :-1].log_softmax(-1)
        found = torch.nn.functional.pad(logits.gather(-1, tokens.ids_BL[:, 1:, None])[..., 0], (1, 0))
        return (torch.where(tokens.mask_BL, found, 0.0),)


def test_packed_rows_and_checkpoints_take_the_same_routes():
    network = network_of("qwen3-moe", torch.float32)
    forced = ForcedExperts(network)
    batch = batch_of(random_experts(forced.layers), forced.layers, lengths=(9, 6, 6))

    def scored(pack_tokens):
        passes = Passes(
            config=TrainerConfig(pack_tokens=pack_tokens, micro_batch_size=2), device=torch.device("cpu"), attention="sdpa",
            experts=forced,
        )  # fmt: skip
        return passes.share(Scorer(network), batch, columns=1, rank=0, of=1)[0]

    network.set_attn_implementation("sdpa")
    plain = scored(0)
    torch.testing.assert_close(scored(16), plain, rtol=1e-4, atol=1e-5)
    unforced = replace(batch, routes=None)
    assert not torch.allclose(plain, Passes(
        config=TrainerConfig(), device=torch.device("cpu"), attention="sdpa", experts=forced,
    ).share(Scorer(network), unforced, columns=1, rank=0, of=1)[0], atol=1e-3)  # fmt: skip

    def gradient(checkpoints):
        network.train()
        network.gradient_checkpointing_enable({"use_reentrant": False}) if checkpoints else None
        network.zero_grad()
        with forced.of(batch, None):
            logits = network(batch.token_ids_BL, attention_mask=batch.attention_mask_BL, use_cache=False).logits
            logits.log_softmax(-1)[batch.loss_mask_BL].square().mean().backward()
        return [router.weight.grad.clone() for router in routers(network).values()]

    for kept, again in zip(gradient(False), gradient(True), strict=True):
        torch.testing.assert_close(again, kept, rtol=1e-5, atol=1e-7)
        assert float(kept.norm()) > 0


def test_a_token_without_a_route_is_an_error_or_the_trainers_own_choice():
    network = network_of("qwen3-moe")
    layers = len(routers(network))
    batch = batch_of(random_experts(layers), layers, known=4)
    with pytest.raises(
        RuntimeError, match=r"2 of 2 rollouts lack the experts.*sequence 0 lacks 4 of them.*replay_experts=known"
    ):
        ForcedExperts(network).require(batch)
    with pytest.raises(RuntimeError, match="2 of 2 rollouts lack"):
        ForcedExperts(network).require(replace(batch, routes=None))
    network = network_of("qwen3-moe")
    forced = ForcedExperts(network, known=True)
    forced.require(batch)
    assert batch.routes.missing(batch.loss_mask_BL).tolist() == [4, 1]
    plain = taken_by(network, forced, replace(batch, routes=None))
    for given, own in zip(
        taken_by(network, forced, batch)[:1], plain, strict=False
    ):  # later layers see what the first one did
        assert torch.equal(given[:, 4:], own[:, 4:])


def test_routes_of_another_model_or_sequence_are_refused():
    network = network_of("qwen3-moe")
    with pytest.raises(ValueError, match=r"routes to expert [4-7], the trainer has 4 in a layer"):
        ForcedExperts(network).require(batch_of(random_experts(2, experts=8), 2))
    network = network_of("qwen3-moe")
    with pytest.raises(ValueError, match="routes of 3 layers with 2 experts of a token, the trainer has 2 routers"):
        ForcedExperts(network).require(batch_of(random_experts(3), 3))
    with pytest.raises(ValueError, match="no whole positions of 2 layers with 2 experts"):
        batch_of(lambda n: torch.zeros(n, 1, 2, dtype=torch.int64), 2, lengths=(6,))
    with pytest.raises(ValueError, match="no router that transformers calls TopKRouter"):
        ForcedExperts(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="different models"):
        Routes.of([(array("B", [0] * 4), (2, 2)), (array("B", [0] * 3), (3, 1))])


def test_what_a_worker_keeps_grows_and_has_no_gaps():
    kept, routes = Kept(torch.zeros(0, 2, 1, dtype=torch.uint8)), torch.arange(24, dtype=torch.uint8).view(12, 2, 1)
    kept.put(torch.tensor([4, 5]), routes[4:6], 0)
    assert kept.known() == 0  # positions before them are still to come, as from a prefix cache
    kept.put(torch.tensor([0, 1, 2]), routes[:3], torch.tensor([7, 7, 8], dtype=torch.int32))
    assert kept.known() == 3
    kept.put(torch.arange(3, 12), routes[3:], 8)
    assert kept.known() == 12 and torch.equal(kept.routes[:12], routes)
    assert kept.version_N[:12].tolist() == [7, 7, *[8] * 10]


def test_routes_are_ragged_and_rows_keep_theirs():
    batch = batch_of(random_experts(2), 2, lengths=(9, 6, 4))
    assert batch.routes.experts_ELK.dtype == torch.uint8 and batch.routes.experts_ELK[:1].nbytes == 4
    part = batch.rows(torch.tensor([2, 0]), 9).routes
    assert part.count_B.tolist() == [3, 8]
    start = batch.routes.experts_ELK
    assert torch.equal(part.experts_ELK, torch.cat([start[13:16], start[:8]]))
    wide = Routes.of([(array("H", [300, 1]), (1, 2)), (array("B", [2, 3]), (1, 2)), (array("B"), (0, 0))])
    assert wide.experts_ELK.tolist() == [[[300, 1]], [[2, 3]]] and wide.count_B.tolist() == [1, 1, 0]


def test_a_replayed_step_takes_its_routes(tmp_path):
    network = network_of("qwen3-moe", torch.float32)
    network.save_pretrained(tmp_path / "model")
    forced = ForcedExperts(network)
    batch = batch_of(random_experts(forced.layers), forced.layers)
    with forced.of(batch, None), torch.no_grad():
        logits = network(batch.token_ids_BL, attention_mask=batch.attention_mask_BL).logits[:, :-1].log_softmax(-1)
    wanted = torch.nn.functional.pad(logits.gather(-1, batch.token_ids_BL[:, 1:, None])[..., 0], (1, 0))
    saved = SavedStep(
        step=0,
        version=0,
        trainer_ranks=1,
        model=tmp_path / "model",
        batch=batch,
        old_logprobs_BL=wanted,
        master_VD=None,
    )

    def again(replayed):
        options = [f"model.path={tmp_path / 'model'}", "model.dtype=float32", f"rollout.replay_experts={replayed}"]
        trainer = _Trainer.of(saved, load(compose("demo", options)))
        return (trainer.score(batch, trainer_ranks=1) - wanted)[batch.loss_mask_BL].abs().max()

    assert again("all") < 1e-4 and again("off") > 1e-2
