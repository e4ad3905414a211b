#!/usr/bin/env bash
# One trainer rank, started by srun: SLURM's numbers under the names that torch.distributed and DeepSpeed read.
set -euo pipefail
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_STEP_NUM_TASKS
exec rlalign train "$@"
