"""`rlalign parity`: options, printing, exit status."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rlalign.diagnose.parity import grid

if TYPE_CHECKING:
    from rlalign.config import RunConfig


def add_options(parser: argparse.ArgumentParser) -> None:
    """Everything besides the configuration."""
    add = parser.add_argument
    add("--json", type=Path, metavar="FILE", help="write every number as JSON; a later run's --baseline")
    add(
        "--k3-limit",
        type=float,
        help="exit 1 when k3 of equal float32 or master heads is over it (default: over what rounding explains, measured)",
    )
    add(
        "--head-limit",
        type=float,
        help="exit 1 when such a head alone is further from float64, mean nats (default: a twentieth of a bf16 head's error)",
    )
    add("--baseline", type=Path, metavar="FILE", help="exit 1 when a figure is worse than in this file of --json")
    add(
        "--tolerance",
        type=float,
        default=1.5,
        help="how much worse than the baseline is too much (default %(default)s)",
    )
    add("--body", action="append", choices=("bfloat16", "float32"), help="body dtype; repeatable (default both)")
    add("--prompts", type=int, default=32, help="training prompts to sample from (default %(default)s)")
    add(
        "--prompt-file",
        type=Path,
        metavar="FILE",
        help="prompts of your own: text, one a line, or JSONL (prompt, token_ids)",
    )
    add("--noise-floor", action="store_true", help="also measure the rollout engine against itself, source by source")
    add("--mode", action="append", choices=grid.MODES[1:], help="a rollout head besides the run's own; repeatable")
    add("--tensor-parallel", action="append", type=int, metavar="N", help="engine ranks; repeatable (default 1)")
    add("--temperature", action="append", type=float, metavar="T", help="also decode at this temperature; repeatable")
    add("--batch", action="append", type=int, metavar="N", help="also with N sequences at once; repeatable")
    add("--context", action="append", type=int, metavar="N", help="also after prompts of N tokens; repeatable")
    add(
        "--full",
        action="store_true",
        help="all modes, TP 1 and 2, T 1 and 0.6, batches of 1/4/16, long prompts, noise floor",
    )


def run(config: RunConfig, arguments: argparse.Namespace) -> int:
    """Measure, print, write, judge. 1 when a limit is passed or something is worse than the baseline."""
    from rlalign.diagnose.both_sides import model_folder
    from rlalign.diagnose.parity import baseline
    from rlalign.diagnose.parity.baseline import markdown
    from rlalign.diagnose.parity.measuring import measure

    before = baseline.read(arguments.baseline) if arguments.baseline else None
    if before is not None:
        baseline.check_same_model(before, model_folder(config))
    result = measure(config, grid_of(config, arguments), prompt_file=arguments.prompt_file)
    print(markdown(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2))
    failures = over_limit(result, arguments.k3_limit, head_limit=arguments.head_limit)
    if before is not None:
        if changed := baseline.changed_versions(result, before):
            print(f"since the baseline: {changed}")
        failures += baseline.regressions(result, before, tolerance=arguments.tolerance)
    for line in failures:
        print(f"rlalign: {line}", file=sys.stderr)
    return 1 if failures else 0


def grid_of(config: RunConfig, arguments: argparse.Namespace) -> grid.Grid:
    """The grid that the options ask for."""
    contexts, full, exact = arguments.context or [], arguments.full, config.exact
    if exact and arguments.mode:
        raise ValueError(f"parity: exact=true has a head of its own; leave out --mode {' '.join(arguments.mode)}")
    if full and not contexts:
        from rlalign.diagnose.both_sides import model_folder
        from rlalign.diagnose.parity.measuring import longest_context

        contexts = [longest_context(model_folder(config), config.rollout.max_tokens, grid.LONGEST)]
    return grid.Grid(
        bodies=tuple(dict.fromkeys(arguments.body or ("bfloat16", "float32"))),
        tensor_parallel=tuple(arguments.tensor_parallel or (grid.FULL_TENSOR_PARALLEL if full and not exact else (1,))),
        modes=tuple(arguments.mode or (grid.MODES[1:] if full and not exact else ())),
        settings=grid.settings(
            temperatures=arguments.temperature or (grid.FULL_TEMPERATURES if full else ()),
            batches=arguments.batch or (grid.FULL_BATCHES if full else ()),
            contexts=contexts,
        ),
        noise_floor=arguments.noise_floor or full,
        prompts=arguments.prompts,
    )


def over_limit(result: dict, k3_limit: float | None = None, *, head_limit: float | None = None) -> list[str]:
    """One line for every pair of equal heads, both float32 or both master, that is further apart than it may be.

    The whole model: over k3_limit, or without one over what rounding explains (`body_rounding`). The head alone, which a bf16 body
    hides: a side further from float64 than float32 rounding, or than head_limit. In exact mode every token must be equal. NaN is
    over all.
    """
    from rlalign.diagnose import body_rounding
    from rlalign.diagnose.parity.baseline import name_of

    found = []
    for row in [*result["rows"], *result["settings"]]:
        if row["mode"] == "exact" and row["abs_max"] != 0.0:
            found.append(f"{name_of(row)}: a token is {row['abs_max']:.3g} nats off; exact mode allows none")
        elif not _ours(row) or row["mode"] == "exact":
            continue
        elif k3_limit is None and (why := body_rounding.over(row)):
            found.append(f"{name_of(row)}: {why}")
        elif k3_limit is not None and not row["k3"] <= k3_limit:
            found.append(f"{name_of(row)}: k3 = {row['k3']:.3g} nats/token is over the limit {k3_limit:.3g}")
    for row in result["head_isolated"]:
        if _ours(row) and (why := body_rounding.heads_over(row, head_limit)):
            found.append(f"head in isolation, {name_of(row)}: {why}")
    return found


def _ours(row: dict) -> bool:
    return row["rollout_head"] == row["trainer_head"] != "model"
