"""The one place where errors become exit codes; the commands themselves are in `rlalign.commands`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence

from rlalign.commands import parser
from rlalign.exits import INTERRUPTED, LOST, REQUEUE, Lost, Preempted
from rlalign.tracking.environment import require_working


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0: fine; 1: the check or the run failed; 2: wrong usage or configuration; 69: a process the run needs died, start again; 75: a
    signal ended the run, which is saved; 130: interrupted.
    """
    set_environment()
    arguments = parsed(own_arguments(sys.argv[1:] if argv is None else argv))
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
        from rlalign.ranks import explained

        print(f"rlalign: {explained(error)}", file=sys.stderr)
        return LOST if isinstance(error, Lost) else 1


def own_arguments(argv: Sequence[str]) -> list[str]:
    """What the user wrote: deepspeed's launcher adds --local_rank=N in front, which every rank has as LOCAL_RANK too."""
    return [word for word in argv if not word.startswith("--local_rank=")]


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments, with overrides before, after and between the options, which argparse by itself ends at the first option."""
    whole = parser()
    arguments, rest = whole.parse_known_args(argv)
    if rest and not (hasattr(arguments, "overrides") and all(_overrides(word) for word in rest)):
        whole.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def _overrides(word: str) -> bool:
    return "=" in word and not word.startswith("-")


def set_environment() -> None:
    """What must be said before torch, vLLM and DeepSpeed load. Nothing that the user has set is changed."""
    # Read by the OpenMP runtime when it loads: spinning threads make two busy cores about five times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Start-up chatter of the libraries hides the progress of the run; their warnings and errors still come through.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(vllm|deepspeed)\.")


if __name__ == "__main__":
    sys.exit(main())
