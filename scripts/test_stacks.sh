#!/usr/bin/env bash
# Tests the plugin on every stack of versions, each in an environment of its own, and that adapters travel between them.
#
#   bash scripts/test_stacks.sh [STACK ...]
#
#   STACK  transformers-4.37 (LLaVA's own versions), transformers-4.40 (LLaVA-NeXT), transformers-4.57 or default
#          (default: all four)
#
# LLaVA-NeXT is fetched by git, or LLAVA=FOLDER names a checkout of it; where neither can be had, its stack is skipped.
# The versions of a stack are in scripts/constraints-STACK.txt (default: scripts/constraints.txt), its environment is
# .stacks/STACK (default: the active one, or .venv). With SKIP_TESTS=default only the adapters of that stack are tested,
# after scripts/test.sh, which runs the tests on it.
set -euo pipefail
cd "$(dirname "$0")/.."
if [[ "${1:-}" == "-h" || "${1:-}" == "--help" ]]; then
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "$0"
    exit 0
fi
known=()
for file in scripts/constraints-*.txt; do
    file="${file#scripts/constraints-}"
    known+=("${file%.txt}")
done
known+=(default)
stacks=("$@")
[[ $# -gt 0 ]] || stacks=("${known[@]}")
for stack in "${stacks[@]}"; do
    [[ " ${known[*]} " == *" $stack "* ]] || { echo "error: $stack: expected one of ${known[*]}" >&2; exit 1; }
done

# What is tested on each stack, but for pure functions: the library, the patches, and training, resuming, loading and merging in real processes.
tests=(
    tests/end_to_end/test_launchers.py tests/end_to_end/test_checkpoints.py tests/end_to_end/test_serving.py
    tests/patches tests/llava_mixlora
)
# The stack of LLaVA-NeXT, at the commit that scripts/README.md (Versions) names, and what is tested there.
next=transformers-4.40
next_from=https://github.com/LLaVA-VL/LLaVA-NeXT
next_commit=b42941ceba259d5df18f8df8193a3897296a0449
next_tests=(tests/forks)
export OMP_NUM_THREADS=1
export TESTS_COMPILED="$PWD/.stacks/compiled" # of all stacks, which have the same torch
shared="$(mktemp -d)"
trap 'rm -rf "$shared"' EXIT

# next_folder: tells where LLaVA-NeXT is, and fetches it if need be; fails, with the reason, where it cannot be had.
next_folder() {
    local folder="$PWD/.stacks/LLaVA-NeXT" part
    if [[ -n "${LLAVA:-}" ]]; then
        [[ -f "$LLAVA/llava/__init__.py" ]] || { echo "LLAVA=$LLAVA holds no llava package; expected a checkout"; return 1; }
        (cd "$LLAVA" && pwd)
        return
    fi
    if [[ ! -d "$folder" ]]; then
        mkdir -p .stacks
        part="$(mktemp -d "$PWD/.stacks/LLaVA-NeXT.XXXXXX")"
        if ! (cd "$part" && git init --quiet && export GIT_TERMINAL_PROMPT=0 \
            && timeout 300 git fetch --quiet --depth 1 "$next_from" "$next_commit" && git checkout --quiet FETCH_HEAD) 2> "$part.log"; then
            echo "$next_from could not be fetched ($(tail -n 1 "$part.log")); LLAVA=FOLDER names a checkout of it"
            rm -rf "$part" "$part.log"
            return 1
        fi
        rm "$part.log"
        mv "$part" "$folder"
    fi
    echo "$folder"
}

# in_stack STACK COMMAND...: runs a command in the stack's environment, which is set up first.
in_stack() {
    local stack="$1"
    shift
    (
        if [[ "$stack" != default ]]; then
            unset CONDA_PREFIX
            export VIRTUAL_ENV="$PWD/.stacks/$stack" CONSTRAINTS="$PWD/scripts/constraints-$stack.txt" EXTRAS=qlora,deepspeed,serve,dev
            [[ "$stack" != "$next" ]] || export EXTRAS="$EXTRAS,next" PYTHONPATH="$next_at"
            export PIP_NO_COMPILE=1 # most of what is installed is never imported
            [[ -x "$VIRTUAL_ENV/bin/python" ]] || "${PYTHON:-python3}" -m venv "$VIRTUAL_ENV" || exit 1
            export PATH="$VIRTUAL_ENV/bin:$PATH"
        fi
        # shellcheck source=scripts/setup.sh
        source scripts/setup.sh || exit 1 # the shell does not stop by itself where a function is asked for its status
        export MIXLORA_EXCHANGE="$shared" MIXLORA_STACK="$stack"
        "$@"
    )
}

# test_stack STACK PROCESSES: what is run in the stack's environment.
test_stack() {
    if [[ " ${SKIP_TESTS:-} " != *" $1 "* ]]; then
        local chosen=("${tests[@]}")
        [[ "$1" != "$next" ]] || chosen=("${next_tests[@]}")
        python -m pytest --numprocesses "$2" --dist loadfile --no-loadscope-reorder \
            -m "not slow and not one_stack" "${chosen[@]}"
    fi
}

# of_stack STACK PROCESSES: installs and tests it; the last line says how that went.
of_stack() {
    local installed
    echo "== $1"
    SECONDS=0
    in_stack "$1" true || { echo "$1: NOT INSTALLED"; return 1; }
    installed=$SECONDS
    SECONDS=0
    in_stack "$1" test_stack "$1" "$2" || { echo "$1: FAILED in $SECONDS s, installed in $installed s"; return 1; }
    echo "$1: passed in $SECONDS s, installed in $installed s"
}

# LLaVA-NeXT's is left out where that cannot be had; where LLAVA is wrong, it was meant to be tested.
here=() of_llava=() summary=()
for stack in "${stacks[@]}"; do
    if [[ "$stack" != "$next" ]]; then
        here+=("$stack")
        of_llava+=("$stack")
    elif next_at="$(next_folder)"; then
        here+=("$stack")
    else
        [[ -z "${LLAVA:-}" ]] || { echo "error: $next_at" >&2; exit 1; }
        summary+=("$stack: skipped: $next_at")
    fi
done

# All at once, with one process or more each: much of it waits for a single one. What they say comes when they end.
processes="$(($(env -u OMP_NUM_THREADS nproc) / (${#here[@]} > 0 ? ${#here[@]} : 1)))" # nproc goes by it
failed=0
running=()
for stack in "${here[@]}"; do
    of_stack "$stack" "$((processes > 1 ? processes : 1))" > "$shared/$stack.log" 2>&1 &
    running+=("$!")
done
for number in "${!here[@]}"; do
    wait "${running[number]}" || failed=1
    cat "$shared/${here[number]}.log"
    summary+=("$(tail -n 1 "$shared/${here[number]}.log")")
done
# One after the other: the first, the oldest, writes the base that all train on, since older versions of transformers do
# not read what newer ones write.
for what in trains load; do
    for stack in "${of_llava[@]}"; do
        echo "== adapters on $stack: $what"
        outcome=passed
        in_stack "$stack" python -m pytest tests/stacks -k "$what" || { outcome=FAILED; failed=1; }
        summary+=("$stack: adapters of ${of_llava[*]}, $what: $outcome")
    done
done
printf '%s\n' "" "${summary[@]}"
exit "$failed"
