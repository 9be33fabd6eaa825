#!/usr/bin/env bash
# The GPU checks that take minutes: ten thousand random cases, and the sanitizers over a few. Run from anywhere, decdec
# installed. All parts run side by side, one line each: the references are made on the CPU, so one process would leave
# the GPU idle. DECDEC_CASES: random cases in all; DECDEC_PROCESSES: processes that share them.
# The sanitizers look at this library's kernels only, and racecheck measures results by products on the CPU: it fails
# inside cuBLAS.
set -uo pipefail
tests=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python} cases=${DECDEC_CASES:-10000} processes=${DECDEC_PROCESSES:-8}
logs=$(mktemp -d)
trap 'rm -r "$logs"' EXIT
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

part() {
  local name=$1 start=$SECONDS
  shift
  if "$@" >"$logs/$name" 2>&1; then
    echo "$name: passed in $((SECONDS - start)) s: $(tail -n 1 "$logs/$name")"
  else
    touch "$logs/failed"
    echo "$name: failed in $((SECONDS - start)) s"
    grep -m 40 '^========= ' "$logs/$name"
    tail -n 40 "$logs/$name"
  fi
}
test_ops=("$python" -m pytest -q -p no:cacheprovider "$tests/test_cuda_ops.py")

part "selection" "${test_ops[@]}" -k selection &
part "graphs, streams and compiled calls" "${test_ops[@]}" -k "graph or stream or compile or arena or dependent or same" &
part "every other test" "${test_ops[@]}" \
  -k "not (random_cases or selection or graph or stream or compile or arena or dependent or same)" &
for seed in $(seq "$processes"); do
  part "random cases from seed $seed" env DECDEC_SEED="$seed" DECDEC_CASES=$((cases / processes)) \
    "${test_ops[@]}" -k random_cases &
done
for tool in memcheck racecheck synccheck; do
  yardstick=cuda
  [ "$tool" != racecheck ] || yardstick=cpu
  part "$tool" env DECDEC_CASES=5 DECDEC_YARDSTICK=$yardstick compute-sanitizer --tool "$tool" --kernel-name kns=decdec --error-exitcode 1 \
    "${test_ops[@]}" -k "random or dependent or nan or residual_gemv" &
done
wait
[ ! -e "$logs/failed" ]
