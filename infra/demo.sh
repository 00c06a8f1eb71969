#!/usr/bin/env bash
# The pair on this machine, from a fresh clone: real rows through a broker into an S3 bucket.
set -euo pipefail

readonly USAGE='Usage: infra/demo.sh
Makes .venv, installs, starts a broker and an S3 server on free ports of this
machine, streams rows of tests/data/ through both scripts for 20 seconds, shows
and audits the objects, and cleans up. Needs Python 3.11 or newer; with Java and
Maven the broker is Apache Kafka. Reads no .env and nothing of your environment
but PATH, PYTHON (the interpreter), VENV (another folder than .venv), JAVA_HOME
and KAFKA_HOME: your own broker and bucket are never touched.'

ROOT="$(CDPATH='' cd -- "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
readonly ROOT
VENV="${VENV:-$ROOT/.venv}"
[ "${VENV#/}" != "$VENV" ] || VENV="$PWD/$VENV"
export VENV
readonly VENV
readonly PY="$VENV/bin/python"
readonly ROWS=20

work=""    # temporary folder: the scripts, their logs
stack=""   # pid of infra/local_stack.py
consumer="" # pid
producer="" # pid
settings=() # NAME=value for both scripts

say() {
    printf '\n== %s\n' "$1"
}

die() {
    printf 'demo.sh: %s\n' "$1" >&2
    exit 1
}

# Copies stdin to stdout, each line with a name before it; a record is cut at the terminal's width.
label() {
    local line width=100000
    [ ! -t 1 ] || width="$(tput cols 2>/dev/null || echo 80)"
    while IFS= read -r line || [ -n "$line" ]; do
        case "$line" in
            '   Content: '*) line="${line:0:$((width - 11))}" ;;
        esac
        printf '%-8s | %s\n' "$1" "$line"
    done
}

clean_up() {
    local pid
    trap '' INT TERM HUP
    for pid in $producer $consumer $stack; do
        kill "$pid" 2>/dev/null || true
    done
    wait
    [ -z "$work" ] || rm -rf "$work"
}

start_stack() {
    local log="$work/stack.log"
    : >"$log"
    "$PY" "$ROOT/infra/local_stack.py" --port 0 --s3-port 0 > >(tee "$log" | label stack) 2>&1 &
    stack=$!
    until grep -q '^Ready' "$log"; do
        kill -0 "$stack" 2>/dev/null || die "the local stack did not start; it says why above"
        sleep 0.2
    done
}

# Every setting as .env.example has it, but for the addresses.
read_settings() {
    local line
    while IFS= read -r line; do
        case "$line" in
            '' | '#'*) ;;
            *) settings+=("$line") ;;
        esac
    done <"$ROOT/.env.example"
    settings+=(
        "KAFKA_BOOTSTRAP_SERVERS=$(sed -n 's/^Kafka: \(localhost:[0-9]*\) .*/\1/p' "$work/stack.log")"
        "S3_ENDPOINT_URL=$(sed -n 's/^S3: *\(http:[^ ]*\) .*/\1/p' "$work/stack.log")"
        "CSV_PATH=$ROOT/tests/data/indexProcessed.csv"
    )
}

# Runs Python with these settings and no others; $HOME has no AWS profile.
with_settings() {
    exec env -i "PATH=$PATH" "HOME=$work" "LANG=${LANG:-C.UTF-8}" PYTHONUNBUFFERED=1 \
        "${settings[@]}" "$PY" "$@"
}

# The scripts run from a copy: a .env stands beside the originals, not beside these.
stream_rows() {
    mkdir "$work/infra"
    cp "$ROOT"/config.py "$ROOT"/kafka_producer.py "$ROOT"/kafka_consumer.py "$work"
    cp "$ROOT"/infra/audit.py "$work/infra"
    with_settings "$work/kafka_consumer.py" --max-messages "$ROWS" > >(label consumer) 2>&1 &
    consumer=$!
    with_settings "$work/kafka_producer.py" --max-messages "$ROWS" > >(label producer) 2>&1 &
    producer=$!
    wait "$producer" || die "the producer failed, exit code $?; it says why above"
    producer=""
    wait "$consumer" || die "the consumer failed, exit code $?; it says why above"
    consumer=""
}

show_objects() {
    with_settings - <<'END'
import os
import s3fs

fs = s3fs.S3FileSystem(endpoint_url=os.environ["S3_ENDPOINT_URL"])
objects = sorted(fs.ls(os.environ["S3_BUCKET"], detail=True), key=lambda found: found["LastModified"])
for found in objects:
    print(f"{found['size']:6} bytes  s3://{found['name']}")
print(f"\nThe last one:\n{fs.cat_file(objects[-1]['name']).decode()}")
END
}

main() {
    case "${1:-}" in
        '') ;;
        -h | --help) printf '%s\n' "$USAGE" && return ;;
        *) printf '%s\n' "$USAGE" >&2 && return 2 ;;
    esac
    trap clean_up EXIT
    trap 'exit 129' HUP
    trap 'exit 130' INT
    trap 'exit 143' TERM
    work="$(mktemp -d)"

    say "Installing into ${VENV#"$ROOT/"} (the first time takes a minute)"
    "$ROOT/infra/venv.sh" local
    say "Starting Kafka and S3 on this machine"
    start_stack
    read_settings
    say "Streaming $ROWS rows, one a second"
    stream_rows
    say "What is in the bucket"
    (show_objects)
    say "Audit: every offset against its object"
    (with_settings "$work/kafka_consumer.py" --audit)
    say "Done; broker, bucket and data go now. To go on, with a terminal each:"
    printf '    %s\n' "cp -n .env.example .env" \
        "${PY#"$ROOT/"} infra/local_stack.py  # first: Kafka and S3, until Ctrl-C" \
        "${PY#"$ROOT/"} kafka_producer.py     # second" \
        "${PY#"$ROOT/"} kafka_consumer.py     # third"
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    main "$@"
fi
