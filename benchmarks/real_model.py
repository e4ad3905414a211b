"""A model of your own through doctor, parity, attribution, three GRPO steps, a replay and exact mode: time and memory of each.

python -m benchmarks.real_model FOLDER [--out DIR]
python -m benchmarks.real_model --from-gguf FILE FOLDER        # make FOLDER from a GGUF first, once

Each phase is the public command in a process of its own, so its peak memory is its own. DIR/real_model.md and .json are written
after every phase; started again, finished phases are kept. Exit status 1: a phase did not finish; 2: it cannot be started.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.real_model_check import BATCHED, About, require_room, usable
from benchmarks.real_model_memory import Peak
from benchmarks.real_model_table import markdown
from rlalign.tracking import environment
from rlalign.tracking.console import Stages
from rlalign.tracking.files import write_json

QUESTIONS = Path(__file__).with_name("questions.jsonl")
PROMPTS, EXACT_PROMPTS, HELD_OUT, STEPS = 32, 8, 4, 3


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A command and the file that proves that it ran through. judges: exit status 1 is a finding, where that file was written."""

    name: str
    words: tuple[str, ...]
    result: Path
    judges: bool = True

    def command(self) -> list[str]:
        return [sys.executable, "-m", "rlalign.cli", *self.words]


def phases(about: About, out: Path, *, max_tokens: int, chosen: Sequence[str] = ()) -> list[Phase]:
    """All of them, or those chosen by name, on this model."""
    shared = [
        f"model.path={about.folder}",
        f"task.name=jsonl:{QUESTIONS}",
        "+task.params.match=last_number",
        f"task.train_size={PROMPTS}",
        f"task.eval_size={HELD_OUT}",
        f"task.chat_template={str(about.chat).lower()}",
        f"rollout.max_tokens={max_tokens}",
        f"rollout.max_model_len={256 + max_tokens}",
        "rollout.prompts_per_step=4",
        "rollout.group_size=4",
        "trainer.micro_batch_size=4",
        f"rollout.max_num_batched_tokens={BATCHED}",  # bounds vLLM's [tokens, vocabulary] when it scores prompts
        "mismatch.action=warn",  # the table says how far apart they are; stopping is for runs that matter
        f"output_dir={out / 'run'}",
    ] + ([] if about.on_gpu else ["rollout.enforce_eager=true", "rollout.max_num_seqs=64"])
    if not about.chat:
        shared.append("+task.params.template='Question: {prompt} Answer:'")
    config = ["--config-name", "train"]

    def asked(name: str, command: str, *options: str) -> Phase:
        file = out / f"{name}.json"
        return Phase(name=name, result=file, words=(command, *config, "--json", str(file), *options, *shared))

    few = ("--prompts", "8", "--samples", "1", "--tokens", "1024", "--html", str(out / "attribution.html"))
    train = ("train", *config, f"steps={STEPS}", "overwrite=true", f"tracking.replay_every={STEPS - 1}", *shared)
    replayed = out / "replay.json"
    found = [
        asked("doctor", "doctor"),
        asked("parity_bfloat16", "parity", "--body", "bfloat16", "--prompts", str(PROMPTS)),
        asked("parity_float32", "parity", "--body", "float32", "--prompts", str(PROMPTS)),
        asked("attribute", "attribute", *few),
        Phase(name="train", words=train, result=out / "run" / "summary.json", judges=False),
        Phase(
            name="replay",
            words=("replay", str(out / "run"), "--step", str(STEPS - 1), "--json", str(replayed)),
            result=replayed,
        ),
        asked("exact", "parity", "--body", "bfloat16", "--prompts", str(EXACT_PROMPTS), "exact=true"),
    ]
    return [p for p in found if not chosen or p.name in chosen]


def run(phase: Phase, out: Path) -> dict:
    """Its row: state, seconds, peak memory, and the reason where it did not run through."""
    log = out / "logs" / f"{phase.name}.log"
    log.parent.mkdir(exist_ok=True)
    phase.result.unlink(missing_ok=True)
    began = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            phase.command(), stdout=file, stderr=subprocess.STDOUT, start_new_session=True, env=_environment()
        )
        with Peak(process.pid) as peak:
            code = process.wait()
    row = {
        "command": shlex.join(["rlalign", *phase.words]),
        "code": code,
        "seconds": round(time.monotonic() - began, 1),
        "peak_mib": round(peak.mib),
    }
    if code == 0 or (code == 1 and phase.judges and phase.result.is_file()):
        return row | {"state": "fine" if code == 0 else "finding", "reason": "" if code == 0 else _reason(log, code)}
    return row | {"state": "refused" if code == 2 else "failed", "reason": _reason(log, code)}


def _environment() -> dict[str, str]:
    """The child imports the rlalign that this one did, wherever it is started."""
    import rlalign

    above = str(Path(rlalign.__file__).parents[1])
    return os.environ | {"PYTHONPATH": os.pathsep.join(p for p in (above, os.environ.get("PYTHONPATH")) if p)}


def _reason(log: Path, code: int) -> str:
    """The command's own last line that says why."""
    if code < 0:
        return f"ended by signal {-code}" + (": out of memory?" if code == -9 else "")
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    said = [line.removeprefix("rlalign: ") for line in lines if line.startswith("rlalign: ")]
    return (said or lines or [f"exit status {code}, see {log}"])[-1][:400]


def read_before(file: Path, about: About) -> dict:
    """What an earlier start has measured on this model; nothing where there is none. Raises ValueError for another model's."""
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text())
        model, phases = found["model"]["folder"], found["phases"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is no result of this command ({type(error).__name__}); remove it") from error
    if model != str(about.folder):
        raise ValueError(f"{file} is about {model}; give this model an --out of its own")
    return phases


def measure(about: About, out: Path, todo: Sequence[Phase]) -> int:
    """Run what is not yet finished, write after each, and return the exit status."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / "real_model.json"
    rows = read_before(file, about)
    result = {"model": about.as_json(), "machine": environment.snapshot(), "phases": rows}
    with Stages("real_model", len(todo)) as stages:
        for phase in todo:
            stages.stage(phase.name)
            before = rows.get(phase.name, {})
            same = before.get("command") == shlex.join(["rlalign", *phase.words])
            if not (same and before.get("state") in ("fine", "finding") and phase.result.is_file()):
                rows[phase.name] = run(phase, out)
            write_json(file, result)
            (out / "real_model.md").write_text(markdown(result, out))
    print(markdown(result, out))
    return 1 if any(rows[p.name]["state"] in ("failed", "refused") for p in todo) else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Read the options, refuse what cannot work, measure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real_model", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="a Hugging Face folder: config.json, safetensors, tokenizer")
    parser.add_argument("--out", type=Path, help="default: runs/real_model/NAME")
    parser.add_argument("--from-gguf", type=Path, metavar="FILE", help="make the folder from this file first")
    parser.add_argument("--max-tokens", type=int, default=64, help="of a completion (default %(default)s)")
    parser.add_argument("--phase", action="append", default=[], metavar="NAME", help="only this one; repeatable")
    parser.add_argument("--no-estimate", action="store_true", help="start although memory or disk look too small")
    options = parser.parse_args(argv)
    try:
        if options.from_gguf is not None and not (options.folder / "config.json").is_file():
            from benchmarks.from_gguf import convert

            print("asked: {question!r}\nanswered: {answer!r}".format(**convert(options.from_gguf, options.folder)))
        about = usable(options.folder)
        out = (options.out or Path("runs/real_model") / about.folder.name).resolve()
        todo = phases(about, out, max_tokens=options.max_tokens, chosen=options.phase)
        if not todo:
            names = ", ".join(p.name for p in phases(about, out, max_tokens=options.max_tokens))
            raise ValueError(f"--phase {' '.join(options.phase)}: choose from {names}")
        if not options.no_estimate:
            require_room(about, out)
        return measure(about, out, todo)
    except (ValueError, OSError) as error:
        print(f"real_model: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
