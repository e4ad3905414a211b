"""The Hydra application: what torchrun, deepspeed and srun start, and what sweeps with -m.

python scripts/train.py --config-name demo algo.lr=1e-5 rollout.group_size=8
python scripts/train.py -m --config-name demo hydra/launcher=slurm algo.lr=1e-5,1e-6     one Slurm job for each
"""

import logging
import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from rlalign.cli import own_arguments, set_environment
from rlalign.config import load, register_schema
from rlalign.exits import LOST, REQUEUE, Lost, Preempted
from rlalign.ranks import explained

set_environment()
register_schema()


@hydra.main(version_base="1.3", config_path="pkg://rlalign.configs", config_name="train")
def main(composed: DictConfig) -> None:
    from rlalign.run.train import train

    # Hydra shows INFO of all libraries: a line for every request to a server
    logging.getLogger("httpx").setLevel(logging.WARNING)
    job = HydraConfig.get()
    sweep = job.mode is RunMode.MULTIRUN
    if sweep and not any(word.startswith("output_dir=") for word in job.overrides.task):
        composed.output_dir = job.runtime.output_dir  # every run of a sweep its own: the folder that Hydra made for it
    try:
        train(load(composed))
    except (Preempted, ValueError, RuntimeError) as error:
        if sweep:  # an exit would end the other runs too, and submitit would wait for this one for ever
            raise RuntimeError(f"rlalign: {error}") from error
        print(f"rlalign: {explained(error)}", file=sys.stderr)
        sys.exit(REQUEUE if isinstance(error, Preempted) else LOST if isinstance(error, Lost) else 1)


if __name__ == "__main__":
    sys.argv[1:] = own_arguments(sys.argv[1:])
    main()
