"""`--audit` (promise 11): clean is clean, what is wrong is named, nothing is written."""

import hashlib
import time
from contextlib import ExitStack

import pytest
from confluent_kafka import Producer
from helpers import (
    commit,
    committed,
    delete_records,
    end_of,
    memory,
    object_name,
    produce,
    records,
    until,
)
from kafka import KafkaConsumer, OffsetAndMetadata, TopicPartition
from local_stack import API_VERSION
from s3_faults import FaultyS3, page

from config import KafkaClient  # None with kafka-python 3

pytestmark = [pytest.mark.real, pytest.mark.detail]


@pytest.fixture
def client(s3):
    return s3.client()


@pytest.fixture
def written(run, env, kafka, topic):
    """A topic of 20 records, two of them bad, all written."""
    values = [b'{"n": %d}' % n if n not in (7, 11) else b"bad %d" % n for n in range(20)]
    produce(kafka.bootstrap, topic, values)
    assert run("kafka_consumer.py", "--max-messages", "20", env=env).wait() == 0
    return values


def audit(run, env, timeout=60):
    script = run("kafka_consumer.py", "--audit", env=env)
    code = script.wait(timeout)
    assert "Traceback" not in script.stderr
    return code, script.stdout + script.stderr


def test_what_the_consumer_wrote_is_clean_and_the_audit_writes_nothing(
    run, env, kafka, topic, s3, objects, written
):
    before = objects(), committed(kafka.bootstrap, env["KAFKA_GROUP_ID"], topic)
    letters = len(records(kafka.bootstrap, f"{topic}_errors"))
    with FaultyS3(s3.endpoint) as faulty:
        code, said = audit(run, {**env, "S3_ENDPOINT_URL": faulty.endpoint})
        operations = {request.operation for request in faulty.requests}
    assert code == 0, said
    assert "20" in said
    assert operations <= {"list", "get", "head", "head_bucket", "location"}
    assert (objects(), committed(kafka.bootstrap, env["KAFKA_GROUP_ID"], topic)) == before
    assert len(records(kafka.bootstrap, f"{topic}_errors")) == letters


def test_a_missing_object_is_a_gap(run, env, client, bucket, written):
    client.delete_object(Bucket=bucket, Key="stock_market_5.json")
    code, said = audit(run, env)
    assert code == 1
    assert "offsets 5 to 5" in said and "1 missing" in said


def test_objects_with_other_bytes_are_differences(run, env, client, bucket, written):
    """Of the same length, longer, and empty."""
    for n, other in ((4, b'{"n": 6}'), (5, b'{"n": 55}'), (6, b"")):
        client.put_object(Bucket=bucket, Key=f"stock_market_{n}.json", Body=other)
    code, said = audit(run, env)
    assert code == 1
    for n in (4, 5, 6):
        assert f"stock_market_{n}.json: other bytes" in said
    assert "3 different" in said


def test_objects_without_their_record_are_strays(run, env, client, bucket, written):
    """Beyond the end, of no partition, of no record's name, of a record that is a dead letter."""
    names = [
        "stock_market_20.json",
        "stock_market_999.json",
        "partition=1/stock_market_0.json",
        "stock_market_05.json",
        "stock_market_7.json",
    ]
    for name in names:
        client.put_object(Bucket=bucket, Key=name, Body=b'{"n": 20}')
    code, said = audit(run, env)
    assert code == 1
    for name in names:
        assert name in said
    assert "5 stray" in said


def test_a_missing_dead_letter_is_a_gap(run, env, kafka, topic, written):
    kafka.create_topic(f"{topic}_empty")
    code, said = audit(run, {**env, "KAFKA_DLQ_TOPIC": f"{topic}_empty"})
    assert code == 1
    assert "7" in said and "11" in said


def test_a_dead_letter_of_another_topic_does_not_stand_for_ours(run, env, kafka, topic, written):
    kafka.create_topic(f"{topic}_other")
    kafka.create_topic(f"{topic}_shared")
    produce(kafka.bootstrap, f"{topic}_other", [b"bad"] * 20)
    other = {**env, "KAFKA_TOPIC": f"{topic}_other", "KAFKA_DLQ_TOPIC": f"{topic}_shared"}
    other["KAFKA_GROUP_ID"] = f"{topic}_other"
    assert run("kafka_consumer.py", "--max-messages", "20", env=other).wait() == 0
    code, _ = audit(run, {**env, "KAFKA_DLQ_TOPIC": f"{topic}_shared"})
    assert code == 1


def test_records_after_the_committed_position_are_not_asked_for(run, env, kafka, topic, written):
    produce(kafka.bootstrap, topic, [b'{"n": 20}'] * 5)
    code, said = audit(run, env)
    assert code == 0, said


def test_every_partition_is_checked(run, env, kafka, topic, client, bucket):
    kafka.create_topic(f"{topic}_3", partitions=3)
    for partition in range(3):
        produce(kafka.bootstrap, f"{topic}_3", [b'{"p": %d}' % partition] * 4, partition=partition)
    env = {**env, "KAFKA_TOPIC": f"{topic}_3", "S3_PREFIX": "a/b/"}
    assert run("kafka_consumer.py", "--max-messages", "12", env=env).wait() == 0
    assert audit(run, env)[0] == 0
    client.delete_object(Bucket=bucket, Key="a/b/partition=2/stock_market_3.json")
    code, said = audit(run, env)
    assert code == 1
    assert f"{topic}_3/2 offsets 3 to 3" in said


def test_a_group_that_never_committed_is_said(run, env, kafka, topic):
    produce(kafka.bootstrap, topic, [b"{}"] * 3)
    _, said = audit(run, {**env, "KAFKA_GROUP_ID": "never-committed"})
    assert "never-committed" in said


def test_an_audit_that_cannot_read_is_never_clean(run, env, s3, written):
    with ExitStack() as stack:
        scripts = []
        for fault in ("403", "503", "refused"):
            faulty = stack.enter_context(FaultyS3(s3.endpoint))
            faulty.fail(fault)
            settings = {**env, "S3_ENDPOINT_URL": faulty.endpoint}
            scripts.append(run("kafka_consumer.py", "--audit", env=settings))
        for script in scripts:
            assert script.wait() == 1
            assert len(script.lines("stderr")) == 1, script.stderr


@pytest.mark.parametrize(("changed", "wanted"), [(False, 0), (True, 1)])
def test_objects_whose_etag_is_no_md5_are_read(run, env, kafka, topic, changed, wanted):
    """As KMS encryption and multipart uploads leave them."""
    produce(kafka.bootstrap, topic, [b'{"n": %d}' % n for n in range(50)])
    commit(kafka.bootstrap, env["KAFKA_GROUP_ID"], topic, 50)
    with FaultyS3() as s3:
        for n in range(50):
            key = f"{env['S3_BUCKET']}/{object_name(0, n)}"
            s3.store[key] = b'{"n": %d}' % n
            s3.etags[key] = f"{n:032x}-1" if n % 2 else hashlib.md5(b"cipher %d" % n).hexdigest()
        if changed:
            s3.store[f"{env['S3_BUCKET']}/{object_name(0, 31)}"] = b'{"n": 13}'
        code, said = audit(run, {**env, "S3_ENDPOINT_URL": s3.endpoint})
    assert code == wanted, said
    assert ("stock_market_31.json" in said) == changed


def put_objects(client, bucket, values):
    """Objects for {offset: value}, as a consumer would have made them."""
    for offset, value in values.items():
        client.put_object(Bucket=bucket, Key=object_name(0, offset), Body=value)


def test_transaction_markers_are_known_and_a_record_that_looks_like_one_is_a_record(
    run, env, kafka, topic, client, bucket
):
    producer = Producer({"bootstrap.servers": kafka.bootstrap, "transactional.id": topic})
    producer.init_transactions(20)
    for end in (producer.commit_transaction, producer.abort_transaction):
        producer.begin_transaction()
        for _ in range(2):
            producer.produce(topic, b'{"n": 1}')
        producer.flush(20)
        end(20)
    until(lambda: end_of(kafka.bootstrap, topic) == 6, what="the last marker")
    # offsets 0 and 1, a marker, 3 and 4 (aborted), a marker, and with the key of one and as long:
    produce(kafka.bootstrap, topic, [b"{}    "], keys=[b"\0\0\0\1"])
    commit(kafka.bootstrap, env["KAFKA_GROUP_ID"], topic, 7)
    put_objects(client, bucket, dict.fromkeys((0, 1, 3, 4), b'{"n": 1}') | {6: b"{}    "})
    code, said = audit(run, env)
    assert code == 0, said
    if KafkaClient:
        assert "5 objects, 2 transaction markers" in said
    client.delete_object(Bucket=bucket, Key="stock_market_6.json")
    code, said = audit(run, env)
    assert code == 1
    assert "offsets 6 to 6" in said and "1 missing" in said


@pytest.mark.slow
def test_an_object_whose_record_was_compacted_away_is_no_stray(
    run, env, kafka, topic, client, bucket
):
    compacted = {
        "cleanup.policy": "compact",
        "segment.ms": "100",
        "min.cleanable.dirty.ratio": "0.01",
        "min.compaction.lag.ms": "0",
    }
    topic = f"{topic}_compacted"
    kafka.create_topic(topic, config=compacted)
    values = {n: b'{"n": %d}' % n for n in range(20)}
    produce(kafka.bootstrap, topic, values.values(), keys=[b"same"] * 20)

    def compact():
        time.sleep(0.2)  # a segment is closed by the first record after its time
        produce(kafka.bootstrap, topic, [b"{}"], keys=[b"another"])
        return len(records(kafka.bootstrap, topic)) < 10

    until(compact, 90, "the topic compacted")
    put_objects(client, bucket, values)
    commit(kafka.bootstrap, env["KAFKA_GROUP_ID"], topic, 20)
    code, said = audit(run, {**env, "KAFKA_TOPIC": topic})
    assert code == 0, said
    assert "that outlive their records" in said
    client.delete_object(Bucket=bucket, Key="stock_market_19.json")
    code, said = audit(run, {**env, "KAFKA_TOPIC": topic})
    assert code == 1
    assert "offsets 19 to 19" in said and "1 missing" in said


@pytest.mark.xfail(not KafkaClient, reason="kafka-python 3 can read it", run=False)
def test_a_topic_that_the_broker_refuses_to_hand_out_is_never_clean(
    run, env, kafka, topic, client, bucket
):
    topic = f"{topic}_zstd"
    kafka.create_topic(topic, config={"compression.type": "zstd"})
    produce(kafka.bootstrap, topic, [b"{}"] * 5)
    env = {**env, "KAFKA_TOPIC": topic}
    commit(kafka.bootstrap, env["KAFKA_GROUP_ID"], topic, 0)
    code, said = audit(run, env)
    assert code == 1
    assert f"nothing was checked: topic {topic} has 5 records" in said
    assert "the client says: Unknown error fetching" in said and "zstd" in said
    put_objects(client, bucket, dict.fromkeys(range(5), b"{}"))
    commit(kafka.bootstrap, env["KAFKA_GROUP_ID"], topic, 5)
    code, said = audit(run, env, timeout=60)
    assert code == 1
    assert f"{topic}/0: no records came for" in said
    assert "the client says: Unknown error fetching" in said and "zstd" in said


def test_what_the_consumer_noted_as_lost_is_named(run, env, kafka, topic, client, bucket):
    produce(kafka.bootstrap, topic, [b"{}"] * 20)
    delete_records(kafka.bootstrap, topic, before=10)
    put_objects(client, bucket, dict.fromkeys([*range(5), *range(10, 20)], b"{}"))
    consumer = KafkaConsumer(
        bootstrap_servers=kafka.bootstrap,
        group_id=env["KAFKA_GROUP_ID"],
        api_version=API_VERSION,
        enable_auto_commit=False,
    )
    consumer.assign([TopicPartition(topic, 0)])
    consumer.commit({TopicPartition(topic, 0): OffsetAndMetadata(20, "lost 5-9")})
    consumer.close()
    code, said = audit(run, env)
    assert code == 1
    assert f"LOST: {topic}/0 offsets 5 to 9: retention removed them before" in said
    assert "5 lost" in said


def test_records_lost_to_retention_before_they_were_written_fail_every_later_audit(
    run, env, kafka, topic
):
    produce(kafka.bootstrap, topic, [b'{"n": %d}' % n for n in range(30)])
    assert run("kafka_consumer.py", "--max-messages", "10", env=env).wait() == 0
    delete_records(kafka.bootstrap, topic, before=20)
    assert run("kafka_consumer.py", "--max-messages", "10", env=env).wait() == 0
    produce(kafka.bootstrap, topic, [b"{}"] * 5)
    assert run("kafka_consumer.py", "--max-messages", "5", env=env).wait() == 0
    code, said = audit(run, env)
    assert code == 1
    assert f"LOST: {topic}/0 offsets 10 to 19: retention removed them before" in said
    assert "10 objects that outlive their records" in said and ": 10 lost" in said


@pytest.fixture
def unlike(env, kafka, topic):
    """A store whose ETags are no MD5 of the 20 objects, which therefore have to be read."""
    produce(kafka.bootstrap, topic, [b'{"n": %d}' % n for n in range(20)])
    commit(kafka.bootstrap, env["KAFKA_GROUP_ID"], topic, 20)
    with FaultyS3() as s3:
        for n in range(20):
            key = f"{env['S3_BUCKET']}/{object_name(0, n)}"
            s3.store[key] = b'{"n": %d}' % n
            s3.etags[key] = f"{n:032x}-1"
        env["S3_ENDPOINT_URL"] = s3.endpoint
        yield s3


def requests(s3, operation):
    return [request for request in list(s3.requests) if request.operation == operation]


@pytest.mark.parametrize("operation", ["list", "get"])
@pytest.mark.parametrize("fault", ["503", "torn", "reset"])
def test_a_request_that_fails_is_made_again(run, env, unlike, fault, operation):
    unlike.fail(fault, only=(operation,))
    script = run("kafka_consumer.py", "--audit", env=env)
    until(lambda: requests(unlike, operation), what=f"{fault} of {operation}")
    unlike.heal()
    assert script.wait() == 0, script.stderr
    assert "Traceback" not in script.stderr


def test_a_page_in_the_place_of_an_object_is_no_difference(run, env, unlike):
    unlike.answer(page(), only=("get",))
    code, said = audit(run, env)
    assert code == 1
    assert "DIFFERENT" not in said
    assert "stock_market_" in said and "that is no answer of S3" in said


@pytest.mark.parametrize("fault", ["503", "torn", "reset"])
def test_an_object_that_cannot_be_read_is_named_in_one_line(run, env, unlike, fault):
    unlike.fail(fault, only=("get",))
    script = run("kafka_consumer.py", "--audit", env=env)
    assert script.wait() == 1
    assert len(script.lines("stderr")) == 1, script.stderr
    assert f"s3://{env['S3_BUCKET']}/stock_market_" in script.stderr
    keys = [request.key for request in requests(unlike, "get")]
    assert max(map(keys.count, keys)) >= 3  # aiohttp has tries of its own


@pytest.mark.slow
def test_100000_objects_are_audited_in_two_minutes_with_flat_memory(run, env, kafka, topic):
    count = 100_000
    values = [b'{"n": %d, "Index": "HSI", "Close": 1234.5, "Volume": 0}' % n for n in range(count)]
    produce(kafka.bootstrap, topic, values)
    peaks = {}
    with FaultyS3() as s3:
        env = {**env, "S3_ENDPOINT_URL": s3.endpoint}
        for part in (10_000, count):
            for n in range(part):
                s3.store[f"{env['S3_BUCKET']}/{object_name(0, n)}"] = values[n]
            commit(kafka.bootstrap, env["KAFKA_GROUP_ID"], topic, part)
            began = time.monotonic()
            script = run("kafka_consumer.py", "--audit", env=env)
            peaks[part] = 0.0
            while script.process.poll() is None:
                try:
                    peaks[part] = max(peaks[part], memory(script.pid))
                except (OSError, LookupError):
                    break  # it has just ended
                time.sleep(0.1)
            took = time.monotonic() - began
            assert script.wait() == 0, script.stderr
        lost = 54_321
        del s3.store[f"{env['S3_BUCKET']}/{object_name(0, lost)}"]
        code, said = audit(run, env, timeout=180)
    print(f"{count} objects in {took:.0f} s, peaks in MB {peaks}")
    assert code == 1 and f"offsets {lost} to {lost}" in said
    assert took < 120
    assert peaks[count] < peaks[10_000] + 20
