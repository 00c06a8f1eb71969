#!/usr/bin/env python3
"""A look at the bucket without AWS: a page with charts, and all records in one Parquet file.

Takes the settings that the consumer takes; writes report.html, which needs no network, and
records.parquet into the folder named, or this one. The broker is asked for the lag and the dead
letters if it answers; nothing else of the report needs it.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":  # Ctrl-C while the imports run, a second or two: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
# Before the packages: it says in one line which of them is missing.
from config import (
    Failure,
    Settings,
    SettingsError,
    check_kafka,
    explain,
    make_consumer,
)

# isort: split
import asyncio
import json
import logging
import math
import os
import re
import ssl
import tempfile
import time
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import IO, Any
from urllib.parse import quote

import aiohttp
from aiobotocore.config import AioConfig
from aiobotocore.session import AioSession
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.exceptions import BotoCoreError, ClientError
from kafka import TopicPartition
from kafka.errors import KafkaError
from yarl import URL

try:
    import duckdb
except ImportError as error:
    sys.exit(f"{error.name} is not installed: {sys.executable} -m pip install '.[report]'")
from infra.audit import NAME

HERE = Path(__file__).resolve().parent

GETS_AT_ONCE = 64
S3_PATIENCE = 20.0  # s without a byte after which a read is tried again
BROKER_PATIENCE = 10.0  # s without a record after which the dead letters are given up

POINTS = 400  # of a line in the chart of values
GROUPS = 24  # lines in that chart
MEASURES = 8  # columns of numbers that it can show
BARS = 60  # in the chart of throughput
LISTED_GAPS = 100
LAST_RECORDS = 25
FIELDS = 40
SECONDS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10_800, 21_600, 43_200)
DAY = 86_400  # s

OURS = ("kafka_partition", "kafka_offset", "written_at")
NUMBER_TYPES = ("BIGINT", "UBIGINT", "HUGEINT", "UHUGEINT", "INTEGER", "DOUBLE", "DECIMAL")
LIKELY_GROUPS = ("index", "symbol", "ticker", "code", "name")
LIKELY_MEASURES = ("close", "price", "value", "amount")


# ------------------------------------------------------------------------------------ the bucket


@dataclass(frozen=True)
class Object:
    """One of the consumer's objects, as the bucket's listing has it."""

    key: str
    partition: int
    offset: int
    bytes: int
    written_at: str  # UTC, to the second


class Progress:
    """How far the reading is: a bar that stays on its line on a terminal, a line every 10 s
    elsewhere."""

    def __init__(self, total: int) -> None:
        self.total, self.terminal = total, sys.stderr.isatty()
        self.began = self.said = time.monotonic()

    def show(self, done: int) -> None:
        now = time.monotonic()
        if now - self.said < (0.2 if self.terminal else 10):
            return
        self.said = now
        rate = done / max(now - self.began, 0.001)
        left = f"{(self.total - done) / rate:,.0f} s left" if rate else ""
        text = f"{done:,} of {self.total:,} objects | {rate:,.0f}/s | {left}"
        if self.terminal:
            filled = 20 * done // self.total
            bar = "#" * filled + "." * (20 - filled)
            width = os.get_terminal_size(sys.stderr.fileno()).columns - 1
            print(f"\r\x1b[K{f'[{bar}] {text}'[:width]}", end="", file=sys.stderr, flush=True)
        else:
            print(text, file=sys.stderr)

    def end(self) -> None:
        if self.terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


async def list_objects(client: Any, bucket: str, prefix: str) -> tuple[list[Object], str | None]:
    """The consumer's objects under the prefix, and the bucket's region where the server tells it;
    whatever else is there is passed over."""
    found, region = [], client.meta.region_name
    async for page in client.get_paginator("list_objects_v2").paginate(
        Bucket=bucket, Prefix=prefix
    ):
        region = page["ResponseMetadata"]["HTTPHeaders"].get("x-amz-bucket-region", region)
        for entry in page.get("Contents", ()):
            match = NAME.fullmatch(entry["Key"], len(prefix))
            if match:
                partition, offset = int(match[1] or 0), int(match[2])
                written_at = f"{entry['LastModified'].astimezone(UTC):%F %T}"
                size = entry["Size"]
                found.append(Object(entry["Key"], partition, offset, size, written_at))
    return found, region


class Columns:
    """Names for the fields of all records: as they are written where that can be, for a column has
    to have a name, and SQL knows no difference between "Close" and "close"."""

    def __init__(self) -> None:
        self.names: dict[str, str] = {}
        self.taken = set(OURS)

    def name(self, field: str) -> str:
        if field not in self.names:
            name = field or "_"
            while name.lower() in self.taken:
                name += "_"
            self.names[field] = name
            self.taken.add(name.lower())
        return self.names[field]


def as_line(found: Object, value: bytes, columns: Columns) -> bytes:
    """A record as one line of JSON, with its place and time, for DuckDB. Raises Failure."""

    def encoded(record: Any) -> bytes:
        row = {
            "record": {columns.name(field): content for field, content in record.items()},
            "kafka_partition": found.partition,
            "kafka_offset": found.offset,
            "written_at": found.written_at,
        }
        text = json.dumps(row, ensure_ascii=False, allow_nan=False)
        return text.encode(errors="replace") + b"\n"

    try:
        try:
            return encoded(json.loads(value))
        except ValueError:  # JSON has numbers that Python has not: 1e999, or of 5,000 digits
            return encoded(json.loads(value, parse_int=str, parse_float=str))
    except (ValueError, AttributeError):
        raise Failure(f"{found.key} is no JSON object: did the consumer write it?") from None


class Reader:
    """Reads objects at a third of the CPU that the client's `get_object` costs: 0.3 against 0.9 ms.

    botocore spends most of a small GET on what is the same for each of them. Its signer is all
    that is needed; what the short way does not get, the client gets, with its retries.
    """

    def __init__(self, client: Any, http: aiohttp.ClientSession, bucket: str) -> None:
        self.client, self.http, self.bucket = client, http, bucket

    async def open(self, session: AioSession) -> None:
        """Learn from the client where the bucket's objects are, and with which keys to sign."""
        name = "name"
        example = await self.client.generate_presigned_url(
            "get_object", Params={"Bucket": self.bucket, "Key": name}
        )
        self.base = example.partition("?")[0].removesuffix(name)
        self.credentials = await session.get_credentials()

    async def get(self, key: str) -> bytes:
        """An object's bytes. Raises what botocore raises."""
        request = AWSRequest("GET", self.base + quote(key, safe="/~"))
        keys = await self.credentials.get_frozen_credentials()
        S3SigV4Auth(keys, "s3", self.client.meta.region_name).add_auth(request)
        url = URL(request.url, encoded=True)
        try:
            async with self.http.get(
                url, headers=dict(request.headers), allow_redirects=False
            ) as answer:
                if answer.status == 200:
                    return await answer.read()
        except (aiohttp.ClientError, TimeoutError):
            pass
        slow = await self.client.get_object(Bucket=self.bucket, Key=key)
        async with slow["Body"] as body:
            return bytes(await body.read())


async def read_objects(
    reader: Reader, found: Sequence[Object], lines: IO[bytes], progress: Progress
) -> None:
    """Write every object as a line of JSON, in no order, with GETS_AT_ONCE requests under way."""
    waiting = iter(found)
    columns = Columns()
    done = 0

    async def work() -> None:
        nonlocal done
        for each in waiting:
            lines.write(as_line(each, await reader.get(each.key), columns))
            done += 1
            progress.show(done)

    workers = [asyncio.create_task(work()) for _ in range(GETS_AT_ONCE)]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()


async def fetch(settings: Settings, lines: IO[bytes]) -> list[Object]:
    """List the consumer's objects, and write each as a line of JSON. Raises Failure."""
    session, bucket = AioSession(), str(settings.s3_bucket)
    options = {
        "endpoint_url": settings.s3_endpoint_url,
        "config": AioConfig(
            max_pool_connections=GETS_AT_ONCE, connect_timeout=5, read_timeout=S3_PATIENCE
        ),
    }
    try:
        async with session.create_client("s3", **options) as client:
            found, region = await list_objects(client, bucket, settings.s3_prefix)
        certificates = ssl.create_default_context(cafile=session.get_config_variable("ca_bundle"))
        async with (
            session.create_client("s3", region_name=region, **options) as client,
            aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=GETS_AT_ONCE, ssl=certificates),
                timeout=aiohttp.ClientTimeout(sock_connect=5, sock_read=S3_PATIENCE),
                trust_env=True,  # proxies
            ) as http,
        ):
            reader, progress = Reader(client, http, bucket), Progress(len(found))
            await reader.open(session)
            try:
                await read_objects(reader, found, lines, progress)
            finally:
                progress.end()
    except (BotoCoreError, ClientError, aiohttp.ClientError, OSError, ValueError) as error:
        raise Failure(explain(error)) from None
    return found


# ------------------------------------------------------------------------------------ the broker


def ask_broker(settings: Settings) -> dict[str, Any]:
    """The group's lag and the dead letters by reason: {"lag", "letters", "places"}, or {"unasked"}
    with the reason why the broker could not be asked."""
    logging.getLogger("kafka").setLevel(logging.CRITICAL)  # what matters of it comes as an error
    try:
        check_kafka(settings)
        consumer = make_consumer(settings)
        try:
            reasons, places = read_letters(consumer, settings)
            return {"lag": group_lag(consumer, settings), "letters": reasons, "places": places}
        finally:
            consumer.close(autocommit=False)
    except (Failure, KafkaError, OSError, ValueError) as error:
        return {"unasked": str(error) if isinstance(error, Failure) else explain(error)}


def group_lag(consumer: Any, settings: Settings) -> int | None:
    """Records between the group's committed positions and the ends; None without a position."""
    topic = settings.kafka_topic
    tps = [TopicPartition(topic, p) for p in consumer.partitions_for_topic(topic) or ()]
    committed = {tp: consumer.committed(tp) for tp in tps}
    if None in committed.values():
        return None
    ends = consumer.end_offsets(tps)
    return sum(max(0, ends[tp] - committed[tp]) for tp in tps)


def read_letters(consumer: Any, settings: Settings) -> tuple[Counter[str], set[tuple[int, int]]]:
    """Of the topic's dead letters: the count of records by reason, and their places as (partition,
    offset). A letter that a crash repeated counts once. Raises Failure."""
    topic = settings.kafka_dlq_topic
    tps = [TopicPartition(topic, p) for p in consumer.partitions_for_topic(topic) or ()]
    reasons: Counter[str] = Counter()
    places: set[tuple[int, int]] = set()
    for letter in read_topic(consumer, tps):
        headers = dict(letter.headers)
        try:
            place = (int(headers["source.partition"]), int(headers["source.offset"]))
            ours = headers["source.topic"] == settings.kafka_topic.encode()
        except (KeyError, TypeError, ValueError):
            continue  # somebody else's letter
        if ours and place not in places:
            places.add(place)
            reason = headers.get("error.reason") or b"no reason given"
            # "not UTF-8: invalid start byte at byte 17": the place within the value is left out.
            reasons[
                re.sub(r"( at byte|: line| \(char).*", "", reason.decode(errors="replace"))
            ] += 1
    return reasons, places


def read_topic(consumer: Any, tps: list[TopicPartition]) -> Iterator[Any]:
    """Every record of the partitions up to the ends of now. Raises Failure when no more come."""
    begins, ends = consumer.beginning_offsets(tps), consumer.end_offsets(tps)
    left = [tp for tp in tps if begins[tp] < ends[tp]]
    consumer.assign(left)
    for tp in left:
        consumer.seek(tp, begins[tp])
    came_at = time.monotonic()
    while left:
        for batch in consumer.poll(timeout_ms=500).values():
            came_at = time.monotonic()
            yield from batch
        left = [tp for tp in left if consumer.position(tp) < ends[tp]]
        if time.monotonic() - came_at > BROKER_PATIENCE:
            raise Failure(f"topic {left[0].topic}: no record for {BROKER_PATIENCE:.0f} s")


# ----------------------------------------------------------------------------------- the records


def load(db: duckdb.DuckDBPyConnection, lines: str) -> None:
    """Make the table `records` of a file of lines: OURS, then the records' own fields, or, where
    these fit into no columns, the whole `record` as JSON."""
    types = dict(zip(OURS, ("BIGINT", "BIGINT", "TIMESTAMP"), strict=True))
    try:
        table = db.read_json(
            lines, format="newline_delimited", sample_size=-1, map_inference_threshold=-1
        )
    except duckdb.Error:  # an object within a record that has both "a" and "A"
        types["record"] = "JSON"
        table = db.read_json(lines, format="newline_delimited", columns=types)
    table.create("lines")
    ((kind,),) = db.sql("SELECT typeof(record) FROM lines LIMIT 1").fetchall()
    field_columns = "unnest(record)" if kind.startswith("STRUCT") else "record"
    db.execute(
        f"""CREATE TABLE records AS SELECT {", ".join(OURS)}, {field_columns} FROM lines
        ORDER BY kafka_partition, kafka_offset"""
    )
    db.execute("DROP TABLE lines")


def quoted(name: str) -> str:
    """A column's name as SQL."""
    return '"' + name.replace('"', '""') + '"'


def field_types(db: duckdb.DuckDBPyConnection) -> dict[str, str]:
    """The type of each field of the records, without OURS."""
    table = db.table("records")
    types = dict(zip(table.columns, map(str, table.types), strict=True))
    return {name: kind for name, kind in types.items() if name not in OURS}


def distinct(db: duckdb.DuckDBPyConnection, names: Sequence[str]) -> dict[str, int]:
    """How many different values each column has."""
    if not names:
        return {}
    counts = ", ".join(f"count(DISTINCT {quoted(name)})" for name in names)
    (row,) = db.sql(f"SELECT {counts} FROM records").fetchall()
    return dict(zip(names, row, strict=True))


def likely_first(names: Sequence[str], likely: Sequence[str]) -> list[str]:
    """`names` with those that are in `likely` at the front."""
    known = [name for name in names if name.lower() in likely]
    known.sort(key=lambda name: likely.index(name.lower()))
    return known + [name for name in names if name not in known]


def values_over_time(db: duckdb.DuckDBPyConnection) -> dict[str, Any]:
    """The chart of values: numbers over the records' own time, or else over the time of their
    objects, a line for each value of a column that names groups. {} when there are no numbers."""
    types = field_types(db)
    counts = distinct(db, list(types))
    rows = len(db.table("records"))
    times = [n for n, kind in types.items() if kind.startswith(("DATE", "TIMESTAMP"))]
    numbers = [n for n, kind in types.items() if kind.startswith(NUMBER_TYPES)]
    measures = likely_first([n for n in numbers if counts[n] > 1], LIKELY_MEASURES)[:MEASURES]
    texts = [n for n, kind in types.items() if kind == "VARCHAR" and 1 < counts[n] <= rows / 2]
    if not measures:
        return {}
    moment = max(times, key=counts.__getitem__, default="written_at")
    group = next(iter(likely_first([n for n in texts if counts[n] <= 200], LIKELY_GROUPS)), "")
    lines, others = series(db, moment, group, measures)
    return {
        "time": moment,
        "group": group,
        "measures": measures,
        "series": lines,
        "others": others,
    }


def series(
    db: duckdb.DuckDBPyConnection, moment: str, group: str, measures: Sequence[str]
) -> tuple[list[dict[str, Any]], int]:
    """The lines of the chart of values, the largest groups first, and how many were left out.

    A line has at most POINTS points: its time is cut into as many parts, and of each part the
    last record is shown.
    """
    name = f"{quoted(group)}::VARCHAR" if group else "'all records'"
    last = ", ".join(f"arg_max({quoted(m)}::DOUBLE, (x, kafka_offset))" for m in measures)
    found = db.sql(
        f"""WITH points AS (
            SELECT {name} AS name, epoch_ms({quoted(moment)}::TIMESTAMP) AS x, *
            FROM records WHERE isfinite({quoted(moment)}::TIMESTAMP) AND name IS NOT NULL
        ), parts AS (
            SELECT *, min(x) OVER each AS low, max(x) OVER each AS high, count(*) OVER each AS size
            FROM points WINDOW each AS (PARTITION BY name)
        )
        SELECT name, max(size), max(x), {last} FROM parts
        GROUP BY name, (x - low) * {POINTS - 1} // greatest(high - low, 1)
        ORDER BY max(size) DESC, name, max(x)"""
    ).fetchall()
    lines: dict[str, dict[str, Any]] = {}
    for text, size, x, *values in found:
        line = lines.setdefault(text, {"name": text, "size": size, "x": [], "values": []})
        line["x"].append(x)
        line["values"].append([rounded(value) for value in values])
    return list(lines.values())[:GROUPS], max(0, len(lines) - GROUPS)


def rounded(value: float | None) -> float | None:
    """A number as the chart needs it; None for what JSON cannot say."""
    return float(f"{value:.8g}") if value is not None and math.isfinite(value) else None


def throughput(db: duckdb.DuckDBPyConnection) -> dict[str, Any]:
    """Objects by time, in bins of which about BARS cover the whole range."""
    first, last = time_range(db)
    wanted = (last - first) / BARS
    seconds = next((step for step in SECONDS if step >= wanted), 0)
    if not seconds:
        seconds = DAY * max(1, round(wanted / DAY))
    bins = db.sql(
        f"""SELECT epoch(written_at)::BIGINT // {seconds} * {seconds} AS start, count(*)
        FROM records GROUP BY start ORDER BY start"""
    ).fetchall()
    return {"seconds": seconds, "bins": bins}


def time_range(db: duckdb.DuckDBPyConnection) -> tuple[int, int]:
    """When the first and the last object were written, in seconds since 1970."""
    ends = "SELECT epoch(min(written_at)), epoch(max(written_at)) FROM records"
    ((first, last),) = db.sql(ends).fetchall()
    return int(first), int(last)


def partitions(
    db: duckdb.DuckDBPyConnection, letters: set[tuple[int, int]]
) -> list[dict[str, Any]]:
    """Each partition's range of offsets, and the gaps in it, as {"partition", "first", "last",
    "objects", "missing", "letters", "gaps": [[first, last], ...]}."""
    ranges = db.sql(
        """SELECT kafka_partition, min(kafka_offset), max(kafka_offset), count(*)
        FROM records GROUP BY kafka_partition ORDER BY kafka_partition"""
    ).fetchall()
    gaps: dict[int, list[list[int]]] = {partition: [] for partition, *_ in ranges}
    for partition, first, last in db.sql(
        """SELECT kafka_partition, kafka_offset + 1 AS first, next - 1 AS last FROM (
            SELECT *, lead(kafka_offset) OVER (
                PARTITION BY kafka_partition ORDER BY kafka_offset) AS next FROM records)
        WHERE last >= first ORDER BY kafka_partition, first"""
    ).fetchall():
        gaps[partition].append([first, last])
    found = []
    for partition, first, last, objects in ranges:
        inside = [place for place in letters if place[0] == partition]
        found.append(
            {
                "partition": partition,
                "first": first,
                "last": last,
                "objects": objects,
                "missing": sum(b - a + 1 for a, b in gaps[partition]),
                "letters": sum(first < offset < last for _, offset in inside),
                "gapCount": len(gaps[partition]),
                "gaps": gaps[partition][:LISTED_GAPS],
            }
        )
    return found


def fields(db: duckdb.DuckDBPyConnection) -> list[dict[str, Any]]:
    """What the records hold: name, type, share that is not null, different values, range."""
    found = []
    rows = len(db.table("records"))
    for name, kind in list(field_types(db).items())[:FIELDS]:
        column = quoted(name)
        simple = not kind.startswith(("STRUCT", "JSON", "MAP")) and not kind.endswith("]")
        ends = f"min({column})::VARCHAR, max({column})::VARCHAR" if simple else "NULL, NULL"
        query = f"SELECT count({column}), count(DISTINCT {column}), {ends} FROM records"
        ((filled, different, low, high),) = db.sql(query).fetchall()
        found.append(
            {
                "name": name,
                "type": kind if len(kind) <= 40 else f"{kind[:37]}...",
                "filled": filled / rows,
                "distinct": different,
                "low": shortened(low),
                "high": shortened(high),
            }
        )
    return found


def shortened(text: str | None) -> str | None:
    """A value's text, of bearable length."""
    return text if text is None or len(text) <= 120 else f"{text[:119]}…"


def last_records(db: duckdb.DuckDBPyConnection) -> dict[str, Any]:
    """The records whose objects came last, the newest first."""
    names = [*OURS, *list(field_types(db))[:FIELDS]]
    texts = ", ".join(f"{quoted(name)}::VARCHAR" for name in names)
    rows = db.sql(
        f"""SELECT {texts} FROM records
        ORDER BY written_at DESC, kafka_offset DESC, kafka_partition LIMIT {LAST_RECORDS}"""
    ).fetchall()
    types = field_types(db)
    return {
        "columns": names,
        "numbers": [types.get(name, "").startswith(NUMBER_TYPES) for name in names],
        "rows": [[shortened(text) for text in row] for row in rows],
    }


# ----------------------------------------------------------------------------------------- start


def facts(
    db: duckdb.DuckDBPyConnection, settings: Settings, found: Sequence[Object]
) -> dict[str, Any]:
    """All that the page shows, as report.html takes it."""
    broker = ask_broker(settings)
    first, last = time_range(db)
    return {
        "where": f"s3://{settings.s3_bucket}/{settings.s3_prefix}",
        "topic": settings.kafka_topic,
        "dlq": settings.kafka_dlq_topic,
        "group": settings.kafka_group_id,
        "made": int(datetime.now(UTC).timestamp()),
        "objects": len(found),
        "bytes": sum(each.bytes for each in found),
        "first": first,
        "last": last,
        "broker": {
            "unasked": broker.get("unasked"),
            "lag": broker.get("lag"),
            "letters": broker["letters"].most_common() if "letters" in broker else None,
        },
        "throughput": throughput(db),
        "values": values_over_time(db),
        "partitions": partitions(db, broker.get("places", set())),
        "fields": fields(db),
        "fieldCount": len(field_types(db)),
        "latest": last_records(db),
    }


def page(shown: dict[str, Any]) -> str:
    """The page, with what it shows inside. No text of a record can end the script it stands in."""
    text = json.dumps(shown, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    text = text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return (HERE / "report.html").read_text(encoding="utf-8").replace("{{FACTS}}", text)


def needs_bucket(values: Mapping[str, Any]) -> str:
    if values.get("s3_bucket", True):
        return ""
    return "S3_BUCKET is not set: name the bucket, in .env or the environment"


@contextmanager
def about(what: object) -> Iterator[None]:
    """What goes wrong inside is a Failure in one line that says with what."""
    try:
        yield
    except (Failure, OSError, duckdb.Error) as error:
        raise Failure(f"{what}: {str(error).partition(chr(10))[0]}") from None


def read_bucket(settings: Settings, db: duckdb.DuckDBPyConnection) -> list[Object]:
    """Read every object into the table `records`. Raises Failure, OSError and duckdb's errors."""
    with tempfile.NamedTemporaryFile() as lines:
        found = asyncio.run(fetch(settings, lines))
        if not found:
            raise Failure(
                "no object of a record (stock_market_0.json) is there: has the consumer run, and is"
                " S3_PREFIX right?"
            )
        lines.flush()
        load(db, lines.name)
    return found


def write_report(settings: Settings, folder: Path) -> int:
    """Read the bucket and write both files; returns the exit code. Raises Failure. A report that
    cannot be written leaves that of an earlier run as it was."""
    db = duckdb.connect()
    with about(folder):  # before all is read
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    with about(f"s3://{settings.s3_bucket}/{settings.s3_prefix}"):
        found = read_bucket(settings, db)
        text = page(facts(db, settings, found))
    with about(folder), tempfile.TemporaryDirectory(dir=folder) as unfinished:
        parquet, html = Path(unfinished, "records.parquet"), Path(unfinished, "report.html")
        db.table("records").write_parquet(str(parquet))
        rows = len(duckdb.read_parquet(str(parquet)))
        html.write_text(text, encoding="utf-8", errors="replace")
        parquet, html = parquet.replace(folder / parquet.name), html.replace(folder / html.name)
    print(f"{len(found)} objects, {rows} rows in {parquet}, charts in {html}")
    return 0 if rows == len(found) else 1


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path())
    folder = parser.parse_args(argv).folder
    try:
        settings = Settings.load({}, needs_bucket)
    except SettingsError as error:
        print(*error.args, sep="\n", file=sys.stderr)
        return 2
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return write_report(settings, folder)
    except Failure as error:
        print(error, file=sys.stderr)
    except KeyboardInterrupt:
        print("stopped before the report was made", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
