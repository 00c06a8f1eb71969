"""Thousands of schedules of faults, each from a seed, on virtual time: what is promised holds in
every step, and when the faults end everything ends committed.

A seed that failed is run again by `SEED=123 pytest tests/test_simulation.py`.
"""

import logging
import math
import os
import random
from collections import Counter

import pytest
from kafka import TopicPartition
from kafka.errors import CommitFailedError, KafkaTimeoutError, NodeNotReadyError

from config import Failure, S3Error
from kafka_consumer import BYTES_IN_HAND, TIMEOUT, WINDOW, Conflict, Sink, run
from tests.fakes import TOPIC, Broker, Client, Clock, Uploads, a_sink

SCHEDULES = int(os.environ.get("SCHEDULES", "300"))
POLL_BYTES = 2**22  # what one poll brings at most, beside one record


class Value(bytes):
    """A record's value that says how large it is, and is not."""

    size = 0

    def __len__(self):
        return self.size


def a_value(size):
    if size == 2:
        return b"{}"
    value = Value(b"{}")
    value.size = size
    return value


class Watched(Sink):
    """A sink that notes what it counts as done in its life, by assignment."""

    def __post_init__(self):
        super().__post_init__()
        self.counted = Counter()
        self.life = 0
        self.failing_since = math.inf

    def take(self, batches):
        if batches:
            alone = len(self.partitions) == 1
            lines = [(p.hold, taken) for p in self.partitions.values() for taken in p.line]
            sizes = [len(taken.record.value) for hold, taken in lines if alone or taken is not hold]
            assert sum(sizes) < BYTES_IN_HAND, "nothing is taken above it"
        super().take(batches)

    def finish(self, record, outcome):
        self.counted[self.life, record.partition, record.offset] += 1
        assert self.counted[self.life, record.partition, record.offset] == 1, "counted twice"
        super().finish(record, outcome)

    def on_partitions_revoked(self, revoked):
        super().on_partitions_revoked(revoked)
        self.life += 1


def ranges(text):
    """(first, last) of each range in "3-9,20-20"."""
    pairs = [part.split("-") for part in text.split(",") if part]
    return [(int(first), int(last)) for first, last in pairs]


class World:
    """A topic, a bucket, a group of one or two consumers, and a plan of what goes wrong."""

    def __init__(self, seed):
        self.chance = chance = random.Random(seed)
        random.seed(seed)  # the jitter
        self.clock = Clock()
        self.partitions = chance.choice([1, 1, 2, 3])
        ends = [chance.choice([0, 1, 3, 10, 30, 30, 70, 300]) for _ in range(self.partitions)]
        begins = {}
        self.broker = Broker(self.clock, ends, begins, self.value)
        self.sizes = chance.choice([[2], [2], [2], [2, 2**20], [2**20, 12 * 2**20, 40 * 2**20]])
        self.dead = chance.choice([0, 0, 0.1])
        for tp, end in self.broker.ends.items():
            for offset in range(end):
                if chance.random() < 0.03:
                    self.broker.markers.add((tp.partition, offset))
        self.leaves_out_markers = chance.choice([False, True])
        self.broker.look_takes = self.look_takes
        self.reset = chance.choice(["earliest", "earliest", "latest"])
        self.made = set()  # (partition, offset): an object, or an acknowledged letter
        self.whole = {}  # by partition: below it all is accounted for
        self.begun = {}  # where the group began
        self.anew = False  # the topic is another one
        self.conflict = None  # (partition, offset) of an object with other bytes
        self.looks = 0.003
        self.s3 = "well"
        self.share = 0.0  # of attempts that fail
        self.denied = None  # (partition, offset) of an object that alone is refused
        self.last_silence_ends = -math.inf
        self.succeeded_at = -math.inf
        self.members = []
        self.ended = None  # the Failure that ended a process
        self.log = []

    # -- What the fakes ask

    def value(self, partition, offset):
        return a_value(self.sizes[hash((partition, offset)) % len(self.sizes)])

    def look_takes(self):
        if self.looks == "late":
            return self.chance.uniform(0.2, 3)
        return self.looks

    def takes(self, record):
        if self.s3 == "silent":
            return TIMEOUT
        return self.chance.choice([0.005, 0.02, 0.02, 0.2])

    def outcome(self, record):
        where = record.partition, record.offset
        if where == self.conflict:
            return Conflict("other bytes")
        if self.s3 == "silent":
            if self.chance.random() < 0.3:
                self.made.add(where)  # only its answer was lost
            return TimeoutError()
        denied = where == self.denied or (self.s3 == "denied" and record.partition == 0)
        if self.s3 == "down" or denied or self.chance.random() < self.share:
            return S3Error("AccessDenied" if denied else "SlowDown", "why")
        self.made.add(where)
        self.succeeded_at = self.clock()
        dead = hash((record.offset, 7)) % 100 < 100 * self.dead
        return "dead" if dead else self.chance.choice(["written", "written", "replayed"])

    # -- Members

    def start(self, limit=math.inf):
        client = Client(self.broker, self.chance.choice([1, 20, 500]))
        client.bytes_at_most = POLL_BYTES
        client.leaves_out_markers = self.leaves_out_markers
        uploads = Uploads(self.clock, self.takes, self.outcome, self.chance.choice([1, 4, 64]))
        sink = a_sink(
            self.broker, client, uploads, limit, Watched, 0.1, KAFKA_AUTO_OFFSET_RESET=self.reset
        )
        client.subscribe(sink)
        self.members.append(sink)
        self.broker.members.append(client)
        self.broker.rebalance()
        return sink

    def crash(self, sink):
        """kill -9: what is under way may still land, and the group misses it a while later."""
        sink.monitor.ended = True
        self.members.remove(sink)
        self.broker.members.remove(sink.consumer)
        self.clock.after(self.chance.uniform(0, 6), self.broker.rebalance)
        self.log.append("crash")

    def stop(self, sink):
        began = self.clock()
        self.members.remove(sink)
        stop = type("Stop", (), {"requested": True, "check": lambda self: None})()
        self.guarded(lambda: run(sink, stop))
        assert self.clock() - began < 5, "a stop takes less than 5 s"
        sink.monitor.ended = True

    def guarded(self, call):
        try:
            call()
        except Failure as error:
            self.ended = error

    # -- What goes wrong

    def disturb(self):
        """Begin or end a fault, at random."""
        chance, kind = self.chance, self.chance.choice(self.FAULTS)
        self.log.append(f"{self.clock():.2f} {kind}")
        getattr(self, kind)(chance)

    FAULTS = (
        *("outage", "folder_denied", "record_denied", "silence", "failures", "well", "well"),
        *("produce", "produce", "poll_errors", "commit_errors", "late_looks", "no_looks"),
        *("looks_again", "mute", "refused", "heard", "second", "crash_one", "retention"),
        *("freeze", "rejoin"),
    )

    def set_s3(self, how):
        if self.s3 == "silent":
            self.last_silence_ends = self.clock() + TIMEOUT
        self.s3 = how

    def outage(self, chance):
        self.set_s3("down")

    def folder_denied(self, chance):
        self.set_s3("denied")

    def record_denied(self, chance):
        tp = chance.choice(list(self.broker.ends))
        self.denied = tp.partition, self.broker.group.get(tp, 0) + chance.choice([0, 5, 100])
        for tp in self.broker.ends:
            self.broker.ends[tp] += 70

    def silence(self, chance):
        self.set_s3("silent")

    def well(self, chance):
        self.set_s3("well")
        self.share, self.denied = 0.0, None

    def failures(self, chance):
        self.share = chance.choice([0.05, 0.3, 0.9])

    def produce(self, chance):
        tp = chance.choice(list(self.broker.ends))
        self.broker.ends[tp] += chance.choice([1, 5, 100])

    def poll_errors(self, chance):
        error = chance.choice([KafkaTimeoutError, NodeNotReadyError])
        for sink in self.members:
            sink.consumer.errors["poll"] = [error("why")] * chance.randint(1, 3)

    def commit_errors(self, chance):
        error = chance.choice([KafkaTimeoutError, CommitFailedError])
        for sink in self.members:
            sink.consumer.errors["commit"] = [error("why")] * chance.randint(1, 3)

    def late_looks(self, chance):
        self.looks = "late"

    def no_looks(self, chance):
        self.looks = math.inf

    def looks_again(self, chance):
        self.looks = 0.003

    def mute(self, chance):
        tp = chance.choice(list(self.broker.ends))
        self.broker.mute.add(tp)
        self.broker.refused.add(tp)

    def refused(self, chance):
        self.broker.refused.add(chance.choice(list(self.broker.ends)))

    def heard(self, chance):
        self.broker.mute.clear()
        self.broker.refused.clear()

    def second(self, chance):
        if len(self.members) == 1:
            self.start()
        else:
            self.stop(self.members[-1])

    def crash_one(self, chance):
        self.crash(chance.choice(self.members))
        if not self.members:
            self.start()

    def rejoin(self, chance):
        self.broker.rebalance()

    def retention(self, chance):
        tp = chance.choice(list(self.broker.ends))
        begin, end = self.broker.begins[tp], self.broker.ends[tp]
        self.broker.begins[tp] = chance.randint(begin, end)

    def freeze(self, chance):
        self.clock.now += chance.choice([0.3, 0.7, 3])

    # -- What is promised

    def step(self):
        for sink in list(self.members):
            self.guarded(sink.step)
            self.check(sink)
            if self.ended:
                return

    def in_hand(self, sink):
        """Bytes."""
        if max(self.sizes) == 2:
            return 0
        return sum(len(t.record.value) for p in sink.partitions.values() for t in p.line)

    def check(self, sink):
        self.nothing_is_skipped()
        most = max(128, WINDOW - self.done_behind_holds(sink))
        assert self.uncommitted(sink, most) <= most, "256 are sent again at most"
        held = len(sink.partitions) if len(sink.partitions) > 1 else 0
        most = BYTES_IN_HAND + POLL_BYTES + (1 + held) * max(self.sizes)
        assert self.in_hand(sink) <= most, "32 MB, one poll, and what held a partition"
        if self.s3 != "down" or self.denied or not sink.stats.holding:
            sink.failing_since = math.inf
        elif sink.failing_since == math.inf:
            sink.failing_since = max(self.clock(), self.last_silence_ends)
        if self.clock() - sink.failing_since > 0.5:
            assert len(sink.uploader.under_way) <= 1, "one attempt at a time while all fails"

    def uncommitted(self, sink, most):
        """Records that a kill -9 would have sent again: markers and what is lost are none, which
        is only looked at where there are more than `most`."""
        offsets = sum(p.position - p.committed for p in sink.partitions.values())
        if offsets <= most:
            return offsets
        return sum(
            (tp.partition, at) not in self.broker.markers
            and not any(first <= at <= last for first, last in ranges(p.lost))
            for tp, p in sink.partitions.items()
            for at in range(p.committed, p.position)
        )

    def done_behind_holds(self, sink):
        """Records that a kill -9 would have sent again as well: they were given back."""
        return sum(
            attempt is not None and at >= p.position
            for p in sink.partitions.values()
            for at, attempt in p.given_back.items()
        )

    def nothing_is_skipped(self):
        """Every offset below what is committed is made, a marker, or lost and said to be."""
        for tp, position in self.broker.group.items():
            partition = tp.partition
            if partition not in self.begun:
                first = next(commit[tp] for _, commit in self.broker.commits if tp in commit)
                self.begun[partition] = self.whole[partition] = first
                bounds = self.broker.ends if self.reset == "latest" else self.broker.begins
                assert first <= bounds[tp], "the group begins where it was told to"
            while self.whole[partition] < position:
                at = self.whole[partition]
                if (partition, at) not in self.made and (partition, at) not in self.broker.markers:
                    lost = ranges(self.broker.metadata.get(tp, "").removeprefix("lost "))
                    assert any(first <= at <= last for first, last in lost), (
                        f"{partition}/{at} was skipped: {position} is committed"
                    )
                self.whole[partition] += 1

    def heal(self):
        self.well(None)
        self.heard(None)
        self.looks_again(None)
        for sink in self.members:
            sink.consumer.errors.clear()

    def waits_for_s3_alone(self):
        return all(
            sink.stats.holding and sink.verified and not sink.consumer.joining
            for sink in self.members
        )

    def everything_ends_committed(self):
        """When the faults are over."""
        self.heal()
        healed, soon = self.clock(), self.waits_for_s3_alone()
        self.log.append(f"{healed:.2f} healed")
        stands_at, since = {}, healed
        while self.broker.group != self.broker.ends:
            if self.broker.group != stands_at:
                stands_at, since = dict(self.broker.group), self.clock()
            assert self.clock() < since + 30, f"stands at {stands_at}"
            if soon and self.clock() > healed + 5:
                assert self.succeeded_at > healed, "goes on within 5 s of S3's recovery"
            self.step()
            if self.ended:
                raise AssertionError("it ended") from self.ended


@pytest.fixture(autouse=True)
def quiet():
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def simulate(seed):
    world = World(seed)
    world.start()
    for _ in range(world.chance.randint(1, 5)):
        until = world.clock() + world.chance.choice([0.05, 0.1, 0.3, 0.3, 1, 1, 3, 7])
        world.disturb()
        while world.clock() < until and not world.ended:
            world.step()
    world.everything_ends_committed()
    return world


def steps(world, seconds):
    until = world.clock() + seconds
    while world.clock() < until and not world.ended:
        world.step()


def simulate_a_conflict(seed):
    """An object with other bytes ends the process, and nothing from it on is committed."""
    world = World(seed)
    world.reset = "earliest"
    partition = world.chance.randrange(world.partitions)
    offset = world.broker.ends[TopicPartition(TOPIC, partition)] + world.chance.choice([0, 3])
    world.conflict = partition, offset
    world.start()
    for _ in range(world.chance.randint(0, 2)):
        world.disturb()
        steps(world, world.chance.choice([0.3, 1, 3]))
    for tp in world.broker.ends:
        world.broker.ends[tp] += 5
    world.broker.begins = {tp: min(at, offset) for tp, at in world.broker.begins.items()}
    world.broker.markers.discard(world.conflict)
    world.heal()
    steps(world, 60)
    assert isinstance(world.ended, Conflict)
    assert world.broker.group.get(TopicPartition(TOPIC, partition), 0) <= offset


def simulate_a_topic_made_anew(seed):
    """Behind any gap: nothing of the new topic is committed, and the process ends and says why."""
    world = World(seed)
    world.start()
    for tp in world.broker.ends:
        world.broker.ends[tp] += 10
    until = world.clock() + 200
    while world.broker.group != world.broker.ends:
        world.step()
        assert world.clock() < until
    gap = world.chance.choice(["frozen", "errors", "rebalance", "hold"])
    if gap == "hold":
        world.outage(None)
        world.produce(world.chance)
        steps(world, 1)
    world.anew = True
    before = dict(world.broker.ends)
    world.broker.make_anew([end + world.chance.choice([1, 100, 600]) for end in before.values()])
    world.begun.clear()
    world.made.clear()
    for sink in world.members:
        if gap == "frozen":
            world.clock.now += 0.6
        elif gap == "rebalance":
            world.broker.rebalance()
        else:
            sink.consumer.errors["poll"] = [KafkaTimeoutError("why")] * world.chance.randint(1, 3)
    world.nothing_is_skipped = lambda: None
    steps(world, 2)
    world.heal()
    steps(world, 20)
    assert isinstance(world.ended, Failure) and "made anew" in str(world.ended), gap
    assert not world.broker.group, f"{gap}: {world.broker.group} is committed"


def simulate_a_partition_that_cannot_be_served(seed):
    """S3 denies the folder of one partition, for ever: all the others are written, and when it is
    allowed again so is that one."""
    world = World(seed)
    world.reset = "earliest"
    world.dead = world.chance.choice([0, 0.1])
    world.sizes = world.chance.choice([[2], [2, 2**20], [2, 2, 2, 2, 40 * 2**20]])
    world.broker.ends[TopicPartition(TOPIC, 0)] += world.chance.choice([1, 300, 600])
    for partition in range(1, 3):
        world.broker.ends[TopicPartition(TOPIC, partition)] = world.chance.choice([1, 300, 600])
    world.broker.begins.update(dict.fromkeys(world.broker.ends, 0))
    world.partitions = 3
    world.start()
    if world.chance.random() < 0.5:
        steps(world, world.chance.choice([0.05, 0.2]))
    world.folder_denied(None)
    if world.chance.random() < 0.3:
        world.rejoin(None)
    others = [tp for tp in world.broker.ends if tp.partition]
    until = world.clock() + 200
    while any(world.broker.group.get(tp) != world.broker.ends[tp] for tp in others):
        assert world.clock() < until, f"stands at {world.broker.group}"
        world.step()
    world.everything_ends_committed()


def simulate_a_limit(seed):
    """--max-messages: exactly so many are done, and that is committed."""
    world = World(seed)
    world.reset = "earliest"
    there = sum(world.broker.ends.values()) - len(world.broker.markers)
    if not there:
        return
    limit = world.chance.randint(1, there)
    sink = world.start(limit)
    until = world.clock() + 600
    world.share = world.chance.choice([0, 0.1, 0.5])
    while sink.stats.done < limit and world.clock() < until:
        world.step()
        assert sink.stats.done + sink.in_hand() <= limit
    world.stop(sink)
    records = sum(
        (tp.partition, offset) not in world.broker.markers
        for tp, position in world.broker.group.items()
        for offset in range(position)
    )
    assert sink.stats.done == limit == records


def all_of(scenario, seeds):
    only = os.environ.get("SEED")
    for seed in [int(only)] if only else seeds:
        try:
            scenario(seed)
        except Exception as error:
            raise AssertionError(f"SEED={seed}: {error}") from error


@pytest.mark.parametrize(
    "seeds", [range(SCHEDULES), pytest.param(range(SCHEDULES, 2000), marks=pytest.mark.slow)]
)
def test_whatever_goes_wrong_nothing_is_skipped_and_everything_ends_committed(seeds):
    all_of(simulate, seeds)


def test_a_conflict_ends_it_and_nothing_from_it_on_is_committed():
    all_of(simulate_a_conflict, range(100))


def test_nothing_of_a_topic_made_anew_behind_a_gap_is_committed():
    all_of(simulate_a_topic_made_anew, range(100))


def test_a_partition_that_cannot_be_served_keeps_no_other_waiting():
    all_of(simulate_a_partition_that_cannot_be_served, range(40))


def test_a_limit_is_met_exactly():
    all_of(simulate_a_limit, range(100))
