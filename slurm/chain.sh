#!/usr/bin/env bash
# One run over several jobs, each of which goes on where the one before it had to stop: for sites that do not requeue jobs.
#   slurm/chain.sh 5 slurm/single_node.sbatch --config-name demo steps=1000
# Every job but the first depends on the one before (afterany); when the run is finished, those that are left end at once.
set -euo pipefail
count=${1:?how many jobs} file=${2:?an .sbatch file}
shift 2
RLALIGN_RUN=${RLALIGN_RUN:-chain-$(date +%Y%m%d-%H%M%S)-$$}
export RLALIGN_RUN RLALIGN_CHAIN=yes
job=""
for _ in $(seq "$count"); do
  job=$(sbatch --parsable --no-requeue ${job:+"--dependency=afterany:$job"} "$file" "$@")
  echo "$job"
done
