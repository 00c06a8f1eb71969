"""infra/ on machines of the tests' own: instances, Amazon's network around them, and the laptop.

See tests/ec2/machines.py for the network. The distribution is built here, out of the jars that
Maven fetches and of Apache's own bin/ and config/, which the tests look for beside the project.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers import Script, committed, produce, records, scratch_env, until
from local_stack import ROOT, S3, StackError, kafka_home

from tests.ec2.machines import Instance, Network

NAME = "kafka_2.12-3.3.1"
SCRIPTS = ROOT.parent / "shared" / "kafka" / f"{NAME}-scripts.tgz"
# Without the scripts these tests are skipped, in CI as well: Maven does not have them.
pytestmark = [pytest.mark.root] + [pytest.mark.real] * SCRIPTS.exists()
SETUP = f"{ROOT}/infra/setup_kafka.sh"
MIRROR = f"--url http://10.0.0.1:8000/{NAME}.tgz"
WAIT = "until (exec 3<>/dev/tcp/10.0.0.10/9093) 2>/dev/null; do sleep 0.2; done"
PRIVATE, PUBLIC = "10.0.0.10", "203.0.113.10"


def apache_checksum(file: Path) -> str:
    """A .sha512 as Apache publishes it: NAME: and upper-case hex in groups, over several lines."""
    digest = hashlib.sha512(file.read_bytes()).hexdigest().upper()
    groups = " ".join(textwrap.wrap(digest, 8))
    indent = " " * len(f"{file.name}: ")
    return textwrap.fill(groups, 92, initial_indent=f"{file.name}: ", subsequent_indent=indent)


@pytest.fixture(scope="session")
def distribution(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the distribution and its checksum, as a mirror has them."""
    if not SCRIPTS.exists():
        pytest.skip(f"needs Apache Kafka's bin/ and config/: no {SCRIPTS.name} beside the project")
    try:
        home = kafka_home()
    except StackError as error:
        pytest.skip(f"needs Apache Kafka's jars: {error}")
    folder = tmp_path_factory.mktemp("distribution")
    with tarfile.open(SCRIPTS) as scripts:
        scripts.extractall(folder / "parts", filter="tar")
    tgz = folder / f"{NAME}.tgz"
    with tarfile.open(tgz, "w:gz", compresslevel=1) as archive:
        archive.add(folder / "parts" / NAME, NAME)
        archive.add(home / "libs", f"{NAME}/libs")
    shutil.rmtree(folder / "parts")
    (folder / f"{NAME}.tgz.sha512").write_text(apache_checksum(tgz))
    return folder


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    for command in ("unshare", "nsenter", "setpriv", "ip", "nft", "curl", "openssl"):
        if shutil.which(command) is None:
            pytest.skip(f"needs {command}")
    try:
        network = Network(tmp_path_factory.mktemp("network"))
    except OSError as error:
        pytest.skip(f"no name spaces here: {error}")
    yield network
    network.close()


@pytest.fixture(scope="module")
def mirror(network: Network, distribution: Path) -> Path:
    for file in distribution.iterdir():
        (network.mirror / file.name).symlink_to(file)
    return network.mirror


@pytest.fixture(scope="module")
def broker(network: Network, mirror: Path) -> Instance:
    """An instance that was launched with the setup as its user data."""
    instance = network.instance(PRIVATE, PUBLIC)
    script = subprocess.run(
        [SETUP, "--user-data", *MIRROR.split()], stdout=subprocess.PIPE, check=True
    ).stdout
    assert len(script) <= 16384, "EC2 takes no more"
    user_data = network.addresses.parent / "user-data"
    user_data.write_bytes(script)
    # cloud-init runs it from a folder of its own, with next to no environment
    log = "/var/log/kafka-setup.log"
    instance.sh(f"cd /; env -u HOME bash {user_data} || {{ cat {log}; false; }}")
    assert instance.sh(f"stat -c '%a %U' {log}").strip() == "600 root"
    assert f"KAFKA_BOOTSTRAP_SERVERS={PUBLIC}:9092" in instance.sh(f"cat {log}")
    return instance


@pytest.fixture(scope="module")
def laptop_s3(network: Network, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """An S3 server on the laptop."""
    server = S3(tmp_path_factory.mktemp("laptop-s3"))
    with network.laptop.here():
        server.start()
    yield server
    server.stop()


@pytest.fixture
def laptop(network: Network) -> Iterator[None]:
    """The test itself, and what it starts, is on the laptop."""
    with network.laptop.here():
        yield


class Pair:
    """The two scripts on the laptop, with a bucket, a group and a `.env` of their own."""

    def __init__(self, s3: S3, run: Callable[..., Script], name: str, home: Path):
        self.s3, self.start, self.bucket = s3, run, name
        s3.create_bucket(name)
        self.env = {
            **scratch_env(home),
            **dict.fromkeys(
                ("KAFKA_SECURITY_PROTOCOL", "KAFKA_SASL_MECHANISM", "KAFKA_SASL_USERNAME"), ""
            ),
            **dict.fromkeys(
                ("KAFKA_SASL_PASSWORD", "KAFKA_SSL_CAFILE", "KAFKA_COMPRESSION_TYPE"), ""
            ),
            **dict.fromkeys(("KAFKA_KEY_COLUMN", "S3_PREFIX", "METRICS_PORT"), ""),
            "KAFKA_BOOTSTRAP_SERVERS": f"{PUBLIC}:9092",
            "KAFKA_TOPIC": "test",
            "KAFKA_GROUP_ID": name,
            "KAFKA_AUTO_OFFSET_RESET": "earliest",
            "CSV_PATH": str(ROOT / "tests" / "data" / "indexProcessed.csv"),
            "MESSAGES_PER_SECOND": "90",  # the fastest at which every record is printed
            "RANDOM_SEED": "5",
            "S3_BUCKET": name,
            "S3_ENDPOINT_URL": s3.endpoint,
            "LOG_LEVEL": "INFO",
            "LOG_FORMAT": "text",
            "AWS_ACCESS_KEY_ID": s3.access_key,
            "AWS_SECRET_ACCESS_KEY": s3.secret_key,
            "AWS_SESSION_TOKEN": "",
            "AWS_DEFAULT_REGION": s3.region,
        }
        self.env["KAFKA_SECURITY_PROTOCOL"] = "PLAINTEXT"

    @property
    def bootstrap(self) -> str:
        return self.env["KAFKA_BOOTSTRAP_SERVERS"]

    def consumer(self, *args: str) -> Script:
        return self.start("kafka_consumer.py", *args, env=self.env)

    def producer(self, *args: str) -> Script:
        return self.start("kafka_producer.py", *args, env=self.env)

    def audit(self) -> None:
        audit = self.consumer("--audit")
        assert audit.wait(120) == 0, audit.stdout + audit.stderr

    def check_all_arrived(self, sent: str, timeout: float = 120) -> None:
        """Every record that the producer said it sent is in the topic where it said, in order, and
        every record of the topic is an object with its bytes."""
        said = re.findall(r"Offset: (\d+)\n\s+Content: (.*)", sent)
        offsets = [int(offset) for offset, _ in said]
        assert offsets and offsets == sorted(set(offsets))
        topic = {record.offset: record.value for record in records(self.bootstrap, "test")}
        for offset, content in said:
            assert json.loads(topic[int(offset)]) == json.loads(content)
        # What was stored and not said is a repetition: its acknowledgement was lost.
        for offset in range(offsets[0], max(topic) + 1):
            assert offset in offsets or topic[offset] in (topic[offset - 1], topic[offset + 1])
        end = max(topic) + 1
        until(
            lambda: committed(self.bootstrap, self.bucket, "test") == {0: end},
            timeout,
            f"all {end} records committed",
        )
        self.audit()


@pytest.fixture
def pair(
    laptop: None,
    laptop_s3: S3,
    run: Callable[..., Script],
    tmp_path: Path,
) -> Pair:
    return Pair(laptop_s3, run, f"test-{secrets.token_hex(4)}", tmp_path)


def status(instance: Instance, unit: str) -> dict:
    """What the stand-in for systemd knows: state, main (process id), restarts."""
    return json.loads(instance.sh(f"systemctl status {unit}").partition(" ")[2])


def resident_mb(instance: Instance, unit: str) -> float:
    return int(instance.sh(f"ps -o rss= -p {status(instance, unit)['main']}")) / 1024


def files(instance: Instance) -> str:
    """Every file of the installation, with its time of change and content."""
    return instance.sh(
        "find /opt/kafka /opt/kafka_* /etc/kafka /etc/systemd/system /usr/local/lib/kafka-setup"
        " -printf '%p %T@ %m %u %l\\n' | sort; sha256sum /etc/kafka/*.properties"
    )


# --- Without a broker ---


def test_help_and_wrong_options_need_no_root(network: Network) -> None:
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "infra", folder, dirs_exist_ok=True)
        os.chmod(folder, 0o755)
        setup = f"setpriv --reuid 65534 --clear-groups {folder}/setup_kafka.sh"
        assert "--zookeeper-connect" in network.laptop.sh(f"{setup} --help")
        for options, said in (
            ("--sekure", "unknown option '--sekure'"),
            ("--broker-id one", "--broker-id 'one'"),
            ("--broker-id", "--broker-id needs a value"),
            ("--zookeeper-connect 10.0.0.1", "--zookeeper-connect '10.0.0.1'"),
            ("--public-address 'a b'", "--public-address 'a b'"),
            ("--purge", "--purge goes with --uninstall"),
        ):
            output = network.laptop.sh(f"{setup} {options}", check=False)
            assert network.laptop.code == 2 and said in output and output.count("\n") == 1
        output = network.laptop.sh(setup, check=False)
        assert network.laptop.code == 1 and "as root" in output


def test_pasted_without_its_files_it_says_what_to_paste(network: Network, tmp_path: Path) -> None:
    shutil.copy(SETUP, tmp_path)
    output = network.laptop.sh(f"bash {tmp_path}/setup_kafka.sh", check=False)
    assert network.laptop.code == 1 and "--user-data" in output


def test_java_comes_from_the_package_manager_of_the_system(tmp_path: Path) -> None:
    for manager, package in (
        ("dnf", "java-17-amazon-corretto-headless"),
        ("apt-get", "openjdk-17-jre-headless"),
    ):
        folder = tmp_path / manager
        folder.mkdir()
        for command in ("curl", "tar", "ip", "useradd", "openssl"):
            (folder / command).symlink_to("/bin/true")
        (folder / manager).write_text('#!/bin/sh\necho "$@"\n')
        (folder / manager).chmod(0o755)
        script = f"source {SETUP}; PATH={folder}; install_packages"
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
        assert re.search(rf"install .*{package}$", done.stdout, re.MULTILINE), done


def test_wrong_checksum_is_refused_and_nothing_installed(network: Network, mirror: Path) -> None:
    tgz = mirror / "broken.tgz"
    tgz.write_bytes(b"not what Apache published")
    (mirror / "broken.tgz.sha512").write_text(apache_checksum(mirror / f"{NAME}.tgz"))
    instance = network.instance("10.0.0.20", "203.0.113.20")
    output = instance.sh(f"{SETUP} --url http://10.0.0.1:8000/broken.tgz", check=False)
    assert instance.code == 1 and "wrong checksum" in output
    output = instance.sh(f"KAFKA_TGZ={tgz} {SETUP}", check=False)
    assert instance.code == 1 and "wrong checksum" in output
    output = instance.sh(f"{SETUP} --url http://10.0.0.1:8000/none.tgz", check=False)
    assert instance.code == 1 and "cannot download" in output
    assert not instance.sh("ls -A /opt | grep kafka; ls /etc/systemd/system", check=False)


def test_kafka_knows_every_key_of_server_properties(tmp_path: Path) -> None:
    try:
        libs = kafka_home() / "libs"
    except StackError as error:
        pytest.skip(f"needs Apache Kafka's jars: {error}")
    text = (ROOT / "infra" / "server.properties").read_text().replace("#secure ", "")
    keys = re.findall(r"^([^#\s=]+)=", text, re.MULTILINE)
    # a listener, and a mechanism of SASL, have settings of their own under these prefixes
    keys = [re.sub(r"^listener\.name\.external\.(scram-sha-512\.)?", "", key) for key in keys]
    assert len(keys) > 20
    source = tmp_path / "Known.java"
    source.write_text(
        "public class Known { public static void main(String[] keys) {"
        " for (String key : keys) if (!kafka.server.KafkaConfig.configNames().contains(key))"
        " System.out.println(key); } }"
    )
    ask = ["java", "-cp", f"{libs}/*", str(source)]
    done = subprocess.run([*ask, *keys], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    done = subprocess.run([*ask, "log.dirz"], capture_output=True, text=True, check=True)
    assert done.stdout == "log.dirz\n"


# --- One broker ---


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
def test_units_pass_systemd_analyze_verify(broker: Instance) -> None:
    # the checkout that kafka-s3@ runs from
    broker.sh(
        "mkdir -p /opt/kafka-s3/.venv/bin; ln -sf /bin/true /opt/kafka-s3/.venv/bin/python;"
        f"cp {ROOT}/infra/kafka-s3@.service /etc/systemd/system"
    )
    units = ["kafka", "zookeeper", "kafka-s3@consumer", "kafka-s3@producer"]
    paths = " ".join(f"/etc/systemd/system/{unit}.service" for unit in units)
    verify = "systemd-analyze verify --man=no --recursive-errors=no"
    output = broker.sh(f"PATH=/usr/bin:/bin {verify} {paths}", check=False)
    code = broker.code
    broker.sh("rm -r /opt/kafka-s3 /etc/systemd/system/kafka-s3@.service")
    assert code == 0 and not output, output


def test_pair_runs_on_the_laptop_through_the_public_address(
    broker: Instance, pair: Pair, objects_of: Callable[[str], dict[str, bytes]]
) -> None:
    producer = pair.producer("--max-messages", "20")
    assert producer.wait() == 0
    consumer = pair.consumer("--max-messages", "20")
    assert consumer.wait() == 0
    first = int(re.findall(r"Offset: (\d+)", producer.stdout)[0])
    names = [f"stock_market_{offset}.json" for offset in range(first, first + 20)]
    stored = objects_of(pair.bucket)
    assert first != 0 or set(stored) == set(names)
    pair.audit()


@pytest.fixture
def objects_of(laptop: None, laptop_s3: S3) -> Callable[[str], dict[str, bytes]]:
    client = laptop_s3.client()

    def read(bucket: str) -> dict[str, bytes]:
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket)
        names = [entry["Key"] for page in pages for entry in page.get("Contents", ())]
        return {name: client.get_object(Bucket=bucket, Key=name)["Body"].read() for name in names}

    return read


def test_second_run_changes_nothing(broker: Instance) -> None:
    before = files(broker), status(broker, "kafka"), status(broker, "zookeeper")
    output = broker.sh(SETUP)
    assert "wrote" not in output and "starting" not in output and "a message went" in output
    assert before == (files(broker), status(broker, "kafka"), status(broker, "zookeeper"))
    assert broker.sh("ls -A /opt | grep kafka").split() == ["kafka", NAME]
    assert "203.0.113" not in broker.sh("ip address show lo")


def test_check_says_what_is_wrong_and_what_to_do(broker: Instance) -> None:
    broker.sh("systemctl disable zookeeper")
    output = broker.sh(f"{SETUP} --check --public-address 203.0.113.99", check=False)
    assert broker.code == 1 and output.count("\nok ") == 8
    assert re.findall("FAIL.*", output) == [
        "FAIL  zookeeper starts at boot: sudo systemctl enable zookeeper",
        f"FAIL  clients are sent to {PUBLIC}:9092: the public address is 203.0.113.99; "
        "run this script again without --check",
    ]
    broker.sh("systemctl enable zookeeper")
    broker.sh("systemctl stop kafka")
    output = broker.sh(f"{SETUP} --check", check=False)
    broker.sh(f"systemctl start kafka; timeout 60 bash -c '{WAIT}'")
    assert broker.code == 0
    assert re.findall("FAIL  ([^:]*)", output) == ["kafka runs", "127.0.0.1", "10.0.0.10"]


def test_nothing_but_the_three_ports_listens_and_only_9092_is_reached_from_outside(
    broker: Instance, network: Network
) -> None:
    listening = broker.sh("ss -Hltn | awk '{print $4}'").replace("[::ffff:", "").replace("]", "")
    assert sorted(listening.split()) == ["*:9092", "10.0.0.10:9093", "127.0.0.1:2181"]
    for port in (9093, 2181):
        network.laptop.sh(f"timeout 2 bash -c '</dev/tcp/{PUBLIC}/{port}'", check=False)
        assert network.laptop.code


@pytest.mark.slow
def test_killed_broker_comes_back_by_its_unit_and_nothing_is_lost(
    broker: Instance, pair: Pair
) -> None:
    consumer = pair.consumer()
    producer = pair.producer("--max-messages", "1800")
    consumer.wait_for("Upload Successfully")
    restarts = status(broker, "kafka")["restarts"]
    broker.sh(f"kill -9 {status(broker, 'kafka')['main']}")
    until(lambda: status(broker, "kafka")["restarts"] > restarts, 60)
    assert producer.wait(300) == 0, producer.stderr
    assert len(re.findall(r"\[Sent\]", producer.stdout)) == 1800
    pair.check_all_arrived(producer.stdout)
    consumer.terminate()
    assert consumer.wait(10) == 0


@pytest.mark.slow
def test_stopped_and_started_instance_advertises_its_new_public_address(
    broker: Instance, network: Network, pair: Pair
) -> None:
    assert pair.producer("--max-messages", "30").wait(60) == 0
    before = [record.value for record in records(pair.bootstrap, "test")]
    broker.power_off()
    network.give(PRIVATE, "203.0.113.77")
    broker.power_on()
    broker.sh("systemctl default")
    pair.env["KAFKA_BOOTSTRAP_SERVERS"] = "203.0.113.77:9092"
    until(lambda: "FAIL" not in broker.sh(f"{SETUP} --check", check=False), 180)
    assert [record.value for record in records(pair.bootstrap, "test")] == before
    producer, consumer = pair.producer("--max-messages", "30"), pair.consumer()
    assert producer.wait() == 0
    pair.check_all_arrived(producer.stdout)
    consumer.terminate()
    # the same while it runs: an Elastic IP was attached
    network.give(PRIVATE, PUBLIC)
    output = broker.sh(SETUP)
    assert "wrote /etc/kafka/server.properties" in output and "starting kafka" in output
    pair.env["KAFKA_BOOTSTRAP_SERVERS"] = f"{PUBLIC}:9092"
    assert pair.producer("--max-messages", "1").wait() == 0


@pytest.mark.slow
def test_memory_after_200_000_records(broker: Instance, pair: Pair) -> None:
    row = (ROOT / "tests" / "data" / "indexProcessed.csv").read_bytes().splitlines()[1]
    value = json.dumps({"row": row.decode()}).encode()
    broker.sh(
        "/opt/kafka/bin/kafka-topics.sh --bootstrap-server 10.0.0.10:9093 --create --topic load"
    )
    produce(pair.bootstrap, "load", [value] * 200_000)
    memory = {unit: resident_mb(broker, unit) for unit in ("kafka", "zookeeper")}
    print(memory)
    assert memory["kafka"] < 400 and memory["zookeeper"] < 150


# --- TLS and passwords ---


@pytest.fixture(scope="module")
def secured(network: Network, distribution: Path, mirror: Path) -> tuple[Instance, dict[str, str]]:
    """An instance set up with --secure from a file, and the lines that it prints for .env."""
    instance = network.instance("10.0.0.30", "203.0.113.30")
    output = instance.sh(f"KAFKA_TGZ={distribution}/{NAME}.tgz {SETUP} --secure")
    assert "WARNING: port 9092" not in output
    lines = dict(re.findall(r"^(KAFKA_\w+)=(.+)$", output, re.MULTILINE))
    authority = network.addresses.parent / "kafka-ca.pem"
    authority.write_text(instance.sh("cat /etc/kafka/ca.pem"))
    assert lines["KAFKA_SSL_CAFILE"] == authority.name
    lines["KAFKA_SSL_CAFILE"] = str(authority)
    return instance, lines


@pytest.mark.slow
def test_secured_broker_serves_those_with_the_password(
    secured: tuple[Instance, dict[str, str]], pair: Pair
) -> None:
    instance, lines = secured
    pair.env |= lines
    assert pair.producer("--max-messages", "5").wait() == 0
    assert pair.consumer("--max-messages", "5").wait() == 0
    # keys are for root, and what the broker needs for the broker; a second run keeps them
    modes = instance.sh("stat -c '%a %U:%G %n' /etc/kafka/secure/*")
    assert "600 root:root /etc/kafka/secure/ca.key" in modes
    assert "600 root:root /etc/kafka/secure/password" in modes
    assert "640 root:kafka /etc/kafka/secure/broker.pem" in modes
    before = files(instance)
    output = instance.sh(SETUP)
    assert lines["KAFKA_SASL_PASSWORD"] in output and files(instance) == before
    assert lines["KAFKA_SASL_PASSWORD"] not in instance.sh("journalctl -u kafka -u zookeeper")
    # uninstalled and installed again it still knows its data and its password
    instance.sh(f"{SETUP} --uninstall")
    assert not instance.sh("find /opt /etc/systemd /usr/local/lib -name '*kafka*'")
    instance.sh(f"{SETUP} --secure {MIRROR}")
    assert pair.producer("--max-messages", "5").wait() == 0
    assert len(records_of(pair)) == 10


def records_of(pair: Pair) -> list[bytes]:
    """The topic's records as the audit sees them: one object each."""
    assert pair.consumer("--max-messages", "5").wait() == 0
    pair.audit()
    listing = pair.s3.client().list_objects_v2(Bucket=pair.bucket)
    return [entry["Key"] for entry in listing["Contents"]]


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"KAFKA_SECURITY_PROTOCOL": "PLAINTEXT"},
        {"KAFKA_SASL_PASSWORD": "wrong"},
        {"KAFKA_SSL_CAFILE": ""},
    ],
    ids=["no credentials", "wrong password", "no authority"],
)
@pytest.mark.parametrize("script", ["kafka_producer.py", "kafka_consumer.py"])
def test_secured_broker_refuses_others_with_one_line(
    secured: tuple[Instance, dict[str, str]], pair: Pair, script: str, change: dict[str, str]
) -> None:
    pair.env |= {**secured[1], **change}
    if change.get("KAFKA_SECURITY_PROTOCOL") == "PLAINTEXT":
        for name in ("MECHANISM", "USERNAME", "PASSWORD"):
            pair.env[f"KAFKA_SASL_{name}"] = ""
        pair.env["KAFKA_SSL_CAFILE"] = ""
    refused = pair.start(script, "--max-messages", "1", env=pair.env)
    assert refused.wait(20) == 1
    errors = [line for line in refused.lines("stderr") if "ERROR" in line]
    assert len(errors) == 1 and "203.0.113.30:9092" in errors[0], refused.stderr
    assert "Traceback" not in refused.stderr
    assert secured[1]["KAFKA_SASL_PASSWORD"] not in refused.stderr


# --- README.md, word for word ---


def readme(section: str) -> list[tuple[str, str]]:
    """The commands and settings of one section of infra/README.md: where they belong, and they."""
    text = (ROOT / "infra" / "README.md").read_text()
    text = text.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"^(?:On|In) ([^\n]*):\n\n```(?:sh|ini)\n(.*?)```", text, re.M | re.S)
    assert blocks and len(blocks) == len(re.findall("^```(?:sh|ini)$", text, re.M))
    return blocks


def checkout(folder: Path) -> None:
    """A clone of the project as it stands."""
    folder.mkdir()
    script = f"""
        git -C {ROOT} ls-files -coz --exclude-standard |
          tar -C {ROOT} --null -T - --ignore-failed-read -c | tar -x
        git init -q; git add -A
        git -c user.name=test -c user.email=test@localhost commit -qm "As it stands"
    """
    subprocess.run(["bash", "-euc", script], cwd=folder, check=True, stderr=subprocess.DEVNULL)


def installed(python: str, packages: str, folder: str) -> str:
    """Shell commands that make the .venv of a checkout from what is installed here: the machines
    of the tests have no way to PyPI."""
    return f"""
        {python} -m venv --without-pip {folder}/.venv
        echo {packages} > "$(echo {folder}/.venv/lib/python3*/site-packages)/installed.pth"
        install -m 755 /dev/null {folder}/.venv/bin/pip
        touch -d tomorrow {folder}/.venv/.installed-
    """


@pytest.mark.slow
def test_following_the_readme_gives_a_working_pair(distribution: Path, tmp_path: Path) -> None:
    network = Network(tmp_path)
    try:
        follow_readme(network, distribution, tmp_path)
    finally:
        network.close()


def follow_readme(network: Network, distribution: Path, tmp_path: Path) -> None:
    instance = network.instance(PRIVATE, PUBLIC)
    here, packages = tmp_path / "checkout", sysconfig.get_path("purelib")
    checkout(here)
    network.laptop.sh(installed(sys.executable, packages, str(here)))
    instance.sh(
        f"""
        mkdir -p /opt/python /opt/packages /opt/kafka-s3
        mount --bind {sys.base_prefix} /opt/python
        mount --bind {packages} /opt/packages
        {installed("/opt/python/bin/python3", "/opt/packages", "/opt/kafka-s3")}
        """
    )
    with instance.here():
        instance_s3 = S3(tmp_path / "instance-s3").start()
        instance_s3.create_bucket("your-bucket")
    with network.laptop.here():
        laptop_s3 = S3(tmp_path / "laptop-s3").start()
        laptop_s3.create_bucket("your-bucket")

    def settings(text: str, s3: S3) -> str:
        """A .env made from the example by the README's words; S3 is here what Amazon is there."""
        lines = (here / ".env.example").read_text().splitlines()
        for line in text.splitlines():
            name = line.partition("=")[0] + "="
            assert any(old.startswith(name) for old in lines)
            lines = [line if old.startswith(name) else old for old in lines]
        result = "\n".join(line for line in lines if not line.startswith("AWS_"))
        assert "S3_ENDPOINT_URL=\n" in result
        result = result.replace("S3_ENDPOINT_URL=\n", f"S3_ENDPOINT_URL={s3.endpoint}\n")
        keys = f"\nAWS_ACCESS_KEY_ID={s3.access_key}\nAWS_SECRET_ACCESS_KEY={s3.secret_key}\n"
        return f"{result}{keys}AWS_DEFAULT_REGION={s3.region}\n"

    enter = " ".join([*instance.enter, f"KAFKA_TGZ={distribution}/{NAME}.tgz"])

    def follow(section: str) -> str:
        said = ""
        for place, text in readme(section):
            if "env` " in place:
                on_laptop = place.endswith("on your machine")
                env = settings(text, laptop_s3 if on_laptop else instance_s3)
                if on_laptop:
                    (here / ".env").write_text(env)
                else:
                    instance.sh(f"cat > /opt/kafka-s3/.env <<'END'\n{env}\nEND")
            elif place.startswith("your machine"):
                path = f"{ROOT}/tests/ec2/laptop:$PATH"
                said += network.laptop.sh(
                    f'cd {here}; export PATH={path} INSTANCE="{enter}"\n{text}'
                )
            else:
                # no archive of Apache's in these namespaces: the machine is behind a mirror
                mirror = f"export KAFKA_TGZ={distribution}/{NAME}.tgz"
                said += instance.sh(f"cd; {mirror}\n{text}")
        return said

    said = follow("One broker")
    assert said.count("[Sent]") == 5 and said.count("Upload Successfully") == 5
    assert "FAIL" not in said and "KAFKA_BOOTSTRAP_SERVERS=203.0.113.10:9092" in said
    assert (here / "user-data.sh").read_text().startswith("#!/bin/bash")

    said = follow("TLS and passwords")
    lines = re.findall(r"^KAFKA_\w+=.+$", said, re.M)
    with (here / ".env").open("a") as env:
        env.write("\n".join(lines) + "\n")
    run_again = "kafka_producer.py", "kafka_consumer.py", "kafka_consumer.py --audit"
    for script in run_again:
        limit = "" if "audit" in script else "--max-messages 5"
        said = network.laptop.sh(f"cd {here}; .venv/bin/python {script} {limit}")
    assert "audit: 10 objects" in said

    follow("The pair as services")
    instance.sh("systemctl is-active kafka-s3@consumer kafka-s3@producer")

    def log() -> str:
        return instance.sh("journalctl -u kafka-s3@consumer")

    until(lambda: log().count("Upload Successfully") > 3, 90, "uploads by the service")
    instance.sh(f"kill -9 {status(instance, 'kafka-s3@consumer')['main']}")
    uploads = log().count("Upload Successfully")
    until(lambda: log().count("Upload Successfully") > uploads, 90, "uploads after a restart")
    instance.sh("systemctl stop kafka-s3@consumer kafka-s3@producer")

    said = follow("Lag, offsets, replay")
    assert re.search(r"python-consumer-group +test +0 +\d+ +\d+ +\d+", said), said
    assert "stock_market_0.json" not in log()
    instance.sh("systemctl start kafka-s3@consumer")
    until(lambda: "stock_market_0.json" in log(), 90, "the replay")
    instance.sh("systemctl stop kafka-s3@consumer")
    assert "Traceback" not in log()
    instance_s3.stop()
    laptop_s3.stop()


# --- Three brokers ---


@pytest.mark.slow
def test_three_brokers_lose_nothing_when_the_machine_of_the_leader_dies(
    network: Network, mirror: Path, pair: Pair
) -> None:
    brokers = {n: network.instance(f"10.0.0.1{n}", f"203.0.113.1{n}") for n in (1, 2, 3)}

    lines = {int(place[-1]): line for place, line in readme("Three brokers")}

    def setup(n: int) -> str:
        command = lines[n].strip().replace("infra/setup_kafka.sh", SETUP)
        return brokers[n].sh(f"{command} {MIRROR}")

    with ThreadPoolExecutor() as pool:
        outputs = list(pool.map(setup, brokers))
    addresses = ",".join(f"203.0.113.1{n}:9092" for n in brokers)
    assert all(f"KAFKA_BOOTSTRAP_SERVERS={addresses}\n" in output for output in outputs)
    pair.env["KAFKA_BOOTSTRAP_SERVERS"] = addresses

    def topic(n: int, name: str) -> str:
        tool = f"/opt/kafka/bin/kafka-topics.sh --bootstrap-server 10.0.0.1{n}:9093"
        return brokers[n].sh(f"{tool} --describe --topic {name}")

    assert "ReplicationFactor: 3" in topic(1, "test")
    consumer = pair.consumer()
    producer = pair.producer("--max-messages", "1800")
    consumer.wait_for("Upload Successfully")
    described = topic(1, "test")
    assert "min.insync.replicas=2" in described
    assert "ReplicationFactor: 3" in topic(1, "__consumer_offsets")
    leader = int(re.findall(r"Leader: (\d)", described)[0])
    brokers[leader].power_off()
    assert producer.wait(300) == 0, producer.stderr
    assert len(re.findall(r"\[Sent\]", producer.stdout)) == 1800
    pair.check_all_arrived(producer.stdout)
    other = leader % 3 + 1
    assert re.findall(r"Leader: (\d)", topic(other, "test")) != [str(leader)]
    # it comes back and catches up
    brokers[leader].power_on()
    brokers[leader].sh("systemctl default")
    until(lambda: topic(other, "test").rstrip()[-5:].count(",") == 2, 180, "all copies in sync")
    assert "FAIL" not in brokers[leader].sh(f"{SETUP} --check")
    consumer.terminate()
    assert consumer.wait(10) == 0
    for instance in brokers.values():
        instance.power_off()
