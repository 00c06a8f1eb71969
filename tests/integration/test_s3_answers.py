"""What counts as an object made, and as a conflict: S3's own answer, and nothing else (promise 2).

Between the consumer and S3 stand proxies, balancers and captive portals, and each of them can
answer in S3's place.
"""

import hashlib
import re

import pytest
from helpers import assert_whole, committed, object_name, produce, records, until_done
from s3_faults import FaultyS3, page, raw_answer, redirect, s3_error, undecodable

pytestmark = [pytest.mark.real, pytest.mark.detail]

OTHER_ETAG = {"ETag": f'"{hashlib.md5(b"other bytes").hexdigest()}"'}
NO_ANSWER_OF_S3 = {
    "a page": page(),
    "a page with 412": page(412),
    "an error of S3 with 200": s3_error(200, "InternalError", "We encountered an internal error."),
    "200 without ETag": raw_answer(200),
    "200 with the ETag of other bytes": raw_answer(200, fields=OTHER_ETAG),
    "204": raw_answer(204),
    "a body that cannot be decoded": undecodable(502),
}


@pytest.fixture
def faulty(s3):
    with FaultyS3(s3.endpoint) as faulty:
        yield faulty


@pytest.fixture
def elsewhere():
    """Another address, to which answers send the consumer: it takes everything."""
    with FaultyS3() as elsewhere:
        elsewhere.answer(page(), only=("get", "list", "head"))
        yield elsewhere


@pytest.fixture
def consumer(run, env, faulty, kafka, topic):
    """A consumer that has written a first object through the failing endpoint."""
    produce(kafka.bootstrap, topic, [b'{"n": 0}'])
    script = run("kafka_consumer.py", env={**env, "S3_ENDPOINT_URL": faulty.endpoint})
    script.wait_for("Upload Successfully", stream="stdout")
    return script


@pytest.fixture
def holds(kafka, topic, env, consumer, faulty):
    """holds(raw, said): with this answer to PUTs the next record is held, `said` is in the line
    that says so, and the object is made when S3 itself answers again."""

    def check(raw: bytes, said: str = "") -> None:
        faulty.answer(raw, only=("put",))
        try:
            (offset,) = produce(kafka.bootstrap, topic, [b'{"answer": "not S3\'s"}'])
            at = rf"holding at {topic}/0/{offset}: .*{said}"
            consumer.wait_for(at, timeout=5, stream="stderr")
            assert committed(kafka.bootstrap, env["KAFKA_GROUP_ID"], topic) == {0: offset}
            assert object_name(0, offset) not in consumer.stdout
        finally:
            faulty.heal()
        consumer.wait_for(re.escape(object_name(0, offset)), timeout=5, stream="stdout")

    return check


def ends_whole(consumer, kafka, topic, env, objects) -> None:
    until_done(kafka.bootstrap, env["KAFKA_GROUP_ID"], topic)
    consumer.terminate()
    assert consumer.wait() == 0
    assert "Traceback" not in consumer.stderr
    assert_whole(records(kafka.bootstrap, topic), objects())


def test_what_is_not_s3s_own_answer_makes_no_object(
    kafka, topic, env, consumer, holds, objects, subtests
):
    for name, raw in NO_ANSWER_OF_S3.items():
        with subtests.test(name):
            holds(raw)
    with subtests.test("at the end"):
        ends_whole(consumer, kafka, topic, env, objects)


def test_a_balancer_that_answers_a_third_of_the_uploads_itself_costs_no_record(
    run, env, kafka, topic, faulty, objects
):
    produce(kafka.bootstrap, topic, [b'{"n": %d}' % n for n in range(30)])
    faulty.answer(page(), probability=0.33, only=("put",))
    settings = {**env, "S3_ENDPOINT_URL": faulty.endpoint}
    assert run("kafka_consumer.py", "--max-messages", "30", env=settings).wait() == 0
    assert_whole(records(kafka.bootstrap, topic), objects())


def test_no_redirect_is_followed_and_the_line_says_where_it_leads_and_what_to_set(
    kafka, topic, env, consumer, holds, objects, elsewhere, subtests
):
    host = f"{re.escape(elsewhere.endpoint.removeprefix('http://'))}.*S3_ENDPOINT_URL"
    for status in (301, 302, 303, 307):
        with subtests.test(f"{status} to another host"):
            holds(redirect(status, f"{elsewhere.endpoint}/other"), host)
    with subtests.test("301 to another region"):
        there = redirect(301, f"{elsewhere.endpoint}/other", region="eu-central-1")
        holds(there, "(?=.*eu-central-1).*AWS_DEFAULT_REGION")
    with subtests.test("nothing was sent to the other host"):
        assert elsewhere.requests == []
    with subtests.test("at the end"):
        ends_whole(consumer, kafka, topic, env, objects)


@pytest.mark.parametrize("traits", [(), ("encrypted",)], ids=["the ETag is the MD5", "it is not"])
def test_a_page_in_answer_to_the_comparison_is_no_conflict(run, env, kafka, topic, bucket, traits):
    values = [b'{"n": %d}' % n for n in range(3)]
    produce(kafka.bootstrap, topic, values)
    with FaultyS3(traits=traits) as s3:
        s3.store |= {f"{bucket}/{object_name(0, n)}": value for n, value in enumerate(values)}
        s3.answer(page(), only=("get", "head"))
        script = run(
            "kafka_consumer.py", "--max-messages", "3", env={**env, "S3_ENDPOINT_URL": s3.endpoint}
        )
        script.wait_for(f"holding at {topic}/0/0: ", timeout=15, stream="stderr")
        s3.heal()
        assert script.wait() == 0, script.stderr
        assert s3.stored() == []


def test_the_reason_of_the_end_is_the_last_line(run, env, kafka, topic, bucket):
    """Not a word about the uploads that the end cut off."""
    produce(kafka.bootstrap, topic, [b'{"n": %d}' % n for n in range(300)])
    with FaultyS3(latency=0.1) as s3:
        s3.store[f"{bucket}/{object_name(0, 5)}"] = b'{"n": "other"}'
        script = run("kafka_consumer.py", env={**env, "S3_ENDPOINT_URL": s3.endpoint})
        assert script.wait() == 1
    conflict = rf"s3://{bucket}/{object_name(0, 5)} is there with other bytes"
    assert re.search(conflict, script.lines("stderr")[-1]), script.stderr
