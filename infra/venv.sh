#!/usr/bin/env bash
# Makes .venv beside the scripts, or brings it up to date.
set -euo pipefail

readonly USAGE='Usage: infra/venv.sh [EXTRA]
Makes .venv (or the folder in VENV) and installs the project into it, with an
extra of pyproject.toml: fast, local, metrics, report, test. A folder that was
moved, or whose Python is gone, is made anew. PYTHON chooses the interpreter:
3.11 or newer. Where uv is installed it does the work, otherwise venv and pip.'

ROOT="$(CDPATH='' cd -- "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
readonly ROOT

VENV="${VENV:-$ROOT/.venv}"
[ "${VENV#/}" != "$VENV" ] || VENV="$PWD/$VENV"
readonly VENV
readonly LOG="$VENV/install.log"

die() {
    printf 'venv.sh: %s\n' "$1" >&2
    exit "${2:-1}"
}

# The names under [project.optional-dependencies], one a line.
extras() {
    sed -n '/^\[project.optional-dependencies\]/,/^\[tool/s/^\([a-z][a-z0-9_-]*\) = .*/\1/p' \
        "$ROOT/pyproject.toml"
}

check_extra() {
    [ -z "$1" ] || extras | grep -qxF -- "$1" \
        || die "no extra '$1' in pyproject.toml; there are: $(extras | paste -sd ' ' -)" 2
}

# The project is installed as it stands here, and pip writes beside pyproject.toml.
check_writable() {
    [ -w "$ROOT" ] \
        || die "$ROOT cannot be written to: copy it to a folder of yours (cp -R $ROOT ~/) and run it there"
}

how_to_get_python() {
    if command -v apt-get >/dev/null; then
        echo "apt install python3 python3-venv; where that is older: uv, which brings its own (https://docs.astral.sh/uv)"
    elif command -v dnf >/dev/null; then
        echo "dnf install python3.12"
    elif command -v brew >/dev/null; then
        echo "brew install python@3.12"
    else
        echo "https://www.python.org/downloads, or uv, which brings its own (https://docs.astral.sh/uv)"
    fi
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
    return 1
}

# Whether the folder is a virtual environment that works where it stands: its Python runs, is the
# one that it was made with, and its programs start that one. $1: an interpreter whose version it
# must have, or nothing.
works() {
    "$VENV/bin/python" - "$1" <<'END' 2>/dev/null
import re
import subprocess
import sys
from pathlib import Path

ASK = "import sys; print('python%d.%d' % sys.version_info[:2])"


def is_ours(program):
    """Whether it is started by this environment's Python: its first line says so, or its second
    where the path is long or has blanks."""
    with program.open("rb") as file:
        start = file.read(1000).decode(errors="replace")
    found = re.match(r"""#!(?:/bin/sh\n'{3}exec' ["']?)?(/.*?)/bin/python""", start)
    return found is None or Path(found[1]).samefile(folder)


folder = Path(sys.prefix)
version = "python%d.%d" % sys.version_info[:2]
asked_for = version
if sys.argv[1]:
    asked_for = subprocess.check_output([sys.argv[1], "-c", ASK], text=True).strip()
assert sys.version_info >= (3, 11)
assert [path.name for path in folder.glob("lib/python3*")] == [version] == [asked_for]
assert all(is_ours(program) for program in folder.glob("bin/*") if program.is_file())
END
}

# Runs a command with its output in the log, and says what is happening once it takes 5 seconds.
quietly() {
    local doing="$1" notice status=0
    shift
    (
        sleep 5 >/dev/null 2>&1
        echo "venv.sh: $doing" >&2
    ) &
    notice=$!
    "$@" >"$LOG" 2>&1 || status=$?
    kill "$notice" 2>/dev/null || true
    wait "$notice" 2>/dev/null || true
    return "$status"
}

# What went wrong, in the words of the program that wrote the log.
reason() {
    grep -iE '^ *(error|×|failed)' "$LOG" | tail -n 1 || tail -n 1 "$LOG"
}

# The name of something in VENV that no virtual environment has; nothing beside it is removed.
find_stranger() {
    local path
    for path in "$VENV"/* "$VENV"/.[!.]*; do
        case "${path##*/}" in
            bin | include | lib | lib64 | share | etc | pyvenv.cfg) ;;
            install.log | .installed-* | .gitignore | .lock | CACHEDIR.TAG | uv-* | .tmp*) ;;
            *) [ ! -e "$path" ] || { echo "${path##*/}" && return; } ;;
        esac
    done
    return 1
}

make_venv() {
    local python="" stranger
    python="$(find_python)" || [ -z "${PYTHON:-}" ] \
        || die "PYTHON=$PYTHON is not Python 3.11 or newer"
    if [ -e "$VENV/pyvenv.cfg" ] || [ -e "$LOG" ]; then
        ! works "${PYTHON:+$python}" || return 0
        ! stranger="$(find_stranger)" \
            || die "$VENV is no virtual environment that works, and has $stranger in it: remove it yourself, or set VENV to another folder"
        echo "venv.sh: $VENV was moved, is of another Python or not complete: making it anew" >&2
        rm -rf "$VENV"
    elif [ -d "$VENV" ] && [ -n "$(ls -A "$VENV")" ]; then
        die "$VENV is there and is no virtual environment: set VENV to another folder"
    fi
    check_writable
    if [ -z "$python" ] && ! command -v uv >/dev/null; then
        die "no Python 3.11 or newer was found. To get it: $(how_to_get_python)"
    fi
    mkdir -p "$VENV" || die "$VENV cannot be made: set VENV to a folder that can"
    if command -v uv >/dev/null; then
        quietly "making $VENV ..." uv venv --seed --allow-existing --python "${python:-3.12}" "$VENV" \
            || die "uv cannot make $VENV: $(reason)"
    else
        quietly "making $VENV ..." "$python" -m venv "$VENV" \
            || die "$python cannot make a virtual environment (Debian, Ubuntu: apt install python3-venv)"
    fi
}

# Editable: the scripts are run and tested where they stand. Nothing to do while pyproject.toml is
# older than the last time.
install() {
    local project="$ROOT${1:+[$1]}" done_before="$VENV/.installed-$1" installer
    [ ! "$done_before" -nt "$ROOT/pyproject.toml" ] || return 0
    check_writable
    if command -v uv >/dev/null; then
        # uv leaves its locks in the temporary folder
        installer=(env "TMPDIR=$VENV" uv pip install --python "$VENV/bin/python")
    else
        "$VENV/bin/python" -m pip --version >/dev/null 2>&1 \
            || "$VENV/bin/python" -m ensurepip >"$LOG" 2>&1 \
            || die "$VENV has no pip and cannot be given one (Debian, Ubuntu: apt install python3-venv)"
        installer=("$VENV/bin/python" -m pip install --disable-pip-version-check)
    fi
    quietly "installing what pyproject.toml names into $VENV (a minute or two, once) ..." \
        "${installer[@]}" --editable "$project" \
        || die "not installed: $(reason) (all of it: $LOG). Look at the network and the proxy, then run this again"
    touch "$done_before"
}

main() {
    case "${1:-}" in
        -h | --help) printf '%s\n' "$USAGE" && return ;;
        -*) printf '%s\n' "$USAGE" >&2 && return 2 ;;
    esac
    [ $# -le 1 ] || { printf '%s\n' "$USAGE" >&2 && return 2; }
    trap 'exit 130' INT
    check_extra "${1:-}"
    make_venv
    install "${1:-}"
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    main "$@"
fi
