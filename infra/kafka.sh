#!/usr/bin/env bash
# Kafka's own command-line tools, run from the jars that infra/local_stack.py fetched.
set -euo pipefail

readonly USAGE='Usage: infra/kafka.sh TOOL [ARGUMENTS]
Runs one of the tools of Apache Kafka'"'"'s bin/ folder: topics is kafka-topics.sh.

    infra/kafka.sh topics --list
    infra/kafka.sh topics --create --topic stocks --partitions 3
    infra/kafka.sh consumer-groups --describe --group python-consumer-group
    infra/kafka.sh console-consumer --topic test --from-beginning

TOOL --help has the arguments. The broker is, unless you name one as the tool
wants it (--bootstrap-server), KAFKA_BOOTSTRAP_SERVERS of the environment or
of .env, else localhost:9092. KAFKA_HOME may name another Kafka.'

readonly TOOLS='acls broker-api-versions cluster configs console-consumer
console-producer consumer-groups consumer-perf-test delegation-tokens
delete-records dump-log features get-offsets leader-election log-dirs
producer-perf-test reassign-partitions replica-verification
streams-application-reset topics transactions verifiable-consumer
verifiable-producer'

ROOT="$(CDPATH='' cd -- "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
readonly ROOT
readonly LIBS="${KAFKA_HOME:-$ROOT/.local/kafka}/libs"

die() {
    printf 'kafka.sh: %s\n' "$1" >&2
    exit "${2:-1}"
}

# The class of the tool $1, as Apache's scripts name it.
main_class() {
    case "$1" in
        acls) echo kafka.admin.AclCommand ;;
        broker-api-versions) echo kafka.admin.BrokerApiVersionsCommand ;;
        cluster) echo kafka.tools.ClusterTool ;;
        configs) echo kafka.admin.ConfigCommand ;;
        console-consumer) echo kafka.tools.ConsoleConsumer ;;
        console-producer) echo kafka.tools.ConsoleProducer ;;
        consumer-groups) echo kafka.admin.ConsumerGroupCommand ;;
        consumer-perf-test) echo kafka.tools.ConsumerPerformance ;;
        delegation-tokens) echo kafka.admin.DelegationTokenCommand ;;
        delete-records) echo kafka.admin.DeleteRecordsCommand ;;
        dump-log) echo kafka.tools.DumpLogSegments ;;
        features) echo kafka.admin.FeatureCommand ;;
        get-offsets) echo kafka.tools.GetOffsetShell ;;
        leader-election) echo kafka.admin.LeaderElectionCommand ;;
        log-dirs) echo kafka.admin.LogDirsCommand ;;
        producer-perf-test) echo org.apache.kafka.tools.ProducerPerformance ;;
        reassign-partitions) echo kafka.admin.ReassignPartitionsCommand ;;
        replica-verification) echo kafka.tools.ReplicaVerificationTool ;;
        streams-application-reset) echo kafka.tools.StreamsResetter ;;
        topics) echo kafka.admin.TopicCommand ;;
        transactions) echo org.apache.kafka.tools.TransactionsCommand ;;
        verifiable-consumer) echo org.apache.kafka.tools.VerifiableConsumer ;;
        verifiable-producer) echo org.apache.kafka.tools.VerifiableProducer ;;
        *) return 1 ;;
    esac
}

# What the tool $1 calls the brokers' addresses; nothing for one that asks no broker.
server_option() {
    case "$1" in
        dump-log) ;;
        producer-perf-test) echo --producer-props ;;
        replica-verification) echo --broker-list ;;
        streams-application-reset) echo --bootstrap-servers ;;
        *) echo --bootstrap-server ;;
    esac
}

# The value of KAFKA_BOOTSTRAP_SERVERS, as the two scripts find it.
servers() {
    local line=""
    if [ -z "${KAFKA_BOOTSTRAP_SERVERS:-}" ] && [ -f "$ROOT/.env" ]; then
        line="$(sed -n 's/^[[:space:]]*\(export \)\{0,1\}KAFKA_BOOTSTRAP_SERVERS=//p' "$ROOT/.env" | tail -n 1)"
        line="$(printf '%s' "$line" | sed 's/[[:space:]]#.*$//' | tr -d "\"' \r")"
    fi
    line="${KAFKA_BOOTSTRAP_SERVERS:-$line}"
    echo "${line:-localhost:9092}"
}

# Whether the option $1 is among the other arguments, as `--option value` or `--option=value`.
given() {
    local option="$1" argument
    shift
    for argument in "$@"; do
        case "$argument" in
            "$option" | "$option="* | --help | --version) return 0 ;;
        esac
    done
    return 1
}

# Kafka's tools try for a minute and end with a stack trace; on this machine one look is enough.
check_broker() {
    local first="${1%%,*}"
    case "${first%:*}" in
        localhost | 127.0.0.1) ;;
        *) return 0 ;;
    esac
    (: <>"/dev/tcp/${first%:*}/${first##*:}") 2>/dev/null \
        || die "no broker at $first: start infra/local_stack.py in another terminal, or name another with KAFKA_BOOTSTRAP_SERVERS"
}

find_java() {
    local java="${JAVA_HOME:+$JAVA_HOME/bin/}java"
    "$java" -version >/dev/null 2>&1 \
        || die "Java was not found (Debian, Ubuntu: apt install default-jre-headless; Fedora: dnf install java-21-openjdk-headless; macOS: brew install openjdk)"
    echo "$java"
}

main() {
    local tool option class java address jars=("$LIBS"/kafka_*.jar)
    case "${1:-}" in
        -h | --help) printf '%s\n\nTools:\n%s\n' "$USAGE" "$TOOLS" && return ;;
        '' | -*) printf '%s\n\nTools:\n%s\n' "$USAGE" "$TOOLS" >&2 && return 2 ;;
    esac
    tool="${1#kafka-}"
    tool="${tool%.sh}"
    shift
    class="$(main_class "$tool")" || die "no tool '$tool'; there are: ${TOOLS//$'\n'/ }" 2
    java="$(find_java)"
    [ -e "${jars[0]}" ] \
        || die "no Kafka in $LIBS: infra/local_stack.py fetches it when it starts (it needs Maven), or set KAFKA_HOME"
    case "$class" in
        org.apache.kafka.tools.*)
            jars=("$LIBS"/kafka-tools-*.jar)
            [ -e "${jars[0]}" ] || die "$tool is not in $LIBS: remove that folder, and infra/local_stack.py fetches all of it"
            ;;
    esac
    option="$(server_option "$tool")"
    if [ -n "$option" ] && ! given "$option" "$@"; then
        address="$(servers)"
        check_broker "$address"
        case "$tool" in # the option belongs to the subcommand; it takes all that follows it
            cluster) set -- "$@" "$option" "$address" ;;
            producer-perf-test) set -- "$@" "$option" "bootstrap.servers=$address" ;;
            *) set -- "$option" "$address" "$@" ;;
        esac
    fi
    # A path with other letters than ASCII is found in a locale that has them.
    export LC_ALL=C.UTF-8
    exec "$java" -Xmx256M "-Dlog4j.configuration=file:$ROOT/infra/kafka-tools-log4j.properties" \
        -cp "$LIBS/*" "$class" "$@"
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    main "$@"
fi
