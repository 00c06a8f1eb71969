#!/usr/bin/env python3
"""Kafka and S3 on this machine, for trying the pair out and for its tests.

Run in the foreground it gives the addresses that .env.example names: Apache Kafka 3.3.1 with
ZooKeeper where Java is found, else the small broker inside the confluent-kafka wheel; versitygw
where it is found, else moto's server. Ctrl-C stops both and removes their data, or leaves it in
the folder of --keep for the next time.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":  # Ctrl-C while the packages below are loading ends it without a word
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from config import HERE as ROOT  # before the packages: it says in one line which is missing

# isort: split
import argparse
import contextlib
import fcntl
import functools
import importlib.util
import json
import logging
import os
import random
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import NoReturn, TypeVar

import botocore.config
import botocore.session
from botocore.exceptions import BotoCoreError, ClientError
from dotenv import dotenv_values
from embedded_kafka import EmbeddedKafka  # type: ignore[import-not-found]  # beside this file
from kafka.admin import KafkaAdminClient, NewTopic
from kafka.errors import KafkaError, TopicAlreadyExistsError

LOCAL = ROOT / ".local"  # what is fetched or built; ignored by git
EXAMPLE = dotenv_values(ROOT / ".env.example", interpolate=False)
API_VERSION = (2, 8, 1)
T = TypeVar("T")

# Linux: the kernel kills the child when the thread that started it dies, however it dies. Set by
# the child itself, since code between fork and exec is unsafe in a process with threads.
_DIE_WITH_PARENT = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execv(sys.argv[1], sys.argv[1:])"
)

_LOG4J = """\
log4j.rootLogger=WARN, stdout
log4j.logger.kafka.server.KafkaServer=INFO
log4j.appender.stdout=org.apache.log4j.ConsoleAppender
log4j.appender.stdout.layout=org.apache.log4j.PatternLayout
log4j.appender.stdout.layout.ConversionPattern=%d %p %m (%c)%n
"""


class StackError(Exception):
    """A part of the stack that cannot be had or does not start; the message is for the user."""


def free_port() -> int:
    """A free port on the loopback, below the range from which Linux takes the ports of outgoing
    connections: while a server is stopped, a client that retries cannot take its port."""
    while True:
        port = random.randrange(15000, 32000)
        if port_is_free(port):
            return port


def port_is_free(port: int) -> bool:
    """Whether a server could listen on 127.0.0.1:port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def spawn(command: list[str], log: Path, env: Mapping[str, str] | None = None) -> subprocess.Popen:
    """Start `command`, output to `log`, in a session of its own: Ctrl-C there is for us alone."""
    if sys.platform == "linux":
        executable = shutil.which(command[0]) or command[0]
        command = [sys.executable, "-ISc", _DIE_WITH_PARENT, executable, *command[1:]]
    with log.open("ab") as out:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env=env,
            start_new_session=True,
        )


def end(process: subprocess.Popen | None, timeout: float = 20) -> None:
    """Ask the process to stop; kill it after `timeout` seconds."""
    if process is None or process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def tail(log: Path, lines: int = 20) -> str:
    """The last lines of a log; nothing where there is none."""
    if not log.exists():
        return ""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def _wait_listening(process: subprocess.Popen, port: int, log: Path, timeout: float = 60) -> None:
    """Return once 127.0.0.1:port takes connections; StackError when process or time ends."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                end(process)
                raise StackError(f"{log.stem} did not start; its log ends:\n{tail(log)}") from None
            time.sleep(0.02)


@functools.cache
def java() -> str:
    """The Java to use; StackError where none runs (macOS has a `java` that only says so)."""
    home = os.environ.get("JAVA_HOME")
    path = shutil.which(f"{home}/bin/java" if home else "java")
    if path is None or subprocess.run([path, "-version"], capture_output=True).returncode != 0:
        raise StackError("Java was not found")
    return path


def kafka_home() -> Path:
    """A folder with Kafka's jars in libs/: KAFKA_HOME, or .local/kafka, filled by Maven once."""
    java()
    if os.environ.get("KAFKA_HOME"):
        home = Path(os.environ["KAFKA_HOME"])
        if not list(home.glob("libs/kafka_*.jar")):
            raise StackError(f"KAFKA_HOME={home} has no libs/kafka_*.jar")
        return home
    home = LOCAL / "kafka"
    if not (home / "libs").exists():
        maven = shutil.which("mvn")
        if maven is None:
            raise StackError("Maven (mvn) was not found, and KAFKA_HOME is not set")
        home.mkdir(parents=True, exist_ok=True)
        print("Fetching Apache Kafka 3.3.1 by Maven (37 MB, once) ...", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(dir=home) as part:
            pom = str(ROOT / "infra" / "kafka-pom.xml")
            command = [maven, "-q", "-B", "-f", pom, "dependency:copy-dependencies"]
            done = subprocess.run(
                [*command, f"-DoutputDirectory={part}/libs"],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode != 0:
                why = (done.stdout.strip() or "it said nothing").splitlines()[0][:200]
                raise StackError(f"Maven could not fetch Apache Kafka: {why}")
            if not (home / "libs").exists():  # another run may have been quicker
                Path(part, "libs").rename(home / "libs")
    return home


def kafka_jars() -> str:
    """The class path of Kafka's programs."""
    return f"{kafka_home()}/libs/*"


def start_jvm(
    main_class: str, properties: Mapping[str, str], log: Path, *flags: str
) -> subprocess.Popen:
    """Start a server of Kafka's jars with `properties` as its file, which stands beside its log.

    Java's properties are Latin-1 with escapes, of which JSON's are a part."""
    log.parent.mkdir(parents=True, exist_ok=True)
    log4j = log.with_name("log4j.properties")
    log4j.write_text(_LOG4J)
    config = log.with_suffix(".properties")
    lines = [f"{key}={json.dumps(value)[1:-1]}\n" for key, value in properties.items()]
    config.write_text("".join(lines))
    command = [java(), *flags, f"-Dlog4j.configuration={log4j.as_uri()}", "-cp", kafka_jars()]
    # In a locale without them Java finds no path that has other letters than ASCII.
    env = {**os.environ, "LC_ALL": "C.UTF-8"}
    return spawn([*command, main_class, str(config)], log, env)


class ZooKeeper:
    """ZooKeeper as a child process on the loopback; its data and log are under `folder`."""

    def __init__(self, folder: Path, port: int = 0):
        self.folder = Path(folder)
        self.port = port or free_port()
        self.log = self.folder / "zookeeper.log"
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        """Start it; return when it listens."""
        properties = {
            "dataDir": str(self.folder / "zookeeper"),
            "clientPort": str(self.port),
            "clientPortAddress": "127.0.0.1",
            "admin.enableServer": "false",
            "4lw.commands.whitelist": "dump",
            "maxClientCnxns": "0",
        }
        main_class = "org.apache.zookeeper.server.quorum.QuorumPeerMain"
        self.process = start_jvm(main_class, properties, self.log, "-Xmx128M")
        _wait_listening(self.process, self.port, self.log)

    def stop(self) -> None:
        """SIGTERM; return when it has ended."""
        end(self.process)

    def knows(self, broker_id: str) -> bool:
        """Whether that broker is still registered, or there is no answer yet: a ZooKeeper that has
        just begun to listen drops the first question."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), 1) as connection:
                connection.sendall(b"dump")
                answer = connection.makefile("r").read()
        except OSError:
            return True
        return not answer or f"/brokers/ids/{broker_id}\n" in answer


class Kafka:
    """Apache Kafka 3.3.1 and its ZooKeeper on the loopback; data and logs are under `folder`.

    The listener CLIENT is for the scripts, at `port`; INTERNAL is always plaintext, for the broker
    itself and for the methods here.
    """

    def __init__(self, folder: Path, port: int = 0):
        self.folder = Path(folder)
        self.port = port or free_port()
        self.internal_port = free_port()
        self.bootstrap = f"127.0.0.1:{self.port}"
        self.internal = f"127.0.0.1:{self.internal_port}"
        self.log = self.folder / "broker.log"
        self.zookeeper = ZooKeeper(folder)
        self.broker: subprocess.Popen | None = None
        kafka_jars()  # what is missing is said before anything is started
        self.properties = {
            "broker.id": "0",
            "listeners": f"CLIENT://{self.bootstrap},INTERNAL://{self.internal}",
            "listener.security.protocol.map": "CLIENT:PLAINTEXT,INTERNAL:PLAINTEXT",
            "inter.broker.listener.name": "INTERNAL",
            "zookeeper.connect": f"127.0.0.1:{self.zookeeper.port}",
            "zookeeper.session.timeout.ms": "6000",
            "log.dirs": str(self.folder / "kafka"),
            "auto.create.topics.enable": "false",
            "offsets.topic.replication.factor": "1",
            "offsets.topic.num.partitions": "1",
            "transaction.state.log.replication.factor": "1",
            "transaction.state.log.min.isr": "1",
            "group.initial.rebalance.delay.ms": "0",
            # With --keep a topic and its groups' positions outlast a holiday.
            "log.retention.ms": "-1",
            "offsets.retention.minutes": "5256000",
            # The default, 128 MB, is half of the heap.
            "log.cleaner.dedupe.buffer.size": "16777216",
        }

    def start(self) -> Kafka:
        """Start ZooKeeper and the broker; return when the broker answers. All or nothing."""
        try:
            self.zookeeper.start()
            self.start_broker()
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Stop the broker, then ZooKeeper."""
        self.stop_broker()
        self.zookeeper.stop()

    def start_broker(self, timeout: float = 60) -> None:
        """Start the broker; return when it answers. ZooKeeper refuses a new one until the session
        of one that was killed is over: that takes up to 6 s, and is waited for here."""
        deadline = time.monotonic() + timeout
        while self.zookeeper.knows(self.properties["broker.id"]) and time.monotonic() < deadline:
            time.sleep(0.1)
        self.broker = start_jvm("kafka.Kafka", self.properties, self.log, "-Xmx256M", "-Xms128M")
        _wait_listening(self.broker, self.internal_port, self.log, timeout)
        while True:  # the port opens before requests are served, and those before a controller is
            try:
                return self.admin(lambda admin: admin.list_topics())
            except (KafkaError, AssertionError) as error:  # the client's own, on a slow machine
                if self.broker.poll() is not None or time.monotonic() > deadline:
                    end(self.broker)
                    raise StackError(f"{error}; the broker's log ends:\n{tail(self.log)}") from None
                time.sleep(0.05)

    def stop_broker(self) -> None:
        """SIGTERM to the broker; return when it has ended."""
        end(self.broker)

    def create_topic(
        self,
        name: str,
        partitions: int = 1,
        config: Mapping[str, str] | None = None,
        replicas: int = 1,
    ) -> None:
        """Create a topic; return when it can be used. TopicAlreadyExistsError where it is there.
        A broker that has just started may not have its controller yet: that is waited for."""
        topic = NewTopic(name, partitions, replicas, topic_configs=dict(config or {}))
        deadline, failed = time.monotonic() + 20, False
        while True:
            try:
                return self.admin(lambda admin: admin.create_topics([topic], timeout_ms=20000))
            except KafkaError as error:
                exists = isinstance(error, TopicAlreadyExistsError)
                if exists and failed:
                    return  # by the attempt that got no answer
                if time.monotonic() > deadline:
                    raise
                failed = failed or not exists
                time.sleep(0.2)

    def admin(self, ask: Callable[[KafkaAdminClient], T]) -> T:
        """The answer to one question to the broker."""
        admin = KafkaAdminClient(bootstrap_servers=self.internal, api_version=API_VERSION)
        try:
            return ask(admin)
        finally:
            admin.close()


def versitygw() -> str | None:
    """The versitygw program: VERSITYGW, .local/bin (where tests/run.sh builds it), or the PATH."""
    built = LOCAL / "bin" / "versitygw"
    return os.environ.get("VERSITYGW") or (
        str(built) if built.exists() else shutil.which("versitygw")
    )


class S3:
    """An S3 server on the loopback: versitygw, data in `folder`, or moto's server, in memory."""

    access_key = EXAMPLE["AWS_ACCESS_KEY_ID"] or ""
    secret_key = EXAMPLE["AWS_SECRET_ACCESS_KEY"] or ""
    region = EXAMPLE["AWS_DEFAULT_REGION"] or ""

    def __init__(self, folder: Path, port: int = 0):
        self.folder = Path(folder)
        self.port = port or free_port()
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.log = self.folder / "s3.log"
        self.process: subprocess.Popen | None = None
        self.kind = "versitygw" if versitygw() else "moto"

    def start(self) -> S3:
        """Start the server; return when it listens."""
        program, data = versitygw(), self.folder / "s3"
        data.mkdir(parents=True, exist_ok=True)
        if program and shutil.which(program) is None:
            raise StackError(f"VERSITYGW={program}: there is no such program")
        if program:
            command = [
                program,
                "--port",
                f"127.0.0.1:{self.port}",
                "--region",
                self.region,
                "posix",
                str(data),
            ]
        elif importlib.util.find_spec("moto") is None:
            raise StackError("no S3 server: pip install '.[local]' (moto), or install versitygw")
        else:
            command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        keys = {"ROOT_ACCESS_KEY": self.access_key, "ROOT_SECRET_KEY": self.secret_key}
        # moto fails over a profile of the user's that it cannot find.
        env = {name: text for name, text in os.environ.items() if not name.startswith("AWS_")}
        self.process = spawn(command, self.log, {**env, **keys})
        _wait_listening(self.process, self.port, self.log)
        return self

    def client(self):
        """A botocore client for this server; the user's AWS profile and files do not matter."""
        values = {"profile": None, "config_file": os.devnull, "credentials_file": os.devnull}
        ignored = {name: (None, None, value, None) for name, value in values.items()}
        return botocore.session.Session(session_vars=ignored).create_client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=self.region,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            config=botocore.config.Config(s3={"addressing_style": "path"}),
        )

    def create_bucket(self, name: str) -> None:
        """Create a bucket."""
        self.client().create_bucket(Bucket=name)

    def stop(self) -> None:
        """Stop the server; the data stays in `folder`."""
        end(self.process)


def port_number(text: str) -> int:
    """The value of --port and --s3-port."""
    if not re.fullmatch("[0-9]{1,5}", text) or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: 1 to 65535, or 0: a free one")
    return int(text) or free_port()


def topic_and_partitions(text: str) -> tuple[str, int]:
    """The value of --topic."""
    matched = re.fullmatch(r"([A-Za-z0-9._-]{1,249})(?::([1-9][0-9]{0,2}))?", text)
    if matched is None or matched[1] in (".", ".."):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not NAME:PARTITIONS, for example stocks:3 (letters, digits, '.', '_' "
            "and '-'; 1 to 999 partitions)"
        )
    return matched[1], int(matched[2] or 1)


def bucket_name(text: str) -> str:
    """The value of --bucket."""
    if re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", text) is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no name for a bucket: 3 to 63 lower-case letters, digits, '.' and '-'"
        )
    return text


def folder_name(text: str) -> Path:
    """The value of --keep."""
    if not text:  # an unset variable, perhaps: the data would fill the folder that one is in
        raise argparse.ArgumentTypeError("it names no folder")
    return Path(text)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    topics = f"{EXAMPLE['KAFKA_TOPIC']} and {EXAMPLE['KAFKA_DLQ_TOPIC']}"
    result = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        epilog="--topic and --bucket can be given several times. Kafka's own tools: infra/kafka.sh",
        allow_abbrev=False,
    )
    for flag, default, whose in (("--port", 9092, "Kafka's"), ("--s3-port", 9000, "S3's")):
        text = f"{whose} port on localhost; 0: a free one (default: %(default)s)"
        result.add_argument(flag, type=port_number, metavar="PORT", default=default, help=text)
    result.add_argument(
        "--topic",
        type=topic_and_partitions,
        metavar="NAME:PARTITIONS",
        action="append",
        default=[],
        help=f"a topic beside {topics}, or another number of partitions for one of them",
    )
    result.add_argument(
        "--bucket",
        type=bucket_name,
        metavar="NAME",
        action="append",
        default=[],
        help=f"a bucket beside {EXAMPLE['S3_BUCKET']}",
    )
    result.add_argument(
        "--keep",
        type=folder_name,
        metavar="DIR",
        help="keep topics, positions and objects in this folder, and go on with what is there "
        "(needs versitygw, which tests/run.sh builds where Go is)",
    )
    return result


def check_ports(port: int, s3_port: int) -> None:
    """StackError, with what to do, for each port that cannot be had."""
    if port == s3_port:
        raise StackError(f"--port and --s3-port are both {port}: each server needs its own")
    problems = [
        f"port {number} on localhost is in use: stop what listens there, or take another with "
        f"{flag} and name it in .env: {setting}{number + 1}"
        for flag, number, setting in (
            ("--port", port, "KAFKA_BOOTSTRAP_SERVERS=localhost:"),
            ("--s3-port", s3_port, "S3_ENDPOINT_URL=http://localhost:"),
        )
        if not port_is_free(number)
    ]
    if problems:
        raise StackError("\nlocal_stack: ".join(problems))


def data_folder(keep: Path | None, cleanup: ExitStack) -> Path:
    """Where the servers' data goes: the folder of --keep, ours until `cleanup`, or a temporary
    folder that `cleanup` removes."""
    folder = (keep or Path(tempfile.gettempdir())).expanduser().resolve()
    if "," in str(folder):
        raise StackError(
            f"{folder}: a comma separates folders for Kafka; take another (--keep, TMPDIR)"
        )
    if keep is None:
        return Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="kafka-s3-")))
    folder.mkdir(parents=True, exist_ok=True)
    lock = cleanup.enter_context((folder / "lock").open("w"))
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StackError(
            f"{folder} is in use by another local_stack.py: stop that one, or keep the data "
            "in another folder"
        ) from None
    return folder


def start_s3(folder: Path, port: int, keep: bool, cleanup: ExitStack) -> S3:
    """The S3 server, which `cleanup` stops."""
    s3 = S3(folder, port)
    if keep and s3.kind != "versitygw":
        raise StackError(
            "--keep needs versitygw, which keeps objects on disk: put it into .local/bin "
            "(tests/run.sh builds it where Go is installed), or run without --keep"
        )
    cleanup.callback(s3.stop)
    return s3.start()


def start_kafka(
    folder: Path, port: int, keep: bool, cleanup: ExitStack
) -> tuple[Kafka | EmbeddedKafka, str]:
    """The real broker, or else the embedded one, which `cleanup` stops; and what it is called."""
    try:
        kafka = Kafka(folder, port)
    except StackError as error:
        if keep:
            raise StackError(
                f"--keep needs Apache Kafka, which keeps topics on disk, and {error}: install a "
                "JDK and Maven, or run without --keep"
            ) from None
        print(f"No real broker here: {error}. The embedded one takes its place.", file=sys.stderr)
        try:
            embedded = EmbeddedKafka(port).start()
        except RuntimeError as error:
            raise StackError(str(error)) from None
        cleanup.callback(embedded.stop)
        return embedded, "the embedded broker of confluent-kafka, in memory"
    cleanup.callback(kafka.stop)
    return kafka.start(), "Apache Kafka 3.3.1 with ZooKeeper"


def create_buckets(s3: S3, names: Iterable[str]) -> list[str]:
    """Create the buckets that are not there; the names of all that are there then."""
    client = s3.client()
    there = {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}
    for name in set(names) - there:
        client.create_bucket(Bucket=name)
    return sorted(there.union(names))


def topics_there(kafka: Kafka | EmbeddedKafka) -> dict[str, int]:
    """The number of partitions of each topic that the broker has; of kept ones too."""
    if not isinstance(kafka, Kafka):
        return {}
    described = kafka.admin(lambda admin: admin.describe_topics())
    there = {topic["topic"]: len(topic["partitions"]) for topic in described}
    return {name: there[name] for name in sorted(there) if not name.startswith("__")}


def create_topics(kafka: Kafka | EmbeddedKafka, asked_for: Mapping[str, int]) -> Mapping[str, int]:
    """Create the topics of .env.example and those asked for, where they are not there; every topic
    that is there then, with its number of partitions."""
    there = topics_there(kafka)
    wanted = {EXAMPLE["KAFKA_TOPIC"] or "": 1, EXAMPLE["KAFKA_DLQ_TOPIC"] or "": 1, **asked_for}
    for name, partitions in wanted.items():
        if name not in there:
            kafka.create_topic(name, partitions)
    for name, partitions in asked_for.items():
        if there.get(name, partitions) != partitions:
            print(
                f"Topic {name} was kept: its partitions are {there[name]}, not {partitions}. To "
                f"add some: infra/kafka.sh topics --alter --topic {name} --partitions N",
                file=sys.stderr,
            )
    return {**wanted, **there}


def watch(servers: Mapping[str, tuple[subprocess.Popen, Path]], keep: bool) -> NoReturn:
    """Wait until one of the servers ends; StackError then, with the end of its log and where all
    of it is: the data's folder is ours to remove unless `keep`."""
    while True:
        for name, (process, log) in servers.items():
            if process.poll() is not None:
                ending = tail(log, lines=10)
                if not keep:
                    number, copy = tempfile.mkstemp(prefix="kafka-s3-", suffix=f"-{log.name}")
                    os.close(number)
                    log = Path(shutil.copy(log, copy))
                killed = ", killed from outside" if process.returncode == -signal.SIGKILL else ""
                raise StackError(
                    f"the log of {name} ends:\n{ending}\nlocal_stack: {name} has ended by itself, "
                    f"code {process.returncode}{killed}; all of its log is in {log}"
                )
        time.sleep(0.2)


def run(options: argparse.Namespace, cleanup: ExitStack) -> NoReturn:
    """Start both, say where they are, and wait; ends by an exception. `cleanup` gets what is to be
    stopped and removed after it."""
    check_ports(options.port, options.s3_port)
    keep = options.keep is not None
    folder = data_folder(options.keep, cleanup)
    s3 = start_s3(folder, options.s3_port, keep, cleanup)
    buckets = create_buckets(s3, [EXAMPLE["S3_BUCKET"] or "", *options.bucket])
    kafka, kind = start_kafka(folder, options.port, keep, cleanup)
    topics = create_topics(kafka, dict(options.topic))

    print(f"Kafka: localhost:{options.port} ({kind})")
    print("       topics", ", ".join(f"{name}:{count}" for name, count in topics.items()))
    process = s3.process.pid if s3.process else "?"
    print(f"S3:    http://localhost:{options.s3_port} ({s3.kind}, process {process})")
    print("       bucket", ", ".join(buckets))
    ending = f"Ctrl-C stops both; their data stays in {folder}"
    print(f"Ready. {ending if keep else 'Ctrl-C stops both and removes their data.'}", flush=True)
    servers = {"S3": (s3.process, s3.log)}
    if isinstance(kafka, Kafka):
        servers["the broker"] = kafka.broker, kafka.log
        servers["ZooKeeper"] = kafka.zookeeper.process, kafka.zookeeper.log
    watch({name: (process, log) for name, (process, log) in servers.items() if process}, keep)


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> int:
    """Run the stack until Ctrl-C, SIGTERM or the terminal is closed; 0 then, 1 when it cannot run,
    2 for wrong usage."""
    options = parser().parse_args(argv)
    # The client's tries while the broker starts are no news.
    logging.getLogger("kafka").setLevel(logging.CRITICAL)
    signals = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    for number in signals:
        signal.signal(number, _stop)
    try:
        with ExitStack() as cleanup:
            try:
                run(options, cleanup)
            finally:
                for number in signals:  # the cleaning up is not interrupted
                    signal.signal(number, signal.SIG_IGN)
    except KeyboardInterrupt:
        say("Stopped.")
        return 0
    except (StackError, KafkaError, BotoCoreError, ClientError) as error:
        say(f"local_stack: {error}")
    except OSError as error:
        place = options.keep or tempfile.gettempdir()
        say(f"local_stack: {error}. The data goes to {place}; --keep or TMPDIR name another folder")
    return 1


def say(text: str) -> None:
    """Say it on standard error, if the terminal is still there."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
