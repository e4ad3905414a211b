#!/usr/bin/env bash
# One rollout server, started by srun, and started again when it dies: the run takes it back in at its next publish.
#   RLALIGN_SERVER_RESTARTS  how often     default: 5
set -uo pipefail
trap 'kill -TERM "$server" 2> /dev/null; wait "$server"; exit 0' USR1 TERM INT
for start in $(seq "$((${RLALIGN_SERVER_RESTARTS:-5} + 1))"); do
  # USR1 asks this script to end; Slurm sends it to everything that runs here.
  (trap '' USR1; exec rlalign rollout-server --host "${RLALIGN_SERVER_HOST:-0.0.0.0}" "$@") &
  server=$!
  code=0; wait "$server" || code=$?
  case $code in 0 | 2) exit "$code" ;; esac # 2: a configuration, which is no better the next time
  echo "rlalign: the rollout server of task $SLURM_PROCID on $(hostname) ended with code $code at start $start" >&2
done
exit "$code"
