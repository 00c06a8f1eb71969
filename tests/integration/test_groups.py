"""What a group waits for is said; where it begins and what it has lost is never a guess."""

import re
import signal
import time
from pathlib import Path

import pytest
from confluent_kafka import Consumer
from confluent_kafka.admin import AdminClient, NewPartitions
from helpers import committed, delete_records, members, positions, produce, until, until_done

pytestmark = [pytest.mark.real, pytest.mark.detail]

SOON = 15  # seconds within which promise 9 wants a word


def numbered(first: int, last: int) -> list[bytes]:
    """Records whose values are all different."""
    return [b'{"n": %d}' % n for n in range(first, last)]


# --------------------------------------------------------------------- what a group waits for


def test_a_consumer_without_a_partition_says_why(run, env, topic):
    first = run("kafka_consumer.py", env=env)
    first.wait_for(rf"assigned: {topic}/0", stream="stderr")
    second = run("kafka_consumer.py", env=env)
    why = "more consumers than partitions|no partition"
    either = until(lambda: [s for s in (first, second) if re.search(why, s.stderr)], SOON, why)
    assert len(either) == 1, "one of them has the partition"
    for script in (first, second):
        script.terminate()
    for script in (first, second):
        assert script.wait() == 0


@pytest.mark.slow
def test_a_restart_after_kill_9_says_that_it_waits_for_the_group(run, env, kafka, topic):
    """The broker waits for the killed member's session: 6 s."""
    produce(kafka.bootstrap, topic, numbered(0, 1))
    first = run("kafka_consumer.py", env=env)
    until(lambda: committed(kafka.bootstrap, env["KAFKA_GROUP_ID"], topic).get(0) == 1)
    first.kill()
    second = run("kafka_consumer.py", env=env)
    wait = r"(?i)\bwait.*\b(group|session|member)|\b(group|session|member).*\bwait"
    said = second.wait_for(wait, timeout=SOON, stream="stderr").start()
    assigned = second.wait_for(rf"assigned: {topic}/0", stream="stderr").start()
    assert said < assigned, "said when it was over"
    second.terminate()
    assert second.wait() == 0


def test_commits_that_the_broker_does_not_take_are_said(run, env, own, objects):
    """Fewer copies of the topic of positions are in sync than it wants."""
    topic, group = env["KAFKA_TOPIC"], env["KAFKA_GROUP_ID"]
    own.create_topic(topic)
    own.create_topic(f"{topic}_errors")
    produce(own.bootstrap, topic, numbered(0, 10))
    settings = {**env, "KAFKA_BOOTSTRAP_SERVERS": own.bootstrap}
    script = run("kafka_consumer.py", env=settings)
    until(lambda: committed(own.bootstrap, group, topic).get(0) == 10)
    change = ("--bootstrap-server", own.bootstrap, "--alter", "--entity-type", "topics")
    change += ("--entity-name", "__consumer_offsets")
    own.command("kafka.admin.ConfigCommand", *change, "--add-config", "min.insync.replicas=2")
    produce(own.bootstrap, topic, numbered(10, 500))
    said = rf"group {group}: the broker takes no commit: .*__consumer_offsets"
    script.wait_for(said, timeout=SOON, stream="stderr")
    assert len(objects()) == 10 + 256, "no more than a kill would send again"
    own.command("kafka.admin.ConfigCommand", *change, "--delete-config", "min.insync.replicas")
    until_done(own.bootstrap, group, topic)
    script.wait_for("the broker takes a commit again", stream="stderr")
    script.terminate()
    assert script.wait() == 0


def test_another_prefix_with_an_old_group_is_told_where_its_objects_begin(run, env, kafka, topic):
    produce(kafka.bootstrap, topic, numbered(0, 8))
    assert run("kafka_consumer.py", "--max-messages", "5", env=env).wait() == 0
    settings = {**env, "S3_PREFIX": "other/"}
    script = run("kafka_consumer.py", "--max-messages", "3", env=settings)
    line = script.wait_for(r"^.*other/.*$", timeout=SOON, stream="stderr")[0]
    assert re.search(r"\b5\b", line), line
    assert env["KAFKA_GROUP_ID"] in line or "group" in line, line
    assert script.wait() == 0


# ------------------------------------------------------------------------ where it begins


@pytest.mark.parametrize("attempt", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 3))])
def test_two_consumers_started_at_once_with_latest_both_begin_at_the_end(
    run, env, kafka, topic, objects, attempt
):
    """A third member keeps the group's first generation open until both have joined it."""
    name, group = f"{topic}_latest", env["KAFKA_GROUP_ID"]
    kafka.create_topic(name, partitions=2)
    for partition in range(2):
        produce(kafka.bootstrap, name, numbered(0, 50), partition=partition)
    third = Consumer(
        {
            "bootstrap.servers": kafka.bootstrap,
            "group.id": group,
            "enable.auto.commit": False,
            "partition.assignment.strategy": "range",
        }
    )
    third.subscribe([name])
    until(lambda: third.poll(0.1) or third.assignment())
    settings = {**env, "KAFKA_TOPIC": name, "KAFKA_AUTO_OFFSET_RESET": "latest"}
    scripts = [run("kafka_consumer.py", env=settings) for _ in range(2)]
    until(lambda: len(members(kafka.bootstrap, group)) == 3, what="three members")
    third.close()
    for script in scripts:
        script.wait_for(rf"assigned: {name}/\d", stream="stderr")
    until(lambda: len(committed(kafka.bootstrap, group, name)) == 2, what="two positions")
    for partition in range(2):
        produce(kafka.bootstrap, name, numbered(50, 51), partition=partition)
    until_done(kafka.bootstrap, group, name)
    for script in scripts:
        script.terminate()
        assert script.wait() == 0
    assert set(objects()) == {"stock_market_50.json", "partition=1/stock_market_50.json"}


# ------------------------------------------------------------------------- what was lost


def note(bootstrap: str, group: str, topic: str) -> str:
    """The text beside the group's committed position of partition 0."""
    return positions(bootstrap, group, topic)[0].metadata


def test_what_retention_removed_unwritten_stays_with_the_committed_position(
    run, env, kafka, topic, objects
):
    """So that a later audit knows of it, whatever was committed since and by whom."""
    group = env["KAFKA_GROUP_ID"]
    produce(kafka.bootstrap, topic, numbered(0, 30))
    assert run("kafka_consumer.py", "--max-messages", "10", env=env).wait() == 0
    assert "lost" not in note(kafka.bootstrap, group, topic)
    delete_records(kafka.bootstrap, topic, before=20)
    script = run("kafka_consumer.py", "--max-messages", "5", env=env)
    assert script.wait() == 0
    assert re.search(r"lost 10-19\b", note(kafka.bootstrap, group, topic))
    again = run("kafka_consumer.py", "--max-messages", "5", env=env)
    assert again.wait() == 0
    assert committed(kafka.bootstrap, group, topic) == {0: 30}
    assert re.search(r"lost 10-19\b", note(kafka.bootstrap, group, topic))


@pytest.mark.parametrize("frozen", [0.5, pytest.param(12, marks=pytest.mark.slow)])
def test_a_topic_made_anew_behind_a_frozen_consumer_ends_it_and_nothing_is_skipped(
    run, env, kafka, topic, objects, frozen
):
    """The new topic is filled past the old position: a fetch from there would be answered."""
    group = env["KAFKA_GROUP_ID"]
    produce(kafka.bootstrap, topic, numbered(0, 5))
    script = run("kafka_consumer.py", env=env)
    until(lambda: committed(kafka.bootstrap, group, topic).get(0) == 5)
    before = objects()
    script.process.send_signal(signal.SIGSTOP)
    try:
        kafka.delete_topic(topic)
        kafka.create_topic(topic)
        produce(kafka.bootstrap, topic, numbered(1000, 1020))
        time.sleep(frozen)
    finally:
        script.process.send_signal(signal.SIGCONT)
    assert script.wait(timeout=30) == 1
    assert re.search(rf"ERROR .*{topic}.*(made anew|committed position)", script.stderr)
    assert "Traceback" not in script.stderr
    assert before.items() <= objects().items(), "overwritten"
    assert committed(kafka.bootstrap, group, topic).get(0, 0) == 0


# --------------------------------------------------------------- what the client throws


def broken_client(env: dict[str, str], folder: Path, patch: str) -> dict[str, str]:
    """The environment of a Python whose Kafka client is changed by these lines."""
    (folder / "sitecustomize.py").write_text(patch)
    return {**env, "PYTHONPATH": str(folder)}


def ends_with_one_line(script, what: str) -> None:
    assert script.wait(timeout=30) == 1
    errors = [line for line in script.lines("stderr") if " ERROR " in line]
    assert len(errors) == 1, script.stderr
    assert what in errors[0], errors
    assert "Traceback" not in script.stderr


POLL = """\
from kafka import KafkaConsumer

real, count = KafkaConsumer.poll, 0


def poll(self, *args, **options):
    global count
    count += 1
    if count > 20:
        raise KeyError("coordinator-0")
    return real(self, *args, **options)


KafkaConsumer.poll = poll
"""


def test_an_error_of_the_client_that_is_no_kafka_error_is_one_line(
    run, env, kafka, topic, tmp_path
):
    produce(kafka.bootstrap, topic, numbered(0, 3))
    script = run("kafka_consumer.py", env=broken_client(env, tmp_path, POLL))
    ends_with_one_line(script, "KeyError")


HEARTBEAT = """\
import kafka.coordinator.base as base

real, count = base.HeartbeatThread._run_once, 0


def run_once(self):
    global count
    count += 1
    if count > 3:
        raise KeyError("coordinator-0")
    real(self)


base.HeartbeatThread._run_once = run_once
"""


@pytest.mark.slow
def test_a_heartbeat_thread_that_has_died_ends_the_consumer_with_one_line(
    run, env, kafka, topic, tmp_path
):
    """Without heartbeats the group gives the partitions to others, and nobody says so."""
    produce(kafka.bootstrap, topic, numbered(0, 3))
    script = run("kafka_consumer.py", env=broken_client(env, tmp_path, HEARTBEAT))
    ends_with_one_line(script, "heartbeat")


def test_partitions_that_are_added_are_served_soon_and_from_their_beginning(
    run, env, kafka, topic, objects
):
    env = {**env, "KAFKA_AUTO_OFFSET_RESET": "latest"}
    script = run("kafka_consumer.py", env=env)
    script.wait_for(rf"begins {topic}/0", stream="stderr")
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap})
    admin.create_partitions([NewPartitions(topic, 3)])[topic].result(10)
    # A broker may not know them yet.
    until(lambda: len(admin.list_topics(topic, 5).topics[topic].partitions) == 3)
    for partition in range(3):
        produce(kafka.bootstrap, topic, [b"{}"], partition)
    until(lambda: len(objects()) == 3, SOON, "the objects of the new partitions")
