#!/usr/bin/env python3
"""Proves that the bucket holds the topic: every record is one object or one dead letter.

    python kafka_consumer.py --audit
    python infra/audit.py [--audit | --seal | --verify [--folder DIR] [--root HASH]]

The audit: every offset of the topic from its beginning up to the group's committed position has to
be an object with the record's bytes or a dead letter. It writes to neither topic nor bucket.

A seal is an object that says what an audit has proven of a range of offsets, and which seal came
before (`Seal`). Seals outlive the topic: the verification compares the bucket, or a copy of it,
with them and needs no Kafka.

All print what was checked and every gap, difference and stray object; exit code 0 when nothing is
wrong, else 1.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while the imports run: no traceback
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# Before the packages: it says in one line which of them is missing.
from config import (
    LOST,
    Failure,
    Settings,
    SettingsError,
    Stop,
    check_kafka,
    code_of,
    explain,
    is_marker,
    last_words,
    make_consumer,
    output,
    setup_logging,
    status,
)

# isort: split
import argparse
import asyncio
import dataclasses
import json
import logging
import os
import re
import time
from base64 import b64decode, b64encode
from bisect import bisect_right
from collections import Counter
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from hashlib import md5, sha256
from itertools import groupby, islice, pairwise
from operator import attrgetter, itemgetter
from typing import Any, ClassVar

import aiohttp
from aiobotocore.config import AioConfig
from aiobotocore.session import AioSession
from botocore.exceptions import BotoCoreError, ClientError
from botocore.parsers import ResponseParserError
from botocore.utils import parse_timestamp
from kafka import TopicPartition
from kafka.errors import KafkaError

log = logging.getLogger(__name__)

# The object of a record: its partition, unless it is 0, and its offset.
NAME = re.compile(r"(?:partition=([1-9][0-9]*)/)?stock_market_(0|[1-9][0-9]*)\.json")

PATIENCE = 20.0  # s without a record that is there to be read
READS = 64  # objects read at once
ATTEMPTS = 3  # for each request to S3
# What S3, the way to it or the credentials can raise.
S3_ERRORS = (
    *(ClientError, BotoCoreError, aiohttp.ClientError, OSError),
    *(ResponseParserError, ValueError),  # no XML, or a time or a number that is none
)
# Trying these again does not help.
FINAL = ("AccessDenied", "InvalidObjectState", "NoCredentialsError", "NoSuchBucket")


# ------------------------------------------------------------------------------------ the bucket


class Bucket:
    """The bucket, to be listed and read. A request that fails is made three times in all."""

    def __init__(self, settings: Settings, client: Any) -> None:
        self.name, self.prefix, self.client = settings.s3_bucket, settings.s3_prefix, client
        self.where = f"S3_BUCKET={settings.s3_bucket} at {settings.s3_endpoint_url or 'AWS'}"

    async def check(self) -> None:
        """Print the connection test: a few names of what is in the bucket. Raises Failure."""
        try:
            async with asyncio.timeout(10):
                page = await self.page(MaxKeys=3)
        except TimeoutError:
            raise Failure(
                f"{self.where}: no answer within 10 s; is the address right, is the server up?"
            ) from None
        names = [f"{self.name}/{entry['Key']}" for entry in page.get("Contents", [])]
        output.info("Connection Test:  %s", names or [self.name])

    async def page(self, **options: Any) -> dict[str, Any]:
        """One page of the listing. Raises Failure."""

        async def call() -> dict[str, Any]:
            options.setdefault("Prefix", self.prefix)
            answer: dict[str, Any] = await self.client.list_objects_v2(Bucket=self.name, **options)
            if "IsTruncated" not in answer:
                raise ResponseParserError("a page that is no listing of a bucket")
            return answer

        return await self.attempt(self.where, call)

    async def pages(self, **options: Any) -> AsyncIterator[list[dict[str, Any]]]:
        """The listing, a thousand entries at a time, in S3's order. Raises Failure."""
        while True:
            page = await self.page(**options)
            yield page.get("Contents", [])
            if not page["IsTruncated"]:
                return
            options["ContinuationToken"] = page["NextContinuationToken"]

    async def get(self, key: str) -> bytes | None:
        """An object's bytes; None when it is not there any more. Raises Failure."""

        async def call() -> bytes | None:
            try:
                answer = await self.client.get_object(Bucket=self.name, Key=key)
            except ClientError as error:
                if code_of(error) == "NoSuchKey":
                    return None
                raise
            if "ETag" not in answer:
                raise ResponseParserError("an answer without an ETag")  # a proxy's page
            async with answer["Body"] as body:
                return bytes(await body.read())

        return await self.attempt(f"s3://{self.name}/{key}", call)

    async def create(self, key: str, value: bytes) -> None:
        """Make an object; one that is there is never replaced. Raises Failure."""
        checksum = b64encode(md5(value, usedforsecurity=False).digest()).decode()

        async def call() -> bool:
            try:
                await self.client.put_object(
                    Bucket=self.name,
                    Key=key,
                    Body=value,
                    ContentType="application/json",
                    ContentMD5=checksum,  # buckets with Object Lock want it
                    IfNoneMatch="*",
                )
            except ClientError as error:
                if code_of(error) != "PreconditionFailed":
                    raise
                return False
            return True

        where = f"s3://{self.name}/{key}"
        created = await self.attempt(where, call)
        if created and await self.attempt(where, call):
            raise Failure(f"{where}: this S3 server replaces objects despite If-None-Match")
        if await self.get(key) != value:
            raise Failure(f"{where}: another audit has made it at the same time; run --verify")

    async def attempt(self, what: str, call: Callable[[], Awaitable[Any]]) -> Any:
        """The answer to `call`; Failure that names `what` when it fails for the third time."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return await call()
            except S3_ERRORS as error:
                if attempt == ATTEMPTS or code_of(error) in FINAL:
                    raise Failure(f"{what}: {explain(error)}") from None
            await asyncio.sleep(0.5 * attempt)


def parse_time(text: Any) -> datetime:
    """A time in an answer of S3. A listing has one an object, in the ISO form: botocore's own
    parser of times takes a third of an audit. Raises ValueError."""
    try:
        moment = datetime.fromisoformat(text)
    except (TypeError, ValueError):  # a header's form, or a number
        moment = parse_timestamp(text)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


@asynccontextmanager
async def open_bucket(settings: Settings) -> AsyncIterator[Bucket]:
    """The bucket, with credentials and region found the usual way of AWS."""
    session = AioSession()
    parsers = session.get_component("response_parser_factory")
    parsers.set_parser_defaults(timestamp_parser=parse_time)
    options = AioConfig(
        max_pool_connections=READS,
        connect_timeout=3,
        read_timeout=60,
        retries={"total_max_attempts": 1},
    )
    async with AsyncExitStack() as stack:
        client = session.create_client("s3", endpoint_url=settings.s3_endpoint_url, config=options)
        try:
            opened = await stack.enter_async_context(client)
        except (BotoCoreError, ValueError) as error:  # a profile or an address of no use
            raise Failure(f"S3_BUCKET={settings.s3_bucket}: {explain(error)}") from None
        yield Bucket(settings, opened)


class Folder:
    """A copy of a bucket in a folder, as `aws s3 sync` makes it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.where = folder, str(folder)

    async def pages(self, Prefix: str = "") -> AsyncIterator[list[dict[str, Any]]]:
        """The files as a listing without ETags, a thousand at a time."""
        names = self.names(self.folder, "")
        while page := [{"Key": name} for name in islice(names, 1000)]:
            yield [entry for entry in page if entry["Key"].startswith(Prefix)]

    def names(self, folder: str | Path, before: str) -> Iterator[str]:
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_dir():
                        yield from self.names(entry.path, f"{before}{entry.name}/")
                    elif entry.is_file():  # a pipe would be waited for
                        yield before + entry.name
        except OSError as error:
            raise Failure(f"{folder}: {error.strerror or error}") from None

    async def get(self, key: str) -> bytes | None:
        try:
            return (self.folder / key).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise Failure(f"{self.folder / key}: {error.strerror or error}") from None


# ------------------------------------------------------------------------------------- the topic


def last_words_of_client() -> str:
    """Why the client gets no records; it only logs that, as a warning."""
    zstd = "; a topic with compression.type=zstd can be read with kafka-python 3 only"
    return f"{last_words}{zstd if 'Unknown error fetching' in last_words.text else ''}"


class Topics:
    """Reads topics, up to given offsets. Raises Failure when no records come."""

    def __init__(self, consumer: Any, progress: Callable[..., None]) -> None:
        self.consumer, self.progress = consumer, progress

    def __enter__(self) -> Topics:
        return self

    def __exit__(self, *error: object) -> None:
        self.consumer.close(autocommit=False)

    def partitions(self, topic: str) -> list[TopicPartition]:
        found = self.consumer.partitions_for_topic(topic) or ()
        return [TopicPartition(topic, partition) for partition in sorted(found)]

    def read(self, ranges: Mapping[TopicPartition, tuple[int, int]]) -> Iterator[Any]:
        """Every record of each partition from `begin` up to, not including, `until`."""
        total = sum(max(0, until - begin) for begin, until in ranges.values())
        done = 0
        # One partition after the other: the client serves large records of the first one only.
        for tp, (begin, until) in ranges.items():
            if begin >= until:
                continue
            self.consumer.assign([tp])
            self.consumer.seek(tp, begin)
            for position, batch in self.batches(tp, begin, until):
                yield from (record for record in batch if record.offset < until)
                read = done + min(position, until) - begin
                self.progress("read %d of %d offsets of %s", read, total, tp.topic)
            done += until - begin

    def batches(
        self, tp: TopicPartition, begin: int, until: int
    ) -> Iterator[tuple[int, list[Any]]]:
        """(position after it, records) of each poll, from `begin` up to `until`."""
        position, last = begin, time.monotonic()
        while position < until:
            batch = self.consumer.poll(timeout_ms=500).get(tp, [])
            now, moved = time.monotonic(), self.consumer.position(tp)
            if moved is not None and moved != position:  # None: retention has overtaken it
                position, last = moved, now
            elif now - last > PATIENCE:
                raise Failure(
                    f"{tp.topic}/{tp.partition}: no records came for {PATIENCE:.0f} s from offset"
                    f" {position} on, of those up to {until}: the audit proves nothing"
                    f"{last_words_of_client()}"
                )
            yield position, batch

    def why_not(self, begins: Mapping[TopicPartition, int], seconds: float = 5) -> str:
        """What the client says when it shall get one record of each partition; "" when it can."""
        for tp, begin in begins.items():
            self.consumer.assign([tp])
            self.consumer.seek(tp, begin)
            deadline = time.monotonic() + seconds
            while not self.consumer.poll(timeout_ms=500):
                if time.monotonic() > deadline:
                    return last_words_of_client()
        return ""


# ------------------------------------------------------------------------------------- the seals

VERSION = 1
SEAL_SIZE = 20_000  # offsets that a seal covers at most, beside those that retention had removed
SEAL_NAME = re.compile(r"_seals/partition=(0|[1-9][0-9]*)/(0|[1-9][0-9]*)-(0|[1-9][0-9]*)\.json")
# What an offset is, by its letter in a seal.
KINDS = {
    "r": "removed",  # by retention, before it could be sealed
    "o": "objects",
    "d": "dead_letters",
    "m": "transaction_markers",
    "h": "holes",  # neither a record (compaction) nor an object
    "k": "kept",  # an object whose record is gone (compaction): its bytes were not compared
}
PROVEN = "od"  # kinds that have bytes


@dataclass(frozen=True)
class Seal:
    """What was proven of a partition's offsets `first` to `last`, and the hash of the seal before.

    As an object it is one line of JSON, keys sorted, no blanks. `kinds` says what the offsets are,
    in order, as counts and letters of KINDS: `7o1d12o`. `sha256` and `md5` are the digests of each
    object and dead letter, in order, in base64 (of null: zeros). `root` is the SHA-256 of lines of
    text that everybody can make: of each object and dead letter `OFFSET o|d SHA-256`, of each run
    of other offsets `FIRST LETTER COUNT`. `before` is the SHA-256 of the seal before, all its
    bytes; empty in a partition's first seal.
    """

    topic: str
    partition: int
    first: int
    last: int
    time: str
    before: str
    kinds: str
    sha256: bytes
    md5: bytes

    @property
    def name(self) -> str:
        return f"_seals/partition={self.partition}/{self.first}-{self.last}.json"

    def runs(self) -> Iterator[tuple[int, str, int]]:
        """(first offset, letter, count) of each run of one kind."""
        offset = self.first
        for count, letter in re.findall("([0-9]+)([a-z])", self.kinds):
            yield offset, letter, int(count)
            offset += int(count)

    def hashes(self) -> Iterator[tuple[int, str, bytes]]:
        """(offset, letter, SHA-256) of each object and dead letter."""
        at = 0
        for first, letter, count in self.runs():
            if letter in PROVEN:
                for offset in range(first, first + count):
                    yield offset, letter, self.sha256[at : at + 32]
                    at += 32

    def root(self) -> str:
        lines = sha256()
        hashes = self.hashes()
        for first, letter, count in self.runs():
            if letter not in PROVEN:
                lines.update(f"{first} {letter} {count}\n".encode())
                continue
            for offset, _, value in islice(hashes, count):
                lines.update(f"{offset} {letter} {value.hex()}\n".encode())
        return lines.hexdigest()

    def encode(self) -> bytes:
        counts = dict.fromkeys(KINDS.values(), 0)
        for _, letter, count in self.runs():
            counts[KINDS[letter]] += count
        fields = asdict(self) | counts | {"version": VERSION, "root": self.root()}
        for name in ("sha256", "md5"):
            fields[name] = b64encode(fields[name]).decode()
        return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode() + b"\n"

    @classmethod
    def decode(cls, value: bytes) -> Seal:
        """The seal in `value`. Raises ValueError for anything that `encode` would not make."""
        try:
            fields = json.loads(value)
            for name in ("sha256", "md5"):
                fields[name] = b64decode(fields[name], validate=True)
            seal = cls(**{field.name: fields[field.name] for field in dataclasses.fields(cls)})
            numbers = seal.partition, seal.first, seal.last
            if {type(number) for number in numbers} != {int} or type(seal.topic) is not str:
                raise ValueError("a field of another type")
            if not re.fullmatch("([0-9]+r)?([0-9]+[odmhk])+", seal.kinds):
                raise ValueError("kinds that there are not")
            counts = Counter[str]()
            for _, letter, count in seal.runs():
                counts[letter] += count
            digests = sum(counts[letter] for letter in PROVEN)
            if (
                counts.total() != seal.last - seal.first + 1
                or counts.total() - counts["r"] > SEAL_SIZE
                or (len(seal.sha256), len(seal.md5)) != (32 * digests, 16 * digests)
            ):
                raise ValueError("its parts do not fit together")
            if datetime.fromisoformat(seal.time).tzinfo is None:
                raise ValueError("a time without its zone")
            if seal.encode() != value:
                raise ValueError("its root, counts or form are not those of its offsets")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(
                f"no seal, or a changed one ({type(error).__name__}: {error})"
            ) from None
        return seal


@dataclass
class Chain:
    """The seals of a partition, read so far, in order."""

    next: int = 0  # the first offset that is not sealed
    head: str = ""  # SHA-256 of the last seal
    key: str = ""  # of the last seal
    time: str = ""  # of the last seal

    def add(self, key: str, seal: Seal, value: bytes) -> None:
        self.next, self.key, self.time = seal.last + 1, key, seal.time
        self.head = sha256(value).hexdigest()


# ----------------------------------------------------------------------------------- the ledgers


def digest(value: bytes | None) -> bytes:
    """What a ledger keeps of a value; zeros for null."""
    return bytes(16) if value is None else md5(value, usedforsecurity=False).digest()


class Ledger:
    """What is known of one partition's offsets from `begin` up to, not including, `until`: a mark
    and an MD5, 17 bytes each. `end` is the end of the log. From `seal_from` on it keeps what a
    seal needs too, 32 bytes."""

    # UNKNOWN: a hole in the log (compaction, retention meanwhile). RECORD: its object is wanted.
    # KEPT: an object without a record to compare it with; WANTED: such a one, as a seal says.
    # EMPTY: there was nothing, as a seal says. UNREAD: an object that has to be read.
    UNKNOWN, RECORD, OBJECT, LETTER, MARKER, KEPT, WANTED, EMPTY, UNREAD = range(9)

    def __init__(self, begin: int, until: int, end: int, seal_from: int | None = None) -> None:
        self.begin, self.until, self.end = begin, max(begin, until), end
        self.marks = bytearray(self.until - begin)
        self.digests = bytearray(16 * len(self.marks))
        self.seal_from = self.until if seal_from is None else max(begin, seal_from)
        self.hashes = bytearray(32 * max(0, self.until - self.seal_from))

    def write(self, record: Any) -> None:
        """Enter a record or a transaction marker of the topic."""
        if is_marker(record):
            self.settle(record.offset, self.MARKER)
            return
        self.settle(record.offset, self.RECORD)
        self.digests[self._digest(record.offset)] = digest(record.value)
        if record.offset >= self.seal_from and record.value is not None:
            at = 32 * (record.offset - self.seal_from)
            self.hashes[at : at + 32] = sha256(record.value).digest()

    def __contains__(self, offset: int) -> bool:
        return self.begin <= offset < self.until

    def mark(self, offset: int) -> int:
        return self.marks[offset - self.begin]

    def settle(self, offset: int, mark: int) -> None:
        self.marks[offset - self.begin] = mark

    def _digest(self, offset: int) -> slice:
        at = 16 * (offset - self.begin)
        return slice(at, at + 16)

    def same(self, offset: int, found: bytes | bytearray) -> bool:
        return self.digests[self._digest(offset)] == found

    def proven(self, offset: int, entry: Mapping[str, Any]) -> bool:
        """Whether the entry of the listing proves the object: its ETag is the MD5. (With KMS or
        in several parts it is another number.)"""
        etag = re.fullmatch('"([0-9a-f]{32})"', entry.get("ETag", ""))
        return etag is not None and self.same(offset, bytes.fromhex(etag[1]))

    def offsets(self, mark: int) -> Iterator[int]:
        for match in re.finditer(re.escape(bytes([mark])), self.marks):
            yield self.begin + match.start()

    def missing(self) -> Iterator[tuple[int, int]]:
        """Ranges (first, last) of what is wanted and was not found."""
        for match in re.finditer(b"[%c%c]+" % (self.RECORD, self.WANTED), self.marks):
            yield self.begin + match.start(), self.begin + match.end() - 1

    def take(self, other: Ledger, offset: int) -> None:
        """Know of an offset what `other` knows."""
        self.settle(offset, other.mark(offset))
        self.digests[self._digest(offset)] = other.digests[other._digest(offset)]

    def seal(
        self, topic: str, partition: int, first: int, last: int, *, time: str, before: str
    ) -> Seal:
        """A seal of offsets that were all found to be right."""
        letters = {self.UNKNOWN: "h", self.OBJECT: "o", self.LETTER: "d", self.MARKER: "m"}
        letters |= {self.KEPT: "k", self.EMPTY: "h"}
        removed = max(0, self.begin - first)
        kinds = [f"{removed}r"] if removed else []
        marks = self.marks[first + removed - self.begin : last + 1 - self.begin]
        hashes, digests = [], []
        for match in re.finditer(rb"(?s)(.)\1*", marks):
            letter = letters[match[1][0]]
            kinds.append(f"{len(match[0])}{letter}")
            if letter in PROVEN:
                offset, count = first + removed + match.start(), len(match[0])
                at, start = offset - self.seal_from, offset - self.begin
                hashes.append(self.hashes[32 * at : 32 * (at + count)])
                digests.append(self.digests[16 * start : 16 * (start + count)])
        return Seal(
            topic=topic,
            partition=partition,
            first=first,
            last=last,
            time=time,
            before=before,
            kinds="".join(kinds),
            sha256=b"".join(hashes),
            md5=b"".join(digests),
        )


class Sealed(Ledger):
    """What a seal says of its offsets, those left out that retention had removed before."""

    MARKS: ClassVar = {
        "o": Ledger.RECORD,
        "d": Ledger.LETTER,
        "m": Ledger.MARKER,
        "h": Ledger.EMPTY,
        "k": Ledger.WANTED,
    }

    def __init__(self, key: str, seal: Seal, head: str) -> None:
        runs = [run for run in seal.runs() if run[1] != "r"]
        super().__init__(runs[0][0], seal.last + 1, seal.last + 1)
        self.key, self.partition, self.first, self.head = key, seal.partition, seal.first, head
        self.time = datetime.fromisoformat(seal.time)
        taken = 0
        for first, letter, count in runs:
            at = first - self.begin
            self.marks[at : at + count] = bytes([self.MARKS[letter]]) * count
            if letter in PROVEN:
                found = seal.md5[16 * taken : 16 * (taken + count)]
                self.digests[16 * at : 16 * (at + count)] = found
                taken += count

    def end_at(self, offset: int) -> None:
        """Forget what is known from `offset` on."""
        self.until = max(self.begin, min(self.until, offset))
        del self.marks[self.until - self.begin :]
        del self.digests[16 * len(self.marks) :]

    def proven(self, offset: int, entry: Mapping[str, Any]) -> bool:
        """An object that was put there later is read: who chose the bytes of a record can have
        others with the same MD5."""
        modified = entry.get("LastModified")
        return modified is not None and modified <= self.time and super().proven(offset, entry)


# ------------------------------------------------------------------------------------- the proof

OUTLIVES = "objects that outlive their records"
BEYOND = "objects beyond the committed position"
UNSEALED = "objects that no seal covers"


class Proof:
    """What an audit and a verification share: the seals, the listing, and what is said."""

    PROBLEMS = ("missing", "different", "stray", "broken", "lost")
    name = ""

    def __init__(self, settings: Settings, bucket: Any, stop: Any) -> None:
        self.settings, self.bucket, self.stop = settings, bucket, stop
        self.prefix = settings.s3_prefix
        self.topic = ""
        self.counts: Counter[str] = Counter()
        self.chains: dict[int, Chain] = {}
        self.heads: list[tuple[str, int, str]] = []  # time, partition and hash of every seal
        self.sealed: dict[int, list[Sealed]] = {}  # by partition, in order
        self.said = time.monotonic()

    def problem(self, kind: str, text: str, count: int = 1) -> None:
        self.counts[kind] += count
        output.info("%s: %s", kind.upper(), text)

    def progress(self, text: str, *args: object) -> None:
        if self.stop.requested:
            raise Failure(f"the {self.name} was stopped before its end: nothing is proven")
        if time.monotonic() - self.said > 2:
            self.said = time.monotonic()
            status(log, f"{self.name}: {text}", *args)

    # The seals:

    async def seal_names(self) -> list[tuple[int, int, int, str]]:
        """(partition, first, last, key) of every seal, in order."""
        names = []
        async for entries in self.bucket.pages(Prefix=f"{self.prefix}_seals/"):
            for entry in entries:
                match = SEAL_NAME.fullmatch(entry["Key"], len(self.prefix))
                if match:
                    names.append((*map(int, match.groups()), entry["Key"]))
                else:
                    self.problem("broken", f"{entry['Key']}: no seal has this name")
        return sorted(names)

    async def read_seals(self, names: list[tuple[int, int, int, str]]) -> None:
        """Follow the chain of each partition, and enter what it says."""
        for count, (*_, key) in enumerate(names):
            self.progress("read %d of %d seals", count, len(names))
            value = await self.bucket.get(key)
            try:
                seal = Seal.decode(value or b"")
            except ValueError as error:
                self.problem("broken", f"{key}: {error}")
                continue
            if self.linked(key, seal):
                chain = self.chains[seal.partition]
                chain.add(key, seal, value)
                self.heads.append((seal.time, seal.partition, chain.head))
                self.enter(Sealed(key, seal, chain.head))

    def linked(self, key: str, seal: Seal) -> bool:
        """Say whatever does not fit the seals before it; False for a seal that is to be left."""
        self.topic = self.topic or seal.topic
        chain = self.chains.setdefault(seal.partition, Chain())
        if key != self.prefix + seal.name:
            self.problem("broken", f"{key}: the seal of another place, {seal.name}")
        elif seal.topic != self.topic:
            self.problem("broken", f"{key}: the seal of another topic, {seal.topic}")
        elif seal.first < chain.next:
            self.problem("broken", f"{key}: sealed twice, {chain.key} has offset {seal.first} too")
        else:
            if seal.first > chain.next:
                text = f"no seal for offsets {chain.next} to {seal.first - 1}"
                self.problem("broken", f"{self.topic}/{seal.partition}: {text}, before {key}")
            elif seal.before != chain.head:
                before = f"{chain.key}, the seal before it" if chain.key else "no seal before it"
                self.problem("broken", f"{key}: was not made after {before}, as that is now")
            if seal.time < chain.time:
                self.problem("broken", f"{key}: it is older than the seal before it")
            return True
        return False

    def enter(self, sealed: Sealed) -> None:
        self.sealed.setdefault(sealed.partition, []).append(sealed)

    def roots(self) -> dict[str, str]:
        """The time of each root: the SHA-256 of a line `PARTITION HASH` for each partition, the
        hash of the last seal that it had then. The last one is the present root."""
        heads: dict[int, str] = {}
        roots = {}
        # The seals of a partition that were made at one time stay in their order.
        by_time = sorted(self.heads, key=itemgetter(0))
        for moment, seals in groupby(by_time, key=itemgetter(0)):
            heads |= {partition: head for _, partition, head in seals}
            lines = "".join(f"{partition} {heads[partition]}\n" for partition in sorted(heads))
            roots[sha256(lines.encode()).hexdigest()] = moment
        return roots

    # The bucket:

    def ledger_of(self, partition: int, offset: int) -> Ledger | None:
        """Where an offset is looked up."""
        parts = self.sealed.get(partition, [])
        at = bisect_right(parts, offset, key=attrgetter("begin")) - 1
        return parts[at] if at >= 0 and offset in parts[at] else None

    def outside(self, key: str, partition: int, offset: int) -> None:
        """Count an object that is in no ledger."""
        raise NotImplementedError

    async def read_bucket(self, expected: int) -> None:
        """Stream the listing past the ledgers, a page at a time; read only what it leaves open."""
        listed = 0
        async for entries in self.bucket.pages():
            unsure = [entry["Key"] for entry in entries if not self.settled(entry)]
            for start in range(0, len(unsure), READS):
                await asyncio.gather(*map(self.compare, unsure[start : start + READS]))
            listed += len(entries)
            self.progress("listed %d objects, %d are wanted", listed, expected)
        await self.read_sealed()

    def place(self, key: str) -> tuple[int, int] | None:
        """Partition and offset of an object; None when it has no such name."""
        match = NAME.fullmatch(key, len(self.prefix))
        return (int(match[1] or 0), int(match[2])) if match else None

    def settled(self, entry: dict[str, Any]) -> bool:
        """Book an object of the listing; False when it has to be read now."""
        key = entry["Key"]
        place = self.place(key)
        if place is None:
            if key.startswith(("stock_market_", "partition="), len(self.prefix)):
                self.problem("stray", f"{key}: no record has this name")
            elif not key.startswith("_seals/", len(self.prefix)):
                self.counts["other objects under the prefix"] += 1
            return True
        ledger = self.ledger_of(*place)
        if ledger is None:
            self.outside(key, *place)
            return True
        return self.settled_in(ledger, entry, place[1])

    def settled_in(self, ledger: Ledger, entry: dict[str, Any], offset: int) -> bool:
        mark, key = ledger.mark(offset), entry["Key"]
        if mark == Ledger.LETTER:
            self.problem("stray", f"{key}: its record is a dead letter too")
        elif mark == Ledger.MARKER:
            self.problem("stray", f"{key}: at its offset is a transaction marker, no record")
        elif mark == Ledger.EMPTY:
            self.problem("stray", f"{key}: there was no record and no object when it was sealed")
        elif mark in (Ledger.UNKNOWN, Ledger.WANTED):
            self.counts[OUTLIVES] += 1
            ledger.settle(offset, Ledger.KEPT)
        elif ledger.proven(offset, entry):
            ledger.settle(offset, Ledger.OBJECT)
        elif isinstance(ledger, Sealed):
            ledger.settle(offset, Ledger.UNREAD)  # until its seal is at hand again
        else:
            return False
        return True

    async def compare(self, key: str) -> None:
        """Read an object and compare it with its record."""
        place = self.place(key)
        assert place
        ledger, offset = self.ledger_of(*place), place[1]
        value = await self.bucket.get(key)
        if ledger is None or value is None:
            return  # removed since it was listed: it is missing
        if not ledger.same(offset, digest(value)):
            self.problem("different", f"{key}: other bytes than its record")
        ledger.settle(offset, Ledger.OBJECT)

    async def read_sealed(self) -> None:
        """Read the objects that the listing did not prove, and compare them with their seals."""
        parts = [part for parts in self.sealed.values() for part in parts]
        total = sum(part.marks.count(Ledger.UNREAD) for part in parts)
        done = 0
        for part in parts:
            unread = list(part.offsets(Ledger.UNREAD))
            if not unread:
                continue
            value = await self.bucket.get(part.key) or b""
            if sha256(value).hexdigest() != part.head:
                raise Failure(
                    f"{part.key} was changed while the {self.name} ran: nothing is proven"
                )
            hashes = {offset: found for offset, _, found in Seal.decode(value).hashes()}
            for start in range(0, len(unread), READS):
                now = unread[start : start + READS]
                await asyncio.gather(*(self.compare_sealed(part, n, hashes[n]) for n in now))
                done += len(now)
                self.progress("read %d of %d objects", done, total)

    async def compare_sealed(self, part: Sealed, offset: int, wanted: bytes) -> None:
        folder = f"partition={part.partition}/" if part.partition else ""
        key = f"{self.prefix}{folder}stock_market_{offset}.json"
        value = await self.bucket.get(key)
        if value is None:
            part.settle(offset, Ledger.RECORD)  # removed since it was listed: it is missing
            return
        if sha256(value).digest() != wanted:
            self.problem("different", f"{key}: other bytes than {part.key} has sealed")
        part.settle(offset, Ledger.OBJECT)

    # The end:

    def report_sealed(self) -> None:
        for partition, parts in self.sealed.items():
            for part in parts:
                for first, last in part.missing():
                    text = f"{self.topic}/{partition} offsets {first} to {last}: no object"
                    self.problem("missing", f"{text}, sealed by {part.key}", last - first + 1)
                self.counts["sealed objects"] += part.marks.count(Ledger.OBJECT)
                self.counts["sealed dead letters"] += part.marks.count(Ledger.LETTER)
                self.counts["sealed transaction markers"] += part.marks.count(Ledger.MARKER)

    def problems(self) -> list[str]:
        return [kind for kind in self.PROBLEMS if self.counts[kind]]

    def verdict(self, right: str) -> int:
        """Say what was counted and what is wrong, as the last line; the exit code."""
        problems = self.problems()
        wrong = ", ".join(f"{self.counts[kind]} {kind}" for kind in problems)
        counted = (f"{n} {kind}" for kind, n in self.counts.items() if n and kind not in problems)
        counts = ", ".join(counted) or "no records"
        output.info("%s: %s: %s", self.name, counts, wrong or right)
        return 1 if problems else 0


class Verify(Proof):
    """Compares the bucket with its seals; Kafka is not asked."""

    name = "verify"

    async def run(self, root: str | None) -> int:
        """Print every problem, then the verdict; returns the exit code. Raises Failure."""
        await self.read_seals(await self.seal_names())
        roots = self.roots()
        if not roots and not self.problems():
            raise Failure(
                f"{self.bucket.where}: no seals under {self.prefix}_seals/: infra/audit.py --seal"
                " makes them; see S3_PREFIX"
            )
        if root and root not in roots:
            text = f"{root} is no root of the seals that are here: seals were removed or replaced"
            self.problem("broken", text)
        elif root:
            output.info("root %s: of %s, found", root, roots[root])
        parts = [part for parts in self.sealed.values() for part in parts]
        await self.read_bucket(sum(part.marks.count(Ledger.RECORD) for part in parts))
        self.report_sealed()
        for part in parts:
            if removed := part.begin - part.first:
                text = "not sealed: %s/%d offsets %d to %d, which retention had removed before"
                output.info(text, self.topic, part.partition, part.first, part.begin - 1)
                self.counts["removed before they were sealed"] += removed
        for partition, chain in sorted(self.chains.items()):
            if chain.key:
                text = "checked %s/%d: sealed up to offset %d, %s"
                output.info(text, self.topic, partition, chain.next - 1, chain.time)
        present = list(roots)[-1] if roots else "none"
        return self.verdict(f"every sealed object is there, every byte the same; root {present}")

    def outside(self, key: str, partition: int, offset: int) -> None:
        self.counts[UNSEALED] += 1


def lost_ranges(metadata: str) -> list[tuple[int, int]]:
    """What the consumer noted with its commit, as (first, last): `lost 100-199,300-310`, offsets
    that retention removed before they were written."""
    match = LOST.fullmatch(metadata or "")
    pairs = (text.split("-") for text in match[1].split(",")) if match else ()
    return [(int(first), int(last)) for first, last in pairs]


class Audit(Proof):
    """Compares topic, dead letter topic and bucket; writes to none of them."""

    name = "audit"

    def __init__(
        self, settings: Settings, bucket: Any, consumer: Any, stop: Any, sealing: bool = False
    ) -> None:
        super().__init__(settings, bucket, stop)
        self.topic, self.consumer, self.sealing = settings.kafka_topic, consumer, sealing
        self.topics = Topics(consumer, self.progress)
        self.ledgers: dict[int, Ledger] = {}
        self.positions: dict[int, int] = {}  # the group's, by partition
        self.after_end: dict[str, tuple[int, int]] = {}  # objects past what was the topic's end
        self.lost: dict[int, list[tuple[int, int]]] = {}
        self.found: set[tuple[int, int]] = set()  # of what was said to be lost

    async def run(self) -> int:
        """Print every problem, then what was checked; returns the exit code. Raises Failure."""
        with self.topics:
            names = await self.seal_names()
            self.open_ledgers({partition: last + 1 for partition, _, last, _ in names})
            self.read_topic()
            self.read_letters()
            await self.read_seals(names)
            marks = [ledger.marks for ledger in self.ledgers.values()]
            await self.read_bucket(sum(mark.count(Ledger.RECORD) for mark in marks))
            self.look_again()
            self.report()
            self.refuse_emptiness()
        code = self.verdict("nothing missing, nothing twice, every byte the same")
        if self.sealing:
            await self.seal()
        return code

    # The topic:

    def open_ledgers(self, unsealed: Mapping[int, int]) -> None:
        """Make a ledger for each partition, up to the group's committed position; `unsealed` is
        the first offset without a seal, where it is not 0."""
        topic, group = self.topic, self.settings.kafka_group_id
        tps = self.topics.partitions(topic)
        committed = {tp: self.consumer.committed(tp, metadata=True) for tp in tps}
        # The ends after the positions: the pair may be at work, and a position was an end before.
        begins, ends = self.consumer.beginning_offsets(tps), self.consumer.end_offsets(tps)
        if all(position is None for position in committed.values()):
            raise Failure(
                f"KAFKA_GROUP_ID={group} has no committed position on topic {topic}: nothing to"
                " audit; is this the consumer's group?"
            )
        for tp, known in committed.items():
            position = known.offset if known else 0
            if position > ends[tp]:
                text = f"{topic}/{tp.partition}: committed {position}, but the end is {ends[tp]}"
                self.problem("missing", text, position - ends[tp])
            until = self.positions[tp.partition] = min(position, ends[tp])
            seal_from = unsealed.get(tp.partition, 0) if self.sealing else None
            self.ledgers[tp.partition] = Ledger(begins[tp], until, ends[tp], seal_from)
            self.lost[tp.partition] = lost_ranges(known.metadata) if known else []
            if known and until < begins[tp]:  # the consumer was away for longer than retention
                self.lost[tp.partition].append((until, begins[tp] - 1))

    def read_topic(self) -> None:
        ledgers = self.ledgers.items()
        ranges = {TopicPartition(self.topic, p): (of.begin, of.until) for p, of in ledgers}
        for record in self.topics.read(ranges):
            self.ledgers[record.partition].write(record)

    def read_letters(self) -> None:
        """Mark the records that are in the dead letter topic, with their bytes."""
        name = self.settings.kafka_dlq_topic
        tps = self.topics.partitions(name)
        if not tps:
            text = "KAFKA_DLQ_TOPIC=%s does not exist, or this user may not see it: no dead letters"
            log.warning(text, name)
        begins, ends = self.consumer.beginning_offsets(tps), self.consumer.end_offsets(tps)
        for letter in self.topics.read({tp: (begins[tp], ends[tp]) for tp in tps}):
            headers = dict(letter.headers)
            if headers.get("source.topic") != self.topic.encode():
                continue
            try:
                partition, offset = int(headers["source.partition"]), int(headers["source.offset"])
            except (KeyError, TypeError, ValueError):
                continue  # somebody else's letter
            ledger = self.ledgers.get(partition)
            if ledger is None or offset not in ledger:
                self.found_lost(partition, offset)
                continue
            mark = ledger.mark(offset)
            if mark in (Ledger.RECORD, Ledger.LETTER) and ledger.same(offset, digest(letter.value)):
                # A crash between the letter and the commit sends it again.
                self.counts["dead letters sent again"] += mark == Ledger.LETTER
                ledger.settle(offset, Ledger.LETTER)

    def found_lost(self, partition: int, offset: int) -> None:
        """Note that an offset that may have been called lost is not."""
        if any(first <= offset <= last for first, last in self.lost.get(partition, ())):
            self.found.add((partition, offset))

    def enter(self, sealed: Sealed) -> None:
        """Compare a seal with the topic, and keep what the topic no longer has."""
        ledger = self.ledgers.get(sealed.partition)
        if ledger is None:
            super().enter(sealed)
            return
        if sealed.until > ledger.end:
            text = f"{sealed.key}: sealed beyond the topic's end ({ledger.end}): was it made anew?"
            self.problem("broken", text)
        for offset in range(max(sealed.begin, ledger.begin), min(sealed.until, ledger.until)):
            self.compare_seal(sealed, ledger, offset)
        sealed.end_at(ledger.begin)
        if sealed.marks:
            super().enter(sealed)

    def compare_seal(self, sealed: Sealed, ledger: Ledger, offset: int) -> None:
        theirs, ours = sealed.mark(offset), ledger.mark(offset)
        values = (Ledger.RECORD, Ledger.LETTER)
        if ours == Ledger.UNKNOWN:
            ledger.take(sealed, offset)  # compacted away since it was sealed
        elif (theirs in values) != (ours in values) or (
            theirs in values and not ledger.same(offset, sealed.digests[sealed._digest(offset)])
        ):
            text = f"{self.topic}/{sealed.partition} offset {offset}: the topic's record is not"
            self.problem("different", f"{text} the one that {sealed.key} has sealed")
        elif theirs == Ledger.LETTER:
            ledger.settle(offset, Ledger.LETTER)  # the dead letter topic may have lost it since

    # The bucket:

    def ledger_of(self, partition: int, offset: int) -> Ledger | None:
        ledger = self.ledgers.get(partition)
        if ledger is not None and offset in ledger:
            return ledger
        if ledger is not None and offset >= ledger.until:
            return None
        return super().ledger_of(partition, offset)

    def outside(self, key: str, partition: int, offset: int) -> None:
        ledger = self.ledgers.get(partition)
        if ledger is None:
            self.problem("stray", f"{key}: the topic has no such record")
        elif offset < ledger.begin:
            self.counts[OUTLIVES] += 1
            self.found_lost(partition, offset)
        elif offset < ledger.end:
            self.counts[BEYOND] += 1
        else:
            self.after_end[key] = (partition, offset)

    def look_again(self) -> None:
        """Ask for the topic's end anew: records may have come, and been written, meanwhile."""
        tps = [TopicPartition(self.topic, p) for p in self.ledgers]
        ends = {tp.partition: end for tp, end in self.consumer.end_offsets(tps).items()}
        for key, (partition, offset) in self.after_end.items():
            if offset < ends[partition]:
                self.counts[BEYOND] += 1
            else:
                self.problem("stray", f"{key}: the topic has no such record")

    # The end:

    def report(self) -> None:
        kinds = {
            Ledger.OBJECT: "objects",
            Ledger.LETTER: "dead letters",
            Ledger.MARKER: "transaction markers",
        }
        for partition, ledger in self.ledgers.items():
            for first, last in ledger.missing():
                text = (
                    f"{self.topic}/{partition} offsets {first} to {last}: no object, no dead letter"
                )
                self.problem("missing", text, last - first + 1)
            for first, last in self.still_lost(partition):
                text = f"{self.topic}/{partition} offsets {first} to {last}"
                why = "retention removed them before they were written"
                self.problem("lost", f"{text}: {why}", last - first + 1)
            for mark, kind in kinds.items():
                self.counts[kind] += ledger.marks.count(mark)
            self.report_range(partition, ledger)
        self.report_sealed()

    def report_range(self, partition: int, ledger: Ledger) -> None:
        chain = self.chains.get(partition)
        if chain and chain.key and chain.next < ledger.begin:
            text = "not sealed: %s/%d offsets %d to %d, which retention has removed"
            output.info(text, self.topic, partition, chain.next, ledger.begin - 1)
        gone = (Ledger.UNKNOWN, Ledger.KEPT, Ledger.EMPTY)
        output.info(
            "checked %s/%d: %d records, offsets %d up to the committed position %d (end %d)",
            *(self.topic, partition, len(ledger.marks) - sum(map(ledger.marks.count, gone))),
            *(ledger.begin, self.positions[partition], ledger.end),
        )

    def still_lost(self, partition: int) -> Iterator[tuple[int, int]]:
        """Ranges (first, last) of what was lost and is neither an object nor a dead letter."""
        begin = self.ledgers[partition].begin  # what the topic has is looked at by itself
        known = [(offset, offset) for p, offset in self.found if p == partition]
        known += [(part.begin, part.until - 1) for part in self.sealed.get(partition, ())]
        for first, last in self.lost[partition]:
            last = min(last, begin - 1)
            for start, end in sorted(known):
                if first <= end and start <= last:
                    if first < start:
                        yield first, start - 1
                    first = end + 1
            if first <= last:
                yield first, last

    def refuse_emptiness(self) -> None:
        """An audit that has compared nothing is no proof while the topic has records."""
        full = {p: ledger for p, ledger in self.ledgers.items() if ledger.end > ledger.begin}
        if not full or self.sealed or any(ledger.marks for ledger in full.values()):
            return
        there = sum(ledger.end - ledger.begin for ledger in full.values())
        begins = {TopicPartition(self.topic, p): ledger.begin for p, ledger in full.items()}
        raise Failure(
            f"nothing was checked: topic {self.topic} has {there} records, and the committed"
            f" position of KAFKA_GROUP_ID={self.settings.kafka_group_id} is before them all; does"
            f" the consumer get them?{self.topics.why_not(begins)}"
        )

    # New seals:

    async def seal(self) -> None:
        """Seal what was proven and is not sealed yet. Raises Failure."""
        if set(self.problems()) - {"lost"}:
            raise Failure("nothing was sealed: see what is wrong above")
        now = datetime.now(UTC).isoformat(timespec="microseconds")
        before = len(self.heads)
        for partition, ledger in self.ledgers.items():
            chain = self.chains.setdefault(partition, Chain())
            while max(chain.next, ledger.begin) < ledger.until:
                until = min(ledger.until, max(chain.next, ledger.begin) + SEAL_SIZE)
                place = self.topic, partition, chain.next, until - 1
                seal = ledger.seal(*place, time=now, before=chain.head)
                value, key = seal.encode(), self.prefix + seal.name
                await self.bucket.create(key, value)
                chain.add(key, seal, value)
                self.heads.append((now, partition, chain.head))
                output.info("sealed %s/%d: %s", self.topic, partition, key)
        if len(self.heads) == before:
            output.info("nothing new to seal")
        await self.look_for_others()
        roots = list(self.roots())
        if roots:
            text = "seal: root %s: keep it where nobody can change it, for --verify --root"
            output.info(text, roots[-1])

    async def look_for_others(self) -> None:
        """Raises Failure when another audit has sealed the same offsets at the same time."""
        for before, after in pairwise(await self.seal_names()):
            if before[0] == after[0] and after[1] <= before[2]:
                raise Failure(
                    f"{before[3]} and {after[3]} seal the same offsets: two audits ran at once;"
                    " remove the one that no later seal follows, and let one audit seal"
                )


# ------------------------------------------------------------------------------------------ start


async def audit(settings: Settings, stop: Stop, sealing: bool) -> int:
    async with open_bucket(settings) as bucket:
        await bucket.check()
        consumer = make_consumer(settings, auto_offset_reset="earliest")
        return await Audit(settings, bucket, consumer, stop, sealing).run()


async def verify(settings: Settings, stop: Stop, folder: Path | None, root: str | None) -> int:
    if folder:
        return await Verify(settings, Folder(folder), stop).run(root)
    async with open_bucket(settings) as bucket:
        await bucket.check()
        return await Verify(settings, bucket, stop).run(root)


def finished(proof: Coroutine[Any, Any, int], stop: Stop) -> int:
    """The exit code of a proof. Raises Failure."""
    stop.code = 1  # a proof that was stopped has proven nothing
    try:
        code = asyncio.run(proof)
        return 1 if any(getattr(each, "failed", False) for each in output.handlers) else code
    except MemoryError:
        raise Failure("more offsets than there is memory for: 17 bytes each, 49 to seal") from None
    except (KafkaError, *S3_ERRORS) as error:
        raise Failure(f"nothing is proven: {explain(error)}") from None


def run(settings: Settings, stop: Stop, *, sealing: bool = False) -> int:
    """Audit topic and bucket of `settings`; returns the exit code. Raises Failure."""
    check_kafka(settings)
    return finished(audit(settings, stop, sealing), stop)


def _hash(text: str) -> str:
    if not re.fullmatch("[0-9a-f]{64}", text):
        raise argparse.ArgumentTypeError(f"{text!r}: must be 64 hexadecimal digits")
    return text


def _folder(text: str) -> Path:
    if not os.path.isdir(text):
        raise argparse.ArgumentTypeError(f"{text!r}: there is no such folder")
    return Path(text)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Proves that the bucket holds the topic. Settings: README.md."
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--audit", action="store_true", help="compare topic and bucket, and write nothing (default)"
    )
    what.add_argument(
        "--seal", action="store_true", help="audit, and seal in the bucket what was proven"
    )
    what.add_argument(
        "--verify", action="store_true", help="compare the bucket with its seals, without Kafka"
    )
    parser.add_argument("--folder", type=_folder, help="verify a copy of the bucket in a folder")
    parser.add_argument("--root", type=_hash, help="verify that the seals are those of this root")
    args = parser.parse_args(argv)
    if (args.folder or args.root) and not args.verify:
        parser.error("--folder and --root go with --verify")
    return args


def needs_bucket(values: Mapping[str, Any]) -> str:
    if values.get("s3_bucket", True):
        return ""
    return "S3_BUCKET is not set: name the bucket, in .env or the environment"


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        settings = Settings.load({}, *([] if args.folder else [needs_bucket]))
        setup_logging(settings)
        stop = Stop()
        if args.verify:
            return finished(verify(settings, stop, args.folder, args.root), stop)
        return run(settings, stop, sealing=args.seal)
    except SettingsError as error:
        print(*error.args, sep="\n", file=sys.stderr)
        return 2
    except Failure as error:
        log.error("%s", error)
        return 1


if __name__ == "__main__":
    sys.exit(main())
