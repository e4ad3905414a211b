"""The commands (train, doctor, parity, mismatch, calibrate, serve, report), and the one place where errors become exit codes."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlalign.diagnose.attribution import command as attribute_command
from rlalign.diagnose.parity import command as parity_command
from rlalign.exits import INTERRUPTED, REQUEUE, Preempted
from rlalign.install_check import require_working
from rlalign.reward.server import command as serve_command

if TYPE_CHECKING:
    from omegaconf import DictConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0: fine; 1: the check or the run failed; 2: wrong usage or configuration; 75: a signal ended the run, which is saved; 130:
    interrupted.
    """
    set_environment()
    arguments = _parser().parse_args(argv)
    try:
        require_working()
        return arguments.run(arguments)
    except Preempted as end:
        print(f"rlalign: {end}", file=sys.stderr)
        return REQUEUE
    except KeyboardInterrupt:
        print("rlalign: interrupted; what was logged so far is in the run directory", file=sys.stderr)
        return INTERRUPTED
    except ValueError as error:
        print(f"rlalign: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, OSError) as error:
        print(f"rlalign: {error}", file=sys.stderr)
        return 1


def set_environment() -> None:
    """What must be said before torch, vLLM and DeepSpeed load. Nothing that the user has set is changed."""
    # Read by the OpenMP runtime when it loads: spinning threads make two busy cores about five times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Start-up chatter of the libraries hides the progress of the run; their warnings and errors still come through.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(vllm|deepspeed)\.")


def compose(config_name: str, overrides: Sequence[str]) -> DictConfig:
    """The shipped Hydra configuration with overrides applied. Raises ValueError with one readable line."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    register_schema()
    try:
        with initialize_config_module("rlalign.configs", version_base="1.3"):
            return hydra_compose(config_name, overrides=list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(f"configuration: {_readable(error)}") from error


def _readable(error: Exception) -> str:
    """The first line that says something: Hydra keeps the reason in the cause and appends search paths and advice."""
    what = str(error).split("Config search path")[0].split("To append to your config")[0]
    why = str(error.__cause__ or "").split("\n")[0]
    return f"{' '.join(what.split()).rstrip('.')}{': ' if why else ''}{why}"


def register_schema() -> None:
    """Give Hydra the dataclasses, so that unknown keys and wrong types are refused while composing."""
    from hydra.core.config_store import ConfigStore

    from rlalign.config import RunConfig

    ConfigStore.instance().store(name="schema", node=RunConfig)


def _train(arguments: argparse.Namespace) -> int:
    from rlalign.config import load
    from rlalign.train import train

    train(load(compose(arguments.config_name, arguments.overrides)))
    return 0


def _parity(arguments: argparse.Namespace) -> int:
    from rlalign.config import load

    return parity_command.run(load(compose(arguments.config_name, arguments.overrides)), arguments)


def _doctor(arguments: argparse.Namespace) -> int:
    from rlalign.config import load
    from rlalign.diagnose import doctor

    checks = doctor.examine(load(compose(arguments.config_name, arguments.overrides)))
    print(doctor.report(checks))
    if arguments.json:
        arguments.json.write_text(doctor.as_json(checks))
    return 1 if any(check.state == "problem" for check in checks) else 0


def _attribute(arguments: argparse.Namespace) -> int:
    from rlalign.config import load

    return attribute_command.run(lambda: load(compose(arguments.config_name, arguments.overrides)), arguments)


def _replay(arguments: argparse.Namespace) -> int:
    from rlalign.diagnose import replay
    from rlalign.tracking.files import write_json

    found = replay.replay(arguments.run_directory, arguments.step, any_version=arguments.any_version)
    print(replay.report(found))
    if arguments.json:
        write_json(arguments.json, replay.as_json(found))
    return 0 if found.reproduced else 1


def _mismatch(arguments: argparse.Namespace) -> int:
    from rlalign.diagnose import offline

    return offline.run(
        arguments.file,
        columns=arguments.column,
        plot=arguments.plot,
        json_path=arguments.json,
        k3_limit=arguments.k3_limit,
        worst=arguments.worst,
    )


def _calibrate(arguments: argparse.Namespace) -> int:
    from rlalign.reward.calibration import command as calibration_command
    from rlalign.reward.calibration.file import ModelIdentity

    model = ModelIdentity(id=arguments.model, revision=arguments.revision, head_dtype=arguments.head_dtype)
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
            **outputs,
        )
    except TypeError as error:  # pairs with a method that has no scale to fit
        raise ValueError(str(error)) from error


def _report(arguments: argparse.Namespace) -> int:
    from rlalign.tracking.report import write_report

    out = arguments.out or (arguments.runs[0] / "report.html" if len(arguments.runs) == 1 else Path("report.html"))
    print(write_report(arguments.runs, out))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rlalign", description="Make the rollout engine and the trainer agree.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="run a configuration")
    _takes_config(train, default="train")
    train.set_defaults(run=_train)

    parity = commands.add_parser(
        "parity", help="the same tokens through both engines: {model, float32} head on each side"
    )
    _takes_config(parity, default="demo")
    parity_command.add_options(parity)
    parity.set_defaults(run=_parity)

    doctor = commands.add_parser("doctor", help="is this run set up right? Checks the configuration and a live engine")
    _takes_config(doctor, default="demo")
    doctor.add_argument("--json", type=Path, metavar="FILE", help="write the checks as JSON")
    doctor.set_defaults(run=_doctor)

    attribute = commands.add_parser(
        "attribute",
        help="which layer, and which step of it, the mismatch comes from: both sides captured point by point",
    )
    _takes_config(attribute, default="demo")
    attribute_command.add_options(attribute)
    attribute.set_defaults(run=_attribute)

    replay = commands.add_parser(
        "replay", help="one logged step once more: do both sides still give the logged numbers?"
    )
    replay.add_argument("run_directory", type=Path, metavar="RUN", help="trained with tracking.replay_every=N")
    replay.add_argument("--step", type=int, required=True, metavar="N")
    replay.add_argument("--any-version", action="store_true", help="also with other library versions than the run's")
    replay.add_argument("--json", type=Path, metavar="FILE", help="write the answers as JSON")
    replay.set_defaults(run=_replay)

    offline = commands.add_parser("mismatch", help="the mismatch report of a run you already have, from its token dump")
    offline.add_argument(
        "file", type=Path, help="parquet or JSONL: ours, prime-rl's token export, verl's or TRL's dumps"
    )
    offline.add_argument(
        "--column", action="append", default=[], metavar="FIELD=NAME", help="name a column; repeatable"
    )
    offline.add_argument("--worst", type=int, default=10, help="worst tokens to list (default %(default)s)")
    offline.add_argument("--plot", type=Path, metavar="FILE", help="write the plots as PNG or SVG")
    offline.add_argument("--json", type=Path, metavar="FILE", help="write every number as JSON")
    offline.add_argument("--k3-limit", type=float, help="exit 1 when k3 is over it")
    offline.set_defaults(run=_mismatch)

    calibrate = commands.add_parser("calibrate", help="fit a calibration of reward scores, or judge one (report FILE)")
    calibrate.add_argument("positional", nargs="*", metavar="report FILE", help="judge an existing calibration file")
    calibrate.add_argument(
        "--scores", type=Path, metavar="FILE", help="JSONL of scores and labels, or of chosen and rejected"
    )
    calibrate.add_argument(
        "--method", default="platt", help="platt | temperature | isotonic | beta | identity (default %(default)s)"
    )
    calibrate.add_argument("--out", type=Path, metavar="FILE", help="where the calibration goes")
    calibrate.add_argument("--plot", type=Path, metavar="FILE", help="reliability diagram")
    calibrate.add_argument("--json", type=Path, metavar="FILE", help="write every number as JSON")
    calibrate.add_argument("--folds", type=int, default=5, help="of the cross-fitted numbers (default %(default)s)")
    calibrate.add_argument("--seed", type=int, default=0)
    calibrate.add_argument("--model", help="what produced the scores; checked whenever the file is used")
    calibrate.add_argument("--revision")
    calibrate.add_argument("--head-dtype")
    calibrate.set_defaults(run=_calibrate)

    serve = commands.add_parser(
        "serve", help="a reward model behind HTTP: SGLang's, vLLM's and OpenRLHF's shapes, calibrated"
    )
    serve_command.add_options(serve)
    serve.set_defaults(run=serve_command.run)

    report = commands.add_parser("report", help="one HTML page from one run, or from several side by side")
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    report.add_argument("--out", type=Path, help="default: RUN/report.html, or report.html for several runs")
    report.set_defaults(run=_report)
    return parser


def _takes_config(parser: argparse.ArgumentParser, *, default: str) -> None:
    parser.add_argument(
        "--config-name", default=default, help="a configuration that ships with rlalign (default %(default)s)"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="Hydra overrides, such as algo.lr=1e-5 task=addition"
    )


if __name__ == "__main__":
    sys.exit(main())
