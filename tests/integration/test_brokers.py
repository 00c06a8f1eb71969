"""Brokers that refuse, that hang, that cannot be reached or forget the topic: what stands still
says so (promise 9), and what can be served is served."""

import os
import re
import secrets
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka.admin import AdminClient
from helpers import Kafka, KafkaCluster, committed, produce, until
from kafka.admin import NewTopic
from kafka.errors import KafkaError
from relay import Relay
from s3_faults import FaultyS3

pytestmark = [pytest.mark.real, pytest.mark.detail]

SOON = 15  # seconds within which promise 9 wants a word


class Relayed:
    """Two brokers, each behind a relay whose address it advertises to clients.

    A relay that is cut takes a broker away from clients alone: it goes on leading its partitions.
    """

    def __init__(self, cluster: KafkaCluster, relays: list[Relay]):
        self.relays = relays
        self.near = 0  # the number of the broker that coordinates every group
        for broker, relay in zip(cluster.brokers, relays, strict=True):
            broker.properties["advertised.listeners"] = (
                f"CLIENT://{relay.address},INTERNAL://{broker.internal}"
            )
        self.admin = cluster.brokers[0].admin
        self.log_tail = cluster.log_tail
        self.internal = cluster.brokers[0].internal  # for the tests: around the relays

    def create_topic(self, name: str, leaders: list[int]) -> None:
        """A topic whose partition p is led by broker leaders[p]."""
        places = {partition: [leader] for partition, leader in enumerate(leaders)}
        topic = NewTopic(name, -1, -1, replica_assignments=places)
        self.admin(lambda admin: admin.create_topics([topic], timeout_ms=20000))

    def coordinator(self) -> int:
        """The broker that coordinates every group: the leader of the one partition of their
        topic, which is made when a group is first asked for."""
        self.create_topic("any", [0])
        committed(self.internal, "any", "any")
        client = AdminClient({"bootstrap.servers": self.internal})

        def leaders() -> list[int]:
            topic = client.list_topics(timeout=10).topics.get("__consumer_offsets")
            found = topic.partitions.values() if topic else []
            return [partition.leader for partition in found if partition.leader >= 0]

        return until(leaders, what="the coordinator")[0]

    def heal(self) -> None:
        for relay in self.relays:
            relay.heal()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    brokers = KafkaCluster(tmp_path_factory.mktemp("cluster"), count=2)
    with Relay(brokers.brokers[0].port) as first, Relay(brokers.brokers[1].port) as second:
        relayed = Relayed(brokers, [first, second])
        try:
            brokers.start()
            relayed.near = relayed.coordinator()
            yield relayed
        finally:
            brokers.stop()


@pytest.fixture
def two(cluster, env):
    """Settings for a topic with a partition on each broker: partition 0 on the group's coordinator
    (`two["near"]` is its number), partition 1 on the other broker (`two["far"]`)."""
    name = f"two-{secrets.token_hex(4)}"
    near = cluster.near
    cluster.create_topic(name, [near, 1 - near])
    cluster.create_topic(f"{name}_errors", [near])
    settings = {
        **env,
        "KAFKA_BOOTSTRAP_SERVERS": cluster.relays[near].address,
        "KAFKA_TOPIC": name,
        "KAFKA_DLQ_TOPIC": f"{name}_errors",
        "KAFKA_GROUP_ID": f"group-{name}",
    }
    yield {"env": settings, "topic": name, "near": near, "far": 1 - near}
    cluster.heal()


def cpu_seconds(pid: int) -> float:
    """The process's time on the CPU so far. Linux."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def idle(script: Any) -> Iterator[None]:
    """The block, of some seconds, costs the script less than a quarter of a core."""
    before, began = cpu_seconds(script.pid), time.monotonic()
    yield
    seconds = time.monotonic() - began
    used = cpu_seconds(script.pid) - before
    assert used < max(1, seconds / 4), f"{used:.1f} s on the CPU in {seconds:.1f} s"


def statuses(script: Any) -> list[str]:
    """The status lines so far."""
    return [line for line in script.lines("stderr") if re.search(r"\blag (\d+|\?)", line)]


def next_status(script: Any, timeout: float = SOON) -> str:
    """The next status line; one comes every 10 s."""
    seen = len(statuses(script))
    return until(lambda: statuses(script)[seen:], timeout, "a status line")[0]


def ends_when_asked(script: Any) -> None:
    script.terminate()
    assert script.wait(timeout=10) == 0
    assert "Traceback" not in script.stderr


# ---------------------------------------------------------------------- the broker refuses


def test_a_fetch_that_the_broker_refuses_is_said_with_place_reason_and_way_out(
    run, env, kafka, topic, objects
):
    """kafka-python-ng's fetch is too old for a topic that is compressed with zstd."""
    name = f"{topic}_zstd"
    kafka.create_topic(name, config={"compression.type": "zstd"})
    produce(kafka.bootstrap, name, [b'{"n": 1}'] * 5)
    script = run("kafka_consumer.py", env={**env, "KAFKA_TOPIC": name})
    line = script.wait_for(rf"^.*{name}/0.*(refuse|fetch).*$", timeout=SOON, stream="stderr")[0]
    assert "compression.type" in line
    assert "KAFKA_API_VERSION" in line
    assert "the client says" in line
    with idle(script):
        assert re.search(r"lag (5|\?)", next_status(script))
    assert objects() == {}
    ends_when_asked(script)


@pytest.mark.slow
def test_a_protocol_version_that_the_broker_no_longer_answers_is_said(run, env, kafka, topic):
    """Whatever the client only logs: here that it speaks as one for brokers before 1.0."""
    name = f"{topic}_zstd"
    kafka.create_topic(name, config={"compression.type": "zstd"})
    produce(kafka.bootstrap, name, [b'{"n": 1}'] * 5)
    script = run("kafka_consumer.py", env={**env, "KAFKA_TOPIC": name, "KAFKA_API_VERSION": "0.11"})
    script.wait_for(rf"{name}/0.*KAFKA_API_VERSION", timeout=SOON, stream="stderr")
    assert re.search(r"lag (5|\?)", next_status(script))
    ends_when_asked(script)


# ------------------------------------------------------------- one broker cannot be reached


def write_to_both(cluster: Relayed, topic: str, count: int = 3) -> None:
    for partition in range(2):
        produce(cluster.internal, topic, [b'{"n": 1}'] * count, partition=partition)


@pytest.mark.parametrize(
    "how",
    [
        "wall",
        pytest.param("cut", marks=pytest.mark.slow),
        pytest.param("mute", marks=pytest.mark.slow),
    ],
)
def test_a_broker_that_cannot_be_reached_at_the_start_is_named_and_the_others_are_served(
    run, cluster, two, how
):
    topic, far = two["topic"], cluster.relays[two["far"]]
    write_to_both(cluster, topic)
    getattr(far, how)()
    script = run("kafka_consumer.py", env=two["env"])
    # The client may ask the mute one first, and waits for a whole KAFKA_REQUEST_TIMEOUT_MS.
    script.wait_for(r"Upload Successfully: .*/stock_market_2\.json", timeout=60)
    line = script.wait_for(rf"^.*{re.escape(far.address)}.*$", timeout=SOON, stream="stderr")[0]
    assert re.search(rf"{topic}/1|partitions? 1", line), line
    assert "partition=1" not in script.stdout
    assert re.search(r"lag (3|\?)", next_status(script))
    far.heal()
    script.wait_for(r"partition=1/stock_market_2\.json", timeout=20)
    ends_when_asked(script)


@pytest.mark.slow
def test_an_answer_that_takes_long_is_waited_for_and_said(run, cluster, two):
    """256 kB are asked for at once, and take 9 s on this link."""
    topic, far = two["topic"], cluster.relays[two["far"]]
    values = [b'{"pad": "%s"}' % (b"x" * 10_000)] * 60
    produce(cluster.internal, topic, values, partition=1)
    far.rate = 30_000
    script = run("kafka_consumer.py", env=two["env"])
    line = script.wait_for(rf"^.*{topic}/1 stands still.*$", timeout=SOON, stream="stderr")[0]
    assert "on its way" in line
    script.wait_for(r"partition=1/stock_market_59\.json")
    assert "refuses the fetch" not in script.stderr
    ends_when_asked(script)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["mute", "cut", "wall"])
def test_a_broker_that_cannot_be_reached_any_more_is_said_and_the_others_are_served(
    run, cluster, two, how
):
    topic, far = two["topic"], cluster.relays[two["far"]]
    write_to_both(cluster, topic)
    script = run("kafka_consumer.py", env=two["env"])
    script.wait_for(r"partition=1/stock_market_2\.json", timeout=20)
    script.wait_for(r"/stock_market_2\.json")
    getattr(far, how)()
    write_to_both(cluster, topic)
    script.wait_for(r"s3://[^/]+/stock_market_5\.json", timeout=SOON)
    script.wait_for(
        rf"{topic}/1.*(no|not) answer|no answer.*{topic}/1|{re.escape(far.address)}",
        timeout=SOON,
        stream="stderr",
    )
    produce(cluster.internal, topic, [b'{"n": 1}'], partition=0)
    script.wait_for(r"s3://[^/]+/stock_market_6\.json", timeout=5)
    assert " again after" not in script.stderr, "it is not over"
    far.heal()
    script.wait_for(r"partition=1/stock_market_5\.json", timeout=20)
    script.wait_for(" again after", stream="stderr")
    ends_when_asked(script)


@pytest.mark.slow
def test_a_coordinator_that_cannot_be_reached_at_the_start_is_said_and_waited_for(
    run, cluster, two
):
    near, far = cluster.relays[two["near"]], cluster.relays[two["far"]]
    write_to_both(cluster, two["topic"])
    near.wall()
    script = run("kafka_consumer.py", env={**two["env"], "KAFKA_BOOTSTRAP_SERVERS": far.address})
    script.wait_for(re.escape(near.address), timeout=SOON, stream="stderr")
    script.wait_for("group|no answer from the broker", timeout=SOON, stream="stderr")
    next_status(script)
    near.heal()
    script.wait_for(r"partition=1/stock_market_2\.json", timeout=30)
    script.wait_for(r"s3://[^/]+/stock_market_2\.json", timeout=30)
    ends_when_asked(script)


# ----------------------------------------------------------------------- no broker answers


@pytest.mark.parametrize("how", ["mute", pytest.param("cut", marks=pytest.mark.slow)])
def test_brokers_that_stop_answering_are_said_by_both_scripts_in_the_same_words(
    run, cluster, two, how
):
    """And when they answer again; the status goes on meanwhile and claims nothing."""
    topic = two["topic"]
    consumer = run("kafka_consumer.py", env=two["env"])
    producer = run("kafka_producer.py", "--rate", "5", env=two["env"])
    consumer.wait_for("Upload Successfully")
    for relay in cluster.relays:
        getattr(relay, how)()
    produce(cluster.internal, topic, [b'{"n": 1}'] * 500, partition=1)
    both = (consumer, producer)
    for script in both:
        script.wait_for(r"no answer from the broker for \d+ s", timeout=SOON, stream="stderr")
    with idle(consumer):
        lag = re.search(r"lag (\d+|\?)", next_status(consumer))
    assert lag and (lag[1] == "?" or int(lag[1]) >= 500), lag
    cluster.heal()
    for script in both:
        script.wait_for(r"the broker answers again after \d+(\.\d)? s", timeout=20, stream="stderr")
    consumer.wait_for(r"partition=1/stock_market_\d{3}\.json", timeout=20)
    for script in both:
        ends_when_asked(script)


@pytest.mark.slow
def test_brokers_that_do_not_answer_are_said_again_every_30_s(run, cluster, two):
    consumer = run("kafka_consumer.py", env=two["env"])
    producer = run("kafka_producer.py", "--rate", "5", env=two["env"])
    consumer.wait_for("Upload Successfully")
    for relay in cluster.relays:
        relay.mute()

    def said(script: Any) -> int:
        return script.stderr.count("no answer from the broker for")

    for script in (consumer, producer):
        until(lambda script=script: said(script) >= 3, timeout=90, what="said three times")
        assert said(script) <= 4, script.stderr
        script.terminate()
        assert script.wait(timeout=10) == 0


@pytest.mark.slow
def test_a_slow_broker_is_not_called_mute(run, cluster, two):
    for relay in cluster.relays:
        relay.delay = 0.7
    write_to_both(cluster, two["topic"])
    script = run("kafka_consumer.py", env=two["env"])
    script.wait_for(r"s3://[^/]+/stock_market_2\.json", timeout=60)
    script.wait_for(r"partition=1/stock_market_2\.json", timeout=60)
    for _ in range(2):
        assert "lag 0" in next_status(script)
    assert "no answer" not in script.stderr
    ends_when_asked(script)


SPOILT = {  # all but the length of an answer and the number of its request
    "other": lambda data: data[:8] + bytes(byte ^ 0x55 for byte in data[8:]),
    "zeros": lambda data: data[:8] + bytes(len(data) - 8),
    "ones": lambda data: data[:8] + b"\xff" * (len(data) - 8),
    "half": lambda data: data[: len(data) // 2] + b"\x01" * (len(data) - len(data) // 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", SPOILT)
def test_answers_that_are_spoilt_on_the_way_are_got_over_or_said(run, cluster, two, how):
    """Whatever the client makes of them: it goes on, ends with one line, or says that it waits."""
    write_to_both(cluster, two["topic"])
    script = run("kafka_consumer.py", env=two["env"])
    script.wait_for(r"partition=1/stock_market_2\.json", timeout=20)
    before = len(script.stderr)
    for relay in cluster.relays:
        relay.spoil = SPOILT[how]
    time.sleep(1)
    cluster.heal()
    write_to_both(cluster, two["topic"])

    def over() -> bool:
        ended = script.process.poll() is not None
        return (
            ended or script.stdout.count("market_5.json") == 2 or "WARN" in script.stderr[before:]
        )

    until(over, 2 * SOON, "the end, a word, or the records that came later")
    if script.process.poll() is None:
        return ends_when_asked(script)
    assert script.wait() == 1
    assert "Traceback" not in script.stderr
    assert len([line for line in script.lines("stderr") if " ERROR " in line]) == 1


@pytest.mark.slow
def test_a_topic_made_anew_while_no_broker_could_be_reached_ends_it(run, cluster, two, objects):
    topic, group = two["topic"], two["env"]["KAFKA_GROUP_ID"]
    write_to_both(cluster, topic)
    script = run("kafka_consumer.py", env=two["env"])
    until(lambda: committed(cluster.internal, group, topic) == {0: 3, 1: 3}, what="both committed")
    before = objects()
    for relay in cluster.relays:
        relay.cut()
    cluster.admin(lambda admin: admin.delete_topics([topic], timeout_ms=20000))
    until(lambda: made(cluster, topic, [two["near"], two["far"]]), what="the topic anew")
    for partition in range(2):
        produce(cluster.internal, topic, [b'{"new": 1}'] * 20, partition=partition)
    cluster.heal()
    assert script.wait(timeout=40) == 1
    assert re.search(rf"ERROR .*{topic}.*(made anew|committed position)", script.stderr)
    assert "Traceback" not in script.stderr
    assert before.items() <= objects().items(), "overwritten"
    assert set(committed(cluster.internal, group, topic).values()) <= {0}


def made(cluster: Relayed, topic: str, leaders: list[int]) -> bool:
    """Whether the topic could be made; the broker refuses while it deletes one of this name."""
    try:
        cluster.create_topic(topic, leaders)
    except KafkaError:
        return False
    return True


# ----------------------------------------------------------- nothing in a hold asks a broker


@pytest.mark.slow
def test_a_hold_goes_on_booking_and_committing_while_the_leader_is_mute(
    run, cluster, two, s3, objects
):
    """The lag is not worth waiting for: the record in hand is done 5 s after S3 recovers."""
    topic, group = two["topic"], two["env"]["KAFKA_GROUP_ID"]
    far = cluster.relays[two["far"]]
    produce(cluster.internal, topic, [b'{"n": 1}'] * 3, partition=1)
    with FaultyS3(s3.endpoint) as faulty:
        env = {**two["env"], "S3_ENDPOINT_URL": faulty.endpoint}
        faulty.fail("503", only=("put",))
        script = run("kafka_consumer.py", env=env)
        script.wait_for("holding at", timeout=20, stream="stderr")
        far.mute()
        next_status(script)
        faulty.heal()
        script.wait_for(r"partition=1/stock_market_2\.json", timeout=10)
        until(lambda: committed(cluster.internal, group, topic).get(1) == 3, 10, "committed")
        ends_when_asked(script)
        assert "stopped without an answer" not in script.stderr


@pytest.mark.slow
def test_a_hold_goes_on_with_a_status_while_the_topic_is_deleted(run, env, kafka, topic, s3):
    produce(kafka.bootstrap, topic, [b'{"n": 1}'] * 3)
    with FaultyS3(s3.endpoint) as faulty:
        faulty.fail("503", only=("put",))
        script = run("kafka_consumer.py", env={**env, "S3_ENDPOINT_URL": faulty.endpoint})
        script.wait_for("holding at", timeout=20, stream="stderr")
        kafka.delete_topic(topic)
        next_status(script)
        next_status(script)
        faulty.heal()
        script.wait_for(r"stock_market_2\.json", timeout=10)
        script.terminate()
        script.wait(timeout=10)
        assert "Traceback" not in script.stderr


# ------------------------------------------------------------------------- the topic is gone


def test_a_topic_deleted_under_an_idle_consumer_is_said(run, env, kafka, topic):
    produce(kafka.bootstrap, topic, [b'{"n": 1}'])
    script = run("kafka_consumer.py", env=env)
    script.wait_for("Upload Successfully")
    until(lambda: committed(kafka.bootstrap, env["KAFKA_GROUP_ID"], topic).get(0) == 1)
    kafka.delete_topic(topic)
    gone = "deleted|does not exist|is gone|missing|no such topic|not found|no longer|made anew"
    script.wait_for(
        rf"(WARNING|ERROR) .*{topic}\b.*({gone})|(WARNING|ERROR) .*({gone}).*{topic}\b",
        timeout=SOON,
        stream="stderr",
    )
    if script.process.poll() is None:
        with idle(script):
            assert "lag 0" not in next_status(script)
        script.terminate()
        assert script.wait(timeout=10) == 0
    assert "Traceback" not in script.stderr


# ------------------------------------------------------- the first seconds of a broker's life


def both_scripts(run, env):
    """Both scripts at once, each for one record."""
    return [
        run(name, "--max-messages", "1", env=env)
        for name in ("kafka_producer.py", "kafka_consumer.py")
    ]


def go_on(scripts) -> None:
    for script in scripts:
        assert script.wait(timeout=30) == 0, script.stderr
        assert " ERROR " not in script.stderr


@pytest.mark.slow
@pytest.mark.parametrize("how", ["hang_up", "mute"])
def test_a_broker_that_listens_and_answers_3_s_later_is_waited_for_at_the_start(
    run, env, kafka, how
):
    with Relay(kafka.port) as relay:
        getattr(relay, how)()
        scripts = both_scripts(run, {**env, "KAFKA_BOOTSTRAP_SERVERS": relay.address})
        until(lambda: relay.connections >= 2, what="both have asked")
        time.sleep(3)
        relay.heal()
        go_on(scripts)


def test_a_topic_that_appears_3_s_later_is_waited_for_at_the_start(run, env, kafka, topic):
    """A broker that has just started answers without its topics for two seconds."""
    late = f"{topic}_late"
    with Relay(kafka.port) as relay:
        settings = {**env, "KAFKA_BOOTSTRAP_SERVERS": relay.address, "KAFKA_TOPIC": late}
        scripts = both_scripts(run, settings)
        until(lambda: relay.connections >= 2, what="both have asked")
        time.sleep(3)
        kafka.create_topic(late)
        go_on(scripts)


@pytest.mark.slow
@pytest.mark.parametrize("after", [0.0, 0.5])
def test_both_scripts_started_while_the_broker_starts_go_on(
    run, env, tmp_path_factory, topic, after
):
    """The real thing: started `after` seconds after the listener opens, half a script's start
    before the broker knows its topics."""
    own = Kafka(tmp_path_factory.mktemp("young"))
    try:
        own.start()
        for name in (topic, f"{topic}_errors"):
            own.create_topic(name)
        own.stop_broker()
        with ThreadPoolExecutor(1) as pool:
            started = pool.submit(own.start_broker)
            until(lambda: not _closed(own.port), timeout=60, what="the listener")
            time.sleep(after)
            scripts = both_scripts(run, {**env, "KAFKA_BOOTSTRAP_SERVERS": own.bootstrap})
            started.result()
            go_on(scripts)
    finally:
        own.stop()


def _closed(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return True
    return False
