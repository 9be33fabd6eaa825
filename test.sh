#!/usr/bin/env bash
# Sets up the environment and runs every test. No GPU needed; tests that need one say so and run where there is one.
set -euo pipefail
cd "$(dirname "$0")"
./quickstart.sh --install
PYTHON=$(realpath -s "${VENV:-.venv}")/bin/python
export PYTHON
exec "$PYTHON" -m pytest "$@"
