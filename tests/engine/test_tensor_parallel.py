"""Two tensor-parallel workers in processes of their own: handshake, publish and head hold on each of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlalign.head import projection

PROGRAM = """
import sys
from pathlib import Path


def main():
    import torch
    from dataclasses import replace
    from safetensors.torch import load_file, save_file
    from rlalign.head import projection
    from rlalign.weights import MASTER_WEIGHT, publish
    from tests.engine.conftest import ROLLOUT, perturbed, sample, start

    folder, shared, dtype, head_dtype = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4]
    engine = start(folder, dtype=dtype, head_dtype=head_dtype, rollout=replace(ROLLOUT, tensor_parallel_size=2))
    model = perturbed(folder, seed=1, dtype=getattr(torch, dtype)).requires_grad_(False)
    weights, weight = list(model.named_parameters()), model.lm_head.weight
    if head_dtype == "master":
        weight = weight.float() * (1 + 2.0**-11)  # rounds back to the published weight
        weights.append((MASTER_WEIGHT, weight))
    report = publish(weights, 1, receiver=engine, shared=shared)
    rollouts = sample(engine)
    statuses = engine.status()

    hidden = torch.randn(24, 128, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    save_file({"hidden_ND": hidden}, shared / "hidden.safetensors")
    logits = load_file(engine.head_logits(shared / "hidden.safetensors", batch=8))["logits_NV"]
    expected = projection.project(hidden, weight)
    worst = 0.0
    for r in rollouts:
        logprobs = model(torch.tensor([r.token_ids])).logits[0].float().log_softmax(-1)
        errors = [abs(float(logprobs[t - 1, r.token_ids[t]]) - r.rollout_logprobs[t]) for t, m in enumerate(r.loss_mask) if m]
        worst = max(worst, *errors)
    print("RESULT", report.ranks, len({s["pid"] for s in statuses}), min(s["calls"] for s in statuses), worst,
          float((logits - expected).abs().max()), torch.equal(logits, expected), sorted(s["mode"] for s in statuses)[0],
          len({s["fingerprint"] for s in statuses}), min(s["epoch"] for s in statuses), min(s["masters_loaded"] for s in statuses))
    engine.close()


if __name__ == "__main__":
    main()
"""
KINDS = [
    ("tied", "bfloat16", "float32"),
    *(
        pytest.param(kind, marks=pytest.mark.nightly)
        for kind in [("untied", "float32", "float32"), ("untied", "bfloat16", "master")]
    ),
]


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_both_ranks_are_proved_and_updated(kind, tmp_path, request):
    tie, dtype, head_dtype = kind
    folder = request.getfixturevalue(tie)
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    (tmp_path / "shared").mkdir()
    command = [sys.executable, str(program), str(folder), str(tmp_path / "shared"), dtype, head_dtype]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=1200)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT")] or [done.stderr[-3000:]]
    ranks, processes, calls, worst, head_error, same_bits, mode, shards, epoch, masters = line.split()[1:]
    assert (ranks, processes, shards) == ("2", "2", "2"), "each rank holds its own shard of the head"
    assert int(calls) > 0 and int(epoch) > 0
    assert mode == ("master" if head_dtype == "master" else "cached")
    assert int(masters) == (head_dtype == "master")
    assert float(worst) < (1e-4 if dtype == "float32" else 0.2)
    assert float(head_error) < 2e-5
    if (dtype, head_dtype) == ("bfloat16", "float32") and bits_do_not_depend_on_slices():
        assert same_bits == "True", "slices of the vocabulary have the bits of the whole"


def bits_do_not_depend_on_slices() -> bool:
    hidden = torch.zeros(1, 128, dtype=torch.bfloat16)
    return projection.route(hidden, hidden) is not projection.Route.STRICT_FP32


def environment():
    return os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
