"""`rlalign attribute`: options, the two sides, the outputs, the exit status."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlalign.tracking.files import ATTRIBUTION, write_json

if TYPE_CHECKING:
    from rlalign.config import RunConfig
    from rlalign.diagnose.attribution.findings import Attribution
    from rlalign.diagnose.attribution.mapping import Pairs
    from rlalign.diagnose.attribution.sources import Source
    from rlalign.rollout.engine.embedded import VLLMEngine
    from rlalign.rollout.engine.teacher_forcing import Route
    from rlalign.types import RolloutBatch

ROUTES = ("prefill", "decode")
CHUNK = 16  # tokens prefilled at once by the engine that measures the floor of chunking


def add_options(parser: argparse.ArgumentParser) -> None:
    """Everything besides the configuration."""
    add = parser.add_argument
    add(
        "--run",
        type=Path,
        metavar="DIR",
        dest="run_directory",
        help="tokens and configuration of this run, not of the options",
    )
    add("--step", type=int, metavar="N", help="of the run (default: the last one it saved)")
    add(
        "--prompt-file",
        type=Path,
        metavar="FILE",
        help="prompts of your own: text, one a line, or JSONL (prompt, token_ids)",
    )
    add("--prompts", type=int, default=16, help="prompts to sample from (default %(default)s)")
    add("--samples", type=int, default=2, help="completions of each (default %(default)s)")
    add("--tokens", type=int, default=2048, help="tokens in all, prompts included (default %(default)s)")
    add("--route", choices=(*ROUTES, "both"), default="both", help="prefill, decode, or both (default)")
    add("--mapping", type=Path, metavar="FILE", help="pairs of modules in place of those that are found out (YAML)")
    add("--rows", type=int, default=0, help="sequences in one forward of the trainer (default: the run's micro-batch)")
    add("--exact", action="store_true", help="as exact=true, also for --run: equal in every bit, on the CPU, and slow")
    add("--no-patch", action="store_true", help="leave out logprob attribution, two forwards a layer")
    add("--no-chunked", action="store_true", help="leave out the second engine that measures the floor of chunking")
    add("--any-weights", action="store_true", help="go on although the two sides hold different weights")
    add(
        "--all-points",
        action="store_true",
        help="print every point, not only the usual ones and those over their floor",
    )
    add("--html", type=Path, metavar="FILE", help="the page (default: RUN/attribution.html or ./attribution.html)")
    add(
        "--json",
        type=Path,
        metavar="FILE",
        help=f"write every number as JSON; with --run also RUN/{ATTRIBUTION}, for its report",
    )
    add(
        "--budget",
        action="append",
        metavar="FORMAT",
        help="instead: k3 that a body in this format costs (fp8_tensor, fp8_channel, fp8_block, mxfp8, nvfp4); repeatable",
    )
    add("--kv-cache", default="", metavar="FORMAT", help="with --budget: of keys and values, fp8 or fp8_per_token_head")
    add("--scratch", type=Path, metavar="DIR", help="where activations lie meanwhile (default: the temporary folder)")


def run(config: Callable[[], RunConfig], arguments: argparse.Namespace) -> int:
    """Measure, print, write. 1 when a step by itself is over its noise floor. config: composed only when no run is given."""
    from rlalign.diagnose.attribution import report, sources

    if arguments.run_directory is not None:
        if arguments.overrides or arguments.prompt_file:
            raise ValueError("--run brings its own configuration and tokens; leave out overrides and --prompt-file")
        source = sources.of_run(arguments.run_directory, arguments.step, arguments.tokens)
    elif arguments.step is not None:
        raise ValueError("--step names a step of a run; give the run with --run DIR")
    else:
        source = sources.of_config(config())
    if arguments.budget:
        return _budget(source, arguments)
    if arguments.kv_cache:
        raise ValueError(
            f"--kv-cache {arguments.kv_cache} is of a budget; name the body's format too, with --budget FORMAT"
        )
    found, notes = _measured(source, arguments)
    print(report.text(found, every=arguments.all_points))
    for note in notes:
        print(f"note: {note}")
    out = arguments.html or (arguments.run_directory or Path()) / "attribution.html"
    print(f"page: {report.write(found, notes, out)}")
    in_run = arguments.run_directory and arguments.run_directory / ATTRIBUTION
    for file in filter(None, (arguments.json, in_run)):
        write_json(file, found.as_json() | {"notes": list(notes)})
    return 1 if found.first_over_floor else 0


def _budget(source: Source, arguments: argparse.Namespace) -> int:
    """Print and write what each format costs. A live engine only samples, and only where the source brings no tokens."""
    from rlalign.diagnose.attribution import budget
    from rlalign.diagnose.both_sides import trainer_network
    from rlalign.run.assembly import start_embedded
    from rlalign.tracking.console import Stages
    from rlalign.trainer.fake_quantised import Recipe

    for name in arguments.budget:
        Recipe(weights=name, kv=arguments.kv_cache)  # unknown names before anything is loaded
    with Stages("budget") as stages:
        batch = source.batch
        if batch is None:
            stages.stage("starting vLLM, for tokens")
            engine = start_embedded(source.model, source.config)
            try:
                batch = _sampled(engine, source, arguments)
            finally:
                engine.close()
        stages.stage("loading the trainer's model")
        network = trainer_network(source.model, source.config.model.dtype.value)
        found = [
            budget.measure(
                network, batch, format=name, kv=arguments.kv_cache, by_layer=not arguments.no_patch, say=stages.stage
            )
            for name in dict.fromkeys(arguments.budget)
        ]
    print("\n\n".join(budget.text(one) for one in found))
    for note in source.notes:
        print(f"note: {note}")
    if arguments.json:
        write_json(arguments.json, {"budgets": [one.as_json() for one in found], "notes": list(source.notes)})
    return 0


def _sampled(engine: VLLMEngine, source: Source, arguments: argparse.Namespace) -> RolloutBatch:
    from rlalign.diagnose.attribution import sources

    return sources.sampled(
        engine, source, prompt_file=arguments.prompt_file, prompts=arguments.prompts,
        samples=arguments.samples, tokens=arguments.tokens,
    )  # fmt: skip


def _measured(source: Source, arguments: argparse.Namespace) -> tuple[Attribution, list[str]]:
    from rlalign.diagnose.attribution.mapping import read_pairs
    from rlalign.rollout.engine.teacher_forcing import Route
    from rlalign.tracking.console import Stages

    config, changed = _adjusted(source.config, exact=arguments.exact)
    pairs = read_pairs(arguments.mapping) if arguments.mapping else None
    routes = [Route(r) for r in ROUTES if arguments.route in (r, "both")]
    total = 5 + 2 * (not arguments.no_chunked) + len(routes) * (3 - arguments.no_patch)
    with Stages("attribute", total) as stages:
        found, notes = _both_sides(source, config, arguments, routes, pairs, stages.stage)
    return found, [*source.notes, *changed, *notes]


def _both_sides(
    source: Source,
    config: RunConfig,
    arguments: argparse.Namespace,
    routes: Sequence[Route],
    pairs: Pairs | None,
    say: Callable[[str], None],
) -> tuple[Attribution, list[str]]:
    """Start what is needed, sample where the source brings no tokens, prove the weights equal, measure."""
    from dataclasses import replace

    from rlalign.diagnose.attribution.measure import measure
    from rlalign.diagnose.attribution.sources import require_same_weights
    from rlalign.diagnose.both_sides import trainer_network
    from rlalign.run.assembly import start_embedded

    say("loading the trainer's model")
    network = trainer_network(source.model, config.model.dtype.value, exact=config.exact)
    engines: list[VLLMEngine] = []
    try:
        say("starting vLLM")
        engines.append(start_embedded(source.model, config))
        say("tokens, and whether both sides hold the same weights")
        batch = source.batch
        if batch is None:
            batch = _sampled(engines[0], source, arguments)
        notes = require_same_weights(engines[0], network, Path(config.weights.shared), anyway=arguments.any_weights)
        if not arguments.no_chunked:
            say("starting a second vLLM with another chunking")
            small = replace(config.rollout, max_num_batched_tokens=CHUNK, max_num_seqs=CHUNK)
            engines.append(start_embedded(source.model, replace(config, rollout=small)))
        found = measure(
            engines[0],
            network,
            batch,
            routes=routes,
            pairs=pairs,
            chunked=engines[1] if len(engines) > 1 else None,
            rows=arguments.rows or min(config.trainer.micro_batch_size, len(batch)),
            patch=not arguments.no_patch,
            scratch=arguments.scratch,
            say=say,
        )
        return found, notes
    finally:
        for engine in engines:
            engine.close()


def _adjusted(config: RunConfig, *, exact: bool) -> tuple[RunConfig, list[str]]:
    """The run's configuration as it can be attributed, and what was changed. Raises ValueError where exact mode cannot be."""
    from dataclasses import replace

    from rlalign.config import HeadDtype

    notes = []
    if config.head_dtype is HeadDtype.master:
        config = replace(config, head_dtype=HeadDtype.float32)
        notes.append(
            "the run's head is the unrounded master; both sides are attributed with its rounded weight in float32"
        )
    if not config.rollout.enforce_eager:
        config = replace(config, rollout=replace(config.rollout, enforce_eager=True))
        notes.append(
            "the run's engine is compiled; attribution runs it eagerly, since hooks see nothing of a compiled model"
        )
    config = replace(config, exact=config.exact or exact)
    if config.exact:
        notes.append(
            "exact mode: linear layers, lm_head, norms, rope and attention of both sides are those of rlalign.head.exact"
        )
    return config, notes
