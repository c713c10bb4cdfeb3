#!/usr/bin/env bash
# Measures MixLoRA on a CUDA GPU, in one command; the same command goes on where an earlier run stopped.
#
#   bash scripts/benchmark_gpu.sh [STEP ...]
#
#   STEP  speed      a LLaVA of 7B parameters with random weights: training, decoding and loading beside LoRA, on 16-bit
#                    and on 4-bit weights (80 GB of GPU memory; python -m playground.benchmarks.benchmark gpu --help for less)
#         qlora      the main job on 4-bit weights in bfloat16: its accuracy beside that of the CPU
#         attention  upstream's train_mem beside train: the same losses with flash-attn (pip install flash-attn)
#         smollm2    the main job on a really pretrained language model, SmolLM2-135M, in bfloat16
#         default    all of them
#
# SPEED_FLAGS='--rounds 7 --weights bf16' are flags for speed, where time on the GPU is short.
# Figures go to playground/results/. Where nothing can be installed, NO_SETUP=1 takes the packages that are there (see
# setup.sh). TRIAL=1 does a little of each on any machine, to see that everything runs, with
# figures in playground/output/trial/.
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
if [[ "${1:-}" == "-h" || "${1:-}" == "--help" ]]; then
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "$0"
    exit 0
fi
known=(speed qlora attention smollm2)
steps=("$@")
[[ $# -gt 0 ]] || steps=("${known[@]}")
for step in "${steps[@]}"; do
    [[ " ${known[*]} " == *" $step "* ]] || { echo "error: $step: expected one of ${known[*]}" >&2; exit 1; }
done

# shellcheck source=scripts/setup.sh
source "$root/scripts/setup.sh"
cd "$root"
if [[ -z "${TRIAL:-}" ]] && ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "error: PyTorch sees no CUDA GPU (llava-mixlora doctor tells why); TRIAL=1 tries everything without one" >&2
    exit 1
fi

results="$root/playground/results"
output="${OUTPUT_DIR:-$root/playground/output/${TRIAL:+trial/}llava-v1-tiny-mixlora-gpu}"
cache="${CACHE_DIR:-$root/playground/cache${TRIAL:+/trial}}"
[[ -z "${TRIAL:-}" ]] || results="$output/results"
mkdir -p "$results"
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}" # one GPU

bf16=(--bf16 True)
[[ -z "${TRIAL:-}" ]] || bf16=()
for step in "${steps[@]}"; do
    echo "== $step"
    case "$step" in
        speed)
            size=()
            [[ -z "${TRIAL:-}" ]] || size=(--size narrow --layers 1 --batch-size 1 --rounds 1 --weights bf16 --parts decode)
            # shellcheck disable=SC2086 # several flags
            python -m playground.benchmarks.benchmark gpu "${size[@]}" ${SPEED_FLAGS:-} --output "$results/benchmark_gpu.json"
            ;;
        qlora)
            OUTPUT_DIR="$output" CACHE_DIR="$cache" bash scripts/finetune_mixlora_qlora.sh \
                --optim adamw_torch "${bf16[@]}"
            cp "$output/results.json" "$results/qlora_gpu.json"
            ;;
        attention)
            python -m playground.studies.attention_losses --cache "$cache" ${TRIAL:+--steps 2 --batch-size 2} \
                --output "$results/attention_gpu.json"
            ;;
        smollm2)
            LANGUAGE_MODEL=smollm2 OUTPUT_DIR="$output-smollm2" CACHE_DIR="$cache" bash scripts/finetune_mixlora.sh \
                "${bf16[@]}"
            cp "$output-smollm2/results.json" "$results/smollm2_gpu.json"
            ;;
    esac
done
