#!/usr/bin/env bash
# Asks a model the questions of benchmarks and scores its answers (text_vqa, snli_ve, cifar_10, pope, ...).
#
#   bash scripts/eval_mixlora.sh [MODEL [QUESTIONS]] [--flags of llava-mixlora eval ...]
#
# MODEL is an adapter or a model, QUESTIONS the authors' folder of JSON Lines files or any other file that llava-mixlora
# eval reads. Without them: the embedded default that finetune_mixlora.sh has trained, on its held-out questions.
# Answers and scores go to MODEL/results/NAME; an interrupted run goes on where it stopped.
#   GPUS=8         processes that share the questions (default: 1)
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
if [[ "${1:-}" == "-h" || "${1:-}" == "--help" ]]; then
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "$0"
    exit 0
fi
# shellcheck source=scripts/setup.sh
source "$here/setup.sh"
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"

playground="$(dirname "$here")/playground"
model="$playground/output/llava-v1-tiny-mixlora" questions=""
if [[ $# -gt 0 && "$1" != --* ]]; then model="$1"; shift; fi
if [[ $# -gt 0 && "$1" != --* ]]; then questions="$1"; shift; fi
if [[ -z "$questions" ]]; then
    questions="$playground/cache/questions/heldout.json"
    if [[ ! -f "$questions" ]]; then
        echo "error: $questions is not there yet; run scripts/finetune_mixlora.sh first, or name MODEL and QUESTIONS" >&2
        exit 1
    fi
    set -- --image-folder "$playground/cache/data/images" --max-new-tokens 16 --batch-size 50 "$@"
fi
name="$(basename "$questions")"
launcher=(llava-mixlora)
if [[ "${GPUS:-1}" -gt 1 ]]; then launcher=(torchrun --nproc_per_node "$GPUS" -m llava_mixlora); fi
exec "${launcher[@]}" eval --model-path "$model" --questions "$questions" --output "$model/results/${name%.json*}" "$@"
