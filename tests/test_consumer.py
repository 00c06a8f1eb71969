"""What comes out: records to objects, what is committed when, the holding pattern."""

import asyncio
import json
import logging
import math
import queue
import random
import re
from collections import defaultdict
from itertools import pairwise
from types import SimpleNamespace
from typing import NamedTuple

import aiohttp
import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError
from hypothesis import given
from hypothesis import settings as with_settings
from hypothesis import strategies as st
from kafka import TopicPartition
from kafka.errors import (
    CommitFailedError,
    KafkaTimeoutError,
    MessageSizeTooLargeError,
    OffsetOutOfRangeError,
)
from kafka.errors import GroupAuthorizationFailedError as NotAllowed

from config import Failure, NoOffsetForPartitionError, Settings
from kafka_consumer import (
    COMMIT_EVERY,
    PATIENCE,
    WINDOW,
    Bucket,
    Conflict,
    Partition,
    S3Error,
    Sink,
    Stats,
    Uploader,
    explain,
    flaw,
    object_name,
    run,
)


class Record(NamedTuple):
    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: tuple = ()


def a_record(offset=7, value=b'{"a": 1}', partition=0, key=None, headers=()):
    return Record("test", partition, offset, key, value, list(headers))


def some_settings(**environ):
    return Settings.from_env({"S3_BUCKET": "bucket", **environ})


@pytest.fixture
def lines(caplog):
    """What was said, by logger: "records" or another."""
    caplog.set_level(logging.INFO)

    def said(name=None):
        return [
            record.getMessage()
            for record in caplog.records
            if (record.name == "records") == (name == "records")
        ]

    return said


# --------------------------------------------------------------------------- records and objects


@pytest.mark.parametrize(
    "value",
    [
        b"{}",
        b' {"a": 1}\r\n',
        '{"größe": "日経", "a": [1, {"b": null}]}'.encode(),
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"a": 1e999}',  # a JSON number, whatever reads it
        b'{"a": 1, "a": 2}',  # names should be unique, says the RFC, and need not
        rb'{"a": "\ud800"}',
        b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}",
    ],
)
def test_a_json_object_has_no_flaw(value):
    assert flaw(value) == ""


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "null"),
        (b"", "empty"),
        (b" ", "not JSON"),
        (b"\n", "not JSON"),
        (b'{"a": "\xff"}', "not UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
        (b'{"a": "\xed\xa0\x80"}', "not UTF-8"),  # a surrogate's bytes
        (b'\xef\xbb\xbf{"a": 1}', "not JSON"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": [-Infinity]}', "-Infinity is not JSON"),
        (b'{"a": Infinity}', "Infinity is not JSON"),
        (b"NaN", "NaN is not JSON"),
        (b'{"a": 1', "not JSON"),
        (b'{"a": 1} {"b": 2}', "not JSON"),
        (b"{'a': 1}", "not JSON"),
        (b'{"a": "\n"}', "not JSON"),
        (b'{"a": 01}', "not JSON"),
        (b"[]", "not an object: list"),
        (b"1", "not an object"),
        (b"9" * 5000, "not an object"),
        (b'"{}"', "not an object: str"),
        (b"null", "not an object"),
        (b"true", "not an object: bool"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"a":' * 100_000, "nested too deep"),
    ],
)
def test_what_is_no_json_object_has_a_reason(value, reason):
    assert reason in flaw(value)
    assert flaw(value).isprintable() and len(flaw(value)) < 200


@given(st.binary() | st.text().map(str.encode))
def test_any_bytes_are_judged_without_an_error(value):
    assert isinstance(flaw(value), str)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(JSON, st.booleans())
def test_of_all_json_exactly_the_objects_are_good(value, ascii):
    try:
        text = json.dumps(value, ensure_ascii=ascii, allow_nan=False).encode()
    except ValueError:  # infinite, or a surrogate without \u
        return
    assert (flaw(text) == "") == isinstance(value, dict)


def test_objects_are_named_by_partition_and_offset_alone():
    assert object_name("", 0, 0) == "stock_market_0.json"
    assert object_name("raw/", 0, 12) == "raw/stock_market_12.json"
    assert object_name("raw/", 3, 12) == "raw/partition=3/stock_market_12.json"
    assert object_name("x", 0, 1) == "xstock_market_1.json"


# ------------------------------------------------------------------------------------- the bucket


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to what is due next: hours pass in no time."""

    def __init__(self):
        super().__init__()
        self.now = 1_000.0

    def time(self):
        return self.now

    def _run_once(self):
        if not self._ready and self._scheduled:
            self.now = max(self.now, self._scheduled[0].when())
        super()._run_once()

    def run_in_executor(self, executor, call, *args):
        future = self.create_future()
        try:
            future.set_result(call(*args))
        except Exception as error:
            future.set_exception(error)
        return future


@pytest.fixture
def loop():
    loop = VirtualLoop()
    yield loop
    for task in asyncio.all_tasks(loop):
        task.cancel()
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()


class Answering(Bucket):
    """A bucket whose server gives the answers it is told to."""

    def __init__(self, *answers, there=b""):
        super().__init__(some_settings())
        self.answers, self.there, self.asked = list(answers), there, []

    async def put(self, name, value, **headers):
        self.asked.append((name, value, headers))
        return self.answers.pop(0)

    async def get(self, name, timeout=60):
        return self.there


def xml(code, message="why"):
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"


def test_an_object_is_created_only_where_there_is_none(loop):
    bucket = Answering((200, ""))
    assert loop.run_until_complete(bucket.create("n", b"v")) is True
    assert bucket.asked == [("n", b"v", {"If-None-Match": "*"})]


def test_the_same_bytes_already_there_are_a_replay(loop):
    bucket = Answering((412, xml("PreconditionFailed")), there=b"v")
    assert loop.run_until_complete(bucket.create("n", b"v")) is False
    assert len(bucket.asked) == 1


def test_other_bytes_already_there_are_a_conflict_that_names_the_object(loop):
    bucket = Answering((412, xml("PreconditionFailed")), there=b"other")
    with pytest.raises(Conflict, match="s3://bucket/a/n is there with other bytes") as caught:
        loop.run_until_complete(bucket.create("a/n", b"v"))
    assert isinstance(caught.value, Failure)
    assert len(bucket.asked) == 1


@pytest.mark.parametrize(
    ("status", "text", "code"),
    [
        (503, xml("SlowDown"), "SlowDown"),
        (403, xml("AccessDenied"), "AccessDenied"),
        (409, xml("ConditionalRequestConflict"), "ConditionalRequestConflict"),
        (500, "", "HTTP 500"),
        (301, "<html>", "HTTP 301"),
    ],
)
def test_any_other_answer_is_an_error_with_s3s_own_code(loop, status, text, code):
    with pytest.raises(S3Error) as caught:
        loop.run_until_complete(Answering((status, text)).create("n", b"v"))
    assert caught.value.code == code


@pytest.fixture
def wired(loop):
    """A real bucket from its signer on, with a connection that hands requests to `answer`."""
    bucket = Bucket(some_settings())
    bucket.base, bucket.region, seen = "https://s3.test/bucket/", "eu-north-1", []

    class Keys:
        async def get_frozen_credentials(self):
            return SimpleNamespace(access_key="AK", secret_key="SK", token="TOKEN")

    class Http:
        async def send(self, request):
            seen.append(request)
            return await self.answer()

        async def answer(self):
            text = loop.create_future()
            text.set_result("body")
            return SimpleNamespace(status_code=200, text=text)

    bucket.credentials, bucket.http = Keys(), Http()
    return bucket, seen


def test_an_upload_is_one_signed_request_with_the_bytes_and_no_expect(loop, wired):
    bucket, seen = wired
    answer = loop.run_until_complete(
        bucket.put("ü b/x=1~.json", b"\0\xff", **{"If-None-Match": "*"})
    )
    assert answer == (200, "body")
    (request,) = seen
    assert (request.method, request.body) == ("PUT", b"\0\xff")
    assert request.url == "https://s3.test/bucket/%C3%BC%20b/x%3D1~.json"
    headers = {
        name.lower(): value.decode() if isinstance(value, bytes) else value
        for name, value in request.headers.items()
    }
    assert headers["if-none-match"] == "*"
    assert "expect" not in headers
    signed = headers["authorization"]
    assert "AK/" in signed and "/eu-north-1/s3/" in signed and "if-none-match" in signed
    assert headers["x-amz-security-token"] == "TOKEN"


@pytest.mark.parametrize(("size", "seconds"), [(100, PATIENCE), (600_000, 5 * PATIENCE)])
def test_an_upload_that_hangs_ends_in_time_for_its_size(loop, wired, size, seconds):
    bucket, _ = wired

    async def never():
        await loop.create_future()

    bucket.http.answer = never
    began = loop.time()
    with pytest.raises(TimeoutError):
        loop.run_until_complete(bucket.put("n", b"x" * size))
    assert loop.time() - began == pytest.approx(seconds, rel=0.01)


def client_error(code, message="why"):
    return ClientError({"Error": {"Code": code, "Message": message}}, "ListObjectsV2")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (S3Error(503, xml("SlowDown", "Please reduce\nyour rate")), "SlowDown: Please reduce your"),
        (S3Error(500, ""), "HTTP 500"),
        (S3Error(403, xml("AccessDenied")), "does the policy allow"),
        (client_error("ExpiredToken"), "ExpiredToken: why (check or renew the AWS credentials)"),
        (client_error("NoSuchBucket"), "correct S3_BUCKET"),
        (NoCredentialsError(), "renew the AWS credentials"),
        (TimeoutError(), "no answer in time"),
        (EndpointConnectionError(endpoint_url="http://x"), "http://x"),
        (KafkaTimeoutError("slow"), "KafkaTimeoutError: slow"),
        (ClientError({}, "Op"), "ClientError"),
    ],
)
def test_an_error_is_one_line_with_what_to_try(error, said):
    assert said in re.sub(
        r"KafkaTimeoutError: KafkaTimeoutError", "KafkaTimeoutError", explain(error)
    )
    assert "\n" not in explain(error)


# ------------------------------------------------------------------------------- the upload side


class Store:
    """A bucket in memory whose failures are `fails(name, attempt)`: an error, or None."""

    def __init__(self, loop, fails=lambda name, attempt: None, took=0.02):
        self.loop, self.fails, self.took = loop, fails, took
        self.objects, self.attempts, self.times = {}, defaultdict(int), []
        self.now = self.most = self.opened = 0

    async def create(self, name, value):
        self.attempts[name] += 1
        self.times.append((self.loop.time(), name))
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(self.took)
        self.now -= 1
        if error := self.fails(name, self.attempts[name]):
            raise error
        replay = name in self.objects
        self.objects[name] = value
        return not replay

    async def open(self):
        self.opened += 1
        return []


class Letters:
    """A producer to the dead letter topic: `answers` are what its futures do, one a send."""

    def __init__(self, *answers):
        self.answers, self.sent = list(answers), []

    def send(self, topic, value, key, headers):
        self.sent.append((topic, value, key, headers))
        answers = self.answers

        class Future:
            error = None

            def failed(self):
                return self.error is not None

            def get(self, timeout):
                answer = answers.pop(0) if answers else None
                if isinstance(answer, KafkaTimeoutError):
                    raise answer  # under way
                if answer:
                    self.error = answer
                    raise answer

        return Future()


class Upload:
    """An uploader on a virtual loop, with what is given to it and what it has finished."""

    def __init__(self, loop, bucket, concurrency=8):
        self.loop, self.bucket, self.stats = loop, bucket, Stats()
        settings = some_settings(S3_MAX_CONCURRENCY=str(concurrency))
        self.uploader = Uploader(settings, bucket, self.stats, loop)
        self.partition = Partition(0)
        self.outcomes = {}
        self.began = loop.time()

    def give(self, *records, partition=None):
        self.uploader.submit([(partition or self.partition, record) for record in records])

    def pass_(self, seconds):
        self.loop.run_until_complete(asyncio.sleep(seconds))
        while not self.uploader.finished.empty():
            partition, record, outcome = self.uploader.finished.get()
            assert (partition, record.offset) not in self.outcomes
            self.outcomes[partition, record.offset] = outcome
        return [self.outcomes[key] for key in self.outcomes]

    def during(self, begin, end):
        """When objects were tried, in seconds of an outage."""
        return [at - self.began for at, _ in self.bucket.times if begin <= at - self.began < end]


def test_records_become_objects_with_their_bytes_as_many_at_once_as_allowed(loop):
    up = Upload(loop, Store(loop), concurrency=5)
    given = [a_record(n, b'{"n": %d}' % n) for n in range(40)]
    up.give(*given)
    assert up.pass_(10) == ["written"] * 40
    assert up.bucket.objects == {object_name("", 0, r.offset): r.value for r in given}
    assert up.bucket.most == 5
    assert sum(up.stats.upload_seconds.counts) == 40


def test_a_record_that_is_there_already_is_replayed(loop):
    up = Upload(loop, Store(loop))
    up.bucket.objects["stock_market_7.json"] = b"{}"
    up.give(a_record())
    assert up.pass_(1) == ["replayed"]


def test_a_failing_s3_is_tried_with_one_object_at_a_time_until_it_answers(loop):
    up = Upload(loop, Store(loop, lambda name, n: S3Error(503, "") if loop.time() < 1100 else None))
    up.give(*(a_record(n) for n in range(50)))
    up.pass_(50)
    assert up.stats.holding and up.stats.reason == "HTTP 503"
    up.bucket.most = 0
    up.pass_(45)
    assert up.bucket.most == 1
    tries = up.during(2, 95)
    pauses = [b - a for a, b in pairwise(tries)]
    assert all(0.5 <= pause <= 1.1 for pause in pauses)  # backoff capped, with jitter
    assert len({round(pause, 6) for pause in pauses}) > len(pauses) / 2
    assert len({name for at, name in up.bucket.times if 1010 < at < 1095}) == 1
    assert up.pass_(7) == ["written"] * 50
    first = min(at for at, name in up.bucket.times if at >= 1100)
    assert first - 1100 < 2  # of recovery; the promise is 5 s
    assert not up.stats.holding and up.stats.holds == 1


def test_holding_is_said_at_once_then_every_30_s_and_so_is_its_end(loop, lines, caplog):
    up = Upload(loop, Store(loop, lambda name, n: S3Error(403, xml("AccessDenied"))))
    up.give(*(a_record(n) for n in range(20)))
    up.pass_(0.1)
    assert len(lines()) == 1
    assert "S3 failing, holding at test/0/" in lines()[0]
    assert "AccessDenied" in lines()[0] and "s3:PutObject" in lines()[0]
    up.pass_(95)
    assert len(lines()) == 4
    assert [re.search(r"still after (\d+) s", line)[1][0] for line in lines()[1:]] == [
        "3",
        "6",
        "9",
    ]
    up.bucket.fails = lambda name, n: None
    up.pass_(5)
    assert len(lines()) == 5 and re.match(r"S3 answers again after 9\d\.\d s", lines()[4])
    assert {(record.topic, record.partition) for record in caplog.records} == {("test", 0)}
    assert all(record.exc_info is None for record in caplog.records)


def test_a_flurry_of_short_failures_is_said_once(loop, lines):
    chance = random.Random(1)
    up = Upload(
        loop, Store(loop, lambda name, n: S3Error(503, "") if chance.random() < 0.1 else None)
    )
    for second in range(60):
        up.give(*(a_record(second * 20 + n) for n in range(20)))
        up.pass_(1)
    assert up.pass_(5) == ["written"] * 1200
    assert up.stats.holds > 50
    assert len([line for line in lines() if "failing" in line]) == 1
    assert len(lines()) == 2


def test_a_long_outage_after_a_flurry_is_said(loop, lines):
    up = Upload(loop, Store(loop, lambda name, n: S3Error(503, "") if n == 1 else None))
    up.give(a_record(0))
    up.pass_(1)
    assert len(lines()) == 2
    up.bucket.fails = lambda name, n: S3Error(503, "")
    up.give(a_record(1))
    up.pass_(3)
    assert len(lines()) == 3 and "failing" in lines()[2]


@pytest.mark.parametrize(
    "error",
    [
        S3Error(500, ""),
        client_error("InternalError"),
        EndpointConnectionError(endpoint_url="http://x"),
        aiohttp.ClientPayloadError("torn"),
        ConnectionResetError("reset"),
        TimeoutError(),
    ],
)
def test_a_known_failure_is_one_line_without_a_traceback(loop, caplog, error):
    up = Upload(loop, Store(loop, lambda name, n: error if n == 1 else None))
    up.give(a_record())
    assert up.pass_(2) == ["written"]
    assert [
        record.exc_info for record in caplog.records if "failing" in record.msg % record.args
    ] == [None]


def test_an_unknown_failure_keeps_its_traceback_and_skips_nothing(loop, caplog):
    up = Upload(loop, Store(loop, lambda name, n: ZeroDivisionError("oh") if n < 3 else None))
    up.give(a_record())
    assert up.pass_(2) == ["written"]
    assert isinstance(caplog.records[0].exc_info[1], ZeroDivisionError)
    assert up.stats.retries == 2


def test_a_conflict_is_handed_back_at_once_and_the_others_go_on(loop):
    def fails(name, attempt):
        return Conflict("other bytes") if name == "stock_market_3.json" else None

    up = Upload(loop, Store(loop, fails))
    up.give(*(a_record(n) for n in range(6)))
    outcomes = up.pass_(1)
    assert isinstance(up.outcomes[up.partition, 3], Conflict)
    assert outcomes.count("written") == 5


def test_a_conflict_found_while_holding_ends_the_hold(loop):
    up = Upload(loop, Store(loop, lambda name, n: S3Error(503, "") if n < 3 else Conflict("x")))
    up.give(a_record(0))
    up.pass_(2)
    assert isinstance(up.outcomes[up.partition, 0], Conflict)
    assert not up.stats.holding and up.uploader.answering.is_set()


def test_expired_credentials_are_looked_up_anew_before_each_try(loop):
    def fails(name, attempt):
        return None if up.bucket.opened >= 3 else client_error("ExpiredToken")

    up = Upload(loop, Store(loop, fails))
    up.give(a_record())
    assert up.pass_(10) == ["written"]
    assert up.bucket.opened == 3


def test_other_failures_leave_the_connection_alone(loop):
    up = Upload(loop, Store(loop, lambda name, n: S3Error(503, "") if n < 9 else None))
    up.give(a_record())
    assert up.pass_(10) == ["written"]
    assert up.bucket.opened == 0


@pytest.mark.parametrize("broken", [OSError("no metadata service"), None])
def test_a_lookup_that_fails_or_hangs_is_tried_again(loop, broken):
    up = Upload(loop, Store(loop, lambda name, n: S3Error(403, xml("InvalidAccessKeyId"))))

    async def open():
        up.bucket.opened += 1
        if broken:
            raise broken
        await loop.create_future()

    up.bucket.open = open
    up.give(a_record())
    up.pass_(20)
    assert up.bucket.opened >= 4
    up.bucket.fails = lambda name, n: None
    assert up.pass_(5) == ["written"]


def test_a_revoked_partition_is_let_go_and_the_next_ones_records_are_tried(loop):
    up = Upload(loop, Store(loop, lambda name, n: S3Error(503, "")))
    other = Partition(0)
    up.give(*(a_record(n) for n in range(20)))
    up.pass_(5)
    up.partition.revoked = True
    up.give(a_record(100), partition=other)
    assert up.pass_(5) == ["revoked"] * 20
    assert up.stats.holding
    up.bucket.fails = lambda name, n: None
    assert up.pass_(5)[-1] == "written"


def test_a_flawed_record_goes_unchanged_to_the_dead_letter_topic(loop):
    up = Upload(loop, Store(loop))
    up.uploader.producer = letters = Letters()
    up.give(a_record(3, b"\xffbad", partition=2, key=b"k", headers=[("mine", b"1"), ("n", None)]))
    assert up.pass_(1) == ["dead"]
    ((topic, value, key, headers),) = letters.sent
    assert (topic, value, key) == ("error_topic", b"\xffbad", b"k")
    assert headers[:2] == [("mine", b"1"), ("n", b"")]
    reason = headers[2]
    assert reason[0] == "error.reason" and reason[1].startswith(b"not UTF-8")
    assert headers[3:] == [
        ("source.topic", b"test"),
        ("source.partition", b"2"),
        ("source.offset", b"3"),
    ]
    assert not up.bucket.objects


def test_a_dead_letter_with_neither_key_nor_value_can_be_sent(loop):
    up = Upload(loop, Store(loop))
    up.uploader.producer = letters = Letters()
    up.give(a_record(0, None), a_record(1, None, key=b"k"), a_record(2, b""))
    assert up.pass_(1) == ["dead"] * 3
    assert [(value, key) for _, value, key, _ in letters.sent] == [
        (None, b""),
        (None, b"k"),
        (b"", None),
    ]


def test_a_dead_letter_under_way_is_waited_for_and_not_sent_twice(loop, lines):
    up = Upload(loop, Store(loop))
    up.uploader.producer = letters = Letters(*[KafkaTimeoutError("waiting")] * 3)
    up.give(a_record(0, b"bad"))
    assert up.pass_(5) == ["dead"]
    assert len(letters.sent) == 1
    assert not up.uploader.letters
    assert lines()[0].startswith(
        "topic error_topic failing, holding at test/0/0: KafkaTimeoutError"
    )


def test_a_refused_dead_letter_is_held_and_sent_again(loop, lines):
    up = Upload(loop, Store(loop))
    up.uploader.producer = letters = Letters(*[MessageSizeTooLargeError("big")] * 2)
    up.give(a_record(0, b"bad"))
    assert up.pass_(5) == ["dead"]
    assert len(letters.sent) == 3


# -------------------------------------------------------------------------------- the Kafka side


class Clock:
    def __init__(self):
        self.now = 1_000.0

    def __call__(self):
        return self.now


class Topic:
    """A consumer as the client's, over partitions in memory.

    What it has fetched and not yet given out is forgotten when a poll finds the partition
    paused: the position is then behind it (PITFALLS of the client).
    """

    def __init__(self, clock, ends, begins=None, prefetch=500, values=lambda p, o: b'{"a": 1}'):
        self.clock, self.values, self.prefetch = clock, values, prefetch
        self.ends = {TopicPartition("test", p): end for p, end in enumerate(ends)}
        self.begins = dict.fromkeys(self.ends, 0) | (begins or {})
        self.at, self.fetched, self.paused = {}, {}, set()
        self.group = {}  # committed
        self.commits = []  # (time, {tp: offset})
        self.errors = {}  # by method name: errors to raise, one a call
        self.next = None  # partitions to be assigned at the next poll
        self.polls, self.closed = [], False

    def _raise(self, method):
        if self.errors.get(method):
            raise self.errors[method].pop(0)

    def subscribe(self, listener, partitions):
        self.listener, self.next = listener, partitions

    def poll(self, timeout_ms, max_records):
        assert max_records >= 1
        self.polls.append((self.clock(), set(self.paused)))
        self._raise("poll")
        if self.next is not None:
            tps = {TopicPartition("test", p) for p in self.next}
            self.listener.on_partitions_revoked(set(self.at))
            self.at, self.fetched = dict.fromkeys(tps), {}
            self.paused, self.next = set(), None
            self.listener.on_partitions_assigned(tps)
        for tp, at in self.at.items():
            if at is None:
                self.at[tp] = self.group.get(tp)
                if self.at[tp] is None:
                    raise NoOffsetForPartitionError(tp)
        answer, room = {}, max_records
        for tp in self.at:
            if tp in self.paused:
                self.at[tp] += len(self.fetched.pop(tp, ()))
                continue
            if not self.begins[tp] <= self.at[tp] <= self.ends[tp]:
                raise OffsetOutOfRangeError({tp: self.at[tp]})
            if not self.fetched.get(tp):
                end = min(self.ends[tp], self.at[tp] + self.prefetch)
                self.fetched[tp] = list(range(self.at[tp], end))
            give, self.fetched[tp] = self.fetched[tp][:room], self.fetched[tp][room:]
            if give:
                answer[tp] = [
                    Record("test", tp.partition, o, None, self.values(tp.partition, o))
                    for o in give
                ]
                self.at[tp] = give[-1] + 1
                room -= len(give)
            if not room:
                break
        self.clock.now += 0.001 if answer else timeout_ms / 1000
        return answer

    def pause(self, *tps):
        assert set(tps) <= set(self.at)
        self.paused |= set(tps)

    def resume(self, *tps):
        assert set(tps) <= set(self.at)
        self.paused -= set(tps)

    def seek(self, tp, offset):
        assert tp in self.at
        self.at[tp] = offset
        self.fetched.pop(tp, None)

    def commit(self, offsets):
        self._raise("commit")
        assert set(offsets) <= set(self.at)
        plain = {tp: at.offset for tp, at in offsets.items()}
        self.group |= plain
        self.commits.append((self.clock(), plain))

    def commit_async(self, offsets):
        self.commit(offsets)

    @property
    def _coordinator(self):
        return SimpleNamespace(request_rejoin=lambda: None)

    def committed(self, tp):
        self._raise("committed")
        return self.group.get(tp)

    def partitions_for_topic(self, topic):
        return {tp.partition for tp in self.ends}

    def beginning_offsets(self, tps):
        return {tp: self.begins[tp] for tp in tps}

    def end_offsets(self, tps):
        self._raise("end_offsets")
        return {tp: self.ends[tp] for tp in tps}

    def highwater(self, tp):
        return self.ends[tp]

    def close(self, autocommit):
        assert autocommit is False
        self.closed = True


class Uploads:
    """An uploader that finishes each record after `takes(record)` seconds, in any order; never,
    when that is infinite. It is its own queue of what is finished."""

    def __init__(self, clock, takes=lambda record: 0.025, outcome=lambda record: "written"):
        self.clock, self.takes, self.outcome = clock, takes, outcome
        self.under_way, self.submitted = [], []
        self.finished = self

    def submit(self, items):
        for partition, record in items:
            self.submitted.append((record.partition, record.offset))
            self.under_way.append((self.clock() + self.takes(record), partition, record))

    def get(self, block, timeout):
        due = min(self.under_way, key=lambda each: each[0], default=None)
        if due is None or due[0] > self.clock() + (timeout if block else 0):
            self.clock.now += timeout if block else 0
            raise queue.Empty
        self.clock.now = max(self.clock(), due[0])
        self.under_way.remove(due)
        return due[1], due[2], self.outcome(due[2])


TP, TP1 = TopicPartition("test", 0), TopicPartition("test", 1)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def sinks(clock):
    """Makes a sink over a topic whose partitions end at `ends`, all of them assigned."""

    def make(*ends, limit=math.inf, takes=None, outcome=None, group=None, begins=None, **environ):
        topic = Topic(clock, ends, begins)
        topic.group = group or {}
        uploads = Uploads(clock)
        uploads.takes = takes or uploads.takes
        uploads.outcome = outcome or uploads.outcome
        environ = {"KAFKA_AUTO_OFFSET_RESET": "earliest", **environ}
        sink = Sink(some_settings(**environ), topic, uploads, Stats(), limit, clock)
        topic.subscribe(sink, range(len(ends)))
        return sink, topic, uploads

    return make


def stepping(sink, clock, seconds, check=lambda: None):
    until = clock() + seconds
    while clock() < until:
        before = clock()
        sink.step()
        assert clock() - before <= 0.5, "a step takes half a second at most"
        check()


def rebalance(sink, topic, *partitions):
    """Assign these partitions, in as many steps as it takes until the next poll."""
    topic.next = partitions
    while topic.next is not None:
        sink.step()


def test_every_record_is_handed_over_once_in_order_and_all_is_committed(sinks, clock):
    sink, topic, uploads = sinks(1_000)
    stepping(sink, clock, 3)
    assert uploads.submitted == [(0, offset) for offset in range(1_000)]
    assert topic.group == {TP: 1_000}
    assert sink.stats.written == 1_000


@with_settings(deadline=None, max_examples=30)
@given(st.randoms(use_true_random=False), st.lists(st.integers(0, 700), min_size=1, max_size=3))
def test_in_any_order_of_completion_only_what_is_done_is_committed(chance, ends):
    clock, done = Clock(), set()
    topic = Topic(clock, ends, prefetch=chance.choice([1, 7, 100, 1000]))

    def outcome(record):
        done.add((record.partition, record.offset))
        return chance.choice(["written", "replayed", "dead"])

    uploads = Uploads(clock, lambda record: chance.choice([0, 0.01, 0.1, 3]), outcome)
    settings = some_settings(KAFKA_AUTO_OFFSET_RESET="earliest")
    sink = Sink(settings, topic, uploads, Stats(), clock=clock)
    topic.subscribe(sink, range(len(ends)))

    whole = dict.fromkeys(topic.ends, 0)  # below it all is done

    def check():
        for tp, position in topic.group.items():
            while (tp.partition, whole[tp]) in done:
                whole[tp] += 1
            assert position <= whole[tp]
        assert len(uploads.submitted) - sum(topic.group.values()) <= WINDOW

    stepping(sink, clock, 5, check)
    while sink.busy():
        stepping(sink, clock, 1, check)
    stepping(sink, clock, 1, check)
    assert topic.group == topic.ends
    assert sorted(uploads.submitted) == sorted(set(uploads.submitted)) == sorted(done)
    assert sink.stats.done == sum(ends)


def test_a_record_that_takes_long_holds_the_commit_back_at_its_own_offset(sinks, clock):
    sink, topic, _uploads = sinks(100, takes=lambda record: 2 if record.offset == 40 else 0.01)
    stepping(sink, clock, 1)
    assert topic.group == {TP: 40}
    stepping(sink, clock, 2)
    assert topic.group == {TP: 100}


def test_the_window_of_256_is_never_exceeded(sinks, clock):
    sink, topic, uploads = sinks(2_000, 2_000, takes=lambda record: math.inf)

    def check():
        assert len(uploads.under_way) <= WINDOW

    stepping(sink, clock, 5, check)
    assert len(uploads.under_way) > WINDOW - 64
    assert not any(position for position in topic.group.values())


def test_under_load_it_is_committed_every_fifth_of_a_second_at_least(sinks, clock):
    sink, topic, _uploads = sinks(100_000, takes=lambda record: 0.025)
    stepping(sink, clock, 2)
    times = [at for at, _ in topic.commits]
    assert max(b - a for a, b in pairwise(times)) <= 0.2


@pytest.mark.parametrize("seconds", [0.05, 0.3, 1])
def test_a_trickle_is_committed_within_a_fifth_of_a_second_after_it_is_done(sinks, clock, seconds):
    sink, topic, uploads = sinks(0)
    written = {}
    uploads.outcome = lambda record: written.setdefault(record.offset, clock()) and "written"
    for _ in range(20):
        topic.ends[TP] += 1
        stepping(sink, clock, seconds)
    stepping(sink, clock, 1)
    first = {}
    for at, offsets in topic.commits:
        for offset in range(offsets[TP]):
            first.setdefault(offset, at)
    assert len(written) == 20
    assert all(first[offset] - at <= 2 * COMMIT_EVERY for offset, at in written.items())


def test_nothing_is_committed_when_nothing_was_done(sinks, clock):
    sink, topic, _uploads = sinks(0, group={TP: 0})
    stepping(sink, clock, 5)
    assert topic.commits == []


@pytest.mark.parametrize(("reset", "position"), [("earliest", 5), ("latest", 50)])
def test_the_position_is_pinned_by_a_commit_before_anything_is_fetched(
    sinks, clock, lines, reset, position
):
    sink, topic, uploads = sinks(50, begins={TP: 5}, KAFKA_AUTO_OFFSET_RESET=reset)
    sink.step()
    assert topic.group == {TP: position}
    assert uploads.submitted == []
    assert f"begins test/0 at offset {position} ({reset})" in lines()[-1]
    topic.ends[TP] += 10
    stepping(sink, clock, 1)
    assert uploads.submitted == [(0, offset) for offset in range(position, 60)]


def test_a_group_goes_on_where_it_stopped(sinks, clock):
    sink, _topic, uploads = sinks(50, 9, group={TP: 42})
    stepping(sink, clock, 1)
    assert sorted(uploads.submitted) == [(0, o) for o in range(42, 50)] + [(1, o) for o in range(9)]


def test_a_partition_added_since_the_group_began_is_begun_at_its_first_record_despite_latest(
    sinks, clock
):
    sink, topic, uploads = sinks(9, 9, KAFKA_AUTO_OFFSET_RESET="latest")
    topic.group[TP] = 9
    stepping(sink, clock, 2)
    assert sorted(uploads.submitted) == [(1, offset) for offset in range(9)]


@pytest.mark.parametrize("method", ["committed", "commit", "end_offsets"])
@pytest.mark.parametrize("error", [KafkaTimeoutError("slow"), CommitFailedError("moved on")])
def test_a_position_that_cannot_be_settled_now_is_settled_later(sinks, clock, method, error):
    sink, topic, uploads = sinks(9, 9, KAFKA_AUTO_OFFSET_RESET="latest")
    topic.errors[method] = [error] * 3
    stepping(sink, clock, 2)
    topic.ends |= {TP: 12, TP1: 12}
    stepping(sink, clock, 1)
    assert sorted(uploads.submitted) == [(p, o) for p in (0, 1) for o in (9, 10, 11)]


def test_while_nothing_can_be_taken_it_stays_a_member_and_skips_nothing(sinks, clock):
    late = clock() + 60
    sink, topic, uploads = sinks(1_000, takes=lambda record: max(0, late - clock()) + 0.02)
    stepping(sink, clock, 50)
    times = [at for at, _ in topic.polls]
    assert max(b - a for a, b in pairwise(times)) < 1
    assert all(TP in paused for at, paused in topic.polls if at > 1_010)
    stepping(sink, clock, 20)
    assert uploads.submitted == [(0, offset) for offset in range(1_000)]
    assert topic.group == {TP: 1_000}


def test_an_error_that_passes_skips_nothing(sinks, clock):
    sink, topic, uploads = sinks(1_000)
    stepping(sink, clock, 0.05)
    for _ in range(20):
        topic.errors["poll"] = [KafkaTimeoutError("slow")]
        for tp in topic.fetched:  # gone with the error
            topic.at[tp] += len(topic.fetched[tp])
        topic.fetched.clear()
        stepping(sink, clock, 0.1)
    stepping(sink, clock, 1)
    assert uploads.submitted == [(0, offset) for offset in range(1_000)]


@pytest.mark.parametrize("method", ["poll", "commit"])
def test_an_error_that_does_not_pass_is_raised(sinks, clock, method):
    sink, topic, _uploads = sinks(10, group={TP: 0})
    topic.errors[method] = [NotAllowed("no")]
    with pytest.raises(NotAllowed):
        stepping(sink, clock, 1)


def test_a_commit_that_the_group_refuses_is_made_by_whoever_owns_the_partition(sinks, clock):
    sink, topic, _uploads = sinks(100)
    stepping(sink, clock, 0.02)
    topic.errors["commit"] = [CommitFailedError("moved on")]
    topic.next = [0]
    stepping(sink, clock, 1)
    assert topic.group == {TP: 100}


def test_what_retention_removed_is_said_with_its_range(sinks, clock, lines):
    sink, topic, uploads = sinks(100, group={TP: 10})
    topic.begins[TP] = 60
    stepping(sink, clock, 1)
    lost = [line for line in lines() if line.startswith("LOST")]
    assert len(lost) == 1 and "offsets 10 to 59 of test/0" in lost[0]
    assert uploads.submitted == [(0, offset) for offset in range(60, 100)]
    assert topic.group == {TP: 100}


def test_retention_does_not_take_what_is_already_in_hand(sinks, clock, lines):
    late = clock() + 5

    def takes(record):
        return max(0, late - clock()) + record.offset % 100 / 50

    sink, topic, uploads = sinks(300, takes=takes)
    stepping(sink, clock, 1)
    in_hand = len(uploads.submitted)
    topic.begins[TP], topic.ends[TP] = 400, 420
    stepping(sink, clock, 12)
    assert any(f"offsets {in_hand} to 399" in line for line in lines() if line.startswith("LOST"))
    assert sink.stats.written == in_hand + 20
    assert topic.group == {TP: 420}


def test_a_topic_that_was_cut_is_said_and_begun_again(sinks, clock, lines):
    sink, topic, uploads = sinks(100, group={TP: 70})
    stepping(sink, clock, 1)
    topic.ends[TP] = 30
    stepping(sink, clock, 1)
    said = [line for line in lines() if "beyond the end" in line]
    assert len(said) == 1 and "position 100" in said[0] and "(30) of test/0" in said[0]
    assert uploads.submitted[-30:] == [(0, offset) for offset in range(30)]
    assert topic.group == {TP: 30}


def test_a_position_out_of_range_on_one_partition_leaves_the_others_alone(sinks, clock):
    sink, topic, uploads = sinks(2_000, 2_000)
    stepping(sink, clock, 0.1)
    topic.begins[TP1] = 1_500
    stepping(sink, clock, 5)
    assert [o for p, o in uploads.submitted if p == 0] == list(range(2_000))
    assert topic.group == {TP: 2_000, TP1: 2_000}


def test_before_partitions_are_given_up_what_is_under_way_is_finished_and_committed(sinks, clock):
    sink, topic, uploads = sinks(1_000, 1_000, takes=lambda record: 0.5)
    stepping(sink, clock, 0.3)
    taken = len(uploads.submitted)
    assert taken and not any(topic.group.values())
    rebalance(sink, topic, 1)
    assert sum(topic.group.values()) == taken
    stepping(sink, clock, 10)
    assert topic.group[TP1] == 1_000
    assert len(uploads.submitted) == len(set(uploads.submitted))


def test_giving_up_takes_two_seconds_at_most_and_late_outcomes_are_ignored(sinks, clock, lines):
    sink, topic, uploads = sinks(50, takes=lambda record: 10 if record.offset >= 20 else 0.01)
    stepping(sink, clock, 0.5)
    assert topic.group == {TP: 20}
    before = clock()
    rebalance(sink, topic)
    assert 2 <= clock() - before < 2.5
    assert all(partition.revoked for _, partition, _ in uploads.under_way)
    stepping(sink, clock, 15)
    assert not uploads.under_way
    assert topic.group == {TP: 20}
    assert sink.stats.written == 20 and len(lines("records")) == 20


def test_while_holding_partitions_are_given_up_at_once(sinks, clock):
    sink, topic, _uploads = sinks(50, takes=lambda record: math.inf)
    stepping(sink, clock, 0.5)
    sink.stats.reason = "SlowDown"
    before = clock()
    rebalance(sink, topic)
    assert clock() - before < 0.2


def test_a_late_outcome_of_an_earlier_assignment_commits_nothing_of_the_new_one(sinks, clock):
    takes = [10.0, 30.0]
    sink, topic, _uploads = sinks(50, takes=lambda record: takes[0])
    stepping(sink, clock, 0.5)
    del takes[0]
    rebalance(sink, topic, 0)
    stepping(sink, clock, 15)  # the first assignment's uploads end in this time
    assert topic.group == {TP: 0}
    stepping(sink, clock, 30)
    assert topic.group == {TP: 50}
    assert sink.stats.written == 50


def test_a_conflict_ends_the_step_even_after_a_rebalance(sinks, clock):
    sink, topic, _uploads = sinks(50, outcome=lambda record: Conflict("other bytes"))
    with pytest.raises(Conflict):
        stepping(sink, clock, 1)
    assert topic.group == {TP: 0}


@pytest.mark.parametrize("limit", [1, 5, 64, 65, 300, 999])
def test_no_more_is_taken_than_was_asked_for(sinks, clock, limit):
    sink, topic, uploads = sinks(500, 500, limit=limit, takes=lambda record: record.offset % 7 / 50)
    run(sink, SimpleNamespace(requested=False))
    assert len(uploads.submitted) == limit == sink.stats.done
    assert sum(topic.group.values()) == limit
    assert topic.closed


def test_a_stop_finishes_what_is_under_way_commits_and_closes(sinks, clock, lines):
    sink, topic, uploads = sinks(500, takes=lambda record: 1)
    stepping(sink, clock, 0.5)
    taken = len(uploads.submitted)
    run(sink, SimpleNamespace(requested=True))
    assert topic.group == {TP: taken} and topic.closed
    assert lines()[-1] == f"written {taken}, dead-lettered 0"


def test_a_stop_does_not_wait_for_s3_while_it_fails(sinks, clock):
    sink, topic, _uploads = sinks(50, takes=lambda r: 0.01 if r.offset < 9 else math.inf)
    stepping(sink, clock, 0.5)
    sink.stats.reason = "SlowDown"
    before = clock()
    run(sink, SimpleNamespace(requested=True))
    assert clock() - before < 0.5
    assert topic.group == {TP: 9} and topic.closed


def test_a_stop_waits_two_seconds_at_most(sinks, clock):
    sink, topic, _uploads = sinks(50, takes=lambda r: 0.01 if r.offset != 9 else math.inf)
    stepping(sink, clock, 0.5)
    before = clock()
    run(sink, SimpleNamespace(requested=True))
    assert 2 <= clock() - before < 2.5
    assert topic.group == {TP: 9} and topic.closed


def test_a_failure_commits_what_was_done_before_it_closes(sinks, clock):
    sink, topic, _uploads = sinks(
        50, outcome=lambda record: Conflict("x") if record.offset == 30 else "written"
    )
    with pytest.raises(Conflict):
        run(sink, SimpleNamespace(requested=False))
    assert topic.group == {TP: 30} and topic.closed


def test_each_object_has_its_line_and_each_dead_letter_a_warning(sinks, clock, lines, caplog):
    sink, topic, uploads = sinks(2, S3_PREFIX="raw/")
    topic.values = lambda p, o: b'{"a": 1}' if o == 0 else b"bad"
    uploads.outcome = lambda record: "written" if record.offset == 0 else "dead"
    stepping(sink, clock, 1)
    assert lines("records") == ["Upload Successfully: s3://bucket/raw/stock_market_0.json"]
    dead = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(dead) == 1
    assert "dead letter: test/0/1" in dead[0].getMessage() and "not JSON" in dead[0].getMessage()
    assert (dead[0].topic, dead[0].partition, dead[0].offset, dead[0].key) == ("test", 0, 1, None)
    assert (sink.stats.written, sink.stats.dead_letters, sink.stats.bytes) == (1, 1, 8)


def test_a_key_of_any_bytes_is_shown_as_text(sinks, clock, caplog):
    caplog.set_level(logging.INFO)
    sink, _topic, _uploads = sinks(0)
    sink.book(Partition(0), a_record(key=b"\xffk"), "written")
    assert caplog.records[-1].key == "\\xffk"


def test_the_status_line_comes_every_ten_seconds_with_lag_and_rate(sinks, clock, lines):
    sink, topic, _uploads = sinks(100_000, takes=lambda record: 1)
    stop = SimpleNamespace(requested=False)
    every = topic.poll

    def poll(*args, **options):
        stop.requested = clock() > 1_035
        return every(*args, **options)

    topic.poll = poll
    run(sink, stop)
    status = [line for line in lines() if " | lag " in line]
    assert len(status) == 3
    written, rate, lag, *rest = status[1].split(" | ")
    assert rest == ["retries 0", "dead-lettered 0"]
    assert int(written.removeprefix("written ")) + int(lag.removeprefix("lag ")) == pytest.approx(
        100_000, abs=300
    )
    assert 200 < float(rate.removesuffix("/s")) < 300


def test_the_lag_grows_while_holding_though_nothing_is_fetched(sinks, clock):
    sink, topic, _uploads = sinks(100, takes=lambda record: math.inf)
    stepping(sink, clock, 0.5)
    topic.highwater = lambda tp: 100
    topic.ends[TP] = 5_000
    sink.stats.reason = "SlowDown"
    assert sink.lag() == {0: 5_000}
    topic.errors["end_offsets"] = [KafkaTimeoutError("broker down")]
    assert sink.lag() == {0: 100}
