"""The mirrored head under FSDP2, in 16-bit bodies and behind torch.compile: two gloo ranks against one model in float64."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from transformers import Qwen3Config, Qwen3ForCausalLM

import rlalign
from rlalign.head import widened
from rlalign.logprobs import token_logprobs
from rlalign.logprobs.vocab_parallel import VocabShard

pytestmark = pytest.mark.slow
VOCABULARY, ROWS, LENGTH = 97, 2, 9  # ROWS of each rank
TEMPERATURE = 0.7
MIXED = {
    "float32": None,
    "float32, tied": None,
    "float32, head apart": None,
    "float32, compiled": None,
    "bfloat16": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
    "bfloat16, reduced in bfloat16": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16),
    "float16": MixedPrecisionPolicy(param_dtype=torch.float16, reduce_dtype=torch.float32),
}
CLOSE = 1e-5  # nats: what float32 sums of two layers are off from float64 by, ten times over for other orders
SMALL, SCALE = 2.0**-22, 2.0**20  # a loss whose gradients float16 cannot hold, and what brings them into its range


@pytest.fixture(scope="module", autouse=True)
def torchs_own_products():
    """As in the ranks' processes, whatever an earlier test of this process has decided on a host without bf16 instructions."""
    with widened.using(widened.NATIVE):
        yield


def network(*, tied: bool = False) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=tied, initializer_range=0.2,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval()


def tokens(rank: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(rank))


def loss_of(logprobs_BL: torch.Tensor, entropy_BL: torch.Tensor) -> torch.Tensor:
    """Uneven in the tokens."""
    ramp_L = torch.linspace(-1, 2, LENGTH, dtype=logprobs_BL.dtype)
    return (ramp_L * logprobs_BL + 0.1 * ramp_L.flip(0) * entropy_BL).sum()


MASK = torch.ones(ROWS, LENGTH, dtype=torch.bool).index_fill(1, torch.tensor([0]), False)


def in_float64(model: Qwen3ForCausalLM, rank: int) -> tuple[torch.Tensor, ...]:
    """logprobs, entropies and the gradients of one rank's loss, from transformers' own logits."""
    ids_BL = tokens(rank)
    logprobs_BLV = (model(ids_BL).logits[:, :-1].double() / TEMPERATURE).log_softmax(-1)
    chosen_BL = logprobs_BLV.gather(-1, ids_BL[:, 1:, None])[..., 0]
    pair = [torch.nn.functional.pad(x, (1, 0)) for x in (chosen_BL, -(logprobs_BLV.exp() * logprobs_BLV).sum(-1))]
    return *(x.detach() for x in pair), *torch.autograd.grad(loss_of(*pair), tuple(model.parameters()))


def mirrored(model: torch.nn.Module, rank: int, scale: float = 1.0) -> dict[str, object]:
    """What this rank's mirror gives, and the gradients it leaves behind, of `scale` times the loss."""
    mirror = rlalign.mirror(model)
    pair = mirror.token_logprobs({"input_ids": tokens(rank)}, MASK, temperature=TEMPERATURE)
    (loss_of(*pair) * scale).backward()
    grads = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in model.parameters()]
    looked = mirror.status.multiplied
    return {"pair": [x.detach() for x in pair], "grads": grads, "dtype": looked.dtype, "calls": mirror.status.calls}


def divided_in_place(model: torch.nn.Module, rank: int) -> dict[str, object]:
    """The same from the mirrored model's logits, which a stack divides in place before it takes logprobs (SkyRL, verl)."""
    with rlalign.mirror(model):
        logits_BLV = model(tokens(rank)).logits
        logits_BLV.div_(TEMPERATURE)
        logprobs_BLV = logits_BLV[:, :-1].log_softmax(-1)
        chosen_BL = logprobs_BLV.gather(-1, tokens(rank)[:, 1:, None])[..., 0]
        pair = [torch.nn.functional.pad(x, (1, 0)) for x in (chosen_BL, -(logprobs_BLV.exp() * logprobs_BLV).sum(-1))]
        loss_of(*pair).backward()
    return {"pair": [x.detach() for x in pair], "grads": [p.grad.full_tensor() for p in model.parameters()]}


def sharded(name: str) -> torch.nn.Module:
    model = network(tied="tied" in name)
    options = {"mesh": init_device_mesh("cpu", (2,))}
    if MIXED[name] is not None:
        options["mp_policy"] = MIXED[name]
    for layer in model.model.layers:
        if "compiled" in name:
            layer.compile(backend="aot_eager")
        fully_shard(layer, **options)
    if "apart" in name:
        fully_shard(model.lm_head, **options)
    return fully_shard(model, **options)


def split_head(rank: int) -> dict[str, object]:
    """A tensor-parallel lm_head: equal hidden states, rows of the weight over the ranks, 49 and 48 of them."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(ROWS, LENGTH, 32, generator=generator, requires_grad=True)
    whole = torch.randn(VOCABULARY, 32, generator=generator) / 4
    weight = distribute_tensor(whole, mesh, [Shard(0)]).requires_grad_()
    shard = VocabShard.of(weight)
    pair = token_logprobs(hidden, weight.to_local(), tokens(0), shard=shard, temperature=TEMPERATURE, entropy=True)
    loss_of(*pair).backward()
    errors = []
    for wrong in (distribute_tensor(whole, mesh, [Shard(1)]), distribute_tensor(whole, mesh, [Replicate()])):
        with pytest.raises(ValueError, match="expected rows split over a mesh of one dimension") as raised:
            VocabShard.of(wrong)
        errors.append(str(raised.value))
    with pytest.raises(ValueError, match="weight is a DTensor, spread over ranks .*VocabShard.of"):
        token_logprobs(hidden, weight, tokens(0))
    return {
        "pair": [x.detach() for x in pair], "start": shard.start, "hidden": hidden.grad, "weight": weight.grad.full_tensor(),
        "errors": errors,
    }  # fmt: skip


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch._dynamo.config.disable = False  # an engine of another file may have switched it off for this process' parents
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=120))
    found = {name: mirrored(sharded(name), rank) for name in MIXED}
    found["float16, small"] = mirrored(sharded("float16"), rank, SMALL)
    found["float16, small, scaled"] = mirrored(sharded("float16"), rank, SMALL * SCALE)
    found["split"] = split_head(rank)
    found["in place"] = {name: divided_in_place(sharded(name), rank) for name in ("float32", "float32, head apart")}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory) -> list[dict[str, dict[str, object]]]:
    folder = tmp_path_factory.mktemp("fsdp2")
    mp.start_processes(worker, args=(str(folder),), nprocs=2, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def off(found: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """Largest distance of a gradient, in its own norm."""
    pairs = zip(found, exact, strict=True)
    return max(float((f.double() - e).norm() / e.norm()) for f, e in pairs)


def averaged(of_rank: list[tuple[torch.Tensor, ...]]) -> list[torch.Tensor]:
    """FSDP's gradient: the mean over ranks."""
    return [(a.double() + b.double()) / 2 for a, b in zip(*of_rank, strict=True)]


@pytest.mark.parametrize("name", [name for name in MIXED if name.startswith("float32")])
def test_two_ranks_score_and_learn_as_the_whole_model_in_float64(name, by_rank):
    model = network(tied="tied" in name).double()
    exact = [in_float64(model, rank) for rank in (0, 1)]
    for rank in (0, 1):
        found = by_rank[rank][name]
        for mine, theirs in zip(found["pair"], exact[rank][:2], strict=True):
            assert mine.dtype == torch.float32 and (mine - theirs).abs().max() < CLOSE
        assert off(found["grads"], averaged([e[2:] for e in exact])) < 1e-5
        assert found["dtype"] == "float32" and found["calls"] == 1


@pytest.mark.parametrize("name", ["float32", "float32, head apart"])
def test_logits_divided_in_place_learn_as_float64s(name, by_rank):
    """FSDP2 hooks its backward gather to the outputs, and loses it where one is a view that changes in place."""
    exact = [in_float64(network().double(), rank) for rank in (0, 1)]
    for rank in (0, 1):
        found = by_rank[rank]["in place"][name]
        for mine, theirs in zip(found["pair"], exact[rank][:2], strict=True):
            assert (mine - theirs).abs().max() < CLOSE
        assert off(found["grads"], averaged([e[2:] for e in exact])) < 1e-5


def rounded(dtype: torch.dtype) -> Qwen3ForCausalLM:
    """The unsharded model as the ranks see it: parameters rounded once, rotary frequencies as they are."""
    model = network()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


@pytest.mark.parametrize(("name", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_a_16_bit_body_scores_as_the_unsharded_one_and_its_logits_are_float32(name, dtype, by_rank):
    for rank in (0, 1):
        found = by_rank[rank][name]
        alone = mirrored(rounded(dtype), rank)
        for mine, theirs in zip(found["pair"], alone["pair"], strict=True):
            assert mine.dtype == torch.float32 and (mine - theirs).abs().max() < CLOSE
        assert found["dtype"] == "float32", "measured against float64 on this very call"


def test_gradients_of_a_bfloat16_body_are_added_up_in_float32(by_rank):
    """Reduced in float32 they are the mean of the ranks' own to float32 rounding, in bfloat16 only to bfloat16's."""
    own = [mirrored(rounded(torch.bfloat16), rank)["grads"] for rank in (0, 1)]
    assert off(by_rank[0]["bfloat16"]["grads"], averaged(own)) < 2**-20
    assert off(by_rank[0]["bfloat16, reduced in bfloat16"]["grads"], averaged(own)) > 2**-12


def test_a_float16_body_learns_from_a_small_loss_only_with_its_scale(by_rank):
    exact = averaged([in_float64(network().double(), rank)[2:] for rank in (0, 1)])
    unscaled = [g.double() / SMALL for g in by_rank[0]["float16, small"]["grads"]]
    scaled = [g.double() / (SMALL * SCALE) for g in by_rank[0]["float16, small, scaled"]["grads"]]
    plain = off(by_rank[0]["float16"]["grads"], exact)
    assert plain < 0.02 and off(scaled, exact) < 2 * plain, "what float16 rounds away, and no more"
    assert off(unscaled, exact) > 10 * plain


def test_a_tensor_parallel_head_is_the_whole_one(by_rank):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(ROWS, LENGTH, 32, generator=generator).double().requires_grad_()
    weight = (torch.randn(VOCABULARY, 32, generator=generator) / 4).double().requires_grad_()
    logprobs_BLV = (hidden[:, :-1] @ weight.t() / TEMPERATURE).log_softmax(-1)
    chosen = logprobs_BLV.gather(-1, tokens(0)[:, 1:, None])[..., 0]
    pair = [torch.nn.functional.pad(x, (1, 0)) for x in (chosen, -(logprobs_BLV.exp() * logprobs_BLV).sum(-1))]
    loss_of(*pair).backward()
    assert [by_rank[rank]["split"]["start"] for rank in (0, 1)] == [0, 49]
    for rank in (0, 1):
        found = by_rank[rank]["split"]
        for mine, theirs in zip(found["pair"], pair, strict=True):
            assert (mine - theirs).abs().max() < CLOSE
        assert off([found["hidden"], found["weight"]], [hidden.grad, weight.grad]) < 1e-6
    assert all(torch.equal(a, b) for a, b in zip(*(by_rank[rank]["split"]["pair"] for rank in (0, 1)), strict=True))


@pytest.mark.parametrize(
    ("what", "backend"),
    [
        ("body", "aot_eager"),
        pytest.param("whole", "aot_eager", marks=pytest.mark.nightly),
        pytest.param("body", "inductor", marks=pytest.mark.nightly),
        pytest.param("whole", "inductor", marks=pytest.mark.nightly),
    ],
)
def test_a_compiled_body_changes_nothing_that_the_head_promises(what, backend):
    """Logprobs and gradients stay those of the float64 model, and the head's logits float32, whoever is compiled."""
    model, exact = network(), in_float64(network().double(), 0)
    if what == "body":
        model.model.compile(backend=backend)
    else:
        model.compile(backend=backend)
    found = mirrored(model, 0)
    for mine, theirs in zip(found["pair"], exact[:2], strict=True):
        assert (mine - theirs).abs().max() < CLOSE
    assert off(found["grads"], list(exact[2:])) < 1e-5 and found["dtype"] == "float32"
