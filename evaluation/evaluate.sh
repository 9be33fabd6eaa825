#!/usr/bin/env bash
# The evaluation stage: perplexity of one or more DecDEC folders (and of their original) over k_chunk, the table and Figure 13.
# Usage: evaluation/evaluate.sh ROWS.jsonl ORIGINAL FOLDER [FOLDER ...]
# The environment may set PYTHON, K_CHUNKS, TEXT, WINDOWS and LENGTH.
set -euo pipefail
if [ $# -lt 3 ]; then
    sed -n '2,4s/^# //p' "$0" >&2
    exit 2
fi
here=$(dirname "$0")
python=${PYTHON:-python3}
rows=$1 original=$2
shift 2
common=(--text "${TEXT:-wikitext}" --out "$rows")
[ -z "${WINDOWS:-}" ] || common+=(--windows "$WINDOWS")
[ -z "${LENGTH:-}" ] || common+=(--length "$LENGTH")
"$python" "$here/perplexity.py" --model "$original" "${common[@]}"
for folder in "$@"; do
    # shellcheck disable=SC2086  # K_CHUNKS is a list of numbers
    "$python" "$here/perplexity.py" --model "$folder" --k-chunk ${K_CHUNKS:-0 8 16 32 64 128} "${common[@]}"
done
echo
"$python" "$here/table.py" "$rows"
"$python" "$here/figures/fig13_perplexity.py" "$rows" --out "${rows%.jsonl}.pdf"
