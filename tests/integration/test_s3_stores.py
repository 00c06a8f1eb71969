"""Buckets and stores as they are: what works on each, and what one line says where it cannot."""

import hashlib
import re

import pytest
from helpers import assert_whole, committed, object_name, produce, records, until
from s3_faults import FaultyS3, page, raw_answer

pytestmark = [pytest.mark.real, pytest.mark.detail]

VALUES = [b'{"n": %d}' % n for n in range(20)]
COUNT = str(len(VALUES))


@pytest.fixture
def backlog(kafka, topic):
    """VALUES, in the topic."""
    produce(kafka.bootstrap, topic, VALUES)


@pytest.fixture
def consume(run, env, backlog):
    """Starts a consumer of VALUES at this endpoint."""

    def start(s3: FaultyS3, **settings: str):
        return run(
            "kafka_consumer.py",
            *("--max-messages", COUNT),
            env={**env, "S3_ENDPOINT_URL": s3.endpoint, **settings},
        )

    return start


def keys(bucket: str) -> list[str]:
    """The names of VALUES' objects, with the bucket."""
    return [f"{bucket}/{object_name(0, n)}" for n in range(len(VALUES))]


def errors(script) -> list[str]:
    return [line for line in script.lines("stderr") if " ERROR " in line]


def test_the_look_whether_a_bucket_can_be_written_to_leaves_nothing_in_it(run, env, kafka, topic):
    with FaultyS3(traits={"ignores conditions"}) as s3:
        s3.fail("403", only=("list", "head_bucket", "location"))
        env = {**env, "S3_ENDPOINT_URL": s3.endpoint}
        script = run("kafka_consumer.py", env=env)
        script.wait_for("--audit", stream="stderr")
        assert s3.store == {}


def test_a_store_that_ignores_the_condition_ends_it_at_the_first_object(
    consume, env, kafka, topic, bucket
):
    with FaultyS3(traits={"ignores conditions"}) as s3:
        s3.store[keys(bucket)[7]] = b'{"n": "of another topic"}'
        script = consume(s3)
        assert script.wait(15) == 1
        (line,) = errors(script)
        assert "If-None-Match" in line and s3.endpoint in line
        assert {put.key for put in s3.puts()} == {keys(bucket)[0]}
        assert s3.store[keys(bucket)[7]] == b'{"n": "of another topic"}'
    assert committed(kafka.bootstrap, env["KAFKA_GROUP_ID"], topic) in ({0: 0}, {0: 1})


def test_a_store_that_does_not_know_the_condition_ends_it_with_the_reason(
    consume, env, kafka, topic
):
    with FaultyS3(traits={"knows no condition"}) as s3:
        script = consume(s3)
        assert script.wait(15) == 1
        assert s3.stored() == []
    (line,) = errors(script)
    assert "If-None-Match" in line and re.search("501|NotImplemented", line)
    assert committed(kafka.bootstrap, env["KAFKA_GROUP_ID"], topic) == {0: 0}


def test_a_bucket_with_object_lock_takes_every_object(consume, kafka, topic, s3, objects):
    with FaultyS3(s3.endpoint, traits={"object lock"}) as lock:
        assert consume(lock).wait(15) == 0
        assert len(lock.stored()) == len(VALUES)
    assert_whole(records(kafka.bootstrap, topic), objects())


def test_a_replay_over_archived_objects_compares_etags_and_reads_none(consume, s3, bucket):
    client = s3.client()
    for n, value in enumerate(VALUES):
        client.put_object(Bucket=bucket, Key=object_name(0, n), Body=value)
    with FaultyS3(s3.endpoint, traits={"archived"}) as archive:
        assert consume(archive).wait(15) == 0
        assert archive.stored() == []
        assert archive.seen("get") == []


def test_an_archived_object_that_has_to_be_read_is_said_with_what_to_do(consume, topic, bucket):
    with FaultyS3(traits={"archived", "encrypted"}) as archive:
        archive.store |= dict(zip(keys(bucket), VALUES, strict=True))
        script = consume(archive)
        line = rf"holding at {topic}/0/0: InvalidObjectState: .*\(.*restore.*\)"
        script.wait_for(line, timeout=15, stream="stderr")
        archive.traits.discard("archived")
        assert script.wait(15) == 0
        assert archive.stored() == []


def test_where_s3_encrypts_an_etag_that_is_no_md5_proves_nothing(consume, bucket):
    """New objects are made by S3's word, those that are there are read and compared."""
    with FaultyS3(traits={"encrypted"}) as s3:
        s3.store |= dict(zip(keys(bucket)[:5], VALUES, strict=False))
        assert consume(s3).wait(15) == 0
        assert s3.store == dict(zip(keys(bucket), VALUES, strict=True))
        assert {get.key for get in s3.seen("get")} <= {*keys(bucket)[:5]}
        assert len(s3.stored()) == len(VALUES) - 5


def test_where_s3_encrypts_other_bytes_are_a_conflict(consume, bucket):
    with FaultyS3(traits={"encrypted"}) as s3:
        s3.store[keys(bucket)[3]] = b'{"n": "other"}'
        script = consume(s3)
        assert script.wait(15) == 1
    (line,) = errors(script)
    assert f"s3://{bucket}/{object_name(0, 3)} is there with other bytes" in line


def test_an_etag_that_nothing_explains_has_the_object_read(consume, bucket):
    with FaultyS3() as s3:
        s3.etags = {key: hashlib.md5(key.encode()).hexdigest() for key in keys(bucket)}
        assert consume(s3).wait(15) == 0
        assert {get.key for get in s3.seen("get")} == set(keys(bucket))


@pytest.mark.parametrize("waiting", [0, 700])
def test_a_policy_that_denies_one_partitions_folder_holds_that_partition_alone(
    run, env, kafka, topic, s3, objects, waiting
):
    """Promise 9; also where it has more records than may be in hand."""
    two = f"{topic}_two"
    kafka.create_topic(two, partitions=2)
    for partition in (0, 1):
        produce(kafka.bootstrap, two, VALUES, partition=partition)
    last = len(VALUES) + waiting - 1
    if waiting:
        produce(kafka.bootstrap, two, [b'{"waits": 1}'] * waiting, partition=1)
    settings = {**env, "KAFKA_TOPIC": two, "KAFKA_GROUP_ID": two}
    with FaultyS3(s3.endpoint) as faulty:
        faulty.fail("403", only=("partition=1/",))
        script = run("kafka_consumer.py", env={**settings, "S3_ENDPOINT_URL": faulty.endpoint})
        script.wait_for(f"holding at {two}/1/0: AccessDenied", timeout=15, stream="stderr")
        until(
            lambda: committed(kafka.bootstrap, two, two) == {0: len(VALUES), 1: 0},
            timeout=10,
            what="the other partition done",
        )
        more = produce(kafka.bootstrap, two, [b'{"later": 1}'] * 5, partition=0)
        script.wait_for(object_name(0, more[-1]), timeout=5, stream="stdout")
        assert len([ln for ln in script.lines("stderr") if "holding at" in ln]) == 1
        faulty.heal()
        script.wait_for("answers again", timeout=5, stream="stderr")
        script.wait_for(object_name(1, last), stream="stdout")
        script.terminate()
        assert script.wait(15) == 0
    assert_whole(records(kafka.bootstrap, two), objects())


def test_a_directory_bucket_works_or_is_one_line(consume):
    with FaultyS3() as s3:
        script = consume(s3, S3_BUCKET="express--use1-az4--x-s3")
        if script.wait(15) == 0:
            assert len(s3.store) == len(VALUES)
        else:
            (line,) = script.lines("stderr")
            assert "express--use1-az4--x-s3" in line and "directory" in line
    assert "Traceback" not in script.stderr


@pytest.mark.parametrize(
    "raw",
    [page(), page(502), raw_answer(200, b"<html/>"), raw_answer(204)],
    ids=["page", "page with 502", "page that is well-formed XML", "nothing"],
)
def test_a_page_at_the_start_is_one_line_that_says_it_is_no_s3(run, env, raw):
    with FaultyS3() as s3:
        s3.answer(raw)
        script = run("kafka_consumer.py", env={**env, "S3_ENDPOINT_URL": s3.endpoint})
        assert script.wait(15) == 1
        (line,) = errors(script)
    assert re.search("no (S3 answer|answer of S3)", line) and s3.endpoint in line
    assert "Internal Server Error" not in line, "nobody said that"


@pytest.mark.parametrize("address", ["{endpoint}/{bucket}", "http://{bucket}.s3.amazonaws.com"])
def test_an_endpoint_with_the_bucket_in_it_is_refused(run, env, address):
    endpoint = address.format(endpoint=env["S3_ENDPOINT_URL"], bucket=env["S3_BUCKET"])
    script = run("kafka_consumer.py", env={**env, "S3_ENDPOINT_URL": endpoint})
    assert script.wait(15) == 2
    (line,) = script.lines("stderr")
    assert "S3_ENDPOINT_URL" in line and "bucket" in line


@pytest.mark.parametrize("prefix", ["p" * 1000 + "/", "ü" * 500 + "/"], ids=["ASCII", "UTF-8"])
def test_a_prefix_too_long_for_the_names_is_refused(run, env, prefix):
    """S3 counts bytes, not characters."""
    script = run("kafka_consumer.py", env={**env, "S3_PREFIX": prefix})
    assert script.wait(15) == 2
    (line,) = script.lines("stderr")
    assert "S3_PREFIX" in line and re.search(r"at most \d+ bytes|1,?024", line)


def test_more_uploads_at_once_than_records_in_hand_are_said(run, env, kafka, topic):
    produce(kafka.bootstrap, topic, [b"{}"])
    script = run(
        "kafka_consumer.py", "--max-messages", "1", env={**env, "S3_MAX_CONCURRENCY": "300"}
    )
    assert script.wait(30) == 0
    assert re.search(r"S3_MAX_CONCURRENCY='?300'?.*\b256\b", script.stderr)


def test_on_a_store_that_ignores_the_condition_not_even_the_first_object_is_replaced(
    consume, bucket
):
    with FaultyS3(traits={"ignores conditions"}) as s3:
        s3.store[keys(bucket)[0]] = b'{"precious": 1}'
        script = consume(s3)
        assert script.wait(15) == 1
        (line,) = errors(script)
        assert "is there with other bytes" in line
        assert s3.store[keys(bucket)[0]] == b'{"precious": 1}'


def test_the_region_that_s3_names_is_the_one_that_uploads_are_signed_for(
    run, env, kafka, topic, backlog, objects
):
    env = {**env, "AWS_DEFAULT_REGION": "eu-west-3"}
    script = run("kafka_consumer.py", "--max-messages", COUNT, env=env)
    assert script.wait() == 0
    assert_whole(records(kafka.bootstrap, topic), objects())


def test_a_file_of_authorities_that_is_not_there_is_named(run, env):
    script = run("kafka_consumer.py", env={**env, "AWS_CA_BUNDLE": "/nowhere/ca.pem"})
    assert script.wait(15) == 1
    (line,) = errors(script)
    assert "AWS_CA_BUNDLE=/nowhere/ca.pem" in line
