"""What a GPU would run, as far as a machine without one can tell: its operators exist with these arguments, no value is looked at
(which would synchronise the device), and its arithmetic, with the one product that only CUDA has replaced, is right.

N tokens, D hidden, V vocabulary.
"""

import pytest
import torch

from rlalign.head import products
from rlalign.head.products import Route
from rlalign.logprobs.backward import Upstream, backward_tiles
from rlalign.logprobs.blocks import Tile
from rlalign.logprobs.forward import Kept, Problem, Sums, Transform, _sums, forward_sums, mirror

N, D, V = 19, 64, 301
TRANSFORMS = {
    "plain": {},
    "cap": {"soft_cap": 3.0},
    "scale": {"logit_scale": 0.25},
    "all": {"soft_cap": 3.0, "logit_scale": 0.5, "temperature": 0.7},
}


def problem(transform: dict, *, kept: bool, dtype: torch.dtype = torch.bfloat16) -> Problem:
    hidden_ND, weight_VD = torch.randn(N, D).to(dtype), (0.5 * torch.randn(V, D)).to(dtype)
    options = dict(transform)
    temperature_N = torch.full((N,), options.pop("temperature")) if "temperature" in options else None
    target_N = torch.arange(N) * 7 % V
    ids_E, start_M = (
        torch.stack([target_N, (target_N + 3) % V], 1).flatten().int(),
        torch.arange(N + 1, device="cpu") * 2,
    )
    return Problem(
        hidden_ND, weight_VD, torch.randn(V), target_N, Transform(temperature_N=temperature_N, **options), Tile(8, 128),
        Route.CUDA_OUT_DTYPE, Kept(ids_E, start_M) if kept else None,
    )  # fmt: skip


def gradients(of: Problem, sums: Sums) -> tuple[torch.Tensor, ...]:
    entropy_N = sums.lse_N - sums.mean_N
    there = (
        sums.lse_N.device
    )  # said, not left to the default device: libraries in this process wrap torch's constructors
    slope_N, fall_N = torch.linspace(-1, 1, N, device=there), torch.linspace(0.2, -0.1, N, device=there)
    upstream = Upstream(slope_N, fall_N, sums.lse_N, entropy_N)
    got = backward_tiles(of, upstream, of.weight_VD, hidden=True, bias=True)
    return got.hidden_ND, got.weight_VD, got.bias_V


@pytest.mark.parametrize("kept", [False, True], ids=["whole", "kept"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_on_a_device_whose_values_cannot_be_read_everything_runs(name, kept):
    with torch.device("meta"):
        with pytest.raises(RuntimeError, match="cannot be called on meta tensors"):
            torch.zeros(()).item()
        asked = problem(TRANSFORMS[name], kept=kept)
        results = [*gradients(asked, forward_sums(asked, mean=True)), *mirror(asked, rows=None, entropy=True)]
    shapes = [(N, D), (V, D), (V,), (N,), (N,), (N,)]
    assert [(x.device.type, tuple(x.shape)) for x in results] == [("meta", shape) for shape in shapes]


@pytest.fixture
def one_product_replaced(monkeypatch):
    """The 16-bit operands multiplied in float32, as torch.mm(out_dtype=float32) does on CUDA; the CPU's has no such argument."""

    def matmul(a_MK, b_KJ, route, *, out=None, accumulate=False):
        assert route is Route.CUDA_OUT_DTYPE and a_MK.dtype == b_KJ.dtype == torch.bfloat16
        product = a_MK.float() @ b_KJ.float()
        if out is None:
            return product
        return out.add_(product) if accumulate else out.copy_(product)

    monkeypatch.setattr(products, "matmul", matmul)
    monkeypatch.setattr("rlalign.logprobs.backward.matmul", matmul)


@pytest.mark.parametrize("kept", [False, True], ids=["whole", "kept"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_its_arithmetic_is_right(name, kept, one_product_replaced):
    torch.manual_seed(0)
    asked = problem(TRANSFORMS[name], kept=kept)
    sums = _sums(asked, mean=True, running_max=True)  # what forward_sums takes on every device but the CPU
    operands = [x.double().requires_grad_() for x in (asked.hidden_ND, asked.weight_VD, asked.bias_V)]
    logits_NV = operands[0] @ operands[1].t() + operands[2]
    options = asked.transform
    if options.soft_cap is not None:
        logits_NV = torch.tanh(logits_NV / options.soft_cap) * options.soft_cap
    logits_NV = logits_NV * options.logit_scale
    if options.temperature_N is not None:
        logits_NV = logits_NV / options.temperature_N.double()[:, None]
    if asked.kept is not None:
        allowed_NV = torch.zeros(N, V, dtype=torch.bool).scatter_(1, asked.kept.ids_E.view(N, 2).long(), True)
        logits_NV = logits_NV.masked_fill(~allowed_NV, -1e30)
    exact_NV = logits_NV.log_softmax(-1)
    logprob_N = exact_NV.gather(1, asked.target_N[:, None])[:, 0]
    entropy_N = -(exact_NV.exp() * exact_NV).sum(-1)
    torch.testing.assert_close((sums.target_N - sums.lse_N).double(), logprob_N, atol=2e-5, rtol=0)
    torch.testing.assert_close((sums.lse_N - sums.mean_N).double(), entropy_N, atol=2e-5, rtol=0)
    loss = (logprob_N * torch.linspace(-1, 1, N)).sum() + (entropy_N * torch.linspace(0.2, -0.1, N)).sum()
    for got, wanted in zip(gradients(asked, sums), torch.autograd.grad(loss, operands), strict=True):
        # the gradient of the logits is rounded once to bfloat16, the weight's once more
        assert float((got.double() - wanted).abs().max()) < 1e-2 * float(wanted.abs().max())
