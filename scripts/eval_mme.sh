#!/usr/bin/env bash
# Scores a model on MME: accuracy and accuracy+ by subtask, perception and cognition in total.
#
#   bash scripts/eval_mme.sh MODEL MME_FOLDER [--flags of llava-mixlora eval ...]
#
# MME_FOLDER has a folder for each subtask (existence, count, ..., code_reasoning), with its images and text files.
# Answers and scores go to MODEL/results/mme. GPUS=8 shares the questions among processes.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
if [[ $# -lt 2 || "$1" == "-h" || "$1" == "--help" ]]; then
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "$0"
    [[ "${1:-}" == "-h" || "${1:-}" == "--help" ]] || { echo "error: expected MODEL and MME_FOLDER" >&2; exit 1; }
    exit 0
fi
exec bash "$here/eval_mixlora.sh" "$1" "$2" --output "$1/results/mme" --max-new-tokens 8 "${@:3}"
