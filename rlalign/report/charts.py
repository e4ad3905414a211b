"""Every chart, declared once: the page draws it from metrics.jsonl, and the wandb dashboard has it as a panel."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["SECTIONS", "Chart", "Section", "keys", "patterns", "tables"]

FLOOR = "mismatch/floor/k3"  # not logged: the page computes it as k3 at lag 0 minus mismatch/excess/k3
NATS = "nats per token, log scale"


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """Metrics over steps.

    note: unit, and how to read it. lines: {metric key: label}; keys with one label look alike, `*` is any name. markers: measured
    on some steps only. smooth: thin under a running mean. stacked: on top of each other. fewest: lines without which the page
    leaves it out. limit: the configuration's key of a line that values must stay under (page only: wandb has none).
    idle: the value of a quantity that never did anything, and active a (key, value) likewise; the page leaves such a chart out.
    table: a logged table instead of lines. in_table: on the page these numbers are a table, so only the dashboard draws them.
    """

    title: str
    note: str = ""
    lines: dict[str, str] = field(default_factory=dict)
    log: bool = False
    markers: bool = False
    smooth: bool = False
    stacked: bool = False
    fewest: int = 1
    limit: str = ""
    idle: float | None = None
    active: tuple[str, float] | None = None
    table: str = ""
    in_table: bool = False

    @property
    def keys(self) -> list[str]:
        """What is logged under one fixed name."""
        return [key for key in self.lines if not _is_pattern(key) and key != FLOOR]

    @property
    def regex(self) -> str:
        """Matches the metrics whose names are the user's; empty where there are none."""
        found = "|".join(key.replace("*", "[^/]+") for key in self.lines if _is_pattern(key))
        return f"^({found})$" if found else ""


@dataclass(frozen=True, slots=True)
class Section:
    """A section of the dashboard. about: how to read it, for wandb's report. shut: closed until someone asks."""

    title: str
    about: str
    charts: tuple[Chart, ...]
    shut: bool = False


def spread(room: str, *, markers: bool = False) -> Chart:
    """Mean, p99 and worst |log_ratio| in one chart."""
    lines = {f"{room}/abs_mean": "mean", f"{room}/p99": "p99", f"{room}/abs_max": "worst token"}
    return Chart(title="|log_ratio| per token", note="nats, log scale", lines=lines, log=True, markers=markers)


# fmt: off
CAUSES = (
    Chart(title="k3 by cause", note=NATS, log=True, lines={
        "mismatch/lag0/k3": "engine, lag 0", "staleness/k3": "staleness, lag 1 and more", FLOOR: "noise floor"}),
    Chart(title="Engine beyond the noise floor", note="k3, nats per token", lines={"mismatch/excess/k3": ""}),
)
LAG0 = (
    Chart(title="k3 at lag 0", note=NATS, log=True, lines={"mismatch/lag0/k3": ""}, limit="mismatch.k3_limit"),
    spread("mismatch/lag0"),
    Chart(title="Pearson of probabilities", note="1 where both sides agree", lines={"mismatch/lag0/pearson_prob": ""}),
    Chart(title="Tokens without a finite ratio", note="a step", lines={"mismatch/nonfinite": ""}, idle=0.0),
)
CORRECTIONS = (
    Chart(title="Effective sample size, tokens kept", note="shares of the masked tokens", idle=1.0, lines={
        "correction/ess": "effective sample size", "correction/kept_frac": "kept"}),
    Chart(title="Importance weights", note="of the kept tokens", idle=1.0, lines={
        "correction/weight_max": "largest", "correction/weight_mean": "mean", "correction/weight_min": "smallest"}),
    Chart(title="k3 of rejected and kept tokens", note=NATS, log=True, active=("correction/k3_rejected", float("nan")), lines={
        "correction/k3_rejected": "rejected", "correction/k3_kept": "kept"}),
    # Without weights every weight is 1, which is never the ratio.
    Chart(title="Ratios changed", note="share of tokens whose weight is not their ratio", idle=0.0,
          active=("correction/weight_max", 1.0), lines={"correction/changed_share": ""}),
)
REWARDS = (
    Chart(title="Mean reward", note="thin: each step; bold: running mean over a tenth", lines={"reward/mean": ""}, smooth=True),
    Chart(title="Held-out accuracy", note="mean reward on prompts never trained on", lines={"eval/accuracy": ""}, markers=True),
    Chart(title="Spread of the reward", note="groups of equal rewards teach nothing", lines={
        "reward/std": "standard deviation", "reward/frac_zero_std_groups": "share of such groups"}),
    Chart(title="Components", note="mean of each, calibrated", lines={"reward/*/mean": "*"}, fewest=2),
    Chart(title="Length of the completions", note="tokens, mean", lines={"rollout/length_mean": ""}),
    Chart(title="Cut off by max_tokens", note="share of the completions", lines={"rollout/truncated_frac": ""}, idle=0.0),
    Chart(title="Samples without a reward", note="a step", lines={"reward/failed": ""}, idle=0.0),
)
DRIFT = "reward/drift/*/"
CALIBRATION = (
    Chart(title="Promise and verifier", note="mean over the window", lines={
        f"{DRIFT}expected": "E[p]", f"{DRIFT}observed": "verifier"}),
    Chart(title="Promise minus verifier", note="range: 95 %", lines={
        f"{DRIFT}gap": "E[p] - E[y]", f"{DRIFT}gap_low": "range", f"{DRIFT}gap_high": "range"}),
    Chart(title="Calibration error", note="15 bins", lines={
        f"{DRIFT}ece": "debiased ECE", f"{DRIFT}ece_by_chance": "plain ECE by chance"}),
    Chart(title="Ranking", note="area under the ROC curve", lines={
        f"{DRIFT}auroc": "AUROC", f"{DRIFT}auroc_low": "range", f"{DRIFT}auroc_high": "range"}),
    Chart(title="State", note="2 drift, 1 warn, 0 ok, -1 too few labels", lines={f"{DRIFT}state": ""}),
)
STALENESS = (
    Chart(title="Age of the tokens", note="versions behind the trainer", idle=0.0, lines={
        "staleness/policy/mean": "mean", "staleness/policy/max": "oldest"}),
    Chart(title="Age of the keys and values", note="versions behind the trainer", idle=0.0, lines={
        "staleness/kv/mean": "mean", "staleness/kv/max": "oldest"}),
    Chart(title="Movement inside a step", note="k1 from old_logprobs to the policy being trained, nats", idle=0.0, lines={
        "train/k1_old": ""}),
)
SPEED = (Chart(title="Sampling speed", note="tokens per second of the rollout phase", lines={"rollout/tokens_per_s": ""}),)
PHASES = (
    Chart(title="Seconds per step", stacked=True, lines={
        "time/(rollout|probe|reward|score|train|wait|publish|other)_s": "*"}),
    Chart(title="Whole step, s", lines={"time/step_s": ""}, in_table=True),
)
PUBLISH = tuple(
    Chart(title=title, lines={f"publish/{name}": ""}, in_table=True) for name, title in {
        "seconds": "Seconds", "bytes": "Bytes", "repaired": "Repaired tensors", "rebuilds": "Head rebuilds"}.items()
)
HEAD = (
    Chart(title="k3 of the heads", note=NATS, log=True, markers=True, lines={"head_isolated/k3": ""}),
    spread("head_isolated", markers=True),
    Chart(title="Distance from float64", note=f"mean, {NATS}", log=True, markers=True, lines={
        "head_isolated/rollout_error": "rollout head", "head_isolated/trainer_error": "trainer head"}),
)
# fmt: on
WORST = Chart(title="Worst tokens", table="mismatch/worst_tokens", in_table=True)
ALERTS = Chart(title="Alerts since the start", lines={"events/alerts": ""}, in_table=True)

# fmt: off
SECTIONS = (
    Section("Mismatch: engine, staleness, floor",
        "At lag 0 nothing differs but the two engines; what older versions sampled is staleness; beyond the floor is what can be "
        "fixed. k3 in nats per token.", (*CAUSES, *LAG0, WORST)),
    Section("Corrections",
        "What importance weights and masks did about it. A falling effective sample size says that the correction hides a mismatch "
        "that should be fixed.", CORRECTIONS),
    Section("Rewards", "What is learned. Groups whose rewards are all equal teach nothing.", REWARDS),
    Section("Reward calibration",
        "Reward models against the verifier on the same samples. State: 2 drift, 1 warn, 0 ok, -1 too few labels.",
        CALIBRATION, shut=True),
    Section("Staleness",
        "Versions between the trainer and what sampled a token, and the oldest keys and values the token attended to.", STALENESS),
    Section("Alerts",
        "Alerts of the rules and monitors so far; their messages are wandb alerts of the run, and in its events.jsonl.", (ALERTS,)),
    Section("Phases",
        "Seconds of each phase of a step. Asynchronous schedules sample while they train: rollout is then the wait for them.",
        (*PHASES, *SPEED)),
    Section("Publish",
        "Weights on their way to the engine; a tensor that had to be repaired did not arrive by the ordinary path.",
        PUBLISH, shut=True),
    Section("Head", "Both heads on the same hidden states, and each against float64: the projection alone.", HEAD, shut=True),
)
# fmt: on


def every() -> list[Chart]:
    """The charts of all sections."""
    return [chart for section in SECTIONS for chart in section.charts]


def keys() -> set[str]:
    """Every metric that a panel names."""
    return {key for chart in every() for key in chart.keys}


def patterns() -> set[str]:
    """Every pattern that a panel matches metrics with."""
    return {chart.regex for chart in every()} - {""}


def tables() -> set[str]:
    """Every logged table that a panel shows."""
    return {chart.table for chart in every()} - {""}


def _is_pattern(key: str) -> bool:
    return "*" in key or "(" in key
