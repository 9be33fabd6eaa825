#!/usr/bin/env bash
# Perplexity of a model at 3, 3.5 and 4 bits by every method, base weights alone: each folder is measured when it is made.
#
#   compare.sh ORIGINAL CALIBRATION_TEXT EVALUATION_TEXT ROWS.jsonl FOLDERS
#
# Folders and bit maps go to FOLDERS (ORIGINAL's name, method and bits in theirs), one row each to ROWS.jsonl (evaluation/perplexity.py).
# What is finished is kept: run it again after an interrupt. The environment may set
#   METHODS (awq squeezellm gptq rtn)   SAMPLES (100) LENGTH (512)   calibration   WINDOWS (40) WINDOW_LENGTH   evaluation
#   DEVICE (cpu, or cuda)   DTYPE   of evaluation   PYTHON   the interpreter
set -euo pipefail
if [ $# -ne 5 ]; then
    sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
room=$(dirname "$0") evaluation=$(dirname "$0")/../evaluation python=${PYTHON:-python3} device=${DEVICE:-cpu}
original=$1 calibration=$2 text=$3 rows=$4 folders=$5
name=$folders/$(basename "$original")
samples=(--text "$calibration" --samples "${SAMPLES:-100}" --length "${LENGTH:-512}" --device "$device")

measure() {
    local options=(--text "$text" --windows "${WINDOWS:-40}" --device "$device" --out "$rows")
    [ -z "${WINDOW_LENGTH:-}" ] || options+=(--length "$WINDOW_LENGTH")
    [ -z "${DTYPE:-}" ] || options+=(--dtype "$DTYPE")
    "$python" "$evaluation/perplexity.py" --model "$1" "${options[@]}"
}

mkdir -p "$folders"
measure "$original"
for method in ${METHODS:-awq squeezellm gptq rtn}; do
    low=$name-$method-w3 high=$name-$method-w4 map=$name-$method-map.json
    # Blocks of gptq depend on those before them, so its mixture is made afresh.
    [ "$method" = gptq ] && reuse=() || reuse=(--reuse "$low" "$high")
    quantize=("$python" "$room/quantize.py" --model "$original" --method "$method" "${samples[@]}")
    "${quantize[@]}" --bits 3 --out "$low"
    measure "$low"
    "${quantize[@]}" --bits 4 --out "$high"
    measure "$high"
    "$python" "$room/mixed_precision.py" "$original" "$low" "$high" --out "$map" --text "$calibration" --device "$device"
    "${quantize[@]}" --bits 3.5 --out "$name-$method-w3.5" --bit-map "$map" "${reuse[@]}"
    measure "$name-$method-w3.5"
done
"$python" "$evaluation/table.py" "$rows"
