"""Sends random rows of a CSV file to a Kafka topic, one JSON object a message.

    python kafka_producer.py [--rate N] [--max-messages N] [--seed N]

Every message the broker did not acknowledge is either sent again, in order, or named at the end.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":  # Ctrl-C while the imports run, a second or two: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import gc
import json
import logging
import math
import random
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from kafka import KafkaProducer
from kafka.errors import KafkaError, KafkaTimeoutError

import config
from config import (
    Failure,
    Settings,
    SettingsError,
    Stop,
    check_kafka,
    environment,
    make_producer,
    output,
    positive,
    setup_logging,
    status,
)

log = logging.getLogger(__name__)

EACH = 100  # msg/s up to which every record is waited for and printed
UNACKNOWLEDGED = 5_000  # sends under way at most: what is in memory when the broker is down

Row = tuple[bytes | None, bytes]  # key, value

WHOLE = r"[+-]?[0-9]{1,4000}"  # of more digits Python makes no int
NUMBER = r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?"


def read_rows(path: Path, key_column: str = "") -> list[Row]:
    """The rows of a CSV file as (key, value): one JSON object each, UTF-8, in the CSV's column
    order. Missing is null, a number is the same number, rows with no value at all are dropped.

    Raises SettingsError for a file that is no such CSV, or has no column `key_column`.
    """
    where = f"CSV_PATH={str(path)!r}"
    try:
        # numpy_nullable: a whole number stays one in a column with gaps. low_memory would choose
        # a column's type for each part of the file.
        frame = pd.read_csv(
            path, float_precision="round_trip", dtype_backend="numpy_nullable", low_memory=False
        )
        if not isinstance(frame.index, pd.RangeIndex):  # pandas made an index of the first column
            raise ValueError("its rows have more fields than its header")
        for at, name in enumerate(frame.columns):
            if _doubtful(frame[name]):
                texts = pd.read_csv(path, usecols=[at], dtype="string").iloc[:, 0]
                for number, pattern in ((int, WHOLE), (float, NUMBER)):
                    if texts.dropna().str.fullmatch(pattern).all():
                        exact = [None if pd.isna(text) else number(text) for text in texts]
                        frame[name] = pd.Series(exact, dtype=object)
                        break
    except (OSError, ValueError) as error:  # pandas' and Unicode's errors are ValueErrors
        raise SettingsError(f"{where} cannot be read as CSV: {str(error).strip()}") from None
    if key_column and key_column not in frame.columns:
        there = ", ".join(map(repr, frame.columns))
        raise SettingsError(f"KAFKA_KEY_COLUMN={key_column!r}: {where} has only {there}")
    total = len(frame)
    frame = frame.dropna(how="all")
    if dropped := total - len(frame):
        log.warning("%d of %d rows have no value at all and are left out", dropped, total)
    if frame.empty:
        raise SettingsError(f"{where} has no rows")
    rows: list[Row] = []
    encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
    names = [str(name) for name in frame.columns]
    for start in range(0, len(frame), 10_000):  # as Python objects, the whole would take 100 MB
        part = frame.iloc[start : start + 10_000].astype(object)
        for values in part.where(part.notna(), None).itertuples(index=False, name=None):
            row = dict(zip(names, values, strict=True))
            try:
                text = encode(row)
            except ValueError:
                infinite = next(n for n, v in row.items() if v in (math.inf, -math.inf))
                raise SettingsError(
                    f"{where}: column {infinite!r} holds {row[infinite]}, which JSON cannot say"
                ) from None
            key = row.get(key_column)
            rows.append((None if key is None else str(key).encode(), text.encode()))
    return rows


def _doubtful(column: pd.Series) -> bool:
    """Whether pandas may have lost numbers: beyond 64 bits it leaves them as text, with "" where
    one is missing; the least of int64 and the greatest of uint64 it takes for missing."""
    if column.dtype == "string":
        return bool(column.str.fullmatch(WHOLE).any())
    return column.dtype.kind in "iu" and bool(column.isna().any())


def sample(rows: Sequence[Row], seed: int | None) -> Iterator[Row]:
    """Rows at random with replacement, without end; the same ones again for the same seed."""
    rng = random.Random(seed)
    count = len(rows)
    while True:
        yield rows[int(rng.random() * count)]


@dataclass
class Sender:
    """Sends at a pace and looks at every future, oldest first."""

    producer: KafkaProducer
    topic: str
    rate: float
    clock: Callable[[], float] = time.monotonic
    waiting_for: deque[tuple[Any, Row]] = field(default_factory=deque)
    begun: int = 0  # records handed to the client
    sent: int = 0  # records acknowledged
    failed: int = 0
    last_success: float = 0.0
    said: float = -math.inf

    def __post_init__(self) -> None:
        self.started = self.answered = self.clock()

    @property
    def waiting(self) -> int:
        return len(self.waiting_for)

    @property
    def each(self) -> bool:
        return 0 < self.rate <= EACH

    def due(self) -> float:
        """Seconds until the next record's time. The times are counted from the start, so that
        no delay adds up: 1 msg/s is 3,600 in an hour."""
        return self.started + self.begun / self.rate - self.clock() if self.rate else 0.0

    def send(self, row: Row) -> bool:
        """Hand one record to the client; False when it has no room now (the broker is down)."""
        try:
            future = self.producer.send(self.topic, key=row[0], value=row[1])
        except KafkaTimeoutError:
            self.silent()
            return False
        except KafkaError as error:
            self.refused(error, row)
        self.waiting_for.append((future, row))
        self.begun += 1
        return True

    def look(self, timeout: float) -> None:
        """Wait for the oldest record's acknowledgement, `timeout` seconds at most, and take the
        ones behind it that are there too. Raises Failure for a record that the broker refused."""
        first = True
        while self.waiting_for:
            future, row = self.waiting_for[0]
            if not future.is_done and not first:
                break
            try:
                answer = future.get(timeout=timeout)
            except KafkaTimeoutError:
                if future.failed():  # not is_done: it may have come while we gave up waiting
                    self.refused(future.exception, row)
                self.silent()
                return
            except KafkaError as error:
                self.refused(error, row)
            self.waiting_for.popleft()
            self.sent += 1
            first = False
            if self.each:
                where = (answer.topic, answer.partition, answer.offset)
                about = {"topic": where[0], "partition": where[1], "offset": where[2]}
                if row[0] is not None:
                    about["key"] = row[0].decode()
                output.info("[Sent] Topic: %s | Partition: %d | Offset: %d", *where, extra=about)
                output.info("   Content: %s", row[1].decode(), extra=about)
        if self.said > -math.inf:
            log.warning("the broker answers again after %.1f s", self.clock() - self.answered)
            self.said = -math.inf
        self.answered = self.clock()
        self.last_success = time.time()

    def silent(self) -> None:
        """Say, after 2 s and then every 30 s, that the broker does not answer."""
        if self.rate:  # nothing was owed before the oldest one's time
            self.answered = max(self.answered, self.started + self.sent / self.rate)
        quiet = self.clock() - self.answered
        if quiet >= 2 and self.clock() - self.said >= 30:
            self.said = self.clock()
            log.warning(
                "no answer from the broker for %.0f s: %d records wait, in order; none is dropped",
                quiet,
                self.waiting,
            )

    def unsaid(self) -> str:
        """What the end leaves open, as the end of a sentence."""
        if not self.waiting:
            return ""
        return f"; {self.waiting} more may or may not be in the topic: the broker did not say"

    def refused(self, error: Exception, row: Row) -> None:
        self.failed += 1
        raise Failure(
            f"the broker refused a record for topic {self.topic}: {type(error).__name__}: {error};"
            f" the record ({len(row[1])} bytes): {row[1][:200].decode(errors='replace')}"
        ) from None


def step(sender: Sender, row: Row, sleep: Callable[[float], None] = time.sleep) -> bool:
    """Send `row` when its time has come and return True; else wait, half a second at most."""
    wait = sender.due()
    if wait > 0:
        if sender.waiting_for:
            sender.look(min(wait, 0.5))
        else:
            sleep(min(wait, 0.5))
        return False
    if sender.waiting_for and (sender.each or sender.waiting >= UNACKNOWLEDGED):
        sender.look(0.5)
        return False
    return sender.send(row)


def run(sender: Sender, rows: Iterator[Row], limit: float, stop: Stop) -> None:
    """Send `limit` rows, or until `stop`; then wait for what is under way (3 s after a stop).

    Raises Failure for a record that the broker refused.
    """
    row = next(rows)
    shown, sent = sender.started, 0
    while not stop.requested and (sender.begun < limit or sender.waiting_for):
        if sender.begun >= limit:
            sender.look(0.5)
        elif step(sender, row):
            row = next(rows)
        now = sender.clock()
        if now - shown >= 1 and (not sender.each or sys.stderr.isatty()):
            speed = (sender.sent - sent) / (now - shown)
            status(log, "sent %d | %.1f/s | unacknowledged %d", sender.sent, speed, sender.waiting)
            shown, sent = now, sender.sent
    deadline = sender.clock() + 3
    while sender.waiting_for and sender.clock() < deadline:
        sender.look(0.5)


def needs_csv(values: Any) -> str:
    path = values.get("csv_path", config.HERE)
    return "" if path.exists() else f"CSV_PATH={str(path)!r}: there is no such file"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="CSV rows to a Kafka topic. Settings: README.md.")
    parser.add_argument("--rate", help="messages a second, 0: no limit (MESSAGES_PER_SECOND)")
    parser.add_argument("--max-messages", type=positive, default=math.inf, help="stop after these")
    parser.add_argument("--seed", help="repeat the same sequence of rows (RANDOM_SEED)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        flags = {"MESSAGES_PER_SECOND": args.rate, "RANDOM_SEED": args.seed}
        settings = Settings.from_env(environment(flags), needs_csv)
        setup_logging(settings)
        stop = Stop()
        rows = read_rows(settings.csv_path, settings.kafka_key_column)
        # Walking over rows that stay and futures that soon go is a fifth of the time.
        gc.freeze()
        gc.set_threshold(50_000)
        check_kafka(settings)
        rate = settings.messages_per_second
        linger = 0 if 0 < rate <= EACH else 5
        producer = make_producer(settings, linger_ms=linger, batch_size=2**17)
        sender = Sender(producer, settings.kafka_topic, rate)
        stop.under_way = lambda: (
            f"{sender.waiting} records unacknowledged" if sender.waiting else ""
        )
        if settings.metrics_port is not None:
            from infra.monitoring import exporter

            exporter.serve_producer(settings, sender)
        try:
            run(sender, sample(rows, settings.random_seed), args.max_messages, stop)
        finally:
            status(log, "sent %d", sender.sent)
            if sender.waiting:
                log.warning("%s", sender.unsaid().lstrip("; "))
            with suppress(KafkaTimeoutError):  # said above
                producer.close(timeout=0.5)
    except SettingsError as error:
        print(*error.args, sep="\n", file=sys.stderr)
        return 2
    except Failure as error:
        log.error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
