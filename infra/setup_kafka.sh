#!/usr/bin/env bash
# Makes this machine the Kafka broker that .env points at. See --help and README.md beside this file.
set -euo pipefail

readonly NAME=kafka_2.12-3.3.1
readonly APACHE=https://archive.apache.org/dist/kafka/3.3.1/$NAME.tgz
readonly CURRENT=/opt/kafka CONF=/etc/kafka SECURE=/etc/kafka/secure UNITS=/etc/systemd/system
readonly DATA=/var/lib/kafka ZOOKEEPER_DATA=/var/lib/zookeeper
readonly KEPT=/usr/local/lib/kafka-setup # this script and its templates, for --check and for reboots
readonly FILES=(setup_kafka.sh server.properties zookeeper.properties log4j.properties kafka.service zookeeper.service)
readonly SASL_USER=client
readonly REPLICAS=3                # of every topic in a cluster
readonly WAIT=120 CLUSTER_WAIT=900 # seconds for this broker, for all three
HERE="$(cd "$(dirname "${BASH_SOURCE[0]:-$0}")" && pwd)"
readonly HERE

usage() {
    cat <<EOF
Usage: setup_kafka.sh [options]        as root, on Amazon Linux 2023, Ubuntu or Debian with systemd

Installs Java, Apache Kafka 3.3.1 and ZooKeeper as services that start at boot, makes the topics test
and error_topic, sends one message through the public address, and prints what to put into .env.
Run it again at any time: it changes only what differs. Options are remembered.

  --public-address A      advertised to clients (default: from the instance metadata service)
  --private-address A     for other brokers and for this machine (default: the same)
  --secure                TLS and passwords on port 9092
  --broker-id N           0 by default; one of its own for each broker of a cluster
  --zookeeper-connect L   cluster of three: host:2181,host:2181,host:2181, private addresses, the same
                          on all; a machine named in it runs ZooKeeper
  --url URL               the distribution from a mirror; URL.sha512 is its checksum
  KAFKA_TGZ=FILE          (environment) the distribution from a file, with FILE.sha512 beside it

  --check                 is it healthy? Says what is not, and what to do; exit code 1 then
  --uninstall             removes all but the data, the certificates and the password
  --uninstall --purge     removes those as well
  --user-data             prints this setup as EC2 user data, with the options given; needs no root
  --help

Addresses can be set back to the metadata service by giving "auto". /var/lib/kafka holds the data,
/etc/kafka the configuration, journalctl -u kafka the log.
EOF
}

say() { echo "$*"; }
warn() { echo "WARNING: $*" >&2; }
die() {
    echo "setup_kafka.sh: $*" >&2
    exit 1
}
wrong_usage() {
    echo "setup_kafka.sh: $*; see --help" >&2
    exit 2
}

# --- Options ---

parse() {
    ACTION=install PURGE='' URL=''
    PUBLIC='' PRIVATE='' BROKER_ID='' ZOOKEEPER='' TLS='' # empty: as remembered, else the default
    local address='^(auto|[A-Za-z0-9.-]+)$' hosts='^[A-Za-z0-9.-]+:[0-9]+(,[A-Za-z0-9.-]+:[0-9]+)*$'
    while (($#)); do
        case $1 in
            --public-address | --private-address | --broker-id | --zookeeper-connect | --url)
                (($# > 1)) || wrong_usage "$1 needs a value"
                ;;&
            --public-address) PUBLIC=$2 ;;&
            --private-address) PRIVATE=$2 ;;&
            --public-address | --private-address)
                [[ $2 =~ $address ]] || wrong_usage "$1 '$2' is not an address"
                shift
                ;;
            --broker-id)
                [[ $2 =~ ^[0-9]{1,3}$ ]] || wrong_usage "--broker-id '$2' is not a number from 0 to 999"
                BROKER_ID=$2
                shift
                ;;
            --zookeeper-connect)
                [[ $2 =~ $hosts ]] || wrong_usage "--zookeeper-connect '$2' is not host:port,host:port,..."
                ZOOKEEPER=$2
                shift
                ;;
            --url)
                URL=$2
                shift
                ;;
            --secure) TLS=yes ;;
            --check | --uninstall | --user-data | --render) ACTION=${1#--} ;;
            --purge) PURGE=yes ;;
            --help | -h) ACTION=help ;;
            *) wrong_usage "unknown option '$1'" ;;
        esac
        shift
    done
    [[ -z $PURGE || $ACTION == uninstall ]] || wrong_usage "--purge goes with --uninstall"
}

# What an earlier run was told holds for what this run was not.
recall() {
    local name value
    if [[ -r $CONF/setup.env ]]; then
        while IFS='=' read -r name value; do
            case $name in
                PUBLIC | PRIVATE | BROKER_ID | ZOOKEEPER | TLS) [[ -n ${!name} ]] || printf -v "$name" %s "$value" ;;
            esac
        done <"$CONF/setup.env"
    fi
    PUBLIC=${PUBLIC:-auto} PRIVATE=${PRIVATE:-auto} BROKER_ID=${BROKER_ID:-0}
}

remember() {
    printf '%s\n' "PUBLIC=$PUBLIC" "PRIVATE=$PRIVATE" "BROKER_ID=$BROKER_ID" "ZOOKEEPER=$ZOOKEEPER" "TLS=$TLS" |
        put "$CONF/setup.env" 644 root:root
}

# --- Small tools ---

# put FILE MODE OWNER:GROUP [UNIT]: writes stdin to FILE if that changes anything. The mark for UNIT
# outlives this run, so that a run cut short does not forget the restart.
put() {
    local file=$1 mode=$2 owner=$3 unit=${4:-} new
    new="$WORK/put"
    cat >"$new"
    if [[ "$(stat -c '%a %U:%G' "$file" 2>/dev/null)" == "$mode $owner" ]] && cmp -s "$new" "$file"; then
        return
    fi
    [[ -z $unit ]] || touch "$CONF/.restart-$unit"
    install -D -m "$mode" -o "${owner%:*}" -g "${owner#*:}" "$new" "$file.new"
    mv "$file.new" "$file"
    say "wrote $file"
}

# One of Kafka's command line tools, small enough to run beside the broker and quick to start.
tool() {
    local name=$1
    shift
    KAFKA_HEAP_OPTS=-Xmx128M KAFKA_JVM_PERFORMANCE_OPTS='-XX:+UseSerialGC -XX:TieredStopAtLevel=1' timeout 60 "$CURRENT/bin/$name" "$@"
}

reachable() { timeout 3 bash -c "exec 3<>/dev/tcp/$1/$2" 2>/dev/null; }

# wait_for SECONDS COMMAND...
wait_for() {
    local end=$((SECONDS + $1))
    shift
    until "$@"; do
        ((SECONDS < end)) || return 1
        sleep 1
    done
}

# metadata NAME: one value of the instance metadata service (version 2, with a token). Fails with 22
# where the service is there and the value is not, with another code where there is no service.
metadata() {
    local service=http://169.254.169.254/latest token
    token="$(curl -fsS --noproxy '*' --max-time 2 --retry 2 --retry-connrefused -X PUT \
        -H 'X-aws-ec2-metadata-token-ttl-seconds: 60' "$service/api/token" 2>/dev/null)" || return 1
    curl -fsS --noproxy '*' --max-time 2 --retry 2 -H "X-aws-ec2-metadata-token: $token" \
        "$service/meta-data/$1" 2>/dev/null
}

# Sets PUBLIC_ADDRESS and PRIVATE_ADDRESS; fails where the metadata service is needed and not there.
find_addresses() {
    local code=0
    PUBLIC_ADDRESS=$PUBLIC PRIVATE_ADDRESS=$PRIVATE
    if [[ $PRIVATE == auto ]]; then
        PRIVATE_ADDRESS="$(metadata local-ipv4)" || return 1
    fi
    if [[ $PUBLIC == auto ]]; then
        PUBLIC_ADDRESS="$(metadata public-ipv4)" || code=$?
        if ((code == 22)); then
            warn "this instance has no public address: only the private network can use the broker"
            PUBLIC_ADDRESS=$PRIVATE_ADDRESS
        elif ((code)); then
            return 1
        fi
    fi
}

know_addresses() {
    find_addresses || die "no instance metadata service here: give --public-address and --private-address"
}

in_cluster() { [[ -n $ZOOKEEPER ]]; }

# The position (from 1) of this machine in the list of ZooKeepers; 0: not in it.
zookeeper_position() {
    local entry host n=0
    for entry in ${ZOOKEEPER//,/ }; do
        n=$((n + 1)) host=${entry%:*}
        if [[ $host == "$PRIVATE_ADDRESS" || "$(getent ahostsv4 "$host" | awk 'NR==1 {print $1}')" == "$PRIVATE_ADDRESS" ]]; then
            echo $n
            return
        fi
    done
    echo 0
}

# Where clients of this machine's ZooKeeper connect; nothing where it has none.
zookeeper_here() {
    if ! in_cluster; then echo 127.0.0.1:2181; elif runs_zookeeper; then echo "$PRIVATE_ADDRESS:2181"; fi
}

runs_zookeeper() { ! in_cluster || [[ "$(zookeeper_position)" != 0 ]]; }

# --- Steps ---

install_packages() {
    local want=() command
    for command in java curl tar ip useradd openssl; do
        command -v "$command" >/dev/null || want+=("$command")
    done
    ((${#want[@]})) || return 0
    say "installing: ${want[*]}"
    if command -v dnf >/dev/null; then
        want=("${want[@]/#java/java-17-amazon-corretto-headless}")
        want=("${want[@]/#ip/iproute}")
        dnf install -y -q "${want[@]/#useradd/shadow-utils}"
    elif command -v apt-get >/dev/null; then
        want=("${want[@]/#java/openjdk-17-jre-headless}")
        want=("${want[@]/#ip/iproute2}")
        export DEBIAN_FRONTEND=noninteractive
        # at first boot Ubuntu's own updates hold the lock for a while
        wait_for 300 apt-get update -qq
        apt-get -o DPkg::Lock::Timeout=300 install -y -qq --no-install-recommends "${want[@]/#useradd/passwd}"
    else
        die "neither dnf nor apt-get here: install ${want[*]} by hand, then run this again"
    fi
}

make_user() {
    id kafka >/dev/null 2>&1 ||
        useradd --system --user-group --home-dir "$DATA" --no-create-home --shell /usr/sbin/nologin kafka
    local folder
    for folder in "$DATA" "$ZOOKEEPER_DATA"; do
        [[ -d $folder ]] || install -d -m 750 -o kafka -g kafka "$folder"
    done
}

# checksum FILE: the SHA-512 in FILE, in Apache's format (NAME: and groups of upper-case hex over several
# lines) or sha512sum's.
checksum() {
    sed 's/^[^:]*: *//' "$1" | tr -d ' \t\r\n' | tr A-F a-f | grep -oE '^[0-9a-f]{128}'
}

download() { curl -fsSL --retry 3 --connect-timeout 15 -o "$2" "$1" || die "cannot download $1; for a mirror see --url"; }

install_kafka() {
    local target=/opt/$NAME url=${URL:-$APACHE} tgz sum
    if [[ ! -d $target ]]; then
        if [[ -n ${KAFKA_TGZ:-} ]]; then
            tgz=$KAFKA_TGZ sum=$KAFKA_TGZ.sha512
            [[ -r $tgz ]] || die "KAFKA_TGZ: cannot read $tgz"
            [[ -r $sum ]] || die "no checksum: put $APACHE.sha512 beside $tgz"
        else
            say "downloading $url"
            tgz=$WORK/$NAME.tgz sum=$WORK/$NAME.tgz.sha512
            download "$url" "$tgz"
            download "$url.sha512" "$sum"
        fi
        sum="$(checksum "$sum")" || die "no SHA-512 in $sum"
        [[ "$(sha512sum <"$tgz")" == "$sum  -" ]] ||
            die "wrong checksum: $tgz is not the file that its .sha512 describes; nothing was installed, download it again"
        tar -xzf "$tgz" -C "$WORK" --no-same-owner
        [[ -f $WORK/$NAME/libs/$NAME.jar && -x $WORK/$NAME/bin/kafka-server-start.sh ]] || die "no $NAME in $tgz"
        mv "$WORK/$NAME" "$target" # the same file system: there or not there
        say "installed $target"
    fi
    if [[ "$(readlink "$CURRENT")" != "$target" ]]; then
        touch "$CONF/.restart-zookeeper" "$CONF/.restart-kafka"
        ln -sfn "$target" "$CURRENT"
    fi
}

keep_setup() {
    local file
    for file in "${FILES[@]}"; do
        case $file in
            *.sh) put "$KEPT/$file" 755 root:root ;;
            *) put "$KEPT/$file" 644 root:root ;;
        esac <"$HERE/$file"
    done
}

# The certificate authority and the password are made once; the broker's certificate again when its
# addresses change or it is about to end.
make_certificates() {
    local first=${ZOOKEEPER%%:*} key=$SECURE/broker.pem
    [[ -d $SECURE ]] || install -d -m 750 -o root -g kafka "$SECURE"
    if [[ ! -s $SECURE/password || ! -s $SECURE/ca.pem ]] && in_cluster && [[ "$(zookeeper_position)" != 1 ]]; then
        die "brokers share one certificate authority and password: copy $SECURE from $first to this machine, then run this again"
    fi
    if [[ ! -s $SECURE/password ]]; then
        touch "$SECURE/.new-password"
        openssl rand -hex 16 | put "$SECURE/password" 600 root:root
    fi
    if [[ ! -s $SECURE/ca.pem ]]; then
        openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 | put "$SECURE/ca.key" 600 root:root
        openssl req -x509 -new -key "$SECURE/ca.key" -sha256 -days 3650 -config <(
            printf '%s\n' '[req]' 'distinguished_name=dn' 'x509_extensions=ca' 'prompt=no' '[dn]' "CN=Kafka of $PRIVATE_ADDRESS" \
                '[ca]' 'basicConstraints=critical,CA:TRUE' 'keyUsage=critical,keyCertSign,cRLSign' 'subjectKeyIdentifier=hash'
        ) | put "$SECURE/ca.pem" 644 root:root
    fi
    put "$CONF/ca.pem" 644 root:root <"$SECURE/ca.pem"
    if certified "$PUBLIC_ADDRESS" && certified "$PRIVATE_ADDRESS" &&
        openssl x509 -in "$key" -noout -checkend $((30 * 86400)) >/dev/null &&
        openssl verify -CAfile "$SECURE/ca.pem" "$key" >/dev/null 2>&1; then
        return
    fi
    openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$WORK/broker.key"
    openssl req -new -key "$WORK/broker.key" -config <(printf '%s\n' '[req]' 'distinguished_name=dn' 'prompt=no' '[dn]' "CN=$PUBLIC_ADDRESS") |
        openssl x509 -req -sha256 -days 730 -CA "$SECURE/ca.pem" -CAkey "$SECURE/ca.key" -set_serial "0x$(openssl rand -hex 16)" \
            -out "$WORK/broker.crt" -extfile <(
                printf '%s\n' "subjectAltName=$(alt_name "$PUBLIC_ADDRESS"),$(alt_name "$PRIVATE_ADDRESS")" 'basicConstraints=CA:FALSE' \
                    'keyUsage=critical,digitalSignature' 'extendedKeyUsage=serverAuth' 'subjectKeyIdentifier=hash' 'authorityKeyIdentifier=keyid'
            ) 2>/dev/null
    cat "$WORK/broker.key" "$WORK/broker.crt" "$SECURE/ca.pem" | put "$key" 640 root:kafka kafka
}

alt_name() {
    if [[ $1 =~ ^[0-9.]+$ ]]; then echo "IP:$1"; else echo "DNS:$1"; fi
}

# certified ADDRESS: is there a certificate of the broker that names it?
certified() {
    local option=-checkhost
    [[ ! $1 =~ ^[0-9.]+$ ]] || option=-checkip
    openssl x509 -in "$SECURE/broker.pem" -noout "$option" "$1" 2>/dev/null | grep -q 'does match'
}

render_server() {
    local replicas=1 minimum=1 protocol=PLAINTEXT
    ! in_cluster || replicas=$REPLICAS minimum=2
    [[ -z $TLS ]] || protocol=SASL_SSL
    sed -e "s|@BROKER_ID@|$BROKER_ID|" -e "s|@ZOOKEEPER_CONNECT@|${ZOOKEEPER:-127.0.0.1:2181}|" \
        -e "s|@PUBLIC_ADDRESS@|$PUBLIC_ADDRESS|" -e "s|@PRIVATE_ADDRESS@|$PRIVATE_ADDRESS|" \
        -e "s|@EXTERNAL_PROTOCOL@|$protocol|" -e "s|@REPLICAS@|$replicas|" -e "s|@MIN_INSYNC@|$minimum|" \
        ${TLS:+-e 's|^#secure ||'} "$HERE/server.properties" |
        put "$CONF/server.properties" 644 root:root kafka
}

# Where ZooKeeper runs on several machines each line names one of them, and myid says which this is.
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
    sed -e "s|@ZOOKEEPER_ADDRESS@|$address|" -e "s|@ZOOKEEPER_SERVERS@|${servers%\\n}|" "$HERE/zookeeper.properties" |
        put "$CONF/zookeeper.properties" 644 root:root zookeeper
}

configure() {
    local owner
    owner="$(sed -n 's/^broker.id=//p' "$DATA/meta.properties" 2>/dev/null || true)"
    [[ -z $owner || $owner == "$BROKER_ID" ]] ||
        die "$DATA belongs to broker $owner: run with --broker-id $owner, or --uninstall --purge first"
    remember
    [[ -z $TLS ]] || make_certificates
    render_server
    put "$CONF/log4j.properties" 644 root:root kafka <"$HERE/log4j.properties"
    put "$UNITS/kafka.service" 644 root:root kafka <"$HERE/kafka.service"
    if runs_zookeeper; then
        render_zookeeper
        put "$UNITS/zookeeper.service" 644 root:root zookeeper <"$HERE/zookeeper.service"
    elif [[ -e $UNITS/zookeeper.service ]]; then
        systemctl disable --now zookeeper
        rm "$UNITS/zookeeper.service"
    fi
}

# Before the broker starts: an instance that was stopped and started has another public address. Keeps
# what is there if the address cannot be known.
refresh() {
    if find_addresses; then
        [[ -z $TLS ]] || make_certificates
        render_server
        rm -f "$CONF/.restart-kafka"
    else
        warn "no instance metadata service: the addresses in $CONF/server.properties stay as they are"
    fi
}

# run_unit NAME: enabled, running, and started after its last change.
run_unit() {
    systemctl is-enabled --quiet "$1" 2>/dev/null || systemctl enable --quiet "$1"
    if [[ -e $CONF/.restart-$1 ]]; then
        say "starting $1"
        systemctl daemon-reload
        systemctl restart "$1"
        rm -f "$CONF/.restart-$1"
    elif ! systemctl is-active --quiet "$1"; then
        say "starting $1"
        systemctl start "$1"
    fi
}

enough_brokers() {
    local here
    reachable "$PRIVATE_ADDRESS" 9093 || return 1 # cheaper to ask than what follows
    here="$(tool kafka-broker-api-versions.sh --bootstrap-server "$PRIVATE_ADDRESS:9093" 2>/dev/null | grep -c '(id: ' || true)"
    ((here >= REPLICAS)) || { sleep 3 && false; }
}

start() {
    ! runs_zookeeper || run_unit zookeeper
    run_unit kafka
    if in_cluster; then
        say "waiting for $REPLICAS brokers: run this on the other machines now, each with its own --broker-id"
        wait_for $CLUSTER_WAIT enough_brokers ||
            die "no $REPLICAS brokers within $CLUSTER_WAIT s: see journalctl -u kafka -u zookeeper, then run this again"
    else
        wait_for $WAIT reachable "$PRIVATE_ADDRESS" 9093 ||
            die "the broker does not answer on $PRIVATE_ADDRESS:9093 after $WAIT s: see journalctl -u kafka"
    fi
}

topics() { tool kafka-topics.sh --bootstrap-server "$PRIVATE_ADDRESS:9093" "$@"; }

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

make_sasl_user() {
    local configs=(tool kafka-configs.sh --bootstrap-server "$PRIVATE_ADDRESS:9093" --entity-type users --entity-name "$SASL_USER")
    if [[ -e $SECURE/.new-password ]] || ! "${configs[@]}" --describe | grep -q SCRAM-SHA-512; then
        # from a file: arguments can be seen by everybody on the machine
        "${configs[@]}" --alter --add-config-file <(echo "SCRAM-SHA-512=password=$(<"$SECURE/password")")
        rm -f "$SECURE/.new-password"
    fi
}

# A client also asks the other brokers of a cluster for metadata. Their public addresses may be closed
# to this machine: it shall give each up quickly.
client_properties() {
    echo socket.connection.setup.timeout.ms=3000
    [[ -n $TLS ]] || return 0
    printf '%s\n' security.protocol=SASL_SSL sasl.mechanism=SCRAM-SHA-512 ssl.truststore.type=PEM "ssl.truststore.location=$CONF/ca.pem" \
        "sasl.jaas.config=org.apache.kafka.common.security.scram.ScramLoginModule required username=\"$SASL_USER\" password=\"$(<"$SECURE/password")\";"
}

# One message in and out the way a client goes: bootstrap, then the address that the broker advertises.
try_message() {
    local topic message got server=$PUBLIC_ADDRESS:9092
    topic="setup-check-$RANDOM$RANDOM" message="setup $RANDOM$RANDOM"
    # A security group that lets in only your address keeps the instance from its own public address.
    # Then that address is put on the loopback for the time of this check.
    if ! reachable "$PUBLIC_ADDRESS" 9092; then
        LOOPBACK_ADDRESS="$(getent ahostsv4 "$PUBLIC_ADDRESS" | awk 'NR==1 {print $1}')/32"
        ip address add "$LOOPBACK_ADDRESS" dev lo
        reachable "$PUBLIC_ADDRESS" 9092 || die "nothing listens on port 9092: see journalctl -u kafka"
    fi
    (umask 077 && client_properties >"$WORK/client.properties")
    # only this broker leads it: nothing here can reach the others' public addresses
    topics --create --topic "$topic" --replica-assignment "$BROKER_ID" --config min.insync.replicas=1 >/dev/null
    tool kafka-console-producer.sh --bootstrap-server "$server" --topic "$topic" --producer.config "$WORK/client.properties" \
        --producer-property delivery.timeout.ms=40000 --request-timeout-ms 10000 --max-block-ms 40000 <<<"$message" || true
    got="$(tool kafka-console-consumer.sh --bootstrap-server "$server" --topic "$topic" --consumer.config "$WORK/client.properties" \
        --partition 0 --offset 0 --max-messages 1 --timeout-ms 40000 2>"$WORK/consumer.log" || true)"
    topics --delete --topic "$topic" >/dev/null
    forget_loopback_address
    if [[ $got != "$message" ]]; then
        cat "$WORK/consumer.log" >&2
        die "no message came back through $server: see journalctl -u kafka"
    fi
    say "a message went through $server and back"
}

forget_loopback_address() {
    [[ -z ${LOOPBACK_ADDRESS:-} ]] || ip address del "$LOOPBACK_ADDRESS" dev lo
    LOOPBACK_ADDRESS=''
}

zookeeper() {
    printf '%s\n' "$@" | tool zookeeper-shell.sh "${ZOOKEEPER:-127.0.0.1:2181}" 2>/dev/null
}

# advertised ID...: the address that each of these brokers sends clients to, one a line
advertised() {
    zookeeper "${@/#/get /brokers/ids/}" | sed -n 's|.*"EXTERNAL://\([^"]*\)".*|\1|p'
}

say_env() {
    local ids servers=$PUBLIC_ADDRESS:9092
    say
    say "Ready. In .env on your machine:"
    say
    if in_cluster; then
        ids="$(zookeeper 'ls /brokers/ids' | sed -n 's/^\[\([0-9, ]*\)\]$/\1/p')"
        # shellcheck disable=SC2086
        servers="$(advertised ${ids//,/ } | paste -sd,)"
    fi
    say "KAFKA_BOOTSTRAP_SERVERS=$servers"
    if [[ -n $TLS ]]; then
        say "KAFKA_SECURITY_PROTOCOL=SASL_SSL"
        say "KAFKA_SASL_MECHANISM=SCRAM-SHA-512"
        say "KAFKA_SASL_USERNAME=$SASL_USER"
        say "KAFKA_SASL_PASSWORD=$(<"$SECURE/password")"
        say "KAFKA_SSL_CAFILE=kafka-ca.pem"
        say
        say "and kafka-ca.pem beside it: scp ${SUDO_USER:-ec2-user}@$PUBLIC_ADDRESS:$CONF/ca.pem kafka-ca.pem"
    else
        say
        warn "port 9092 is open to everybody who can reach it: let only your address in (security group), or run this again with --secure"
    fi
}

# --- Actions ---

check() {
    local bad=0 unit target advertises used missing
    result() { # result GOOD TEXT REMEDY
        if [[ -n $1 ]]; then say "ok    $2"; else
            bad=1
            say "FAIL  $2: $3"
        fi
    }
    [[ -x $CURRENT/bin/kafka-topics.sh ]] || die "Kafka is not installed: run this script without --check"
    for unit in $(runs_zookeeper && echo zookeeper) kafka; do
        result "$(systemctl is-active --quiet "$unit" && echo yes)" "$unit runs" "sudo systemctl start $unit; journalctl -u $unit"
        result "$(systemctl is-enabled --quiet "$unit" && echo yes)" "$unit starts at boot" "sudo systemctl enable $unit"
    done
    for target in 127.0.0.1:9092 "$PRIVATE_ADDRESS:9093" $(zookeeper_here); do
        result "$(reachable "${target%:*}" "${target#*:}" && echo yes)" "$target answers" "journalctl -u kafka -u zookeeper"
    done
    reachable "$PRIVATE_ADDRESS" 9093 || return 1 # what follows asks the broker
    advertises="$(advertised "$BROKER_ID" || true)"
    result "$([[ $advertises != "$PUBLIC_ADDRESS:9092" ]] || echo yes)" \
        "clients are sent to ${advertises:-nowhere}" "the public address is $PUBLIC_ADDRESS; run this script again without --check"
    used="$(df --output=pcent "$DATA" | tr -dc 0-9)"
    result "$( ((used >= 85)) || echo yes)" "disk $used% full" "lower log.retention.bytes in server.properties, or a bigger volume"
    missing="$(comm -23 <(printf '%s\n' error_topic test) <(topics --list 2>/dev/null | sort) | paste -sd' ')"
    result "$([[ -n $missing ]] || echo yes)" "topics test and error_topic" "missing $missing; run this script again without --check"
    missing="$(topics --describe --under-replicated-partitions 2>&1 | wc -l || true)"
    result "$( ((missing)) || echo yes)" "every partition has all its copies" "$missing partitions do not; --check on the other brokers"
    if [[ -n $TLS ]]; then
        result "$(openssl x509 -in "$SECURE/broker.pem" -noout -checkend $((30 * 86400)) >/dev/null && echo yes)" \
            "certificate good for 30 days" "run this script again without --check"
    fi
    return $bad
}

uninstall() {
    local unit
    for unit in kafka zookeeper; do # the broker first: it needs ZooKeeper to leave in order
        if [[ -e $UNITS/$unit.service ]]; then
            systemctl disable --now "$unit"
            rm -f "$UNITS/$unit.service"
        fi
    done
    systemctl daemon-reload
    rm -rf "${CURRENT:?}" "/opt/${NAME:?}" "$KEPT" "$CONF"/{*.properties,setup.env,ca.pem,.restart-*}
    if [[ -n $PURGE ]]; then
        rm -rf "$DATA" "$ZOOKEEPER_DATA" "$CONF"
        ! id kafka >/dev/null 2>&1 || userdel kafka
        say "removed, with all data"
    else
        rmdir --ignore-fail-on-non-empty "$CONF" 2>/dev/null || true
        say "removed; the data is still in $DATA and $ZOOKEEPER_DATA: --uninstall --purge removes it"
    fi
}

# A script that carries these files: EC2 hands user data over alone, and takes 16 KB of it.
user_data() {
    local option options='' packed
    for option in "$@"; do
        [[ $option == --user-data ]] || options+=" $(printf %q "$option")"
    done
    packed="$(tar -C "$HERE" -c --sort=name --owner=0 --group=0 --mtime=@0 "${FILES[@]}" | gzip -9n | base64 -w 120)"
    cat <<EOF
#!/bin/bash
# Made by setup_kafka.sh --user-data. The log can hold a password: only root reads it.
set -euo pipefail
install -m 600 /dev/null /var/log/kafka-setup.log
exec >/var/log/kafka-setup.log 2>&1
mkdir -p $KEPT
base64 -d <<'END' | tar -xz -C $KEPT
$packed
END
$KEPT/setup_kafka.sh$options
EOF
}

cleanup() {
    forget_loopback_address
    [[ -z ${WORK:-} ]] || rm -rf "$WORK"
}

main() {
    parse "$@"
    local file
    if [[ $ACTION == help ]]; then
        usage
        return
    fi
    for file in "${FILES[@]}"; do
        [[ -r $HERE/$file ]] || die "$file is not beside this script: run it from a checkout; for EC2 user data paste what --user-data prints"
    done
    if [[ $ACTION == user-data ]]; then
        user_data "$@"
        return
    fi
    recall
    trap cleanup EXIT
    ((EUID == 0)) || die "run this as root: sudo $0 $*"
    mkdir -p /opt "$CONF"
    WORK="$(mktemp -d /opt/.kafka-setup-XXXXXX)"
    case $ACTION in
        check)
            know_addresses
            check
            ;;
        uninstall) uninstall ;;
        render) refresh ;;
        install)
            command -v systemctl >/dev/null || die "no systemctl: this needs a machine with systemd"
            install_packages
            know_addresses
            make_user
            install_kafka
            keep_setup
            configure
            start
            make_topics
            [[ -z $TLS ]] || make_sasl_user
            try_message
            say_env
            ;;
    esac
}

if [[ "${BASH_SOURCE[0]:-$0}" == "$0" ]]; then
    main "$@"
fi
