"""What the dashboard shows, as data: sections, and the metric keys of each panel. `dashboard` turns it into wandb's objects."""

from __future__ import annotations

from dataclasses import dataclass

PHASES = "time/(rollout|probe|reward|score|train|wait|publish|other)_s"


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """Metrics over steps in one chart. regex: every key that matches, where the names are the user's. table: a logged table."""

    title: str
    keys: tuple[str, ...] = ()
    regex: str = ""
    table: str = ""
    log: bool = False
    stacked: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """about: how to read it, for the report. shut: closed until someone asks."""

    title: str
    about: str
    panels: tuple[Panel, ...]
    shut: bool = False


SECTIONS = (
    Section(
        title="Mismatch: engine, staleness, floor",
        about="At lag 0 nothing differs but the two engines; what older versions sampled is staleness; beyond the floor is what "
        "can be fixed. k3 in nats per token.",
        panels=(
            Panel(title="Engine: k3 at lag 0", keys=("mismatch/lag0/k3",), log=True),
            Panel(title="Engine beyond the noise floor", keys=("mismatch/excess/k3",)),
            Panel(title="Staleness: k3 of older versions", keys=("staleness/k3",), log=True),
            Panel(
                title="|log_ratio| at lag 0",
                keys=("mismatch/lag0/abs_mean", "mismatch/lag0/p99", "mismatch/lag0/abs_max"),
                log=True,
            ),
            Panel(title="Ranking: Pearson of probabilities", keys=("mismatch/lag0/pearson_prob",)),
            Panel(title="Tokens without a finite ratio", keys=("mismatch/nonfinite",)),
            Panel(title="Worst tokens", table="mismatch/worst_tokens"),
        ),
    ),
    Section(
        title="Corrections",
        about="What importance weights and masks did about it. A falling effective sample size says that the correction hides a "
        "mismatch that should be fixed.",
        panels=(
            Panel(title="Effective sample size", keys=("correction/ess",)),
            Panel(title="Tokens kept", keys=("correction/kept_frac",)),
            Panel(title="Weights", keys=("correction/weight_max", "correction/weight_mean", "correction/weight_min")),
            Panel(
                title="k3 of kept and rejected tokens", keys=("correction/k3_kept", "correction/k3_rejected"), log=True
            ),
        ),
    ),
    Section(
        title="Rewards",
        about="What is learned. Groups whose rewards are all equal teach nothing.",
        panels=(
            Panel(title="Mean reward", keys=("reward/mean",)),
            Panel(title="Held-out accuracy", keys=("eval/accuracy",)),
            Panel(title="Spread", keys=("reward/std", "reward/frac_zero_std_groups")),
            Panel(title="Components", regex="reward/[^/]+/mean"),
            Panel(title="Length of the completions", keys=("rollout/length_mean",)),
            Panel(title="Cut off by max_tokens", keys=("rollout/truncated_frac",)),
        ),
    ),
    Section(
        title="Reward calibration",
        about="Reward models against the verifier on the same samples. State: 2 drift, 1 warn, 0 ok, -1 too few labels.",
        panels=(
            Panel(title="Promise and verifier", regex="reward/drift/.+/(expected|observed)"),
            Panel(title="Promise minus verifier", regex="reward/drift/.+/gap"),
            Panel(title="Calibration error, debiased", regex="reward/drift/.+/ece"),
            Panel(title="AUROC", regex="reward/drift/.+/auroc"),
            Panel(title="State", regex="reward/drift/.+/state"),
        ),
        shut=True,
    ),
    Section(
        title="Staleness",
        about="Versions between the trainer and what sampled a token, and the oldest keys and values the token attended to.",
        panels=(
            Panel(title="Age of tokens", keys=("staleness/policy/mean", "staleness/policy/max")),
            Panel(title="Age of keys and values", keys=("staleness/kv/mean", "staleness/kv/max")),
            Panel(title="Movement inside a step, k1", keys=("train/k1_old",)),
        ),
    ),
    Section(
        title="Alerts",
        about="Alerts of the rules and monitors so far; their messages are wandb alerts of the run, and in its events.jsonl.",
        panels=(Panel(title="Alerts since the start", keys=("events/alerts",)),),
    ),
    Section(
        title="Phases",
        about="Seconds of each phase of a step. Asynchronous schedules sample while they train: rollout is then the wait for them.",
        panels=(
            Panel(title="Seconds per step", regex=PHASES, stacked=True),
            Panel(title="Whole step, s", keys=("time/step_s",)),
            Panel(title="Sampling, tokens/s", keys=("rollout/tokens_per_s",)),
        ),
    ),
    Section(
        title="Publish",
        about="Weights on their way to the engine; a tensor that had to be repaired did not arrive by the ordinary path.",
        panels=(
            Panel(title="Seconds", keys=("publish/seconds",)),
            Panel(title="Bytes", keys=("publish/bytes",)),
            Panel(title="Repaired tensors", keys=("publish/repaired",)),
            Panel(title="Head rebuilds", keys=("publish/rebuilds",)),
        ),
        shut=True,
    ),
    Section(
        title="Head",
        about="Both heads on the same hidden states, and each against float64: the projection alone.",
        panels=(
            Panel(title="k3 of the heads", keys=("head_isolated/k3",), log=True),
            Panel(
                title="Distance from float64",
                keys=("head_isolated/rollout_error", "head_isolated/trainer_error"),
                log=True,
            ),
        ),
        shut=True,
    ),
)


def keys() -> set[str]:
    """Every key that a panel names."""
    return {key for section in SECTIONS for panel in section.panels for key in panel.keys}


def patterns() -> set[str]:
    """Every pattern that a panel matches keys with."""
    return {panel.regex for section in SECTIONS for panel in section.panels if panel.regex}


def tables() -> set[str]:
    """Every table that a panel shows."""
    return {panel.table for section in SECTIONS for panel in section.panels if panel.table}
