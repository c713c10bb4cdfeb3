#!/usr/bin/env bash
# Tests the method beside every minor version of PEFT since 0.13, each installed into a folder of its own.
#
#   bash scripts/test_peft.sh [PYTEST ARGUMENT ...]
#
# A few megabytes each, in .stacks/; scripts/test.sh runs those that are there.
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
packages_in .stacks/trl-0.24 \
    trl==0.24.0 transformers==4.57.6 tokenizers==0.22.2 huggingface_hub==0.36.2 datasets==3.6.0
for version in 0.13.2 0.14.0 0.15.2 0.16.0 0.17.1 0.18.1 0.19.1 0.20.0; do
    packages_in ".stacks/peft-$version" "peft==$version"
done
exec python -m pytest tests/end_to_end/test_peft_versions.py "$@"
