"""What the fault tests prove with: records against objects, a load, members, memory."""

import json
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from confluent_kafka import ConsumerGroupTopicPartitions, TopicPartition
from confluent_kafka.admin import AdminClient
from helpers import committed, records, until
from kafka import KafkaProducer


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
    place = ConsumerGroupTopicPartitions(group, [TopicPartition(topic, partition, offset)])
    admin.alter_consumer_group_offsets([place])[group].result(10)


def delete_records(bootstrap: str, topic: str, before: int, partition: int = 0) -> None:
    """What retention does: the partition begins at `before` from now on."""
    admin = AdminClient({"bootstrap.servers": bootstrap})
    for future in admin.delete_records([TopicPartition(topic, partition, before)]).values():
        future.result(10)


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
