"""Writes each record of a Kafka topic to S3 as one object.

    python kafka_consumer.py [--max-messages N] [--audit]

The main thread owns the Kafka client and decides everything. Single attempts to upload run on an
event loop in a thread of its own, and between the two there are only futures: a record that was
taken stands in its partition's line with the future of its attempt. What is done is taken from
the front of the line, and what stands before the front is committed. An attempt that failed is
the partition's hold: its record alone is tried again, until it is done. A monitor asks the broker
how far its topic goes, through a client of its own, and says what stands still.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":  # Ctrl-C while the imports run, a second or two: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import asyncio
import concurrent.futures
import json
import logging
import math
import random
import re
import socket
import ssl
import sys
import threading
import time
from base64 import b64encode
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import md5
from itertools import chain
from typing import Any
from urllib.parse import quote

import aiohttp
import botocore.handlers
import fsspec.asyn
from aiobotocore.session import AioSession
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError
from botocore.httpsession import ProxyConfiguration, get_cert_path
from botocore.parsers import ResponseParserError
from botocore.utils import get_environ_proxies
from kafka import ConsumerRebalanceListener, OffsetAndMetadata, TopicPartition
from kafka import errors as kafka_errors
from kafka.errors import KafkaError
from s3fs import S3FileSystem
from yarl import URL

import config
from config import (
    Failure,
    S3Error,
    Settings,
    SettingsError,
    Stop,
    code_of,
    explain,
    output,
    status,
)

log = logging.getLogger(__name__)

WINDOW = 256  # records taken and not committed, at most: what a kill -9 makes us send again
BYTES_IN_HAND = 32 * 2**20  # above this no more is taken; one record at least
POLL_ROOM = 64  # room in the window from which a poll is worth its price
COMMIT_EVERY = 0.1  # s
TIMEOUT = 3.0  # s of silence after which an attempt has failed; trying again is always safe
MAX_PAUSE = 1.0  # s between attempts while S3 fails; with TIMEOUT less than the 5 s of promise 4
CREDENTIALS_WAIT = 60.0  # s (promise 10)
CHUNK = 2**14  # bytes, of a large value: each that leaves is a sign of life
SESSION_MS = 6000  # the broker's minimum: how long a killed member is missed
LOOK_EVERY = 2.0  # s between the monitor's questions to the brokers
STANDS_AFTER = 5.0  # s without a record though there are some

EXPECTED = (  # errors that are said in one line, without a traceback
    *(S3Error, ClientError, BotoCoreError, aiohttp.ClientError, OSError, KafkaError),
    ResponseParserError,
)
TRANSIENT = (  # beside those that the client calls retriable: the group has moved on
    kafka_errors.CommitFailedError,
    kafka_errors.IllegalGenerationError,
    kafka_errors.RebalanceInProgressError,
    kafka_errors.UnknownMemberIdError,
    kafka_errors.KafkaTimeoutError,
    config.NoOffsetForPartitionError,  # until it is settled
)

# ------------------------------------------------------------------------------------ one record


def _not_json(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


# parse_int=str: JSON has integers of any length, Python converts 4,300 digits at most.
_DECODER = json.JSONDecoder(parse_constant=_not_json, parse_int=str)


def flaw(value: bytes | None) -> str:
    """Why a record's value is not a JSON object; "" when it is one."""
    if not value:
        return "the value is null" if value is None else "the value is empty"
    try:
        parsed = _DECODER.decode(value.decode("utf-8"))
    except UnicodeDecodeError as error:
        return f"not UTF-8: {error.reason} at byte {error.start}"
    except RecursionError:
        return "not JSON: nested too deep"
    except ValueError as error:
        return f"not JSON: {error}"
    return "" if isinstance(parsed, dict) else f"JSON, but not an object: {type(parsed).__name__}"


def object_name(prefix: str, partition: int, offset: int) -> str:
    """The object of a record; it depends on nothing else, so a replay makes the same one."""
    folder = f"partition={partition}/" if partition else ""
    return f"{prefix}{folder}stock_market_{offset}.json"


def about(record: Any) -> dict[str, Any]:
    """The fields of a log line about a record: topic, partition, offset, key."""
    key = None if record.key is None else record.key.decode(errors="backslashreplace")
    return dict(topic=record.topic, partition=record.partition, offset=record.offset, key=key)


# ------------------------------------------------------------- the bucket, seen from the event loop


class Conflict(Failure):
    """An object is there with other bytes."""


@dataclass(frozen=True)
class Answer:
    """An HTTP answer, with what proves that S3 gave it."""

    status: int
    headers: Mapping[str, str]  # names in any case
    body: bytes

    @property
    def etag(self) -> str:
        return self.headers.get("ETag", "").strip('"')

    @property
    def own_keys(self) -> bool:
        """S3 encrypts with keys for which the ETag is not the MD5 of the bytes."""
        customer = "x-amz-server-side-encryption-customer-algorithm" in self.headers
        scheme = self.headers.get("x-amz-server-side-encryption", "")
        return customer or scheme.startswith("aws:kms")

    def element(self, name: str) -> str:
        """The text of an element of S3's XML; "" when the answer has none."""
        found = re.search(rf"<{name}>([^<]*)</{name}>", self.body.decode(errors="replace"))
        return found[1] if found else ""

    def error(self) -> S3Error:
        """The error that this answer is, since it is not what was hoped for."""
        host = self.element("Endpoint") or self.headers.get("Location", "")
        region = self.headers.get("x-amz-bucket-region") or self.element("Region")
        if 300 <= self.status < 400:
            where = f"region {region} (set AWS_DEFAULT_REGION)" if region else host
            text = f"redirected to {where or 'nowhere'}, and redirects are not followed"
            code = self.element("Code") or f"HTTP {self.status}"
            return S3Error(code, f"{text}: correct S3_ENDPOINT_URL or the region")
        if code := self.element("Code"):
            return S3Error(code, self.element("Message"))
        kind = self.headers.get("Content-Type", "no content type")
        text = f"no S3 answer ({kind}): is a proxy or another server in between?"
        return S3Error(f"HTTP {self.status}", text)


def _small_buffer(address: Any) -> socket.socket:
    """A socket whose send buffer is so small that what is written to it is soon on its way: the
    silence of a slow link is then not longer than TIMEOUT."""
    connection = socket.socket(*address[:3])
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**16)
    connection.setblocking(False)
    return connection


class SignedHttp:
    """Signed requests to the address of a bucket, with botocore's signer and aiohttp.

    botocore spends two thirds of the time of a small PUT on what is the same for every object
    (rules of the endpoint, serializer, hooks): without it one process writes 1.4 times as many
    objects a second as with the best loop over `put_object`. What its HTTP session cannot do is
    needed here too: no redirect is followed, and what is bounded is silence, not the time that
    the bytes take on a slow link.
    """

    def __init__(self, address: str, region: str, verify: str | bool, connections: int) -> None:
        """`address` ends with a slash; `verify` is a file of authorities, or True: the usual."""
        self.address, self.region = address, region
        self.proxy = ProxyConfiguration(get_environ_proxies(address)).proxy_url_for(address)
        context: Any = True
        if address.startswith("https"):
            context = ssl.create_default_context(cafile=get_cert_path(verify))
        self.http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=connections, ssl=context, socket_factory=_small_buffer
            ),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT),
            auto_decompress=False,
        )

    async def request(
        self, method: str, name: str, keys: Any, value: bytes = b"", **headers: str
    ) -> Answer:
        """Raises TimeoutError after TIMEOUT seconds in which no byte moved."""
        url = self.address + quote(name, safe="/~")
        request = AWSRequest(method, url, headers, value)
        S3SigV4Auth(keys, "s3", self.region).add_auth(request)
        signed = {**request.headers, "Content-Length": str(len(value))}
        async with asyncio.timeout(TIMEOUT) as silence:

            def moved() -> None:
                silence.reschedule(asyncio.get_running_loop().time() + TIMEOUT)

            async with self.http.request(
                method,
                URL(url, encoded=True),
                data=value if len(value) <= CHUNK else _chunks(value, moved),
                headers=signed,
                proxy=self.proxy,
                allow_redirects=False,
            ) as answer:
                body = bytearray()
                async for chunk in answer.content.iter_any():
                    body += chunk
                    moved()
                return Answer(answer.status, answer.headers, bytes(body))

    async def close(self) -> None:
        await self.http.close()


async def _chunks(value: bytes, moved: Callable[[], None]) -> AsyncIterator[memoryview]:
    for start in range(0, len(value), CHUNK):
        yield memoryview(value)[start : start + CHUNK]
        moved()


class Bucket:
    """The bucket. Objects are created and compared; none is ever replaced."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.name = settings, settings.s3_bucket
        self.honours_condition = False  # until it is seen, objects are made one at a time
        self.first_object = asyncio.Lock()
        self.renewal: asyncio.Task[Any] | None = None

    async def find_credentials(self) -> Any:
        """The AWS credentials as they are now: a session keeps those that it has found.

        Raises what botocore raises; the credentials in use stay until others are there.
        """
        self.session = AioSession()
        credentials = await self.session.get_credentials()
        if credentials is None:
            raise NoCredentialsError
        await credentials.get_frozen_credentials()
        self.credentials, self.keys_until = credentials, 0.0
        return credentials

    async def connect(self) -> list[str]:
        """Find the bucket's address and region, by listing a few of its names; returns these.

        Raises what botocore raises; the bucket can be used even after AccessDenied.
        """
        # With `Expect: 100-continue` an upload can wait for ever (no timeout covers it).
        self.session.unregister("before-call.s3", botocore.handlers.add_expect_header)
        fs = S3FileSystem(
            endpoint_url=self.settings.s3_endpoint_url,
            session=self.session,
            skip_instance_cache=True,
            config_kwargs={
                "connect_timeout": TIMEOUT,
                "read_timeout": 5,
                "retries": {"total_max_attempts": 1},
            },
        )
        client = await fs.set_session()
        found: dict[str, str] = {}

        def note(request: Any, region_name: str, **_: Any) -> None:
            found.update(address=request.url.partition("?")[0], region=region_name)

        client.meta.events.register("before-sign.s3", note)
        try:
            answer = await client.list_objects_v2(
                Bucket=self.name, Prefix=self.settings.s3_prefix, MaxKeys=3
            )
            return [entry["Key"] for entry in answer.get("Contents", [])]
        finally:
            client.meta.events.unregister("before-sign.s3", note)
            if found:
                self.http = SignedHttp(
                    found["address"].rstrip("/") + "/",
                    found["region"],
                    self.session.get_config_variable("ca_bundle") or True,
                    self.settings.s3_max_concurrency,
                )

    async def keys(self) -> Any:
        """The keys to sign with. Their renewal may take long, and all uploads wait for one."""
        loop = asyncio.get_running_loop()
        if loop.time() >= self.keys_until:
            if self.renewal is None or self.renewal.done():
                renewal = self.slowly(self.credentials.get_frozen_credentials())
                self.renewal = loop.create_task(renewal)
            self.frozen = await asyncio.shield(self.renewal)
            self.keys_until = loop.time() + 1
        return self.frozen

    async def slowly(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """What may have to ask a program, a person or another service for credentials."""
        text = "still waiting for the AWS credentials after 5 s (60 s at most)"
        waiting = asyncio.get_running_loop().call_later(5, log.warning, text)
        try:
            async with asyncio.timeout(CREDENTIALS_WAIT):
                return await coroutine
        except TimeoutError:
            text = f"no AWS credentials within {CREDENTIALS_WAIT:.0f} s"
            raise S3Error("CredentialsTimeout", text) from None
        finally:
            waiting.cancel()

    async def request(self, method: str, name: str, value: bytes = b"", **headers: str) -> Answer:
        return await self.http.request(method, name, await self.keys(), value, **headers)

    async def put(self, name: str, value: bytes) -> Answer:
        """PUT where there is no object. Content-MD5: buckets with Object Lock want it."""
        digest = b64encode(md5(value, usedforsecurity=False).digest()).decode()
        headers = {"Content-Type": "application/json", "Content-MD5": digest, "If-None-Match": "*"}
        return await self.request("PUT", name, value, **headers)

    async def create(self, name: str, value: bytes, look_first: bool = False) -> str:
        """Make the object: "written", or "replayed" when it was there with the same bytes (a
        replay, or an upload of ours whose answer was lost: then `look_first`).

        Raises Conflict for other bytes, Failure for a server that ignores the condition, and
        S3Error, or what the connection raises, for what may pass.
        """
        if look_first and await self.holds(name, value):
            return "replayed"
        if self.honours_condition:
            return await self._create(name, value)
        async with self.first_object:
            outcome = await self._create(name, value)
            if outcome == "written" and not self.honours_condition:
                await self._check_condition(name, value)
            self.honours_condition = True
            return outcome

    async def _create(self, name: str, value: bytes) -> str:
        answer = await self.put(name, value)
        if answer.status == 412 and answer.element("Code") == "PreconditionFailed":
            if not await self.holds(name, value):
                raise S3Error("PreconditionFailed", "there is an object, and then there is none")
            return "replayed"
        if answer.status == 501 and answer.element("Code") == "NotImplemented":
            raise Failure(self._cannot_be_used("does not know If-None-Match (501 NotImplemented)"))
        if answer.status != 200 or not answer.etag or b"<Error>" in answer.body:
            raise answer.error()
        proven = answer.etag == md5(value, usedforsecurity=False).hexdigest() or answer.own_keys
        if not proven and not await self.holds(name, value):
            raise S3Error("NoSuchKey", "the answer said that the object was made, and it was not")
        return "written"

    async def _check_condition(self, name: str, value: bytes) -> None:
        answer = await self.put(name, value)
        if answer.status == 412 and answer.element("Code") == "PreconditionFailed":
            return
        if answer.status == 200 and answer.etag:
            raise Failure(self._cannot_be_used("ignores If-None-Match"))
        raise answer.error()

    def _cannot_be_used(self, why: str) -> str:
        where = self.settings.s3_endpoint_url or "AWS"
        return (
            f"S3_ENDPOINT_URL={where}: the server {why}: an object could be replaced without a"
            " word. Use a server that knows conditional writes"
        )

    async def holds(self, name: str, value: bytes) -> bool:
        """Whether the object is there with these bytes; False when it is not there.

        Raises Conflict when it has others, by an answer that proves itself.
        """
        digest = md5(value, usedforsecurity=False).hexdigest()
        head = await self.request("HEAD", name)
        if head.status == 404:
            return False
        if head.status == 200 and head.etag == digest and not head.own_keys:
            return True
        answer = await self.request("GET", name)
        if answer.status != 200 or not answer.etag:
            raise answer.error()
        if answer.body == value:
            return True
        of_its_bytes = answer.etag == md5(answer.body, usedforsecurity=False).hexdigest()
        of_its_parts = re.fullmatch(r"[0-9a-f]{32}-[0-9]+", answer.etag)
        if not (of_its_bytes or of_its_parts or answer.own_keys):
            raise answer.error()
        raise Conflict(
            f"s3://{self.name}/{name} is there with other bytes: it was left as it is. Was the"
            " topic made anew, or do two topics share this S3_PREFIX? Set another S3_PREFIX"
        )


# -------------------------------------------------------- attempts: all of this on the event loop


@dataclass(eq=False)
class Taken:
    """A record that was taken, and its present attempt: None while it waits for one."""

    record: Any
    attempt: Future[str] | None = None

    def failure(self) -> BaseException | None:
        """The error of an attempt that failed."""
        if self.attempt is None or not self.attempt.done():
            return None
        return self.attempt.exception()


class Uploader:
    """Single attempts to make objects and dead letters, as many at once as allowed."""

    def __init__(self, settings: Settings, bucket: Any, stats: Stats, loop: Any = None) -> None:
        self.settings, self.bucket, self.stats = settings, bucket, stats
        self.loop = loop or fsspec.asyn.get_loop()
        self.slots = asyncio.Semaphore(settings.s3_max_concurrency)
        self.tasks: set[asyncio.Task[None]] = set()
        self.letters: dict[tuple[int, int], Any] = {}  # under way, by partition and offset
        self.producer: Any = None
        self.sending = asyncio.Lock()

    def start(self, batch: Sequence[Taken], renew: bool = False, look_first: bool = False) -> None:
        """Begin an attempt for each, from another thread. `renew`: look for new credentials
        before; `look_first`: the last attempt may have made the object without an answer."""
        for taken in batch:
            taken.attempt = Future()
        attempts = [(taken.record, taken.attempt) for taken in batch]
        self.loop.call_soon_threadsafe(self._launch, attempts, renew, look_first)

    def _launch(self, attempts: list[Any], renew: bool, look_first: bool) -> None:
        for record, attempt in attempts:
            task = self.loop.create_task(self._run(record, attempt, renew, look_first))
            self.tasks.add(task)  # the loop itself keeps no task alive
            task.add_done_callback(self.tasks.discard)

    async def _run(self, record: Any, attempt: Future[str], renew: bool, look_first: bool) -> None:
        async with self.slots:
            if not attempt.set_running_or_notify_cancel():
                return
            began = self.loop.time()
            try:
                outcome = await self.deliver(record, renew, look_first)
            except BaseException as error:
                attempt.set_exception(error)
            else:
                self.stats.observe_upload(self.loop.time() - began)
                attempt.set_result(outcome)

    async def deliver(self, record: Any, renew: bool, look_first: bool) -> str:
        """Once: "written", "replayed" or "dead". Raises what Bucket.create and Kafka raise."""
        if reason := flaw(record.value):
            await self.send_letter(record, reason)
            return "dead"
        if renew:
            try:
                await self.bucket.slowly(self.bucket.find_credentials())
            except Exception as error:  # those in use may still be good
                log.debug("while looking for new credentials: %s", explain(error))
        name = object_name(self.settings.s3_prefix, record.partition, record.offset)
        return await self.bucket.create(name, record.value, look_first)

    async def send_letter(self, record: Any, reason: str) -> None:
        """Send a record to the dead letter topic, unchanged, and wait for the acknowledgement.

        Raises KafkaError, and TimeoutError while the broker does not answer: the letter is under
        way then, and the next attempt waits for it.
        """
        where = (record.partition, record.offset)
        sent = self.letters.pop(where, None)
        if sent is None:
            async with self.sending:  # in a thread: without the topic's metadata it takes 0.5 s
                sent = await asyncio.to_thread(self._send, record, reason)
        answered = asyncio.Event()
        sent.add_both(lambda _: self.loop.call_soon_threadsafe(answered.set))
        try:
            async with asyncio.timeout(TIMEOUT):
                await answered.wait()
        except TimeoutError:
            self.letters[where] = sent
            raise
        if sent.failed():
            raise sent.exception

    def _send(self, record: Any, reason: str) -> Any:
        if self.producer is None:
            self.producer = config.make_producer(self.settings)
        return self.producer.send(
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


# ---------------------------------------------------------------- the monitor: what stands still


@dataclass(frozen=True)
class Look:
    """What the brokers said of the topic. A partition whose leader does not answer is in
    `problems` and in neither of the dictionaries of offsets."""

    asked_at: float
    partitions: set[TopicPartition] = field(default_factory=set)
    begins: dict[TopicPartition, int] = field(default_factory=dict)
    ends: dict[TopicPartition, int] = field(default_factory=dict)
    problems: dict[TopicPartition, str] = field(default_factory=dict)
    committed: dict[TopicPartition, Any] = field(default_factory=dict)  # with metadata
    positions: bool = False  # whether `committed` was asked for


class Looker:
    """Asks the brokers, through a client of its own: a call may take as long as it likes."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.client: Any = None

    def look(self, asked_at: float, positions: bool) -> Look:
        """Raises KafkaError when no leader of the topic answers."""
        if self.client is None:
            self.client = config.make_consumer(
                self.settings,
                # No heartbeats are sent; the client demands that one is less than the other.
                session_timeout_ms=2000,
                heartbeat_interval_ms=500,
                request_timeout_ms=2500,
                metadata_max_age_ms=5000,
            )
        client, topic = self.client, self.settings.kafka_topic
        tps = {TopicPartition(topic, p) for p in client.partitions_for_topic(topic) or ()}
        if not tps:
            return Look(asked_at)
        client.assign(sorted(tps))  # so that it keeps this topic's metadata, and no other's
        begins: dict[TopicPartition, int] = {}
        ends: dict[TopicPartition, int] = {}
        problems: dict[TopicPartition, str] = {}
        for leader, led in self.by_leader(tps).items():
            try:
                ends |= client.end_offsets(led)
                begins |= client.beginning_offsets(led)
            except (KafkaError, KeyError) as error:  # KeyError: deleted just now
                text = f"its leader ({leader}) does not answer: {type(error).__name__}: {error}"
                problems |= dict.fromkeys(led, text)
        if not ends:
            raise kafka_errors.KafkaTimeoutError(next(iter(problems.values())))
        committed = client._coordinator.fetch_committed_offsets(sorted(tps)) if positions else {}
        return Look(asked_at, tps, begins, ends, problems, committed, positions)

    def by_leader(self, tps: Iterable[TopicPartition]) -> dict[str, list[TopicPartition]]:
        cluster = self.client._client.cluster
        led: dict[str, list[TopicPartition]] = {}
        for tp in tps:
            node = cluster.leader_for_partition(tp)
            broker = cluster.broker_metadata(node) if node not in (None, -1) else None
            name = f"{broker.host}:{broker.port}" if broker else "there is none now"
            led.setdefault(name, []).append(tp)
        return led


class Monitor:
    """Asks the brokers how far the topic goes, and says what stands still and the status,
    whatever the main thread waits for: it has a thread of its own."""

    def __init__(
        self,
        sink: Any,
        looker: Any,
        clock: Callable[[], float] = time.monotonic,
        background: Callable[..., Future[Look]] = config.background,
    ) -> None:
        self.sink, self.looker, self.clock, self.background = sink, looker, clock, background
        self.latest: Look | None = None
        self.asking: Future[Look] | None = None
        self.asked_at, self.unanswered_since = -math.inf, math.inf
        self.notices = config.Notices(clock)
        self.ended = False
        self.shown_at, self.shown = clock(), 0

    def start(self) -> None:
        threading.Thread(target=self._run, name="monitor", daemon=True).start()

    def _run(self) -> None:
        while not self.ended:
            self.tick()
            time.sleep(0.1)

    def tick(self) -> None:
        """Ask, hear, say: each where it is time."""
        self.hear()
        now = self.clock()
        wanted = self.sink.wants_look_after
        if self.asking is None and (wanted > self.asked_at or now - self.asked_at >= LOOK_EVERY):
            positions = wanted > self.asked_at
            self.unanswered_since = min(self.unanswered_since, now)
            self.asked_at = now
            self.asking = self.background(self.looker.look, now, positions)
        self.notices.report(self.problems(now))
        every = 1 if sys.stderr.isatty() else 10
        if now - self.shown_at >= every:
            self.show(now)

    def hear(self) -> None:
        if self.asking is None or not self.asking.done():
            return
        if self.asking.exception() is None:
            self.latest = self.asking.result()
            self.unanswered_since = math.inf
        self.asking = None

    def problems(self, now: float) -> dict[str, config.Problem]:
        """What stands still now; the key says what would be so if it did not."""
        sink, topic, look = self.sink, self.sink.settings.kafka_topic, self.latest
        if now - self.unanswered_since >= 2:
            text = (
                f"no answer from the broker for {now - self.unanswered_since:.0f} s:"
                f" {sink.under_way()} records in hand wait, nothing is lost{config.last_words}"
            )
            return {"the broker answers": config.Problem(text)}
        found = {}
        if look and not look.partitions:
            text = f"topic {topic} does not exist any more, or this user may not see it"
            found["the topic is there"] = config.Problem(text)
        for tp, why in {**(look.problems if look else {}), **sink.standing}.items():
            if tp in sink.partitions:
                text = f"{topic}/{tp.partition} stands still: {why}"
                found[f"{topic}/{tp.partition} moves"] = config.Problem(text)
        if waits := sink.waits_for_group(now):
            found["a partition is assigned"] = config.Problem(waits)
        return found

    def lag(self, now: float) -> dict[int, int | None]:
        """Records not yet done, by partition; None where the brokers did not say lately."""
        look = self.latest
        lag: dict[int, int | None] = {}
        for tp, partition in list(self.sink.partitions.items()):
            end = None if look is None else look.ends.get(tp)
            if end is None or now - self.unanswered_since >= 2:
                lag[tp.partition] = None
            else:
                lag[tp.partition] = max(0, end - partition.done())
        return lag

    def show(self, now: float) -> None:
        """The status line: why it holds comes first, since a narrow terminal cuts the end off."""
        stats, lag = self.sink.stats, self.sink.stats.lag
        rate = (stats.written - self.shown) / (now - self.shown_at)
        self.shown_at, self.shown = now, stats.written
        holding = f"HOLDING: {', '.join(sorted(set(stats.holding.values())))} | "
        of_limit = ""
        if self.sink.limit < math.inf:
            of_limit = f" of {self.sink.limit:.0f}"
            if rate:
                of_limit += f", {(self.sink.limit - stats.done) / rate:.0f} s left"
        unknown = not lag or None in lag.values()
        status(
            log,
            "%swritten %d%s | %.1f/s | lag %s | retries %d | dead-lettered %d",
            *(holding if stats.holding else "", stats.written, of_limit, rate),
            *("?" if unknown else sum(lag.values()), stats.retries, stats.dead_letters),
        )


# ----------------------------------------------------------- decisions: all on the main thread


@dataclass
class Stats:
    """What is counted, for the status line and for infra/monitoring."""

    written: int = 0
    bytes: int = 0
    replays: int = 0
    dead_letters: int = 0
    retries: int = 0
    holds: int = 0
    commits: int = 0
    last_success: float = 0.0
    holding: dict[int, str] = field(default_factory=dict)  # partition: why
    lag: dict[int, int | None] = field(default_factory=dict)  # partition: records, None: unknown
    observe_upload: Callable[[float], object] = lambda seconds: None

    @property
    def done(self) -> int:
        return self.written + self.dead_letters


@dataclass
class Hold:
    """S3, or the dead letter topic, fails for a partition: one record is tried until it is done."""

    taken: Taken
    what: str
    began: float
    error: BaseException
    retry_at: float
    pause: float = 0.05  # s, before the attempt after the next
    renew_at: float = 0.0
    renew_pause: float = 0.5  # s

    def age(self) -> float:
        return self.began


@dataclass
class Partition:
    """An assigned partition: what was taken and is not yet done, in line by offset."""

    position: int  # where taking goes on
    committed: int
    moved_at: float = 0.0
    line: deque[Taken] = field(default_factory=deque)
    hold: Hold | None = None
    works: bool = True  # its last attempt to end was good; else it is tried with one at a time
    rests_until: float | None = None  # not fetched until then: the broker gives nothing
    lost: str = ""  # what retention removed before it was written, for the audit: "3-9,20-20"

    def pending(self) -> list[Taken]:
        """Attempts that are under way."""
        return [taken for taken in self.line if taken.attempt and not taken.attempt.done()]

    def waiting(self) -> list[Taken]:
        """Records that have no attempt, or one that failed."""
        return [taken for taken in self.line if taken.attempt is None or taken.failure()]

    def retry_at(self) -> float:
        return self.hold.retry_at if self.hold else -math.inf

    def is_probing(self) -> bool:
        """Whether the one record is under way by which a partition that fails is tried."""
        if self.hold is None:
            return bool(self.pending())
        return self.hold.taken.attempt is not None and not self.hold.taken.attempt.done()

    def probe_is_due(self, now: float) -> bool:
        waits = bool(self.waiting()) and now >= self.retry_at()
        return waits and not self.is_probing()

    def done(self) -> int:
        """The position below which all is done: what may be committed."""
        return self.line[0].record.offset if self.line else self.position

    def as_commit(self) -> OffsetAndMetadata:
        return OffsetAndMetadata(self.done(), f"lost {self.lost}" if self.lost else "")


@dataclass(eq=False)
class Sink(ConsumerRebalanceListener):
    """Takes records, has them uploaded, commits what is done, and keeps the membership."""

    settings: Settings
    consumer: Any
    uploader: Any
    stats: Stats
    limit: float = math.inf
    clock: Callable[[], float] = time.monotonic
    wait: Callable[..., Any] = concurrent.futures.wait
    monitor: Any = None
    partitions: dict[TopicPartition, Partition] = field(default_factory=dict)
    standing: dict[TopicPartition, str] = field(default_factory=dict)
    last_committed: dict[TopicPartition, int] = field(default_factory=dict)
    under_way_at_most: float = math.inf  # less after a hold by silence: the link may be slow
    wants_look_after: float = -math.inf
    verified: bool = False
    range_unknown: bool = False
    recovering: bool = False  # something fails, or waits because something failed
    committed_at: float = -math.inf
    polled_at: float = -math.inf
    stepped_at: float = math.inf
    polling_since: float | None = None
    joined_at: float = math.inf

    def __post_init__(self) -> None:
        self.notices = config.Notices(self.clock)

    # -- Take, book, commit

    def step(self) -> None:
        """Each of the three once, in half a second at most while Kafka answers."""
        now = self.clock()
        if now - self.stepped_at > 0.5:  # frozen, or cut off: the topic may be another one
            self.suspect()
        self.stepped_at = now
        room, left = self.room(), self.limit - self.stats.done - self.under_way()
        if self.range_unknown:
            self.find_range()
        if self.unsettled() or (room >= min(POLL_ROOM, max(left, 1)) and not self.range_unknown):
            idle = not (self.under_way() or self.unsettled())
            self.take(self.poll(100 if idle else 10, max(1, int(room))))
            self.notice_standing(now)
        else:
            self.wait_for_first(0.1)
            if self.clock() - self.polled_at > 0.5:
                self.keep_membership()
        self.book()
        self.retry()
        self.commit()

    def under_way(self) -> int:
        return sum(len(partition.line) for partition in list(self.partitions.values()))

    def room(self) -> float:
        """How many records may be taken."""
        lines = [partition.line for partition in self.partitions.values()]
        if sum(len(t.record.value or b"") for t in chain(*lines)) >= BYTES_IN_HAND:
            return 0
        uncommitted = sum(p.position - p.committed for p in self.partitions.values())
        return min(WINDOW - uncommitted, self.limit - self.stats.done - self.under_way())

    def poll(self, timeout_ms: int, limit: int) -> dict[TopicPartition, list[Any]]:
        """Records in order; {} while something has to be settled first."""
        self.polled_at = self.polling_since = self.clock()
        batches = {}
        try:
            batches = self.consumer.poll(timeout_ms=timeout_ms, max_records=limit)
        except kafka_errors.OffsetOutOfRangeError:
            self.range_unknown = True
            self.suspect()
            self.rewind()
        except KafkaError as error:
            raise_unless_transient(error)
            self.suspect()
            self.rewind()
        except Failure:
            raise
        except Exception as error:
            raise unexpected(error) from error
        self.polling_since = None
        if new := self.unsettled():
            self.settle(new)
        return batches

    def take(self, batches: dict[TopicPartition, list[Any]]) -> None:
        """Put records in line, and begin their attempts where nothing fails."""
        begun = []
        for tp, batch in batches.items():
            partition = self.partitions.get(tp)
            if partition is None:
                continue  # it is settled first, and then this is fetched again
            taken = [Taken(record) for record in batch if not config.is_marker(record)]
            partition.line.extend(taken)
            partition.position = batch[-1].offset + 1
            partition.moved_at = self.clock()
            self.standing.pop(tp, None)
            if partition.works and not partition.hold:
                begun += taken
        if self.under_way_at_most < math.inf or len(begun) < sum(map(len, batches.values())):
            self.recovering = True  # `retry` begins them
        elif begun:
            self.uploader.start(begun)
        for tp, partition in self.partitions.items():  # past markers, and what was compacted
            partition.position = max(partition.position, self.consumer.position(tp))

    def wait_for_first(self, seconds: float) -> None:
        """Wait until the first in a line is done; `seconds` at most."""
        attempts = [p.line[0].attempt for p in self.partitions.values() if p.line]
        pending = [attempt for attempt in attempts if attempt and not attempt.done()]
        if not pending:  # a hold pauses, or the broker takes no commit
            pending, seconds = [Future()], min(seconds, 0.02)
        self.wait(pending, seconds, return_when=concurrent.futures.FIRST_COMPLETED)

    def book(self) -> None:
        """Take what is done from the front of each line, and see what failed, there or behind.

        Raises Failure (a Conflict, say) and leaves that record in line: it is not committed.
        """
        for tp, partition in self.partitions.items():
            line = partition.line
            while line and line[0].attempt and line[0].attempt.done() and not line[0].failure():
                self.say(line[0].record, line[0].attempt.result())
                done = line.popleft()
                partition.works = True
                self.under_way_at_most = self.under_way_at_most + 1
                if partition.hold and partition.hold.taken is done:
                    self.release(tp, partition)
            self.find_failure(tp, partition)
        self.notices.report(self.holds())

    def commit(self, *, now: bool = False) -> None:
        """Commit what is done, every COMMIT_EVERY seconds or POLL_ROOM records."""
        ready = {tp: p for tp, p in self.partitions.items() if p.done() != p.committed}
        count = sum(p.done() - p.committed for p in ready.values())
        due = now or count >= POLL_ROOM or self.clock() - self.committed_at >= COMMIT_EVERY
        if not ready or not due or not self.verify():
            return
        if self.send_commit({tp: p.as_commit() for tp, p in ready.items()}):
            self.committed_at = self.clock()
            self.stats.commits += 1
            for partition in ready.values():
                partition.committed = partition.done()

    def send_commit(self, positions: dict[TopicPartition, OffsetAndMetadata]) -> bool:
        """Whether it was acknowledged. Should the group have moved on, the next poll says so."""
        try:
            self.consumer.commit(positions)
        except KafkaError as error:
            raise_unless_transient(error)
            self.suspect()
            return False
        except Exception as error:
            raise unexpected(error) from error
        self.last_committed |= {tp: at.offset for tp, at in positions.items()}
        return True

    def say(self, record: Any, outcome: str) -> None:
        """Count a record that is done, and print its line."""
        extra = about(record)
        self.stats.last_success = time.time()
        if outcome == "dead":
            self.stats.dead_letters += 1
            text = "dead letter: %s/%d/%d (key %s) to %s: %s"
            dlq, reason = self.settings.kafka_dlq_topic, flaw(record.value)
            log.warning(text, *extra.values(), dlq, reason, extra=extra)
            return
        self.stats.written += 1
        self.stats.replays += outcome == "replayed"
        self.stats.bytes += len(record.value)
        name = object_name(self.settings.s3_prefix, record.partition, record.offset)
        output.info("Upload Successfully: s3://%s/%s", self.settings.s3_bucket, name, extra=extra)

    # -- Holding: while S3, or the dead letter topic, fails

    def find_failure(self, tp: TopicPartition, partition: Partition) -> None:
        """Begin a hold at the first record that failed, or go on with the one that there is."""
        hold = partition.hold
        if hold is None:
            failed = next((taken for taken in partition.line if taken.failure()), None)
            if failed:
                self.begin_hold(tp, partition, failed)
        elif hold.taken.attempt and hold.taken.attempt.done():
            error = hold.taken.failure()
            if error is None:
                self.release(tp, partition)
            elif error is not hold.error:
                self.fail_again(tp, hold, error)

    def begin_hold(self, tp: TopicPartition, partition: Partition, taken: Taken) -> None:
        error, now = taken.failure(), self.clock()
        assert error is not None
        dead = flaw(taken.record.value)
        what = f"topic {self.settings.kafka_dlq_topic}" if dead else "S3"
        partition.hold = Hold(taken, what, now, error, retry_at=now, renew_at=now + 0.2)
        self.stats.holds += 1
        self.recovering = True
        self.fail_again(tp, partition.hold, error)
        for other in self.partitions.values():
            other.works = False  # until one of its records is done
            for waiting in other.line:
                if waiting.attempt and waiting.attempt.cancel():  # it had not begun
                    waiting.attempt = None

    def fail_again(self, tp: TopicPartition, hold: Hold, error: BaseException) -> None:
        if isinstance(error, Failure):
            raise error
        hold.error = error
        hold.retry_at = self.clock() + hold.pause * random.uniform(0.5, 1)
        hold.pause = min(2 * hold.pause, MAX_PAUSE)
        self.stats.holding[tp.partition] = code_of(error)

    def release(self, tp: TopicPartition, partition: Partition) -> None:
        """The hold is over: what failed meanwhile, or did not begin, is attempted."""
        assert partition.hold
        if isinstance(partition.hold.error, TimeoutError):
            self.under_way_at_most = 1  # a slow link: the number grows with every success
        partition.hold, partition.works = None, True
        self.stats.holding.pop(tp.partition, None)
        for other in self.partitions.values():
            if other.hold:
                other.hold.retry_at = self.clock()

    def retry(self) -> None:
        """Begin the attempts that are due. A partition that fails is tried with one record, and
        where none works there is one such probe for all of them."""
        if not self.recovering:
            return
        if self.under_way_at_most >= self.settings.s3_max_concurrency:
            self.under_way_at_most = math.inf
        working = [p for p in self.partitions.values() if p.works and not p.hold]
        failing = [p for p in self.partitions.values() if not p.works or p.hold]
        for partition in working:
            self.begin_waiting(partition)
        for partition in sorted(failing, key=Partition.retry_at):
            if partition.probe_is_due(self.clock()):
                if not working and any(other.is_probing() for other in failing):
                    break
                self.begin_probe(partition)
        waiting = any(p.waiting() for p in working)
        self.recovering = bool(failing) or waiting or self.under_way_at_most < math.inf

    def begin_waiting(self, partition: Partition) -> None:
        pending = sum(len(p.pending()) for p in self.partitions.values())
        room = max(0, min(self.under_way_at_most - pending, WINDOW))
        if batch := partition.waiting()[: int(room)]:
            self.stats.retries += sum(taken.failure() is not None for taken in batch)
            self.uploader.start(batch)

    def begin_probe(self, partition: Partition) -> None:
        hold, now = partition.hold, self.clock()
        if hold is None:
            self.uploader.start(partition.waiting()[:1])
            return
        self.stats.retries += 1
        renew = now >= hold.renew_at
        if renew:  # at a growing distance: it is a look at files, programs, services
            expired = code_of(hold.error) in config.CREDENTIALS
            hold.renew_pause = min(2 * hold.renew_pause, 2 if expired else 30)
            hold.renew_at = now + hold.renew_pause
        silent = isinstance(hold.error, TimeoutError)
        self.uploader.start([hold.taken], renew=renew, look_first=silent)

    def holds(self) -> dict[str, config.Problem]:
        """What fails, and where it holds; the key says what would be so if it did not."""
        found: dict[str, config.Problem] = {}
        for hold in sorted(filter(None, (p.hold for p in self.partitions.values())), key=Hold.age):
            record, what = hold.taken.record, f"{hold.what} answers"
            place = f"{record.topic}/{record.partition}/{record.offset}: {explain(hold.error)}"
            known = isinstance(hold.error, EXPECTED)
            if earlier := found.get(what):
                found[what] = earlier._replace(text=f"{earlier.text}; and at {place}")
            else:
                text = f"{hold.what} failing, holding at {place}"
                found[what] = config.Problem(text, about(record), None if known else hold.error)
        return {
            what: problem._replace(text=f"{problem.text}; nothing is skipped")
            for what, problem in found.items()
        }

    # -- Positions

    def suspect(self) -> None:
        """The topic, or the group's positions, may not be what they were: look before the next
        commit."""
        self.verified = False
        self.wants_look_after = self.clock()

    def positions(self) -> Look | None:
        """What the group has committed, when that was asked since it was wanted."""
        look = self.monitor.latest
        fresh = look and look.positions and look.asked_at >= self.wants_look_after
        return look if fresh else None

    def verify(self) -> bool:
        """Whether the group's positions are known to be those that this process committed.

        A topic that was deleted, made anew and filled past our position would be read on as if
        nothing had happened; its group's positions are gone. Raises Failure then.
        """
        if self.verified:
            return True
        look = self.positions()
        if look is None:
            return False
        for tp in self.partitions:
            ours, there = self.last_committed.get(tp), look.committed.get(tp)
            if ours is not None and (there is None or there.offset < ours):
                raise Failure(
                    f"the position {ours} that group {self.settings.kafka_group_id} had committed"
                    f" on {tp.topic}/{tp.partition} is {'gone' if there is None else there.offset}:"
                    " was the topic deleted and made anew? Nothing of it was committed: set"
                    " another S3_PREFIX and start again"
                )
        self.verified = True
        return True

    def unsettled(self) -> set[TopicPartition]:
        return self.consumer.assignment() - self.partitions.keys()

    def settle(self, new: set[TopicPartition]) -> None:
        """Give newly assigned partitions, paused since, their position. Where the group has none
        it is committed before anything is fetched: a death before the first commit skips nothing.
        """
        look = self.positions()
        if look is None:
            return  # and again after the next poll
        self.verify()
        begun = {tp: at.offset for tp, at in look.committed.items()}
        if pins := self.first_positions(look):
            if not self.send_commit({tp: OffsetAndMetadata(at, "") for tp, at in pins.items()}):
                return
            begun |= pins
        for tp in sorted(new & begun.keys()):
            self.consumer.seek(tp, begun[tp])
            self.consumer.resume(tp)
            partition = Partition(begun[tp], begun[tp], moved_at=self.clock())
            if tp in look.committed:
                partition.lost = look.committed[tp].metadata.removeprefix("lost ")
                text = "%s/%d: the group goes on at offset %d; what is before was done earlier"
                log.info(text, *tp, begun[tp])
            self.partitions[tp] = partition
            self.last_committed[tp] = begun[tp]
        if new - begun.keys():  # their leader does not answer, or is not known yet
            self.wants_look_after = self.clock()

    def first_positions(self, look: Look) -> dict[TopicPartition, int]:
        """Where the group begins the partitions that it has no position on, those of other
        members too: who comes later would else take them for partitions added since. Those are
        begun at their beginning, whatever the rule: `latest` would skip their records."""
        rule = self.settings.kafka_auto_offset_reset
        if rule == "latest" and look.committed:
            rule = "a partition added since the group began"
        ends = look.ends if rule == "latest" else look.begins
        pins = {tp: at for tp, at in ends.items() if tp not in look.committed}
        for tp, at in sorted(pins.items()):
            text = "group %s begins %s/%d at offset %d (%s)"
            log.info(text, self.settings.kafka_group_id, *tp, at, rule)
        return pins

    def find_range(self) -> None:
        """A position that the topic does not have: say what is lost, and go on after it."""
        look = self.positions()
        if look is None or not self.verify():
            return
        for tp, partition in list(self.partitions.items()):
            if tp not in look.ends:
                continue
            at, begin, end = partition.position, look.begins[tp], look.ends[tp]
            if at < begin:
                text = "LOST: retention removed offsets %d to %d of %s/%d before they were written"
                log.error(text, at, begin - 1, *tp)
                partition.lost = add_range(partition.lost, at, begin - 1)
                partition.position = begin  # what was taken before is still in line
            elif at > end:
                text = (
                    "position %d is beyond the end (%d) of %s/%d: the topic was cut or made anew;"
                    " beginning again at %d, no object is overwritten"
                )
                log.error(text, at, end, *tp, begin)
                self.partitions[tp] = Partition(begin, begin, moved_at=self.clock())
                self.last_committed.pop(tp, None)
        self.range_unknown = False
        self.rewind()

    def rewind(self) -> None:
        """Fetch from where taking stopped: the client forgets what it has fetched and not given
        out when a partition is paused, or when it raises."""
        for tp, partition in self.partitions.items():
            self.consumer.seek(tp, partition.position)

    def notice_standing(self, now: float) -> None:
        """Let a partition rest that has records and gives none: the client asks for them without
        a pause, and only logs why it gets none."""
        look = self.monitor.latest
        for tp, partition in self.partitions.items():
            if partition.rests_until is not None:
                if now >= partition.rests_until:
                    partition.rests_until, partition.moved_at = None, now - STANDS_AFTER + 0.5
                    self.consumer.resume(tp)
                    self.consumer.seek(tp, partition.position)
            elif look is None or (look.partitions and look.ends.get(tp, 0) <= partition.position):
                partition.moved_at = now
                self.standing.pop(tp, None)
            elif now - partition.moved_at > STANDS_AFTER:
                partition.rests_until = now + 4
                self.consumer.pause(tp)
                self.standing[tp] = (
                    f"the broker gives no record from offset {partition.position} on, though there"
                    f" are some up to {look.ends.get(tp, '?')}: it refuses the fetch, or its answer"
                    f" cannot be used{config.last_words}; see the topic's compression.type and"
                    " KAFKA_API_VERSION"
                )

    # -- The group

    def keep_membership(self) -> None:
        """Poll without taking anything: heartbeats go on, and rebalances are answered."""
        for partition in self.partitions.values():
            partition.moved_at = self.clock()  # nothing was asked for
        self.consumer.pause(*self.partitions)
        self.poll(0, 1)
        self.consumer.resume(*(tp for tp, p in self.partitions.items() if p.rests_until is None))
        self.rewind()

    def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        """Finish what is under way and commit it; without waiting for the broker, which
        kafka-python 3 forbids in here: the commit travels ahead of what gives them up."""
        with suppress(Failure):  # whoever has the partition next meets it again
            self.drain(2)
            if self.verify():
                ready = {tp: p for tp, p in self.partitions.items() if p.done() != p.committed}
                self.consumer.commit_async({tp: p.as_commit() for tp, p in ready.items()})
        self.partitions.clear()
        self.stats.holding.clear()
        # kafka-python 3 forgets a join that outlasts the poll it began in, unless it is asked for.
        self.consumer._coordinator.request_rejoin()

    def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        self.consumer.pause(*assigned)
        for tp in assigned:
            self.consumer.seek(tp, 0)  # else the client looks for a position of its own
        self.standing.clear()
        self.joined_at = self.clock()
        self.suspect()
        log.info("assigned: %s", ", ".join(f"{t}/{p}" for t, p in sorted(assigned)) or "nothing")

    def waits_for_group(self, now: float) -> str:
        """Why there is no partition to take records from; "" when there is one."""
        group, since = self.settings.kafka_group_id, self.polling_since
        if self.partitions:
            return ""
        if since is not None and now - since > 2:
            return (
                f"waiting for group {group} to give out its partitions: that takes until every"
                f" member has joined again, or is missed: {SESSION_MS / 1000:.0f} s after a kill -9"
            )
        if now - self.joined_at < 2 or self.consumer.assignment():
            return ""
        return (
            f"no partition of {self.settings.kafka_topic} is assigned: group {group} has more"
            " consumers than the topic has partitions; this one waits until another leaves"
        )

    def drain(self, seconds: float) -> None:
        """Finish what is under way; at once while it fails. Raises Failure."""
        deadline = self.clock() + seconds
        while self.under_way() and not self.stats.holding and self.clock() < deadline:
            self.wait_for_first(0.1)
            self.book()
            self.retry()


def add_range(ranges: str, first: int, last: int) -> str:
    """`ranges` ("3-9,20-20") and one more; the oldest are merged where it grows too long for the
    metadata of a commit (4,096 bytes)."""
    parts = [part for part in ranges.split(",") if part] + [f"{first}-{last}"]
    while len(",".join(parts)) > 4000:
        parts[:2] = [f"{parts[0].split('-')[0]}-{parts[1].split('-')[1]}"]
    return ",".join(parts)


def raise_unless_transient(error: KafkaError) -> None:
    """Errors that end by themselves: the broker's, or the group's that has moved on."""
    if not (error.retriable or isinstance(error, TRANSIENT)):
        raise error


def unexpected(error: Exception) -> Failure:
    """An error that is not the Kafka client's to raise (its issues know some)."""
    return Failure(
        f"the Kafka client failed unexpectedly: {type(error).__name__}: {error}; nothing is lost,"
        " start it again"
    )


def run(sink: Sink, monitor: Monitor, stop: Stop) -> None:
    """Step until `stop` or the limit; then finish what is under way, commit and leave the group.

    Raises Failure.
    """
    stats = sink.stats
    stop.under_way = lambda: f"{sink.under_way()} uploads under way"
    try:
        while not stop.requested and stats.done < sink.limit:
            stop.check()
            sink.step()
            stats.lag = monitor.lag(sink.clock())
        sink.drain(2)
    except config.Unreadable:
        sink.drain(2)  # what stands in front of it
        raise
    finally:
        sink.commit(now=True)
        monitor.ended = True
        with suppress(TimeoutError):
            config.background(sink.consumer.close, False).result(3)
        log.info("written %d, dead-lettered %d", stats.written, stats.dead_letters)


# ----------------------------------------------------------------------------------------- start


def on_loop(coroutine: Coroutine[Any, Any, Any], seconds: float) -> Any:
    """The result of a coroutine on the file system's event loop. Raises TimeoutError."""
    return asyncio.run_coroutine_threadsafe(coroutine, fsspec.asyn.get_loop()).result(seconds)


def check_bucket(bucket: Bucket) -> bool:
    """Check that the bucket is there and can be written to, and print the connection test.

    Returns whether it can be listed. Raises Failure; takes 15 s at most beside the credentials.
    """
    settings = bucket.settings
    where = f"S3_BUCKET={settings.s3_bucket} at {settings.s3_endpoint_url or 'AWS'}"
    names, listed = [], True
    try:
        on_loop(bucket.slowly(bucket.find_credentials()), CREDENTIALS_WAIT + 1)
        names = on_loop(bucket.connect(), 10)
    except TimeoutError:
        text = f"{where}: no answer within 10 s; is the address right, is the server up?"
        raise Failure(text) from None
    except (*EXPECTED, ValueError) as error:  # the last: an address that is none
        if code_of(error) not in ("AccessDenied", "403"):
            raise Failure(f"{where}: {explain(error)}") from None
        listed = False
    if not listed:  # can it be written to, at least? A condition that cannot hold writes nothing
        never = {"If-Match": f'"{"0" * 32}"'}
        name = f"{settings.s3_prefix}.connection-test"
        try:
            answer = on_loop(bucket.request("PUT", name, b"", **never), 10)
        except EXPECTED as error:
            raise Failure(f"{where}: {explain(error)}") from None
        if answer.status == 403:
            raise Failure(f"{where}: {explain(answer.error())}")
    shown = [f"{settings.s3_bucket}/{name}" for name in names] or [settings.s3_bucket]
    output.info("Connection Test:  %s", shown)
    if not listed:
        log.warning("%s: listing is not allowed (s3:ListBucket): --audit will not work", where)
    return listed


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Kafka topic to S3 objects. Settings: README.md.")
    parser.add_argument(
        "--max-messages", type=config.positive, default=math.inf, help="end after so many records"
    )
    parser.add_argument(
        "--audit", action="store_true", help="compare topic and bucket, and write nothing"
    )
    return parser.parse_args(argv)


def needs_bucket(values: Mapping[str, Any]) -> str:
    if values.get("s3_bucket", True):
        return ""
    return "S3_BUCKET is not set: name the bucket, in .env or the environment"


def consume(settings: Settings, bucket: Bucket, stop: Stop, limit: float) -> None:
    """Make the clients, join the group and run. Raises Failure."""
    stats = Stats()
    if settings.metrics_port:
        from infra.monitoring import exporter

        exporter.serve_consumer(settings, stats)
    consumer = config.make_consumer(
        settings,
        session_timeout_ms=SESSION_MS,
        heartbeat_interval_ms=2000,
        request_timeout_ms=max(7000, settings.kafka_request_timeout_ms),  # above the session's
        retry_backoff_ms=2,  # also how long a poll can be held up by the heartbeat thread
        max_partition_fetch_bytes=2**18,  # 10 MB less memory, no slower; a larger one comes
    )
    sink = Sink(settings, consumer, Uploader(settings, bucket, stats), stats, limit)
    sink.monitor = Monitor(sink, Looker(settings))
    consumer.partitions_for_topic(settings.kafka_topic)  # else it joins once without any
    consumer._client.cluster.add_listener(lambda cluster: sink.suspect())
    consumer.subscribe([settings.kafka_topic], listener=sink)
    sink.monitor.start()
    run(sink, sink.monitor, stop)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        settings = Settings.from_env(config.environment({}), needs_bucket)
        config.setup_logging(settings)
        stop = Stop()
        metadata = config.check_kafka(settings)
        if settings.kafka_dlq_topic not in metadata.topics:
            text = "KAFKA_DLQ_TOPIC=%s does not exist: create it; what is no JSON object waits"
            log.warning(text, settings.kafka_dlq_topic)
        bucket = Bucket(settings)
        listed = check_bucket(bucket)
        if args.audit:
            from infra import audit

            stop.code = 1  # an audit that was stopped has proven nothing
            if not listed:
                raise Failure(f"S3_BUCKET={settings.s3_bucket}: --audit needs s3:ListBucket")
            return audit.run(settings, stop)
        consume(settings, bucket, stop, args.max_messages)
    except SettingsError as error:
        print(*error.args, sep="\n", file=sys.stderr)
        return 2
    except (Failure, *EXPECTED) as error:
        log.error("%s", error if isinstance(error, Failure) else explain(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
