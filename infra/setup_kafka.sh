#!/usr/bin/env bash
# Makes this machine the Kafka broker that .env points at. See --help, and README.md beside this.
set -euo pipefail
PATH+=:/usr/sbin:/sbin # the plain su of Debian leaves them out

readonly NAME=kafka_2.12-3.3.1
readonly APACHE=https://archive.apache.org/dist/kafka/3.3.1/$NAME.tgz
readonly CURRENT=/opt/kafka CONF=/etc/kafka UNITS=/etc/systemd/system
readonly DATA=/var/lib/kafka ZOOKEEPER_DATA=/var/lib/zookeeper
readonly KEPT=/usr/local/lib/kafka-setup # this script and its templates, for reboots
readonly WORK=/opt/.kafka-setup          # on the file system of /opt, for a move that is one step
readonly FILES=(
    setup_kafka.sh secure_kafka.sh openssl.cnf server.properties zookeeper.properties
    log4j.properties kafka.service zookeeper.service
)
readonly REPLICAS=3                # of every topic in a cluster
readonly AGAIN="run this script again without --check"
readonly WAIT=120 CLUSTER_WAIT=900 # seconds for this broker, for all three
HERE="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]:-$0}")" && pwd)"
readonly HERE

usage() {
    cat <<EOF
Usage: setup_kafka.sh [options]        as root, on Amazon Linux 2023, Ubuntu or Debian with systemd

Installs Java, Apache Kafka 3.3.1 and ZooKeeper as services that start at boot, makes the topics
test and error_topic, sends one message and reads it back, and prints what to put into .env.
Run it again at any time: it changes only what differs. Options are remembered.

  --public-address A      advertised to clients (default: from the instance metadata service)
  --private-address A     for other brokers and for this machine (default: the same)
  --secure                TLS and passwords on port 9092
  --broker-id N           0 by default; one of its own for each broker of a cluster
  --zookeeper-connect L   cluster of three: host:2181,host:2181,host:2181, private addresses, the
                          same on all; a machine named in it runs ZooKeeper
  --url U                 the distribution from a mirror or a file of this machine; its checksum is
                          beside it, named U.sha512

  --check                 is it healthy? Says what is not, and what to do; exit code 1 then
  --uninstall             removes all but data, options, certificates and password
  --uninstall --purge     removes those as well
  --user-data             prints this setup as EC2 user data, with the options given; needs no root
  --help

Addresses can be set back to the metadata service by giving "auto". /var/lib/kafka holds the data,
/etc/kafka the configuration, journalctl -u kafka the log.
EOF
}

say() { echo "$*"; }

# IN_JOURNAL is set where a unit runs this script: journald takes the priority from the prefix.
warn() { echo "${IN_JOURNAL:+<4>}WARNING: $*" >&2; }

die() {
    echo "${IN_JOURNAL:+<3>}setup_kafka.sh: $*" >&2
    exit 1
}

wrong_usage() {
    echo "setup_kafka.sh: $*; see --help" >&2
    exit 2
}

# --- Options ---

parse() {
    ACTION=install PURGE='' URL='' UNIT=''
    PUBLIC='' PRIVATE='' BROKER_ID='' ZOOKEEPER='' TLS='' # empty: as remembered, else the default
    while (($#)); do
        case $1 in
            --public-address | --private-address | --broker-id | --zookeeper-connect | --url | \
                --await)
                [[ ${2:-} == [!-]* ]] || wrong_usage "$1 needs a value, not '${2:-}'"
                take "$1" "$2"
                shift
                ;;
            --secure) TLS=yes ;;
            --check | --uninstall | --user-data | --render) act "${1#--}" ;;
            --purge) PURGE=yes ;;
            --help | -h) usage && exit ;;
            *) wrong_usage "unknown option '$1'" ;;
        esac
        shift
    done
    [[ -z $PURGE || $ACTION == uninstall ]] || wrong_usage "--purge goes with --uninstall"
}

# act ACTION: two at once are a mistake, of which one might purge
act() {
    [[ $ACTION == install || $ACTION == "$1" ]] ||
        wrong_usage "--$ACTION and --$1 do not go together"
    ACTION=$1
}

# is_address TEXT: auto, a name (whose last part is no number) or an IPv4 address
is_address() {
    local part='[A-Za-z0-9-]*' byte='(25[0-5]|2[0-4][0-9]|1?[0-9]?[0-9])'
    [[ $1 =~ ^($part\.)*${part}[A-Za-z]$part$ ]] ||
        [[ $1 =~ ^$byte(\.$byte){3}$ && $1 != 0.* ]]
}

# are_servers LIST: host:port,host:port,...
are_servers() {
    local server
    [[ $1 =~ ^[^,:]+:[1-9][0-9]{0,4}(,[^,:]+:[1-9][0-9]{0,4})*$ ]] || return 1
    for server in ${1//,/ }; do
        is_address "${server%:*}" && ((${server#*:} < 65536)) || return 1
    done
}

# take OPTION VALUE
take() {
    case $1 in
        --public-address)
            is_address "$2" || wrong_usage "$1 '$2' is not an address"
            PUBLIC=$2
            ;;
        --private-address)
            is_address "$2" || wrong_usage "$1 '$2' is not an address"
            PRIVATE=$2
            ;;
        --broker-id)
            [[ $2 =~ ^[0-9]{1,3}$ ]] || wrong_usage "$1 '$2' is not a number from 0 to 999"
            BROKER_ID=$2
            ;;
        --zookeeper-connect)
            are_servers "$2" || wrong_usage "$1 '$2' is not host:port,host:port,..."
            ZOOKEEPER=$2
            ;;
        --url) URL=$2 ;;
        --await) act await && UNIT=$2 ;;
    esac
}

# What an earlier run was told holds for what this run was not.
recall() {
    local name value
    if [[ -r $CONF/setup.env ]]; then
        while IFS='=' read -r name value; do
            case $name in
                PUBLIC | PRIVATE | BROKER_ID | ZOOKEEPER | TLS)
                    [[ -n ${!name} ]] || printf -v "$name" %s "$value"
                    ;;
            esac
        done <"$CONF/setup.env"
    fi
    PUBLIC=${PUBLIC:-auto} PRIVATE=${PRIVATE:-auto} BROKER_ID=${BROKER_ID:-0}
}

remember() {
    printf '%s\n' "PUBLIC=$PUBLIC" "PRIVATE=$PRIVATE" "BROKER_ID=$BROKER_ID" \
        "ZOOKEEPER=$ZOOKEEPER" "TLS=$TLS" | put "$CONF/setup.env" 644 root:root
}

# --- Small tools ---

# put FILE MODE OWNER:GROUP [UNIT]: writes stdin to FILE if that changes anything. The mark for UNIT
# outlives this run, so that a run cut short does not forget the restart.
put() {
    local file=$1 mode=$2 owner=$3 unit=${4:-} text
    text="$(cat)"
    if [[ -e $file && "$(<"$file")" == "$text" &&
        "$(stat -c '%a %U:%G' "$file")" == "$mode $owner" ]]; then
        return
    fi
    [[ -z $unit ]] || touch "$CONF/.restart-$unit"
    (umask 077 && echo "$text" >"$file.new")
    chown "$owner" "$file.new"
    chmod "$mode" "$file.new"
    mv "$file.new" "$file"
    say "wrote $file"
}

# One of Kafka's command line tools, small enough to run beside the broker and quick to start. Told
# not to look for jars of tests, it does not call egrep for each jar, of which newer greps warn.
tool() {
    local name=$1
    shift
    INCLUDE_TEST_JARS=true KAFKA_HEAP_OPTS=-Xmx128M \
        KAFKA_JVM_PERFORMANCE_OPTS='-XX:+UseSerialGC -XX:TieredStopAtLevel=1' \
        timeout 60 "$CURRENT/bin/$name" "$@"
}

topics() { tool kafka-topics.sh --bootstrap-server "$PRIVATE_ADDRESS:9093" "$@"; }

# topics with little patience: the client's own is a minute
topics_now() {
    topics "$@" --command-config <(printf '%s\n' \
        request.timeout.ms=3000 default.api.timeout.ms=10000) 2>/dev/null
}

reachable() { timeout 3 bash -c "exec 3<>/dev/tcp/$1/$2" 2>/dev/null; }

address_of() { getent ahostsv4 "$1" | awk 'NR == 1 {print $1}'; }

# wait_for SECONDS COMMAND...
wait_for() {
    local end=$((SECONDS + $1))
    shift
    until "$@"; do
        ((SECONDS < end)) || return 1
        sleep 1
    done
}

# without_comments FILE: the text that is installed and handed to EC2, which takes little. Of the
# comments behind code those go that begin with a small letter.
without_comments() { sed -E '/^ *#( |$)/d; s/ +# [a-z].*//' "$1"; }

# quietly COMMAND...: what it prints is shown when it fails
quietly() {
    local said
    said="$("$@" 2>&1)" || die "failed: $*"$'\n'"$said"
}

# --- Addresses ---

# metadata NAME: one value of the instance metadata service (version 2, with a token). Fails with 22
# where the service is there and the value is not, with another code where there is no service.
metadata() {
    local service=http://169.254.169.254/latest token
    local ask=(curl -fsS --noproxy '*' --max-time 2 --retry 2)
    token="$("${ask[@]}" --retry-connrefused -X PUT "$service/api/token" \
        -H 'X-aws-ec2-metadata-token-ttl-seconds: 60' 2>/dev/null)" || return 1
    "${ask[@]}" -H "X-aws-ec2-metadata-token: $token" "$service/meta-data/$1" 2>/dev/null
}

# Sets PUBLIC_ADDRESS and PRIVATE_ADDRESS; fails where the metadata service is needed and not there.
find_addresses() {
    local code=0
    PUBLIC_ADDRESS=$PUBLIC PRIVATE_ADDRESS=$PRIVATE
    if [[ $PRIVATE == auto ]]; then
        PRIVATE_ADDRESS="$(metadata local-ipv4)" || return 1
    fi
    [[ $PUBLIC == auto ]] || return 0
    PUBLIC_ADDRESS="$(metadata public-ipv4)" || code=$?
    if ((code == 22)); then
        warn "this instance has no public address: only the private network can use the broker"
        PUBLIC_ADDRESS=$PRIVATE_ADDRESS
    elif ((code)); then
        return 1
    fi
}

know_addresses() {
    find_addresses ||
        die "no instance metadata service here: give --public-address and --private-address"
}

# Before anything is changed: a name that nobody knows would be remembered and advertised.
check_names() {
    local name
    for name in "$PUBLIC" "$PRIVATE" ${ZOOKEEPER//,/ }; do
        [[ $name == auto || -n "$(address_of "${name%:*}")" ]] ||
            die "the address '${name%:*}' cannot be resolved: is it misspelt, or not in DNS yet?"
    done
    [[ $PRIVATE == auto ]] || is_here "$PRIVATE" ||
        die "--private-address '$PRIVATE' is not this machine's: see ip address, or give auto"
}

# is_here ADDRESS: does this machine have it? Yes where there is no ip to ask.
is_here() {
    ! command -v ip >/dev/null ||
        ip -4 route get "$(address_of "$1")" 2>/dev/null | grep -q '^local '
}

in_cluster() { [[ -n $ZOOKEEPER ]]; }

runs_zookeeper() { ! in_cluster || [[ "$(zookeeper_position)" != 0 ]]; }

# The position (from 1) of this machine in the list of ZooKeepers; 0: not in it.
zookeeper_position() {
    local entry host n=0
    for entry in ${ZOOKEEPER//,/ }; do
        n=$((n + 1)) host=${entry%:*}
        if [[ $host == "$PRIVATE_ADDRESS" || "$(address_of "$host")" == "$PRIVATE_ADDRESS" ]]; then
            echo $n
            return
        fi
    done
    echo 0
}

# Where clients of this machine's ZooKeeper connect; nothing where it has none.
zookeeper_here() {
    if ! in_cluster; then
        echo 127.0.0.1:2181
    elif runs_zookeeper; then
        echo "$PRIVATE_ADDRESS:2181"
    fi
}

# --- Install ---

# package MANAGER COMMAND: the package that brings the command
package() {
    case $1:$2 in
        dnf:java) echo java-17-amazon-corretto-headless ;;
        apt-get:java) echo openjdk-17-jre-headless ;;
        dnf:useradd) echo shadow-utils ;;
        apt-get:useradd) echo passwd ;;
        *) echo "$2" ;;
    esac
}

install_packages() {
    local manager='' command want=()
    if command -v dnf >/dev/null; then
        manager=dnf
    elif command -v apt-get >/dev/null; then
        manager=apt-get
    fi
    for command in java curl tar useradd openssl; do
        command -v "$command" >/dev/null || want+=("$(package "$manager" "$command")")
    done
    ((${#want[@]})) || return 0
    say "installing: ${want[*]}"
    case $manager in
        dnf) quietly dnf install -y -q "${want[@]}" ;;
        apt-get) apt_install "${want[@]}" ;;
        *) die "neither dnf nor apt-get here: install ${want[*]} by hand, then run this again" ;;
    esac
}

# At first boot Ubuntu's own updates hold the locks for a while.
apt_install() {
    export DEBIAN_FRONTEND=noninteractive
    wait_for 300 apt_update || die "apt-get update failed: $APT_SAID"
    quietly apt-get -o DPkg::Lock::Timeout=300 install -y -qq --no-install-recommends "$@"
}

apt_update() { APT_SAID="$(apt-get update -qq 2>&1)"; }

# A folder that is there gets its mode as well: it may be of a run with a strict umask.
make_folders() {
    id kafka >/dev/null 2>&1 || useradd --system --user-group --home-dir "$DATA" \
        --no-create-home --shell /usr/sbin/nologin kafka
    install -d -m 750 -o kafka -g kafka "$DATA" "$ZOOKEEPER_DATA"
    strangers -exec chown -h kafka:kafka {} + # of data that was restored
    install -d -m 755 /opt "$CONF" "$KEPT"
    rm -rf "$WORK"* # of a run that was killed as well
    install -d -m 700 "$WORK"
}

# strangers ACTION...: what find shall do with data that is not the broker's own
strangers() { find -H "$DATA" "$ZOOKEEPER_DATA" -ignore_readdir_race ! -user kafka "$@"; }

# checksum FILE: the SHA-512 in FILE, in Apache's format (NAME: and groups of upper-case hex over
# several lines) or sha512sum's.
checksum() {
    sed 's/^[^:]*: *//' "$1" | tr -d ' \t\r\n' | tr A-F a-f | grep -oE '^[0-9a-f]{128}'
}

# fetch URL-OR-FILE TO
fetch() {
    case $1 in
        *://*)
            curl -fsSL --retry 3 --connect-timeout 15 -o "$2" "$1" ||
                die "cannot download $1; for a mirror or a file see --url"
            ;;
        *)
            [[ -r $1 ]] || die "cannot read the file $1; its name is what --url gave"
            ln -sfn "$(realpath "$1")" "$2"
            ;;
    esac
}

install_kafka() {
    local target=/opt/$NAME
    [[ -d $target ]] || unpack_kafka "${URL:-$APACHE}" "$target"
    if [[ "$(readlink "$CURRENT")" != "$target" ]]; then
        touch "$CONF/.restart-zookeeper" "$CONF/.restart-kafka"
        ln -sfn "$target" "$CURRENT"
    fi
}

# unpack_kafka SOURCE FOLDER: the folder is there whole or not at all
unpack_kafka() {
    local tgz=$WORK/$NAME.tgz sum
    say "fetching $1"
    fetch "$1" "$tgz"
    fetch "$1.sha512" "$tgz.sha512"
    sum="$(checksum "$tgz.sha512")" || die "no SHA-512 in $1.sha512"
    [[ "$(sha512sum <"$tgz")" == "$sum  -" ]] ||
        die "wrong checksum: $1 is not the file that its .sha512 describes;" \
            "nothing was installed, download it again"
    tar -xzf "$tgz" -C "$WORK" --no-same-owner
    [[ -f $WORK/$NAME/libs/$NAME.jar && -x $WORK/$NAME/bin/kafka-server-start.sh ]] ||
        die "no $NAME in $1"
    chmod 755 "$WORK/$NAME"
    mv "$WORK/$NAME" "$2"
    say "installed $2"
}

keep_setup() {
    local file
    for file in "${FILES[@]}"; do
        case $file in
            setup_kafka.sh) put "$KEPT/$file" 755 root:root ;;
            *) put "$KEPT/$file" 644 root:root ;;
        esac <"$HERE/$file"
    done
}

# --- Configure ---

configure() {
    check_owner
    remember
    [[ -z $TLS ]] || make_certificates
    render_server
    without_comments "$HERE/log4j.properties" | put "$CONF/log4j.properties" 644 root:root kafka
    without_comments "$HERE/kafka.service" | put "$UNITS/kafka.service" 644 root:root kafka
    if runs_zookeeper; then
        render_zookeeper
        without_comments "$HERE/zookeeper.service" |
            put "$UNITS/zookeeper.service" 644 root:root zookeeper
    elif [[ -e $UNITS/zookeeper.service ]]; then
        systemctl disable --quiet --now zookeeper
        rm "$UNITS/zookeeper.service"
    fi
}

check_owner() {
    local owner
    owner="$(sed -n 's/^broker.id=//p' "$DATA/meta.properties" 2>/dev/null || true)"
    [[ -z $owner || $owner == "$BROKER_ID" ]] || die "$DATA belongs to broker $owner:" \
        "run with --broker-id $owner, or --uninstall --purge first"
}

render_server() {
    local replicas=1 minimum=1 protocol=PLAINTEXT
    ! in_cluster || replicas=$REPLICAS minimum=2
    [[ -z $TLS ]] || protocol=SASL_SSL
    sed -e "s|@BROKER_ID@|$BROKER_ID|" -e "s|@ZOOKEEPER_CONNECT@|${ZOOKEEPER:-127.0.0.1:2181}|" \
        -e "s|@PUBLIC_ADDRESS@|$PUBLIC_ADDRESS|" -e "s|@PRIVATE_ADDRESS@|$PRIVATE_ADDRESS|" \
        -e "s|@EXTERNAL_PROTOCOL@|$protocol|" \
        -e "s|@REPLICAS@|$replicas|" -e "s|@MIN_INSYNC@|$minimum|" \
        ${TLS:+-e 's|^#secure ||'} <(without_comments "$HERE/server.properties") |
        put "$CONF/server.properties" 644 root:root kafka
}

# Where ZooKeeper runs on several machines each line names one, and myid says which this is.
render_zookeeper() {
    local entry n=0 servers='' address=127.0.0.1
    ! in_cluster || address=$PRIVATE_ADDRESS
    if [[ $ZOOKEEPER == *,* ]]; then
        for entry in ${ZOOKEEPER//,/ }; do
            n=$((n + 1))
            servers+="server.$n=${entry%:*}:2888:3888\\n"
        done
        zookeeper_position | put "$ZOOKEEPER_DATA/myid" 644 kafka:kafka zookeeper
    fi
    sed -e "s|@ZOOKEEPER_ADDRESS@|$address|" -e "s|@ZOOKEEPER_SERVERS@|${servers%\\n}|" \
        <(without_comments "$HERE/zookeeper.properties") |
        put "$CONF/zookeeper.properties" 644 root:root zookeeper
}

# Before the broker starts: an instance that was stopped and started has another public address.
# Keeps what is there if the address cannot be known.
refresh() {
    if find_addresses; then
        [[ -z $TLS ]] || make_certificates
        render_server
        rm -f "$CONF/.restart-kafka"
    else
        warn "no instance metadata service: $CONF/server.properties keeps the addresses it has"
    fi
}

# --- Start ---

# The broker stops first, while ZooKeeper is there to take its leave.
start() {
    systemctl daemon-reload
    stop_changed kafka
    ! runs_zookeeper || stop_changed zookeeper
    refuse_taken kafka
    ! runs_zookeeper || refuse_taken zookeeper
    ! runs_zookeeper || run_unit zookeeper
    run_unit kafka
    ! in_cluster || wait_for_brokers
    wait_for $WAIT systemctl is-active --quiet kafka ||
        die "the broker does not answer on $PRIVATE_ADDRESS:9093 after $WAIT s:" \
            "see journalctl -u kafka"
}

stop_changed() { [[ ! -e $CONF/.restart-$1 ]] || systemctl stop "$1"; }

# taken UNIT: who has its ports, if it is another program
taken() {
    local ports='sport = :2181' own
    [[ $1 == zookeeper ]] || ports='sport = :9092 or sport = :9093'
    own="$(systemctl show --property MainPID --value "$1")"
    ss -Hltnp "$ports" 2>/dev/null | sed -nE "/pid=$own,/d
        s/.*:([0-9]+) .*\(\"([^\"]*)\",pid=([0-9]+).*/port \1 is taken by \2 (process \3): stop it/
        T; p; q" || true
}

refuse_taken() {
    local taken
    taken="$(taken "$1")"
    [[ -z $taken ]] || die "$taken, then run this again"
}

# run_unit NAME: enabled and started. Its own start may take long, and another's failure; start()
# waits for the result.
run_unit() {
    systemctl is-enabled --quiet "$1" 2>/dev/null || systemctl enable --quiet "$1"
    if ! systemctl is-active --quiet "$1"; then
        say "starting $1"
        systemctl start --no-block "$1"
    fi
    rm -f "$CONF/.restart-$1"
}

wait_for_brokers() {
    say "waiting for $REPLICAS brokers: run this on the other machines now, each with its own" \
        "--broker-id"
    wait_for $CLUSTER_WAIT enough_brokers || die "no $REPLICAS brokers within $CLUSTER_WAIT s:" \
        "see journalctl -u kafka -u zookeeper, then run this again"
}

enough_brokers() {
    local here
    reachable "$PRIVATE_ADDRESS" 9093 || return 1 # cheaper to ask than what follows
    here="$(tool kafka-broker-api-versions.sh --bootstrap-server "$PRIVATE_ADDRESS:9093" \
        2>/dev/null | grep -c '(id: ' || true)"
    ((here >= REPLICAS)) || { sleep 3 && false; }
}

# The last step of each unit's start (ExecStartPost): what systemd starts next finds it working.
await() {
    case $UNIT in
        zookeeper) until_served listens 2181 ;;
        kafka)
            until_served listens 9092
            until_served listens 9093
            PRIVATE_ADDRESS="$(sed -n 's|^listeners=.*INTERNAL://\(.*\):9093$|\1|p' \
                "$CONF/server.properties")"
            SECONDS=0
            until_served topics_known
            ;;
        *) wrong_usage "--await '$UNIT' is not kafka or zookeeper" ;;
    esac
}

# until_served COMMAND...: fails when the main process of the unit has ended meanwhile
until_served() {
    until "$@"; do
        kill -0 "$MAINPID" 2>/dev/null || die "$UNIT has ended before it answered"
        sleep 0.2
    done
}

# listens PORT: without a connection, which the server would log
listens() { grep -q "$(printf ':%04X .* 0A ' "$1")" /proc/net/tcp /proc/net/tcp6; }

# For about two seconds after its start a broker answers that it has no topics.
topics_known() {
    local missing
    if ((SECONDS > 60)); then
        warn "this broker still does not know all of its topics"
        return 0
    fi
    [[ -n "$(topics_on_disk)" ]] || return 0
    missing="$(comm -23 <(topics_on_disk) <(topics_now --list | sort))"
    [[ -z $missing ]]
}

topics_on_disk() {
    find "$DATA" -mindepth 1 -maxdepth 1 -type d -printf '%f\n' |
        sed -nE 's/^(.*)-[0-9]+$/\1/p' | sort -u
}

# --- Topics, message ---

make_topics() {
    local topic there
    there="$(topics --list)"
    for topic in test error_topic; do
        if ! grep -qx "$topic" <<<"$there"; then
            topics --create --if-not-exists --topic "$topic" --partitions 1 >/dev/null
            say "made topic $topic"
        fi
    done
}

# One message in and out the way a client goes: bootstrap, then the address that the broker
# advertises. A security group that lets in only your machine keeps the instance from its own public
# address: then the message goes the inner way.
try_message() {
    if reachable "$PUBLIC_ADDRESS" 9092; then
        send_message "$PUBLIC_ADDRESS:9092" "$(client_properties)"
        return
    fi
    reachable 127.0.0.1 9092 || die "nothing listens on port 9092: see journalctl -u kafka"
    [[ -z $TLS ]] || try_certificate
    send_message "$PRIVATE_ADDRESS:9093" ''
    say "not tried: $PUBLIC_ADDRESS:9092, which lets nothing in from here; both scripts try it at" \
        "their start on your machine"
}

# send_message SERVER PROPERTIES. A client also asks the other brokers of a cluster for metadata.
# Their public addresses may be closed to this machine: it shall give each up quickly.
send_message() {
    local server=$1 properties=socket.connection.setup.timeout.ms=3000$'\n'$2 topic message got
    topic="setup-check-$BROKER_ID-$RANDOM" message="setup $RANDOM$RANDOM"
    # only this broker leads it: nothing here can reach the others' public addresses
    topics --create --topic "$topic" --replica-assignment "$BROKER_ID" \
        --config min.insync.replicas=1 >/dev/null
    # the properties go by pipe: arguments can be seen by everybody on the machine
    tool kafka-console-producer.sh --bootstrap-server "$server" --topic "$topic" \
        --producer.config <(echo "$properties") --producer-property delivery.timeout.ms=40000 \
        --request-timeout-ms 10000 --max-block-ms 40000 <<<"$message" || true
    got="$(tool kafka-console-consumer.sh --bootstrap-server "$server" --topic "$topic" \
        --consumer.config <(echo "$properties") --partition 0 --offset 0 --max-messages 1 \
        --timeout-ms 40000 2>"$WORK/consumer.log" || true)"
    topics --delete --topic "setup-check-$BROKER_ID-.*" >/dev/null # of killed runs as well
    if [[ $got != "$message" ]]; then
        cat "$WORK/consumer.log" >&2
        die "no message came back through $server: see journalctl -u kafka"
    fi
    say "a message went through $server and back"
}

# --- What to put into .env ---

zookeeper() {
    printf '%s\n' "$@" |
        tool zookeeper-shell.sh "${ZOOKEEPER:-127.0.0.1:2181}" 2>/dev/null
}

# advertised ID...: the address that each of these brokers sends clients to, one a line
advertised() {
    zookeeper "${@/#/get /brokers/ids/}" | sed -n 's|.*"EXTERNAL://\([^"]*\)".*|\1|p'
}

# The bootstrap servers: this one, or those of the whole cluster.
servers() {
    local ids
    if ! in_cluster; then
        echo "$PUBLIC_ADDRESS:9092"
        return
    fi
    ids="$(zookeeper 'ls /brokers/ids' | sed -n 's/^\[\([0-9, ]*\)\]$/\1/p')"
    # shellcheck disable=SC2086
    advertised ${ids//,/ } | paste -sd,
}

say_env() {
    say
    say "Ready. In .env on your machine:"
    say
    say "KAFKA_BOOTSTRAP_SERVERS=$(servers)"
    if [[ -n $TLS ]]; then
        say_secrets
        return
    fi
    say
    warn "port 9092 is open to everybody who can reach it: let only your address in (security" \
        "group), or run this again with --secure"
}

# --- Actions ---

install_all() {
    command -v systemctl >/dev/null || die "no systemctl: this needs a machine with systemd"
    trap 'rm -rf "$WORK"' EXIT
    check_names
    install_packages
    know_addresses
    make_folders
    install_kafka
    keep_setup
    configure
    start
    make_topics
    [[ -z $TLS ]] || make_sasl_user
    try_message
    say_env
}

# expect TEXT REMEDY COMMAND...: one line of the check
expect() {
    local text=$1 remedy=$2
    shift 2
    if "$@"; then
        say "ok    $text"
    else
        say "FAIL  $text: $remedy"
        BAD=1
    fi
}

check() {
    local there short used strangers
    BAD=0
    [[ -x $CURRENT/bin/kafka-topics.sh ]] ||
        die "Kafka is not installed: run this script without --check"
    know_addresses
    check_services
    strangers="$(strangers -print -quit 2>/dev/null)" || strangers=$DATA
    expect "the data is the broker's" "$strangers is not; $AGAIN" test -z "$strangers"
    if reachable "$PRIVATE_ADDRESS" 9093; then
        if there="$(topics_now --list)" &&
            short="$(topics_now --describe --under-replicated-partitions)"; then
            check_advertised
            check_topics "$there" "$short"
        else
            expect "the broker answers" "journalctl -u kafka; sudo systemctl restart kafka" false
        fi
    fi
    used="$(df --output=pcent "$DATA" | tr -dc 0-9)"
    expect "disk $used% full" "lower log.retention.bytes in server.properties, or a bigger volume" \
        test "$used" -lt 85
    [[ -z $TLS ]] || check_certificates
    return $BAD
}

check_services() {
    local unit target taken units=(kafka)
    ! runs_zookeeper || units=(zookeeper kafka)
    for unit in "${units[@]}"; do
        taken="$(taken "$unit")"
        expect "$unit runs" "${taken:-sudo systemctl start $unit; journalctl -u $unit}" \
            ${taken:+false} systemctl is-active --quiet "$unit"
        expect "$unit starts at boot" "sudo systemctl enable $unit" \
            systemctl is-enabled --quiet "$unit"
    done
    for target in 127.0.0.1:9092 "$PRIVATE_ADDRESS:9093" $(zookeeper_here); do
        expect "$target accepts connections" "journalctl -u kafka -u zookeeper" \
            reachable "${target%:*}" "${target#*:}"
    done
}

check_advertised() {
    local there
    there="$(advertised "$BROKER_ID" || true)"
    expect "clients are sent to ${there:-nowhere}" \
        "the public address is $PUBLIC_ADDRESS; $AGAIN" \
        test "$there" = "$PUBLIC_ADDRESS:9092"
    expect "$PUBLIC_ADDRESS can be resolved" "give --public-address a name that is in DNS" \
        test -n "$(address_of "$PUBLIC_ADDRESS")"
}

# check_topics THERE SHORT: what the broker has, and what of it lacks copies
check_topics() {
    local missing
    missing="$(comm -23 <(printf '%s\n' error_topic test) <(sort <<<"$1") | paste -sd' ')"
    expect "topics test and error_topic" "missing $missing; $AGAIN" test -z "$missing"
    missing="$(grep -c . <<<"$2" || true)"
    expect "every partition has all its copies" \
        "$missing partitions do not; --check on the other brokers" test "$missing" = 0
}

uninstall() {
    local unit
    for unit in kafka zookeeper; do # the broker first: it needs ZooKeeper to leave in order
        if [[ -e $UNITS/$unit.service ]]; then
            systemctl disable --quiet --now "$unit"
            rm -f "$UNITS/$unit.service"*
        fi
    done
    systemctl daemon-reload
    rm -rf "${CURRENT:?}" "/opt/${NAME:?}" "$WORK"* "$KEPT"
    # setup.env stays with the data: a later run must not open a secured broker to all.
    rm -f "$CONF"/{*.properties,ca.pem,.restart-*,*.new}
    if [[ -n $PURGE ]]; then
        rm -rf "$DATA" "$ZOOKEEPER_DATA" "$CONF"
        ! id kafka >/dev/null 2>&1 || userdel kafka
        say "removed, with all data"
        return
    fi
    rmdir --ignore-fail-on-non-empty "$CONF" 2>/dev/null || true
    if [[ -d $DATA ]]; then
        say "removed; the data is still in $DATA and $ZOOKEEPER_DATA:" \
            "--uninstall --purge removes it"
    else
        say "removed"
    fi
}

# A script that carries these files: EC2 hands user data over alone, and takes 16 KB of it. Its log
# can hold a password.
user_data() {
    local option options='' folder file packed
    for option in "$@"; do
        [[ $option == --user-data ]] || options+=" $(printf %q "$option")"
    done
    folder="$(mktemp -d)"
    for file in "${FILES[@]}"; do
        without_comments "$HERE/$file" >"$folder/$file"
        chmod --reference="$HERE/$file" "$folder/$file"
    done
    sed -i -E 's/^(    )+//' "$folder"/*.sh
    packed="$(tar -C "$folder" -c --sort=name --owner=0 --group=0 --mtime=@0 "${FILES[@]}" |
        gzip -9n | base64 -w 0)"
    rm -r "$folder"
    cat <<EOF
#!/bin/bash
set -euo pipefail # Made by setup_kafka.sh --user-data
umask 022
install -m 600 /dev/null /var/log/kafka-setup.log
exec >/var/log/kafka-setup.log 2>&1
mkdir -p $KEPT
base64 -d <<'END' | tar -xz -C $KEPT
$packed
END
$KEPT/setup_kafka.sh$options
EOF
}

need_files() {
    local file
    for file in "${FILES[@]}"; do
        [[ -r $HERE/$file ]] || die "$file is not beside this script: run it from a checkout;" \
            "for EC2 user data paste what --user-data prints"
    done
    # shellcheck source=infra/secure_kafka.sh
    source "$HERE/secure_kafka.sh"
}

main() {
    local script
    umask 022 # real sudo keeps the caller's: with 077 the services could read nothing
    parse "$@"
    need_files
    recall
    case $ACTION in
        user-data)
            script="$(user_data "$@")"
            ((${#script} < 16384)) || die "user data of ${#script} bytes, and EC2 takes 16384:" \
                "leave options out, and run the script again with them on the instance"
            echo "$script"
            return
            ;;
        await)
            IN_JOURNAL=yes
            await
            return
            ;;
    esac
    ((EUID == 0)) || die "run this as root: sudo $0 $*"
    case $ACTION in
        check) check ;;
        uninstall) uninstall ;;
        render)
            IN_JOURNAL=yes
            refresh
            ;;
        install) install_all ;;
    esac
}

if [[ "${BASH_SOURCE[0]:-$0}" == "$0" ]]; then
    main "$@"
fi
