"""What the integration tests share: running a script, polling, looking into a topic."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from local_stack import API_VERSION, ROOT, free_port

__all__ = ["ROOT", "Script", "committed", "free_port", "produce", "records", "until"]


def until(condition: Callable[[], Any], timeout: float = 30, what: str = "") -> Any:
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

    def wait_for(self, regex: str, timeout: float = 30, stream: str | None = None) -> re.Match[str]:
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

    def wait(self, timeout: float = 30) -> int:
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

    def kill(self) -> None:
        """SIGKILL; returns when the process is gone."""
        self.process.kill()
        self.process.wait()


def produce(
    bootstrap: str,
    topic: str,
    values: Iterable[bytes | None],
    partition: int | None = None,
    keys: Iterable[bytes | None] | None = None,
) -> list[int]:
    """Send `values` as they are, acknowledged and in order; their offsets."""
    producer = KafkaProducer(
        bootstrap_servers=bootstrap,
        api_version=API_VERSION,
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


def committed(bootstrap: str, group: str, topic: str) -> dict[int, int]:
    """The group's committed offset of each partition that has one."""
    consumer = KafkaConsumer(
        bootstrap_servers=bootstrap,
        api_version=API_VERSION,
        group_id=group,
        enable_auto_commit=False,
    )
    try:
        partitions = sorted(consumer.partitions_for_topic(topic) or ())
        offsets = {p: consumer.committed(TopicPartition(topic, p)) for p in partitions}
        return {p: offset for p, offset in offsets.items() if offset is not None}
    finally:
        consumer.close()


def scratch_env(home: Path) -> dict[str, str]:
    """For a script started by a test: an environment without this machine's AWS account."""
    return {
        "PATH": "/usr/bin:/bin",
        "HOME": str(home),
        "PYTHONDONTWRITEBYTECODE": "1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
