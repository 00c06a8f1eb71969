"""The broker goes away, comes back, forgets: nothing is lost or reordered, and gaps are said."""

import json
import re
import time

import pytest
from helpers import (
    assert_whole,
    commit,
    committed,
    delete_records,
    produce,
    records,
    until,
    until_done,
)
from s3_faults import FaultyS3

pytestmark = [pytest.mark.real, pytest.mark.detail]


@pytest.fixture
def settings(own, env, topic, tmp_path):
    """The settings with the broker `own`, and rows that are all different."""
    for name in (topic, f"{topic}_errors", f"{topic}_seed"):
        own.create_topic(name)
    csv = tmp_path / "rows.csv"
    csv.write_text("Index,n\n" + "".join(f"row,{n}\n" for n in range(100_000)))
    return {**env, "KAFKA_BOOTSTRAP_SERVERS": own.bootstrap, "CSV_PATH": str(csv)}


def sequence(run, own, settings, topic, seed: str, count: int) -> list[bytes]:
    """The first `count` rows that the seed gives, as the producer writes them undisturbed."""
    args = ("--rate", "0", "--seed", seed, "--max-messages", str(count))
    script = run("kafka_producer.py", *args, env={**settings, "KAFKA_TOPIC": f"{topic}_seed"})
    assert script.wait(timeout=60) == 0
    return [record.value for record in records(own.bootstrap, f"{topic}_seed")]


def through_an_outage(run, own, settings, topic, objects, outage) -> None:
    """Both scripts at 50 records a second while `outage` happens: whole, and in the order sent."""
    producer = run("kafka_producer.py", "--rate", "50", "--seed", "11", env=settings)
    consumer = run("kafka_consumer.py", env=settings)
    consumer.wait_for("stock_market_100.json", timeout=60)
    outage()
    assert producer.process.poll() is None, "the producer ended"
    assert consumer.process.poll() is None, "the consumer ended"
    group = settings["KAFKA_GROUP_ID"]
    goal = until(lambda: committed(own.bootstrap, group, topic))[0] + 300
    consumer.wait_for(rf"stock_market_{goal}\.json", timeout=60)
    producer.terminate()
    assert producer.wait() == 0
    until_done(own.bootstrap, settings["KAFKA_GROUP_ID"], topic)
    consumer.terminate()
    assert consumer.wait() == 0
    found = records(own.bootstrap, topic)
    assert_whole(found, objects())
    values = [record.value for record in found]
    # A batch whose answer was lost is sent again as it was: first occurrences show the order.
    first = list(dict.fromkeys(values))
    reference = sequence(run, own, settings, topic, "11", len(values))
    assert first == list(dict.fromkeys(reference))[: len(first)]
    assert len(values) - len(first) <= len(reference) - len(set(reference)) + 100
    assert "Traceback" not in producer.stderr + consumer.stderr


@pytest.mark.slow
def test_a_broker_stopped_for_30_s_under_load_loses_and_reorders_nothing(
    run, own, settings, topic, objects
):
    def outage() -> None:
        own.stop_broker()
        time.sleep(30)
        own.start_broker()

    through_an_outage(run, own, settings, topic, objects, outage)


@pytest.mark.slow
def test_a_broker_killed_under_load_loses_and_reorders_nothing(run, own, settings, topic, objects):
    def outage() -> None:
        own.kill()
        own.start_broker()

    through_an_outage(run, own, settings, topic, objects, outage)


@pytest.mark.slow
def test_a_zookeeper_restart_under_load_loses_and_reorders_nothing(
    run, own, settings, topic, objects
):
    through_an_outage(run, own, settings, topic, objects, own.restart_zookeeper)


def test_positions_that_retention_removed_are_said_with_the_range_lost(
    run, env, kafka, topic, objects
):
    produce(kafka.bootstrap, topic, [b'{"n": %d}' % n for n in range(30)])
    assert run("kafka_consumer.py", "--max-messages", "10", env=env).wait() == 0
    delete_records(kafka.bootstrap, topic, before=20)
    script = run("kafka_consumer.py", env=env)
    script.wait_for(rf"ERROR LOST: .* 10 to 19 of {topic}/0", stream="stderr")
    until_done(kafka.bootstrap, env["KAFKA_GROUP_ID"], topic)
    script.terminate()
    assert script.wait() == 0
    names = {f"stock_market_{n}.json" for n in [*range(10), *range(20, 30)]}
    assert set(objects()) == names
    audit = run("kafka_consumer.py", "--audit", env=env)
    assert audit.wait() == 1
    assert "STRAY" not in audit.stdout, "objects older than the topic's beginning are no strays"
    assert "LOST" in audit.stdout and "offsets 10 to 19" in audit.stdout


def test_positions_that_retention_removed_during_a_hold_are_said_too(
    run, env, kafka, topic, s3, objects
):
    """Without the safeguard the client jumps to the end in silence (auto_offset_reset=latest)."""
    with FaultyS3(s3.endpoint) as faulty:
        env = {**env, "S3_ENDPOINT_URL": faulty.endpoint, "KAFKA_AUTO_OFFSET_RESET": "latest"}
        produce(kafka.bootstrap, topic, [b'{"n": 0}'])
        commit(kafka.bootstrap, env["KAFKA_GROUP_ID"], topic, 0)
        script = run("kafka_consumer.py", env=env)
        until(faulty.stored)
        faulty.fail("503")
        produce(kafka.bootstrap, topic, [b'{"n": 1}'])
        script.wait_for("holding at", stream="stderr")
        for n in range(2, 5):
            produce(
                kafka.bootstrap, topic, [json.dumps({"n": n, "pad": "x" * 900_000}).encode()] * 4
            )
        delete_records(kafka.bootstrap, topic, before=12)
        faulty.heal()
        until_done(kafka.bootstrap, env["KAFKA_GROUP_ID"], topic)
        script.terminate()
        assert script.wait() == 0
    written = {int(name.split("_")[2].split(".")[0]) for name in objects()}
    assert written >= {0, 1, 12, 13}
    gone = set(range(14)) - written  # what was not fetched before it was removed
    if gone:
        assert f"{min(gone)}" in script.stderr and "lost" in script.stderr.lower()


def test_a_topic_made_anew_under_the_same_bucket_ends_it_and_overwrites_nothing(
    run, env, kafka, topic, objects
):
    produce(kafka.bootstrap, topic, [b'{"old": %d}' % n for n in range(5)])
    assert run("kafka_consumer.py", "--max-messages", "5", env=env).wait() == 0
    before = objects()
    kafka.delete_topic(topic)
    kafka.create_topic(topic)
    produce(kafka.bootstrap, topic, [b'{"new": %d}' % n for n in range(5)])
    script = run("kafka_consumer.py", env=env)
    assert script.wait(timeout=60) == 1
    assert re.search(f"s3://{env['S3_BUCKET']}/stock_market_[0-4].json", script.stderr)
    assert "Traceback" not in script.stderr
    assert objects() == before
    assert committed(kafka.bootstrap, env["KAFKA_GROUP_ID"], topic).get(0, 0) == 0


def test_two_topics_under_one_prefix_end_it_at_the_first_object_of_other_bytes(
    run, env, kafka, topic, s3, objects
):
    """The records before the difference are written and committed; the one that differs is not."""
    s3.client().put_object(Bucket=env["S3_BUCKET"], Key="stock_market_3.json", Body=b'{"other": 1}')
    produce(kafka.bootstrap, topic, [b'{"n": %d}' % n for n in range(6)])
    script = run("kafka_consumer.py", env=env)
    assert script.wait(timeout=60) == 1
    assert "stock_market_3.json" in script.stderr
    assert objects()["stock_market_3.json"] == b'{"other": 1}'
    assert committed(kafka.bootstrap, env["KAFKA_GROUP_ID"], topic) == {0: 3}


def test_a_record_too_large_for_the_broker_is_named_and_ends_the_producer(
    run, env, kafka, topic, tmp_path
):
    csv = tmp_path / "large.csv"
    csv.write_text("Index,text\nlarge," + "x" * 1_200_000 + "\n")
    script = run("kafka_producer.py", "--max-messages", "1", env={**env, "CSV_PATH": str(csv)})
    assert script.wait() == 1
    assert "large" in script.stderr.lower() and "Traceback" not in script.stderr
    assert records(kafka.bootstrap, topic) == []


def test_a_record_too_large_for_the_topic_alone_ends_the_producer_too(
    run, env, kafka, topic, tmp_path
):
    """The client lets it pass; the broker refuses it, and no later record goes past it."""
    kafka.create_topic(f"{topic}_small", config={"max.message.bytes": "2000"})
    csv = tmp_path / "rows.csv"
    csv.write_text("Index,text\nlarge," + "x" * 5000 + "\n")
    settings = {**env, "CSV_PATH": str(csv), "KAFKA_TOPIC": f"{topic}_small"}
    script = run("kafka_producer.py", "--rate", "20", env=settings)
    assert script.wait() == 1
    assert "Traceback" not in script.stderr
    assert records(kafka.bootstrap, f"{topic}_small") == []


def test_a_topic_made_anew_with_fewer_partitions_ends_the_producer_with_a_word(
    run, env, kafka, topic
):
    name = f"{topic}_shrinks"
    kafka.create_topic(name, partitions=3)
    env = {**env, "KAFKA_TOPIC": name}
    # At full speed, so that records of all partitions wait whenever the client learns of it. A
    # producer with none in hand for a partition that is gone just goes on in those that are left.
    script = run("kafka_producer.py", "--rate", "0", env=env)
    script.wait_for("unacknowledged")
    kafka.delete_topic(name)
    kafka.create_topic(name)
    assert script.wait(60) == 1
    assert re.search(
        rf"ERROR topic {name} has no partition [12] any more.*Start again", script.stderr
    )
    assert "may or may not be in the topic" in script.stderr
