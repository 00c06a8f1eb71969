"""Sends random rows of a CSV file, or lines of JSON from a pipe, to a Kafka topic.

    python kafka_producer.py [--rate N] [--max-messages N] [--seed N | --stdin]

One JSON object a message. Every record that the broker did not acknowledge is either sent again,
in order, or counted at the end (promise 1).
"""

from __future__ import annotations

import signal

if __name__ == "__main__":  # Ctrl-C while the imports run, a second or two: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import csv
import json
import logging
import math
import os
import queue
import random
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import config  # before the packages: it says in one line which of them is missing
from config import Failure, Settings, SettingsError, Stop, output, status

# isort: split
import pandas as pd
from kafka import KafkaProducer
from kafka.errors import KafkaTimeoutError
from pandas.io.common import get_handle  # type: ignore[import-not-found]

log = logging.getLogger(__name__)

Row = tuple[bytes | None, bytes]  # key, value

# ------------------------------------------------------------------------------ rows of a CSV file

CHUNK = 20_000  # rows that are Python objects at one time
PROGRESS = 500_000  # rows, about a second's, after which a long reading shows how far it is

# What pandas reads as missing, and the lone dashes of exchanges' files.
_MISSING = (
    r"#N/A|#N/A N/A|#NA|-1\.#IND|-1\.#QNAN|-NaN|-nan|1\.#IND|1\.#QNAN|<NA>|N/A|NA|NULL|NaN|None|n/a"
    r"|nan|null|-|--"
)
MISSING = frozenset(("", *_MISSING.replace("\\", "").split("|")))

# A number as JSON has it; as people write it, with a plus sign or no digit on one side of the
# point; a cell of a column of numbers. Possessive (++), for a whole column is matched as one text.
_JSON_NUMBER = r"-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?+(?:[eE][+-]?[0-9]++)?+"
_NUMBER = r"[+-]?(?:(?:0|[1-9][0-9]*+)(?:\.[0-9]*+)?+|\.[0-9]++)(?:[eE][+-]?[0-9]++)?+"
_CELL = rf"\s*+(?:(?:{_NUMBER}|{_MISSING})\s*+)?(?=\0)"

# The kinds of a column, and what the cells of the first two look like, a NUL behind each.
JSON_NUMBERS, NUMBERS, TEXT = range(3)
_CELLS = [re.compile(rf"(?>{cell}\0)*+") for cell in (_JSON_NUMBER, _CELL)]

# How the first two records look of a file that is no CSV, and what it is.
_NO_CSV = (
    (r"\s*<(!doctype|html|head|body|\?xml)", "is a web page: download the file itself"),
    (r"version https://git-lfs", "is a pointer of Git LFS: fetch the file with git lfs pull"),
    (r'\s*(\{\s*"|\[\s*[\[{])', "is JSON: --stdin sends lines of JSON objects"),
    (r"[^,\n]*;[^,\n]*\n.*;", "is separated by semicolons: save it with commas"),
    (r"[^,\n]*\t[^,\n]*\n.*\t", "is separated by tabs: save it with commas"),
    (r"[^,\n]*\|[^,\n]*\n.*\|", "is separated by '|': save it with commas"),
)


class CsvFile:
    """A CSV file as people have them; every cell is text.

    Raises SettingsError for a file that is no such CSV: one line that says what it is, in which
    line of the file, and what to do. What is only odd is gathered in `oddities`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = f"CSV_PATH={str(path)!r}"
        self.format: dict[str, Any] = {"encoding": "utf-8-sig", "compression": "infer"}
        self.short: list[int] = []  # the lines of rows with fewer fields than the header
        if not path.is_file():
            raise self.wrong("is no file (a folder, or a pipe)")
        try:
            # get_handle is how read_csv itself opens a file of any compression.
            with get_handle(path, "rb", is_text=False, compression="infer") as opened:
                if opened.handle.read(2) in (b"\xff\xfe", b"\xfe\xff"):
                    self.format["encoding"] = "utf-16"
            self.check_records()
        except SettingsError:
            raise
        except Exception as error:  # each decompressor has errors of its own
            with suppress(OSError), path.open("rb") as file:
                self.check_kind(file.read(1000).decode("latin-1"))
            hint = "if it is an archive, it may be damaged or cut short: fetch it again"
            why = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            raise self.wrong(f"cannot be read: {' '.join(why.split())}; {hint}") from None

    def wrong(self, what: str) -> SettingsError:
        return SettingsError(f"{self.name} {what}")

    def check_kind(self, start: str) -> None:
        for pattern, what in _NO_CSV:
            if re.match(pattern, start, re.IGNORECASE):
                raise self.wrong(what)

    def check_records(self) -> None:
        """Find what pandas passes over in silence: it cuts a cell off at a NUL, and at the
        header's width a row that begins a chunk; it fills a short row up."""
        width, start = 0, ""
        for self.last_line, record in self.records():  # noqa: B020
            text = ",".join(record)
            if "\0" in text or not text.isascii():
                self.check_text(text)
            if start.count("\n") < 2:
                start += text.replace("\n", " ") + "\n"
                self.check_kind(start)
            width = width or len(record)
            if len(record) > width:
                fields = f"line {self.last_line} has {len(record)}, the header {width}"
                raise self.wrong(f"has rows with more fields than the header: {fields}")
            if len(record) < width:
                self.short.append(self.last_line)
        if not width:
            raise self.wrong("is empty")

    def check_text(self, text: str) -> None:
        """Refuse a record with a NUL, or with a byte that surrogateescape had to keep."""
        if bad := re.search("[\0\udc80-\udcff]", text):
            line = self.last_line + len(re.findall("\r\n?|\n", text[: bad.start()]))
            if bad[0] == "\0":
                raise self.wrong(f"has a NUL byte in line {line}: it is damaged, or no text")
            byte = f"0x{ord(bad[0]) - 0xDC00:02x}"
            raise self.wrong(f"is not UTF-8: line {line} has the byte {byte}; save it as UTF-8")

    def records(self) -> Iterator[tuple[int, list[str]]]:
        """Each record, the header first, with the line of the file on which it begins. Blank
        lines are none, as in pandas."""
        csv.field_size_limit(2**31 - 1)
        line = 1
        with get_handle(self.path, "r", errors="surrogateescape", **self.format) as opened:
            reader = csv.reader(opened.handle)
            for number, record in enumerate(reader, 1):
                if len(record) > 1 or "".join(record).strip(" \t"):
                    yield line, record
                line = reader.line_num + 1
                if number % PROGRESS == 0:
                    status(log, "checking %s: %d lines", self.path.name, line)

    def line(self, row: int) -> int:
        """The line of the file on which a row begins; the first row is 0, the header -1."""
        return next(islice(self.records(), row + 1, None))[0]

    def chunks(self) -> Iterator[pd.DataFrame]:
        """The rows as text, CHUNK at a time, as columns with the names that pandas gives."""
        options: dict[str, Any] = {"dtype": object, "na_filter": False, "index_col": False}
        rows = 0
        try:
            for chunk in pd.read_csv(self.path, chunksize=CHUNK, **self.format, **options):
                yield chunk
                rows += len(chunk)
                if rows and rows % PROGRESS == 0:
                    status(log, "reading %s: %d rows", self.path.name, rows)
        except pd.errors.ParserError:
            raise self.wrong(f"has a quote in line {self.last_line} that nothing closes") from None


_quote = json.JSONEncoder(ensure_ascii=False).encode


class Column:
    """What is known of a column after its cells up to now; its kind is decided over the file."""

    kind = JSON_NUMBERS
    numbers = 0
    others = 0  # cells that are neither a number nor missing
    first_other = (0, "")  # its row and its text

    def learn(self, cells: list[str], row: int) -> None:
        """Take more cells into account; the first of them is in row `row`."""
        text = "\0".join([*cells, ""])
        while self.kind < TEXT and not _CELLS[self.kind].fullmatch(text):
            self.kind += 1
        others = []
        if self.kind == TEXT:
            good = {cell for cell in set(cells) if _CELLS[NUMBERS].fullmatch(f"{cell}\0")}
            others = [at for at, cell in enumerate(cells) if cell not in good]
        if others and not self.others:
            self.first_other = (row + others[0], cells[others[0]])
        self.others += len(others)
        self.numbers += len(cells) - len(others) - sum(map(MISSING.__contains__, cells))


def number_json(cell: str) -> str:
    """A cell of a column of numbers: its own digits, in the form that JSON wants."""
    text = cell.strip()
    if text in MISSING:
        return "null"
    if re.fullmatch(_JSON_NUMBER, text):
        return text
    text = re.sub(r"^(-?)\.", r"\g<1>0.", text.removeprefix("+"))
    return re.sub(r"\.(?![0-9])", "", text)


def text_json(cell: str) -> str:
    """A cell of a column of text, as it is written."""
    return _quote(cell) if cell else "null"


_FORMS = {NUMBERS: number_json, TEXT: text_json}


def row_maker(columns: Mapping[str, Column], key_column: str) -> Callable[[str], Row | None]:
    """A function from a row's cells, with NULs between, to its key and value; None for a row
    without any value."""
    forms = [(at, _FORMS[column.kind]) for at, column in enumerate(columns.values()) if column.kind]
    names = [_quote(name).replace("%", "%%") for name in columns]
    template = "{" + ", ".join(f"{name}: %s" for name in names) + "}"
    no_value = ["null"] * len(names)
    key_at = list(columns).index(key_column) if key_column else None

    def make(line: str) -> Row | None:
        cells = line.split("\0")
        key = None if key_at is None else cells[key_at].encode()
        for at, form in forms:
            cells[at] = form(cells[at])
        if cells == no_value:
            return None
        if key_at is not None and cells[key_at] == "null":
            key = None
        return key, (template % tuple(cells)).encode()

    return make


def read_rows(path: Path, key_column: str = "") -> list[Row]:
    """The rows of a CSV file as (key, value): one JSON object each, UTF-8, in the CSV's column
    order. A number has the digits of the CSV, missing is null, rows with no value are left out.

    Raises SettingsError for a file that is no such CSV, or has no column `key_column`.
    """
    file = CsvFile(path)
    columns: dict[str, Column] = {}
    lines: list[Any] = []
    for chunk in file.chunks():
        columns = columns or {str(name): Column() for name in chunk}
        cells = [chunk[name].tolist() for name in columns]
        for column, some in zip(columns.values(), cells, strict=True):
            column.learn(some, len(lines))
        lines.extend(map("\0".join, zip(*cells, strict=True)))
    if key_column and key_column not in columns:
        there = ", ".join(map(repr, columns))
        raise SettingsError(f"KAFKA_KEY_COLUMN={key_column!r}: {file.name} has only {there}")
    warn_of_oddities(file, columns)
    make = row_maker(columns, key_column)
    for at, line in enumerate(lines):  # in place, or the file would be in memory twice
        lines[at] = make(line)
    rows: list[Row] = list(filter(None, lines))
    if not rows:
        raise file.wrong("has no rows with a value in them")
    if dropped := len(lines) - len(rows):
        log.warning("%d of %d rows have no value at all and are left out", dropped, len(lines))
    return rows


def warn_of_oddities(file: CsvFile, columns: Mapping[str, Column]) -> None:
    """Say what is no error and perhaps not meant: a line a kind, with the count and the first."""
    line, header = next(file.records())
    names = zip(header, columns, strict=True)
    if renamed := [f"{old!r} is {new!r}" for old, new in names if old != new]:
        what = "%s, line %d: %d columns have no name, or one that is taken: %s"
        log.warning(what, file.name, line, len(renamed), ", ".join(renamed[:5]))
    if file.short:
        what = "%s: %d rows have fewer fields than the header, the first in line %d"
        log.warning(what, file.name, len(file.short), file.short[0])
    texts = {name: column for name, column in columns.items() if column.kind == TEXT}
    mixed = [name for name, column in texts.items() if column.numbers > column.others]
    told = []
    for name in mixed[:5]:
        row, text = columns[name].first_other
        others = f"{columns[name].others} cells of {name!r} are none"
        told.append(f"{others}, the first {text[:99]!r} in line {file.line(row)}")
    if told:
        what = "%s: %d columns of text have numbers in most cells: %s"
        log.warning(what, file.name, len(mixed), "; ".join(told))


def sample(rows: Sequence[Row], seed: int | None) -> Iterator[Row]:
    """Rows at random with replacement, without end; the same ones again for the same seed."""
    rng = random.Random(seed)
    count = len(rows)
    while True:
        yield rows[int(rng.random() * count)]


# ---------------------------------------------------------------------- lines of JSON from a pipe

MAX_LINE = 2**25  # bytes; the client takes no larger record


def _no_json(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


class BadLine(Failure):
    """A line of the input that is no record; what was before it is sent all the same."""


# Numbers stay text: a key has the digits of the line, and none has too many.
_JSON = json.JSONDecoder(parse_constant=_no_json, parse_int=str, parse_float=str)


def read_lines(lines: queue.Queue[bytes | OSError]) -> None:
    """Put each line of standard input into `lines`, then an empty one or why there are no more."""
    try:
        with open(0, "rb", closefd=False) as stream:
            for line in iter(lambda: stream.readline(MAX_LINE), b""):
                lines.put(line)
        lines.put(b"")
    except OSError as error:
        lines.put(error)


def json_lines(key_field: str) -> Iterator[Row | None]:
    """The lines of standard input as (key, value), without their line ends; None while there is
    none. A thread reads at most 16 lines ahead. Blank lines are left out.

    Raises BadLine for a line that is no JSON object.
    """
    lines: queue.Queue[bytes | OSError] = queue.Queue(16)
    threading.Thread(target=read_lines, args=[lines], daemon=True).start()
    number = 0
    while True:
        try:
            line = lines.get(timeout=0.05)
        except queue.Empty:
            yield None
            continue
        if isinstance(line, OSError):
            raise BadLine(f"--stdin: the input cannot be read: {line.strerror}")
        if not line:
            return
        number += 1
        value = line.removesuffix(b"\n").removesuffix(b"\r")
        if not value.strip():
            continue
        try:
            key = key_of(value, key_field)
        except (ValueError, RecursionError) as error:
            why = getattr(error, "msg", error)  # JSON's own error counts lines too
            start = value[:200].decode(errors="backslashreplace")
            raise BadLine(f"--stdin: line {number} is no JSON object: {why}: {start}") from None
        yield key, value


def key_of(value: bytes, field: str) -> bytes | None:
    """The field of a JSON object as a message's key. Raises ValueError for what is no object."""
    record = _JSON.decode(value.decode())
    if not isinstance(record, dict):
        raise ValueError(f"it is a {type(record).__name__}")
    key = record.get(field) if field else None
    if isinstance(key, dict | list):
        raise ValueError(f"its field {field!r} is the key, and neither text nor a number")
    if key is None:
        return None
    return (key if isinstance(key, str) else json.dumps(key)).encode()


# ------------------------------------------------------------------------------------- the sending

PRINTED_RATE = 100  # msg/s up to which every record is waited for and printed
MAX_UNACKNOWLEDGED = 5_000  # records under way at most: what is in memory when the broker is down


class Sender:
    """The line of records under way, as (record, future), oldest first. What is before the front
    is sent: the broker acknowledged it and all before it."""

    def __init__(
        self,
        producer: KafkaProducer,
        topic: str,
        rate: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.producer, self.topic, self.rate, self.clock = producer, topic, rate, clock
        self.line: deque[tuple[Row, Any]] = deque()
        self.submitted = self.sent = self.failed = 0
        self.last_success = 0.0
        self.printing = 0 < rate <= PRINTED_RATE
        self.started = clock()
        self.reported, self.sent_then = self.started, 0
        self.notices, self.answered_at = config.Notices(clock), self.started

    @property
    def unacknowledged(self) -> int:
        return len(self.line)

    def due(self) -> float:
        """Seconds until the next record's time. The times are counted from the start, so that
        no delay adds up: 1 msg/s is 3,600 in an hour."""
        return self.started + self.submitted / self.rate - self.clock() if self.rate else 0.0

    def submit(self, row: Row) -> bool:
        """Hand a record to the client; False when it has no room now (the broker is down)."""
        try:
            future = self.producer.send(self.topic, key=row[0], value=row[1])
        except KafkaTimeoutError:
            self.say_silence()
            return False
        except Exception as error:
            raise self.refusal(error, row) from None
        self.line.append((row, future))
        self.submitted += 1
        return True

    def settle(self, timeout: float) -> None:
        """Take what is acknowledged from the front of the line, and wait for the first of it,
        `timeout` seconds at most. Raises Failure for a record that the broker refused."""
        sent_before = self.sent
        while self.line and (timeout or self.line[0][1].is_done):
            row, future = self.line[0]
            try:
                answer = future.get(timeout=timeout)
            except Exception as error:
                if isinstance(error, KafkaTimeoutError) and not future.failed():
                    self.say_silence()
                    return
                raise self.refusal(error, row) from None
            timeout = 0
            self.line.popleft()
            self.sent += 1
            if self.printing:
                print_record(row, answer)
        if self.sent > sent_before:
            self.last_success = time.time()
        if self.sent > sent_before or not self.line:  # with nothing under way none is owed
            self.notices.report({})
            self.answered_at = self.clock()

    def say_silence(self) -> None:
        # Nothing was owed before the oldest one's time.
        oldest = self.started + self.sent / self.rate if self.rate else self.started
        self.answered_at = max(self.answered_at, oldest)
        seconds = self.clock() - self.answered_at
        if seconds >= 2:
            text = (
                f"no answer from the broker for {seconds:.0f} s: {len(self.line)} records wait, in"
                f" order; none is dropped{config.last_words}"
            )
            problem = config.Problem(text, since=self.answered_at)
            self.notices.report({"the broker answers": problem})

    def report(self, limit: float) -> None:
        """The status line, each second above PRINTED_RATE or on a terminal."""
        seconds = self.clock() - self.reported
        if seconds < 1 or (self.printing and not sys.stderr.isatty()):
            return
        if self.line:
            self.settle(0)
        speed = (self.sent - self.sent_then) / seconds
        self.reported, self.sent_then = self.clock(), self.sent
        progress = f"sent {self.sent}"
        if limit < math.inf:
            left = f"{(limit - self.sent) / speed:.0f}" if speed else "?"
            progress = f"sent {self.sent} of {limit}, {left} s left"
        status(log, "%s | %.1f/s | unacknowledged %d", progress, speed, len(self.line))

    def refusal(self, error: Exception, row: Row) -> Failure:
        self.failed += 1
        start = row[1][:200].decode(errors="replace")
        return Failure(
            f"the broker refused a record for topic {self.topic}: {type(error).__name__}: {error};"
            f" the record ({len(row[1])} bytes): {start}"
        )

    def farewell(self) -> str:
        """What the end leaves open, as the end of a sentence."""
        if not self.line:
            return ""
        return f"; {len(self.line)} more may or may not be in the topic: the broker did not say"


def print_record(row: Row, answer: Any) -> None:
    where = {"topic": answer.topic, "partition": answer.partition, "offset": answer.offset}
    about = where if row[0] is None else where | {"key": row[0].decode()}
    form = "[Sent] Topic: %s | Partition: %d | Offset: %d"
    output.info(form, *where.values(), extra=about)
    output.info("   Content: %s", row[1].decode(), extra=about)


def step(sender: Sender, row: Row | None, sleep: Callable[[float], None] = time.sleep) -> bool:
    """Send `row` when its time has come and return True; else wait, half a second at most.
    None is a row that is not there yet: the times of those behind it move."""
    wait = sender.due()
    if row is None:
        sender.started -= min(wait, 0)
        sender.settle(0.05)
        return True
    if wait > 0 and not sender.line:
        sleep(min(wait, 0.5))
        return False
    if wait > 0 or (sender.line and sender.printing) or len(sender.line) >= MAX_UNACKNOWLEDGED:
        sender.settle(min(wait, 0.5) if wait > 0 else 0.5)
        return False
    return sender.submit(row)


def send_all(sender: Sender, rows: Iterator[Row | None], limit: float, stop: Stop) -> None:
    """Send rows until there are no more, `limit` are sent, or `stop`."""
    for row in rows:
        while not (stop.requested or step(sender, row)):
            sender.report(limit)
        if stop.requested or sender.submitted >= limit:
            return
        sender.report(limit)


def run(sender: Sender, rows: Iterator[Row | None], limit: float, stop: Stop) -> None:
    """Send the rows, then wait for those under way (3 s after a stop).

    Raises Failure for a record that the broker refused, and BadLine from `rows` when all before
    it are acknowledged.
    """
    bad_line = None
    try:
        send_all(sender, rows, limit, stop)
    except BadLine as error:
        bad_line = error
    while sender.line and not stop.requested:
        sender.settle(0.5)
        sender.report(limit)
    deadline = sender.clock() + 3
    while sender.line and sender.clock() < deadline:
        sender.settle(0.5)
    if bad_line:
        raise bad_line


def csv_exists(values: Mapping[str, Any]) -> str:
    path = values.get("csv_path")
    if path is None or os.path.exists(path):
        return ""
    return f"CSV_PATH={str(path)!r}: there is no such file"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="CSV rows to a Kafka topic. Settings: README.md.")
    parser.add_argument("--rate", help="messages a second, 0: no limit (MESSAGES_PER_SECOND)")
    parser.add_argument(
        "--max-messages", type=config.positive, default=math.inf, help="stop after these"
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--seed", help="repeat the same sequence of rows (RANDOM_SEED)")
    source.add_argument("--stdin", action="store_true", help="send lines of JSON from a pipe")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        if args.stdin and sys.stdin is None:
            raise SettingsError("--stdin: standard input is closed")
        environ = config.environment({"MESSAGES_PER_SECOND": args.rate, "RANDOM_SEED": args.seed})
        settings = Settings.from_env(environ, *([] if args.stdin else [csv_exists]))
        config.setup_logging(settings)
        stop = Stop()
        rows: Iterator[Row | None]
        if args.stdin:
            rows = json_lines(settings.kafka_key_column)
        else:
            table = read_rows(settings.csv_path, settings.kafka_key_column)
            rows = sample(table, settings.random_seed)
        config.check_kafka(settings)
        rate = settings.messages_per_second
        linger = 0 if 0 < rate <= PRINTED_RATE else 5
        producer = config.make_producer(settings, linger_ms=linger, batch_size=2**17)
        sender = Sender(producer, settings.kafka_topic, rate)
        stop.under_way = lambda: f"{len(sender.line)} records unacknowledged"
        stop.farewell = sender.farewell
        if settings.metrics_port:
            from infra.monitoring import exporter

            exporter.serve_producer(settings, sender)
        try:
            run(sender, rows, args.max_messages, stop)
        finally:
            status(log, "sent %d", sender.sent)
            if sender.line:
                log.warning("%s", sender.farewell().lstrip("; "))
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
