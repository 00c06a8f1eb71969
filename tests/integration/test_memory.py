"""The consumer's memory grows neither with the backlog nor with time nor in a hold."""

import time

import pytest
from helpers import load, memory, produce, until
from s3_faults import FaultyS3

pytestmark = [pytest.mark.real, pytest.mark.slow]

PAD = b"x" * 300


def test_the_peak_is_the_same_for_a_backlog_of_5000_and_of_50000(run, env, kafka, topic):
    peaks = {}
    for count in (5_000, 50_000):
        name = f"{topic}_{count}"
        kafka.create_topic(name)
        produce(kafka.bootstrap, name, [b'{"n": %d, "pad": "%s"}' % (n, PAD) for n in range(count)])
        settings = {**env, "KAFKA_TOPIC": name, "KAFKA_GROUP_ID": name}
        with FaultyS3() as s3:
            script = run("kafka_consumer.py", env={**settings, "S3_ENDPOINT_URL": s3.endpoint})
            until(lambda s3=s3, n=count: len(s3.store) == n, timeout=240, what=f"{count} objects")
            peaks[count] = memory(script.pid)
            script.terminate()
            assert script.wait() == 0
    print("peaks, MB:", peaks)
    assert peaks[50_000] < peaks[5_000] + 10


def test_an_hours_messages_sped_up_leave_it_as_it_was(run, env, kafka, topic):
    """3,600 messages at 100/s; the memory after the first 600 is what it stays at."""
    with FaultyS3(latency=0.005) as s3, load(kafka.bootstrap, [topic], 100):
        script = run("kafka_consumer.py", env={**env, "S3_ENDPOINT_URL": s3.endpoint})
        until(lambda: len(s3.store) > 600, timeout=60)
        early = memory(script.pid)
        until(lambda: len(s3.store) > 3600, timeout=120)
        late = memory(script.pid)
    print(f"peak after 600: {early:.1f} MB, after 3600: {late:.1f} MB")
    assert late < early + 5


def test_a_hold_before_a_growing_backlog_takes_no_more_memory(run, env, kafka, topic):
    with FaultyS3() as s3:
        script = run("kafka_consumer.py", env={**env, "S3_ENDPOINT_URL": s3.endpoint})
        produce(kafka.bootstrap, topic, [b"{}"] * 2000)
        until(lambda: len(s3.store) == 2000)
        before = memory(script.pid)
        s3.fail("503")
        for _ in range(10):
            produce(kafka.bootstrap, topic, [b'{"pad": "%s"}' % (PAD * 10)] * 2000)
            time.sleep(1)
        during = memory(script.pid)
    print(f"before the hold {before:.1f} MB, after 60 MB of backlog {during:.1f} MB")
    assert during < before + 15
