"""Slow links and a silent S3: what is bounded is silence, not progress (promises 4 and 6)."""

import time

import pytest
from helpers import memory, object_name, produce, until
from s3_faults import FaultyS3

pytestmark = [pytest.mark.real, pytest.mark.detail]

MB = 1_000_000


def large(n: int, size: int = MB) -> bytes:
    """A JSON object of `size` bytes."""
    start = b'{"n": %d, "pad": "' % n
    return start + b"x" * (size - len(start) - 2) + b'"}'


def holds(script) -> list[str]:
    return [line for line in script.lines("stderr") if "holding at" in line]


@pytest.fixture
def uploaded(run, env, kafka, topic, bucket):
    """uploaded(s3, count, within): the consumer writes so many records of 1 MB at this endpoint."""

    def check(s3: FaultyS3, count: int, within: float):
        values = [large(n) for n in range(count)]
        produce(kafka.bootstrap, topic, values)
        script = run(
            *("kafka_consumer.py", "--max-messages", str(count)),
            env={**env, "S3_ENDPOINT_URL": s3.endpoint},
        )
        assert script.wait(within) == 0
        assert s3.store == {f"{bucket}/{object_name(0, n)}": v for n, v in enumerate(values)}
        return script

    return check


# The first object is sent twice, to see that the store keeps the condition.
ONCE = 1.1 * MB


@pytest.mark.slow
def test_a_link_of_90_kb_a_second_gets_records_of_1_mb_up(uploaded):
    """Each takes 11 s, on a connection of its own; none is sent twice."""
    with FaultyS3(bandwidth=90_000) as s3:
        script = uploaded(s3, 4, within=90)
        assert s3.received <= 4 * MB + ONCE
    assert holds(script) == []


@pytest.mark.slow
def test_a_link_of_90_kb_a_second_behind_a_buffer_gets_them_up_too(uploaded):
    """All is sent at once, and then it is silent for 11 s: an upload that was given up can arrive
    all the same."""
    with FaultyS3(bandwidth=90_000, buffered=True) as s3:
        uploaded(s3, 4, within=90)
        assert s3.received <= 3 * 4 * MB + ONCE


@pytest.mark.slow
def test_a_link_that_64_uploads_share_sends_nothing_anew(uploaded):
    with FaultyS3(total_bandwidth=MB) as s3:
        script = uploaded(s3, 60, within=120)
        assert s3.received <= 60 * MB + ONCE
    assert holds(script) == []


@pytest.mark.slow
def test_a_link_that_64_uploads_share_behind_a_buffer_gets_them_up(uploaded):
    with FaultyS3(total_bandwidth=MB, buffered=True) as s3:
        uploaded(s3, 60, within=240)
        assert s3.received <= 2 * 60 * MB


@pytest.fixture
def store():
    with FaultyS3(latency=0.02) as store:
        yield store


@pytest.fixture
def consumer(run, env, kafka, topic, store):
    """A consumer that has written a first object to the store."""
    produce(kafka.bootstrap, topic, [b'{"n": -1}'])
    script = run("kafka_consumer.py", env={**env, "S3_ENDPOINT_URL": store.endpoint})
    script.wait_for("Upload Successfully", stream="stdout")
    return script


def test_after_a_time_out_it_first_asks_whether_the_object_is_there(
    consumer, store, kafka, topic, bucket
):
    """S3 stores and never says so: the object is not sent again and again."""
    store.fail("mute", only=("put",))
    produce(kafka.bootstrap, topic, [large(1, 400_000)])
    name = object_name(0, 1)
    consumer.wait_for(name, timeout=25, stream="stdout")
    assert [put.key for put in store.stored()].count(f"{bucket}/{name}") == 1
    assert len([put for put in store.puts() if put.key.endswith(name)]) == 1


@pytest.mark.slow
def test_after_a_hold_by_time_out_the_number_under_way_grows_from_one(
    consumer, store, kafka, topic
):
    store.fail("hang")
    produce(kafka.bootstrap, topic, [b'{"n": %d}' % n for n in range(200)])
    consumer.wait_for("holding at", stream="stderr")
    store.latency = 0.2
    healed = time.monotonic()
    store.heal()
    until(lambda: len(store.stored(healed)) >= 100, timeout=20)
    answered = store.stored(healed)
    for put in answered[:32]:
        before = [other for other in answered if other.time + other.took <= put.time]
        under_way = [
            other for other in answered if other.time <= put.time < other.time + other.took
        ]
        assert len(under_way) <= 2 * len(before) + 2, "all at once"


@pytest.mark.slow
def test_after_silence_records_of_1_mb_go_on_within_5_s_of_recovery(consumer, store, kafka, topic):
    for silence in (4, 9, 14):
        store.fail("hang")
        produce(kafka.bootstrap, topic, [large(n) for n in range(10)])
        time.sleep(silence)
        healed = time.monotonic()
        store.heal()
        until(lambda t=healed: store.stored(t), timeout=5, what=f"an object after {silence} s")
        until(lambda t=healed: len(store.stored(t)) == 10, timeout=30)
    consumer.terminate()
    assert consumer.wait() == 0


@pytest.mark.slow
def test_a_hold_takes_no_more_memory_the_larger_the_records_are(consumer, store, kafka, topic):
    """About 32 MB are in hand, and what the client has fetched; not 256 records of any size."""
    before = memory(consumer.pid)
    store.fail("503")
    produce(kafka.bootstrap, topic, [large(n) for n in range(200)])
    consumer.wait_for("holding at", stream="stderr")
    time.sleep(15)
    during = memory(consumer.pid)
    print(f"before the hold {before:.1f} MB, at its end {during:.1f} MB")
    assert during < before + 90
