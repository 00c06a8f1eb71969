"""Writes each record of a Kafka topic to S3 as one object.

    python kafka_consumer.py [--max-messages N | --audit]

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
import gc
import html
import logging
import math
import os
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
from functools import partial
from hashlib import md5
from itertools import chain, zip_longest
from types import SimpleNamespace
from typing import Any, NamedTuple
from urllib.parse import quote

import config  # before the packages: it says in one line which of them is missing
from config import CREDENTIALS, Failure, S3Error, Settings, SettingsError, code_of, explain, output

# isort: split
import aiohttp
import botocore.handlers
import fsspec.asyn
from aiobotocore.session import AioSession
from botocore.auth import S3SigV4Auth
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError
from botocore.httpsession import ProxyConfiguration, get_cert_path
from botocore.parsers import ResponseParserError
from botocore.utils import get_environ_proxies
from kafka import ConsumerRebalanceListener, OffsetAndMetadata, TopicPartition
from kafka import errors as kafka_errors
from kafka.errors import KafkaError
from s3fs import S3FileSystem
from yarl import URL

log = logging.getLogger(__name__)

WINDOW = 256  # records taken and not committed, at most: what a kill -9 makes us send again
BYTES_IN_HAND = 32 * 2**20  # above this no more is taken; one record at least
BYTES_UNDER_WAY = 8 * 2**20  # of uploads; more would share a slow link until each seems silent
POLL_ROOM = 64  # room in the window from which a poll is worth its price
COMMIT_EVERY = 0.1  # s
TIMEOUT = 3.0  # s of silence after which an attempt has failed; trying again is always safe
MAX_PAUSE = 1.0  # s between attempts while S3 fails; with TIMEOUT less than the 5 s of promise 4
CREDENTIALS_WAIT = 60.0  # s (promise 10)
CHUNK = 2**14  # bytes, of a large value: each that leaves is a sign of life
TRICKLE = 1024  # bytes of an answer: fewer in TIMEOUT are none
SESSION_MS = 6000  # the broker's minimum: how long a killed member is missed
LOOK_EVERY = 2.0  # s between the monitor's questions to the brokers
STANDS_AFTER = 5.0  # s without a record though there are some
LONG_POLL = 1.0  # s that a fetch without a record takes at most
STANDS_PAUSE = 4.0  # s for which such a partition is not fetched
STANDS_RETRY = 0.5  # s in which it shows then whether it gives records again

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
    kafka_errors.ReplicaNotAvailableError,  # a new leader is on its way
    config.NoOffsetForPartitionError,  # until it is settled
    kafka_errors.OffsetOutOfRangeError,  # until `find_range` has said what is lost
)

# ------------------------------------------------------------------------------------ one record


def validation_error(value: bytes | None) -> str:
    """Why a record's value is not a JSON object; "" when it is one."""
    if not value:
        return "the value is null" if value is None else "the value is empty"
    try:
        config.json_object(value)
    except ValueError as error:
        return str(error)
    return ""


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


class Answer(NamedTuple):
    """An HTTP answer, which may be S3's or not."""

    status: int
    headers: Mapping[str, str]  # names in any case
    body: bytes

    def element(self, name: str) -> str:
        """The text of an element of S3's XML; "" when the answer has none."""
        found = re.search(rf"<{name}>([^<]*)</{name}>", self.body.decode(errors="replace"))
        return html.unescape(found[1]) if found else ""

    def etag(self) -> str:
        return self.headers.get("ETag", "").removeprefix("W/").strip('"').lower()

    def has_md5(self, value: bytes) -> bool:
        return self.etag() == md5(value, usedforsecurity=False).hexdigest()

    def etag_is_no_md5(self) -> bool:
        """S3 says that it encrypts with keys for which the ETag is not the MD5 of the bytes."""
        customers = "x-amz-server-side-encryption-customer-algorithm" in self.headers
        return customers or "aws:kms" in self.headers.get("x-amz-server-side-encryption", "")

    def refused_condition(self) -> bool:
        return self.status == 412 and self.element("Code") == "PreconditionFailed"

    def error(self) -> S3Error:
        """The error that this answer is, since it is not the one that was needed."""
        code = self.element("Code") or f"HTTP {self.status}"
        if 300 <= self.status < 400:
            region = self.headers.get("x-amz-bucket-region") or self.element("Region")
            where = self.headers.get("Location") or self.element("Endpoint") or "elsewhere"
            text = f"redirected to {where}, and no redirect is followed: set S3_ENDPOINT_URL, or"
            return S3Error(code, f"{text} AWS_DEFAULT_REGION={region or 'to that of the bucket'}")
        if self.element("Code"):
            return S3Error(code, self.element("Message"))
        kind = self.headers.get("Content-Type", "no type")
        return S3Error(code, f"no S3 answer ({kind}): is a proxy or another server in between?")


class _Signer(S3SigV4Auth):
    """botocore's signer, on plain dictionaries: its own class of headers takes two thirds of the
    time of a signature."""

    def headers_to_sign(self, request: Any) -> dict[str, str]:
        host = {"host": URL(request.url, encoded=True).host_port_subcomponent or ""}
        return host | {name.lower(): text for name, text in request.headers.items()}

    def canonical_headers(self, headers: Mapping[str, str]) -> str:
        return "\n".join(f"{name}:{headers[name]}" for name in sorted(headers))


class SignedHttp:
    """Signed requests to the address of a bucket, with botocore's signer and aiohttp.

    botocore spends two thirds of the time of a small PUT on what is the same for every object
    (rules of the endpoint, serializer, hooks): without it one process writes 1.4 times as many
    objects a second as with the best loop over `put_object`. What its HTTP session cannot do is
    needed too: no redirect is followed, and what is bounded is silence, not a slow link's time.
    """

    def __init__(self, address: str, region: str, verify: str | bool, connections: int) -> None:
        """`address` ends with a slash; `verify` is a file of authorities, or True: the usual."""
        self.address, self.region = address, region
        self.proxy = ProxyConfiguration(get_environ_proxies(address)).proxy_url_for(address)
        context = ssl.create_default_context(cafile=get_cert_path(verify))
        connector = aiohttp.TCPConnector(
            limit=connections,
            ssl=context,
            socket_factory=_socket_with_small_buffer,
            ttl_dns_cache=1,  # s: a name that moves to another address is followed
        )
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT)
        self.http = aiohttp.ClientSession(connector=connector, timeout=timeout)

    async def send(
        self,
        method: str,
        name: str,
        keys: Any,
        value: bytes,
        headers: Mapping[str, str],
        pause: float = 0,
    ) -> Answer:
        """`pause`: seconds after each chunk. A server that refuses an object may hang up before it
        has read all of it, and asyncio reads nothing more from a connection that it cannot write
        to: the answer is only seen when it comes between two writes.

        Raises TimeoutError after TIMEOUT seconds in which nothing moved, or no more than TRICKLE
        bytes of the answer."""
        url = self.address + quote(name, safe="/~")
        request = SimpleNamespace(
            method=method, url=url, params=None, headers=dict(headers), body=value, context={}
        )
        _Signer(keys, "s3", self.region).add_auth(request)
        now = asyncio.get_running_loop().time
        body = bytearray()
        async with asyncio.timeout(TIMEOUT) as silence:

            async def chunks() -> AsyncIterator[bytes]:
                for start in range(0, len(value), CHUNK):
                    yield value[start : start + CHUNK]
                    silence.reschedule(now() + TIMEOUT)
                    if pause:
                        await asyncio.sleep(pause)

            async with self.http.request(
                method,
                URL(url, encoded=True),
                data=value if len(value) <= CHUNK else chunks(),
                headers={**request.headers, "Content-Length": str(len(value))},
                proxy=self.proxy,
                allow_redirects=False,
            ) as answer:
                counted = -TRICKLE  # the first chunk counts, however small
                async for chunk in answer.content.iter_any():
                    body += chunk
                    if len(body) >= counted + TRICKLE:
                        counted = len(body)
                        silence.reschedule(now() + TIMEOUT)
                return Answer(answer.status, answer.headers, bytes(body))


def _socket_with_small_buffer(address: Any) -> socket.socket:
    """A small send buffer, so that bytes counted as sent have left: a slow link must not look
    silent."""
    connection = socket.socket(*address[:3])
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**16)
    connection.setblocking(False)
    return connection


class Bucket:
    """The bucket. Objects are created and compared; none is ever replaced."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.name = settings, settings.s3_bucket
        self.where = f"{settings.s3_bucket} at {settings.s3_endpoint_url or 'AWS'}"
        self.honours_condition = False  # until it is seen
        self.renewal: asyncio.Task[Any] | None = None
        self.renew_at, self.renew_pause = 0.0, 0.2

    async def find_credentials(self) -> None:
        """Take the AWS credentials as they are now: a session keeps those that it has found. Those
        in use stay until others are there. Raises what botocore raises."""
        self.session = AioSession()
        credentials = await self.session.get_credentials()
        if credentials is None:
            raise NoCredentialsError
        await credentials.get_frozen_credentials()
        self.credentials, self.keys_until = credentials, 0.0

    async def renew(self, error: Exception) -> None:
        """Look for new credentials after an error of any kind, at a growing distance."""
        now = asyncio.get_running_loop().time()
        if now < self.renew_at:
            return
        self.renew_at = math.inf  # one search at a time
        try:
            await _slowly(self.find_credentials())
        except Exception as failed:  # those in use may still be good
            log.debug("while looking for new credentials: %s", explain(failed))
        self.renew_pause = min(2 * self.renew_pause, 2 if code_of(error) in CREDENTIALS else 30)
        self.renew_at = asyncio.get_running_loop().time() + self.renew_pause

    async def keys(self) -> Any:
        """The keys to sign with. Their renewal may take long, and all uploads wait for the one."""
        loop = asyncio.get_running_loop()
        if self.renewal is None or (self.renewal.done() and loop.time() >= self.keys_until):
            self.renewal = loop.create_task(_slowly(self.credentials.get_frozen_credentials()))
            self.keys_until = loop.time() + 1
        return await asyncio.shield(self.renewal)

    async def connect(self) -> list[str]:
        """Find the bucket's address and region, by listing a few of its names; returns these.

        Raises what botocore raises; the bucket can be used even after AccessDenied.
        """
        # With `Expect: 100-continue` an upload can wait for ever (no timeout covers it).
        self.session.unregister("before-call.s3", botocore.handlers.add_expect_header)
        limits = {"connect_timeout": TIMEOUT, "read_timeout": 5}
        authorities = self.session.get_config_variable("ca_bundle")
        if authorities and not os.path.isfile(authorities):
            raise S3Error("NoSuchFile", f"AWS_CA_BUNDLE={authorities}: there is no such file")
        client = await S3FileSystem(
            endpoint_url=self.settings.s3_endpoint_url,
            session=self.session,
            skip_instance_cache=True,
            config_kwargs={**limits, "retries": {"total_max_attempts": 1}},
        ).set_session()

        def note(request: Any, region_name: str, **_: Any) -> None:
            address = request.url.partition("?")[0].rstrip("/") + "/"
            # The bucket's own region, where it is another and botocore has asked for it.
            region = request.context.get("signing", {}).get("region") or region_name
            connections = self.settings.s3_max_concurrency
            self.http = SignedHttp(address, region, authorities or True, connections)

        def prove(response_dict: dict[str, Any], **_: Any) -> None:
            """An empty page parses as an empty listing."""
            status, body = response_dict["status_code"], response_dict["body"]
            if b"<ListBucketResult" not in body and b"<Error>" not in body:
                raise Answer(status, response_dict["headers"], body).error()

        client.meta.events.register("before-sign.s3", note)
        client.meta.events.register("before-parse.s3.ListObjectsV2", prove)
        prefix = self.settings.s3_prefix
        answer = await client.list_objects_v2(Bucket=self.name, Prefix=prefix, MaxKeys=3)
        return [entry["Key"] for entry in answer.get("Contents", [])]

    async def request(
        self, method: str, name: str, value: bytes = b"", pause: float = 0, /, **headers: str
    ) -> Answer:
        return await self.http.send(method, name, await self.keys(), value, headers, pause)

    async def put(self, name: str, value: bytes, pause: float = 0) -> Answer:
        """PUT where there is no object. Content-MD5: buckets with Object Lock want it."""
        digest = b64encode(md5(value, usedforsecurity=False).digest()).decode()
        headers = {"Content-Type": "application/json", "Content-MD5": digest, "If-None-Match": "*"}
        return await self.request("PUT", name, value, pause, **headers)

    async def create(self, name: str, value: bytes, check_first: bool = False) -> str:
        """Make the object: "written", or "replayed" when it was there with the same bytes (a
        replay, or an upload of ours whose answer was lost: then `check_first`).

        Raises Conflict for other bytes, Failure for a server that ignores the condition, and
        S3Error, or what the connection raises, for what may pass.
        """
        # Before the condition is known to be honoured, nothing is sent over what is there.
        if (check_first or not self.honours_condition) and await self.may_have(name, value):
            return "replayed"
        outcome = await self.make(name, value)
        if not self.honours_condition:  # the first of this run, and it is made alone
            await self.check_condition(name, value)
        return outcome

    async def may_have(self, name: str, value: bytes) -> bool:
        """As `has`, and False where it is not allowed to look."""
        try:
            return await self.has(name, value)
        except S3Error as error:
            if error.code not in ("AccessDenied", "HTTP 403"):
                raise
            return False

    async def make(self, name: str, value: bytes) -> str:
        try:
            answer = await self.put(name, value)
        except aiohttp.ClientOSError:  # refused while it was sent, perhaps: it is there
            if await self.has(name, value):
                return "replayed"
            raise
        if answer.refused_condition():
            self.honours_condition = True
            if await self.has(name, value):
                return "replayed"
            raise S3Error("PreconditionFailed", "an object was there, and now there is none")
        if answer.status == 501 and answer.element("Code") == "NotImplemented":
            raise Failure(self.is_unsafe("does not know If-None-Match (501 NotImplemented)"))
        if answer.status != 200 or not answer.etag() or b"<Error>" in answer.body:
            raise answer.error()
        proven = answer.has_md5(value) or answer.etag_is_no_md5()
        if not proven and not await self.has(name, value):
            raise S3Error("NoSuchKey", "the object was said to be made, and was not")
        return "written"

    async def check_condition(self, name: str, value: bytes) -> None:
        """The same PUT once more has to be refused. Raises Failure when it is not."""
        again = await self.put(name, value, pause=0.005)
        if again.status == 200 and again.etag():
            raise Failure(self.is_unsafe("ignores If-None-Match"))
        if not again.refused_condition():
            raise again.error()
        self.honours_condition = True

    def is_unsafe(self, why: str) -> str:
        return (
            f"S3_BUCKET={self.where}: the server {why}, so that objects could be overwritten"
            " without a word: use one that knows conditional writes (see S3_ENDPOINT_URL)"
        )

    async def has(self, name: str, value: bytes) -> bool:
        """Whether the object is there with these bytes; False when it is not there.

        Raises Conflict when it has others, and an answer proves it.
        """
        head = await self.request("HEAD", name)
        if head.status == 404:
            return False
        if head.status == 200 and head.has_md5(value) and not head.etag_is_no_md5():
            return True
        found = await self.request("GET", name)
        if found.status != 200 or not found.etag():
            raise found.error()
        if found.body == value:
            return True
        in_parts = re.fullmatch(r"[0-9a-f]{32}-[0-9]+", found.etag())
        if not (found.has_md5(found.body) or in_parts or found.etag_is_no_md5()):
            raise found.error()
        raise Conflict(
            f"s3://{self.name}/{name} is there with other bytes: it was left as it is. Was the"
            " topic made anew, or do two topics share this S3_PREFIX? Set another S3_PREFIX"
            " and another KAFKA_GROUP_ID"
        )


async def _slowly(asked: Coroutine[Any, Any, Any]) -> Any:
    """Wait for credentials: that may mean a program, another service, or a person."""
    text = "still waiting for the AWS credentials after 5 s (60 s at most)"
    warning = asyncio.get_running_loop().call_later(5, log.warning, text)
    try:
        async with asyncio.timeout(CREDENTIALS_WAIT):
            return await asked
    except TimeoutError:
        raise S3Error("CredentialsTimeout", "no AWS credentials within 60 s") from None
    except BotoCoreError:
        raise
    except Exception as error:  # of the service, or the program, that gives them
        text = f"{type(error).__name__}: {error}"
        raise S3Error("CredentialRetrievalError", text) from None
    finally:
        warning.cancel()


# -------------------------------------------------------- attempts: all of this on the event loop


@dataclass(eq=False)
class Taken:
    """A record in line: the future of its attempt, None while it waits for one, and what is known
    of the attempts that failed."""

    record: Any
    attempt: Future[str] | None = None
    error: Any = None
    what: str = "S3"  # that fails
    retry_at: float = 0.0
    pause: float = 0.05  # s, before the next attempt

    def size(self) -> int:
        return len(self.record.value or b"")

    def is_under_way(self) -> bool:
        """An attempt has begun, or waits for a slot."""
        return self.attempt is not None and not self.attempt.done()


class Uploader:
    """Single attempts to make objects and dead letters, as many at once as allowed."""

    def __init__(self, settings: Settings, bucket: Any, stats: Stats, loop: Any = None) -> None:
        self.settings, self.bucket, self.stats = settings, bucket, stats
        self.loop = loop or fsspec.asyn.get_loop()
        self.slots = asyncio.Semaphore(settings.s3_max_concurrency)
        self.tasks: set[asyncio.Task[None]] = set()
        self.letters: dict[tuple[int, int], Any] = {}  # under way, by partition and offset
        self.sending = asyncio.Lock()
        self.no_letters_until = 0.0
        self.producer: Any = None

    def start(self, batch: Sequence[Taken]) -> None:
        """Begin an attempt for each, from another thread."""
        for taken in batch:
            taken.attempt = Future()
        # The futures go along: the main thread may take one back before the loop comes to it.
        attempts = [(taken, taken.attempt) for taken in batch]
        self.loop.call_soon_threadsafe(self._launch, attempts)

    def _launch(self, attempts: Sequence[tuple[Taken, Any]]) -> None:
        for taken, attempt in attempts:
            self._in_background(self._run(taken, attempt))

    def _in_background(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = self.loop.create_task(coroutine)
        self.tasks.add(task)  # the loop itself keeps no task alive
        task.add_done_callback(self.tasks.discard)

    async def _run(self, taken: Taken, attempt: Any) -> None:
        async with self.slots:
            if not attempt.set_running_or_notify_cancel():
                return
            began = self.loop.time()
            try:
                outcome = await self.deliver(taken)
            except BaseException as error:
                attempt.set_exception(error)
            else:
                self.stats.observe_upload(self.loop.time() - began)
                attempt.set_result(outcome)

    async def deliver(self, taken: Taken) -> str:
        """Once: "written", "replayed" or "dead". Raises what Bucket.create and Kafka raise."""
        record = taken.record
        if reason := validation_error(record.value):
            await self.send_letter(record, reason)
            return "dead"
        name = object_name(self.settings.s3_prefix, record.partition, record.offset)
        timed_out = isinstance(taken.error, TimeoutError)
        try:
            outcome = await self.bucket.create(name, record.value, check_first=timed_out)
        except Exception as error:
            self._in_background(self.bucket.renew(error))
            raise
        self.bucket.renew_pause = 0.2
        return outcome

    async def send_letter(self, record: Any, reason: str) -> None:
        """Send a record to the dead letter topic, unchanged, and wait for the acknowledgement.

        Raises KafkaError, and TimeoutError while the broker does not answer: the letter is under
        way then, and the next attempt waits for it.
        """
        where = (record.partition, record.offset)
        sent = self.letters.pop(where, None)
        if sent is None:
            async with self.sending:
                sent = await self._send(record, reason)
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

    async def _send(self, record: Any, reason: str) -> Any:
        """In a thread: without the topic's metadata it takes 0.5 s, which those that wait for
        their turn need not find out again."""
        if self.loop.time() < self.no_letters_until:
            raise kafka_errors.KafkaTimeoutError("Failed to update metadata")
        try:
            return await asyncio.to_thread(self._hand_over, record, reason)
        except kafka_errors.KafkaTimeoutError:
            self.no_letters_until = self.loop.time() + 0.3
            raise

    def _hand_over(self, record: Any, reason: str) -> Any:
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


@dataclass
class Refusals:
    """What the broker does not take, though it answers."""

    since: float = math.inf
    last: float = -math.inf
    error: Any = None

    def add(self, error: BaseException, now: float) -> None:
        self.since, self.last, self.error = min(self.since, now), now, error

    def last_long(self, now: float) -> bool:
        return now - self.since >= 5 and now - self.last < 5


@dataclass(frozen=True)
class TopicState:
    """What the brokers said of the topic. A partition whose leader does not answer is in
    `problems`, and in neither of the dictionaries of offsets."""

    asked_at: float
    begins: dict[TopicPartition, int]
    ends: dict[TopicPartition, int]
    problems: dict[TopicPartition, str]
    committed: dict[TopicPartition, Any]  # the group's positions: offset and metadata
    mute: frozenset[int] = frozenset()  # brokers that did not answer


def fetch_topic_state(
    client: Any, topic: str, asked_at: float, on_answer: Callable[[], None]
) -> TopicState:
    """Ask the leaders of the topic's partitions, and the coordinator for the group's positions;
    without a topic all is empty. It takes as long as they do, and calls `on_answer` each time.

    Raises KafkaError when no leader answers.
    """
    begins: dict[TopicPartition, int] = {}
    ends: dict[TopicPartition, int] = {}
    problems: dict[TopicPartition, str] = {}
    mute = set()
    config.track_topic(client, topic)
    tps = [TopicPartition(topic, p) for p in sorted(client.partitions_for_topic(topic) or ())]
    leader = client._client.cluster.leader_for_partition
    for node in {leader(tp) for tp in tps}:
        led = [tp for tp in tps if leader(tp) == node]
        try:
            last, first = client.end_offsets(led), client.beginning_offsets(led)
            ends |= last
            begins |= first
            on_answer()
        except (KafkaError, KeyError) as error:  # KeyError: the topic was deleted just now
            mute.add(node)
            problems |= dict.fromkeys(led, _describe_silence(client._client.cluster, node, error))
    if problems and not ends:
        raise kafka_errors.KafkaTimeoutError
    committed = client._coordinator.fetch_committed_offsets(tps)
    on_answer()
    return TopicState(asked_at, begins, ends, problems, committed, frozenset(mute))


def _describe_silence(cluster: Any, node: int | None, error: Exception) -> str:
    broker = cluster.broker_metadata(node)
    if broker is None:
        return "it has no leader now"
    where = f"broker {node} ({broker.host}:{broker.port})"
    return f"its leader, {where}, does not answer ({type(error).__name__})"


def topic_state_fetcher(settings: Settings) -> Callable[..., Future[TopicState]]:
    """`fetch_topic_state` with a client of its own, in a thread for each."""
    client = config.make_consumer(
        settings,
        session_timeout_ms=1000,  # the client wants it below the next, though it joins no group
        request_timeout_ms=1500,  # less than what is said as silence
        heartbeat_interval_ms=300,
        retry_backoff_ms=10,  # also what each new connection waits
        metadata_max_age_ms=5000,
    )
    return partial(config.background, fetch_topic_state, client, settings.kafka_topic)


class Monitor:
    """Asks the brokers how far the topic goes, and says what stands still and the status. It has
    a thread and a client of its own: whatever the main thread waits for, it goes on."""

    def __init__(
        self, sink: Any, ask: Callable[..., Future[TopicState]], clock: Callable[[], float]
    ) -> None:
        """`ask(asked_at, on_answer)` begins a `fetch_topic_state`."""
        self.sink, self.ask, self.clock = sink, ask, clock
        self.latest: TopicState | None = None
        self.asking: Future[TopicState] | None = None
        self.asked_at, self.unanswered_since = -math.inf, math.inf
        self.refusals = Refusals()
        self.notices = config.Notices(clock)
        self.shown_at, self.shown = clock(), 0
        self.ended = False

    def run(self) -> None:
        while not self.ended:
            self.tick()
            time.sleep(0.1 if self.sink.fresh_state() else 0.02)  # a commit may wait for it

    def tick(self) -> None:
        """Take the answer, ask again when it is time, and report."""
        now = self.clock()
        if self.asking and self.asking.done():
            if isinstance(error := self.asking.exception(), KafkaError):
                self.refusals.add(error, now)
            else:
                self.latest, self.unanswered_since = self.asking.result(), math.inf
                self.refusals = Refusals()
            self.asking = None
        wanted = self.latest is None or self.latest.asked_at <= self.sink.state_wanted_at
        if self.asking is None and now - self.asked_at >= (0.05 if wanted else LOOK_EVERY):
            self.asked_at, self.unanswered_since = now, min(self.unanswered_since, now)
            self.asking = self.ask(now, self.on_answer)
        self.sink.stats.lag = self.lag(now)
        self.notices.report(self.problems(now))
        if now - self.shown_at >= (1 if sys.stderr.isatty() else 10):
            self.show(now)

    def on_answer(self) -> None:
        self.unanswered_since = self.clock()

    def problems(self, now: float) -> dict[str, config.Problem]:
        """What stands still now; the key says what would be so if it did not."""
        sink, topic, state = self.sink, self.sink.settings.kafka_topic, self.latest
        # The first answer takes some more: the client has to connect.
        silent_since = self.unanswered_since + (3 if state is None else 0)
        if sink.assigned:  # else it may wait for the group
            silent_since = min(silent_since, sink.called_at + 6)  # a call may take a while
        if now - silent_since >= 2:
            text = (
                f"no answer from the broker for {now - silent_since:.0f} s: {sink.in_hand()}"
                f" records in hand wait, nothing is lost{config.last_words}"
            )
            return {"the broker answers": config.Problem(text, since=silent_since)}
        found = {}
        if state and not state.ends:
            text = f"topic {topic} does not exist any more, or this user may not see it"
            return {"the topic is there": config.Problem(text)}
        for tp in sink.assigned:
            partition = sink.partitions.get(tp)
            why = state.problems.get(tp) if state else ""
            why = why or (partition.stalled if partition else sink.waits_for_position(now))
            if why:
                at = f" at {partition.position}" if partition else ""
                text = f"{topic}/{tp.partition} stands still{at}: {why}; the others go on"
                found[f"{topic}/{tp.partition} moves"] = config.Problem(text)
        group = f"group {sink.settings.kafka_group_id}"
        asked = {"commit": sink.refusals, "question for its positions": self.refusals}
        for what, refusals in asked.items():
            if refusals.last_long(now):
                text = (
                    f"{group}: the broker takes no {what}: {code_of(refusals.error)}"
                    f"{config.last_words}; are enough replicas of __consumer_offsets in sync, may"
                    " this user read the group? Nothing is lost"
                )
                found[f"{group}: the broker takes a {what}"] = config.Problem(text)
        if why := sink.waits_for_group(now):
            found["a partition is assigned"] = config.Problem(why)
        return found

    def lag(self, now: float) -> dict[int, int | None]:
        """Records not yet done, by partition; None where it is not known."""
        answered = now - self.unanswered_since < 2 and not self.refusals.error
        known = self.latest.ends if self.latest and answered else {}
        lag: dict[int, int | None] = {tp.partition: None for tp in self.sink.assigned}
        for tp, partition in list(self.sink.partitions.items()):
            if tp in known:
                lag[tp.partition] = max(0, known[tp] - partition.committed)
        return lag

    def show(self, now: float) -> None:
        """The status line: why it holds comes first, since a narrow terminal cuts the end off."""
        stats, limit, lags = self.sink.stats, self.sink.limit, list(self.sink.stats.lag.values())
        rate = (stats.written - self.shown) / (now - self.shown_at)
        self.shown_at, self.shown = now, stats.written
        holding = ", ".join(sorted(set(stats.holding.values())))
        left = f", {(limit - stats.done) / rate:.0f} s left" if rate and limit < math.inf else ""
        lag = "?" if not lags or None in lags else sum(lags)
        config.status(
            log,
            "%swritten %d%s | %.1f/s | lag %s | retries %d | dead-lettered %d",
            f"HOLDING: {holding} | " if holding else "",
            stats.written,
            f" of {limit:.0f}{left}" if limit < math.inf else "",
            *(rate, lag, stats.retries, stats.dead_letters),
            lag=lag,
        )


# ------------------- decisions: all on the main thread, but for on_metadata in the client's threads


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

    def summary(self) -> str:
        return f"written {self.written}, dead-lettered {self.dead_letters}"


@dataclass(eq=False)
class Partition:
    """An assigned partition: what was taken and is not yet done, in line by offset."""

    position: int  # where taking goes on
    committed: int
    lost: str = ""  # what retention removed before it was written, for the audit: "3-9,20-20"
    line: deque[Taken] = field(default_factory=deque)
    hold: Taken | None = None  # it failed, and is tried alone until it is done
    given_back: dict[int, Future[str] | None] = field(default_factory=dict)  # attempts, by offset
    moved_at: float = 0.0
    asked: Any = None  # the oldest request to the leader that is not answered, and since when
    asked_at: float = 0.0
    paused_until: float | None = None  # not fetched until then
    stalled: str = ""  # why the broker gives no record, though there are some

    def committable(self) -> int:
        """The position below which all is done: what may be committed."""
        return self.line[0].record.offset if self.line else self.position

    def to_commit(self) -> OffsetAndMetadata:
        return OffsetAndMetadata(self.committable(), f"lost {self.lost}" if self.lost else "")


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
    send: Callable[..., None] = config.commit_once
    monitor: Any = None
    partitions: dict[TopicPartition, Partition] = field(default_factory=dict)
    last_committed: dict[TopicPartition, int] = field(default_factory=dict)  # by this process
    # Attempts under way at most: one until S3 has answered, and after each new hold; from WINDOW on
    # the uploader's slots (S3_MAX_CONCURRENCY) decide, and always BYTES_UNDER_WAY.
    uploads_allowed: int = 1
    link_is_slow: bool = False  # the last hold was by silence
    state_wanted_at: float = -math.inf
    verified: bool = False  # the group's positions are what we committed last
    range_unknown: bool = False  # a position was out of the topic's range
    unreadable: config.Unreadable | None = None  # of a record that comes next
    committed_at: float = -math.inf
    polled_at: float = -math.inf
    stepped_at: float = math.inf
    waits_since: float = math.inf  # for a partition
    unpinned_since: float = math.inf  # partitions are assigned for which another member has to pin
    called_at: float = math.inf  # the Kafka client, which has not come back since
    assigned: frozenset[TopicPartition] = frozenset()

    def __post_init__(self) -> None:
        self.notices = config.Notices(self.clock)
        self.refusals = Refusals()  # of commits
        # What fails, until something is done again: a rebalance ends a hold and proves nothing.
        self.failing: dict[str, config.Problem] = {}

    # -- Take, book, commit

    def step(self) -> None:
        """Each once, in half a second at most while Kafka answers."""
        now = self.clock()
        if now - self.stepped_at > 0.5:  # frozen, or cut off: the topic may be another one
            self.suspect()
        self.stepped_at = now
        if self.range_unknown:
            self.find_range()
        left = self.limit - self.stats.done - self.in_hand()
        enough = 1 if self.unsettled() else min(POLL_ROOM, max(left, 1))
        if self.room() < enough and not self.unreadable:
            self.make_room()
        if self.room() >= enough:
            idle = not self.in_hand() and not self.unsettled()
            self.take(self.poll(100 if idle else 10, max(1, int(self.room()))))
            self.pause_where_nothing_comes()
        else:
            self.wait_for_first(0.1)
            if self.clock() - self.polled_at > 0.5:
                self.keep_membership()
        self.book()
        self.begin()
        self.commit()
        # The way past it is to set the group's position behind it: all in front is written first.
        if self.unreadable and not self.in_hand():
            raise self.unreadable

    def in_hand(self) -> int:
        return sum(len(partition.line) for partition in list(self.partitions.values()))

    def room(self) -> float:
        """How many records may be taken."""
        alone = len(self.partitions) == 1
        in_hand = sum(
            taken.size()
            for partition in self.partitions.values()
            for taken in partition.line
            if alone or taken is not partition.hold  # which keeps no other waiting, however large
        )
        if self.range_unknown or self.unreadable or in_hand >= BYTES_IN_HAND:
            return 0
        uncommitted = sum(p.position - p.committed for p in self.partitions.values())
        return min(self.window() - uncommitted, self.limit - self.stats.done - self.in_hand())

    def window(self) -> int:
        """How many records may stand in line. What was done behind a hold and given back is sent
        again after a kill -9 too; the others need room to go on."""
        done_behind = sum(
            attempt is not None and offset >= partition.position
            for partition in self.partitions.values()
            for offset, attempt in partition.given_back.items()
        )
        return max(2 * POLL_ROOM, WINDOW - done_behind)

    def make_room(self) -> None:
        """Where a partition holds and keeps others waiting, give back what stands behind its hold:
        it is fetched again when the hold is over, and what was done is not done twice."""
        holding = {tp: p for tp, p in self.partitions.items() if p.hold}
        if len(holding) == len(self.partitions):
            return
        for tp, partition in holding.items():
            line = partition.line
            while line[-1] is not partition.hold and not line[-1].is_under_way():
                taken = line.pop()
                partition.given_back[taken.record.offset] = taken.attempt
            partition.position = line[-1].record.offset + 1
            self.pause(tp, math.inf)

    def poll(self, timeout_ms: int, limit: int) -> dict[TopicPartition, list[Any]]:
        """Records in order; {} while something has to be settled first."""
        self.polled_at = self.called_at = self.clock()
        self.waits_since = min(self.waits_since, self.polled_at)
        batches = {}
        try:
            batches = self.consumer.poll(timeout_ms=timeout_ms, max_records=limit)
        except KafkaError as error:
            raise_unless_transient(error)
            self.range_unknown |= isinstance(error, kafka_errors.OffsetOutOfRangeError)
            self.suspect()
            self.rewind()
        except config.Unreadable as error:
            self.unreadable = error
            self.rewind()
        finally:
            self.called_at = math.inf
        if self.clock() - self.polled_at > 0.5:
            self.suspect()
        if new := self.unsettled():
            self.settle(new)
        if self.partitions:
            self.waits_since = math.inf
        return batches

    def take(self, batches: dict[TopicPartition, list[Any]]) -> None:
        """Put records in line. What came of a partition before it is settled comes again."""
        for tp in batches.keys() & self.partitions.keys():
            partition = self.partitions[tp]
            for record in batches[tp]:
                if not config.is_marker(record):
                    attempt = partition.given_back.pop(record.offset, None)
                    partition.line.append(Taken(record, attempt))
            partition.position = batches[tp][-1].offset + 1
            partition.moved_at, partition.stalled = self.clock(), ""
        for tp, partition in self.partitions.items():  # past markers, and what was compacted
            partition.position = max(partition.position, config.position(self.consumer, tp))

    def wait_for_first(self, seconds: float) -> None:
        """Wait until the first in a line is done; `seconds` at most."""
        firsts = [p.line[0] for p in self.partitions.values() if p.line]
        attempts = [taken.attempt for taken in firsts if taken.is_under_way()]
        if not attempts:  # a hold pauses, or the broker takes no commit
            attempts, seconds = [Future()], min(seconds, 0.02)
        self.wait(attempts, seconds, return_when=concurrent.futures.FIRST_COMPLETED)

    def book(self) -> None:
        """Take what is done from the front of each line, and see what failed, there or behind.

        Raises Failure (a Conflict, say) and leaves that record in line: it is not committed.
        """
        for partition in self.partitions.values():
            for taken in list(partition.line):
                if taken.attempt is None or not taken.attempt.done():
                    continue
                if error := taken.attempt.exception():
                    self.fail(partition, taken, error)
                    continue
                if partition.hold is taken:
                    self.release(partition)
                if taken is partition.line[0]:
                    partition.line.popleft()
                    self.finish(taken.record, taken.attempt.result())
        holds = [partition.hold for partition in self.partitions.values() if partition.hold]
        self.stats.holding = {hold.record.partition: code_of(hold.error) for hold in holds}
        self.failing |= self.describe(holds)
        self.notices.report(self.failing)

    def finish(self, record: Any, outcome: str) -> None:
        """Count a record that is done, and print its line."""
        extra = about(record)
        dlq = self.settings.kafka_dlq_topic
        # What does fail still is said again by `book`.
        self.failing.pop(f"topic {dlq} answers" if outcome == "dead" else "S3 answers", None)
        self.stats.last_success = time.time()
        # A dead letter proves nothing of S3.
        if outcome != "dead" or (self.stats.written and not self.stats.holding):
            self.uploads_allowed += 1 if self.link_is_slow else WINDOW
        if self.uploads_allowed >= self.settings.s3_max_concurrency:
            self.uploads_allowed, self.link_is_slow = WINDOW, False
        if outcome == "dead":
            self.stats.dead_letters += 1
            text = "dead letter: %s/%d/%d (key %s) to %s: %s"
            log.warning(text, *extra.values(), dlq, validation_error(record.value), extra=extra)
            return
        self.stats.written += 1
        self.stats.replays += outcome == "replayed"
        self.stats.bytes += len(record.value)
        name = object_name(self.settings.s3_prefix, record.partition, record.offset)
        output.info("Upload Successfully: s3://%s/%s", self.settings.s3_bucket, name, extra=extra)

    def begin(self) -> None:
        """Begin attempts: of those that hold a partition, when they are due, and of what waits in
        the others. While everything fails there is one at a time."""
        now = self.clock()
        holds = [p.hold for p in self.partitions.values() if p.hold]
        due = [t for t in holds if t.attempt is None and now >= t.retry_at]
        waiting = sorted(due, key=lambda taken: taken.retry_at)
        lines = [p.line for p in self.partitions.values() if not p.hold]
        for turn in zip_longest(*lines):  # each partition in turn
            waiting += [taken for taken in turn if taken and taken.attempt is None]
        if not waiting:
            return
        in_hand = chain.from_iterable(partition.line for partition in self.partitions.values())
        under_way = [taken for taken in in_hand if taken.is_under_way()]
        size = sum(taken.size() for taken in under_way)
        batch = []
        for taken in waiting[: max(0, self.uploads_allowed - len(under_way))]:
            if size < BYTES_UNDER_WAY:
                size += taken.size()
                batch.append(taken)
        self.uploader.start(batch)

    def commit(self, *, now: bool = False) -> None:
        """Commit what is done, every COMMIT_EVERY seconds or POLL_ROOM records."""
        ready = {tp: p for tp, p in self.partitions.items() if p.committable() != p.committed}
        count = sum(p.committable() - p.committed for p in ready.values())
        due = now or count >= POLL_ROOM or self.clock() - self.committed_at >= COMMIT_EVERY
        if ready and due and self.verify():
            positions = {tp: p.to_commit() for tp, p in ready.items()}
            if self.send_commit(positions):
                self.committed_at = self.clock()
                self.stats.commits += 1
                for tp, partition in ready.items():
                    partition.committed = positions[tp].offset

    def send_commit(self, positions: dict[TopicPartition, OffsetAndMetadata]) -> bool:
        """Whether it was acknowledged. Should the group have moved on, the next poll says so."""
        self.called_at = self.clock()
        try:
            self.send(self.consumer, positions)
        except KafkaError as error:
            raise_unless_transient(error)
            self.suspect()
            self.refusals.add(error, self.clock())
            return False
        finally:
            self.called_at = math.inf
        self.refusals = Refusals()
        self.last_committed |= {tp: at.offset for tp, at in positions.items()}
        if not self.verified:  # what was asked meanwhile may be from before this commit
            self.suspect()
        return True

    # -- Holding: while S3, or the dead letter topic, fails

    def fail(self, partition: Partition, taken: Taken, error: BaseException) -> None:
        """An attempt failed. The first in line that failed is its partition's hold: it is tried
        alone, with growing pauses. Raises an error that is a Failure."""
        if isinstance(error, Failure):
            raise error
        now = self.clock()
        taken.attempt, taken.error = None, error
        self.stats.retries += 1
        hold = partition.hold
        if hold is None or taken.record.offset < hold.record.offset:
            partition.hold, taken.pause = taken, 0.05
            if validation_error(taken.record.value):
                taken.what = f"topic {self.settings.kafka_dlq_topic}"
            self.stats.holds += hold is None
            self.uploads_allowed, self.link_is_slow = 1, isinstance(error, TimeoutError)
            self.withdraw()
        if partition.hold is taken:
            taken.retry_at = now + taken.pause * random.uniform(0.5, 1)
            taken.pause = min(2 * taken.pause, MAX_PAUSE)

    def release(self, partition: Partition) -> None:
        """A hold is over; the others are tried at once."""
        partition.hold = None
        if partition.paused_until == math.inf:
            partition.paused_until = self.clock()
        for other in self.partitions.values():
            if other.hold:
                other.hold.retry_at = self.clock()

    def describe(self, holds: Iterable[Taken]) -> dict[str, config.Problem]:
        """What fails, and where it holds; the key says what would be so if it did not."""
        found: dict[str, config.Problem] = {}
        for taken in holds:
            record, error, what = taken.record, taken.error, taken.what
            assert error
            place = f"{record.topic}/{record.partition}/{record.offset}: {explain(error)}"
            hint = "" if what == "S3" else config.last_words
            text = f"{what} failing, holding at {place}{hint}; nothing is skipped"
            if earlier := found.get(f"{what} answers"):
                text = f"{earlier.text}; also at {place}"
            known = isinstance(error, EXPECTED)
            problem = config.Problem(text, about(record), None if known else error)
            found[f"{what} answers"] = problem
        return found

    # -- Positions

    def suspect(self) -> None:
        """The topic, or the group's positions, may not be what they were: look before the next
        commit."""
        self.state_wanted_at = self.clock()
        self.verified = False  # last, as `verify` looks first: it may run at this moment

    def on_metadata(self, cluster: Any) -> None:
        """The client has heard of the topic. Suspect once: while a leader is missing it asks
        again and again. Where the topic is missing, each answer until now is too old."""
        if self.verified or not cluster.partitions_for_topic(self.settings.kafka_topic):
            self.suspect()

    def fresh_state(self) -> TopicState | None:
        """What the group has committed, when that was asked since it was wanted."""
        state = self.monitor.latest
        fresh = state and state.asked_at > self.state_wanted_at
        return state if fresh else None

    def verify(self) -> bool:
        """Whether the group's positions are known to be those that this process committed.

        A topic that was deleted, made anew and filled past our position would be read on as if
        nothing had happened; its group's positions are gone. Raises Failure then.
        """
        if self.verified:
            return True
        wanted, state = self.state_wanted_at, self.fresh_state()
        if state is None:
            return False
        if not self.assigned <= state.ends.keys() | state.problems.keys():
            self.suspect()  # a broker that just started knew no topic: the group was not asked
            return False
        for tp in self.assigned:
            ours, there = self.last_committed.get(tp), state.committed.get(tp)
            if ours is not None and (there is None or there.offset < ours):
                raise Failure(
                    f"the position {ours} that group {self.settings.kafka_group_id} had committed"
                    f" on {tp.topic}/{tp.partition} is {'gone' if there is None else there.offset}:"
                    " was the topic deleted and made anew? Nothing of it was committed: set"
                    " another S3_PREFIX and another KAFKA_GROUP_ID, and start again"
                )
        self.verified = True
        if self.state_wanted_at != wanted:  # suspected by another thread just now
            self.verified = False
        return self.verified

    def wait_for_state(self, seconds: float) -> None:
        """Wait until a commit can be verified, if there may be one; `seconds` at most."""
        deadline = self.clock() + seconds if self.partitions else self.clock()
        while not self.verified and not self.fresh_state() and self.clock() < deadline:
            self.wait([Future()], 0.02)

    def unsettled(self) -> set[TopicPartition]:
        """Assigned, and without a position. The client itself still shows the partitions of an
        earlier assignment while it joins the group again."""
        return set(self.assigned - self.partitions.keys())

    def settle(self, new: set[TopicPartition]) -> None:
        """Give newly assigned partitions, paused since, their position. Where the group has none
        it is committed before anything is fetched: a death before the first commit skips nothing.
        """
        state = self.fresh_state()
        if state is None:
            return  # and again after the next poll
        self.verify()
        positions = {tp: at.offset for tp, at in state.committed.items()}
        if missing := state.begins.keys() - positions.keys():
            positions |= self.pin_first_positions(state, missing)
        for tp in sorted(new & positions.keys()):
            self.consumer.seek(tp, positions[tp])
            self.consumer.resume(tp)
            partition = Partition(positions[tp], positions[tp], moved_at=self.clock())
            if tp in state.committed:
                noted = config.LOST.fullmatch(state.committed[tp].metadata)
                partition.lost = noted[1] if noted else ""
            if tp in state.committed and positions[tp] and tp not in self.last_committed:
                text = (
                    "%s/%d: group %s goes on at its position %d; what is before it should be under"
                    " S3_PREFIX=%s already"
                )
                group, prefix = self.settings.kafka_group_id, self.settings.s3_prefix
                log.info(text, *tp, group, positions[tp], prefix or "(empty)")
            self.partitions[tp] = partition
            self.last_committed[tp] = positions[tp]
        if new <= positions.keys():
            self.unpinned_since = math.inf
        else:  # a leader does not answer, or another member has to pin them
            self.unpinned_since = min(self.unpinned_since, self.clock())
            self.state_wanted_at = self.clock()

    def pin_first_positions(
        self, state: TopicState, missing: Iterable[TopicPartition]
    ) -> dict[TopicPartition, int]:
        """Commit where the group begins the partitions that it has no position on; {} while another
        member has to, or the broker does not take it.

        Only the owner of the first partition commits, for all at once: a member that came later
        could mistake the partitions of others for new ones. A partition that was added since the
        group began starts at its beginning, whatever the rule: `latest` would skip its records.
        """
        if min(missing) not in self.assigned:
            return {}
        rule = self.settings.kafka_auto_offset_reset
        if rule == "latest" and state.committed:
            rule = "a partition added since the group began"
        bounds = state.ends if rule == "latest" else state.begins
        pins = {tp: bounds[tp] for tp in sorted(missing)}
        if not self.send_commit({tp: OffsetAndMetadata(at, "") for tp, at in pins.items()}):
            return {}
        for tp, at in pins.items():
            text = "group %s begins %s/%d at offset %d (%s)"
            log.info(text, self.settings.kafka_group_id, *tp, at, rule)
        return pins

    def find_range(self) -> None:
        """A position that the topic does not have: say what is lost, and go on after it."""
        state = self.fresh_state()
        if state is None or not self.verify():
            return
        for tp, partition in list(self.partitions.items()):
            if tp not in state.ends:
                continue
            at, begin, end = partition.position, state.begins[tp], state.ends[tp]
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
                self.consumer.resume(tp)
                self.last_committed.pop(tp, None)
        self.range_unknown = False
        self.rewind()

    def rewind(self, *tps: TopicPartition) -> None:
        """Have partitions (all, if none is named) fetched from where taking stopped. The client
        drops what it has fetched and not given out when a partition is paused, or when it raises,
        and goes on behind it: without this those records would be skipped and committed over."""
        for tp in tps or self.partitions:
            self.consumer.seek(tp, self.partitions[tp].position)

    def pause(self, tp: TopicPartition, until: float) -> None:
        """Have a partition not fetched until then."""
        self.partitions[tp].paused_until = until
        self.consumer.pause(tp)
        self.rewind(tp)

    def pause_where_nothing_comes(self) -> None:
        """Let a partition rest that has records and gives none: the client asks for them without
        a pause, and only logs why it gets none."""
        now, state = self.clock(), self.monitor.latest
        for tp, partition in self.partitions.items():
            asked = config.oldest_request(self.consumer, tp)
            if asked != partition.asked:
                partition.asked, partition.asked_at = asked, now
            if partition.paused_until is not None:
                if now >= partition.paused_until:
                    partition.paused_until = None
                    partition.moved_at = now
                    if partition.stalled:
                        partition.moved_at -= STANDS_AFTER - STANDS_RETRY
                    self.consumer.resume(tp)
                    self.rewind(tp)
            elif state is None or state.ends.get(tp, math.inf) <= partition.position:
                partition.moved_at, partition.stalled = now, ""
            elif state.ends and now - partition.moved_at <= STANDS_AFTER:
                continue
            elif tp in state.ends and asked is not None and now - partition.asked_at > LONG_POLL:
                # A pause would throw away what comes.
                partition.stalled = "the broker's answer is on its way: a slow link, or a quota"
            else:
                self.pause(tp, now + STANDS_PAUSE)
                if tp in state.ends:  # else the topic, or its leader, is gone, and that is said
                    partition.stalled = (
                        f"the broker gives no record, though there are some up to {state.ends[tp]}:"
                        f" it refuses the fetch, or has no leader for it{config.last_words}; see"
                        " the topic's compression.type and KAFKA_API_VERSION"
                    )

    # -- The group

    def keep_membership(self) -> None:
        """Poll without taking anything: heartbeats go on, and rebalances are answered."""
        self.consumer.pause(*self.partitions)
        self.poll(0, 1)
        self.consumer.resume(*(tp for tp, p in self.partitions.items() if p.paused_until is None))
        self.rewind()
        for partition in self.partitions.values():
            partition.moved_at = self.clock()  # nothing was asked for

    def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        """Finish what is under way and commit it; without waiting for the broker, which
        kafka-python 3 forbids in here: the commit travels ahead of what gives them up."""
        try:
            with suppress(Failure):  # whoever has the partition next meets it again
                self.suspect()
                self.leave_waiting()
                self.drain(2)
                self.wait_for_state(1)
                if self.partitions and self.verify():
                    positions = {tp: p.to_commit() for tp, p in self.partitions.items()}
                    self.consumer.commit_async(positions)
        finally:
            self.partitions.clear()
            self.assigned = frozenset()
            self.unreadable = None
            self.stats.holding = {}
            # kafka-python 3 forgets a join that outlasts its poll, unless it is asked for.
            self.consumer._coordinator.request_rejoin()

    def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        self.consumer.pause(*assigned)
        for tp in assigned:
            self.consumer.seek(tp, 0)  # else the client looks for a position of its own
        self.waits_since, self.assigned = self.clock(), frozenset(assigned)
        self.unpinned_since, self.refusals = math.inf, Refusals()
        if not self.assigned:  # what fails is others' to say, and its end too
            self.failing, self.notices = {}, config.Notices(self.clock)
        # What others commit on a partition that was ours may be below what we did.
        kept = self.last_committed.keys() & self.assigned
        self.last_committed = {tp: self.last_committed[tp] for tp in kept}
        self.suspect()
        log.info("assigned: %s", ", ".join(f"{t}/{p}" for t, p in sorted(assigned)) or "nothing")

    def waits_for_group(self, now: float) -> str:
        """Why there is no partition to take records from; "" when there is one."""
        group, topic = self.settings.kafka_group_id, self.settings.kafka_topic
        waits = now - self.waits_since
        if waits < 2 or self.assigned:
            return ""
        if self.called_at == math.inf or now - self.called_at < 1:
            if waits < 5:  # members that are started together join one after the other
                return ""
            return (
                f"no partition of {topic} is assigned: group {group} has more consumers than the"
                " topic has partitions; this one waits until another leaves"
            )
        return (
            f"waiting for group {group} to share out its partitions: a member that was killed is"
            f" missed after {SESSION_MS / 1000:.0f} s"
        )

    def waits_for_position(self, now: float) -> str:
        """Why a partition that is assigned is not begun; "" when that is about to happen."""
        if now - self.unpinned_since < 5:
            return ""
        return (
            f"group {self.settings.kafka_group_id} has no position on it, and the member that has"
            " the first such partition, and has to commit one for all, does not: is another program"
            " in the group? Take another KAFKA_GROUP_ID"
        )

    def withdraw(self) -> None:
        """Take back the attempts that wait for a slot."""
        for taken in chain.from_iterable(p.line for p in self.partitions.values()):
            if taken.attempt and taken.attempt.cancel():
                taken.attempt = None

    def leave_waiting(self) -> None:
        """Leave what has no attempt to whoever has the partition next: all that is in hand may
        need more time than there is, and what is still under way then is sent again."""
        self.withdraw()
        for partition in self.partitions.values():
            while partition.line and partition.line[-1].attempt is None:
                partition.position = partition.line.pop().record.offset

    def drain(self, seconds: float) -> None:
        """Finish what is in hand; not while it fails. Raises Failure."""
        deadline = self.clock() + seconds
        while self.in_hand() and not self.stats.holding and self.clock() < deadline:
            self.wait_for_first(0.1)
            self.book()
            self.begin()


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


def run(sink: Sink, stop: config.Stop) -> None:
    """Step until `stop` or the limit; then finish what is under way, commit and leave the group.

    Raises Failure.
    """
    stats = sink.stats
    slots = sink.settings.s3_max_concurrency
    stop.under_way = lambda: f"{min(sink.in_hand(), slots)} uploads under way"
    stop.farewell = lambda: f"; {stats.summary()}"
    try:
        while not stop.requested and stats.done < sink.limit:
            stop.check()
            sink.step()
        sink.leave_waiting()
        sink.drain(2)
    finally:
        try:
            sink.wait_for_state(1 if stop.requested else 5)
            sink.commit(now=True)
        finally:
            with suppress(Exception):  # the reason of the end is another, and all is committed
                config.background(sink.consumer.close, False).result(3)
            log.info("%s", stats.summary())


# ----------------------------------------------------------------------------------------- start


def on_loop(coroutine: Coroutine[Any, Any, Any], seconds: float) -> Any:
    """The result of a coroutine on the file system's event loop. Raises TimeoutError."""
    return asyncio.run_coroutine_threadsafe(coroutine, fsspec.asyn.get_loop()).result(seconds)


def check_writing(bucket: Bucket, where: str) -> None:
    """Check that a bucket that may not be listed can be written to, with what can be no object.

    Raises Failure.
    """
    never = {"If-Match": f'"{"0" * 32}"', "Content-MD5": b64encode(bytes(16)).decode()}
    name = f"{bucket.settings.s3_prefix}.connection-test"
    try:
        answer = on_loop(bucket.request("PUT", name, b"", **never), 10)
    except EXPECTED as error:
        raise Failure(f"{where}: {explain(error)}") from None
    if answer.status == 403:
        raise Failure(f"{where}: {explain(answer.error())}")
    if answer.status == 200:
        raise Failure(bucket.is_unsafe("ignores If-Match"))


def check_bucket(bucket: Bucket) -> None:
    """Check that the bucket is there and can be written to, and print the connection test.

    Raises Failure; takes 15 s at most, beside the time for the credentials.
    """
    settings = bucket.settings
    where = f"S3_BUCKET={bucket.where}"
    names, listed = [], True
    try:
        on_loop(_slowly(bucket.find_credentials()), CREDENTIALS_WAIT + 1)
        names = on_loop(bucket.connect(), 10)
    except TimeoutError:
        text = f"{where}: no answer within 10 s; is the address right, is the server up?"
        raise Failure(text) from None
    except (*EXPECTED, ValueError) as error:  # the last: an address that is none
        if code_of(error) not in ("AccessDenied", "403"):
            raise Failure(f"{where}: {explain(error)}") from None
        listed = False
    if not listed:
        check_writing(bucket, where)
    shown = [f"{settings.s3_bucket}/{name}" for name in names] or [settings.s3_bucket]
    output.info("Connection Test:  %s", shown)
    if not listed:
        log.warning("%s: listing is not allowed (s3:ListBucket): --audit will not work", where)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Kafka topic to S3 objects. Settings: README.md.")
    either = parser.add_mutually_exclusive_group()
    either.add_argument(
        "--max-messages", type=config.positive, default=math.inf, help="end after so many records"
    )
    either.add_argument(
        "--audit", action="store_true", help="compare topic and bucket, and write nothing"
    )
    return parser.parse_args(argv)


def bucket_is_set(values: Mapping[str, Any]) -> str:
    bucket = values.get("s3_bucket", "unknown")
    if not bucket:
        return "S3_BUCKET is not set: name the bucket, in .env or the environment"
    if bucket.endswith("--x-s3"):
        return f"S3_BUCKET={bucket!r}: a directory bucket (S3 Express) cannot be used; take another"
    return ""


def consume(settings: Settings, bucket: Bucket, stop: config.Stop, limit: float) -> None:
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
        metadata_max_age_ms=5000,  # partitions that are added are found
        retry_backoff_ms=2,  # also how long a poll can be held up by the heartbeat thread
        max_partition_fetch_bytes=2**18,  # 10 MB less memory, no slower; a larger one comes
        fetch_max_bytes=2**20,  # of many partitions: it has to come within the request timeout
    )
    sink = Sink(settings, consumer, Uploader(settings, bucket, stats), stats, limit)
    cluster = consumer._client.cluster
    cluster.config["retry_backoff_ms"] = 100  # else it asks for a missing leader every 2 ms
    cluster.add_listener(sink.on_metadata)
    consumer.subscribe([settings.kafka_topic], listener=sink)
    consumer.partitions_for_topic(settings.kafka_topic)  # else it joins a first time without any
    sink.monitor = Monitor(sink, topic_state_fetcher(settings), sink.clock)
    config.avoid_nodes(consumer, lambda: sink.monitor.latest and sink.monitor.latest.mute)
    threading.Thread(target=sink.monitor.run, name="monitor", daemon=True).start()
    try:
        run(sink, stop)
    finally:
        sink.monitor.ended = True


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    gc.set_threshold(20_000)  # what is made a record has no cycles: a tenth of the CPU time
    try:
        settings = Settings.load({}, bucket_is_set)
        config.setup_logging(settings)
        stop = config.Stop()
        if args.audit:
            from infra import audit

            return audit.run(settings, stop)
        if settings.kafka_dlq_topic not in config.check_kafka(settings):
            text = (
                "KAFKA_DLQ_TOPIC=%s does not exist, or this user may not see it: create it;"
                " what is not a JSON object waits"
            )
            log.warning(text, settings.kafka_dlq_topic)
        if settings.s3_max_concurrency > WINDOW:
            text = "S3_MAX_CONCURRENCY=%d: there are %d uploads at once at most"
            log.warning(text, settings.s3_max_concurrency, WINDOW)
        bucket = Bucket(settings)
        check_bucket(bucket)
        consume(settings, bucket, stop, args.max_messages)
    except SettingsError as error:
        with suppress(OSError):  # a full disk
            print(*error.args, sep="\n", file=sys.stderr)
        return 2
    except (Failure, *EXPECTED) as error:
        log.error("%s", error if isinstance(error, Failure) else explain(error))
        return 1
    except Exception as error:  # of the Kafka client's own, say: its issues know some
        text = "ended unexpectedly by %s: %s; nothing is lost, start it again"
        log.error(text, type(error).__name__, error, exc_info=log.isEnabledFor(logging.DEBUG))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
