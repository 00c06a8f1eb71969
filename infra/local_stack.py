#!/usr/bin/env python3
"""Kafka and S3 on this machine, for trying the pair out and for its tests.

Run in the foreground it gives the addresses that .env.example names: Apache Kafka 3.3.1 with
ZooKeeper where Java is found, else the small broker inside the confluent-kafka wheel; versitygw
where it is found, else moto's server. Ctrl-C stops both and removes their data.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import functools
import importlib.util
import logging
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

import botocore.config
import botocore.session
from dotenv import dotenv_values
from kafka.admin import KafkaAdminClient, NewTopic
from kafka.errors import KafkaError, TopicAlreadyExistsError

ROOT = Path(__file__).resolve().parent.parent
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
    if "KAFKA_HOME" in os.environ:
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
                raise StackError(f"Maven could not fetch Apache Kafka: {done.stdout.strip()[:300]}")
            if not (home / "libs").exists():  # another run may have been quicker
                Path(part, "libs").rename(home / "libs")
    return home


def kafka_jars() -> str:
    """The class path of Kafka's programs."""
    return f"{kafka_home()}/libs/*"


def start_jvm(
    main_class: str, properties: Mapping[str, str], log: Path, *flags: str
) -> subprocess.Popen:
    """Start a server of Kafka's jars with `properties` as its file, which stands beside its log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    log4j = log.with_name("log4j.properties")
    log4j.write_text(_LOG4J)
    config = log.with_suffix(".properties")
    config.write_text("".join(f"{key}={value}\n" for key, value in properties.items()))
    command = [java(), *flags, f"-Dlog4j.configuration=file:{log4j}", "-cp", kafka_jars()]
    return spawn([*command, main_class, str(config)], log)


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


class EmbeddedKafka:
    """librdkafka's mock broker, out of the confluent-kafka wheel: in memory, in this process.

    For trying things out: it keeps 5 MiB a partition and then drops the oldest. It chooses its own
    port, so a relay listens at `port`, and the broker is told to name that as its address.
    """

    def __init__(self, port: int = 0):
        self.port = port or free_port()
        self.bootstrap = f"127.0.0.1:{self.port}"
        self._loop = asyncio.new_event_loop()

    def start(self) -> EmbeddedKafka:
        """Start the broker and the relay."""
        lib = self._lib = _librdkafka()
        error = ctypes.create_string_buffer(512)
        conf = lib.rd_kafka_conf_new()
        lib.rd_kafka_conf_set(conf, b"log_level", b"0", error, len(error))
        self._client = lib.rd_kafka_new(
            0, conf, error, len(error)
        )  # a producer; the cluster hangs on it
        self._cluster = lib.rd_kafka_mock_cluster_new(self._client, 1)
        if not self._cluster:
            raise StackError(f"the embedded broker did not start: {error.value.decode()}")
        address = lib.rd_kafka_mock_cluster_bootstraps(self._cluster).decode()
        lib.rd_kafka_mock_broker_set_host_port(self._cluster, 1, b"127.0.0.1", self.port)
        lib.rd_kafka_mock_group_initial_rebalance_delay_ms(self._cluster, 0)
        host, _, upstream = address.rpartition(":")

        async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                far_reader, far_writer = await asyncio.open_connection(host, int(upstream))
            except OSError:
                writer.close()
                return
            await asyncio.gather(_pump(reader, far_writer), _pump(far_reader, writer))

        self._loop.run_until_complete(asyncio.start_server(relay, "127.0.0.1", self.port))
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        return self

    def create_topic(self, name: str, partitions: int = 1) -> None:
        """Create a topic."""
        self._lib.rd_kafka_mock_topic_create(self._cluster, name.encode(), partitions, 1)

    def stop(self) -> None:
        """Stop the relay and the broker; what the topics held is gone."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._lib.rd_kafka_mock_cluster_destroy(self._cluster)
        self._lib.rd_kafka_destroy(self._client)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    finally:
        writer.close()


def _librdkafka() -> ctypes.CDLL:
    """The library inside the confluent-kafka wheel, with the signatures of what is used here."""
    try:
        import confluent_kafka
    except ImportError as error:
        raise StackError(
            f"the embedded broker needs confluent-kafka: pip install '.[local]' ({error})"
        ) from error
    package = Path(confluent_kafka.__file__).parent
    found = [
        *package.parent.glob("confluent_kafka.libs/librdkafka*"),
        *package.glob(".dylibs/librdkafka*"),
    ]
    if not found:
        raise StackError(
            f"no librdkafka beside {package}: this build of confluent-kafka has no embedded broker"
        )
    lib = ctypes.CDLL(str(found[0]))
    pointer, integer, text = ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p
    for name, result, *arguments in (
        ("rd_kafka_conf_new", pointer),
        ("rd_kafka_conf_set", integer, pointer, text, text, text, ctypes.c_size_t),
        ("rd_kafka_new", pointer, integer, pointer, text, ctypes.c_size_t),
        ("rd_kafka_destroy", None, pointer),
        ("rd_kafka_mock_cluster_new", pointer, pointer, integer),
        ("rd_kafka_mock_cluster_destroy", None, pointer),
        ("rd_kafka_mock_cluster_bootstraps", text, pointer),
        ("rd_kafka_mock_broker_set_host_port", None, pointer, ctypes.c_int32, text, integer),
        ("rd_kafka_mock_group_initial_rebalance_delay_ms", None, pointer, ctypes.c_int32),
        ("rd_kafka_mock_topic_create", integer, pointer, text, integer, integer),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


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
        self.process: subprocess.Popen | None = None
        self.kind = "versitygw" if versitygw() else "moto"

    def start(self) -> S3:
        """Start the server; return when it listens."""
        program, data = versitygw(), self.folder / "s3"
        data.mkdir(parents=True, exist_ok=True)
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
        log = self.folder / "s3.log"
        self.process = spawn(command, log, {**os.environ, **keys})
        _wait_listening(self.process, self.port, log)
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


def start_kafka(folder: Path, port: int) -> tuple[Kafka | EmbeddedKafka, str]:
    """The real broker, or else the embedded one; and the name of what it is."""
    try:
        return Kafka(folder, port).start(), "Apache Kafka 3.3.1 with ZooKeeper"
    except StackError as error:
        print(f"No real broker here: {error}. The embedded one takes its place.", file=sys.stderr)
        return EmbeddedKafka(port).start(), "the embedded broker of confluent-kafka, in memory"


def parser() -> argparse.ArgumentParser:
    """The command line."""

    def port(text: str) -> int:
        if not 0 <= int(text) < 65536:
            raise ValueError
        return int(text) or free_port()

    result = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    for flag, default, whose in (("--port", 9092, "Kafka's"), ("--s3-port", 9000, "S3's")):
        text = f"{whose} port on localhost; 0: a free one (default: %(default)s)"
        result.add_argument(flag, type=port, metavar="PORT", default=default, help=text)
    return result


def run(port: int, s3_port: int) -> None:
    """Start both, say where they are, and wait; never returns, ends by an exception."""
    for flag, number in (("--port", port), ("--s3-port", s3_port)):
        if not port_is_free(number):
            raise StackError(
                f"port {number} on localhost is in use: stop what listens there or change {flag}"
            )
    with ExitStack() as cleanup:
        folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="kafka-s3-")))
        s3 = S3(folder, s3_port)
        cleanup.callback(s3.stop)
        s3.start()
        bucket = EXAMPLE["S3_BUCKET"] or ""
        s3.create_bucket(bucket)
        kafka, kind = start_kafka(folder, port)
        cleanup.callback(kafka.stop)
        topics = [EXAMPLE["KAFKA_TOPIC"] or "", EXAMPLE["KAFKA_DLQ_TOPIC"] or ""]
        for topic in topics:
            kafka.create_topic(topic)
        print(f"Kafka: localhost:{port} ({kind}), topics {', '.join(topics)}")
        print(f"S3:    http://localhost:{s3_port} ({s3.kind}), bucket {bucket}")
        print("Ready. Ctrl-C stops both and removes their data.", flush=True)
        children = {"S3": s3.process}
        if isinstance(kafka, Kafka):
            children |= {"the broker": kafka.broker, "ZooKeeper": kafka.zookeeper.process}
        while True:
            for name, child in children.items():
                if child is not None and child.poll() is not None:
                    raise StackError(f"{name} has ended by itself, code {child.returncode}")
            time.sleep(0.2)


def _stop(*_: object) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # the cleaning up is not interrupted
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> int:
    """Run the stack until Ctrl-C or SIGTERM; 0 then, 1 when it cannot run, 2 for wrong usage."""
    options = parser().parse_args(argv)
    # The client's tries while the broker starts are no news.
    logging.getLogger("kafka").setLevel(logging.CRITICAL)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        run(options.port, options.s3_port)
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
    except StackError as error:
        print(f"local_stack: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
