"""Two tensor-parallel workers in processes of their own: the handshake and the publish speak for each of them."""

import subprocess
import sys

PROGRAM = """
import sys
from pathlib import Path


def main():
    import torch
    from dataclasses import replace
    from rlalign.weights import publish
    from tests.engine.conftest import ROLLOUT, perturbed, sample, start

    folder, shared = map(Path, sys.argv[1:])
    engine = start(folder, dtype="float32", rollout=replace(ROLLOUT, tensor_parallel_size=2))
    model = perturbed(folder, seed=1, dtype=torch.float32)
    report = publish(model.named_parameters(), 1, receiver=engine, shared=shared)
    rollouts = sample(engine)
    statuses = engine.status()
    worst = 0.0
    with torch.no_grad():
        for r in rollouts:
            logprobs = model(torch.tensor([r.token_ids])).logits[0].log_softmax(-1)
            errors = [abs(float(logprobs[t - 1, r.token_ids[t]]) - r.rollout_logprobs[t]) for t, m in enumerate(r.loss_mask) if m]
            worst = max(worst, *errors)
    print("RESULT", report.ranks, len({s["pid"] for s in statuses}), min(s["calls"] for s in statuses), worst)
    engine.close()


if __name__ == "__main__":
    main()
"""


def test_both_ranks_are_proved_and_updated(untied, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    (tmp_path / "shared").mkdir()
    command = [sys.executable, str(program), str(untied), str(tmp_path / "shared")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT")] or [done.stderr[-3000:]]
    ranks, processes, calls, worst = line.split()[1:]
    assert (ranks, processes) == ("2", "2") and int(calls) > 0
    assert float(worst) < 1e-4


def environment():
    import os
    from pathlib import Path

    return os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
