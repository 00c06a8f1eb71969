#!/usr/bin/env python3
"""Proves that the bucket holds the topic: every record is one object or one dead letter.

    python kafka_consumer.py --audit
    python infra/audit.py [--audit]

Every offset of the topic from its beginning up to the group's committed position has to be an
object with the record's bytes or a dead letter. It prints what it checked and every gap,
difference and stray object, writes to neither topic nor bucket, and exits with 0 when nothing is
wrong, else with 1.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while the imports run: no traceback
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import argparse
import asyncio
import logging
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from hashlib import md5
from typing import Any

import aiohttp
from aiobotocore.config import AioConfig
from aiobotocore.session import AioSession
from botocore.exceptions import BotoCoreError, ClientError
from botocore.parsers import ResponseParserError
from kafka import KafkaConsumer, TopicPartition
from kafka.errors import KafkaError

from config import (
    Failure,
    Settings,
    SettingsError,
    Stop,
    check_kafka,
    code_of,
    environment,
    explain,
    is_marker,
    printable,
    records,
    setup_logging,
    status,
)

log = logging.getLogger(__name__)

# The object of a record: its partition, unless it is 0, and its offset.
NAME = re.compile(r"(?:partition=([1-9][0-9]*)/)?stock_market_(0|[1-9][0-9]*)\.json")

PATIENCE = 20.0  # s without a record that is there to be read
READS = 64  # objects read at once
ATTEMPTS = 3  # for each request to S3
# What S3, the way to it or the credentials can raise.
S3_ERRORS = (ClientError, BotoCoreError, ResponseParserError, aiohttp.ClientError, OSError)
# Trying these again does not help.
FINAL = ("AccessDenied", "NoCredentialsError", "NoSuchBucket", "NoSuchKey")


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
        records.info("Connection Test:  %s", names or [self.name])

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
            async with answer["Body"] as body:
                return bytes(await body.read())

        return await self.attempt(f"s3://{self.name}/{key}", call)

    async def attempt(self, what: str, call: Callable[[], Awaitable[Any]]) -> Any:
        """The answer to `call`; Failure that names `what` when it fails for the third time."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return await call()
            except S3_ERRORS as error:
                if attempt == ATTEMPTS or code_of(error) in FINAL:
                    raise Failure(f"{what}: {explain(error)}") from None
            await asyncio.sleep(0.5 * attempt)


@asynccontextmanager
async def open_bucket(settings: Settings) -> AsyncIterator[Bucket]:
    """The bucket, with credentials and region found the usual way of AWS."""
    options = AioConfig(
        max_pool_connections=READS,
        connect_timeout=3,
        read_timeout=60,
        retries={"total_max_attempts": 1},
    )
    try:
        client = AioSession().create_client(
            "s3", endpoint_url=settings.s3_endpoint_url, config=options
        )
        async with client as opened:
            yield Bucket(settings, opened)
    except (BotoCoreError, ValueError) as error:  # a profile or an address that cannot be used
        raise Failure(f"S3_BUCKET={settings.s3_bucket}: {explain(error)}") from None


# ------------------------------------------------------------------------------------- the topic


class LastWords(logging.Handler):
    """Keeps the Kafka client's last warning: it only logs why it gets no records."""

    text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text = printable(record.getMessage())

    def said(self) -> str:
        return f" (the client says: {self.text})" if self.text else ""


class Topics:
    """Reads topics, up to given offsets. Raises Failure when no records come."""

    def __init__(self, consumer: Any, progress: Callable[..., None]) -> None:
        self.consumer, self.progress = consumer, progress
        self.words = LastWords(logging.WARNING)

    def __enter__(self) -> Topics:
        client = logging.getLogger("kafka")
        client.setLevel(logging.WARNING)
        client.propagate = False
        client.addHandler(self.words)
        return self

    def __exit__(self, *error: object) -> None:
        client = logging.getLogger("kafka")
        client.setLevel(logging.CRITICAL)  # it calls every end a failure
        client.removeHandler(self.words)
        client.propagate = True
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
            for position, batch in self.batches(tp, until):
                yield from (record for record in batch if record.offset < until)
                read = done + min(position, until) - begin
                self.progress("audit: read %d of %d offsets of %s", read, total, tp.topic)
            done += until - begin

    def batches(self, tp: TopicPartition, until: int) -> Iterator[tuple[int, list[Any]]]:
        """(position after it, records) of each poll, up to `until`."""
        last = time.monotonic()
        while (position := self.consumer.position(tp)) < until:
            batch = self.consumer.poll(timeout_ms=500).get(tp, [])
            now = time.monotonic()
            moved = self.consumer.position(tp)
            if moved != position:
                last = now
            elif now - last > PATIENCE:
                raise Failure(
                    f"{tp.topic}/{tp.partition}: no records came for {PATIENCE:.0f} s from offset"
                    f" {position} on, of those up to {until}: the audit proves nothing"
                    f"{self.words.said()}"
                )
            yield moved, batch


# ------------------------------------------------------------------------------------- the audit


def digest(value: bytes | None) -> bytes:
    """What a ledger keeps of a value; zeros for null."""
    return bytes(16) if value is None else md5(value, usedforsecurity=False).digest()


class Ledger:
    """What is known of one partition's offsets from `begin` up to, not including, `until`: a mark
    and an MD5, 17 bytes each. `end` is the end of the log."""

    HOLE, RECORD, OBJECT, LETTER, MARKER = range(5)

    def __init__(self, begin: int, until: int, end: int) -> None:
        self.begin, self.until, self.end = begin, max(begin, until), end
        self.marks = bytearray(self.until - begin)
        self.digests = bytearray(16 * len(self.marks))

    def write(self, record: Any) -> None:
        """Enter a record or a transaction marker of the topic."""
        at = record.offset - self.begin
        self.marks[at] = self.MARKER if is_marker(record) else self.RECORD
        self.digests[16 * at : 16 * at + 16] = digest(record.value)

    def __contains__(self, offset: int) -> bool:
        return self.begin <= offset < self.until

    def mark(self, offset: int) -> int:
        return self.marks[offset - self.begin]

    def settle(self, offset: int, mark: int) -> None:
        self.marks[offset - self.begin] = mark

    def same(self, offset: int, found: bytes) -> bool:
        at = 16 * (offset - self.begin)
        return self.digests[at : at + 16] == found

    def missing(self) -> Iterator[tuple[int, int]]:
        """Ranges (first, last) of records with neither object nor dead letter."""
        for match in re.finditer(bytes([self.RECORD]) + b"+", self.marks):
            yield self.begin + match.start(), self.begin + match.end() - 1


OUTLIVES = "objects that outlive their records"
BEYOND = "objects beyond the committed position"


class Audit:
    """Compares topic, dead letter topic and bucket; writes to none of them."""

    def __init__(self, settings: Settings, bucket: Any, consumer: Any, stop: Any) -> None:
        self.settings, self.bucket, self.stop = settings, bucket, stop
        self.consumer = consumer
        self.topics = Topics(consumer, self.progress)
        self.ledgers: dict[int, Ledger] = {}
        self.counts: Counter[str] = Counter()
        self.after_end: dict[str, tuple[int, int]] = {}  # objects past what was the topic's end
        self.said = time.monotonic()

    async def run(self) -> int:
        """Print every problem, then what was checked; returns the exit code. Raises Failure."""
        with self.topics:
            self.read_topic()
            self.read_letters()
            await self.read_bucket()
            self.look_again()
            return self.report()

    def report(self) -> int:
        topic = self.settings.kafka_topic
        for partition, ledger in self.ledgers.items():
            for first, last in ledger.missing():
                text = f"{topic}/{partition} offsets {first} to {last}: no object, no dead letter"
                self.problem("missing", text, last - first + 1)
            self.count(ledger)
            records.info(
                "checked %s/%d: %d records, offsets %d up to the committed position %d (end %d)",
                *(topic, partition, len(ledger.marks) - ledger.marks.count(Ledger.HOLE)),
                *(ledger.begin, ledger.until, ledger.end),
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

    def count(self, ledger: Ledger) -> None:
        kinds = {
            Ledger.OBJECT: "objects",
            Ledger.LETTER: "dead letters",
            Ledger.MARKER: "transaction markers",
        }
        for mark, kind in kinds.items():
            self.counts[kind] += ledger.marks.count(mark)

    def problem(self, kind: str, text: str, count: int = 1) -> None:
        self.counts[kind] += count
        records.info("%s: %s", kind.upper(), text)

    def progress(self, text: str, *args: object) -> None:
        if self.stop.requested:
            raise Failure("the audit was stopped before its end: nothing is proven")
        if time.monotonic() - self.said > 2:
            self.said = time.monotonic()
            status(log, text, *args)

    def read_topic(self) -> None:
        """Fill a ledger for each partition, up to the group's committed position."""
        topic, group = self.settings.kafka_topic, self.settings.kafka_group_id
        tps = self.topics.partitions(topic)
        begins, ends = self.consumer.beginning_offsets(tps), self.consumer.end_offsets(tps)
        committed = {tp: self.consumer.committed(tp) for tp in tps}
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
        for record in self.topics.read(ranges):
            self.ledgers[record.partition].write(record)

    def read_letters(self) -> None:
        """Mark the records that are in the dead letter topic, with their bytes."""
        tps = self.topics.partitions(self.settings.kafka_dlq_topic)
        begins, ends = self.consumer.beginning_offsets(tps), self.consumer.end_offsets(tps)
        for letter in self.topics.read({tp: (begins[tp], ends[tp]) for tp in tps}):
            headers = dict(letter.headers)
            if headers.get("source.topic") != self.settings.kafka_topic.encode():
                continue
            try:
                ledger = self.ledgers.get(int(headers["source.partition"]))
                offset = int(headers["source.offset"])
            except (KeyError, TypeError, ValueError):
                continue  # somebody else's letter
            if ledger is None or offset not in ledger:
                continue
            mark = ledger.mark(offset)
            if mark in (Ledger.RECORD, Ledger.LETTER) and ledger.same(offset, digest(letter.value)):
                # A crash between the letter and the commit sends it again.
                self.counts["dead letters sent again"] += mark == Ledger.LETTER
                ledger.settle(offset, Ledger.LETTER)

    async def read_bucket(self) -> None:
        """Stream the listing past the ledgers, a page at a time; read only what it leaves open."""
        marks = [ledger.marks for ledger in self.ledgers.values()]
        expected = sum(mark.count(Ledger.RECORD) for mark in marks)
        listed = 0
        async for entries in self.bucket.pages():
            unsure = [entry["Key"] for entry in entries if not self.settled(entry)]
            for start in range(0, len(unsure), READS):
                await asyncio.gather(*map(self.compare, unsure[start : start + READS]))
            listed += len(entries)
            self.progress("audit: listed %d objects, of %d records", listed, expected)

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
        partition, offset = int(match[1] or 0), int(match[2])
        ledger = self.ledgers.get(partition)
        if ledger is None:
            self.problem("stray", f"{key}: the topic has no such record")
        elif offset in ledger:
            return self.settled_record(key, entry["ETag"], ledger, offset)
        elif offset < ledger.begin:
            self.counts[OUTLIVES] += 1
        elif offset < ledger.end:
            self.counts[BEYOND] += 1
        else:
            self.after_end[key] = (partition, offset)
        return True

    def settled_record(self, key: str, etag: str, ledger: Ledger, offset: int) -> bool:
        mark = ledger.mark(offset)
        if mark == Ledger.LETTER:
            self.problem("stray", f"{key}: its record is a dead letter too")
        elif mark == Ledger.MARKER:
            self.problem("stray", f"{key}: at its offset is a transaction marker, no record")
        elif mark == Ledger.HOLE:
            self.counts[OUTLIVES] += 1  # compaction, or retention meanwhile, removed the record
        else:
            if not re.fullmatch('"[0-9a-f]{32}"', etag):
                return False
            if not ledger.same(offset, bytes.fromhex(etag[1:-1])):
                return False
            ledger.settle(offset, Ledger.OBJECT)
        return True

    def look_again(self) -> None:
        """Ask for the topic's end anew: records may have come, and been written, meanwhile."""
        tps = [TopicPartition(self.settings.kafka_topic, p) for p in self.ledgers]
        ends = {tp.partition: end for tp, end in self.consumer.end_offsets(tps).items()}
        for key, (partition, offset) in self.after_end.items():
            if offset < ends[partition]:
                self.counts[BEYOND] += 1
            else:
                self.problem("stray", f"{key}: the topic has no such record")

    async def compare(self, key: str) -> None:
        """Read an object and compare it with its record."""
        match = NAME.fullmatch(key, len(self.settings.s3_prefix))
        assert match
        ledger, offset = self.ledgers[int(match[1] or 0)], int(match[2])
        value = await self.bucket.get(key)
        if value is None:
            return  # removed since it was listed: it is missing
        if not ledger.same(offset, digest(value)):
            self.problem("different", f"{key}: other bytes than its record")
        ledger.settle(offset, Ledger.OBJECT)


# ------------------------------------------------------------------------------------------ start


async def audit(settings: Settings, stop: Stop) -> int:
    # kafka-python 3 leaves aborted records out only when it is asked to; kafka-python-ng cannot.
    committed = {"isolation_level": "read_committed"}
    consumer = KafkaConsumer(
        **settings.kafka(),
        group_id=settings.kafka_group_id,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        **(committed if "isolation_level" in KafkaConsumer.DEFAULT_CONFIG else {}),
    )
    async with open_bucket(settings) as bucket:
        await bucket.check()
        return await Audit(settings, bucket, consumer, stop).run()


def run(settings: Settings, stop: Stop) -> int:
    """Audit topic and bucket of `settings`; returns the exit code. Raises Failure."""
    stop.code = 1  # an audit that was stopped has proven nothing
    check_kafka(settings)
    try:
        return asyncio.run(audit(settings, stop))
    except (KafkaError, *S3_ERRORS) as error:
        raise Failure(f"the audit proves nothing: {explain(error)}") from None


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Proves that the bucket holds the topic.")
    parser.add_argument(
        "--audit", action="store_true", help="compare topic and bucket, and write nothing (default)"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    parse(argv)
    try:
        settings = Settings.from_env(environment({}), required="S3_BUCKET")
        setup_logging(settings)
        return run(settings, Stop())
    except SettingsError as error:
        print(*error.args, sep="\n", file=sys.stderr)
        return 2
    except Failure as error:
        log.error("%s", error)
        return 1


if __name__ == "__main__":
    sys.exit(main())
