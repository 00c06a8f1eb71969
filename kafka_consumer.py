"""Writes each record of a Kafka topic to S3 as one object, and proves it.

    python kafka_consumer.py [--max-messages N] [--audit]

The main thread owns the Kafka client: it takes records, commits what is done and keeps the group
membership. The uploads run on the file system's event loop in its own thread (`Uploader`). A
record is open from when it is taken until its object exists or its dead letter is acknowledged;
what is committed is the position below which nothing is open.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":  # Ctrl-C while the imports run, a second or two: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import asyncio
import json
import logging
import math
import queue
import random
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import md5
from typing import Any
from urllib.parse import quote

import aiohttp
import botocore.handlers
import fsspec.asyn
from aiobotocore.session import AioSession
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.exceptions import BotoCoreError, ClientError
from kafka import ConsumerRebalanceListener, KafkaConsumer, OffsetAndMetadata, TopicPartition
from kafka.errors import (
    CommitFailedError,
    IllegalGenerationError,
    KafkaError,
    KafkaTimeoutError,
    OffsetOutOfRangeError,
    RebalanceInProgressError,
    UnknownMemberIdError,
)
from s3fs import S3FileSystem

from config import (
    Durations,
    Failure,
    NoOffsetForPartitionError,
    Settings,
    SettingsError,
    Stop,
    check_kafka,
    environment,
    make_producer,
    positive,
    records,
    serve_metrics,
    setup_logging,
    status,
    within,
)

log = logging.getLogger(__name__)

WINDOW = 256  # records taken and not committed: what a kill -9 makes us send again
BATCH = 64  # room that makes a poll worth its price
COMMIT_EVERY = 0.1  # s
PATIENCE = 3.0  # s that S3 may take, and as long again for each 150 kB
LONGEST_PAUSE = 1.0  # s between attempts while S3 fails; with PATIENCE under the 5 s of DESIGN
SAY_EVERY = 30.0  # s

NAME = re.compile(r"(?:partition=([1-9][0-9]*)/)?stock_market_(0|[1-9][0-9]*)\.json")

METRICS = (
    ("kafka_s3_records_written_total", "Records whose object exists.", "written"),
    ("kafka_s3_bytes_written_total", "Bytes of those objects.", "bytes"),
    ("kafka_s3_replays_total", "Objects already there with the same bytes.", "replays"),
    ("kafka_s3_dead_letters_total", "Records sent to the dead letter topic.", "dead_letters"),
    ("kafka_s3_retries_total", "Attempts that failed and were made again.", "retries"),
    ("kafka_s3_commits_total", "Offset commits acknowledged.", "commits"),
    ("kafka_s3_lag_records", "Records not yet done.", "lag", "partition"),
    (
        "kafka_s3_upload_seconds",
        "From a record's start to S3's or the broker's answer.",
        "upload_seconds",
    ),
    ("kafka_s3_holding", "1 while S3 fails and the consumer holds its place.", "holding"),
    ("kafka_s3_holding_info", "Why it holds.", "holding_info", "reason"),
    ("kafka_s3_holds_total", "Times it began to hold.", "holds"),
    ("kafka_s3_last_success_timestamp_seconds", "Last record done.", "last_success"),
)


@dataclass
class Stats:
    """What is counted, for the status line and METRICS."""

    written: int = 0
    bytes: int = 0
    replays: int = 0
    dead_letters: int = 0
    retries: int = 0
    commits: int = 0
    holds: int = 0
    reason: str = ""  # while holding: the error's code, a label of few values
    last_success: float = 0.0
    lag: dict[int, int] = field(default_factory=dict)
    upload_seconds: Durations = field(default_factory=Durations)

    @property
    def done(self) -> int:
        return self.written + self.dead_letters

    @property
    def holding(self) -> bool:
        return bool(self.reason)

    @property
    def holding_info(self) -> dict[str, int]:
        return {self.reason: 1} if self.reason else {}


# ---------------------------------------------------------------------------- records and objects


def _reject(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


# parse_int: any number of digits is JSON, but not an int of Python's.
_JSON = json.JSONDecoder(parse_constant=_reject, parse_int=str)


def flaw(value: bytes | None) -> str:
    """Why a record's value is not a JSON object; "" when it is one."""
    if not value:
        return "the value is null" if value is None else "the value is empty"
    try:
        parsed = _JSON.decode(value.decode("utf-8"))
    except UnicodeDecodeError as error:
        return f"not UTF-8: {error.reason} at byte {error.start}"
    except RecursionError:
        return "not JSON: nested too deep"
    except ValueError as error:
        return f"not JSON: {error}"
    return "" if isinstance(parsed, dict) else f"JSON, but not an object: {type(parsed).__name__}"


def object_name(prefix: str, partition: int, offset: int) -> str:
    """The object of a record; a function of nothing else, so that a replay makes the same one."""
    folder = f"partition={partition}/" if partition else ""
    return f"{prefix}{folder}stock_market_{offset}.json"


def about(record: Any) -> dict[str, Any]:
    """What a log line about a record carries: topic, partition, offset, key."""
    key = None if record.key is None else record.key.decode(errors="backslashreplace")
    return dict(topic=record.topic, partition=record.partition, offset=record.offset, key=key)


class S3Error(Exception):
    """S3's refusal: `code` as in its list of error responses."""

    def __init__(self, status: int, text: str) -> None:
        code, message = (re.search(f"<{tag}>([^<]*)", text) for tag in ("Code", "Message"))
        self.code = code[1] if code else f"HTTP {status}"
        super().__init__(message[1] if message else "")


class Conflict(Failure):
    """An object is there with other bytes."""


_RENEW = "check or renew the AWS credentials"
HINTS = {
    "AccessDenied": "does the policy allow s3:PutObject and s3:GetObject here?",
    "EndpointConnectionError": "see S3_ENDPOINT_URL; is the server up?",
    "ExpiredToken": _RENEW,
    "InvalidAccessKeyId": _RENEW,
    "InvalidToken": _RENEW,
    "MessageSizeTooLargeError": "raise max.message.bytes of KAFKA_DLQ_TOPIC",
    "NoCredentialsError": _RENEW,
    "NoSuchBucket": "create it, or correct S3_BUCKET",
    "RequestTimeTooSkewed": "set this machine's clock",
    "SignatureDoesNotMatch": _RENEW,
    "TokenRefreshRequired": _RENEW,
}


def code_of(error: BaseException) -> str:
    """A short name of an error: S3's own code where there is one."""
    if isinstance(error, ClientError):
        return str(error.response.get("Error", {}).get("Code", "ClientError"))
    return getattr(error, "code", None) or type(error).__name__


def explain(error: BaseException) -> str:
    """An error in one line, with what to try where that is known."""
    code, message = code_of(error), str(error)
    if isinstance(error, ClientError):
        message = error.response.get("Error", {}).get("Message", message)
    elif isinstance(error, TimeoutError):
        message = "no answer in time"
    hint = f" ({HINTS[code]})" if code in HINTS else ""
    return " ".join(f"{code}: {message}{hint}".split())


def patience(value: bytes) -> float:
    """Seconds that S3 may take for an object; then it is tried again, which is always safe."""
    return PATIENCE * (1 + len(value) / 150_000)


class Bucket:
    """The bucket, seen from the event loop; every call is bounded in time."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.name = settings.s3_bucket

    async def open(self) -> list[str]:
        """Connect with credentials looked up anew; returns a few of the names in the bucket.

        Raises what botocore does; the connection can be used even after AccessDenied.
        """
        session = AioSession()
        # With `Expect: 100-continue` an upload can wait for ever (no timeout covers it).
        session.unregister("before-call.s3", botocore.handlers.add_expect_header)
        self.fs = S3FileSystem(
            endpoint_url=self.settings.s3_endpoint_url,
            session=session,
            skip_instance_cache=True,
            config_kwargs={
                "max_pool_connections": self.settings.s3_max_concurrency,
                "connect_timeout": PATIENCE,
                "read_timeout": 10,
                "retries": {"total_max_attempts": 1},
            },
        )
        await self.fs.set_session()
        self.client = await self.fs.get_s3(self.name)
        sent: list[Any] = []
        events, note = self.client.meta.events, lambda request, **_: sent.append(request)
        events.register("before-send.s3", note)
        try:
            answer = await self.client.list_objects_v2(
                Bucket=self.name, Prefix=self.settings.s3_prefix, MaxKeys=3
            )
            return [entry["Key"] for entry in answer.get("Contents", [])]
        finally:
            events.unregister("before-send.s3", note)
            if sent:
                self._learn(sent[-1])
                self.credentials = await session.get_credentials()

    def _learn(self, request: Any) -> None:
        # botocore spends two thirds of a small PUT on what is the same for every object (rules of
        # the endpoint, serializer, hooks). Its signer and its HTTP session are all that differs;
        # the listing's own request says where the bucket is and in which region.
        self.base = request.url.partition("?")[0].rstrip("/") + "/"
        scope = request.headers["Authorization"]
        scope = scope.decode() if isinstance(scope, bytes) else scope
        self.region = re.findall(r"/\d{8}/([^/]+)/s3/", scope)[0]
        self.http = self.client._endpoint.http_session

    async def put(self, name: str, value: bytes, **headers: str) -> tuple[int, str]:
        """PUT with conditions; returns the HTTP status and the answer's text."""
        url = self.base + quote(name, safe="/~")
        request = AWSRequest("PUT", url, {"Content-Type": "application/json", **headers}, value)
        async with asyncio.timeout(patience(value)):
            keys = await self.credentials.get_frozen_credentials()
            S3SigV4Auth(keys, "s3", self.region).add_auth(request)
            answer = await self.http.send(request.prepare())
            return answer.status_code, await answer.text

    async def create(self, name: str, value: bytes) -> bool:
        """Make the object; False when it was there with the same bytes (a replay, or our own
        upload whose answer was lost). Raises Conflict, S3Error, and what the connection raises."""
        code, text = await self.put(name, value, **{"If-None-Match": "*"})
        if 200 <= code < 300:
            return True
        if code != 412:
            raise S3Error(code, text)
        if await self.get(name, patience(value)) != value:
            raise Conflict(
                f"s3://{self.name}/{name} is there with other bytes: it was left as it is. Was the"
                " topic made anew, or do two topics share this S3_PREFIX? Set another S3_PREFIX"
            )
        return False

    async def get(self, name: str, timeout: float = 60) -> bytes:
        async with asyncio.timeout(timeout):
            answer = await self.client.get_object(Bucket=self.name, Key=name)
            async with answer["Body"] as body:
                return bytes(await body.read())


# ------------------------------------------------------------------------------- the upload side


class Partition:
    """An assigned partition: `open` holds, in order, the offsets taken and not done."""

    def __init__(self, position: int) -> None:
        self.next = position  # where fetching goes on
        self.committed = position
        self.open: dict[int, None] = {}
        self.revoked = False

    def done(self) -> int:
        """The position below which nothing is open."""
        return next(iter(self.open), self.next)


Item = tuple[Partition, Any]  # a record and the assignment that it came by


class Uploader:
    """Workers on the event loop. Each takes a record and gives it up only when it is done, so
    nothing is skipped; `finished` gets (partition, record, outcome)."""

    def __init__(self, settings: Settings, bucket: Bucket, stats: Stats, loop: Any = None) -> None:
        self.settings, self.bucket, self.stats = settings, bucket, stats
        self.loop = loop or fsspec.asyn.get_loop()
        self.finished: queue.SimpleQueue[tuple[Partition, Any, Any]] = queue.SimpleQueue()
        self.waiting: asyncio.Queue[Item] = asyncio.Queue()
        self.answering = asyncio.Event()  # cleared while S3 fails and one record is the probe
        self.answering.set()
        self.began: float | None = None  # when the present hold began
        self.said = self.answered = -math.inf  # when it was last said; when the last one ended
        self.failing = "S3"
        self.letters: dict[tuple[int, int], Any] = {}
        self.lock = threading.Lock()
        self.producer: Any = None
        for _ in range(settings.s3_max_concurrency):
            asyncio.run_coroutine_threadsafe(self.work(), self.loop)

    def submit(self, items: Sequence[Item]) -> None:
        """Hand records over, from another thread."""

        def put() -> None:
            for item in items:
                self.waiting.put_nowait(item)

        self.loop.call_soon_threadsafe(put)

    async def work(self) -> None:
        while True:
            partition, record = await self.waiting.get()
            try:
                outcome: Any = await self.deliver(partition, record)
            except Exception as error:
                outcome = error
            self.finished.put((partition, record, outcome))

    async def deliver(self, partition: Partition, record: Any) -> str:
        """Make the record's object or dead letter, however long that takes; returns what became
        of it: "written", "replayed", "dead" or "revoked". Raises Conflict."""
        while not partition.revoked:
            await self.answering.wait()
            outcome, error = await self.attempt(record)
            if error and self.answering.is_set():  # the first to fail tries for all of them
                outcome = await self.hold(partition, record, error)
            if outcome:
                self.recovered(record)
                return outcome
        return "revoked"

    async def attempt(self, record: Any) -> tuple[str, Exception | None]:
        began = self.loop.time()
        try:
            if reason := flaw(record.value):
                await asyncio.to_thread(self.bury, record, reason)
                return "dead", None
            name = object_name(self.settings.s3_prefix, record.partition, record.offset)
            new = await self.bucket.create(name, record.value)
        except Conflict:
            raise
        except Exception as error:  # of any kind: see promise 4
            self.stats.retries += 1
            return "", error
        self.stats.upload_seconds.add(self.loop.time() - began)
        return "written" if new else "replayed", None

    async def hold(self, partition: Partition, record: Any, error: Exception | None) -> str:
        """Try one record, with growing pauses, until it is done or revoked ("")."""
        self.answering.clear()
        if self.began is None:  # else it goes on from the record of a partition given up
            self.began = self.loop.time()
            # A failure now and then (SlowDown) makes many short holds: of those that follow one
            # another only one that lasts a second is said.
            self.said = self.began - SAY_EVERY + (0 if self.began - self.answered > 5 else 1)
            self.stats.holds += 1
        self.failing = f"topic {self.settings.kafka_dlq_topic}" if flaw(record.value) else "S3"
        pause, outcome = 0.05, ""
        try:
            while error is not None and not partition.revoked:
                self.stats.reason = code_of(error)
                now = self.loop.time()
                if now - self.said >= SAY_EVERY:
                    log.warning(
                        "%s failing, %sholding at %s/%d/%d: %s; nothing is skipped",
                        self.failing,
                        "" if now - self.began < 2 else f"still after {now - self.began:.0f} s, ",
                        *(record.topic, record.partition, record.offset),
                        explain(error),
                        extra=about(record),
                        exc_info=None if isinstance(error, _KNOWN) else error,
                    )
                    self.said = now
                await asyncio.sleep(pause * random.uniform(0.5, 1))
                pause = min(2 * pause, LONGEST_PAUSE)
                if HINTS.get(code_of(error)) == _RENEW and pause > 0.1:  # not for a single refusal
                    await self.reopen()
                outcome, error = await self.attempt(record)
        finally:
            self.stats.reason = ""
            self.answering.set()
        return outcome

    def recovered(self, record: Any) -> None:
        """A record is done: if there was a hold, it is over."""
        if self.began is None or not self.answering.is_set():
            return
        self.answered = self.loop.time()
        if self.said >= self.began:
            text = "%s answers again after %.1f s"
            log.warning(text, self.failing, self.answered - self.began, extra=about(record))
        self.began = None

    async def reopen(self) -> None:
        """Look for renewed credentials: a session keeps those it has found for ever."""
        try:
            async with asyncio.timeout(PATIENCE):
                await self.bucket.open()
        except Exception as error:
            log.debug("while looking for new credentials: %s", explain(error))

    def bury(self, record: Any, reason: str) -> None:
        """Send a record to the dead letter topic, unchanged, and wait for the acknowledgement."""
        where = (record.partition, record.offset)
        with self.lock:
            self.producer = self.producer or make_producer(self.settings)
        future = self.letters.pop(where, None) or self.producer.send(
            self.settings.kafka_dlq_topic,
            value=record.value,
            # The client refuses a message with neither key nor value.
            key=b"" if record.key is None and record.value is None else record.key,
            headers=[
                *((name, text or b"") for name, text in record.headers),  # it refuses null too
                ("error.reason", reason.encode()),
                ("source.topic", record.topic.encode()),
                ("source.partition", str(record.partition).encode()),
                ("source.offset", str(record.offset).encode()),
            ],
        )
        try:
            future.get(timeout=PATIENCE)
        except KafkaError:
            if not future.failed():
                self.letters[where] = future  # under way: wait for it, do not send it twice
            raise


# No traceback for these.
_KNOWN = (S3Error, BotoCoreError, ClientError, aiohttp.ClientError, OSError, KafkaError)


# -------------------------------------------------------------------------------- the Kafka side


class Sink(ConsumerRebalanceListener):
    """Topic to bucket: takes records, prints and commits what is done, keeps the membership."""

    def __init__(
        self,
        settings: Settings,
        consumer: Any,
        uploader: Any,
        stats: Stats,
        limit: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings, self.consumer, self.uploader = settings, consumer, uploader
        self.stats, self.limit, self.clock = stats, limit, clock
        self.partitions: dict[TopicPartition, Partition] = {}
        self.fresh: set[TopicPartition] = set()  # assigned, their position not yet settled
        self.failure: Exception | None = None
        self.committed_at = self.polled_at = clock()

    def step(self) -> None:
        """Take, collect, commit: once each, in half a second at most while Kafka answers."""
        open_now = sum(len(partition.open) for partition in self.partitions.values())
        taken = sum(p.next - p.committed for p in self.partitions.values())
        left = self.limit - self.stats.done - open_now
        room = min(WINDOW - taken, left)
        if self.fresh or room >= min(BATCH, max(left, 1)):
            self.take(self.poll(100 if not open_now else 10, int(room) if room > 0 else 1))
            self.collect(0)
        else:
            self.collect(0.1)
            if self.clock() - self.polled_at > 0.5:
                self.keep_membership()
        if self.failure:
            raise self.failure
        self.commit()

    def poll(self, timeout_ms: int, limit: int) -> dict[TopicPartition, list[Any]]:
        """Records in order, {} while there is something to settle first."""
        self.polled_at = self.clock()
        try:
            try:
                batches = self.consumer.poll(timeout_ms=timeout_ms, max_records=limit)
            except OffsetOutOfRangeError:
                self.out_of_range()
                return {}
        except KafkaError as error:
            if not isinstance(error, NoOffsetForPartitionError) and not _passing(error):
                raise
            self.rewind()  # what the client had in hand when it raised is lost to it
            batches = {}
        if self.fresh:
            self.settle()
        return batches

    def settle(self) -> None:
        """Give every newly assigned partition its position, before anything is fetched. Where
        the group has none, it is committed: a death before the first commit skips nothing."""
        fresh = list(self.fresh)
        try:
            positions = {tp: self.consumer.committed(tp) for tp in fresh}
            new = [tp for tp in fresh if positions[tp] is None]
            if new:
                first = self.first_positions(new)
                self.consumer.commit({tp: _position(offset) for tp, offset in first.items()})
                positions |= first
            for tp in fresh:
                self.consumer.seek(tp, positions[tp])
                self.partitions[tp] = Partition(positions[tp])
        except KafkaError as error:
            if not _passing(error):
                raise
            self.partitions.clear()  # and again after the next poll, in a new assignment or this
            return
        self.fresh.clear()
        self.consumer.resume(*fresh)

    def first_positions(self, new: list[TopicPartition]) -> dict[TopicPartition, int]:
        """Where the group begins partitions that it has no position on. In a group that has begun
        with others these were added to the topic since, and `latest` would skip their records."""
        rule, topic = self.settings.kafka_auto_offset_reset, self.settings.kafka_topic
        known = (TopicPartition(topic, p) for p in self.consumer.partitions_for_topic(topic) or ())
        if rule == "latest" and any(self.consumer.committed(tp) is not None for tp in known):
            rule = "a partition added since the group began"
        ends = self.consumer.end_offsets if rule == "latest" else self.consumer.beginning_offsets
        first = dict(ends(new))
        for tp in new:
            text = "group %s begins %s/%d at offset %d (%s)"
            log.info(text, self.settings.kafka_group_id, *tp, first[tp], rule)
        return first

    def out_of_range(self) -> None:
        """A position that the topic does not have: say what is lost and go on after it."""
        tps = list(self.partitions)
        begins, ends = self.consumer.beginning_offsets(tps), self.consumer.end_offsets(tps)
        for tp in tps:
            at = self.partitions[tp].next
            if begins[tp] <= at <= ends[tp]:
                continue
            if at < begins[tp]:
                text = "LOST: retention removed offsets %d to %d of %s/%d before they were written"
                log.error(text, at, begins[tp] - 1, *tp)
                self.partitions[tp].next = begins[tp]  # what was taken before is still in hand
            else:
                text = (
                    "position %d is beyond the end (%d) of %s/%d: the topic was cut or made anew;"
                    " beginning again at %d, no object is overwritten"
                )
                log.error(text, at, ends[tp], *tp, begins[tp])
                self.partitions[tp] = Partition(begins[tp])
        self.rewind()

    def rewind(self) -> None:
        """Fetch from where taking stopped; the client forgets what it had fetched and not yet
        given out when it is paused, or raises."""
        for tp, partition in self.partitions.items():
            self.consumer.seek(tp, partition.next)

    def keep_membership(self) -> None:
        """Poll without taking anything: heartbeats go on, and rebalances are answered."""
        self.consumer.pause(*self.partitions)
        batches = self.poll(0, 1)
        self.consumer.resume(*self.partitions)
        self.rewind()
        self.take(batches)

    def take(self, batches: dict[TopicPartition, list[Any]]) -> None:
        items: list[Item] = []
        for tp, batch in batches.items():
            partition = self.partitions.get(tp)
            if partition is None:
                continue  # its position is settled first, and then this is fetched again
            for record in batch:
                partition.open[record.offset] = None
                items.append((partition, record))
            partition.next = batch[-1].offset + 1
        if items:
            self.uploader.submit(items)

    def collect(self, timeout: float) -> None:
        """Book what the uploader has finished; waits `timeout` seconds at most for the first."""
        try:
            while True:
                partition, record, outcome = self.uploader.finished.get(timeout > 0, timeout)
                timeout = 0
                self.book(partition, record, outcome)
        except queue.Empty:
            pass

    def book(self, partition: Partition, record: Any, outcome: Any) -> None:
        if isinstance(outcome, Exception):
            self.failure = self.failure or outcome
            return
        if partition.revoked:  # another assignment of it books this record again
            return
        partition.open.pop(record.offset, None)
        self.stats.last_success = time.time()
        extra = about(record)
        if outcome == "dead":
            self.stats.dead_letters += 1
            log.warning(
                "dead letter: %s/%d/%d (key %s) to %s: %s",
                *extra.values(),
                self.settings.kafka_dlq_topic,
                flaw(record.value),
                extra=extra,
            )
            return
        self.stats.written += 1
        self.stats.replays += outcome == "replayed"
        self.stats.bytes += len(record.value)
        name = object_name(self.settings.s3_prefix, record.partition, record.offset)
        records.info("Upload Successfully: s3://%s/%s", self.settings.s3_bucket, name, extra=extra)

    def ready(self) -> dict[TopicPartition, OffsetAndMetadata]:
        positions = {tp: p.done() for tp, p in self.partitions.items() if p.done() != p.committed}
        return {tp: _position(offset) for tp, offset in positions.items()}

    def commit(self, *, now: bool = False) -> None:
        """Commit what is done, every COMMIT_EVERY seconds or BATCH records."""
        ready = self.ready()
        if not ready:
            return
        count = sum(at.offset - self.partitions[tp].committed for tp, at in ready.items())
        if now or count >= BATCH or self.clock() - self.committed_at >= COMMIT_EVERY:
            try:
                self.consumer.commit(ready)
            except KafkaError as error:
                if not _passing(error):
                    raise
                return  # should the group have moved on, the next poll says what is ours
            self.committed_at = self.clock()
            self.stats.commits += 1
            for tp, at in ready.items():
                self.partitions[tp].committed = at.offset

    def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        """Finish what is under way and commit it; without waiting for the broker, which
        kafka-python 3 forbids in here: the commit travels ahead of what gives the partitions up."""
        deadline = self.clock() + 2
        while self.busy() and not self.stats.holding and self.clock() < deadline:
            self.collect(0.1)
        if ready := self.ready():
            self.consumer.commit_async(ready)
        for partition in self.partitions.values():
            partition.revoked = True
        self.partitions.clear()
        self.fresh.clear()
        # kafka-python 3 forgets a join that outlasts the poll it began in, unless it is asked for.
        self.consumer._coordinator.request_rejoin()

    def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        self.fresh = set(assigned)
        self.consumer.pause(*self.fresh)
        log.info("assigned: %s", ", ".join(f"{t}/{p}" for t, p in sorted(self.fresh)) or "nothing")

    def busy(self) -> bool:
        return any(partition.open for partition in self.partitions.values())

    def lag(self) -> dict[int, int]:
        """Records not yet done, by partition."""
        ends = {tp: self.consumer.highwater(tp) for tp in self.partitions}
        if self.stats.holding and ends:  # nothing is fetched, which would tell the end: ask
            with suppress(KafkaError):
                ends = self.consumer.end_offsets(list(ends))
        return {
            tp.partition: max(0, (ends[tp] or 0) - p.done()) for tp, p in self.partitions.items()
        }


def _position(offset: int) -> OffsetAndMetadata:
    # kafka-python 3 has a third field, with a default; kafka-python-ng has two.
    return OffsetAndMetadata(offset, "")


def _passing(error: KafkaError) -> bool:
    """Whether an error ends by itself: the broker's, or the group's that has moved on."""
    moved = (CommitFailedError, IllegalGenerationError, RebalanceInProgressError)
    return error.retriable or isinstance(error, (*moved, UnknownMemberIdError, KafkaTimeoutError))


def run(sink: Sink, stop: Stop) -> None:
    """Step until `stop` or the limit; then finish what is under way, commit and leave the group.

    Raises Failure.
    """
    stats, shown, before = sink.stats, sink.clock(), 0
    looked = shown
    every = 1 if sys.stderr.isatty() else 10
    try:
        while not stop.requested and stats.done < sink.limit:
            sink.step()
            now = sink.clock()
            if now - looked >= 1:
                stats.lag, looked = sink.lag(), now
            if now - shown >= every:
                status(
                    log,
                    "written %d | %.1f/s | lag %d | retries %d | dead-lettered %d%s",
                    stats.written,
                    (stats.written - before) / (now - shown),
                    sum(stats.lag.values()),
                    stats.retries,
                    stats.dead_letters,
                    f" | HOLDING: {stats.reason}" if stats.holding else "",
                )
                shown, before = now, stats.written
    finally:
        deadline = sink.clock() + 2
        while sink.busy() and not stats.holding and sink.clock() < deadline and not sink.failure:
            sink.collect(0.1)
        sink.commit(now=True)
        logging.getLogger("kafka").setLevel(logging.CRITICAL)  # it calls every end a failure
        sink.consumer.close(autocommit=False)
        status(log, "written %d, dead-lettered %d", stats.written, stats.dead_letters)


# -------------------------------------------------------------------------------------- the audit


class Ledger:
    """One partition's records from `begin` to `until`: a mark and 16 bytes of MD5 each."""

    NONE, RECORD, OBJECT, LETTER = range(4)

    def __init__(self, begin: int, until: int, end: int) -> None:
        self.begin, self.until, self.end = begin, max(begin, until), end
        self.marks = bytearray(self.until - begin)
        self.digests = bytearray(16 * len(self.marks))

    def write(self, offset: int, value: bytes | None) -> None:
        at = offset - self.begin
        self.marks[at] = self.RECORD
        self.digests[16 * at : 16 * at + 16] = digest(value)

    def mark(self, offset: int) -> int:
        """What is known of an offset; NONE also for one outside the range."""
        return self.marks[offset - self.begin] if self.begin <= offset < self.until else self.NONE

    def same(self, offset: int, found: bytes) -> bool:
        at = 16 * (offset - self.begin)
        return self.digests[at : at + 16] == found

    def missing(self) -> Iterator[tuple[int, int]]:
        """Ranges (first, last) of records with neither object nor dead letter."""
        for match in re.finditer(b"\x01+", self.marks):
            yield self.begin + match.start(), self.begin + match.end() - 1


def digest(value: bytes | None) -> bytes:
    """What a ledger keeps of a value; zeros for null."""
    return bytes(16) if value is None else md5(value, usedforsecurity=False).digest()


class Audit:
    """Compares topic, dead letter topic and bucket; writes to none of them."""

    def __init__(self, settings: Settings, bucket: Bucket, stop: Stop) -> None:
        self.settings, self.bucket, self.stop = settings, bucket, stop
        self.ledgers: dict[int, Ledger] = {}
        self.counts: Counter[str] = Counter()
        self.beyond: dict[str, tuple[int, int]] = {}  # objects past what was the topic's end
        self.said = time.monotonic()

    def run(self) -> int:
        """Print every problem, then what was checked; returns the exit code. Raises Failure."""
        topic = self.settings.kafka_topic
        consumer = KafkaConsumer(
            **self.settings.kafka(),
            group_id=self.settings.kafka_group_id,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
        )
        self.read_topic(consumer)
        self.read_letters(consumer)
        fsspec.asyn.sync(self.bucket.fs.loop, self.read_bucket)
        self.look_again(consumer)
        consumer.close(autocommit=False)
        for partition, ledger in self.ledgers.items():
            for first, last in ledger.missing():
                text = f"{topic}/{partition} offsets {first} to {last}: no object, no dead letter"
                self.problem("missing", text, last - first + 1)
            for mark, kind in ((Ledger.OBJECT, "objects"), (Ledger.LETTER, "dead letters")):
                self.counts[kind] += ledger.marks.count(mark)
            checked = len(ledger.marks) - ledger.marks.count(Ledger.NONE)
            records.info(
                "checked %s/%d: %d records, offsets %d up to the committed position %d (end %d)",
                *(topic, partition, checked, ledger.begin, ledger.until, ledger.end),
            )
        problems = [k for k in ("missing", "different", "stray") if self.counts[k]]
        verdict = ", ".join(f"{self.counts.pop(kind)} {kind}" for kind in problems)
        counts = ", ".join(f"{count} {kind}" for kind, count in self.counts.items() if count)
        records.info(
            "audit: %s: %s",
            counts or "no records",
            verdict or "nothing missing, nothing twice, every byte the same",
        )
        return 1 if problems else 0

    def problem(self, kind: str, text: str, count: int = 1) -> None:
        self.counts[kind] += count
        records.info("%s: %s", kind.upper(), text)

    def progress(self, text: str, *args: object) -> None:
        if self.stop.requested:
            raise Failure("the audit was stopped before its end: nothing is proven")
        if time.monotonic() - self.said > 2:
            self.said = time.monotonic()
            status(log, text, *args)

    def read_topic(self, consumer: Any) -> None:
        """Fill a ledger for each partition, up to the group's committed position."""
        topic, group = self.settings.kafka_topic, self.settings.kafka_group_id
        tps = [TopicPartition(topic, p) for p in sorted(consumer.partitions_for_topic(topic))]
        begins, ends = consumer.beginning_offsets(tps), consumer.end_offsets(tps)
        committed = {tp: consumer.committed(tp) for tp in tps}
        if all(position is None for position in committed.values()):
            raise Failure(
                f"KAFKA_GROUP_ID={group} has no committed position on topic {topic}: nothing to"
                " audit; is this the consumer's group?"
            )
        for tp, position in committed.items():
            if position is not None and position > ends[tp]:
                text = f"{topic}/{tp.partition}: committed {position}, but the end is {ends[tp]}"
                self.problem("missing", text, position - ends[tp])
            until = min(position or 0, ends[tp])
            self.ledgers[tp.partition] = Ledger(begins[tp], until, ends[tp])
        ranges = {tp: (begins[tp], self.ledgers[tp.partition].until) for tp in tps}
        for record in self.read(consumer, ranges):
            self.ledgers[record.partition].write(record.offset, record.value)

    def read_letters(self, consumer: Any) -> None:
        """Mark the records that are in the dead letter topic, with their bytes."""
        topic = self.settings.kafka_dlq_topic
        tps = [TopicPartition(topic, p) for p in consumer.partitions_for_topic(topic) or ()]
        begins, ends = consumer.beginning_offsets(tps), consumer.end_offsets(tps)
        for letter in self.read(consumer, {tp: (begins[tp], ends[tp]) for tp in tps}):
            headers = dict(letter.headers)
            if headers.get("source.topic") != self.settings.kafka_topic.encode():
                continue
            try:
                ledger = self.ledgers.get(int(headers["source.partition"]))
                offset = int(headers["source.offset"])
            except (KeyError, TypeError, ValueError):
                continue  # somebody else's letter
            mark = ledger.mark(offset) if ledger else Ledger.NONE
            if ledger and mark != Ledger.NONE and ledger.same(offset, digest(letter.value)):
                # A crash between the letter and the commit sends it again.
                self.counts["dead letters sent again"] += mark == Ledger.LETTER
                ledger.marks[offset - ledger.begin] = Ledger.LETTER

    def read(self, consumer: Any, ranges: dict[Any, tuple[int, int]]) -> Iterator[Any]:
        """Every record from begin up to until. Raises Failure when the topic gives no more."""
        left = {tp: until for tp, (begin, until) in ranges.items() if begin < until}
        total = sum(until - ranges[tp][0] for tp, until in left.items())
        count, at = 0, time.monotonic()
        consumer.assign(list(left))
        for tp in left:
            consumer.seek(tp, ranges[tp][0])
        while left:
            for tp, batch in consumer.poll(timeout_ms=500).items():
                at = time.monotonic()
                wanted = [record for record in batch if record.offset < ranges[tp][1]]
                count += len(wanted)
                yield from wanted
            left = {tp: until for tp, until in left.items() if consumer.position(tp) < until}
            if time.monotonic() - at > 30:
                raise Failure(f"no more records of {sorted(left)} came for 30 s: audit ended")
            self.progress("audit: read %d of %d records", count, total)

    async def read_bucket(self) -> None:
        """Stream the listing past the ledgers, a page at a time; read only what it leaves open."""
        prefix, listed = self.settings.s3_prefix, 0
        paginator = self.bucket.client.get_paginator("list_objects_v2")
        async for page in paginator.paginate(Bucket=self.bucket.name, Prefix=prefix):
            entries = page.get("Contents", [])
            unsure = [entry["Key"] for entry in entries if not self.settled(entry)]
            for start in range(0, len(unsure), 64):
                await asyncio.gather(*map(self.compare, unsure[start : start + 64]))
            listed += len(entries)
            self.progress("audit: listed %d objects", listed)

    def settled(self, entry: dict[str, Any]) -> bool:
        """Book an object of the listing; False when it has to be read, since not every ETag is
        the MD5 of the bytes (multipart uploads, KMS)."""
        key = entry["Key"]
        match = NAME.fullmatch(key, len(self.settings.s3_prefix))
        if not match:
            if key.startswith(("stock_market_", "partition="), len(self.settings.s3_prefix)):
                self.problem("stray", f"{key}: no record has this name")
            else:
                self.counts["other objects under the prefix"] += 1
            return True
        ledger, offset = self.ledgers.get(int(match[1] or 0)), int(match[2])
        mark = ledger.mark(offset) if ledger else Ledger.NONE
        if ledger and mark == Ledger.RECORD:
            try:
                same = ledger.same(offset, bytes.fromhex(entry["ETag"].strip('"')))
            except ValueError:
                same = False
            if same:
                ledger.marks[offset - ledger.begin] = Ledger.OBJECT
            return same
        if mark == Ledger.LETTER:
            self.problem("stray", f"{key}: its record is a dead letter too")
        elif ledger and offset < ledger.begin:
            self.counts["objects that outlive their records"] += 1
        elif ledger and ledger.until <= offset < ledger.end:
            self.counts["objects beyond the committed position"] += 1
        elif ledger and offset >= ledger.end:
            self.beyond[key] = (int(match[1] or 0), offset)
        elif mark == Ledger.NONE:
            self.problem("stray", f"{key}: the topic has no such record")
        return True

    def look_again(self, consumer: Any) -> None:
        """Ask for the topic's end anew: records may have come, and been written, meanwhile."""
        tps = [TopicPartition(self.settings.kafka_topic, p) for p in self.ledgers]
        ends = {tp.partition: end for tp, end in consumer.end_offsets(tps).items()}
        for key, (partition, offset) in self.beyond.items():
            if offset < ends[partition]:
                self.counts["objects beyond the committed position"] += 1
            else:
                self.problem("stray", f"{key}: the topic has no such record")

    async def compare(self, key: str) -> None:
        match = NAME.fullmatch(key, len(self.settings.s3_prefix))
        assert match
        ledger, offset = self.ledgers[int(match[1] or 0)], int(match[2])
        if not ledger.same(offset, digest(await self.bucket.get(key))):
            self.problem("different", f"{key}: other bytes than its record")
        ledger.marks[offset - ledger.begin] = Ledger.OBJECT


# ------------------------------------------------------------------------------------------ start


def check_bucket(bucket: Bucket) -> bool:
    """Check that the bucket is there and can be written to, and print the connection test.

    Returns whether it can be listed. Raises Failure; takes 10 s at most.
    """
    settings = bucket.settings
    where = f"S3_BUCKET={settings.s3_bucket} at {settings.s3_endpoint_url or 'AWS'}"
    loop = fsspec.asyn.get_loop()

    def call(coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result()

    with within(10, f"{where}: no answer within 10 s; is the address right, is the server up?"):
        try:
            names, listed = call(bucket.open()), True
        except (ClientError, BotoCoreError, OSError, ValueError) as error:  # the last: bad address
            if code_of(error) != "AccessDenied":
                raise Failure(f"{where}: {explain(error)}") from None
            names, listed = [], False
            # May it be written to, at least? A condition that cannot hold writes nothing.
            never = {"If-Match": '"00000000000000000000000000000000"'}
            name = f"{settings.s3_prefix}.connection-test"
            try:
                code, text = call(bucket.put(name, b"", **never))
            except (ClientError, BotoCoreError, OSError) as failed:
                raise Failure(f"{where}: {explain(failed)}") from None
            if code == 403:
                raise Failure(f"{where}: {explain(S3Error(code, text))}") from None
    shown = [f"{settings.s3_bucket}/{name}" for name in names] or [settings.s3_bucket]
    records.info("Connection Test:  %s", shown)
    if not listed:
        log.warning("%s: listing is not allowed (s3:ListBucket): --audit will not work", where)
    return listed


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Kafka topic to S3 objects. Settings: README.md.")
    parser.add_argument(
        "--max-messages", type=positive, default=math.inf, help="end after so many records"
    )
    parser.add_argument(
        "--audit", action="store_true", help="compare topic and bucket, and write nothing"
    )
    return parser.parse_args(argv)


def bucket_is_set(values: Mapping[str, Any]) -> str:
    if values.get("s3_bucket", True):
        return ""
    return "S3_BUCKET is not set: name the bucket, in .env or the environment"


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        settings = Settings.from_env(environment({}), bucket_is_set)
        setup_logging(settings)
        stop = Stop()
        check_kafka(settings)
        bucket = Bucket(settings)
        listed = check_bucket(bucket)
        if args.audit:
            stop.code = 1  # an audit that was stopped has proven nothing
            if not listed:
                raise Failure(f"S3_BUCKET={settings.s3_bucket}: --audit needs s3:ListBucket")
            return Audit(settings, bucket, stop).run()
        stats = Stats()
        serve_metrics(settings, METRICS, stats)
        consumer = KafkaConsumer(
            **settings.kafka(),
            group_id=settings.kafka_group_id,
            enable_auto_commit=False,
            auto_offset_reset="none",  # a client that chooses for us skips in silence
            session_timeout_ms=6000,  # the broker's minimum: how long a killed member is missed
            heartbeat_interval_ms=2000,
            request_timeout_ms=max(7000, settings.kafka_request_timeout_ms),  # above the session's
            retry_backoff_ms=2,  # also how long a poll can be held up by the heartbeat thread
            max_partition_fetch_bytes=2**18,  # 10 MB less memory, no slower; a larger one comes
        )
        uploader = Uploader(settings, bucket, stats)
        sink = Sink(settings, consumer, uploader, stats, args.max_messages)
        consumer.partitions_for_topic(settings.kafka_topic)  # else it joins once without any
        consumer.subscribe([settings.kafka_topic], listener=sink)
        run(sink, stop)
    except SettingsError as error:
        print(*error.args, sep="\n", file=sys.stderr)
        return 2
    except (Failure, KafkaError, ClientError, BotoCoreError, TimeoutError) as error:
        log.error("%s", error if isinstance(error, Failure) else explain(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
