#!/usr/bin/env bash
# The evaluation stage: measures what a figure or table of the paper needs and draws it.
#   evaluation/evaluate.sh FIGURE ORIGINAL FOLDER [FOLDER ...]      of one original model and DecDEC folders made from it
#   evaluation/evaluate.sh FIGURE --tiny                            on a random two-layer model, in a minute or two
#   evaluation/evaluate.sh ROWS.jsonl ORIGINAL FOLDER [FOLDER ...]  only perplexity over k_chunk, its table and Figure 13
# FIGURE: fig4 fig5 fig12 fig13 fig14 fig15 fig16 fig17 fig18 table2 table3, or all: every one of them and a report with the pictures.
# What is measured already is not measured again. The environment may set
#   RESULTS   folder for rows, pictures and report (default evaluation/results/NAME; perplexity rows go to RESULTS.jsonl)
#   DATA      folder of local data: bbh/, lambada/, piqa/, mt_bench/ (default: the hub; Figure 15 needs mt_bench/)
#   K_CHUNKS TEXT WINDOWS LENGTH       of perplexity;  TASKS LIMIT MAX_GEN_TOKS SOME_K   of Figure 14;  QUESTIONS MAX_NEW_TOKENS   of Figure 15
#   OPENAI_BASE_URL OPENAI_API_KEY JUDGE_MODEL   the judge of Figure 15;  KERNELS   benchmark rows of Figure 12
#   CLIENTS OTHERS TARGETS LAW         GPUs of Figures 17 and 18, the tuner's targets, and whether to simulate the paper's law alone (LAW=1)
#   RESIDUAL_BITS                      of Table 2 (2 4 8 16);  DEVICE   cpu (default) or cuda;  PYTHON   the interpreter
# Figures 4, 5 and 16 and Table 2 take only the folders of fewest bits, the paper's 3.
set -euo pipefail
here=$(dirname "$0") setup=$(dirname "$0")/../decdec_setup tuner=$(dirname "$0")/../autotuner
python=${PYTHON:-python3}
usage() { sed -n '2,14s/^# \{0,1\}//p' "$0" >&2; exit 2; }
[ $# -ge 2 ] || usage
what=$1
shift

if [ "$1" = --tiny ]; then
    RESULTS=${RESULTS:-$(mktemp -d)/tiny}
    DATA=$RESULTS/data original=$RESULTS/models/tiny folder=$RESULTS/models/tiny-rtn-w3
    export TEXT=pydoc WINDOWS=2 LENGTH=64 K_CHUNKS="0 8 32" LIMIT=1 QUESTIONS=1 MAX_GEN_TOKS=4 MAX_NEW_TOKENS=8 SOME_K=16
    export KERNELS=$DATA/kernels.jsonl CLIENTS=4050M OTHERS=4050M TARGETS="50 400" RESIDUAL_BITS="4 16" TASKS="bbh_cot_fewshot_*"
    [ -d "$DATA" ] || "$python" "$here/tiny_data.py" "$DATA"
    [ -f "$original/config.json" ] || "$python" -m decdec.tiny "$original"
    [ -f "$folder/thresholds.pt" ] || "$setup/setup.sh" "$original" rtn 3 "$folder" --text pydoc --samples 4 --length 64
    folders=("$folder") judge=("$python" "$here/stand_in_judge.py")
else
    [ $# -ge 2 ] || usage
    original=$1
    shift
    folders=("$@") judge=()
fi
name=$(basename "$original")
results=${RESULTS:-$here/results/${name,,}}
rows=$results.jsonl
text=(--text "${TEXT:-wikitext}")
windows=("${text[@]}")
[ -z "${WINDOWS:-}" ] || windows+=(--windows "$WINDOWS")
[ -z "${LENGTH:-}" ] || windows+=(--length "$LENGTH")
# shellcheck disable=SC2206  # lists of words
k_chunks=(${K_CHUNKS:-0 8 16 32 64 128})
# shellcheck disable=SC2206
some_k=(${SOME_K:-8 32})
measure() { "$python" "$here/$1.py" --device "${DEVICE:-cpu}" "${@:2}"; }
draw() { "$python" "$here/figures/$1.py" "${@:2}"; }
figure() { local script=$1; shift; draw "$script" "$@" --out "$results/$script"; }

fig13_rows() {
    measure perplexity --model "$original" "${windows[@]}" --out "$rows"
    for folder in "${folders[@]}"; do
        measure perplexity --model "$folder" --k-chunk "${k_chunks[@]}" "${windows[@]}" --out "$rows"
    done
}
fig13() { fig13_rows; figure fig13_perplexity "$rows"; }
narrowest() {  # fills the array `narrow`
    local lines
    lines=$("$python" "$here/narrowest.py" "${folders[@]}")
    mapfile -t narrow <<<"$lines"
}
fig4() {
    narrowest
    for folder in "${narrow[@]}"; do
        residual "$folder" 16
        measure error_curve --model "$folder" --cheatsheet "$sheet" "${text[@]}" --length "${LENGTH:-512}" \
            --out "$results/error_curve.jsonl"
    done
    figure fig04_error_curve "$results/error_curve.jsonl"
}
fig5() {
    narrowest
    for folder in "${narrow[@]}"; do measure outliers --model "$folder" "${text[@]}" --out "$results/outliers.jsonl"; done
    figure fig05_outliers "$results/outliers.jsonl"
}
fig12() { figure fig12_kernel_time "${KERNELS:-$here/../decdec_extension/benchmarks/results/h100.jsonl}"; }
fig14() {
    local limits=(${LIMIT:+--limit "$LIMIT"} ${MAX_GEN_TOKS:+--max-gen-toks "$MAX_GEN_TOKS"} ${DATA:+--data "$DATA"})
    # shellcheck disable=SC2206
    local tasks=(${TASKS:-bbh_cot_fewshot${DATA:+_*}})  # local data has the subtasks alone
    measure lm_tasks --model "$original" --tasks "${tasks[@]}" "${limits[@]}" --out "$results/lm_tasks.jsonl"
    for folder in "${folders[@]}"; do
        measure lm_tasks --model "$folder" --k-chunk 0 "${some_k[@]}" --tasks "${tasks[@]}" "${limits[@]}" --out "$results/lm_tasks.jsonl"
    done
    figure fig14_bbh "$results/lm_tasks.jsonl"
}
fig15() {
    local bench=${DATA:?Figure 15 needs DATA with mt_bench/question.jsonl, judge_prompts.jsonl, reference_answer/gpt-4.jsonl}/mt_bench
    local limits=(--questions "$bench/question.jsonl" --out "$results/mt_bench" --max-new-tokens "${MAX_NEW_TOKENS:-1024}"
                  ${QUESTIONS:+--limit "$QUESTIONS"})
    measure mt_bench_answer --model "$original" "${limits[@]}"
    for folder in "${folders[@]}"; do measure mt_bench_answer --model "$folder" --k-chunk 0 "${some_k[@]}" "${limits[@]}"; done
    "${judge[@]}" "$python" "$here/mt_bench_judge.py" "$results/mt_bench" --questions "$bench/question.jsonl" \
        --prompts "$bench/judge_prompts.jsonl" --references "$bench/reference_answer/gpt-4.jsonl" --out "$results/mt_bench.jsonl"
    figure fig15_mt_bench "$results/mt_bench.jsonl"
}
fig16() {
    narrowest
    for folder in "${narrow[@]}"; do
        measure perplexity --model "$folder" --k-chunk "${k_chunks[@]}" --selection bucket exact static random "${windows[@]}" --out "$rows"
        measure recall --model "$folder" --k-chunk "${k_chunks[@]}" --selection bucket exact static random "${text[@]}" \
            --length "${LENGTH:-512}" --out "$results/recall.jsonl"
    done
    figure fig16_selection "$rows" "$results/recall.jsonl"
}
tuned() {  # NAME GPU...: perplexity and simulated time at the tuner's targets on each GPU
    local into=$results/$1.jsonl plans=$results/plans targets=${TARGETS:-2.5 5 10 20}
    for folder in "${folders[@]}"; do
        local made=() weights
        weights=$(grep -o '"weights_hash": "[^"]*"' "$folder/config.json")
        for gpu in "${@:2}"; do
            made+=("$plans/$(basename "$folder")-$gpu${LAW:+-law}-${targets// /-}.json")
            grep -qsF "$weights" "${made[-1]}" && continue
            local simulated=("$folder" --simulate "$gpu" ${LAW:+--law} --selection bucket --profile "$plans/$gpu.jsonl")
            "$python" "$tuner/run_profile.py" "${simulated[@]}"
            # shellcheck disable=SC2086
            "$python" "$tuner/tuner.py" "${simulated[@]}" --target $targets --out "${made[-1]}"
        done
        measure tuned --model "$folder" --plan "${made[@]}" "${windows[@]}" --out "$into"
    done
}
# shellcheck disable=SC2086
fig17() { tuned clients ${CLIENTS:-4090 4080S 4070S 4070M 4050M}; figure fig17_tuned "$results/clients.jsonl"; }
# shellcheck disable=SC2086
fig18() { tuned others ${OTHERS:-3080 4080S 5080 H100 GH200}; draw fig17_tuned "$results/others.jsonl" --out "$results/fig18_tuned"; }
# shellcheck disable=SC2086
table3() { tuned clients ${CLIENTS:-4090 4080S 4070S 4070M 4050M}; draw table3_tuner "$results/clients.jsonl" --out "$results/table3.md"; }
residual() {  # FOLDER BITS: fills `sheet` with the path of such residuals, and makes them if need be
    sheet=$("$python" "$here/sheet_of.py" "$1" "$2")
    "$python" "$setup/cheatsheet.py" "$1" --model "$original" --bits "$2" --out "$sheet"
}
table2() {
    narrowest
    local out=(--out "$results/table2.jsonl") wide=()
    for k in "${k_chunks[@]}"; do [ "$k" = 0 ] || wide+=("$k"); done
    for folder in "${narrow[@]}"; do
        measure perplexity --model "$folder" --k-chunk 0 "${windows[@]}" "${out[@]}"
        for bits in ${RESIDUAL_BITS:-2 4 8 16}; do
            residual "$folder" $bits
            local same_traffic=()
            for k in "${wide[@]}"; do [ $((k * 4 / bits)) -gt 1024 ] || same_traffic+=($((k * 4 / bits))); done
            measure perplexity --model "$folder" --cheatsheet "$sheet" --k-chunk "${same_traffic[@]}" "${windows[@]}" "${out[@]}"
        done
    done
    draw table2_residual_bits "$results/table2.jsonl" --out "$results/table2.md"
}
report() { "$python" "$here/report.py" "$results"; }

case $what in
    *.jsonl) rows=$what
             fig13_rows
             echo
             "$python" "$here/table.py" "$rows"
             draw fig13_perplexity "$rows" --out "${rows%.jsonl}.pdf" ;;
    all) [ -n "${DATA:-}" ] || fig15() { echo "Figure 15 is passed over: it needs DATA" >&2; }
         for part in fig4 fig5 fig12 fig13 fig14 fig15 fig16 fig17 fig18 table2 table3 report; do $part; done ;;
    fig4|fig5|fig12|fig13|fig14|fig15|fig16|fig17|fig18|table2|table3|report) mkdir -p "$results"; $what ;;
    *) usage ;;
esac
