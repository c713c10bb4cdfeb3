#!/usr/bin/env bash
# packages_in FOLDER PACKAGE...: installs packages, without what they need, into a folder of their own, once; for
# sourcing. PYTHONPATH=FOLDER puts them before those of the environment.
#
# pip replaces nothing in such a folder, so another version needs another name.
packages_in() {
    local folder="$1"
    shift
    [[ -d "$folder" ]] && return 0
    rm -rf "$folder.part"
    python -m pip install --quiet --disable-pip-version-check --no-deps --no-compile --target "$folder.part" "$@" ||
        return 1
    mv "$folder.part" "$folder"
}
