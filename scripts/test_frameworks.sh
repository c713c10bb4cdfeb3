#!/usr/bin/env bash
# Tests MixLoRA in axolotl, ms-swift and LLaMA-Factory, each installed into a folder of its own, on the CPU.
#
#   bash scripts/test_frameworks.sh [PYTEST ARGUMENT ...]
#
# They lie in .stacks/, 1.6 GB, with what their programs import and no more, beside the packages of the environment.
set -euo pipefail
cd "$(dirname "$0")/.."
if [[ "${1:-}" == "-h" || "${1:-}" == "--help" ]]; then
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "$0"
    exit 0
fi
# shellcheck source=scripts/setup.sh
source scripts/setup.sh
# shellcheck source=scripts/packages_in.sh
source scripts/packages_in.sh
http=(httpx==0.28.1 httpcore==1.0.9 sniffio==1.3.1)
packages_in .stacks/axolotl-0.19.0 axolotl==0.19.0 \
    peft==0.20.0 transformers==5.16.1 tokenizers==0.23.1 huggingface_hub==1.17.0 trl==1.9.0 datasets==4.8.4 accelerate==1.13.0 \
    pydantic==2.12.5 pydantic_core==2.41.5 pydantic-extra-types==2.11.1 mistral-common==1.13.1 tiktoken==0.14.0 \
    jsonschema==4.26.0 jsonschema-specifications==2025.9.1 referencing==0.37.0 rpds-py==2026.9.1 pycountry==26.2.16 \
    addict==2.4.0 fire==0.7.1 termcolor==3.3.0 python-dotenv==1.2.4 art==6.5 fastcore==2.2.41 evaluate==0.4.1 \
    axolotl-contribs-lgpl==0.0.7 axolotl-contribs-mit==0.0.6 schedulefree==1.4.1 liger-kernel==0.8.1 \
    kernels==0.16.0 kernels-data==0.16.2 numba==0.66.0 llvmlite==0.50.0 triton==3.7.1 langdetect==1.0.9 immutabledict==4.3.1 \
    posthog==6.7.11 backoff==2.2.1 distro==1.9.0 wandb==0.31.0 sentry-sdk==2.75.0 gitpython==3.2.1 gitdb==4.0.12 smmap==5.0.3 \
    "${http[@]}"
packages_in .stacks/ms-swift-4.6.0 ms-swift==4.6.0 \
    peft==0.20.0 transformers==5.16.1 tokenizers==0.23.1 huggingface_hub==1.17.0 trl==0.29.1 datasets==4.8.4 \
    modelscope==1.40.2 modelscope-hub==0.5.1 addict==2.4.0 attrdict==2.0.1 binpacking==2.0.1 dacite==1.9.2 \
    json-repair==0.64.6 simplejson==4.3.0 jieba==0.42.1 rouge==1.0.1 nltk==3.10.4 tensorboard==2.21.0 oss2==2.19.1 \
    transformers-stream-generator==0.0.5 openai==3.57.0 cpm-kernels==1.0.11 importlib-metadata==10.2.0 zstandard==0.25.0 \
    cryptography==50.0.2 cffi==2.1.1 pycparser==3.12 "${http[@]}"
packages_in .stacks/llamafactory-0.9.5 llamafactory==0.9.5 \
    peft==0.18.1 transformers==4.57.6 tokenizers==0.22.2 huggingface_hub==0.36.2 trl==0.24.0 datasets==4.0.0 accelerate==1.11.0 \
    fsspec==2025.3.0 omegaconf==2.4.0 antlr4-python3-runtime==4.9.3 tyro==0.8.14 shtab==1.13.0 sse-starlette==3.7.0 av==16.0.0 \
    modelscope==1.40.2 modelscope-hub==0.5.1 fire==0.7.1 tiktoken==0.14.0 torchdata==0.11.0
# LLaMA-Factory imports torchaudio, to read sound with, and that of PyPI does not load beside a PyTorch without CUDA.
python -c 'import torchaudio' 2> /dev/null || touch .stacks/llamafactory-0.9.5/torchaudio.py
exec python -m pytest tests/end_to_end/test_frameworks.py "$@"
