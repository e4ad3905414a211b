#!/usr/bin/env bash
# Build the distribution, check its metadata, install the wheel where nothing else is, and ask it to examine itself.
# Usage: scripts/release_check.sh [PYTHON]. Needs the package index; leaves dist/.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT

rm -rf dist
"$python" -m venv "$room/tools"
"$room/tools/bin/pip" install -q build twine
"$room/tools/bin/python" -m build -q
"$room/tools/bin/twine" check --strict dist/*

# The locked requirements, then the wheel itself, without the checkout on the path.
"$python" -m venv "$room/clean"
"$room/clean/bin/pip" install -q --no-deps -r requirements/cpu.txt
"$room/clean/bin/pip" install -q --no-deps dist/*.whl
cd "$room"
"$room/clean/bin/python" - <<'CHECK'
import importlib.resources, rlalign
assert "site-packages" in rlalign.__file__, rlalign.__file__
for name in rlalign.__all__:
    getattr(rlalign, name)
assert (importlib.resources.files("rlalign.configs") / "demo.yaml").is_file()
assert (importlib.resources.files("rlalign") / "py.typed").is_file()
print("rlalign", rlalign.__version__, "from the wheel: public names, configurations and types are there")
CHECK
"$room/clean/bin/rlalign" doctor --config-name demo
