"""A folder to submit jobs from, and the stand-in for `rlalign` that they start."""

import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
STAND_IN = """#!/usr/bin/env bash
# rlalign COMMAND --config-name demo KEY=VALUE...: writes what it was given, and behaves as `behaviour=` says
for word in "$@"; do case $word in output_dir=*) out=${word#*=};; behaviour=*) how=${word#*=};; esac
  case $word in *server_folder=*) ready=${word#*=};; esac
done
if [ "$1" = report ]; then echo "$@" > "${@: -1}"; exit 0; fi
mkdir -p "$out"
if [ "$1" = rollout-server ]; then
  trap 'touch "$out/server-ended"; exit 0' TERM
  [ "$how" != no-server ] || { echo "no such model" >&2; exit 1; }
  echo "$@ NODE=$SLURMD_NODENAME" >> "$out/server-calls"
  [ "$how" != die-once ] || [ "$(wc -l < "$out/server-calls")" -gt 1 ] || kill -9 $$
  echo '{}' > "$ready/$SLURM_PROCID.server.json"
  for i in $(seq 600); do sleep 0.1; done
fi
echo "$@ RANK=$RANK/$WORLD_SIZE $MASTER_ADDR:$MASTER_PORT" >> "$out/calls-$RANK"
[ -z "$ready" ] || sed -i "\\$ s/\\$/ NODE=$SLURMD_NODENAME/" "$out/calls-$RANK"
served() { for i in $(seq 300); do [ -n "$(ls "$ready")" ] && return; sleep 0.1; done; exit 1; }
case ${how:-finish} in
  fail) echo "rlalign: told to fail" >&2; exit 1;;
  lost) exit 69;;
  need-servers | no-server) served;;
  die-once) served; [ "$(wc -l < "$out/calls-0")" -gt 1 ] || kill -9 $$;;
  wait) trap 'echo saved >> "$out/saved"; exit 75' USR1
        [ -f "$out/saved" ] || for i in $(seq 600); do sleep 0.1; done;;
esac
echo '{}' > "$out/summary.json"; echo '{"status": "finished"}' > "$out/run.json"
"""
# the rest (SIGNALING and STAGE_OUT among them) is passed through on the way
LASTING = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}


class Site:
    """A folder from which jobs are submitted, with the stand-in for its virtual environment."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        (folder / "slurm").symlink_to(ROOT / "slurm")
        bin_folder = folder / "venv" / "bin"
        bin_folder.mkdir(parents=True)
        (bin_folder / "rlalign").write_text(STAND_IN)
        (bin_folder / "rlalign").chmod(0o755)
        self.environment = environment | {"RLALIGN_VENV": str(folder / "venv")}

    def call(self, *command: str) -> str:
        done = subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def submit(self, *words: str) -> str:
        return self.call("sbatch", "--parsable", *words).split(";")[0]

    def end(self, job: str, timeout: float = 60) -> str:
        """The job's state once it has one that lasts; of an array or a heterogeneous job, all that its parts have."""
        until = time.monotonic() + timeout
        while time.monotonic() < until:
            states = set(self.call("squeue", "-a", "-h", "-t", "all", "-j", job, "-o", "%T").split())
            if states and states <= LASTING:
                return " ".join(sorted(states))
            time.sleep(0.1)
        raise AssertionError(f"job {job} is still {states}:\n{self.output()}")

    def wait_for(self, pattern: str, timeout: float = 30) -> Path:
        until = time.monotonic() + timeout
        while not (found := list(self.folder.glob(pattern))):
            assert time.monotonic() < until, self.output()
            time.sleep(0.1)
        return found[0]

    def output(self) -> str:
        files = [*self.folder.glob("*.out"), *self.folder.glob("logs/*")]
        return "\n".join(f"--- {p.name}\n{p.read_text()}" for p in sorted(files))
