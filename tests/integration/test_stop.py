"""SIGTERM and Ctrl-C in every state: gone within 5 s, exit code 0, nothing lost (promise 5)."""

import os
import signal
import time

import pytest
from helpers import assert_whole, load, produce, records, until, until_done
from s3_faults import FaultyS3

pytestmark = [pytest.mark.real, pytest.mark.detail]

STOPS = {"SIGTERM": signal.SIGTERM, "Ctrl-C": signal.SIGINT}
LIMIT = 7  # and 2 s for a busy machine; without the watch it is half a minute


class Scene:
    """A consumer's or producer's surroundings, brought into a state by name, and back."""

    def __init__(self, own, faulty, topic):
        self.own, self.faulty, self.topic = own, faulty, topic

    def loaded(self):
        values = [b'{"n": %d, "pad": "%s"}' % (n, b"x" * 500) for n in range(1500)]
        produce(self.own.bootstrap, self.topic, values)

    def s3_failing(self):
        self.faulty.fail("503")
        produce(self.own.bootstrap, self.topic, [b'{"n": 1}'] * 100)

    def s3_silent(self):
        self.faulty.fail("hang")
        produce(self.own.bootstrap, self.topic, [b'{"n": 1}'] * 100)

    def s3_refused(self):
        self.faulty.fail("refused")
        produce(self.own.bootstrap, self.topic, [b'{"n": 1}'] * 100)

    def broker_gone(self):
        self.own.stop_broker()

    def broker_frozen(self):
        os.kill(self.own.pids["broker"], signal.SIGSTOP)

    def s3_silent_and_broker_gone(self):
        self.s3_silent()
        time.sleep(1)
        self.broker_gone()

    def s3_failing_and_broker_frozen(self):
        self.s3_failing()
        time.sleep(1)
        self.broker_frozen()

    def idle(self):
        pass

    def mend(self):
        self.faulty.heal()
        if "broker" not in self.own.pids:
            self.own.start_broker()
        os.kill(self.own.pids["broker"], signal.SIGCONT)


STATES = [
    "idle",
    "loaded",
    "s3_failing",
    "s3_silent",
    "s3_refused",
    "broker_gone",
    "broker_frozen",
    "s3_silent_and_broker_gone",
    "s3_failing_and_broker_frozen",
]
QUICK = {("loaded", "SIGTERM"), ("s3_silent", "Ctrl-C"), ("broker_frozen", "SIGTERM")}
CONSUMER_CASES = [
    pytest.param(state, stop, marks=[] if (state, stop) in QUICK else [pytest.mark.slow])
    for state in STATES
    for stop in STOPS
]


@pytest.fixture
def scene(own, s3, topic):
    own.create_topic(topic)
    own.create_topic(f"{topic}_errors")
    with FaultyS3(s3.endpoint, latency=0.025) as faulty:
        scene = Scene(own, faulty, topic)
        yield scene
        scene.mend()


@pytest.fixture
def settings(scene, env):
    return {
        **env,
        "KAFKA_BOOTSTRAP_SERVERS": scene.own.bootstrap,
        "S3_ENDPOINT_URL": scene.faulty.endpoint,
    }


def running(run, scene, settings):
    """A consumer that has written an object."""
    produce(scene.own.bootstrap, scene.topic, [b'{"n": 0}'])
    script = run("kafka_consumer.py", env=settings)
    script.wait_for(r"Upload Successfully")
    return script


def stop_within(script, number: int, limit: float = LIMIT) -> int:
    asked = time.monotonic()
    script.process.send_signal(number)
    code = script.wait(timeout=30)
    took = time.monotonic() - asked
    assert took < limit, f"gone after {took:.1f} s"
    assert "Traceback" not in script.stderr
    return code


@pytest.mark.parametrize(("state", "stop"), CONSUMER_CASES)
def test_the_consumer_stops_within_5_s_and_loses_nothing(
    run, scene, settings, objects, state, stop
):
    script = running(run, scene, settings)
    getattr(scene, state)()
    time.sleep(1.0 if state in ("idle", "loaded") else 3.0)  # into the state
    assert stop_within(script, STOPS[stop]) == 0
    scene.mend()
    follower = run("kafka_consumer.py", env=settings)
    follower.wait_for("assigned")
    until_done(scene.own.bootstrap, settings["KAFKA_GROUP_ID"], scene.topic)
    assert stop_within(follower, signal.SIGTERM) == 0
    assert_whole(records(scene.own.bootstrap, scene.topic), objects())
    stored = [put.key for put in scene.faulty.stored()]
    assert len(stored) == len(set(stored)), "overwritten"
    if state == "loaded":  # what was stored was also committed
        # The first object of each of the two runs is put twice: the second has to be refused.
        assert len(stored) <= len(scene.faulty.puts()) <= len(stored) + 2


@pytest.mark.slow
@pytest.mark.parametrize("stop", STOPS)
def test_the_consumer_stops_within_5_s_in_a_rebalance(run, scene, settings, stop):
    """A member that joins and dies without a word leaves the group waiting for it."""
    topic = f"{scene.topic}_4"
    scene.own.create_topic(topic, partitions=4)
    settings = {**settings, "KAFKA_TOPIC": topic}
    with load(scene.own.bootstrap, [topic], 50):
        script = run("kafka_consumer.py", env=settings)
        script.wait_for("Upload Successfully")
        second = run("kafka_consumer.py", env=settings)
        second.wait_for("Upload Successfully")
        os.kill(second.pid, signal.SIGSTOP)  # does not answer the rebalance that the third asks for
        third = run("kafka_consumer.py", env=settings)
        third.wait_for("Connection Test")
        time.sleep(2)
        assert stop_within(third, STOPS[stop]) == 0
        assert stop_within(script, STOPS[stop]) == 0
        second.kill()


@pytest.mark.parametrize(
    "state", [pytest.param("s3_silent_and_broker_gone", marks=pytest.mark.slow), "broker_frozen"]
)
def test_a_second_signal_ends_the_consumer_at_once(run, scene, settings, state):
    script = running(run, scene, settings)
    getattr(scene, state)()
    time.sleep(2)
    script.terminate()
    time.sleep(0.2)
    stop_within(script, signal.SIGTERM, limit=1.0)


PRODUCER_STATES = ["idle", "loaded", "broker_gone", "broker_frozen"]
PRODUCER_CASES = [
    pytest.param(state, stop, marks=[] if (state, stop) in QUICK else [pytest.mark.slow])
    for state in PRODUCER_STATES
    for stop in STOPS
]


@pytest.mark.parametrize(("state", "stop"), PRODUCER_CASES)
def test_the_producer_stops_within_5_s_and_says_what_was_not_sent(
    run, scene, settings, state, stop
):
    rate = {"idle": "1", "loaded": "0"}.get(state, "20")
    script = run("kafka_producer.py", "--rate", rate, env=settings)
    until(lambda: records(scene.own.bootstrap, scene.topic), what="a first record")
    time.sleep(1)
    if state.startswith("broker"):
        getattr(scene, state)()
        time.sleep(2)
    code = stop_within(script, STOPS[stop])
    scene.mend()
    said = sum(line.startswith("[Sent]") for line in script.lines())
    assert code == 0
    held = until(lambda: records(scene.own.bootstrap, scene.topic), what="the topic's records")
    if state.startswith("broker"):
        assert any("did not say" in line for line in script.lines("stderr")), script.stderr
        assert len(held) >= said
    if state == "idle":
        assert len(held) == said


@pytest.mark.parametrize("state", ["broker_frozen"])
def test_a_second_signal_ends_the_producer_at_once(run, scene, settings, state):
    script = run("kafka_producer.py", "--rate", "20", env=settings)
    until(lambda: records(scene.own.bootstrap, scene.topic), what="a first record")
    getattr(scene, state)()
    time.sleep(1)
    script.interrupt()
    time.sleep(0.2)
    stop_within(script, signal.SIGINT, limit=1.0)
