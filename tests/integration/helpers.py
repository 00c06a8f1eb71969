"""What the integration tests share: scripts as processes, a broker that can be killed and frozen,
several brokers, and what a test proves with: the topic's records against the bucket's objects."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import confluent_kafka
import local_stack
from confluent_kafka.admin import AdminClient
from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka.structs import OffsetAndMetadata
from local_stack import API_VERSION, ROOT
from local_stack import free_port as free_port  # the tests import it from here


def until(condition: Callable[[], Any], timeout: float = 60, what: str = "") -> Any:
    """Poll `condition` until it is true; its value. AssertionError after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {timeout} s: {what or condition}"
        time.sleep(0.05)
    return value


class Script:
    """One of the project's scripts as a process of its own; its output is read as it comes."""

    def __init__(self, script: str, *args: str, env: Mapping[str, str]):
        self.name = " ".join([script, *args])
        # A session of its own: a signal of a test reaches this process alone.
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / script), *args],
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
        self.pid = self.process.pid
        self._text: dict[str, list[str]] = {"stdout": [], "stderr": []}
        self._readers = [
            threading.Thread(target=self._read, args=(name, pipe), daemon=True)
            for name, pipe in (("stdout", self.process.stdout), ("stderr", self.process.stderr))
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, name: str, pipe: Iterable[str]) -> None:
        for line in pipe:
            self._text[name].append(line)

    @property
    def stdout(self) -> str:
        """Standard output so far."""
        return "".join(self._text["stdout"])

    @property
    def stderr(self) -> str:
        """Standard error so far."""
        return "".join(self._text["stderr"])

    def lines(self, stream: str = "stdout") -> list[str]:
        """The lines of one stream so far, without line ends."""
        return [line.rstrip("\n") for line in list(self._text[stream])]

    def wait_for(self, regex: str, timeout: float = 60, stream: str | None = None) -> re.Match[str]:
        """The first match of `regex` in the output (of one stream, or of both); AssertionError when
        the process has ended without it, or at the deadline."""
        pattern = re.compile(regex, re.MULTILINE)

        def search() -> re.Match[str] | None:
            for name in [stream] if stream else ["stdout", "stderr"]:
                if match := pattern.search("".join(self._text[name])):
                    return match
            return None

        def found_or_ended() -> re.Match[str] | bool | None:
            ended = self.process.poll() is not None
            if ended:
                self._join()
            return search() or ended

        match = until(found_or_ended, timeout, f"{regex!r} from {self.name}")
        assert match is not True, (
            f"{self.name} ended ({self.process.returncode}) without {regex!r}\n{self.stderr}"
        )
        return match

    def wait(self, timeout: float = 60) -> int:
        """Wait for the end; the exit code (minus the signal). AssertionError at the deadline."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} still runs after {timeout} s") from None
        self._join()
        return code

    def _join(self) -> None:
        for reader in self._readers:
            reader.join(5)

    def terminate(self) -> None:
        """SIGTERM."""
        self.process.terminate()

    def interrupt(self) -> None:
        """SIGINT, as Ctrl-C does."""
        self.process.send_signal(signal.SIGINT)

    def hang_up(self) -> None:
        """SIGHUP, as a terminal that is closed does."""
        self.process.send_signal(signal.SIGHUP)

    def kill(self) -> None:
        """SIGKILL; returns when the process is gone."""
        self.process.kill()
        self.process.wait()


class Kafka(local_stack.Kafka):
    """The local stack's broker, with what a test may do to it beside."""

    @property
    def pids(self) -> dict[str, int]:
        """The pids of what runs: broker, zookeeper."""
        both = {"broker": self.broker, "zookeeper": self.zookeeper.process}
        return {name: p.pid for name, p in both.items() if p is not None and p.poll() is None}

    def kill(self) -> None:
        """kill -9 of the broker."""
        assert self.broker is not None, "the broker was never started"
        self.broker.kill()
        self.broker.wait()

    def freeze(self) -> None:
        """SIGSTOP: the broker keeps its connections and answers nothing, until `thaw`."""
        os.kill(self.pids["broker"], signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        os.kill(self.pids["broker"], signal.SIGCONT)

    def stop_broker(self) -> None:
        """SIGTERM to the broker, frozen or not; return when it has ended."""
        if "broker" in self.pids:
            self.thaw()
        super().stop_broker()

    def restart_zookeeper(self) -> None:
        """Stop ZooKeeper and start it again on the same port and data."""
        self.zookeeper.stop()
        self.zookeeper.start()

    def delete_topic(self, name: str) -> None:
        """Delete a topic; return when the broker no longer names it."""
        self.admin(lambda admin: admin.delete_topics([name], timeout_ms=20000))

    def command(self, main_class: str, *args: str) -> str:
        """Run one of Kafka's own tools by its class, as bin/*.sh do (kafka-consumer-groups.sh is
        kafka.admin.ConsumerGroupCommand); its output. CalledProcessError when it fails."""
        command = [local_stack.java(), "-cp", local_stack.kafka_jars(), main_class, *args]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=60
        ).stdout

    def log_tail(self, lines: int = 30) -> str:
        """The last lines of the broker's log."""
        return local_stack.tail(self.log, lines)


class KafkaCluster:
    """`count` brokers with one ZooKeeper. Each of `brokers` can be stopped, killed and frozen by
    itself; change its `properties` before `start`. About 250 MB of memory a broker."""

    def __init__(self, folder: Path, count: int = 3):
        self.brokers = [Kafka(folder / f"broker-{number}") for number in range(count)]
        self.zookeeper = self.brokers[0].zookeeper
        for number, broker in enumerate(self.brokers):
            broker.zookeeper = self.zookeeper
            broker.properties |= {
                "broker.id": str(number),
                "zookeeper.connect": f"127.0.0.1:{self.zookeeper.port}",
                "offsets.topic.replication.factor": str(count),
            }

    @property
    def bootstrap(self) -> str:
        """The brokers' addresses, as KAFKA_BOOTSTRAP_SERVERS has them."""
        return ",".join(broker.bootstrap for broker in self.brokers)

    def start(self) -> KafkaCluster:
        """Start ZooKeeper and every broker; return when the last one answers. All or nothing."""
        try:
            self.zookeeper.start()
            for broker in self.brokers:
                broker.start_broker()
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Stop every broker, then ZooKeeper. The brokers stop together: the last alone would wait
        for the others to take its partitions."""
        for broker in self.brokers:
            if "broker" in broker.pids:
                broker.thaw()
                os.kill(broker.pids["broker"], signal.SIGTERM)
        for broker in self.brokers:
            broker.stop_broker()
        self.zookeeper.stop()

    def create_topic(
        self,
        name: str,
        partitions: int = 1,
        config: Mapping[str, str] | None = None,
        replicas: int | None = None,
    ) -> None:
        """Create a topic with `replicas` copies (as many as there are brokers). With one copy the
        partitions are spread, and one that loses its broker has no other to go to."""
        copies = len(self.brokers) if replicas is None else replicas
        self.brokers[0].create_topic(name, partitions, config, copies)

    def leader(self, topic: str, partition: int = 0) -> Kafka:
        """The broker that serves the partition now; waits while none is known."""
        client = AdminClient({"bootstrap.servers": self.bootstrap})

        def known() -> list[int]:
            found = client.list_topics(topic, timeout=10).topics[topic].partitions.get(partition)
            return [found.leader] if found and found.leader >= 0 else []

        number = until(known, what=f"a leader of {topic}/{partition}")[0]
        return self.brokers[number]

    def log_tail(self, lines: int = 30) -> str:
        """The last lines of every broker's log."""
        return "\n\n".join(broker.log_tail(lines) for broker in self.brokers)


def produce(
    bootstrap: str,
    topic: str,
    values: Iterable[bytes | None],
    partition: int | None = None,
    keys: Iterable[bytes | None] | None = None,
    request_timeout_ms: int = 30_000,
) -> list[int]:
    """Send `values` as they are, acknowledged and in order; their offsets."""
    producer = KafkaProducer(
        bootstrap_servers=bootstrap,
        api_version=API_VERSION,
        request_timeout_ms=request_timeout_ms,
        acks="all",
        retries=20,
        max_in_flight_requests_per_connection=1,
        max_request_size=8_000_000,
    )
    values = list(values)
    keys = [None] * len(values) if keys is None else keys
    sent = [
        producer.send(topic, value, key=key, partition=partition)
        for value, key in zip(values, keys, strict=True)
    ]
    offsets = [future.get(60).offset for future in sent]
    producer.close()
    return offsets


def records(bootstrap: str, topic: str) -> list[Any]:
    """Every record that the topic holds now (ConsumerRecord), by partition and offset."""
    consumer = KafkaConsumer(
        bootstrap_servers=bootstrap, api_version=API_VERSION, enable_auto_commit=False
    )
    try:
        found: list[Any] = []
        for partition in [
            TopicPartition(topic, p) for p in sorted(consumer.partitions_for_topic(topic) or ())
        ]:
            consumer.assign([partition])
            consumer.seek_to_beginning(partition)
            last = consumer.end_offsets([partition])[partition]
            deadline = time.monotonic() + 60
            while consumer.position(partition) < last:
                assert time.monotonic() < deadline, f"{partition} not read to offset {last}"
                for batch in consumer.poll(500).values():
                    found += batch
        return found
    finally:
        consumer.close()


def positions(bootstrap: str, group: str, topic: str) -> dict[int, OffsetAndMetadata]:
    """The group's committed offset of each partition that has one, and the text beside it.

    By the Python client: librdkafka reads past the end of that text (its issue 4649).
    """
    consumer = KafkaConsumer(
        bootstrap_servers=bootstrap,
        api_version=API_VERSION,
        group_id=group,
        enable_auto_commit=False,
    )
    try:
        partitions = sorted(consumer.partitions_for_topic(topic) or ())
        found = {p: consumer.committed(TopicPartition(topic, p), metadata=True) for p in partitions}
        return {p: position for p, position in found.items() if position is not None}
    finally:
        consumer.close()


def committed(bootstrap: str, group: str, topic: str) -> dict[int, int]:
    """The group's committed offset of each partition that has one."""
    return {p: position.offset for p, position in positions(bootstrap, group, topic).items()}


def scratch_env(home: Path) -> dict[str, str]:
    """For a script started by a test: an environment without this machine's AWS account."""
    return {
        "PATH": "/usr/bin:/bin",
        "HOME": str(home),
        "PYTHONDONTWRITEBYTECODE": "1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


KAFKA_SH = ROOT / "infra" / "kafka.sh"
RUN = """\
#!/usr/bin/env bash
exec java ${KAFKA_HEAP_OPTS:--Xmx256M} ${KAFKA_JVM_PERFORMANCE_OPTS:-} ${KAFKA_OPTS:-} \\
    "-Dlog4j.configuration=file:$(dirname "$0")/../config/tools-log4j.properties" \\
    -cp "$(dirname "$0")/../libs/*" MAIN_CLASS "$@"
"""


def kafka_scripts(folder: Path) -> None:
    """Stand-ins for bin/ and config/ of Apache's distribution, which Maven does not have: the
    tools of infra/kafka.sh, ZooKeeper's shell and the broker, under Apache's names."""
    listed = (ROOT / "infra" / "kafka.sh").read_text()
    classes = {
        f"kafka-{name}": main_class
        for name, main_class in re.findall(
            r"^ +([a-z-]+)\) echo ([\w.]+) ;;$", listed, re.MULTILINE
        )
    }
    classes["kafka-server-start"] = "kafka.Kafka"
    classes["zookeeper-shell"] = "org.apache.zookeeper.ZooKeeperMain -server"
    (folder / "bin").mkdir(parents=True)
    for name, main_class in classes.items():
        script = folder / "bin" / f"{name}.sh"
        script.write_text(RUN.replace("MAIN_CLASS", main_class))
        script.chmod(0o755)
    (folder / "config").mkdir()
    log4j = (ROOT / "infra" / "kafka-tools-log4j.properties").read_text()
    (folder / "config" / "tools-log4j.properties").write_text(log4j)


def object_name(partition: int, offset: int) -> str:
    folder = f"partition={partition}/" if partition else ""
    return f"{folder}stock_market_{offset}.json"


def assert_whole(topic: Iterable[Any], objects: dict[str, bytes], letters: Iterable[Any] = ()):
    """Every record of the topic is one object with its bytes, or a dead letter with its bytes."""
    wanted = {object_name(r.partition, r.offset): r.value for r in topic}
    dead = {}
    for letter in letters:
        headers = dict(letter.headers)
        place = int(headers["source.partition"]), int(headers["source.offset"])
        dead[object_name(*place)] = letter.value
    assert not set(dead) & set(objects), "both an object and a dead letter"
    found = {**objects, **dead}
    assert sorted(set(wanted) - set(found)) == [], "missing"
    assert sorted(set(found) - set(wanted)) == [], "stray"
    assert [name for name in wanted if wanted[name] != found[name]] == [], "other bytes"


@contextmanager
def load(bootstrap: str, topics: Iterable[str], rate: float) -> Iterator[None]:
    """`rate` JSON objects a second to each topic while the block runs; all acknowledged after."""
    stop = threading.Event()

    def send() -> None:
        producer = KafkaProducer(
            bootstrap_servers=bootstrap,
            acks="all",
            retries=50,
            max_in_flight_requests_per_connection=1,
        )
        begun, n = time.monotonic(), 0
        while not stop.is_set():
            for topic in topics:
                producer.send(topic, json.dumps({"Index": topic, "n": n}).encode())
            n += 1
            stop.wait(max(0.0, begun + n / rate - time.monotonic()))
        producer.close(timeout=60)

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def members(bootstrap: str, group: str) -> set[str]:
    """The ids of the group's members: one that was lost and came back has another id."""
    admin = AdminClient({"bootstrap.servers": bootstrap})
    answer = admin.describe_consumer_groups([group])[group].result(10)
    return {member.member_id for member in answer.members}


def commit(bootstrap: str, group: str, topic: str, offset: int, partition: int = 0) -> None:
    """Set the position of a group that has no members."""
    admin = AdminClient({"bootstrap.servers": bootstrap})
    place = confluent_kafka.ConsumerGroupTopicPartitions(
        group, [confluent_kafka.TopicPartition(topic, partition, offset)]
    )
    admin.alter_consumer_group_offsets([place])[group].result(10)


def delete_records(bootstrap: str, topic: str, before: int, partition: int = 0) -> None:
    """What retention does: the partition begins at `before` from now on."""
    admin = AdminClient({"bootstrap.servers": bootstrap})
    for future in admin.delete_records(
        [confluent_kafka.TopicPartition(topic, partition, before)]
    ).values():
        future.result(10)


def end_of(bootstrap: str, topic: str) -> int:
    """Where partition 0 ends. A transaction's marker is written after its commit was answered."""
    consumer = confluent_kafka.Consumer({"bootstrap.servers": bootstrap, "group.id": "ends"})
    try:
        return int(consumer.get_watermark_offsets(confluent_kafka.TopicPartition(topic, 0), 5)[1])
    finally:
        consumer.close()


def until_done(bootstrap: str, group: str, topic: str, timeout: float = 60) -> None:
    """Until the group has committed all that the topic holds."""
    ends: dict[int, int] = {}
    for record in records(bootstrap, topic):
        ends[record.partition] = max(ends.get(record.partition, 0), record.offset + 1)
    until(
        lambda: all(committed(bootstrap, group, topic).get(p) == end for p, end in ends.items()),
        timeout=timeout,
        what=f"{group} at {ends}",
    )


def memory(pid: int, field: str = "VmHWM") -> float:
    """MB of resident memory: its peak (VmHWM) or what it is now (VmRSS). Linux."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise LookupError(field)
