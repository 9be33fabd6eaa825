#!/usr/bin/env bash
# The GPU checks that take minutes: ten thousand random cases, and the sanitizers over a few. Run from anywhere, decdec installed.
# Racecheck looks at this library's kernels only: cuBLAS, the tests' yardstick, has hazards of its own.
set -euo pipefail
tests=$(cd "$(dirname "$0")" && pwd)
PYTHON=${PYTHON:-python}
DECDEC_CASES=${DECDEC_CASES:-10000} "$PYTHON" -m pytest -q "$tests/test_cuda_ops.py"
for tool in memcheck racecheck synccheck; do
  DECDEC_CASES=5 compute-sanitizer --tool "$tool" --kernel-name kns=decdec --error-exitcode 1 \
    "$PYTHON" -m pytest -q "$tests/test_cuda_ops.py" -k "random or dependent or nan or residual_gemv"
done
