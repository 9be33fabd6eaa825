#!/usr/bin/env bash
# The GPU checks that take minutes: ten thousand random cases, and the sanitizers over a few. Run from anywhere, decdec installed.
set -euo pipefail
tests=$(cd "$(dirname "$0")" && pwd)
DECDEC_CASES=${DECDEC_CASES:-10000} python -m pytest -q "$tests/test_cuda_ops.py"
for tool in memcheck racecheck synccheck; do
  DECDEC_CASES=5 compute-sanitizer --tool "$tool" --error-exitcode 1 python -m pytest -q "$tests/test_cuda_ops.py" -k "random or dependent"
done
