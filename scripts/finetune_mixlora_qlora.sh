#!/usr/bin/env bash
# Fine-tunes LLaVA with MixLoRA on a quantized base model (QLoRA): 4-bit weights, nf4 with double quantization.
#
#   bash scripts/finetune_mixlora_qlora.sh [ROUTING [FACTORS [RANK]]] [--flags of llava.train.train ...]
#
# --bits 8 quantizes to 8 bits instead. The optimizer is paged_adamw_8bit where there is a GPU; --optim names another.
# The adapter loads on a base of 16, 8 or 4 bits. Everything else is as in finetune_mixlora.sh, whose help follows.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
if [[ "${1:-}" == "-h" || "${1:-}" == "--help" ]]; then
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "$0"
    echo
fi
QLORA=1 exec bash "$here/finetune_mixlora.sh" "$@"
