#!/usr/bin/env bash
# The same prompt with and without compensation. PYTHON chooses the interpreter (default python3).
#
#   end-to-end/generate.sh FOLDER [PROMPT] [K_CHUNK ...]
set -euo pipefail
if [ $# -lt 1 ] || [ "$1" = -h ] || [ "$1" = --help ]; then
    sed -n '2,4s/^# \{0,1\}//p' "$0"
    [ $# -ge 1 ] || exit 2
    exit 0
fi
here=$(dirname "$0")
folder=$1
prompt=${2:-The three most important things about the Python language are}
shift $(($# < 2 ? $# : 2))
[ $# -gt 0 ] || set -- 0 32
for k_chunk in "$@"; do
    printf '\n-- k_chunk %s\n' "$k_chunk" >&2
    "${PYTHON:-python3}" "$here/generate.py" --model "$folder" --prompt "$prompt" --max-new-tokens "${MAX_NEW_TOKENS:-48}" \
        --k-chunk "$k_chunk"
done
