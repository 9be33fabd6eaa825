#!/usr/bin/env bash
# The whole stage for one model folder: profile, gains, plan, figures.
#
#   tune.sh FOLDER [TARGET...]                 on the GPU that is here; targets in percent (default 2.5 5 10 20)
#   SIMULATE=4050M tune.sh FOLDER [TARGET...]  for a GPU that is not here, from its data sheet
#
# plan.json goes into the folder, profile and figures into results/ beside this script. SCOPE=end-to-end bounds the time
# of a token, which the runtime then measures, instead of the linear layers' (SCOPE=kernel). EACH_BLOCK=1 chooses for
# every block by itself. TEXT chooses the text that the gains are measured on (default c4; pydoc needs no network),
# SAMPLES how much of it (default 16), PYTHON the interpreter, RESULTS another folder for the results.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
case ${1:-} in
    ''|-h|--help) sed -n '2,10s/^# \{0,1\}//p' "$0"; [ -n "${1:-}" ] && exit 0 || exit 2 ;;
esac
folder=$1; shift
[ $# -gt 0 ] || set -- 2.5 5 10 20
python=${PYTHON:-python3}
results=${RESULTS:-$here/results}/$(basename "$folder")
device=(${SIMULATE:+--simulate "$SIMULATE"})
profile=$results/profile${SIMULATE:+-$SIMULATE}.jsonl

choice=(--scope "${SCOPE:-kernel}" ${EACH_BLOCK:+--each-block})
if [ "${SCOPE:-kernel}" = end-to-end ] && [ -z "${SIMULATE:-}" ]; then
    choice+=(--timer "$(printf '%q ' "$python" "$here/../end-to-end/time_plans.py" --model "$folder")")
fi

"$python" "$here/run_profile.py" "$folder" "${device[@]}" --profile "$profile" --target "$@"
"$python" "$here/measure_gains.py" "$folder" --text "${TEXT:-c4}" --samples "${SAMPLES:-16}"
"$python" "$here/tuner.py" "$folder" "${device[@]}" --profile "$profile" --target "$@" "${choice[@]}"
"$python" "$here/fig12_normalised_time.py" "$folder" --profile "$profile" --out "$results"
"$python" "$here/table3.py" "$folder/plan.json"
