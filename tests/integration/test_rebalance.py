"""Several consumers of one group: members join, leave and die, and every record is one object."""

import random
import time

import pytest
from helpers import assert_whole, committed, load, members, produce, records, until, until_done
from s3_faults import FaultyS3

pytestmark = pytest.mark.real


@pytest.fixture
def settings(kafka, env):
    kafka.create_topic(f"{env['KAFKA_TOPIC']}_4", partitions=4)
    return {**env, "KAFKA_TOPIC": f"{env['KAFKA_TOPIC']}_4"}


def prove(run, kafka, settings, objects) -> None:
    topic, group = settings["KAFKA_TOPIC"], settings["KAFKA_GROUP_ID"]
    until_done(kafka.bootstrap, group, topic, timeout=90)
    assert_whole(records(kafka.bootstrap, topic), objects())
    audit = run("kafka_consumer.py", "--audit", env=settings)
    assert audit.wait(timeout=60) == 0
    for script in run.scripts:
        assert "Traceback" not in script.stderr


def test_a_member_that_joins_and_one_that_leaves_send_nothing_again(
    run, kafka, settings, s3, objects
):
    """What was given up had been committed first; uploads were in flight each time, and many more
    records in hand than S3 takes in the 2 s that there are for it."""
    topic, group = settings["KAFKA_TOPIC"], settings["KAFKA_GROUP_ID"]
    with FaultyS3(s3.endpoint, latency=0.7) as faulty:
        env = {**settings, "S3_ENDPOINT_URL": faulty.endpoint}
        with load(kafka.bootstrap, [topic], 100):
            first = run("kafka_consumer.py", env=env)
            first.wait_for("Upload Successfully")
            second = run("kafka_consumer.py", env=env)
            second.wait_for("Upload Successfully")
            until(lambda: len(members(kafka.bootstrap, group)) == 2)
            first.terminate()
            assert first.wait() == 0
            seen = len(second.lines())
            until(lambda: len(second.lines()) > seen + 100)
        faulty.latency = 0.01
        prove(run, kafka, settings, objects)
        second.terminate()
        assert second.wait() == 0
        again = [put for put in faulty.puts() if put.status == 412]
        stored = [put.key for put in faulty.stored()]
        assert len(stored) == len(set(stored)), "overwritten"
        # The first object of a run is put twice: the server has to refuse the second.
        assert len({put.key for put in again}) == len(again) <= 2


@pytest.mark.slow
def test_a_group_rebalances_while_s3_fails_and_no_record_is_skipped(
    run, kafka, settings, s3, objects
):
    topic, group = settings["KAFKA_TOPIC"], settings["KAFKA_GROUP_ID"]
    with FaultyS3(s3.endpoint) as faulty:
        env = {**settings, "S3_ENDPOINT_URL": faulty.endpoint}
        first = run("kafka_consumer.py", env=env)
        produce(kafka.bootstrap, topic, [b"{}"] * 20)
        first.wait_for("Upload Successfully")
        faulty.fail("503", only=("put",))
        for partition in range(4):
            produce(kafka.bootstrap, topic, [b'{"n": 1}'] * 50, partition=partition)
        first.wait_for("holding at", stream="stderr")
        second = run("kafka_consumer.py", env=env)
        until(lambda: len(members(kafka.bootstrap, group)) == 2, what="two members")
        second.wait_for("holding at", stream="stderr")
        time.sleep(2)
        faulty.heal()
        prove(run, kafka, settings, objects)
        for script in (first, second):
            script.terminate()
            assert script.wait() == 0


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_consumers_joining_leaving_and_killed_every_few_seconds_lose_nothing(
    run, kafka, settings, s3, objects, count
):
    topic = settings["KAFKA_TOPIC"]
    chance = random.Random(count)
    with FaultyS3(s3.endpoint, latency=0.025) as faulty:
        env = {**settings, "S3_ENDPOINT_URL": faulty.endpoint}
        with load(kafka.bootstrap, [topic], 60):
            alive = [run("kafka_consumer.py", env=env) for _ in range(count)]
            until(faulty.stored)
            end = time.monotonic() + 60
            while time.monotonic() < end:
                time.sleep(chance.uniform(2, 5))
                script = alive.pop(0)
                if chance.random() < 0.5:
                    script.kill()
                else:
                    script.terminate()
                    assert script.wait(timeout=10) == 0
                alive.append(run("kafka_consumer.py", env=env))
                assert all(s.process.poll() is None for s in alive)
        prove(run, kafka, settings, objects)
        for script in alive:
            script.terminate()
            assert script.wait() == 0
        stored = [put.key for put in faulty.stored()]
        assert len(stored) == len(set(stored)), "overwritten"
        assert sum(committed(kafka.bootstrap, settings["KAFKA_GROUP_ID"], topic).values()) == len(
            stored
        )
