"""Adaptive temperature scaling against what is simpler, on a policy that GRPO has made overconfident.

    python benchmarks/adaptive.py

Trains the policy when its folder is not there (about a minute and a half), fits every calibration on teacher-forced
tokens of some problems, judges it on others, and writes results/adaptive.md with its plots. Seeded; one CPU thread.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import adaptive_report as report
import numpy as np
import torch
from adaptive_answers import answer_rows
from adaptive_data import FAMILIES, Part, Policy, problems
from adaptive_methods import BASELINES, Judged, Method, adaptive, adaptive_then_isotonic
from adaptive_policy import overconfident_policy

from rlalign.calibration.adaptive import Objective
from rlalign.tiny_policy import cache_root

RESULTS = Path(__file__).parent / "results"
SIZES = {"fit": 700, "validation": 200, "test": 800}
GRPO_STEPS = 120
HEADS = ("linear", "mlp", "transformer")
PAPER = Objective(loss="selective")
SEEDS = (0, 1, 2)
LOSSES = {
    "top-label": Objective(loss="top_label"),
    "cross-entropy": Objective(loss="cross_entropy"),
    "label smoothing 0.1": Objective(loss="label_smoothing"),
    "uniform": Objective(loss="uniform"),
    "selective, alpha 0.5 (paper)": PAPER,
    "selective, alpha 0.2": Objective(loss="selective", alpha=0.2),
    "selective, alpha 0.8": Objective(loss="selective", alpha=0.8),
    "selective, balanced (official code)": Objective(loss="selective", alpha_form="balanced"),
    "selective, added": Objective(loss="selective", alpha_form="added"),
}


def main() -> None:
    """Run everything; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policy", type=Path, default=cache_root() / f"adaptive-grpo{GRPO_STEPS}")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    policy = Policy(overconfident_policy(arguments.policy, GRPO_STEPS))
    data = Data(policy)
    tables = {
        "mixed": compare(data, list(FAMILIES), seeds=SEEDS),
        "trained": compare(data, ["addition"], seeds=SEEDS[:1]),
        "losses": ablation(data),
        "answers": answer_rows(policy, data),
        "domains": out_of_domain(data),
    }
    report.write(arguments.out, tables, data, sizes=SIZES, seconds=time.monotonic() - began)


class Data:
    """Every family's problems; a part of several families is their union in a seeded order."""

    def __init__(self, policy: Policy) -> None:
        found = {family: problems(family, SIZES, seed=1) for family in FAMILIES}
        self.prompts = {family: parts for family, (parts, _) in found.items()}
        self.tasks = {family: task for family, (_, task) in found.items()}
        self._policy, self._made = policy, {}

    def part(self, name: str, families: list[str]) -> Part:
        """Teacher-forced tokens of the part `name` (fit, validation, test) of these families."""
        key = (name, *families)
        if key not in self._made:
            prompts = [p for family in families for p in self.prompts[family][name]]
            order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(0)).tolist()
            self._made[key] = self._policy.forced([prompts[i] for i in order])
        return self._made[key]

    def family_of(self, part: Part) -> np.ndarray:
        """The family of each scored token."""
        name_of = {p.text: family for family, parts in self.prompts.items() for ps in parts.values() for p in ps}
        return np.array([name_of[p.text] for p in part.prompts])[part.prompt_N]


def fitted(data: Data, families: list[str], make) -> Method:
    """A method fitted on the fit and validation problems of these families."""
    return make(data.part("fit", families), data.part("validation", families))


def compare(data: Data, families: list[str], seeds: tuple[int, ...]) -> dict[str, list[Judged]]:
    """Every method on the test problems: one Judged, or one per seed of ATS."""
    test = data.part("test", families)
    rows = {}
    for name, make in BASELINES.items():
        rows[name] = [fitted(data, families, make)(test)]
        print(name, flush=True)
    for head in HEADS:
        rows[f"ATS {head}"] = [fitted(data, families, adaptive(head, seed=seed))(test) for seed in seeds]
        rows[f"ATS {head}, paper's loss"] = [fitted(data, families, adaptive(head, PAPER))(test)]
        print("ATS", head, flush=True)
    rows["ATS transformer, then isotonic"] = [fitted(data, families, adaptive_then_isotonic("transformer"))(test)]
    return rows


def ablation(data: Data) -> dict[str, dict[str, Judged]]:
    """Head -> loss -> its result on mixed problems."""
    families = list(FAMILIES)
    test = data.part("test", families)
    rows = {}
    for head in ("linear", "transformer"):
        rows[head] = {name: fitted(data, families, adaptive(head, loss))(test) for name, loss in LOSSES.items()}
        print("losses", head, flush=True)
    return rows


def out_of_domain(data: Data) -> dict[str, dict[tuple[str, str], Judged]]:
    """Method -> (fitted on, tested on) -> result."""
    makes = {name: BASELINES[name] for name in ("uncalibrated", "temperature, top-label loss", "histogram binning")}
    makes |= {"ATS linear": adaptive("linear"), "ATS transformer": adaptive("transformer")}
    rows = {}
    for name, make in makes.items():
        rows[name] = {}
        for source in FAMILIES:
            method = fitted(data, [source], make)
            for target in FAMILIES:
                rows[name][source, target] = method(data.part("test", [target]))
        print("out of domain:", name, flush=True)
    return rows


if __name__ == "__main__":
    main()
