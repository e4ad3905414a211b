# Sourced by every .sbatch file: the environment of a job, the srun of its ranks and servers, and what happens when it ends.
#
# Variables a site sets (sbatch --export=ALL,NAME=value, or in the shell that submits):
#   RLALIGN_VENV             virtual environment            default: .venv of the folder submitted from
#   RLALIGN_MODULES          modules to load, blank-separated                                       default: none
#   RLALIGN_CONTAINER        image for `srun --container-image` (pyxis), or a .sif file for apptainer     default: none
#   RLALIGN_MOUNTS           folders it sees beside this one (models, data): SRC:DST,SRC:DST        default: none
#   RLALIGN_RUNS             where run directories go, on a folder that every node mounts           default: runs
#   RLALIGN_RUN              name of the run directory in it, to go on with                         default: job name and number
#   RLALIGN_SERVER_NODES     of one allocation's nodes, how many (the last) run rollout servers     default: 0
#   RLALIGN_SERVERS_PER_NODE rollout servers on each of them; its GPUs are divided                  default: 1
#   RLALIGN_SERVER_HOST      the address servers listen on                                          default: 0.0.0.0
#   RLALIGN_RESTARTS         requeues before giving up                                              default: 50
#   RLALIGN_CRASHES          of them, after a process died and no new checkpoint came since         default: 3
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
LOST=69 REQUEUE=75 # rlalign/exits.py

for name in ${RLALIGN_MODULES:-}; do module load "$name"; done
export PATH="${RLALIGN_VENV:-$SLURM_SUBMIT_DIR/.venv}/bin:$PATH"
cpus=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_PER_TASK_HET_GROUP_0:-}} # of a trainer rank
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${cpus:-1}}" OMP_WAIT_POLICY=PASSIVE
mkdir -p logs

fail() { echo "rlalign: $*" >&2; exit 1; }

in_step=() in_task=() # words before the command, of srun and of each task
mounts="$PWD:$PWD${RLALIGN_MOUNTS:+,$RLALIGN_MOUNTS}"
case "${RLALIGN_CONTAINER:-}" in
  "") command -v rlalign > /dev/null || fail "no rlalign in PATH on $(hostname); make .venv here (make install) or set RLALIGN_VENV" ;;
  *.sif) in_task=(apptainer exec --nv --bind "$mounts" --pwd "$PWD" "$RLALIGN_CONTAINER") ;;
  *) in_step=(--container-image "$RLALIGN_CONTAINER" --container-mounts "$mounts" --container-workdir "$PWD") ;;
esac

# place: which part of the job trains and which serves. Sets trainer_part, server_part (srun's options) and servers (their number).
place() {
  trainer_part=(${cpus:+"--cpus-per-task=$cpus"}) server_part=() servers=0 # since 22.05 srun does not take it from the job
  local per_node=${RLALIGN_SERVERS_PER_NODE:-1} nodes=${RLALIGN_SERVER_NODES:-0} all=()
  if [ "${SLURM_HET_SIZE:-1}" -gt 1 ]; then
    nodes=$SLURM_JOB_NUM_NODES_HET_GROUP_1
    trainer_part+=(--het-group=0) server_part=(--het-group=1)
  elif [ "$nodes" -gt 0 ]; then
    mapfile -t all < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    local train=$((${#all[@]} - nodes)) join='IFS=,; echo "$*"'
    [ "$train" -gt 0 ] || fail "RLALIGN_SERVER_NODES=$nodes leaves none of the job's ${#all[@]} node(s) to train on; ask for more with --nodes"
    trainer_part+=("--nodes=$train" "--ntasks=$((train * ${SLURM_NTASKS_PER_NODE:-1}))" "--nodelist=$(bash -c "$join" _ "${all[@]:0:train}")")
    server_part=("--nodes=$nodes" "--nodelist=$(bash -c "$join" _ "${all[@]:train}")")
  else
    return 0
  fi
  servers=$((nodes * per_node))
  server_part+=("--ntasks=$servers" "--ntasks-per-node=$per_node")
  local gpus="${SLURM_GPUS_PER_NODE_HET_GROUP_1:-${SLURM_GPUS_PER_NODE:-}}"
  gpus=${gpus##*:} # h100:8
  [ "$per_node" = 1 ] || [ -z "$gpus" ] || server_part+=("--gpus-per-task=$((gpus / per_node))")
}

# train OVERRIDE...: one run over the job, resumed after every requeue; requeued when a signal ended it or a process died.
train() {
  local default="$SLURM_JOB_NAME-${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+-$SLURM_ARRAY_TASK_ID}"
  local folder="${RLALIGN_RUNS:-runs}/${RLALIGN_RUN:-$default}" log="logs/$SLURM_JOB_NAME-$SLURM_JOB_ID" trainer_part server_part servers
  local mine=("output_dir=$folder" checkpoint.resume=auto)
  if grep -qs '"status": "finished"' "$folder/run.json"; then echo "rlalign: $folder is finished"; return; fi
  place
  if [ "$servers" -gt 0 ]; then
    mine+=(rollout.backend=server "rollout.server_folder=$folder.servers" "rollout.wait_for=$servers")
    [[ " $* " == *" weights.transport="* ]] || mine+=(weights.transport=folder "weights.shared=$folder.weights")
    rm -rf "$folder.servers" "$folder.weights" # what an earlier start announced is not there any more
    mkdir -p "$folder.servers" "$folder.weights"
    # shellcheck disable=SC2064  # the folder of now
    trap "rm -rf '$folder.servers' '$folder.weights'" EXIT
  fi
  # The batch script runs on the first node, where rank 0 will listen: a port that is free here, not one that is hoped to be.
  read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  MASTER_ADDR=${RLALIGN_MASTER_ADDR:-$MASTER_ADDR}
  MASTER_PORT=$(python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
  export MASTER_ADDR MASTER_PORT
  echo "rlalign: $folder on $SLURM_JOB_NODELIST, $servers server(s), rendezvous $MASTER_ADDR:$MASTER_PORT, restart ${SLURM_RESTART_COUNT:-0}"
  local asked="" gone="" code=0 serving="" step
  trap 'gone=yes; kill -TERM "$step"' USR2
  if [ "$servers" -gt 0 ]; then
    ( (on "$log-server%t.log" "${server_part[@]}" -- server.sh "$@" "${mine[@]}") || true; kill -USR2 $$) &
    serving=$!
  fi
  on "$log-rank%t.log" "${trainer_part[@]}" --kill-on-bad-exit=1 -- rank.sh "$@" "${mine[@]}" &
  step=$!
  trap 'asked=yes; echo "rlalign: asked to end; the step is finished and saved"; kill -USR1 "$step"' USR1
  while :; do
    code=0; wait "$step" || code=$?
    kill -0 "$step" 2> /dev/null || break # wait also returns when a trap has run
  done
  trap '' USR2 # the servers end because we do
  [ -z "$serving" ] || end_servers "$serving"
  # A rank that had not yet begun to listen dies of the signal itself: 128 + USR1, or + TERM. Nothing was done, nothing is lost.
  if [ -n "$asked" ] && { [ "$code" = 138 ] || [ "$code" = 143 ]; }; then code=$REQUEUE; fi
  if [ -n "$gone" ] && [ "$code" != 0 ]; then echo "rlalign: every rollout server ended; $log-server*.log" >&2; code=$LOST; fi
  [ "$code" = 0 ] || tell "$code" "$log"
  go_on "$code" "$asked" "$folder"
}

# end_servers PID: ask them through their srun, the child of PID; after half a minute no longer politely.
end_servers() {
  pkill -USR1 -P "$1" srun || true # TERM, srun would turn into a kill
  for _ in $(seq 150); do kill -0 "$1" 2> /dev/null || break; sleep 0.2; done
  pkill -TERM -P "$1" srun || true
  wait "$1" || true
}

# on LOG SRUN_OPTION... -- SCRIPT WORD...: a script of this folder in every task of a step.
on() {
  local log=$1 options=() script; shift
  while [ "$1" != -- ]; do options+=("$1"); shift; done
  script=$2; shift 2
  exec srun --open-mode=append "--output=$log" "${options[@]}" "${in_step[@]}" "${in_task[@]}" bash "$SLURM_SUBMIT_DIR/slurm/$script" "$@"
}

# tell CODE LOG: the last words of every rank and server.
tell() {
  echo "rlalign: a rank ended with code $1; $2-*.log" >&2
  tail -n 5 "$2"-*.log >&2 || true
}

# go_on CODE ASKED FOLDER: requeue what was interrupted, or died and may do better; return the code of everything else.
go_on() {
  local code=$1 asked=$2 folder=$3 newest times
  if [ "$code" = "$REQUEUE" ] && [ -n "$asked" ]; then
    [ -z "${RLALIGN_CHAIN:-}" ] || { echo "rlalign: saved; the next job of the chain goes on"; return 0; }
  elif { [ "$code" = "$LOST" ] || [ "$code" -gt 128 ]; } && [ "$(squeue -h -j "$SLURM_JOB_ID" -o %T | head -n 1)" = RUNNING ]; then
    # A process died. Not requeued: what was cancelled, and what dies again and again where it stands.
    newest=$({ find "$folder/checkpoints" -maxdepth 1 -name 'step-*' 2> /dev/null || true; } | sort | tail -n 1)
    echo "died at ${newest:-the start}" >> "$folder.crashes"
    times=$(grep -cFx "died at ${newest:-the start}" "$folder.crashes")
    [ "$times" -le "${RLALIGN_CRASHES:-3}" ] || fail "a process died $times times since ${newest:-the start}; not again"
  else
    # Also what was saved without being asked through this script: somebody cancelled the job, and can submit it again.
    return "$code"
  fi
  [ "${SLURM_RESTART_COUNT:-0}" -lt "${RLALIGN_RESTARTS:-50}" ] || fail "restarted ${SLURM_RESTART_COUNT:-0} times; not again"
  echo "rlalign: requeued, goes on from $folder/checkpoints"
  scontrol requeue "$SLURM_JOB_ID"
  sleep 60 # until the controller takes this job down
}
