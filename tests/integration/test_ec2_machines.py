"""infra/ on machines of the tests' own, as its README says and as the user who logs in: instances
that are booted with systemd, Amazon's network around them, and the laptop.

See ec2/machines.py for both. The tests of the one broker are one story: they follow the README from
a bare machine to the uninstalled one, in the order of this file.
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
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from ec2.machines import USER, Instance, Network, java_tree, root_tree
from helpers import Script, committed, produce, records, scratch_env, until
from local_stack import LOCAL, ROOT, S3, StackError, kafka_home

NAME = "kafka_2.12-3.3.1"
APACHE = f"https://archive.apache.org/dist/kafka/3.3.1/{NAME}.tgz"
# Apache's bin/ and config/, which Maven does not have
SCRIPTS = ROOT.parent / "shared" / "kafka" / f"{NAME}-scripts.tgz"
pytestmark = [pytest.mark.root, pytest.mark.real, pytest.mark.slow]
SETUP = "infra/setup_kafka.sh"
PRIVATE, PUBLIC, NEW_PUBLIC = "10.0.0.10", "203.0.113.10", "203.0.113.77"
LAPTOP = Path(__file__).parent / "ec2" / "laptop"
NEEDED = [
    "debootstrap",
    "systemd-nspawn",
    "unshare",
    "nsenter",
    "setpriv",
    "ip",
    "nft",
    "curl",
    "openssl",
    "git",
]


# --- The distribution, the network, the machines ---


@pytest.fixture(scope="module")
def distribution(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The distribution with its checksum beside it: out of Maven's jars and the scripts beside the
    project, or the file that KAFKA_TGZ names, or by download."""
    if SCRIPTS.exists():
        return assembled(tmp_path_factory.mktemp("distribution"))
    tgz = Path(os.environ.get("KAFKA_TGZ") or LOCAL / f"{NAME}.tgz")
    if not tgz.exists():
        download(tgz)
    digest = (
        Path(f"{tgz}.sha512").read_text().partition(":")[2] or Path(f"{tgz}.sha512").read_text()
    )
    assert hashlib.sha512(tgz.read_bytes()).hexdigest() in "".join(digest.split()).lower()
    return tgz


def assembled(folder: Path) -> Path:
    try:
        home = kafka_home()
    except StackError as error:
        pytest.skip(f"needs Apache Kafka's jars: {error}")
    with tarfile.open(SCRIPTS) as scripts:
        scripts.extractall(folder, filter="tar")
    tgz = folder / f"{NAME}.tgz"
    with tarfile.open(tgz, "w:gz", compresslevel=1) as archive:
        archive.add(folder / NAME, NAME)
        archive.add(home / "libs", f"{NAME}/libs")
    Path(f"{tgz}.sha512").write_text(checksum(tgz))
    return tgz


def checksum(file: Path) -> str:
    return f"{hashlib.sha512(file.read_bytes()).hexdigest()}  {file.name}\n"


def download(tgz: Path) -> None:
    for end in (".sha512", ""):
        command = ["curl", "-fsSL", "--retry", "3", "-o", f"{tgz}{end}.part", f"{APACHE}{end}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"needs {NAME}.tgz in KAFKA_TGZ or from Apache: {done.stderr.strip()}")
        Path(f"{tgz}{end}.part").rename(f"{tgz}{end}")


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory, distribution: Path) -> Iterator[Network]:
    missing = [command for command in NEEDED if shutil.which(command) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    try:
        root_tree()
        java_tree()
        network = Network(tmp_path_factory.mktemp("network"))
    except OSError as error:
        pytest.skip(f"no machines here: {error}")
    for end in ("", ".sha512"):
        (network.releases / f"{NAME}.tgz{end}").symlink_to(f"{distribution}{end}")
    yield network
    network.close()


@pytest.fixture(scope="module")
def checkout(network: Network) -> Path:
    """A clone of the project as it stands, on the laptop, with its .venv."""
    folder = network.folder / "checkout"
    folder.mkdir()
    packages = sysconfig.get_path("purelib")
    script = f"""
        git -C {ROOT} ls-files -coz --exclude-standard |
          tar -C {ROOT} --null -T - --ignore-failed-read -c | tar -x
        git init -q; git add -A
        git -c user.name=test -c user.email=test@localhost commit -qm "As it stands"
        {sys.executable} -m venv --without-pip .venv
        echo {packages} > "$(echo .venv/lib/python3*/site-packages)/installed.pth"
    """
    subprocess.run(["bash", "-euc", script], cwd=folder, check=True, stderr=subprocess.DEVNULL)
    return folder


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


def resident_mb(instance: Instance, unit: str) -> float:
    return int(instance.sh(f"ps -o rss= -p {instance.unit(unit, 'MainPID')}")) / 1024


def files(instance: Instance) -> str:
    """Every file of the installation, with its time of change and content."""
    return instance.sh(
        "find /opt/kafka /opt/kafka_* /etc/kafka /etc/systemd/system /usr/local/lib/kafka-setup"
        " -printf '%p %T@ %m %u %l\\n' | sort; sha256sum /etc/kafka/*.properties"
    )


def journal(instance: Instance, *options: str) -> list[dict[str, str]]:
    """Messages of the journal since the boot, without systemd's own."""
    lines = instance.sh(f"journalctl --boot --all --output=json {' '.join(options)}").splitlines()
    entries = [json.loads(line) for line in lines]
    return [entry for entry in entries if entry["SYSLOG_IDENTIFIER"] != "systemd"]


# --- README.md, word for word ---


def readme(section: str) -> list[tuple[str, str]]:
    """The commands and settings of one section of infra/README.md: where they belong, and they."""
    text = (ROOT / "infra" / "README.md").read_text()
    text = text.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"^(?:On|In) ([^\n]*):\n\n```(?:sh|ini)\n(.*?)```", text, re.M | re.S)
    assert blocks and len(blocks) == len(re.findall("^```(?:sh|ini)$", text, re.M))
    return blocks


class Reader:
    """Somebody who does what the README says, on the laptop and on one instance."""

    def __init__(
        self, network: Network, checkout: Path, instance: Instance, here: S3, there: S3 | None
    ) -> None:
        self.network, self.checkout, self.instance = network, checkout, instance
        self.s3 = {"laptop": here, "instance": there}

    def follow(self, section: str) -> str:
        """Does what a section says; all that was printed."""
        return "".join(self.obey(place, text) for place, text in readme(section))

    def obey(self, place: str, text: str) -> str:
        if "env` " in place:
            self.write_env(place, text)
            return ""
        if place.startswith("your machine"):
            return self.on_laptop(text)
        return self.instance.log_in(text)

    def on_laptop(self, text: str) -> str:
        instance = " ".join(self.instance.log_in_command)
        path = f"{LAPTOP}:$PATH"
        return self.network.laptop.sh(
            f'cd {self.checkout}; export PATH={path} INSTANCE="{instance}"\n{text}'
        )

    def write_env(self, place: str, text: str) -> None:
        if place.endswith("on your machine"):
            (self.checkout / ".env").write_text(self.settings(text, "laptop"))
        else:
            env = self.settings(text, "instance")
            self.instance.sh(f"cat > /opt/kafka-s3/.env <<'END'\n{env}\nEND")

    def settings(self, text: str, where: str) -> str:
        """A .env made from the example by the README's words; S3 is here what Amazon is there."""
        s3 = self.s3[where]
        assert s3
        lines = (self.checkout / ".env.example").read_text().splitlines()
        for line in text.splitlines():
            name = line.partition("=")[0] + "="
            assert any(old.startswith(name) for old in lines)
            lines = [line if old.startswith(name) else old for old in lines]
        result = "\n".join(line for line in lines if not line.startswith("AWS_"))
        assert "S3_ENDPOINT_URL=\n" in result
        result = result.replace("S3_ENDPOINT_URL=\n", f"S3_ENDPOINT_URL={s3.endpoint}\n")
        keys = f"\nAWS_ACCESS_KEY_ID={s3.access_key}\nAWS_SECRET_ACCESS_KEY={s3.secret_key}\n"
        return f"{result}{keys}AWS_DEFAULT_REGION={s3.region}\n"


@pytest.fixture(scope="module")
def reader(
    network: Network, checkout: Path, laptop_s3: S3, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Reader]:
    """The reader with a bare instance: no Java, no Kafka."""
    instance = network.instance(PRIVATE, PUBLIC, java=False)
    there = S3(tmp_path_factory.mktemp("instance-s3"))
    with instance.here():
        there.start()
        there.create_bucket("your-bucket")
    with network.laptop.here():
        laptop_s3.create_bucket("your-bucket")
    yield Reader(network, checkout, instance, laptop_s3, there)
    there.stop()


@pytest.fixture(scope="module")
def broker(reader: Reader) -> Instance:
    """The instance after the README's first section."""
    reader.said = reader.follow("One broker")
    return reader.instance


# --- One broker ---


def test_bare_machine_refuses_what_needs_kafka_and_is_left_as_it_was(reader: Reader) -> None:
    reader.on_laptop("scp -r infra ec2-user@203.0.113.10:")
    instance = reader.instance
    said = instance.log_in(f"sudo {SETUP} --check", check=False)
    assert instance.code == 1 and "Kafka is not installed" in said
    assert "removed" in instance.log_in(f"sudo {SETUP} --uninstall")
    said = instance.log_in(f"sudo {SETUP} --public-address no.such.name", check=False)
    assert instance.code == 1 and "'no.such.name' cannot be resolved" in said
    assert not instance.sh("find /etc /opt /usr/local /var/lib -name '*kafka*'")


def test_following_the_readme_gives_a_broker_for_the_pair_on_the_laptop(
    reader: Reader, broker: Instance
) -> None:
    said = reader.said
    assert said.count("[Sent]") == 5 and said.count("Upload Successfully") == 5
    assert "FAIL" not in said and f"KAFKA_BOOTSTRAP_SERVERS={PUBLIC}:9092" in said
    # what this proves: the user's umask is a strict one, and sudo keeps it
    assert broker.log_in("umask; sudo sh -c umask").split() == ["0077", "0077"]
    # it cannot reach its own public address, says so, and puts nothing on the loopback
    assert f"not tried: {PUBLIC}:9092" in said and "203.0.113" not in broker.sh(
        "ip address show lo"
    )
    printed = said.partition("installing: ")[2].partition("WARNING: port 9092")[0]
    assert printed.count("\n") < 35, "what apt prints is not for the user"


def test_second_run_changes_nothing(broker: Instance) -> None:
    def state() -> list[str]:
        units = [broker.unit(unit, "InvocationID") for unit in ("kafka", "zookeeper")]
        return [files(broker), *units]

    before = state()
    tool = f"/opt/kafka/bin/kafka-topics.sh --bootstrap-server {PRIVATE}:9093"
    broker.log_in(f"{tool} --create --topic setup-check-0-7")  # a run that was killed
    output = broker.log_in(f"sudo {SETUP}")
    assert "setup-check" not in broker.log_in(f"{tool} --list")
    assert "wrote" not in output and "starting" not in output and "a message went" in output
    assert before == state()
    assert broker.sh("ls -A /opt | grep kafka").split() == ["kafka", NAME]


def test_addresses_and_downloads_that_are_wrong_change_nothing(
    broker: Instance, network: Network
) -> None:
    before = files(broker)
    said = broker.log_in(f"sudo {SETUP} --public-address no.such.name", check=False)
    assert broker.code == 1 and "'no.such.name' cannot be resolved" in said
    said = broker.log_in(f"sudo {SETUP} --private-address 10.0.0.99", check=False)
    assert broker.code == 1 and "'10.0.0.99' is not this machine's" in said
    assert files(broker) == before
    assert "FAIL" not in broker.log_in(f"sudo {SETUP} --check")


def test_units_are_correct_and_have_few_rights(broker: Instance) -> None:
    # the checkout that kafka-s3@ runs from
    broker.sh(
        "mkdir -p /opt/kafka-s3/.venv/bin; ln -sf /bin/true /opt/kafka-s3/.venv/bin/python;"
        f"cp /home/{USER}/infra/kafka-s3@.service /etc/systemd/system"
    )
    units = ["kafka", "zookeeper", "kafka-s3@consumer", "kafka-s3@producer"]
    paths = " ".join(f"/etc/systemd/system/{unit}.service" for unit in units)
    said = broker.sh(f"systemd-analyze verify --man=no --recursive-errors=no {paths}", check=False)
    assert broker.code == 0 and not said
    for unit in units:
        said = broker.sh(f"systemd-analyze security --no-pager {unit}.service")
        exposure = re.findall(r"Overall exposure level for .*: ([\d.]+)", said)
        assert float(exposure[0]) <= 3.0, said
    broker.sh("rm -r /opt/kafka-s3 /etc/systemd/system/kafka-s3@.service; systemctl daemon-reload")


def test_journal_has_one_line_a_message_with_priority_and_name(broker: Instance) -> None:
    for unit in ("kafka", "zookeeper"):
        entries = journal(broker, f"--unit={unit}")
        assert {entry["SYSLOG_IDENTIFIER"] for entry in entries} == {unit}
        logged = [entry for entry in entries if not entry["MESSAGE"].startswith("wrote ")]
        levels = {"INFO": "6", "WARN": "4", "ERROR": "3"}
        for entry in logged:
            assert entry["PRIORITY"] == levels[entry["MESSAGE"].split()[0]], entry
        assert len(logged) > 20
    assert journal(broker, "--unit=zookeeper", "--priority=warning")
    said = broker.log_in("sudo systemctl status --full kafka zookeeper")
    assert max(map(len, re.findall("─.*java.*", said))) < 500


def test_check_says_what_is_wrong_and_what_to_do(broker: Instance) -> None:
    # newer greps warn of egrep, which Kafka's scripts call
    noisy = r"#!/bin/sh\necho egrep: warning >&2\nexec grep -E \"\$@\"\n"
    broker.sh(f'printf "{noisy}" > /usr/local/bin/egrep; chmod +x /usr/local/bin/egrep')
    broker.sh("systemctl disable zookeeper")
    check = f"sudo {SETUP} --check"
    output = broker.log_in(f"{check} --public-address 203.0.113.99", check=False)
    assert broker.code == 1 and len(re.findall("^ok ", output, re.M)) == 11
    assert re.findall("FAIL.*", output) == [
        "FAIL  zookeeper starts at boot: sudo systemctl enable zookeeper",
        f"FAIL  clients are sent to {PUBLIC}:9092: the public address is 203.0.113.99; "
        "run this script again without --check",
    ]
    broker.sh("systemctl enable zookeeper")
    broker.sh("systemctl stop kafka")
    output = broker.log_in(check, check=False)
    assert broker.code == 1
    assert re.findall("FAIL  ([^:]*)", output) == ["kafka runs", "127.0.0.1", PRIVATE]
    broker.log_in("sudo systemctl start kafka")
    assert "FAIL" not in broker.log_in(check)


def test_check_says_once_that_a_hanging_broker_does_not_answer(broker: Instance) -> None:
    broker.sh(f"kill -STOP {broker.unit('kafka', 'MainPID')}")
    try:
        output = broker.log_in(f"sudo {SETUP} --check", check=False, timeout=40)
        assert broker.code == 1
    finally:
        broker.sh(f"kill -CONT {broker.unit('kafka', 'MainPID')}")
    assert re.findall("FAIL  ([^:]*)", output) == ["the broker answers"]
    assert "topics" not in output and "copies" not in output


def test_port_of_another_program_and_data_of_another_user_are_named(broker: Instance) -> None:
    broker.sh("systemctl stop kafka zookeeper; chown -R root /var/lib/kafka/test-0")
    listen = "$s = IO::Socket::INET->new(LocalPort => 2181, Listen => 1, ReuseAddr => 1)"
    other = f"use IO::Socket; {listen}; sleep 600"
    broker.sh(f"systemd-run --quiet --unit=other perl -e '{other}'; sleep 1")
    check = broker.log_in(f"sudo {SETUP} --check", check=False)
    assert re.search(r"FAIL  zookeeper runs: port 2181 is taken by perl \(process \d+\)", check)
    assert "FAIL  the data is the broker's: /var/lib/kafka/test-0 is not" in check
    said = broker.log_in(f"sudo {SETUP}", check=False, timeout=40)
    assert broker.code == 1 and "port 2181 is taken by perl" in said
    broker.sh("systemctl stop other")
    broker.log_in(f"sudo {SETUP}")
    assert "FAIL" not in broker.log_in(f"sudo {SETUP} --check")


def test_restart_with_zookeeper_stopped_starts_once(broker: Instance) -> None:
    broker.log_in("sudo systemctl stop kafka zookeeper; sudo systemctl restart kafka")
    assert broker.unit("kafka", "NRestarts") == "0"
    # started is: the topics are known
    tool = f"/opt/kafka/bin/kafka-topics.sh --bootstrap-server {PRIVATE}:9093 --list"
    assert {"test", "error_topic"} <= set(broker.log_in(tool).split())


def test_start_ends_as_soon_as_the_broker_has_died(broker: Instance) -> None:
    change = (
        "systemctl stop kafka; sed -i s/broker.id={}/broker.id={}/ /var/lib/kafka/meta.properties"
    )
    broker.sh(change.format(0, 7))
    broker.sh("timeout 100 systemctl start kafka", check=False)
    assert broker.code == 1
    (fatal,) = [
        entry
        for entry in journal(broker, "--unit=kafka", "--priority=err")
        if "InconsistentBrokerIdException" in entry["MESSAGE"] and "Exiting" in entry["MESSAGE"]
    ][:1]
    assert "meta.properties" in fatal["MESSAGE"]  # the exception is in the same line
    said = broker.log_in(f"sudo {SETUP}", check=False)
    assert broker.code == 1 and "belongs to broker 7" in said
    broker.sh(change.format(7, 0) + "; systemctl start kafka")


def test_nothing_but_the_three_ports_listens_and_only_9092_is_reached_from_outside(
    broker: Instance, network: Network
) -> None:
    listening = broker.sh("ss -Hltn | awk '{print $4}'").replace("[::ffff:", "").replace("]", "")
    ports = [address for address in listening.split() if "7070" not in address]
    assert {"*:9092", f"{PRIVATE}:9093", "127.0.0.1:2181"} <= set(ports)
    assert all(address.startswith("127.") for address in set(ports) - {"*:9092", f"{PRIVATE}:9093"})
    for port in (9093, 2181):
        network.laptop.sh(f"timeout 2 bash -c '</dev/tcp/{PUBLIC}/{port}'", check=False)
        assert network.laptop.code


def test_killed_broker_comes_back_by_its_unit_and_nothing_is_lost(
    broker: Instance, pair: Pair
) -> None:
    consumer = pair.consumer()
    producer = pair.producer("--max-messages", "1800")
    consumer.wait_for("Upload Successfully")
    broker.sh(f"kill -9 {broker.unit('kafka', 'MainPID')}")
    until(lambda: broker.unit("kafka", "NRestarts") != "0", 60)
    assert producer.wait(300) == 0, producer.stderr
    assert len(re.findall(r"\[Sent\]", producer.stdout)) == 1800
    pair.check_all_arrived(producer.stdout)
    consumer.terminate()
    assert consumer.wait(10) == 0


def test_memory_after_200_000_records(broker: Instance, pair: Pair) -> None:
    row = (ROOT / "tests" / "data" / "indexProcessed.csv").read_bytes().splitlines()[1]
    value = json.dumps({"row": row.decode()}).encode()
    broker.sh(
        f"/opt/kafka/bin/kafka-topics.sh --bootstrap-server {PRIVATE}:9093 --create --topic load"
    )
    produce(pair.bootstrap, "load", [value] * 200_000)
    memory = {unit: resident_mb(broker, unit) for unit in ("kafka", "zookeeper")}
    print(memory)
    assert memory["kafka"] < 400 and memory["zookeeper"] < 150


# --- The pair as services ---


@pytest.fixture(scope="module")
def services(reader: Reader, broker: Instance) -> Instance:
    """The instance with the pair as services beside the broker."""
    reader.follow("The pair as services")
    return broker


def uploads(instance: Instance) -> int:
    """How many objects the service says it has made since the boot."""
    return instance.sh("journalctl -b -u kafka-s3@consumer").count("Upload Successfully")


def uploads_go_on(instance: Instance, timeout: float = 90) -> None:
    before = uploads(instance)
    until(lambda: uploads(instance) > before + 1, timeout, "uploads by the service")


def test_pair_runs_as_services_and_comes_back_after_kill_9(services: Instance) -> None:
    uploads_go_on(services)
    names = {entry["SYSLOG_IDENTIFIER"] for entry in journal(services, "--unit='kafka-s3@*'")}
    assert names == {"kafka_consumer.py", "kafka_producer.py"}
    services.sh(f"kill -9 {services.unit('kafka-s3@consumer', 'MainPID')}")
    uploads_go_on(services)
    assert "Traceback" not in services.sh("journalctl -u 'kafka-s3@*'")


def test_stopped_and_started_with_another_public_address_all_works_at_the_first_start(
    services: Instance, network: Network, pair: Pair
) -> None:
    before = [record.value for record in records(pair.bootstrap, "test")]
    services.shut_down()
    network.give(PRIVATE, NEW_PUBLIC)
    services.power_on()
    uploads_go_on(services)
    units = ("zookeeper", "kafka", "kafka-s3@consumer", "kafka-s3@producer")
    assert [services.unit(unit, "NRestarts") for unit in units] == ["0"] * 4
    assert "FAIL" not in services.log_in(f"sudo {SETUP} --check")
    pair.env["KAFKA_BOOTSTRAP_SERVERS"] = f"{NEW_PUBLIC}:9092"
    after = [record.value for record in records(pair.bootstrap, "test")]
    assert after[: len(before)] == before and len(after) > len(before)
    # the same while it runs: an Elastic IP was attached
    network.give(PRIVATE, PUBLIC)
    output = services.log_in(f"sudo {SETUP}")
    assert "wrote /etc/kafka/server.properties" in output and "starting kafka" in output
    pair.env["KAFKA_BOOTSTRAP_SERVERS"] = f"{PUBLIC}:9092"
    assert pair.producer("--max-messages", "1").wait() == 0
    uploads_go_on(services)


def test_readme_shows_lag_and_replays(reader: Reader, services: Instance) -> None:
    log = "journalctl -u kafka-s3@consumer | grep -c stock_market_0.json || true"
    services.sh("systemctl stop kafka-s3@consumer kafka-s3@producer")
    assert services.sh(log).strip() == "0"
    said = reader.follow("Lag, offsets, replay")
    assert re.search(r"python-consumer-group +test +0 +\d+ +\d+ +\d+", said), said
    services.sh("systemctl start kafka-s3@consumer")
    until(lambda: services.sh(log).strip() != "0", 90, "the replay")
    services.sh("systemctl stop kafka-s3@consumer")
    services.sh("systemctl disable kafka-s3@consumer kafka-s3@producer")


# --- TLS and passwords ---


@pytest.fixture(scope="module")
def secured(reader: Reader, broker: Instance) -> dict[str, str]:
    """What the set-up with --secure prints for .env."""
    reader.said = reader.follow("TLS and passwords")
    assert "WARNING: port 9092" not in reader.said
    lines = dict(re.findall(r"^(KAFKA_\w+)=(.+)$", reader.said, re.MULTILINE))
    authority = reader.checkout / lines["KAFKA_SSL_CAFILE"]
    assert authority.read_text() == broker.sh("cat /etc/kafka/ca.pem")
    with (reader.checkout / ".env").open("a") as env:
        env.writelines(f"{name}={value}\n" for name, value in lines.items())
    return {**lines, "KAFKA_SSL_CAFILE": str(authority)}


def test_secured_broker_serves_those_with_the_password(
    reader: Reader, secured: dict[str, str], broker: Instance, pair: Pair
) -> None:
    for script in ("kafka_producer.py --max-messages 5", "kafka_consumer.py --max-messages 5"):
        reader.on_laptop(f".venv/bin/python {script}")
    # keys are for root, and what the broker needs for the broker; a second run keeps them
    modes = broker.sh("stat -c '%a %U:%G %n' /etc/kafka/secure/*")
    assert "600 root:root /etc/kafka/secure/ca.key" in modes
    assert "600 root:root /etc/kafka/secure/password" in modes
    assert "640 root:kafka /etc/kafka/secure/broker.pem" in modes
    before = files(broker)
    output = broker.log_in(f"sudo {SETUP}")
    assert secured["KAFKA_SASL_PASSWORD"] in output and files(broker) == before
    assert secured["KAFKA_SASL_PASSWORD"] not in broker.sh("journalctl -u kafka -u zookeeper")
    # a broken authority is named, and not published; what the broker cannot read is repaired
    broker.sh("cd /etc/kafka/secure; cp -p ca.pem kept; echo junk > ca.pem; chmod 0 broker.pem")
    said = broker.log_in(f"sudo {SETUP} --check", check=False)
    assert re.findall("FAIL  ([^:]*)", said) == [
        "the authority can sign",
        "the broker can read its certificate",
    ]
    said = broker.log_in(f"sudo {SETUP}", check=False)
    assert broker.code == 1 and "ca.pem is no certificate" in said
    assert broker.sh("cat /etc/kafka/ca.pem") == Path(secured["KAFKA_SSL_CAFILE"]).read_text()
    broker.sh("mv /etc/kafka/secure/kept /etc/kafka/secure/ca.pem")
    broker.log_in(f"sudo {SETUP}")
    assert "FAIL" not in broker.log_in(f"sudo {SETUP} --check")
    key = broker.sh("openssl pkey -in /etc/kafka/secure/broker.pem").splitlines()[1]
    assert not broker.sh(f"grep -rl {key} /opt /tmp /var /root /home || true")
    # uninstalled and installed again, from a file, it still knows its data and its password
    broker.log_in(f"sudo {SETUP} --uninstall")
    left = "-path /opt/kafka-s3 -prune -o -name '*kafka*' ! -name 'kafka-s3*' -print"
    assert not broker.sh(f"find /opt /etc/systemd /usr/local/lib {left}")
    broker.log_in(f"curl -fsSO {APACHE}; curl -fsSO {APACHE}.sha512")
    # without --secure: it must not come back open to all
    said = broker.log_in(f"sudo {SETUP} --url {NAME}.tgz")
    assert "https:" not in said
    pair.env |= secured
    assert pair.producer("--max-messages", "5").wait() == 0
    reader.on_laptop(".venv/bin/python kafka_consumer.py --max-messages 5")


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
    secured: dict[str, str], pair: Pair, script: str, change: dict[str, str]
) -> None:
    pair.env |= {**secured, **change}
    if change.get("KAFKA_SECURITY_PROTOCOL") == "PLAINTEXT":
        for name in ("MECHANISM", "USERNAME", "PASSWORD"):
            pair.env[f"KAFKA_SASL_{name}"] = ""
        pair.env["KAFKA_SSL_CAFILE"] = ""
    refused = pair.start(script, "--max-messages", "1", env=pair.env)
    assert refused.wait(20) == 1
    errors = [line for line in refused.lines("stderr") if "ERROR" in line]
    assert len(errors) == 1 and f"{PUBLIC}:9092" in errors[0], refused.stderr
    assert "Traceback" not in refused.stderr
    assert secured["KAFKA_SASL_PASSWORD"] not in refused.stderr


# --- When it does not work; the end ---


def test_commands_of_the_readmes_table_can_be_used_by_who_logs_in(
    broker: Instance, secured: dict[str, str]
) -> None:
    text = (ROOT / "infra" / "README.md").read_text().partition("## When it does not work")[2]
    table = text[text.index("\n|") :]
    commands = re.findall(r"`((?:sudo|/opt/kafka)[^`]*)`", table)
    # no swap on the machine that runs the tests
    commands = [line for line in commands if "swap" not in line and "uninstall" not in line]
    commands = [line for line in commands if "NAME_OR_IP" not in line and line != f"sudo {SETUP}"]
    assert len(commands) > 6
    for command in commands:
        said = broker.log_in(command, check=False)
        assert not re.search("denied|not found|No such file|unrecognized", said), (
            f"{command}: {said}"
        )


def test_purged_machine_has_nothing_left(broker: Instance, secured: dict[str, str]) -> None:
    broker.sh("mkdir /opt/.kafka-setup-of-a-run-that-was-killed")
    broker.log_in(f"sudo {SETUP} --uninstall --purge")
    left = broker.sh("ls -d /etc/kafka /opt/.kafka* /opt/kafka* /var/lib/{kafka,zookeeper} || true")
    assert [line for line in left.splitlines() if "cannot access" not in line] == ["/opt/kafka-s3"]
    assert not broker.sh("getent passwd kafka || true")
    assert "still" not in broker.log_in(f"sudo {SETUP} --uninstall")
    broker.power_off()


# --- User data ---


def test_launched_with_user_data_it_is_the_same_broker(
    network: Network, reader: Reader, broker: Instance, pair: Pair
) -> None:
    instance = network.instance("10.0.0.20", "203.0.113.20")
    script = (reader.checkout / "user-data.sh").read_text()
    assert len(script) <= 16384, "EC2 takes no more"
    # a mirror with a broken file first: nothing is installed
    instance.sh(f"cat > /root/user-data <<'END OF USER DATA'\n{script}\nEND OF USER DATA")
    log = "/var/log/kafka-setup.log"
    broken = "s|setup_kafka.sh$|& --url https://archive.apache.org/broken.tgz|"
    (network.archive / "broken.tgz").write_bytes(b"not what Apache published")
    shutil.copy(network.releases / f"{NAME}.tgz.sha512", network.archive / "broken.tgz.sha512")
    instance.sh(
        f"sed '{broken}' /root/user-data > /root/broken; cd /; env -u HOME bash /root/broken",
        check=False,
    )
    assert instance.code == 1 and "wrong checksum" in instance.sh(f"cat {log}")
    assert not instance.sh("ls -A /opt | grep kafka || true")
    # cloud-init runs it from a folder of its own, with next to no environment
    instance.sh(f"cd /; env -u HOME bash /root/user-data || {{ cat {log}; false; }}")
    assert instance.sh(f"stat -c '%a %U' {log}").strip() == "600 root"
    assert "KAFKA_BOOTSTRAP_SERVERS=203.0.113.20:9092" in instance.sh(f"cat {log}")
    pair.env["KAFKA_BOOTSTRAP_SERVERS"] = "203.0.113.20:9092"
    assert pair.producer("--max-messages", "5").wait() == 0
    assert pair.consumer("--max-messages", "5").wait() == 0
    pair.audit()
    instance.power_off()


# --- Three brokers ---


def test_three_brokers_lose_nothing_when_the_machine_of_the_leader_dies(
    network: Network, checkout: Path, pair: Pair, laptop_s3: S3
) -> None:
    lines = {int(place[-1]): line for place, line in readme("Three brokers")}
    brokers = {n: network.instance(f"10.0.0.1{n}", f"203.0.113.1{n}") for n in lines}
    readers = {n: Reader(network, checkout, brokers[n], laptop_s3, None) for n in lines}

    def setup(n: int) -> str:
        readers[n].on_laptop(f"scp -r infra ec2-user@203.0.113.1{n}:")
        return brokers[n].log_in(lines[n])

    with ThreadPoolExecutor() as pool:
        outputs = list(pool.map(setup, brokers))
    addresses = ",".join(f"203.0.113.1{n}:9092" for n in brokers)
    assert all(f"KAFKA_BOOTSTRAP_SERVERS={addresses}\n" in output for output in outputs)
    pair.env["KAFKA_BOOTSTRAP_SERVERS"] = addresses

    def topic(n: int, name: str) -> str:
        tool = f"/opt/kafka/bin/kafka-topics.sh --bootstrap-server 10.0.0.1{n}:9093"
        return brokers[n].log_in(f"{tool} --describe --topic {name}")

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
    until(lambda: topic(other, "test").rstrip()[-5:].count(",") == 2, 180, "all copies in sync")
    until(lambda: brokers[leader].unit("kafka", "ActiveState") == "active", 60)
    assert "FAIL" not in brokers[leader].log_in(f"sudo {SETUP} --check")
    consumer.terminate()
    assert consumer.wait(10) == 0
    for instance in brokers.values():
        instance.power_off()
