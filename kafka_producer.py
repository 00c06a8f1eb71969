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
import codecs
import csv
import gc
import io
import json
import logging
import math
import os
import queue
import random
import re
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, TextIO

import config  # before the packages: it says in one line which of them is missing
from config import Failure, Settings, SettingsError, Stop, output, status

# isort: split
import pandas as pd
from kafka import KafkaProducer
from kafka.errors import KafkaError, KafkaTimeoutError
from pandas._libs.parsers import STR_NA_VALUES  # type: ignore[import-not-found]
from pandas.io.common import get_handle  # type: ignore[import-not-found]

log = logging.getLogger(__name__)

Row = tuple[bytes | None, bytes]  # key, value

# ------------------------------------------------------------------------------ rows of a CSV file

CHUNK = 20_000  # rows that are Python objects at one time
PROGRESS = 500_000  # rows, about a second's, after which a long reading shows how far it is

# What is missing in a column of numbers: what pandas takes for it, and exchanges' lone dashes.
MISSING = STR_NA_VALUES | {"", "-", "--"}

# A number as people write it, with a plus sign or no digit on one side of the point: its sign,
# whole part, fraction and exponent. Below: many numbers of JSON, a NUL behind each.
_NUMBER = re.compile(r"(?a)(?=[+-]?\.?\d)(?:\+|(-?))(0|[1-9]\d*)?(?:(\.\d+)|\.)?([eE][+-]?\d+)?")
_JSON_NUMBERS = re.compile(r"(?a)(?>-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?\0)*+")

# How the first two records look of a file that is no CSV, and what it is.
_NO_CSV = (
    ("\ufeff", "begins with a second byte order mark: save it as UTF-8 once more"),
    (r"\s*<(!doctype|!--|html|head|body|\?xml)", "is a web page or XML: download the file itself"),
    (r"version https://git-lfs", "is a pointer of Git LFS: fetch the file with git lfs pull"),
    (r'\s*(\{\s*"|\[\s*[\[{])', "is JSON: --stdin sends lines of JSON objects"),
    (r"[^,\n]*;[^,\n]*\n.*;", "is separated by semicolons: save it with commas"),
    (r"[^,\n]*\t[^,\n]*\n.*\t", "is separated by tabs: save it with commas"),
    (r"[^,\n]*\|[^,\n]*\n.*\|", "is separated by '|': save it with commas"),
)


def wrong(path: Path, what: str) -> SettingsError:
    return SettingsError(f"CSV_PATH={str(path)!r} {what}")


def check_kind(path: Path, start: str) -> None:
    for pattern, what in _NO_CSV:
        if re.match(pattern, start, re.IGNORECASE):
            raise wrong(path, what)


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """The text of a file in UTF-8, or in UTF-16 with its byte order mark, compressed or not.
    Bytes that are neither become surrogates."""
    with get_handle(path, "rb", is_text=False, compression="infer") as opened:  # as in read_csv
        marks = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        encoding = "utf-16" if opened.handle.read(2) in marks else "utf-8-sig"
        opened.handle.seek(0)
        yield io.TextIOWrapper(opened.handle, encoding, errors="surrogateescape", newline="")


def checked_lines(path: Path, text: TextIO) -> Iterator[str]:
    """The lines as they come. Raises SettingsError for a NUL, at which pandas would cut the cell
    off in silence, and for bytes of another encoding."""
    for number, line in enumerate(text, 1):
        is_plain = line.isascii() and "\0" not in line  # a search takes longer
        bad = None if is_plain else re.search("[\0\udc80-\udcff]", line)
        if bad and bad[0] == "\0":
            kinds = "it is damaged, UTF-16 without its mark, or a spreadsheet; save it as UTF-8 CSV"
            raise wrong(path, f"has a NUL byte in line {number}: {kinds}")
        if bad:
            where = f"line {number} has the byte 0x{ord(bad[0]) - 0xDC00:02x}"
            raise wrong(path, f"is not UTF-8: {where}; save it as UTF-8")
        yield line


def records(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Each record, the header first, with the line of the file on which it begins. Blank lines
    are none, as in pandas."""
    csv.field_size_limit(2**31 - 1)
    with open_text(path) as text:
        last_line: deque[str] = deque(maxlen=1)

        def lines() -> Iterator[str]:
            for line in checked_lines(path, text):
                last_line.append(line)
                yield line

        end = "\0,\0"  # two cells, or part of one where nothing closes a quote
        reader = csv.reader(chain(lines(), [end]))
        line = 1
        for record in reader:
            if record == end.split(","):
                return
            if record and end in record[-1]:
                raise wrong(path, f"has a quote in line {line} that nothing closes")
            if last_line[0].strip(" \t\r\n"):  # a cell of blanks in quotes is no blank line
                yield line, record
            line = reader.line_num + 1
            if line % PROGRESS == 0:
                status(log, "checking %s: %d lines", path.name, line)


def number_json(cell: str) -> str | None:
    """A cell of a column of numbers: its own digits, in the form that JSON wants; "null" for a
    missing one. None for what is no number: its column is one of text."""
    text = cell.strip()
    if text in MISSING:
        return "null"
    number = _NUMBER.fullmatch(text)
    if not number:
        return None
    sign, whole, fraction, exponent = number.groups("")
    return f"{sign}{whole or 0}{fraction}{exponent}"


_quote = json.JSONEncoder(ensure_ascii=False).encode


def text_json(cell: str) -> str:
    """A cell of a column of text, as it is written."""
    return _quote(cell) if cell else "null"


class Column:
    """What is known of a column after its cells up to now; its form is decided over the file."""

    as_it_stands = True  # every cell is a number of JSON
    filled = 0  # cells that are not missing
    others = 0  # those of them that are no number
    first_other = (0, "")  # its row and its text

    def learn(self, cells: list[str], row: int) -> None:
        """Take more cells into account; the first of them is in row `row`."""
        if _JSON_NUMBERS.fullmatch("\0".join([*cells, ""])):
            self.filled += len(cells)
            return
        self.as_it_stands = False
        forms = {cell: number_json(cell) for cell in set(cells)}
        self.filled += sum(forms[cell] != "null" for cell in cells)
        others = [at for at, cell in enumerate(cells) if forms[cell] is None]
        if others and not self.others:
            self.first_other = (row + others[0], cells[others[0]])
        self.others += len(others)


def check_records(path: Path) -> list[int]:
    """Find what pandas passes over in silence: it cuts a cell off at a NUL, and at the header's
    width a row that begins a chunk; it fills a short row up.

    Returns the lines of the short rows. Raises SettingsError for the others, and for a file that
    is something else.
    """
    start = [",".join(record).replace("\n", " ") for _, record in islice(records(path), 2)]
    check_kind(path, "\n".join(start))
    if not start:
        raise wrong(path, "is empty")
    width = 0
    short = []
    for line, record in records(path):
        width = width or len(record)
        if len(record) > width:
            fields = f"line {line} has {len(record)}, the header {width}"
            raise wrong(path, f"has rows with more fields than the header: {fields}")
        if len(record) < width:
            short.append(line)
    return short


def warn_of_oddities(path: Path, columns: Mapping[str, Column], short: Sequence[int]) -> None:
    """Say what is no error and perhaps not meant: a line a kind, with the count and the first."""
    header_line, header = next(records(path))
    names = zip(header, columns, strict=True)
    if renamed := [f"{old!r} is {new!r}" for old, new in names if old != new]:
        what = "CSV_PATH=%r, line %d: %d columns have no name, or one that is taken: %s"
        log.warning(what, str(path), header_line, len(renamed), ", ".join(renamed[:5]))
    if short:
        what = "CSV_PATH=%r: %d rows have fewer fields than the header, the first in line %d"
        log.warning(what, str(path), len(short), short[0])
    mixed = [name for name in columns if 0 < 2 * columns[name].others < columns[name].filled]
    told = []
    for name in mixed[:5]:
        row, text = columns[name].first_other
        line, _ = next(islice(records(path), row + 1, None), ("?", []))
        others = f"{columns[name].others} cells of {name!r} are none"
        told.append(f"{others}, the first {text[:99]!r} in line {line}")
    if told:
        what = "CSV_PATH=%r: %d columns of text have numbers in most cells: %s"
        log.warning(what, str(path), len(mixed), "; ".join(told))


def row_maker(columns: Mapping[str, Column], key_column: str) -> Callable[[str], Row | None]:
    """A function from a row's cells, with NULs between, to its key and value; None for a row
    without any value."""
    forms: dict[int, Callable[[str], str | None]] = {}
    for at, column in enumerate(columns.values()):
        if not column.as_it_stands:
            forms[at] = text_json if column.others else number_json
    members = [_quote(name).replace("%", "%%") + ": %s" for name in columns]
    template = "{" + ", ".join(members) + "}"
    no_value = ["null"] * len(columns)
    key_at = list(columns).index(key_column) if key_column else None

    def make(row: str) -> Row | None:
        values: list[Any] = row.split("\0")
        key = "" if key_at is None else values[key_at]
        for at, form in forms.items():
            values[at] = form(values[at])
        if values == no_value:
            return None
        has_key = key_at is not None and values[key_at] != "null"
        return key.encode() if has_key else None, (template % tuple(values)).encode()

    return make


def chunks(path: Path) -> Iterator[pd.DataFrame]:
    """The rows, each cell as text, CHUNK at a time."""
    options: dict[str, Any] = {"dtype": object, "na_filter": False, "index_col": False}
    with open_text(path) as text:
        has_lone_cr = any(line.endswith("\r") for line in text)
        text.seek(0)
        if has_lone_cr:
            # After a lone CR, pandas reads rows again where a line begins with a blank.
            text = io.StringIO()
            csv.writer(text, quoting=csv.QUOTE_ALL).writerows(record for _, record in records(path))
            text.seek(0)
        for number, chunk in enumerate(pd.read_csv(text, chunksize=CHUNK, **options), 1):
            yield chunk
            if number * CHUNK % PROGRESS == 0:
                status(log, "reading %s: %d rows", path.name, number * CHUNK)


def stamp(path: Path) -> tuple[int, ...]:
    """What is another when a file was written or replaced; empty when it is gone."""
    with suppress(OSError):
        status = path.stat()
        return status.st_ino, status.st_size, status.st_mtime_ns
    return ()


def read_table(path: Path) -> tuple[list[Any], dict[str, Column]]:
    """The rows, each as its cells with NULs between; the columns, by the names that pandas gives.
    Raises SettingsError for a file that is no such CSV."""
    before = stamp(path)
    try:
        short = check_records(path)
        rows: list[Any] = []
        columns: dict[str, Column] = defaultdict(Column)
        for chunk in chunks(path):
            cells = {str(name): chunk[name].tolist() for name in chunk}
            for name, some in cells.items():
                columns[name].learn(some, len(rows))
            rows += map("\0".join, zip(*cells.values(), strict=True))
        warn_of_oddities(path, columns, short)
        return rows, columns
    except SettingsError:
        raise
    except UnicodeDecodeError as error:
        raise wrong(path, f"cannot be read as UTF-16 ({error.reason}): save it as UTF-8") from None
    except Exception as error:  # each decompressor has errors of its own
        if stamp(path) != before:
            raise wrong(path, "was replaced or written while it was read: start again") from None
        with suppress(OSError), path.open("rb") as file:
            check_kind(path, file.read(1000).decode("latin-1"))
        hint = "is it damaged or cut short, or an archive of several files? Fetch or unpack it"
        raise wrong(path, f"cannot be read: {config.explain(error)}; {hint}") from None


def read_rows(path: Path, key_column: str = "") -> list[Row]:
    """The rows of a CSV file as (key, value): one JSON object each, UTF-8, in the CSV's column
    order. A number has the digits of the CSV, missing is null, rows with no value are left out.

    Raises SettingsError for a file that is no such CSV, or has no column `key_column`: one line
    that says what it is, in which line of the file, and what to do.
    """
    if not path.is_file():
        raise wrong(path, "is no file (a folder, or a pipe)")
    table, columns = read_table(path)
    if key_column and key_column not in columns:
        only = f"CSV_PATH={str(path)!r} has only {', '.join(map(repr, columns))}"
        raise SettingsError(f"KAFKA_KEY_COLUMN={key_column!r}: {only}")
    make = row_maker(columns, key_column)
    for at, row in enumerate(table):  # in place, or the file would be in memory twice
        table[at] = make(row)
    rows = list(filter(None, table))
    if not rows:
        raise wrong(path, "has no rows with a value in them")
    if dropped := len(table) - len(rows):
        log.warning("%d of %d rows have no value at all and are left out", dropped, len(table))
    return rows


def sample(rows: Sequence[Row], seed: int | None) -> Iterator[Row]:
    """Rows at random with replacement, without end; the same ones again for the same seed."""
    rng = random.Random(seed)
    while True:
        yield rows[int(rng.random() * len(rows))]


# ---------------------------------------------------------------------- lines of JSON from a pipe

MAX_LINE = 2**25  # bytes; the client takes no larger record


class BadInput(Failure):
    """Input that is no record; what was before it is sent all the same."""


def key_of(value: bytes, field: str) -> bytes | None:
    """The field of a JSON object as a message's key. Raises ValueError for what is no object."""
    record = config.json_object(value)
    key = record.get(field) if field else None
    if isinstance(key, dict | list):
        raise ValueError(f"its field {field!r} is the key, and neither text nor a number")
    text = key if isinstance(key, str) else json.dumps(key)
    return None if key is None else text.encode()


def read_lines(stream: IO[bytes], key_field: str, rows: queue.Queue[Row]) -> None:
    """Put each line into `rows` as (key, value), without its line end; blank lines are left out.
    Raises BadInput for a line that is no JSON object."""
    for number, line in enumerate(iter(lambda: stream.readline(MAX_LINE + 1), b""), 1):
        if len(line) > MAX_LINE:
            raise BadInput(f"--stdin: line {number} has more than {MAX_LINE} bytes")
        value = line.removesuffix(b"\n").removesuffix(b"\r")
        if number == 1:
            value = value.removeprefix(codecs.BOM_UTF8)  # PowerShell begins a pipe with it
        if not value.strip():
            continue
        try:
            rows.put((key_of(value, key_field), value))
        except ValueError as error:
            start = value[:200].decode(errors="backslashreplace")
            raise BadInput(f"--stdin: line {number} is no JSON object: {error}: {start}") from None


def json_lines(stream: IO[bytes], key_field: str) -> Iterator[Row | None]:
    """The rows of `read_lines`; None while there is none. A thread reads them, at most 16 ahead.

    Raises BadInput for what is no row, when all before it were given.
    """
    rows: queue.Queue[Row] = queue.Queue(16)
    reading = config.background(read_lines, stream, key_field, rows)
    while not (reading.done() and rows.empty()):
        try:
            yield rows.get(timeout=0.05)
        except queue.Empty:
            yield None
    error = reading.exception()
    if isinstance(error, BadInput):
        raise error
    if error:
        raise BadInput(f"--stdin: the input cannot be read: {config.explain(error)}")


# ------------------------------------------------------------------------------------- the sending

GONE_AFTER = 8.0  # s without an answer after which the partition itself is doubted
PRINTED_RATE = 100  # msg/s up to which every record is waited for and printed
MAX_UNACKNOWLEDGED = 5_000  # records under way at most: what is in memory when the broker is down
MAX_BYTES = 2**25  # of them, above which no more is handed over; one record at least


@dataclass
class Sender:
    """The line of records under way, as (record, future), oldest first. What is before the front
    is sent: the broker acknowledged it and all before it."""

    producer: KafkaProducer
    topic: str
    rate: float  # msg/s; 0: as fast as possible
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self.printing = 0 < self.rate <= PRINTED_RATE
        self.line: deque[tuple[Row, Any]] = deque()
        self.sent = self.failed = self.reported_sent = self.bytes = 0
        self.last_success = 0.0
        self.started = self.reported_at = self.answered_at = self.clock()
        self.notices = config.Notices(self.clock)

    @property
    def unacknowledged(self) -> int:
        return len(self.line)

    @property
    def submitted(self) -> int:
        return self.sent + len(self.line)

    def due(self) -> float:
        """Seconds until the next record's time. The times are counted from the start, so that
        no delay adds up: 1 msg/s is 3,600 in an hour."""
        return self.started + self.submitted / self.rate - self.clock() if self.rate else 0.0

    def submit(self, row: Row) -> bool:
        """Hand a record to the client; False when it has no room now (the broker is down)."""
        try:
            future = self.producer.send(self.topic, key=row[0], value=row[1])
        except KafkaTimeoutError:
            self.note_silence()
            return False
        except Exception as error:
            raise self.refusal(error, row) from None
        self.line.append((row, future))
        self.bytes += len(row[1])
        return True

    def settle(self, timeout: float) -> None:
        """Take what is acknowledged from the front of the line, and wait for the first of it,
        `timeout` seconds at most. Raises Failure for a record that the broker refused."""
        while self.line:
            row, future = self.line[0]
            try:
                answer = future.get(timeout=timeout)
            except Exception as error:
                # A timeout that is not the future's own error: there was no answer in time.
                if isinstance(error, KafkaTimeoutError) and error is not future.exception:
                    break
                self.line.popleft()
                raise self.refusal(error, row) from None
            timeout = 0
            self.line.popleft()
            self.bytes -= len(row[1])
            self.sent += 1
            self.answered_at, self.last_success = self.clock(), time.time()
            if self.printing:
                print_record(row, answer)
        if not self.line:  # no answer is owed
            self.answered_at = self.clock()
        self.note_silence()

    def check_partition(self) -> None:
        """Raises Failure where the partition of the oldest record is gone: it would wait for ever,
        and all behind it."""
        partition = self.line[0][1]._produce_future.topic_partition.partition
        with suppress(KafkaError):  # nothing is known of the topic
            if partition not in self.producer.partitions_for(self.topic):
                gone = f"topic {self.topic} has no partition {partition} any more"
                raise Failure(f"{gone}: was it deleted and made anew? Start again")

    def note_silence(self) -> None:
        """Say when an answer is owed for 2 s or longer, and when it has come."""
        problems = {}
        seconds = self.clock() - self.answered_at
        if seconds >= GONE_AFTER and self.line:
            self.check_partition()
        if seconds >= 2:
            waiting = f"{len(self.line)} records wait, in order; none is dropped{config.last_words}"
            text = f"no answer from the broker for {seconds:.0f} s: {waiting}"
            problems["the broker answers"] = config.Problem(text, since=self.answered_at)
        self.notices.report(problems)

    def show_status(self, limit: float) -> None:
        """The status line, each second above PRINTED_RATE or on a terminal."""
        seconds = self.clock() - self.reported_at
        if seconds < 1 or (self.printing and not sys.stderr.isatty()):
            return
        if self.line:
            self.settle(0)
        speed = (self.sent - self.reported_sent) / seconds
        self.reported_at, self.reported_sent = self.clock(), self.sent
        progress = f"sent {self.sent}"
        if limit < math.inf:
            left = f"{(limit - self.sent) / speed:.0f}" if speed else "?"
            progress = f"sent {self.sent} of {limit}, {left} s left"
        status(log, "%s | %.1f/s | unacknowledged %d", progress, speed, len(self.line))

    def refusal(self, error: Exception, row: Row) -> Failure:
        self.failed += 1
        record = f"the record ({len(row[1])} bytes): {row[1][:200].decode(errors='replace')}"
        why = config.explain(error)
        return Failure(f"the broker refused a record for topic {self.topic}: {why}; {record}")

    def farewell(self) -> str:
        """What the end leaves open, as the end of a sentence."""
        if not self.line:
            return ""
        unsaid = f"{len(self.line)} more may or may not be in the topic: the broker did not say"
        return f"; sent {self.sent}, and {unsaid}"


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
    most = 1 if sender.printing else MAX_UNACKNOWLEDGED
    if wait <= 0 and len(sender.line) < most and sender.bytes < MAX_BYTES:
        return sender.submit(row)
    pause = min(wait, 0.5) if wait > 0 else 0.5
    if not sender.line:
        sleep(pause)
    sender.settle(pause)
    return False


def send_all(sender: Sender, rows: Iterator[Row | None], limit: float, stop: Stop) -> None:
    """Send rows until there are no more, `limit` are sent, or `stop`."""
    for row in rows:
        done = False
        while not done:
            if stop.requested:
                return
            stop.check()
            done = step(sender, row)
            sender.show_status(limit)
        if sender.submitted >= limit:
            return


def run(sender: Sender, rows: Iterator[Row | None], limit: float, stop: Stop) -> None:
    """Send the rows, then wait for those under way (3 s after a stop).

    Raises Failure for a record that the broker refused or a thread that died, and BadInput from
    `rows` when all before it are acknowledged.
    """
    bad_input = None
    try:
        send_all(sender, rows, limit, stop)
    except BadInput as error:
        bad_input = error
    while sender.line and not stop.requested:
        stop.check()
        sender.settle(0.5)
        sender.show_status(limit)
    deadline = sender.clock() + 3
    while sender.line and sender.clock() < deadline:
        sender.settle(0.5)
    if bad_input:
        raise bad_input


def csv_exists(values: Mapping[str, Any]) -> str:
    path = values.get("csv_path")
    if path is None or os.path.exists(path):
        return ""
    hint = "an excerpt is in tests/data, and .env.example names it"
    return f"CSV_PATH={str(path)!r}: there is no such file; {hint}"


def stdin_is_open(values: Mapping[str, Any]) -> str:
    return "" if sys.stdin else "--stdin: standard input is closed"


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
    gc.set_threshold(20_000)  # what is made a record has no cycles: a tenth of the CPU time
    try:
        flags = {"MESSAGES_PER_SECOND": args.rate, "RANDOM_SEED": args.seed}
        settings = Settings.load(flags, stdin_is_open if args.stdin else csv_exists)
        config.setup_logging(settings)
        stop = Stop()
        rows: Iterator[Row | None]
        if args.stdin:
            if sys.stdin.isatty():
                log.info("--stdin: type a JSON object a line; the end of input (Ctrl-D) ends it")
            # Not sys.stdin's buffer: at the exit Python would wait for the thread that reads it.
            rows = json_lines(open(0, "rb", closefd=False), settings.kafka_key_column)  # noqa: SIM115
        else:
            table = read_rows(settings.csv_path, settings.kafka_key_column)
            rows = sample(table, settings.random_seed)
        config.check_kafka(settings)
        rate = settings.messages_per_second
        linger = 0 if 0 < rate <= PRINTED_RATE else 5
        producer = config.make_producer(settings, linger_ms=linger, batch_size=2**17)
        sender = Sender(producer, settings.kafka_topic, rate)
        stop.under_way = lambda: f"{len(sender.line)} unacknowledged"
        stop.farewell = sender.farewell
        if settings.metrics_port:
            from infra.monitoring import exporter

            exporter.serve_producer(settings, sender)
        try:
            run(sender, rows, args.max_messages, stop)
        finally:
            if sender.line:
                log.warning("%s", sender.farewell().lstrip("; "))
            else:
                log.info("sent %d", sender.sent)
            with suppress(KafkaTimeoutError):  # said above
                producer.close(timeout=0.5)
    except SettingsError as error:
        with suppress(OSError):  # a full disk
            print(*error.args, sep="\n", file=sys.stderr)
        return 2
    except Failure as error:
        log.error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
