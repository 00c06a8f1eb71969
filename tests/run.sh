#!/usr/bin/env bash
# Every check of this project, from a fresh clone.
set -euo pipefail

readonly USAGE='Usage: tests/run.sh [--all] [PYTEST ARGUMENTS]
Makes .venv, installs the test extra, then: ruff, mypy, shellcheck, unit tests,
and the main path and its faults on a real broker and S3 server (Java with Maven
or KAFKA_HOME; versitygw, which is built here where Go is). A test that lacks a
program is skipped, and the last lines say which. --all runs every test, the long
fault and soak tests too. The other arguments go to pytest: -x, -k NAME, or the
only files to test, of which the long tests need --all.
PYTHON chooses the interpreter, VENV another folder than .venv.'

ROOT="$(CDPATH='' cd -- "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
readonly ROOT
VENV="${VENV:-$ROOT/.venv}"
[ "${VENV#/}" != "$VENV" ] || VENV="$PWD/$VENV"
export VENV
readonly BIN="$VENV/bin"
readonly VERSITYGW_VERSION=v1.8.0

# The S3 server of the tests; some minutes the first time, once.
build_versitygw() {
    if [ -n "${VERSITYGW:-}" ] || [ -x .local/bin/versitygw ] || command -v versitygw >/dev/null; then
        return
    fi
    if ! command -v go >/dev/null; then
        echo "Neither versitygw nor Go was found: the tests use moto as their S3 server."
        return
    fi
    echo "Building versitygw $VERSITYGW_VERSION into .local/bin (some minutes, once) ..."
    GOBIN="$ROOT/.local/bin" go install \
        "github.com/versity/versitygw/cmd/versitygw@$VERSITYGW_VERSION" && return
    echo "run.sh: versitygw was not built; Go says why above. Put one on the PATH, or name it in VERSITYGW" >&2
    exit 1
}

check_sources() {
    "$BIN/ruff" check .
    "$BIN/ruff" format --check .
    "$BIN/mypy"
    find infra tests .ci -name '*.sh' -print0 -o -path .ci/run -print0 \
        | xargs -0 "$BIN/shellcheck"
}

main() {
    cd "$ROOT"
    local argument arguments=() select=() tests=(tests/test_*.py tests/integration)
    for argument in "$@"; do
        case "$argument" in
            -h | --help) printf '%s\n' "$USAGE" && return ;;
            --all) select=(-m "") ;;
            *) arguments+=("$argument") ;;
        esac
        if [ -e "${argument%%::*}" ]; then
            tests=()
            [ ${#select[@]} -gt 0 ] || select=(-m "not slow")
        fi
    done
    infra/venv.sh test
    build_versitygw
    check_sources
    "$BIN/pytest" ${tests[@]+"${tests[@]}"} ${select[@]+"${select[@]}"} \
        ${arguments[@]+"${arguments[@]}"}
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    main "$@"
fi
