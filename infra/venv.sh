#!/usr/bin/env bash
# Makes .venv beside the scripts, or brings it up to date.
set -euo pipefail

readonly USAGE='Usage: infra/venv.sh [EXTRA]
Makes .venv (or the folder in VENV) and installs the project with an extra of pyproject.toml:
local, metrics, report or test. PYTHON chooses the interpreter: 3.11 or newer.'

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
readonly ROOT
readonly VENV="${VENV:-$ROOT/.venv}"

die() {
    printf 'venv.sh: %s\n' "$1" >&2
    exit 1
}

# The interpreter: PYTHON, or the first on the PATH that is new enough.
find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.12 python3 python3.13 python3.14 python3.11}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    die "no Python 3.11 or newer (looked for: ${PYTHON:-python3, python3.11 to python3.14})"
}

make_venv() {
    local python
    [ ! -x "$VENV/bin/pip" ] || return 0
    python="$(find_python)"
    "$python" -m venv "$VENV" \
        || die "$python cannot make a virtual environment (Debian, Ubuntu: apt install python3-venv)"
}

# Editable: the scripts are run and tested where they stand. Nothing to do while pyproject.toml is
# older than the last time.
install() {
    local done_before="$VENV/.installed-$1"
    [ ! "$done_before" -nt "$ROOT/pyproject.toml" ] || return 0
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check \
        --editable "$ROOT${1:+[$1]}"
    touch "$done_before"
}

main() {
    case "${1:-}" in
        -h | --help) printf '%s\n' "$USAGE" && return ;;
        -*) printf '%s\n' "$USAGE" >&2 && return 2 ;;
    esac
    make_venv
    install "${1:-}"
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    main "$@"
fi
