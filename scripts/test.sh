#!/usr/bin/env bash
# Sets everything up and runs every check: formatting, lint and the tests with coverage (at least 85% of lines).
#
#   bash scripts/test.sh                   everything
#   bash scripts/test.sh --quick           what a pull request should pass, in under three minutes on two cores: lint,
#                                          and the tests that are neither end to end nor marked slow
#   bash scripts/test.sh tests/patches -x  pytest arguments: only those tests, without the coverage bound
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

# The TRL of older environments, of which TRL 1 keeps less, with what it needs beside the packages that are there; and
# PEFT as others pin it, one version for each way in which it differs (bash scripts/test_peft.sh: all of them); and what
# drives a browser, if there is one.
if [[ "${1:-}" != "--quick" ]]; then
    packages_in .stacks/trl-0.24 \
        trl==0.24.0 transformers==4.57.6 tokenizers==0.22.2 huggingface_hub==0.36.2 datasets==3.6.0
    if command -v chromium chromium-browser google-chrome > /dev/null; then
        packages_in .stacks/browser playwright==1.65.2 pyee==13.0.1 greenlet==3.5.6
    fi
    for version in 0.14.0 0.17.1 0.18.1 0.20.0; do
        packages_in ".stacks/peft-$version" "peft==$version"
    done
fi

export OMP_NUM_THREADS=1 # the processes that share the tests are as many as the cores
ruff check .
ruff format --check .
processes="$(env -u OMP_NUM_THREADS nproc)" # which goes by it
if [[ "${1:-}" == "--quick" ]]; then
    exec python -m pytest --numprocesses "$((processes < 4 ? processes : 4))" --dist worksteal \
        --ignore tests/end_to_end -m "not slow" "${@:2}"
fi
if [[ $# -gt 0 ]]; then
    exec python -m pytest "$@"
fi
# A file's tests share what they train, so they stay together, and the end-to-end files, the longest, begin; more than
# four processes would wait for them.
export TESTS_COMPILED="$PWD/.stacks/compiled" # shared with scripts/test_stacks.sh: DeepSpeed compiles for a minute
coverage erase
coverage run -m pytest --numprocesses "$((processes < 4 ? processes : 4))" --dist loadfile --no-loadscope-reorder --durations 15
coverage combine --quiet
coverage report --fail-under=85
