#!/usr/bin/env bash
# Merges a MixLoRA adapter into its base: one LLaVA checkpoint that needs no plugin, and a report how near it comes.
#
#   bash scripts/merge_mixlora.sh --model-path ADAPTER --model-base BASE --save-model-path OUT
#        [--task NAME] [--calibration DATA --image-folder DIR] [--method distillation|regression|lstsq|mean] [--force]
#
# The first three flags are those of LLaVA's scripts/merge_lora_weights.py; --help lists all of them.
set -euo pipefail
# shellcheck source=scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
exec llava-mixlora merge "$@"
