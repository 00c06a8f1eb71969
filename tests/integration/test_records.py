"""Records that are large, that cannot be decoded, or whose headers are odd: each of them is an
object, a dead letter, or a line that says where it is and what to do."""

import re
import time
from pathlib import Path

import pytest
from confluent_kafka import Producer
from helpers import committed, produce, records, until, until_done
from kafka.record.util import calc_crc32c
from s3_faults import FaultyS3

pytestmark = pytest.mark.real

SOON = 15  # seconds within which promise 9 wants a word


def stop(script) -> None:
    """SIGTERM, for one that may have ended by itself."""
    if script.process.poll() is None:
        script.terminate()
    script.wait(timeout=10)


def send(
    bootstrap: str, topic: str, values: list[bytes], codec: str = "none", partition: int = 0, **more
) -> None:
    """One batch where it fits, by librdkafka: it brings its codecs with it, and is quick with
    large records."""
    options = {"compression.type": codec, "linger.ms": 200, "message.max.bytes": 8_000_000}
    producer = Producer({"bootstrap.servers": bootstrap, **options})
    for value in values:
        producer.produce(topic, value, partition=partition, **more)
    assert producer.flush(60) == 0


def segment(kafka, topic: str) -> Path:
    """The file that holds the first records of partition 0."""
    return kafka.folder / "kafka" / f"{topic}-0" / f"{0:020}.log"


def spoil(kafka, topic: str, at: bytes, instead: bytes) -> None:
    """Overwrite bytes in the broker's own file, as a bad disk would; it serves what is there."""
    assert len(at) == len(instead)
    data = segment(kafka, topic).read_bytes()
    assert data.count(at) == 1
    with segment(kafka, topic).open("r+b") as file:
        file.seek(data.index(at))
        file.write(instead)


# ----------------------------------------------------------------------------- large records


def test_large_records_are_replayed_without_a_hold(run, env, kafka, topic):
    """The server refuses what is there before it has read all of it, and hangs up."""
    send(kafka.bootstrap, topic, [b'{"n": "' + b"x" * 900_000 + b'"}'] * 12)
    for group in ("first", "second"):
        settings = {**env, "KAFKA_GROUP_ID": f"{topic}-{group}"}
        script = run("kafka_consumer.py", "--max-messages", "12", env=settings)
        assert script.wait(timeout=60) == 0
        assert len(re.findall("Upload Successfully", script.stdout)) == 12
        assert "holding" not in script.stderr


@pytest.mark.parametrize(
    ("size", "count"),
    [
        (400_000, 80),
        pytest.param(1_000_000, 40, marks=pytest.mark.slow),
        pytest.param(2_000_000, 20, marks=pytest.mark.slow),
    ],
)
def test_partitions_of_large_records_move_side_by_side(run, env, kafka, topic, size, count):
    """None waits for the end of another's backlog."""
    name = f"{topic}_large"
    kafka.create_topic(name, partitions=2, config={"max.message.bytes": "4000000"})
    value = b'{"n": "' + b"x" * size + b'"}'
    for partition in range(2):
        send(kafka.bootstrap, name, [value] * count, partition=partition)
    limit = str(2 * count)
    settings = {**env, "KAFKA_TOPIC": name}
    script = run("kafka_consumer.py", "--max-messages", limit, env=settings)
    assert script.wait(timeout=90) == 0
    written = re.findall(r"Upload Successfully: s3://[^/]+/(partition=1/)?stock", script.stdout)
    assert len(written) == 2 * count
    for partition in ("", "partition=1/"):
        assert written.index(partition) < count // 2, written
        # And it goes on so: neither has to end before the other goes on.
        half = written[:count]
        assert half.count(partition) > count // 10, half


# ---------------------------------------------------------------------------------- headers


def rename_header(kafka, topic: str, name: bytes, instead: bytes) -> None:
    """Another name for a header of the topic's last batch, which no client here would send; the
    batch's checksum is right."""
    spoil(kafka, topic, name, instead)
    data = segment(kafka, topic).read_bytes()
    start = 0
    while (after := start + 12 + int.from_bytes(data[start + 8 : start + 12])) < len(data):
        start = after
    checksum = calc_crc32c(data[start + 21 :])
    with segment(kafka, topic).open("r+b") as file:
        file.seek(start + 17)
        file.write(checksum.to_bytes(4))


def test_a_record_whose_header_name_is_not_utf_8_becomes_an_object(run, env, kafka, topic, objects):
    values = [b'{"n": %d}' % n for n in range(3)]
    send(kafka.bootstrap, topic, values[:1])
    send(kafka.bootstrap, topic, values[1:2], headers=[("odd-name", b"1")])
    rename_header(kafka, topic, b"odd-name", b"caf\xe9\xff\xfe\x80!")
    send(kafka.bootstrap, topic, values[2:])
    script = run("kafka_consumer.py", "--max-messages", "3", env=env)
    assert script.wait() == 0, script.stderr
    assert objects() == {f"stock_market_{n}.json": value for n, value in enumerate(values)}


@pytest.mark.slow
def test_a_dead_letter_keeps_the_headers_that_can_be_kept(run, env, kafka, topic):
    headers = [("trace", b"42"), ("odd-name", b"odd"), ("empty", b"")]
    send(kafka.bootstrap, topic, [b"no JSON"], headers=headers)
    rename_header(kafka, topic, b"odd-name", b"caf\xe9\xff\xfe\x80!")
    script = run("kafka_consumer.py", "--max-messages", "1", env=env)
    assert script.wait() == 0, script.stderr
    # Read from the disk: what the odd name has become may be nothing that a client can decode.
    letter = until(lambda: segment(kafka, f"{topic}_errors").read_bytes())
    assert b"trace" in letter and b"source.offset" in letter and b"no JSON" in letter


# ------------------------------------------------------------------- records without a codec


def without_packages(env: dict[str, str], folder: Path, *names: str) -> dict[str, str]:
    """The environment of a Python in which these packages cannot be imported."""
    lines = ["import sys", *(f"sys.modules[{name!r}] = None" for name in names)]
    (folder / "sitecustomize.py").write_text("\n".join(lines) + "\n")
    return {**env, "PYTHONPATH": str(folder)}


@pytest.mark.parametrize(
    ("codec", "package"),
    [
        ("snappy", "python-snappy"),
        pytest.param("lz4", "lz4", marks=pytest.mark.slow),
        pytest.param("zstd", "zstandard", marks=pytest.mark.slow),
    ],
)
def test_a_record_of_a_codec_that_is_missing_is_named_with_the_package_to_install(
    run, env, kafka, topic, objects, tmp_path, codec, package
):
    """What is before it is written and committed first."""
    produce(kafka.bootstrap, topic, [b'{"n": 1}'] * 3)
    send(kafka.bootstrap, topic, [b'{"text": "%s"}' % (b"x" * 2000)] * 3, codec)
    bare = without_packages(env, tmp_path, "snappy", "lz4", "lz4.frame", "zstandard", "cramjam")
    script = run("kafka_consumer.py", env=bare)
    line = script.wait_for(rf"^.*pip install .*\b{package}\b.*$", timeout=SOON, stream="stderr")[0]
    assert f"{topic}/0" in line, line
    assert re.search(r"\b3\b", line), f"offset 3 is not named: {line}"
    until(lambda: committed(kafka.bootstrap, env["KAFKA_GROUP_ID"], topic).get(0) == 3, 10)
    stop(script)
    assert "Traceback" not in script.stderr
    assert set(objects()) == {f"stock_market_{n}.json" for n in range(3)}
    assert committed(kafka.bootstrap, env["KAFKA_GROUP_ID"], topic) == {0: 3}


# ------------------------------------------------------------- records that cannot be decoded


WAY_OUT = "reset-offsets|skip (it|them|that)|(after|past|behind) (it|them)|move the group"


def is_named(run, env, kafka, topic, objects, offset: int) -> None:
    """The consumer names the place and a way out, and does no harm: what is before the record is
    written, and neither it nor what follows is committed."""
    script = run("kafka_consumer.py", env=env)
    line = script.wait_for(
        rf"^.*(WARNING|ERROR) .*{topic}/0.*({WAY_OUT}).*$", timeout=SOON, stream="stderr"
    )[0]
    assert re.search(rf"\b{offset}\b", line), f"offset {offset} is not named: {line}"
    until(lambda: committed(kafka.bootstrap, env["KAFKA_GROUP_ID"], topic).get(0) == offset, 10)
    stop(script)
    assert "Traceback" not in script.stderr
    assert set(objects()) == {f"stock_market_{n}.json" for n in range(offset)}
    assert committed(kafka.bootstrap, env["KAFKA_GROUP_ID"], topic) == {0: offset}


def test_a_record_whose_length_is_damaged_is_named_with_a_way_out(run, env, kafka, topic, objects):
    produce(kafka.bootstrap, topic, [b'{"n": 0}', b'{"n": 1}'])
    produce(kafka.bootstrap, topic, [b'{"n": "here"}'])
    produce(kafka.bootstrap, topic, [b'{"n": 3}'])
    # The value's length, one byte (26: 13 in zigzag), is what stands before it.
    spoil(kafka, topic, b'\x1a{"n": "here"}', b'\x7e{"n": "here"}')
    is_named(run, env, kafka, topic, objects, offset=2)


def test_all_before_a_record_that_cannot_be_read_is_written_though_s3_fails(
    run, env, kafka, s3, topic, objects
):
    """The way out skips to behind it: what is not written by then is lost."""
    produce(kafka.bootstrap, topic, [b'{"n": 0}'] * 50)
    produce(kafka.bootstrap, topic, [b'{"n": "here"}'])
    spoil(kafka, topic, b'\x1a{"n": "here"}', b'\x7e{"n": "here"}')
    with FaultyS3(s3.endpoint) as faulty:
        faulty.fail("503", only=("put",))
        script = run("kafka_consumer.py", env={**env, "S3_ENDPOINT_URL": faulty.endpoint})
        script.wait_for("holding at", timeout=SOON, stream="stderr")
        time.sleep(3)
        assert script.process.poll() is None
        faulty.heal()
        assert script.wait() == 1
    assert f"--topic {topic}:0 --to-offset 51" in script.stderr
    assert set(objects()) == {f"stock_market_{n}.json" for n in range(50)}
    assert committed(kafka.bootstrap, env["KAFKA_GROUP_ID"], topic) == {0: 50}


@pytest.mark.slow
def test_a_compressed_batch_that_is_damaged_is_named_with_a_way_out(
    run, env, kafka, topic, objects
):
    produce(kafka.bootstrap, topic, [b'{"n": 0}', b'{"n": 1}'])
    send(kafka.bootstrap, topic, [b'{"text": "%s"}' % (b"x" * 2000)] * 3, "gzip")
    data = segment(kafka, topic).read_bytes()
    start = data.rindex(b"\x1f\x8b\x08")  # gzip's magic
    spoil(kafka, topic, data[start : start + 20], b"\0" * 20)
    is_named(run, env, kafka, topic, objects, offset=2)


# ---------------------------------------------------------------- the dead letter topic is missing


def test_a_missing_dead_letter_topic_is_said_at_the_start_and_held_for(
    run, env, kafka, topic, objects
):
    letters = f"{topic}_nowhere"
    produce(kafka.bootstrap, topic, [b'{"n": 0}', b"no JSON", b'{"n": 2}'])
    script = run("kafka_consumer.py", env={**env, "KAFKA_DLQ_TOPIC": letters})
    line = script.wait_for(rf"^.*WARNING .*{letters}.*$", timeout=SOON, stream="stderr")[0]
    assert "create it" in line
    script.wait_for(rf"holding.*{letters}|{letters}.*holding", timeout=SOON, stream="stderr")
    assert "KafkaTimeoutError: KafkaTimeoutError" not in script.stderr
    until(lambda: committed(kafka.bootstrap, env["KAFKA_GROUP_ID"], topic) == {0: 1}, 10)
    kafka.create_topic(letters)
    until_done(kafka.bootstrap, env["KAFKA_GROUP_ID"], topic, timeout=20)
    script.terminate()
    assert script.wait() == 0
    assert [letter.value for letter in records(kafka.bootstrap, letters)] == [b"no JSON"]
    assert set(objects()) == {"stock_market_0.json", "stock_market_2.json"}
