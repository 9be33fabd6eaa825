#!/usr/bin/env bash
# From an original model to a folder that DecDEC runs: packed base weights, cheatsheet.pt, thresholds.pt.
#
#   setup.sh MODEL METHOD BITS OUT [--text TEXT] [--samples N] [--length N] [--seed N] [--device DEVICE] [--group-size N] [--bit-map FILE] [--nested]
#
# METHOD is squeezellm, awq, gptq or rtn. --nested stores 2-bit nested residuals instead of the paper's 4-bit ones. What is finished is kept: run it again after an interrupt. PYTHON chooses the interpreter.
set -euo pipefail
if [ $# -lt 4 ]; then
    sed -n '2,6s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
room=$(dirname "$0") python=${PYTHON:-python3}
model=$1 method=$2 bits=$3 out=$4
shift 4

# --group-size and --bit-map belong to quantize.py alone; the rest describes the calibration, which thresholds.py shares.
grouping=() calibration=() residual=()
while [ $# -gt 0 ]; do
    if [ "$1" = --nested ]; then residual=(--nested); shift; continue; fi
    [ $# -gt 1 ] || { echo "error: $1: expected a value after it" >&2; exit 2; }
    case $1 in
        --group-size | --bit-map) grouping+=("$1" "$2") ;;
        *) calibration+=("$1" "$2") ;;
    esac
    shift 2
done

"$python" "$room/quantize.py" --model "$model" --method "$method" --bits "$bits" --out "$out" "${grouping[@]}" "${calibration[@]}"
"$python" "$room/cheatsheet.py" "$out" --model "$model" "${residual[@]}"
"$python" "$room/thresholds.py" "$out" --model "$model" "${calibration[@]}"
echo "$out: $SECONDS seconds in all"
