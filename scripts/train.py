"""The Hydra application: what torchrun, deepspeed and srun start, and what sweeps with -m.

python scripts/train.py --config-name demo algo.lr=1e-5 rollout.group_size=8
"""

import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch loads its OpenMP runtime

import hydra
from omegaconf import DictConfig

from rlalign.cli import register_schema
from rlalign.config import load
from rlalign.train import train

register_schema()


@hydra.main(version_base="1.3", config_path="pkg://rlalign.configs", config_name="train")
def main(composed: DictConfig) -> None:
    try:
        train(load(composed))
    except (ValueError, RuntimeError) as error:
        sys.exit(f"rlalign: {error}")


if __name__ == "__main__":
    main()
