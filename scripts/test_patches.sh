#!/usr/bin/env bash
# Sets everything up, takes each patch away, one at a time, and shows which test notices; --help tells more.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/setup.sh
source scripts/setup.sh
exec python -m tests.without_patches "$@"
