#!/usr/bin/env bash
# Sets up the environment and runs every test. No GPU needed; tests that need one say so and run where there is one.
# Two processes of one thread each, which on two cores takes little over half of the time. Arguments go to pytest.
set -euo pipefail
VENV=$(realpath -sm "${VENV:-$(dirname "$0")/.venv}")
export VENV
cd "$(dirname "$0")"
./quickstart.sh --install
export PYTHON=$VENV/bin/python OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$PYTHON" -m pytest --numprocesses 2 --dist loadgroup --no-loadscope-reorder "$@"
