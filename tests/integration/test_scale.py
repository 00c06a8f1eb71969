"""More than one partition, more than one consumer, keys, compression."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
from helpers import Kafka, Script, committed, produce, records, until
from kafka import codec

from kafka_producer import read_rows, sample

pytestmark = pytest.mark.detail


@pytest.fixture
def wide(kafka: Kafka, env: dict[str, str]) -> dict[str, str]:
    """The settings of a test whose topic has four partitions."""
    name = f"wide-{secrets.token_hex(4)}"
    kafka.create_topic(name, partitions=4)
    return {**env, "KAFKA_TOPIC": name, "KAFKA_GROUP_ID": f"group-{name}"}


def test_rows_of_one_key_stay_in_order_on_one_partition(
    kafka: Kafka, wide: dict[str, str], tmp_path: Path, run: Callable[..., Script]
) -> None:
    csv = tmp_path / "rows.csv"
    names = ("HSI", "NYA", "IXIC", "GDAXI", "SSMI", "N225", "NSEI")
    rows = [f"{name},{day}" for name in names for day in range(20)]
    csv.write_text("\n".join(["Index,Day", *rows]))
    env = {**wide, "KAFKA_KEY_COLUMN": "Index", "RANDOM_SEED": "7", "CSV_PATH": str(csv)}
    assert run("kafka_producer.py", "--max-messages", "600", env=env).wait() == 0
    sent: dict[bytes, list[bytes]] = {}
    for key, value in islice(sample(read_rows(csv, "Index"), 7), 600):
        assert key is not None
        sent.setdefault(key, []).append(value)
    stored: dict[bytes, list[bytes]] = {}
    places: dict[bytes, set[int]] = {}
    for record in records(kafka.bootstrap, env["KAFKA_TOPIC"]):
        stored.setdefault(record.key, []).append(record.value)
        places.setdefault(record.key, set()).add(record.partition)
    assert stored == sent
    assert {len(partitions) for partitions in places.values()} == {1}
    assert len(set.union(*places.values())) > 1, "all on one partition shows nothing"


def test_consumers_share_the_partitions_and_leave_no_gap(
    kafka: Kafka,
    wide: dict[str, str],
    objects: Callable[[], dict[str, bytes]],
    run: Callable[..., Script],
) -> None:
    consumers = [run("kafka_consumer.py", env=wide) for _ in range(3)]

    def assigned() -> list[str]:
        """What each consumer was last told that it owns."""
        lines = [re.findall(r"assigned: (.*)", consumer.stderr) for consumer in consumers]
        return [each[-1] if each else "" for each in lines]

    def shared() -> bool:
        owned = [part for text in assigned() for part in re.findall(r"/(\d+)", text)]
        return sorted(owned) == ["0", "1", "2", "3"] and all("/" in text for text in assigned())

    until(shared, 60, "four partitions among three consumers")
    for partition in range(4):
        values = [b'{"p": %d, "n": %d}' % (partition, n) for n in range(300)]
        produce(kafka.bootstrap, wide["KAFKA_TOPIC"], values, partition=partition)
    until(
        lambda: (
            committed(kafka.bootstrap, wide["KAFKA_GROUP_ID"], wide["KAFKA_TOPIC"])
            == dict.fromkeys(range(4), 300)
        ),
        60,
        "all 1,200 records committed",
    )
    for consumer in consumers:
        consumer.terminate()
    assert [consumer.wait() for consumer in consumers] == [0, 0, 0]
    written = [re.findall(r"Upload Successfully: (\S+)", each.stdout) for each in consumers]
    assert all(len(names) >= 300 for names in written), "each consumer did its share"
    everything = [name for names in written for name in names]
    assert len(everything) == len(set(everything)) == 1200, "nothing was done twice"
    assert len(objects()) == 1200
    audit = run("kafka_consumer.py", "--audit", env=wide)
    assert audit.wait() == 0, audit.stdout


@pytest.mark.parametrize("kind", ["gzip", "snappy", "lz4", "zstd"])
def test_compression_reaches_the_bucket_unpacked_or_names_the_missing_library(
    kind: str,
    kafka: Kafka,
    env: dict[str, str],
    objects: Callable[[], dict[str, bytes]],
    run: Callable[..., Script],
) -> None:
    env = {**env, "KAFKA_COMPRESSION_TYPE": kind}
    producer = run("kafka_producer.py", "--max-messages", "50", env=env)
    if not getattr(codec, f"has_{kind}")():
        assert producer.wait() == 2
        assert re.search(f"KAFKA_COMPRESSION_TYPE={kind!r}: .*pip install", producer.stderr)
        assert "Traceback" not in producer.stderr
        return
    assert producer.wait() == 0
    assert run("kafka_consumer.py", "--max-messages", "50", env=env).wait() == 0
    values = [record.value for record in records(kafka.bootstrap, env["KAFKA_TOPIC"])]
    assert objects() == {f"stock_market_{n}.json": value for n, value in enumerate(values)}
    segment = next(Path(kafka.folder).glob(f"kafka/{env['KAFKA_TOPIC']}-0/*.log"))
    assert segment.stat().st_size < sum(map(len, values)), "what the broker keeps is smaller"
