# Sourced by every .sbatch file: the environment of a job, one srun for all ranks, and what happens when it ends.
#
# Variables a site sets (sbatch --export=ALL,NAME=value, or in the shell that submits):
#   RLALIGN_VENV       virtual environment                  default: .venv of the folder submitted from
#   RLALIGN_MODULES    modules to load, blank-separated     default: none
#   RLALIGN_CONTAINER  image for `srun --container-image` (pyxis), or a .sif file for apptainer     default: none
#   RLALIGN_RUNS       where run directories go             default: runs
#   RLALIGN_RESTARTS   requeues before giving up            default: 50
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
REQUEUE=75 # rlalign/exits.py

for name in ${RLALIGN_MODULES:-}; do module load "$name"; done
export PATH="${RLALIGN_VENV:-$SLURM_SUBMIT_DIR/.venv}/bin:$PATH"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}" OMP_WAIT_POLICY=PASSIVE
mkdir -p logs

fail() { echo "rlalign: $*" >&2; exit 1; }

in_container=()
case "${RLALIGN_CONTAINER:-}" in
  "") command -v rlalign > /dev/null || fail "no rlalign in PATH on $(hostname); make .venv here (make install) or set RLALIGN_VENV" ;;
  *.sif) in_container=(apptainer exec --nv "$RLALIGN_CONTAINER") ;;
  *) in_container=(--container-image "$RLALIGN_CONTAINER" --container-mounts "$PWD:$PWD" --container-workdir "$PWD") ;;
esac

# train OVERRIDE...: one run over all tasks of this job, resumed after every requeue, and requeued when a signal ended it.
train() {
  local folder="${RLALIGN_RUNS:-runs}/$SLURM_JOB_NAME-${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+-$SLURM_ARRAY_TASK_ID}"
  local log="logs/$SLURM_JOB_NAME-$SLURM_JOB_ID-rank%t.log"
  # The batch script runs on the first node, where rank 0 will listen: a port that is free here, not one that is hoped to be.
  MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  [ -z "${RLALIGN_MASTER_ADDR:-}" ] || MASTER_ADDR=$RLALIGN_MASTER_ADDR
  MASTER_PORT=$(python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
  export MASTER_ADDR MASTER_PORT
  local launch=(srun --kill-on-bad-exit=1 --open-mode=append --output="$log")
  local command=(bash "$SLURM_SUBMIT_DIR/slurm/rank.sh" "$@" "output_dir=$folder" checkpoint.resume=auto)
  if [ -n "${RLALIGN_CONTAINER:-}" ] && [[ $RLALIGN_CONTAINER != *.sif ]]; then
    launch+=("${in_container[@]}")
  else
    command=("${in_container[@]}" "${command[@]}")
  fi
  echo "rlalign: $SLURM_NTASKS rank(s) on $SLURM_JOB_NODELIST, $folder, rendezvous $MASTER_ADDR:$MASTER_PORT, restart ${SLURM_RESTART_COUNT:-0}"
  "${launch[@]}" "${command[@]}" &
  local step=$! code=0 asked=""
  trap 'asked=yes; echo "rlalign: asked to end; the step is finished and saved"; scancel --signal=USR1 "$SLURM_JOB_ID.0" || true' USR1
  while :; do
    code=0; wait "$step" || code=$?
    kill -0 "$step" 2> /dev/null || break # wait also returns when the trap has run
  done
  # A rank that had not yet begun to listen dies of the signal itself: 128 + USR1, or + TERM. Nothing was done, nothing is lost.
  if [ -n "$asked" ] && { [ "$code" = 138 ] || [ "$code" = 143 ]; }; then code=$REQUEUE; fi
  # Saved without being asked through this script: somebody cancelled the job. It can be submitted again, but does not do so itself.
  if [ "$code" = "$REQUEUE" ] && [ -n "$asked" ]; then
    [ "${SLURM_RESTART_COUNT:-0}" -lt "${RLALIGN_RESTARTS:-50}" ] || fail "restarted ${SLURM_RESTART_COUNT:-0} times; not again"
    echo "rlalign: requeued, goes on from $folder/checkpoints"
    scontrol requeue "$SLURM_JOB_ID"
    sleep 60 # until the controller takes this job down
  fi
  [ "$code" = 0 ] || { echo "rlalign: a rank ended with code $code; logs/$SLURM_JOB_NAME-$SLURM_JOB_ID-rank*.log" >&2; tail -n 5 logs/"$SLURM_JOB_NAME-$SLURM_JOB_ID"-rank*.log >&2; }
  return "$code"
}
