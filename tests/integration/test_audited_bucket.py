"""`--audit` (promise 11): clean is clean, what is wrong is named, nothing is written."""

import hashlib
import time
from contextlib import ExitStack

import pytest
from helpers import commit, committed, memory, object_name, produce, records
from s3_faults import FaultyS3

pytestmark = pytest.mark.real


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


def audit(run, env, timeout=30):
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
