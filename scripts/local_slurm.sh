#!/usr/bin/env bash
# A real Slurm on this machine alone: slurmctld, one slurmd a virtual node, loopback only, no systemd, no cgroups.
#   scripts/local_slurm.sh up DIR [NODES [CPUS]]     then: export SLURM_CONF=DIR/slurm.conf
#   scripts/local_slurm.sh down DIR
# Debian: apt-get install --no-install-recommends slurm-wlm munge. Run it as root.
set -euo pipefail

fail() { echo "local_slurm: $*" >&2; exit 1; }
usage="usage: local_slurm.sh up DIR [NODES [CPUS]] | down DIR"

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

alive() { [ -e "/proc/$1/stat" ] && ! grep -q ') Z ' "/proc/$1/stat"; } # an ended daemon nobody waited for is a zombie

configure() { # DIR NODES CPUS
  local dir=$1 nodes=$2 cpus=$3 i
  cat << EOF
ClusterName=rlalign
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=$(free_port)
AuthType=auth/munge
AuthInfo=socket=$dir/munge/sock,cred_expire=6
CryptoType=crypto/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd-%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/filetxt
JobCompLoc=$dir/log/jobcomp.txt
ReturnToService=2
KillWait=5
MinJobAge=3600
JobRequeue=1
SlurmdParameters=config_overrides
CommunicationParameters=NoAddrCache,NoInAddrAny,NoCtldInAddrAny
EOF
  for i in $(seq 1 "$nodes"); do
    echo "NodeName=n$i NodeHostname=localhost NodeAddr=127.0.0.1 Port=$(free_port) CPUs=$cpus RealMemory=4000 State=UNKNOWN"
  done
  echo "PartitionName=main Nodes=n[1-$nodes] Default=YES MaxTime=1-0 DefaultTime=10 State=UP"
}

up() {
  local dir nodes=${2:-1} cpus=${3:-2} i
  dir=$(realpath -m "$1")
  for program in slurmctld slurmd munged sinfo; do
    command -v "$program" > /dev/null || fail "$program is not installed (Debian: apt-get install slurm-wlm munge)"
  done
  [ ! -e "$dir/slurm.conf" ] || fail "$dir holds a cluster already; take it down first"
  mkdir -p "$dir"/{state,log,spool,munge}
  chmod 700 "$dir/munge"
  (umask 077; dd if=/dev/urandom bs=128 count=1 of="$dir/munge/key" 2> /dev/null)
  munged --force --key-file="$dir/munge/key" --socket="$dir/munge/sock" --pid-file="$dir/munge/pid" \
    --log-file="$dir/munge/log" --seed-file="$dir/munge/seed" --num-threads=1
  configure "$dir" "$nodes" "$cpus" > "$dir/slurm.conf"
  export SLURM_CONF=$dir/slurm.conf
  slurmctld -f "$SLURM_CONF"
  for i in $(seq 1 "$nodes"); do slurmd -N "n$i" -f "$SLURM_CONF"; done
  for _ in $(seq 1 120); do
    [ "$(sinfo -h -N -o %T 2> /dev/null | grep -c idle)" = "$nodes" ] && { sinfo -N -l; return; }
    sleep 0.25
  done
  down "$dir"
  fail "the nodes did not come up; logs in $dir/log"
}

down() {
  local dir pids=() file pid
  dir=$(realpath -m "$1")
  [ -e "$dir/slurm.conf" ] || fail "$dir holds no cluster"
  export SLURM_CONF=$dir/slurm.conf
  scancel -f -u "$(id -un)" 2> /dev/null || true # a stopped slurmd would leave its jobs running
  for _ in $(seq 1 40); do [ -z "$(squeue -h -t R,CG 2> /dev/null)" ] && break; sleep 0.25; done
  for file in "$dir"/slurmd-*.pid "$dir"/slurmctld.pid "$dir"/munge/pid; do
    [ ! -s "$file" ] || pids+=("$(cat "$file")")
  done
  for pid in "${pids[@]}"; do kill "$pid" 2> /dev/null || true; done
  for pid in "${pids[@]}"; do for _ in $(seq 1 40); do alive "$pid" || break; sleep 0.25; done; done
  mv "$dir/slurm.conf" "$dir/slurm.conf.down"
}

case "${1:-}" in
  up) [ $# -ge 2 ] || fail "$usage"; shift; up "$@" ;;
  down) [ $# -eq 2 ] || fail "$usage"; down "$2" ;;
  *) fail "$usage" ;;
esac
