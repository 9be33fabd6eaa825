#!/usr/bin/env bash
# Sets up the environment and runs every test. No GPU needed; tests that need one say so and run where there is one.
set -euo pipefail
cd "$(dirname "$0")"
./quickstart.sh --install
export PYTHON=$PWD/.venv/bin/python
[ -z "${VENV:-}" ] || PYTHON=$(realpath -s "$VENV")/bin/python
exec "$PYTHON" -m pytest "$@"
