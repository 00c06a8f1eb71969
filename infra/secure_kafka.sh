# shellcheck shell=bash
# TLS and passwords on port 9092, for setup_kafka.sh --secure, which sources this file and gives it
# put, tool, in_cluster, zookeeper_position and the addresses. Secrets stay in variables and pipes:
# on the disk they are in /etc/kafka/secure alone.

readonly SECURE=/etc/kafka/secure
readonly SASL_USER=client
readonly NEW_AUTHORITY="put it back, or remove ca.pem, set up again and give clients the new one"
readonly MONTH=$((30 * 86400)) # seconds

# The certificate authority and the password are made once; the broker's certificate again when its
# addresses change or it is about to end.
make_certificates() {
    install -d -m 750 -o root -g kafka "$SECURE"
    if [[ ! -s $SECURE/password || ! -s $SECURE/ca.pem ]]; then
        refuse_second_authority
    fi
    [[ -s $SECURE/password ]] || make_password
    [[ -s $SECURE/ca.pem ]] || make_authority
    certificate_fits || make_broker_certificate
    chown root:kafka "$SECURE/broker.pem"
    chmod 640 "$SECURE/broker.pem"
    put "$CONF/ca.pem" 644 root:root <"$SECURE/ca.pem" # now that it has proven good
}

refuse_second_authority() {
    if in_cluster && [[ "$(zookeeper_position)" != 1 ]]; then
        die "brokers share one certificate authority and password: copy $SECURE from" \
            "${ZOOKEEPER%%:*} to this machine, then run this again"
    fi
}

make_password() {
    local password
    password="$(openssl rand -hex 16)"
    touch "$SECURE/.new-password"
    put "$SECURE/password" 600 root:root <<<"$password"
}

make_key() { openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256; }

make_authority() {
    local key certificate
    key="$(make_key)"
    certificate="$(openssl req -x509 -new -key <(echo "$key") -sha256 -days 3650 \
        -config <(openssl_configuration "Kafka of $PRIVATE_ADDRESS") -extensions authority)"
    put "$SECURE/ca.key" 600 root:root <<<"$key"
    put "$SECURE/ca.pem" 644 root:root <<<"$certificate"
}

# What keeps the authority from signing, if anything does
authority_fault() {
    local key
    if ! key="$(openssl x509 -in "$SECURE/ca.pem" -noout -pubkey 2>/dev/null)"; then
        echo "$SECURE/ca.pem is no certificate"
    elif [[ "$(openssl pkey -in "$SECURE/ca.key" -pubout 2>/dev/null)" != "$key" ]]; then
        echo "$SECURE/ca.key is missing, or not the key of ca.pem"
    fi
}

make_broker_certificate() {
    local fault key request certificate
    fault="$(authority_fault)"
    [[ -z $fault ]] || die "$fault: $NEW_AUTHORITY"
    key="$(make_key)"
    request="$(openssl req -new -key <(echo "$key") \
        -config <(openssl_configuration "$PUBLIC_ADDRESS"))"
    certificate="$(openssl x509 -req -sha256 -days 730 -in <(echo "$request") \
        -CA "$SECURE/ca.pem" -CAkey "$SECURE/ca.key" -set_serial "0x$(openssl rand -hex 16)" \
        -extfile <(openssl_configuration "$PUBLIC_ADDRESS") -extensions broker 2>/dev/null)"
    printf '%s\n' "$key" "$certificate" "$(<"$SECURE/ca.pem")" |
        put "$SECURE/broker.pem" 640 root:kafka kafka
}

# openssl_configuration NAME: the template with the name of the owner and the broker's addresses
openssl_configuration() {
    sed -e "s|@NAME@|$1|" \
        -e "s|@ADDRESSES@|$(alt_name "$PUBLIC_ADDRESS"),$(alt_name "$PRIVATE_ADDRESS")|" \
        "$HERE/openssl.cnf"
}

alt_name() {
    if [[ $1 =~ ^[0-9.]+$ ]]; then
        echo "IP:$1"
    else
        echo "DNS:$1"
    fi
}

certificate_fits() {
    certified "$PUBLIC_ADDRESS" && certified "$PRIVATE_ADDRESS" && certificate_lasts &&
        openssl verify -CAfile "$SECURE/ca.pem" "$SECURE/broker.pem" >/dev/null 2>&1
}

certificate_lasts() {
    openssl x509 -in "$SECURE/broker.pem" -noout -checkend $MONTH >/dev/null 2>&1
}

check_certificates() {
    local fault
    fault="$(authority_fault)"
    expect "the authority can sign" "$fault; $NEW_AUTHORITY" test -z "$fault"
    expect "the broker can read its certificate" "$AGAIN" \
        runuser -u kafka -- test -r "$SECURE/broker.pem"
    expect "certificate good for 30 days" "$AGAIN" certificate_lasts
}

# certified ADDRESS: is there a certificate of the broker that names it?
certified() {
    local option=-checkhost
    [[ ! $1 =~ ^[0-9.]+$ ]] || option=-checkip
    openssl x509 -in "$SECURE/broker.pem" -noout "$option" "$1" 2>/dev/null | grep -q 'does match'
}

# The listener itself, where its advertised address cannot be reached from here.
try_certificate() {
    local option=-verify_hostname
    [[ ! $PUBLIC_ADDRESS =~ ^[0-9.]+$ ]] || option=-verify_ip
    timeout 20 openssl s_client -connect 127.0.0.1:9092 -CAfile "$SECURE/ca.pem" \
        -verify_return_error "$option" "$PUBLIC_ADDRESS" </dev/null >/dev/null 2>&1 ||
        die "port 9092 does not show the certificate for $PUBLIC_ADDRESS: see journalctl -u kafka"
}

make_sasl_user() {
    local configs=(tool kafka-configs.sh --bootstrap-server "$PRIVATE_ADDRESS:9093"
        --entity-type users --entity-name "$SASL_USER")
    if [[ -e $SECURE/.new-password ]] || ! "${configs[@]}" --describe | grep -q SCRAM-SHA-512; then
        # from a file: arguments can be seen by everybody on the machine
        "${configs[@]}" --alter \
            --add-config-file <(echo "SCRAM-SHA-512=password=$(<"$SECURE/password")") >/dev/null
        rm -f "$SECURE/.new-password"
    fi
}

# What a client of port 9092 needs; nothing without --secure.
client_properties() {
    local login=org.apache.kafka.common.security.scram.ScramLoginModule
    [[ -n $TLS ]] || return 0
    login+=" required username=\"$SASL_USER\" password=\"$(<"$SECURE/password")\";"
    printf '%s\n' security.protocol=SASL_SSL sasl.mechanism=SCRAM-SHA-512 \
        ssl.truststore.type=PEM "ssl.truststore.location=$CONF/ca.pem" \
        "sasl.jaas.config=$login"
}

say_secrets() {
    say "KAFKA_SECURITY_PROTOCOL=SASL_SSL"
    say "KAFKA_SASL_MECHANISM=SCRAM-SHA-512"
    say "KAFKA_SASL_USERNAME=$SASL_USER"
    say "KAFKA_SASL_PASSWORD=$(<"$SECURE/password")"
    say "KAFKA_SSL_CAFILE=kafka-ca.pem"
    say
    say "and kafka-ca.pem beside it:" \
        "scp ${SUDO_USER:-ec2-user}@$PUBLIC_ADDRESS:$CONF/ca.pem kafka-ca.pem"
}
