"""What unit tests and the simulation share: a clock, Kafka and S3, all without threads or waiting.

Time is virtual: whoever waits lets it pass, and what is due happens meanwhile. Kafka is a `Broker`
(a topic, a group) and a `Client` for each member; S3 is `Uploads`, which finishes attempts.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

from kafka import TopicPartition
from kafka.errors import (
    CommitFailedError,
    IllegalGenerationError,
    KafkaTimeoutError,
    OffsetOutOfRangeError,
)

from config import NoOffsetForPartitionError, Settings, TransactionMarker, is_marker
from kafka_consumer import Monitor, Sink, Stats, TopicState

TOPIC = "test"
TP, TP1 = TopicPartition(TOPIC, 0), TopicPartition(TOPIC, 1)


class Record(NamedTuple):
    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: tuple = ()


def a_record(offset=7, value=b'{"a": 1}', partition=0, key=None, headers=()):
    return Record(TOPIC, partition, offset, key, value, list(headers))


def some_settings(**environ):
    return Settings.from_env({"S3_BUCKET": "bucket", **environ})


class Clock:
    """Virtual time, in seconds. It passes while somebody waits; then happens what is due."""

    def __init__(self):
        self.now = 1_000.0
        self.due: list[tuple[float, int, Callable[[], object]]] = []
        self.count = itertools.count()

    def __call__(self):
        return self.now

    def after(self, seconds, call):
        heapq.heappush(self.due, (self.now + seconds, next(self.count), call))

    def wait(self, seconds, is_over=lambda: False):
        """Let `seconds` pass, or fewer: until it is over."""
        until = self.now + seconds
        while not is_over():
            if not self.due or self.due[0][0] > until:
                self.now = max(self.now, until)
                return
            at, _, call = heapq.heappop(self.due)
            self.now = max(self.now, at)
            call()

    def wait_for(self, futures, timeout, return_when=None):
        """In the place of concurrent.futures.wait, for the first."""
        self.wait(timeout, lambda: any(future.done() for future in futures))


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to what is due next: hours pass in no time."""

    def __init__(self):
        super().__init__()
        self.now = 1_000.0

    def time(self):
        return self.now

    def _run_once(self):
        due = [handle.when() for handle in self._scheduled if not handle.cancelled()]
        if due and not self._ready:
            self.now = max(self.now, min(due))
        super()._run_once()

    def run_in_executor(self, executor, call, *args):
        future = self.create_future()
        try:
            future.set_result(call(*args))
        except Exception as error:
            future.set_exception(error)
        return future


# ----------------------------------------------------------------------------------------- Kafka


class Broker:
    """A topic and one group, in memory. The partitions end at `ends`."""

    def __init__(self, clock, ends: Iterable[int], begins=None, values=None):
        self.clock = clock
        self.ends = {TopicPartition(TOPIC, p): end for p, end in enumerate(ends)}
        self.begins = dict.fromkeys(self.ends, 0) | (begins or {})
        self.values: Callable[[int, int], bytes | None] = values or (lambda p, o: b'{"a": 1}')
        self.markers: set[tuple[int, int]] = set()  # (partition, offset)
        self.refused: set[TopicPartition] = set()  # fetches of these give nothing
        self.mute: set[TopicPartition] = set()  # their leader does not answer
        self.group: dict[TopicPartition, int] = {}
        self.metadata: dict[TopicPartition, str] = {}
        self.commits: list[tuple[float, dict[TopicPartition, int]]] = []
        self.members: list[Client] = []
        self.look_takes: Callable[[], float] = lambda: 0.003  # s; infinite: it fails after 2.5 s

    def record(self, tp, offset):
        """The record at an offset as the client delivers it."""
        if (tp.partition, offset) in self.markers:
            return Record(TOPIC, tp.partition, offset, TransactionMarker(b"\0\0\0\1"), b"\0" * 6)
        return Record(TOPIC, tp.partition, offset, None, self.values(tp.partition, offset))

    def look(self, asked_at, heard):
        """The state of the topic, as the brokers tell it after `look_takes`."""
        answer: Future[TopicState] = Future()
        takes = self.look_takes()

        def end():
            if takes == math.inf:
                answer.set_exception(KafkaTimeoutError("slow"))
            else:
                heard()
                answer.set_result(self.seen(asked_at))

        self.clock.after(min(takes, 2.5), end)
        return answer

    def seen(self, asked_at):
        heard = sorted(self.ends.keys() - self.mute)  # a seed repeats every step
        return TopicState(
            asked_at,
            {tp: self.begins[tp] for tp in heard},
            {tp: self.ends[tp] for tp in heard},
            dict.fromkeys(self.mute, "its leader, broker 2, does not answer"),
            {
                tp: SimpleNamespace(offset=at, metadata=self.metadata.get(tp, ""))
                for tp, at in self.group.items()
            },
        )

    def make_anew(self, ends):
        """The topic is deleted and made again, filled up to `ends`; the group's positions go."""
        self.ends = dict(zip(self.ends, ends, strict=True))
        self.begins = dict.fromkeys(self.ends, 0)
        self.group.clear()
        self.metadata.clear()
        for member in self.members:
            member.fetched.clear()

    def rebalance(self, *, without: Client | None = None):
        """Every member has to join again; each is given its share when the last has."""
        if without:
            self.members.remove(without)
        for member in self.members:
            member.joining, member.has_joined = True, False

    def join(self, member):
        member.has_joined = True
        if all(each.has_joined for each in self.members):
            for number, each in enumerate(self.members):
                share = [tp.partition for tp in self.ends][number :: len(self.members)]
                each.next, each.joining = share, False


class Client:
    """A consumer as the client's, over a broker in memory.

    What it has fetched and not yet given out is dropped when a poll finds the partition paused,
    and the next fetch begins behind it unless the position was sought again.
    """

    def __init__(self, broker, prefetch=500):
        self.broker, self.clock, self.prefetch = broker, broker.clock, prefetch
        self.at: dict[TopicPartition, int | None] = {}
        self.fetched: dict[TopicPartition, list[int]] = {}
        self.dropped: dict[TopicPartition, int] = {}  # where the next fetch would begin
        self.paused: set[TopicPartition] = set()
        self.errors: dict[str, list[Exception]] = {}  # by method name: to be raised, one a call
        self.next: Iterable[int] | None = None  # partitions to be assigned at the next poll
        self.joining = self.has_joined = False  # in a rebalance of several members
        self.polls: list[tuple[float, set[TopicPartition]]] = []
        self.listener: Any = None
        self.closed = self.rejoins = False
        self.asked: list[int] = []  # requests under way to the leader
        self.bytes_at_most = math.inf  # of what one poll gives, one record at least
        self.leaves_out_markers = False  # as kafka-python 3 does

    def _raise(self, method):
        if self.errors.get(method):
            if method == "poll":
                self.drop_fetched()
            raise self.errors[method].pop(0)

    def subscribe(self, listener, partitions=None):
        self.listener, self.next = listener, partitions

    def assignment(self):
        return set(self.at)

    def poll(self, timeout_ms, max_records):
        assert max_records >= 1
        self.polls.append((self.clock(), set(self.paused)))
        self._raise("poll")
        if self.joining and not self.has_joined:
            self._tell(self.listener.on_partitions_revoked, set(self.at))
            self.broker.join(self)
        if self.joining:  # the others have not joined yet; the old assignment is still shown
            self.clock.wait(timeout_ms / 1000)
            return {}
        if self.next is not None:
            if not self.has_joined:
                self._tell(self.listener.on_partitions_revoked, set(self.at))
            self._assign({TopicPartition(TOPIC, p) for p in self.next})
        for tp, at in self.at.items():
            if at is None:
                raise NoOffsetForPartitionError(tp)
        self._fetch()
        if not self._has_records():
            self.clock.wait(timeout_ms / 1000, lambda: self._has_more() or self.joining)
            self._fetch()
        return self._give(max_records)

    def _tell(self, callback, partitions):
        try:
            callback(partitions)
        except Exception:  # the client only logs it
            if not self.rejoins:
                raise AssertionError("a listener's error is lost in the client") from None

    def _assign(self, tps):
        self.at, self.fetched, self.dropped = dict.fromkeys(sorted(tps)), {}, {}
        self.paused, self.next, self.has_joined = set(), None, False
        self._tell(self.listener.on_partitions_assigned, tps)

    def _fetchable(self):
        return [tp for tp in self.at if tp not in self.paused | self.broker.refused]

    def _fetch(self):
        for tp in self.paused & self.fetched.keys():
            if lost := self.fetched.pop(tp):
                self.dropped[tp] = lost[-1] + 1
        for tp in self._fetchable():
            if tp in self.dropped:
                self.at[tp] = max(self.at[tp], self.dropped.pop(tp))
            if self.fetched.get(tp):
                continue
            if not self.broker.begins[tp] <= self.at[tp] <= self.broker.ends[tp]:
                raise OffsetOutOfRangeError({tp: self.at[tp]})
            end = min(self.broker.ends[tp], self.at[tp] + self.prefetch)
            self.fetched[tp] = list(range(self.at[tp], end))

    def _has_records(self):
        return any(self.fetched.get(tp) for tp in self._fetchable())

    def _has_more(self):
        return any(self.broker.ends[tp] != self.at[tp] for tp in self._fetchable())

    def _give(self, room):
        answer = {}
        size = 0
        for tp in self._fetchable():
            records = []
            while self.fetched[tp] and room and size < self.bytes_at_most:
                record = self.broker.record(tp, self.fetched[tp].pop(0))
                self.at[tp] = record.offset + 1
                if self.leaves_out_markers and is_marker(record):
                    continue
                records.append(record)
                room -= 1
                size += len(record.value or b"")
            if records:
                answer[tp] = records
        self.clock.wait(0.001 if answer else 0)
        return answer

    def drop_fetched(self):
        """As an error does that the client raises: the position is behind what is gone."""
        for tp, offsets in self.fetched.items():
            if offsets:
                self.at[tp] = offsets[-1] + 1
        self.fetched.clear()

    @property
    def _subscription(self):
        states = {tp: SimpleNamespace(position=at) for tp, at in self.at.items()}
        return SimpleNamespace(assignment=states)

    def pause(self, *tps):
        assert set(tps) <= set(self.at)
        self.paused |= set(tps)

    def resume(self, *tps):
        assert set(tps) <= set(self.at)
        self.paused -= set(tps)

    def seek(self, tp, offset):
        assert tp in self.at, "Unassigned partition"
        self.at[tp] = offset
        self.fetched.pop(tp, None)
        self.dropped.pop(tp, None)

    def commit(self, offsets):
        self._raise("commit")
        if self not in self.broker.members and self.broker.members:
            raise CommitFailedError("missed its session")
        if self.has_joined:
            raise IllegalGenerationError("the group is being rebalanced")
        self._store(offsets)

    def _store(self, offsets):
        assert offsets, "an empty commit"
        plain = {tp: at.offset for tp, at in offsets.items()}
        self.broker.group |= plain
        self.broker.metadata |= {tp: at.metadata for tp, at in offsets.items()}
        self.broker.commits.append((self.clock(), plain))

    def commit_async(self, offsets):
        assert set(offsets) <= set(self.at)
        if not self.broker.members or self in self.broker.members:
            self._store(offsets)

    @property
    def _client(self):
        connection = SimpleNamespace(in_flight_requests=self.asked)
        client = SimpleNamespace(
            cluster=SimpleNamespace(leader_for_partition=lambda tp: 0), _conns={0: connection}
        )
        client._manager = client
        return client

    @property
    def _coordinator(self):
        def request_rejoin():
            self.rejoins = True

        return SimpleNamespace(request_rejoin=request_rejoin)

    def close(self, autocommit):
        assert autocommit is False
        self.closed = True
        if self in self.broker.members:
            self.broker.rebalance(without=self)


# -------------------------------------------------------------------------------------------- S3


class Uploads:
    """An uploader that ends each attempt after `takes(record)` seconds, in any order, or never
    where that is infinite, with `outcome(record)`: "written", "replayed", "dead" or an error."""

    def __init__(self, clock, takes=None, outcome=None, slots=10_000):
        self.clock, self.slots = clock, slots
        self.takes: Callable[[Any], float] = takes or (lambda record: 0.025)
        self.outcome: Callable[[Any], Any] = outcome or (lambda record: "written")
        self.waiting: list[Any] = []  # for a slot
        self.under_way: list[Any] = []
        self.submitted: list[tuple[int, int]] = []  # (partition, offset)
        self.times: list[tuple[float, int, int]] = []  # (time, partition, offset)

    def start(self, batch):
        for taken in batch:
            assert taken.attempt is None, "two attempts at once for one record"
            taken.attempt = Future()
        self.waiting += [(taken.attempt, taken.record) for taken in batch]
        self._begin()

    def _begin(self):
        while self.waiting and len(self.under_way) < self.slots:
            attempt, record = self.waiting.pop(0)
            if not attempt.set_running_or_notify_cancel():
                continue
            self.submitted.append((record.partition, record.offset))
            self.times.append((self.clock(), record.partition, record.offset))
            self.under_way.append(attempt)
            takes = self.takes(record)
            if takes != math.inf:
                self.clock.after(takes, partial(self._end, attempt, record))

    def _end(self, attempt, record):
        outcome = self.outcome(record)
        self.under_way.remove(attempt)
        if isinstance(outcome, BaseException):
            attempt.set_exception(outcome)
        else:
            attempt.set_result(outcome)
        self._begin()


def a_sink(broker, client, uploads, limit=math.inf, kind=Sink, every=0.05, **environ):
    """A sink with its monitor, which ticks `every` so many seconds until `monitor.ended`."""
    clock = broker.clock
    environ = {"KAFKA_AUTO_OFFSET_RESET": "earliest", **environ}
    stats = Stats()
    sink = kind(some_settings(**environ), client, uploads, stats, limit, clock, clock.wait_for)
    sink.send = lambda client, positions: client.commit(positions)
    sink.monitor = Monitor(sink, broker.look, clock)

    def tick():
        if not sink.monitor.ended:
            sink.monitor.tick()
            clock.after(every, tick)

    tick()
    return sink
