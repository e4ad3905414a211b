#!/usr/bin/env bash
# Regenerate requirements/cpu.txt from pyproject.toml. Needs uv (pip install uv). requirements/test.txt is kept by hand.
# UV_FIND_LINKS may name a folder with torch's CPU wheel; without it uv asks PyTorch's own CPU index.
set -euo pipefail
cd "$(dirname "$0")/.."
backend=(--torch-backend cpu)
[ -n "${UV_FIND_LINKS:-}" ] && backend=()
{
  echo "# Written by scripts/lock.sh. Install with: pip install --no-deps -r requirements/cpu.txt"
  uv pip compile -q --no-annotate --no-header --no-emit-find-links --python-version 3.11 "${backend[@]}" \
    --extra cpu --extra train --extra reward pyproject.toml
} > requirements/cpu.txt.new
mv requirements/cpu.txt.new requirements/cpu.txt
