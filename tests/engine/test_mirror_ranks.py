"""rlalign.mirror in models that two processes share: real DeepSpeed, FSDP2 and DDP over gloo, against float64 on one."""

import pytest
import torch

from tests.engine.conftest import on_two_ranks
from tests.engine.mirror_ranks import CASES, MORE_CASES, in_float64


def check(folder, model, name):
    """Each rank's logprobs, the step that both made, and the whole weights that a publish would be given."""
    found = [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in (0, 1)]
    logprobs, after = in_float64(model)
    assert all(each["dtype"] == "float32" for each in found)
    torch.testing.assert_close(torch.cat([each["logprobs"] for each in found]).double(), logprobs, rtol=1e-5, atol=1e-5)
    for each in found:
        assert each["after"].keys() == after.keys()
        for weight, expected in after.items():
            torch.testing.assert_close(each["after"][weight].double(), expected, rtol=1e-4, atol=1e-5, msg=weight)
    whole = sum(tensor.numel() for tensor in after.values())
    if name in ("zero3", "fsdp2"):  # it was sharded
        assert all(each["held"] < 0.6 * whole for each in found)
    else:
        assert all(each["held"] == whole for each in found)


@pytest.fixture(scope="module")
def two_ranks(untied, tmp_path_factory):
    return on_two_ranks("tests.engine.mirror_ranks", untied, tmp_path_factory.mktemp("mirror"))


@pytest.mark.proves("DeepSpeed ZeRO-1", "mirrored head on two ranks: logprobs, a step, whole weights")
@pytest.mark.proves("DeepSpeed ZeRO-3", "mirrored head on two ranks: logprobs, a step, whole weights")
@pytest.mark.proves("torch FSDP2", "mirrored head on two ranks: logprobs, a step, whole weights")
@pytest.mark.parametrize("name", CASES)
def test_a_shared_model_scores_and_learns_as_the_whole_one_in_float64(two_ranks, untied, name):
    check(two_ranks, untied, name)


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_the_same_of_every_wrapper_and_of_a_tied_head(kind, request, tmp_path):
    model = request.getfixturevalue(kind)
    for names, more in ((CASES, ()), (MORE_CASES, ("more",))):
        folder = on_two_ranks("tests.engine.mirror_ranks", model, tmp_path, *more)
        for name in names:
            check(folder, model, name)
