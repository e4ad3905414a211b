"""The commands of `rlalign`: their options, and which function each of them runs."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rlalign.commands import attribute as attribute_command
from rlalign.commands import parity as parity_command
from rlalign.commands import rollout_server as rollout_command
from rlalign.commands import serve as serve_command
from rlalign.config import compose, load
from rlalign.report import dashboard

if TYPE_CHECKING:
    from rlalign.config import RunConfig
    from rlalign.diagnose.families.family_table import Cell


def _config(arguments: argparse.Namespace) -> RunConfig:
    return load(compose(arguments.config_name, arguments.overrides))


def _train(arguments: argparse.Namespace) -> int:
    from rlalign.run.train import train

    train(_config(arguments))
    return 0


def _rollout_server(arguments: argparse.Namespace) -> int:
    from rlalign.run import assembly

    arguments.overrides, options = rollout_command.split(arguments.overrides)
    config = _config(arguments)
    return rollout_command.run(config, assembly.resolve_model(config.model.path), arguments, options)


def _parity(arguments: argparse.Namespace) -> int:
    return parity_command.run(_config(arguments), arguments)


def _doctor(arguments: argparse.Namespace) -> int:
    from rlalign.diagnose import doctor

    if arguments.engine and not arguments.model:
        raise ValueError(f"--engine {arguments.engine}: say with --model DIR which folder it should be serving")
    if arguments.model:
        arguments.overrides = [*arguments.overrides, f"model.path={arguments.model}"]
    config = _config(arguments)
    checks = doctor.examine_engine(config, arguments.engine) if arguments.engine else doctor.examine(config)
    print(doctor.report(checks))
    if arguments.json:
        arguments.json.write_text(doctor.as_json(checks))
    return 1 if any(check.state == "problem" for check in checks) else 0


def _attribute(arguments: argparse.Namespace) -> int:
    return attribute_command.run(lambda: _config(arguments), arguments)


def _calibrate_tokens(arguments: argparse.Namespace) -> int:
    from rlalign.calibration.adaptive import Objective, Training
    from rlalign.commands.calibrate_tokens import Options, calibrate_tokens

    options = Options(
        head=arguments.head,
        objective=Objective(loss=arguments.loss, alpha=arguments.alpha),
        level=arguments.level,
        training=Training(epochs=arguments.epochs, seed=arguments.seed),
        batch_size=arguments.batch_size,
        chat=arguments.chat_template,
        dtype=arguments.dtype,
    )
    outputs = {"revision": arguments.revision, "plot": arguments.plot, "json_path": arguments.json}
    return calibrate_tokens(arguments.model, arguments.data, arguments.out, options, **outputs)


def _replay(arguments: argparse.Namespace) -> int:
    from rlalign.diagnose import replay
    from rlalign.tracking.files import write_json

    found = replay.replay(arguments.run_directory, arguments.step, any_version=arguments.any_version)
    print(replay.report(found))
    if arguments.json:
        write_json(arguments.json, replay.as_json(found))
    return 0 if found.reproduced else 1


def _mismatch(arguments: argparse.Namespace) -> int:
    """1 when k3 is over --k3-limit, or undefined."""
    from rlalign.diagnose import offline

    pairs = [pair.partition("=") for pair in arguments.column]
    if wrong := ["".join(p) for p in pairs if not (p[0] and p[2])]:
        raise ValueError(f"--column takes field=name, got {wrong}")
    columns = {name: column for name, _, column in pairs}
    found = offline.analyse(arguments.file, columns=columns, worst=arguments.worst, all_tokens=arguments.all_tokens)
    print(offline.report(found))
    if arguments.json:
        arguments.json.write_text(json.dumps(offline.jsonable(found), indent=2, allow_nan=False))
    if arguments.plot:
        offline.write_plot(found, arguments.plot)
        print(f"\nplot: {arguments.plot}")
    k3, limit = found.overall["k3"], arguments.k3_limit
    if limit is not None and not k3 <= limit:
        undefined = "is undefined, which passes no limit" if k3 != k3 else "is over the limit"
        print(f"\nk3 = {k3:.3g} nats/token {undefined} {limit:g}")
        return 1
    return 0


def _families(arguments: argparse.Namespace) -> int:
    """Exit code 1 when a cell failed; one that is refused by name is an answer."""
    from rlalign.diagnose.families import family_table, matrix

    families = family_table.named(arguments.names)
    if arguments.list:
        print("\n".join(families))
        return 0
    columns = arguments.cells.split(",")
    if unknown := set(columns) - set(family_table.COLUMNS):
        raise ValueError(f"--cells: unknown {', '.join(sorted(unknown))}; there are {', '.join(family_table.COLUMNS)}")
    table = family_table.read(arguments.json) if arguments.json else {}

    def done(name: str, cells: dict[str, Cell]) -> None:
        table[name] = table.get(name, {}) | cells
        print(f"{name}: {'; '.join(f'{c} {found.state} {found.found}' for c, found in cells.items())}", flush=True)
        if arguments.json:
            family_table.write(table, arguments.json)

    found = matrix.examine(families, columns, timeout_s=arguments.timeout, say=done)
    ordered = {name: table[name] for name in family_table.RECIPES if name in table}
    if arguments.markdown:
        arguments.markdown.write_text(family_table.as_markdown(ordered) + "\n")
    print(family_table.as_markdown({name: ordered[name] for name in found}))
    return 1 if any(c.state == family_table.FAILED for cells in found.values() for c in cells.values()) else 0


def _calibrate(arguments: argparse.Namespace) -> int:
    from rlalign.calibration.calibrators.calibration_file import ModelIdentity
    from rlalign.commands import calibrate as calibration_command

    template = hashlib.sha256(arguments.template.read_bytes()).hexdigest() if arguments.template else None
    model = ModelIdentity(
        id=arguments.model, revision=arguments.revision, head_dtype=arguments.head_dtype, template_sha256=template
    )
    outputs = {"plot": arguments.plot, "json_path": arguments.json, "model": model}
    if arguments.positional:
        if arguments.positional[0] != "report" or len(arguments.positional) != 2:
            raise ValueError("rlalign calibrate takes --scores FILE --out FILE, or: report FILE")
        return calibration_command.report(Path(arguments.positional[1]), scores_file=arguments.scores, **outputs)
    if not (arguments.scores and arguments.out):
        raise ValueError("rlalign calibrate needs --scores FILE.jsonl and --out FILE.json")
    try:
        return calibration_command.calibrate(
            arguments.scores,
            method=arguments.method,
            out=arguments.out,
            folds=arguments.folds,
            seed=arguments.seed,
            soft_labels=arguments.soft_labels,
            allow_negative_scale=arguments.allow_negative_scale,
            **outputs,
        )
    except TypeError as error:  # pairs with a method that has no scale to fit
        raise ValueError(str(error)) from error


def _report(arguments: argparse.Namespace) -> int:
    from rlalign.report import write_report

    out = arguments.out or (arguments.runs[0] / "report.html" if len(arguments.runs) == 1 else Path("report.html"))
    print(write_report(arguments.runs, out))
    return 0


def _build_kernel(arguments: argparse.Namespace) -> int:
    from rlalign.head import kernel as head_kernel

    print(head_kernel.build(arguments.compiler))
    print(f"paths of this host: {', '.join(head_kernel.available()) or 'none (no AVX2); torch products are used'}")
    return 0


def parser() -> argparse.ArgumentParser:
    """All commands; each sets `run`, a function of the parsed arguments that returns the exit code."""
    whole = argparse.ArgumentParser(prog="rlalign", description="Make the rollout engine and the trainer agree.")
    commands = whole.add_subparsers(required=True, metavar="COMMAND")
    for name, about, config_name, add_options, run in COMMANDS:
        command = commands.add_parser(name, help=about)
        if config_name:
            command.add_argument(
                "--config-name",
                default=config_name,
                help="a configuration that ships with rlalign (default %(default)s)",
            )
            command.add_argument(
                "overrides", nargs="*", metavar="key=value", help="Hydra overrides, such as algo.lr=1e-5 task=addition"
            )
        if add_options:
            add_options(command)
        command.set_defaults(run=run)
    return whole


def _doctor_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the checks as JSON")
    parser.add_argument(
        "--engine",
        metavar="URL|MODULE:OBJECT",
        help="look at this engine, which another stack has started: a `vllm serve`, or a vllm.LLM or what returns one",
    )
    parser.add_argument("--model", type=Path, metavar="DIR", help="as model.path=DIR")


def _replay_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_directory", type=Path, metavar="RUN", help="trained with tracking.replay_every=N")
    parser.add_argument("--step", type=int, required=True, metavar="N")
    parser.add_argument("--any-version", action="store_true", help="also with other library versions than the run's")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the answers as JSON")


def _mismatch_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file",
        type=Path,
        help="a file, a directory or a glob of parquet, JSON (lines or array, .gz, .zst) or slime's .pt",
    )
    parser.add_argument("--column", action="append", default=[], metavar="FIELD=NAME", help="name a column; repeatable")
    parser.add_argument("--all-tokens", action="store_true", help="the dump has no mask and holds sampled tokens alone")
    parser.add_argument("--worst", type=int, default=10, help="worst tokens to list (default %(default)s)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write the plots as PNG or SVG")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number as JSON")
    parser.add_argument("--k3-limit", type=float, help="exit 1 when k3 is over it")


def _calibrate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("positional", nargs="*", metavar="report FILE", help="judge an existing calibration file")
    parser.add_argument(
        "--scores", type=Path, metavar="FILE", help="JSONL of scores and labels, or of chosen and rejected"
    )
    parser.add_argument(
        "--method", default="platt", help="platt | temperature | isotonic | beta | identity (default %(default)s)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the calibration goes")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="reliability diagram")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number as JSON")
    parser.add_argument("--folds", type=int, default=5, help="of the cross-fitted numbers (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--soft-labels", action="store_true", help="labels are rates in [0, 1]")
    parser.add_argument("--allow-negative-scale", action="store_true", help="platt: high scores may mean failure")
    parser.add_argument("--model", help="what produced the scores; checked whenever the file is used")
    parser.add_argument("--revision")
    parser.add_argument("--head-dtype")
    parser.add_argument("--template", type=Path, metavar="FILE", help="the chat template; its hash is checked")


def _families_options(parser: argparse.ArgumentParser) -> None:
    """Which families, which cells, where the table goes."""
    from rlalign.diagnose.families.family_table import COLUMNS

    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="families (default: all)")
    add("--list", action="store_true", help="print their names and end")
    add(
        "--cells",
        default=",".join(c for c in COLUMNS if c != "TP 2"),
        metavar="A,B",
        help=f"of {', '.join(COLUMNS)} (default: without TP 2)",
    )
    add("--timeout", type=float, default=600.0, metavar="S", help="of one process (default %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write the table as JSON; families that it holds already are kept")
    add("--markdown", type=Path, metavar="FILE", help="write the table as Markdown")


def _report_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, help="default: RUN/report.html, or report.html for several runs")


def _kernel_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--compiler", metavar="CC", help="default: $CC, gcc, clang or cc")


def _calibrate_tokens_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL", help="a Hugging Face folder")
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="JSONL of prompt and completion")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON; the weights go beside it")
    parser.add_argument("--head", default="transformer", choices=["constant", "linear", "mlp", "transformer"])
    parser.add_argument(
        "--loss", default="top_label", help="top_label | selective | cross_entropy | label_smoothing | uniform"
    )
    parser.add_argument("--alpha", type=float, default=0.5, help="of the selective loss (default %(default)s)")
    parser.add_argument("--level", default="token", choices=["token", "sequence"])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=16, help="sequences (default %(default)s)")
    parser.add_argument("--dtype", default="auto", help="auto | float32 | bfloat16")
    parser.add_argument("--chat-template", action="store_true")
    parser.add_argument("--revision")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, metavar="FILE")
    parser.add_argument("--json", type=Path, metavar="FILE")


Command = tuple[str, str, str, Callable[[argparse.ArgumentParser], None] | None, Callable[[argparse.Namespace], int]]
COMMANDS: tuple[Command, ...] = (  # name, help, the configuration it takes by default, its own options, what it runs
    ("train", "run a configuration", "train", None, _train),
    ("rollout-server", "vLLM's HTTP server for a run with rollout.backend=server; vLLM's own options after --", "train",
     rollout_command.add_options, _rollout_server),
    ("attach-check", "which head a living vLLM server runs on every rank, and whether it holds a folder's weights", "",
     rollout_command.add_check_options, rollout_command.check),
    ("parity", "the same tokens through both engines: {model, float32} head on each side", "demo",
     parity_command.add_options, _parity),
    ("doctor", "is this run set up right? Checks the configuration and a live engine", "demo", _doctor_options, _doctor),
    ("attribute", "which layer, and which step of it, the mismatch comes from: both sides captured point by point", "demo",
     attribute_command.add_options, _attribute),
    ("families", "tiny random models of each model family through everything: what works, what is refused and why", "",
     _families_options, _families),
    ("replay", "one logged step once more: do both sides still give the logged numbers?", "", _replay_options, _replay),
    ("mismatch", "the mismatch report of a run you already have, from its token dump", "", _mismatch_options, _mismatch),
    ("calibrate", "fit a calibration of reward scores, or judge one (report FILE)", "", _calibrate_options, _calibrate),
    ("calibrate-tokens", "token confidence: a temperature per token", "", _calibrate_tokens_options, _calibrate_tokens),
    ("serve", "a reward model behind HTTP: SGLang's, vLLM's and OpenRLHF's shapes, calibrated", "",
     serve_command.add_options, serve_command.run),
    ("report", "one HTML page from one run, or from several side by side", "", _report_options, _report),
    ("dashboard", "the mismatch workspace and a report of a wandb project, as code", "", dashboard.add_options, dashboard.run),
    ("build-kernel", "compile the float32 head for x86-64 CPUs (AVX2, AVX-512, AMX): no copy of the weight, and fast", "",
     _kernel_options, _build_kernel),
)  # fmt: skip
