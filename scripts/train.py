"""The Hydra application: what torchrun, deepspeed and srun start, and what sweeps with -m.

python scripts/train.py --config-name demo algo.lr=1e-5 rollout.group_size=8
"""

import sys

import hydra
from omegaconf import DictConfig

from rlalign.cli import set_environment
from rlalign.compose import register_schema
from rlalign.config import load
from rlalign.exits import REQUEUE, Preempted

set_environment()
register_schema()


@hydra.main(version_base="1.3", config_path="pkg://rlalign.configs", config_name="train")
def main(composed: DictConfig) -> None:
    from rlalign.train import train

    try:
        train(load(composed))
    except Preempted as end:
        print(f"rlalign: {end}", file=sys.stderr)
        sys.exit(REQUEUE)
    except (ValueError, RuntimeError) as error:
        sys.exit(f"rlalign: {error}")


if __name__ == "__main__":
    main()
