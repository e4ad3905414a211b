"""Which corrections survive a planted mismatch that makes the demo's GRPO collapse? Writes results/collapse.md.

    python -m benchmarks.collapse

The fault: the engine never gets the first layer's updates, as with a loader that skips its names. Every publish is verified, since
what was sent arrives; only the trainer's own forward disagrees. One engine serves all runs. What a run trained is judged by the
held-out accuracy of its final weights, published whole.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean

from torch import Tensor

from rlalign.config import RunConfig, compose, load
from rlalign.rollout.engine.embedded import VLLMEngine
from rlalign.run import assembly
from rlalign.run.train import train
from rlalign.tracking import environment
from rlalign.trainer.policy import Policy
from rlalign.weights import publish

OUT = Path(__file__).parent / "results" / "collapse.md"
LAYER = "model.layers.0."
SAME = [
    "tracking=off", "overwrite=true", "mismatch.k3_limit=1e9", "mismatch.action=warn", "mismatch.head_every=0",
    "tracking.eval_every=1000", "rollout.prompts_per_step=16",
]  # fmt: skip
PRESETS = ("tis", "ess_tis", "icepop", "kpop", "mis", "geo_mask")
WAYS = (
    {"nothing": []}
    | {preset: [f"algo.correction.preset={preset}"] for preset in PRESETS}
    | {
        "tis, on_policy_one": ["algo.correction.preset=tis", "algo.correction.on_policy_one=true"],
        "accept_k3=0.1": ["mismatch.accept_k3=0.1", "mismatch.accept_prompts=64"],
        "accept_k3=0.01": ["mismatch.accept_k3=0.01", "mismatch.accept_prompts=64"],
    }
)
SOUND = {name: WAYS[name] for name in ("nothing", "tis", "kpop", "accept_k3=0.01")}
ABOUT = """\
# Which corrections survive a planted collapse

The demo ({steps} steps of 16 prompts x 8, lr {lr:g}, bfloat16 bodies) with a fault: the engine never gets the updates of
`{layer}*`. Numbers are those of seeds {seeds}. **policy**: held-out accuracy of the final weights, published whole to a sound
engine; {start:.3f} before the first step. **logged**: the run's own reward over its last tenth, of what the faulty engine samples.
**kept**: share of tokens that the correction kept; **refused**: updates taken back. A policy survives if it is right more often
than the one it began as, by {margin:g} or more. The gate is off (`mismatch.action=warn`): at the demo's `k3_limit` of 1e-3 it
stops every run with the fault by step {stopped}.

`python -m benchmarks.collapse`, {cpu}, vllm {vllm}, torch {torch}; shared with other work.
"""
MARGIN = 0.05  # over three standard errors of 1,024 samples
HEAD = "| correction | survived | policy | logged | k3, last tenth | kept | refused |\n|---|--:|--:|--:|--:|--:|--:|"


class Engine:
    """The one engine, and what it takes to judge weights with it."""

    def __init__(self, config: RunConfig) -> None:
        model = assembly.resolve_model(config.model.path)
        tokenizer = assembly.load_tokenizer(model)
        self.task = assembly.load_task_of(config)
        self.encode = assembly.prompt_encoder(config, self.task, tokenizer)
        self.engine: VLLMEngine = assembly.start_embedded(model, config)
        self.start = self.accuracy()
        self.close, self.engine.close = self.engine.close, lambda: None
        assembly.start_engine = lambda model, config, say: self.engine

    def accuracy(self, weights: dict[str, Tensor] | None = None) -> float:
        """Held-out, four samples of each prompt."""
        if weights is not None:
            with tempfile.TemporaryDirectory() as shared:
                publish(weights.items(), self.engine.policy_version + 1, receiver=self.engine, shared=Path(shared))
        prompts = self.task.eval_prompts()
        asked = {"prompt_ids": [p.prompt_id for p in prompts], "samples": 4, "seed": 2**20}
        found = self.engine.generate([self.encode(p.text) for p in prompts], **asked)
        return fmean(self.task.reward(prompts[r.group_id], r.text) for r in found)


@contextmanager
def stale(layer: str) -> Iterator[dict[str, Tensor]]:
    """What a policy publishes keeps this layer as it was at first. Yields the policy's own weights, once it is closed."""
    own, close, held, final = Policy.named_weights, Policy.close, {}, {}

    def named_weights(self: Policy) -> Iterator[tuple[str, Tensor]]:
        for name, weight in own(self):
            yield name, held.setdefault(name, weight.clone()) if name.startswith(layer) else weight

    def closed(self: Policy) -> None:
        final.update({name: weight.clone() for name, weight in own(self)})
        close(self)

    Policy.named_weights, Policy.close = named_weights, closed
    try:
        yield final
    finally:
        Policy.named_weights, Policy.close = own, close


def run(engine: Engine, options: Sequence[str], *, sound: bool, folder: Path) -> dict[str, float]:
    """One training run, as the numbers of its row; a correction that rejects every token ends it early."""
    with stale("none of them" if sound else LAYER) as final:
        try:
            train(load(compose("demo", [*SAME, f"output_dir={folder}", *options])))
        except RuntimeError as error:
            if "rejected every token" not in str(error):
                raise
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    late = rows[-max(1, len(rows) // 10) :]
    return {
        "policy": engine.accuracy(final), "logged": fmean(row["reward/mean"] for row in late),
        "k3": fmean(row["mismatch/lag0/k3"] for row in late), "steps": len(rows),
        "first": next((row["step"] for row in rows if row["mismatch/lag0/k3"] > 1e-3), len(rows)),
        "kept": fmean(row.get("correction/kept_frac", 1.0) for row in late),
        "refused": sum(row.get("accept/refused", 0.0) for row in rows),
    }  # fmt: skip


def line(way: str, found: list[dict[str, float]], start: float, steps: int) -> str:
    """A way's row: each number by seed."""

    def each(name: str, form: str) -> str:
        return ", ".join(format(f[name], form) for f in found)

    survived = sum(f["policy"] >= start + MARGIN for f in found)
    ended = [f"{f['steps']:.0f}" for f in found if f["steps"] < steps]
    note = f" (no token left after {', '.join(ended)} steps)" if ended else ""
    cells = [
        each("policy", ".2f"),
        each("logged", ".2f"),
        each("k3", ".0e"),
        each("kept", ".2f"),
        each("refused", ".0f"),
    ]
    return f"| {way}{note} | {survived} of {len(found)} | " + " | ".join(cells) + " |"


def main() -> None:
    """Measure and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args()
    engine = Engine(load(compose("demo", SAME)))
    with tempfile.TemporaryDirectory() as folder:

        def runs(options: Sequence[str], *, sound: bool) -> list[dict[str, float]]:
            same = [*options, f"steps={args.steps}", f"algo.lr={args.lr}"]
            return [run(engine, [*same, f"seed={s}"], sound=sound, folder=Path(folder) / "run") for s in args.seeds]

        found: dict[bool, dict[str, list]] = {True: {}, False: {}}
        for sound, ways in ((True, SOUND), (False, WAYS)):
            for way, options in ways.items():
                found[sound][way] = runs(options, sound=sound)
                print("sound" if sound else "faulty", way, found[sound][way], flush=True)
    engine.close()
    versions = environment.snapshot()["versions"]
    about = ABOUT.format(
        steps=args.steps, lr=args.lr, layer=LAYER, seeds=", ".join(map(str, args.seeds)), start=engine.start,
        stopped=max(f["first"] for f in found[False]["nothing"]), margin=MARGIN, cpu=environment.cpu_model(), **versions,
    )  # fmt: skip
    parts = [about]
    for title, sound in (("With the fault", False), ("Without it", True)):
        rows = [line(way, each, engine.start, args.steps) for way, each in found[sound].items()]
        parts += [f"## {title}\n", HEAD, *rows, ""]
    OUT.write_text("\n".join(parts))
    print(OUT.read_text())


if __name__ == "__main__":
    main()
