"""What goes in: CSV rows as JSON, the choice of rows, the pace, and every future looked at."""

import csv
import inspect
import io
import json
import logging
import math
import os
import re
import tempfile
import time
import zipfile
from collections import Counter, deque
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kafka import TopicPartition
from kafka.errors import KafkaError, KafkaTimeoutError, MessageSizeTooLargeError, for_code
from kafka.errors import TopicAuthorizationFailedError as NotAllowed
from pandas._libs.parsers import STR_NA_VALUES

import kafka_producer
from config import Failure, SettingsError
from kafka_producer import (
    CHUNK,
    MAX_BYTES,
    MAX_UNACKNOWLEDGED,
    PRINTED_RATE,
    Sender,
    json_lines,
    read_rows,
    run,
    sample,
    step,
)

ROWS = Path(kafka_producer.__file__).parent / "tests/data/indexProcessed.csv"


# ------------------------------------------------------------------------------------- CSV to JSON


def strict(value):
    """JSON as others read it, without NaN and Infinity; a number is the text of its digits,
    marked so that it is no string."""

    def refuse(text):
        raise ValueError(text)

    assert b"\n" not in value and b"\r" not in value
    return json.loads(
        value.decode("utf-8"), parse_constant=refuse, parse_int=Digits, parse_float=Digits
    )


class Digits:
    """A number of JSON, by its text."""

    def __init__(self, text):
        self.text = str(text)

    def __eq__(self, other):
        return isinstance(other, Digits) and self.text == other.text

    def __repr__(self):
        return f"Digits({self.text})"


def numbers(row):
    """A row written with Python's own numbers."""
    return {
        name: Digits(value) if isinstance(value, int | float) else value
        for name, value in row.items()
    }


@pytest.fixture
def rows(tmp_path):
    """Reads a CSV given as text or bytes; returns its rows as Python objects."""

    def read(content, key_column=""):
        file = tmp_path / "some.csv"
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return [strict(value) for _, value in read_rows(file, key_column)]

    return read


def test_every_number_of_every_committed_row_has_the_digits_of_the_file():
    with ROWS.open(encoding="utf-8", newline="") as file:
        source = list(csv.DictReader(file))
    found = [strict(value) for _, value in read_rows(ROWS)]
    assert len(found) == len(source) > 400
    for row, cells in zip(found, source, strict=True):
        texts = {"Index", "Date"}
        assert list(row) == list(cells)
        assert row == {n: text if n in texts else Digits(text) for n, text in cells.items()}


ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
TRICKY = st.text(st.sampled_from("ab\",\n\r\t ;|'\\%{}\ufeff\u2028é日")) | ANY_TEXT
MARKS = st.sampled_from(["", " ", "\t", "NA", " NaN ", "nan", "N/A", "null", "None", "-", "--"])
BLANKS = st.sampled_from(["", "", " ", "  ", "\t"])
SOME_DIGITS = st.text("0123456789", min_size=1, max_size=40)


@st.composite
def number_cells(draw):
    """A number as people write it, and as JSON has it."""
    sign = draw(st.sampled_from(["", "", "-", "+"]))
    whole = draw(st.sampled_from(["", "0"]) | SOME_DIGITS.map("1{}".format))
    point = draw(st.sampled_from(["", ".", ".", "."])) if whole else "."
    rest = draw(SOME_DIGITS | st.just("" if whole else "5")) if point else ""
    exponent = draw(st.sampled_from(["", "", "e5", "E-07", "e+400", "E00"]))
    written = f"{sign}{whole}{point}{rest}{exponent}"
    wanted = f"{sign.strip('+')}{whole or 0}{point if rest else ''}{rest}{exponent}"
    return draw(BLANKS) + written + draw(BLANKS), Digits(wanted)


def text_cells(first):
    """A text as it stands; the first one of a column is no number."""
    return (TRICKY.map("w{}".format) if first else TRICKY | MARKS | st.just("1")).map(
        lambda text: (text, text or None)
    )


@st.composite
def tables(draw):
    """Columns: name, and for each row (the cell as written, what JSON has)."""
    width, height = draw(st.integers(1, 20)), draw(st.integers(1, 6))
    missing = MARKS.map(lambda text: (text, None))
    columns = []
    for at in range(width):
        if draw(st.booleans()):
            cells = [draw(number_cells() | missing) for _ in range(height)]
        else:
            cells = [draw(text_cells(first=row == 0)) for row in range(height)]
        name = f"{at}:{draw(TRICKY)}"
        columns.append((name if width > 1 else name.translate(dict.fromkeys(b";|\t")), cells))
    return columns


# The csv module quotes a carriage return only when that ends its lines.
LINES = st.sampled_from(
    [
        {"lineterminator": "\r\n", "quoting": csv.QUOTE_MINIMAL},
        {"lineterminator": "\n", "quoting": csv.QUOTE_ALL},
        {"lineterminator": "\r", "quoting": csv.QUOTE_ALL},
    ]
)


@settings(deadline=None, max_examples=int(os.environ.get("EXAMPLES", 60)))  # a busy machine
@given(tables(), LINES, st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]))
def test_any_table_that_the_csv_module_writes_comes_out_with_the_same_text_and_digits(
    columns, lines, encoding
):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "made.csv"
        with path.open("w", encoding=encoding, newline="") as file:
            writer = csv.writer(file, **lines)
            writer.writerow(name for name, _ in columns)
            for row in zip(*(cells for _, cells in columns), strict=True):
                writer.writerow(written for written, _ in row)
        wanted = []
        for row in zip(*(cells for _, cells in columns), strict=True):
            alone = row[0][0] if len(row) == 1 else "x"
            # Of one column: not to be told from a line without anything on it.
            blank_line = lines["quoting"] == csv.QUOTE_MINIMAL and alone and not alone.strip(" \t")
            if not blank_line and any(value is not None for _, value in row):
                names = [name for name, _ in columns]
                wanted.append(dict(zip(names, [value for _, value in row], strict=True)))
        if not wanted:
            with pytest.raises(SettingsError, match="no rows"):
                read_rows(path)
            return
        found = [strict(value) for _, value in read_rows(path)]
    assert found == wanted
    assert list(found[0]) == [name for name, _ in columns]


def test_missing_is_null_and_never_nan(rows):
    assert rows("text,number\nx,1.5\n,\nNA,NaN\nN/A,2\n,null\ny,-\nz, \n") == [
        {"text": "x", "number": Digits("1.5")},
        {"text": "NA", "number": None},
        {"text": "N/A", "number": Digits("2")},
        {"text": "y", "number": None},
        {"text": "z", "number": None},
    ]


@pytest.mark.parametrize("text", sorted(STR_NA_VALUES))
def test_what_pandas_reads_as_missing_is_missing_in_a_column_of_numbers(rows, text):
    assert rows(f"a,b\n1,x\n{text},y\n")[1] == {"a": None, "b": "y"}


def test_rows_without_any_value_are_dropped_and_counted(rows, caplog):
    assert rows("a,b\n1,2\n,\nNA,\n3,4\n") == [
        numbers({"a": 1, "b": 2}),
        numbers({"a": 3, "b": 4}),
    ]
    assert [record.getMessage() for record in caplog.records] == [
        "2 of 4 rows have no value at all and are left out"
    ]


def test_nothing_is_said_of_a_file_without_such_rows(rows, caplog):
    rows("a,b\n1,2\n")
    assert not caplog.records


def test_a_byte_order_mark_is_no_part_of_the_first_name(rows):
    assert rows("\ufeffIndex,b\nHSI,1\n") == [numbers({"Index": "HSI", "b": 1})]


def test_quoted_commas_quotes_and_line_breaks_stay_in_their_cell(rows):
    assert rows('a,"b, c"\n"x, y","say ""hi"""\n"two\nlines",z\n') == [
        {"a": "x, y", "b, c": 'say "hi"'},
        {"a": "two\nlines", "b, c": "z"},
    ]


def test_columns_keep_their_order_and_text_its_characters(rows):
    found = rows("z,a,größe,flag\n2008-01-02,007,€,TRUE\n2009-01-02,8,ß,False\n")
    assert found == [
        {"z": "2008-01-02", "a": "007", "größe": "€", "flag": "TRUE"},
        {"z": "2009-01-02", "a": "8", "größe": "ß", "flag": "False"},
    ]
    assert list(found[0]) == ["z", "a", "größe", "flag"]


def test_text_is_sent_as_utf8_not_escaped(tmp_path):
    (tmp_path / "x.csv").write_text("a\n日経\n", encoding="utf-8")
    assert list(read_rows(tmp_path / "x.csv")) == [(None, '{"a": "日経"}'.encode())]


def test_a_long_column_has_one_type_though_a_word_comes_late(rows):
    found = rows("a,b\n" + "1.50,1.50\n" * CHUNK * 2 + "x,3\n")
    assert {row["a"] for row in found} == {"1.50", "x"}
    assert {row["b"].text for row in found} == {"1.50", "3"}


def test_a_file_of_short_rows_alone_has_null_for_what_is_not_there(rows):
    assert rows("a,b,c\n1,2\n3\n") == [
        numbers({"a": 1, "b": 2, "c": None}),
        numbers({"a": 3, "b": None, "c": None}),
    ]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_cell_that_begins_with_a_blank_repeats_no_row(rows, end):
    found = rows(end.join(["a,b", " 7,1", "2,3", ""]))
    assert found == [numbers({"a": 7, "b": 1}), numbers({"a": 2, "b": 3})]


def test_the_key_is_the_column_that_was_asked_for(tmp_path):
    file = tmp_path / "x.csv"
    file.write_text("Index,n\nHSI,1\nÜ,2\n,3\n", encoding="utf-8")
    assert [key for key, _ in read_rows(file)] == [None, None, None]
    assert [key for key, _ in read_rows(file, "Index")] == [b"HSI", "Ü".encode(), None]
    assert [key for key, _ in read_rows(file, "n")] == [b"1", b"2", b"3"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b" \n\n\t\n", "is empty"),
        (b"a,b\n", "no rows"),
        (b"a,b\n,\n,\n", "no rows"),
        ("a,b\né,1\n".encode("latin-1"), "not UTF-8: line 2"),
        ("a,b\n1,2\n".encode("utf-16")[2:], "NUL byte in line 1"),
        ("a,b\n1,2\n".encode("utf-16")[:-1], "cannot be read"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "not UTF-8: line 1"),
        (b"a,b\n1,2\n3,4,5\n", "line 3"),
        (b"a,b\n1,2,3\n4,5,6\n", "more fields than the header: line 2 has 3"),
        (b'a,b\n1,"2\n', "quote in line 2 that nothing closes"),
    ],
)
def test_a_file_that_is_no_such_csv_is_one_clear_line(rows, content, said):
    with pytest.raises(SettingsError, match=said) as caught:
        rows(content)
    assert len(caught.value.args) == 1
    assert caught.value.args[0].startswith("CSV_PATH='")
    assert caught.value.args[0].isprintable()


def test_a_path_that_is_no_file_is_one_clear_line(tmp_path):
    for path in (tmp_path, tmp_path / "missing.csv"):
        with pytest.raises(SettingsError) as caught:
            read_rows(path)
        assert str(path) in caught.value.args[0] and caught.value.args[0].isprintable()


def test_a_key_column_that_is_not_there_is_named_with_those_that_are(rows):
    with pytest.raises(
        SettingsError, match=r"KAFKA_KEY_COLUMN='Symbol': .*'Index', 'two.nlines'"
    ) as e:
        rows('Index,"two\nlines"\nHSI,1\n', "Symbol")
    assert e.value.args[0].isprintable()


def test_the_whole_file_of_104425_rows_is_read_in_seconds(tmp_path):
    header, *lines = ROWS.read_text(encoding="utf-8").splitlines()
    file = tmp_path / "whole.csv"
    file.write_text("\n".join([header, *(lines * 213)[:104_425], ""]), encoding="utf-8")
    began = time.process_time()
    assert len(read_rows(file, "Index")) == 104_425
    assert time.process_time() - began < 6


# ------------------------------------------------------------------------------ the choice of rows

ABC = [(None, b"a"), (b"k", b"b"), (None, b"c")]


def test_rows_are_picked_at_random_with_replacement_without_end():
    assert inspect.isgenerator(sample(ABC, None))
    picks = list(islice(sample(ABC, 1), 30_000))
    rounds = [set(picks[at : at + 3]) for at in range(0, 30_000, 3)]
    assert {len(each) for each in rounds} == {1, 2, 3}  # else without replacement
    counts = Counter(picks)
    assert set(counts) == set(ABC)
    assert all(9_000 < count < 11_000 for count in counts.values())
    assert list(islice(sample(ABC[:1], None), 3)) == ABC[:1] * 3


def test_a_seed_repeats_the_sequence_and_no_seed_does_not():
    many = [(None, b"%d" % number) for number in range(1000)]
    first, again, other, none, never = (
        list(islice(sample(many, seed), 50)) for seed in (7, 7, 8, None, None)
    )
    assert first == again
    assert len({tuple(each) for each in (first, other, none, never)}) == 4


# ------------------------------------------------------------------------------------- the sending


class Clock:
    """Seconds that pass only when somebody waits."""

    def __init__(self):
        self.now = 1_000.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        assert seconds >= 0
        self.now += seconds


class Sent:
    """A future as the client's: acknowledged at a time, or refused with an error then."""

    def __init__(self, clock, offset, at, error=None):
        self.clock, self.offset, self.at, self.error = clock, offset, at, error
        self._produce_future = SimpleNamespace(topic_partition=TopicPartition("test", 0))

    @property
    def is_done(self):
        return self.clock() >= self.at

    @property
    def exception(self):
        return self.error if self.is_done else None

    def failed(self):
        return self.is_done and self.error is not None

    def get(self, timeout):
        self.clock.now = max(self.clock.now, min(self.at, self.clock.now + timeout))
        if not self.is_done:
            raise KafkaTimeoutError(f"timeout after {timeout} s")
        if self.error:
            raise self.error
        return SimpleNamespace(topic="test", partition=0, offset=self.offset)


class Broker:
    """Stands for the client's producer: acknowledges in order, `latency` s after the send, and
    nothing between `down` and `up`."""

    def __init__(self, clock, latency=0.01, cost=0.0):
        self.clock, self.latency, self.cost = clock, latency, cost
        self.stored = []
        self.down = self.up = math.inf
        self.errors = {}  # by offset
        self.raises = deque()  # for the next calls of send
        self.partitions = {0}

    def partitions_for(self, topic):
        if self.partitions is None:
            raise NotAllowed("test")
        return self.partitions

    def send(self, topic, key, value):
        self.clock.now += self.cost
        if self.raises and (error := self.raises.popleft()):
            self.clock.now += 0.5
            raise error
        at = self.clock() + self.latency
        if self.down <= at < self.up:
            at = self.up
        self.stored.append((key, value))
        offset = len(self.stored) - 1
        return Sent(self.clock, offset, at, self.errors.get(offset))


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def broker(clock):
    return Broker(clock)


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


def going(sender, row, clock, until):
    """Step until a time, as `run` does."""
    while clock() < until:
        step(sender, row, clock.sleep)


GO = SimpleNamespace(requested=False, check=lambda: None)
ROW = (b"HSI", '{"Index": "ü"}'.encode())


@pytest.mark.parametrize(
    ("rate", "seconds"), [(0.1, 3600), (1, 3600), (7.7, 600), (100, 60), (130, 60), (1000, 6)]
)
def test_the_pace_has_no_drift(clock, rate, seconds):
    broker = Broker(clock, latency=0.009, cost=0.0002)
    sender = Sender(broker, "test", rate, clock)
    going(sender, ROW, clock, clock() + seconds)
    assert abs(len(broker.stored) - rate * seconds) <= 1.1


def test_each_record_has_its_own_time_and_is_waited_for(clock, broker):
    sender, times = Sender(broker, "test", 2, clock), []
    start = clock()
    while len(times) < 6:
        if step(sender, ROW, clock.sleep):
            times.append(clock() - start)
            assert sender.unacknowledged == 1
    assert times == pytest.approx([0, 0.5, 1, 1.5, 2, 2.5], abs=0.001)


def test_a_wait_is_cut_into_slices_of_half_a_second(clock, broker):
    sender, slices = Sender(broker, "test", 0.01, clock), []

    def sleep(seconds):
        slices.append(seconds)
        clock.sleep(seconds)

    for _ in range(20):
        step(sender, ROW, sleep)
    assert slices and max(slices) <= 0.5


def test_what_an_outage_delayed_is_caught_up_with(clock, broker):
    broker.down, broker.up = clock() + 10, clock() + 70
    sender = Sender(broker, "test", 1, clock)
    going(sender, ROW, clock, clock() + 100)
    assert 99 <= len(broker.stored) <= 101


def test_up_to_100_a_second_each_record_is_printed_in_two_lines(clock, broker, lines, caplog):
    run(Sender(broker, "test", PRINTED_RATE, clock), iter([ROW] * 3), 2, GO)
    assert lines("records") == [
        "[Sent] Topic: test | Partition: 0 | Offset: 0",
        '   Content: {"Index": "ü"}',
        "[Sent] Topic: test | Partition: 0 | Offset: 1",
        '   Content: {"Index": "ü"}',
    ]
    about = [record for record in caplog.records if record.name == "records"][-1]
    assert (about.topic, about.partition, about.offset, about.key) == ("test", 0, 1, "HSI")


@pytest.mark.parametrize("rate", [0, PRINTED_RATE + 1])
def test_above_that_a_status_line_is_printed_each_second(clock, rate, lines):
    broker = Broker(clock, cost=0.01)
    run(Sender(broker, "test", rate, clock), sample(ABC, 1), 1000, GO)
    assert lines("records") == []
    seconds = 10
    status = [line for line in lines() if line.startswith("sent ")]
    assert abs(len(status) - seconds) <= 1
    assert status[3].split(" | ")[1].endswith("/s")


def test_nothing_is_said_each_second_at_a_slow_pace(clock, broker, lines):
    sender = Sender(broker, "test", 1, clock)
    going(sender, ROW, clock, clock() + 60)
    assert lines() == []


def test_as_fast_as_possible_the_unacknowledged_are_bounded_and_nothing_is_dropped(clock):
    broker = Broker(clock, latency=5)
    sender, most = Sender(broker, "test", 0, clock), 0
    many = [(None, b"%d" % number) for number in range(20_000)]
    rows = iter(many)
    row = next(rows)
    while row:
        if step(sender, row, clock.sleep):
            row = next(rows, None)
        most = max(most, sender.unacknowledged)
    assert most == MAX_UNACKNOWLEDGED
    assert broker.stored == many


def test_large_records_that_are_unacknowledged_are_bounded_in_bytes(clock):
    broker = Broker(clock, latency=5)
    sender, most = Sender(broker, "test", 0, clock), 0
    row = (None, bytes(MAX_BYTES // 8))
    while sender.submitted < 50:
        step(sender, row, clock.sleep)
        most = max(most, sender.unacknowledged)
    assert most == 8
    run(sender, iter([(None, bytes(2 * MAX_BYTES))]), math.inf, GO)
    assert (sender.sent, sender.bytes) == (51, 0)


def test_the_run_ends_when_as_many_as_asked_are_acknowledged(clock, broker):
    sender = Sender(broker, "test", 0, clock)
    run(sender, sample(ABC, 1), 250, GO)
    assert (sender.submitted, sender.sent, sender.unacknowledged) == (250, 250, 0)
    assert broker.stored == list(islice(sample(ABC, 1), 250))
    assert sender.farewell() == ""


def test_a_record_the_client_has_no_room_for_is_handed_over_again_in_order(clock, broker):
    broker.raises.extend([KafkaTimeoutError("no room"), None, None, KafkaTimeoutError("no room")])
    sender = Sender(broker, "test", 0, clock)
    many = [(None, b"%d" % number) for number in range(10)]
    run(sender, iter([*many, None]), 10, GO)
    assert broker.stored == many
    assert sender.sent == 10


@pytest.mark.parametrize("rate", [0, 1, 200])
def test_a_record_the_broker_refuses_ends_the_run_and_is_named(clock, broker, rate):
    broker.errors[2] = MessageSizeTooLargeError("too large")
    sender = Sender(broker, "prices", rate, clock)
    with pytest.raises(Failure, match="prices") as caught:
        while True:
            step(sender, ROW, clock.sleep)
            if sender.unacknowledged > 5:
                sender.settle(1)
    said = str(caught.value)
    assert "MessageSizeTooLargeError" in said and "too large" in said and ROW[1].decode() in said
    assert f"({len(ROW[1])} bytes)" in said
    assert (sender.sent, sender.failed) == (2, 1)
    if rate == 1:  # one at a time: of none but it the broker did not say
        assert not sender.farewell()


def test_a_record_refused_before_it_is_sent_ends_the_run_too(clock, broker):
    broker.raises.append(NotAllowed("test"))
    with pytest.raises(Failure, match="TopicAuthorizationFailedError"):
        Sender(broker, "test", 1, clock).submit(ROW)


def test_a_record_that_expired_in_the_client_is_refused_not_waited_for(clock, broker):
    broker.errors[0] = KafkaTimeoutError("batch expired")
    sender = Sender(broker, "test", 1, clock)
    sender.submit(ROW)
    with pytest.raises(Failure, match="batch expired"):
        sender.settle(1)


def settle_too_early(sender, clock):
    """The answer comes in the moment in which the wait for it ends."""
    future = sender.line[0][1]

    def late(timeout):
        clock.now = future.at
        raise KafkaTimeoutError("timeout")

    get, future.get = future.get, late
    sender.settle(0.001)
    assert (sender.unacknowledged, sender.failed) == (1, 0)
    future.get = get


def test_an_acknowledgement_in_the_moment_the_wait_ends_is_no_refusal(clock, broker):
    sender = Sender(broker, "test", 1, clock)
    sender.submit(ROW)
    settle_too_early(sender, clock)
    sender.settle(0.001)
    assert (sender.unacknowledged, sender.sent) == (0, 1)


def test_an_error_in_the_moment_the_wait_ends_is_the_one_that_is_reported(clock, broker):
    broker.errors[0] = NotAllowed("test")
    sender = Sender(broker, "test", 1, clock)
    sender.submit(ROW)
    settle_too_early(sender, clock)
    with pytest.raises(Failure, match="TopicAuthorizationFailedError"):
        sender.settle(0.001)


def test_silence_is_said_after_2_s_then_every_30_s_and_so_is_its_end(clock, broker, lines):
    broker.down, broker.up = clock() + 1.5, clock() + 72
    sender = Sender(broker, "test", 1, clock)
    going(sender, ROW, clock, clock() + 80)
    said = lines()
    assert len(said) == 4
    assert all("no answer from the broker for" in line for line in said[:3])
    assert [int(line.split("for ")[1].split(" ")[0]) for line in said[:3]] == [2, 32, 62]
    assert "the broker answers again after 70" in said[3]


def test_a_partition_that_is_gone_ends_it_and_a_topic_that_is_gone_is_waited_for(clock, broker):
    broker.down, broker.up = clock(), clock() + 40
    broker.partitions = None
    sender = Sender(broker, "test", 1, clock)
    going(sender, ROW, clock, clock() + 30)
    broker.partitions = {1}
    with pytest.raises(Failure, match=r"topic test has no partition 0 any more.*Start again"):
        going(sender, ROW, clock, clock() + 5)


def test_a_slow_pace_is_not_silence(clock, lines):
    broker = Broker(clock, latency=1.2)
    sender = Sender(broker, "test", 0.01, clock)
    going(sender, ROW, clock, clock() + 500)
    assert sender.sent == 5
    assert lines() == []


def test_a_line_that_is_never_empty_is_no_silence_while_answers_come(clock, lines):
    broker = Broker(clock, latency=1.5, cost=0.0005)
    run(Sender(broker, "test", 0, clock), sample(ABC, 1), 20_000, GO)
    assert [line for line in lines() if "no answer" in line or "again" in line] == []


def test_a_broker_that_takes_nothing_is_silent_too(clock, broker, lines):
    broker.raises.extend([KafkaTimeoutError("no metadata")] * 10)
    sender = Sender(broker, "test", 0, clock)
    run(sender, iter([ROW] * 2), 1, GO)
    assert len([line for line in lines() if "no answer from the broker" in line]) == 1
    assert any("answers again" in line for line in lines())


def test_a_stop_waits_3_s_for_what_is_under_way_and_says_what_stays_open(clock, lines):
    broker = Broker(clock, latency=1)
    sender = Sender(broker, "test", 0, clock)
    for _ in range(4):
        sender.submit(ROW)
    stopped = SimpleNamespace(requested=True, check=lambda: None)
    run(sender, iter([ROW] * 9), math.inf, stopped)
    assert (sender.sent, sender.unacknowledged, len(broker.stored)) == (4, 0, 4)

    broker.down, broker.up = clock(), math.inf
    for _ in range(3):
        sender.submit(ROW)
    before = clock()
    run(sender, iter([ROW] * 9), math.inf, stopped)
    assert 3 <= clock() - before <= 3.5
    assert (sender.sent, sender.unacknowledged) == (4, 3)
    assert "3 more may or may not be in the topic" in sender.farewell()


def test_a_failure_of_the_client_that_is_no_answer_is_a_failure(clock, broker):
    broker.raises.append(KafkaError("odd"))
    with pytest.raises(Failure, match="odd"):
        run(Sender(broker, "test", 0, clock), iter([ROW]), 1, GO)


@pytest.mark.parametrize("error", [KeyError("odd"), AssertionError(), ValueError("deep")])
def test_an_error_that_the_client_does_not_expect_is_one_line_too(clock, broker, error):
    broker.raises.append(error)
    with pytest.raises(Failure, match=type(error).__name__):
        run(Sender(broker, "test", 0, clock), iter([ROW]), 1, GO)
    broker.errors[0] = error
    with pytest.raises(Failure, match=type(error).__name__):
        run(Sender(broker, "test", 0, clock), iter([ROW]), 1, GO)


@pytest.mark.parametrize("count", [1, 5])
def test_a_thread_that_dies_ends_the_run_while_rows_are_sent_or_waited_for(clock, broker, count):
    broker.down, broker.up = clock(), clock() + 3600
    began = clock()

    def check():
        if clock() > began + 10:
            raise Failure("the thread of the client ended unexpectedly")

    stop = SimpleNamespace(requested=False, check=check)
    with pytest.raises(Failure, match="ended unexpectedly"):
        run(Sender(broker, "test", 1, clock), iter([ROW] * 5), count, stop)
    assert clock() < began + 20


def test_with_a_limit_the_status_says_how_many_of_how_many_and_the_time_left(clock, lines):
    broker = Broker(clock, cost=0.01)
    run(Sender(broker, "test", 0, clock), sample(ABC, 1), 1000, GO)
    status = [line for line in lines() if line.startswith("sent ")]
    assert re.match(r"sent \d+ of 1000, [78] s left \| \d+\.\d/s \| unack", status[1])


# ------------------------------------------------------------------- lines of JSON from a pipe


@pytest.fixture
def piped():
    """What the producer makes of lines that a pipe gives."""

    def read(*lines, key=""):
        return [row for row in json_lines(io.BytesIO(b"".join(lines)), key) if row]

    return read


def test_a_line_is_sent_as_it_stands_without_its_end(piped):
    assert piped(
        b' {"a": 1.50,"b":\t[1e5]} \n', b'{"c":"\xc3\xbc"}\r\n', b"\n", b" \r\n", b"{}"
    ) == [
        (None, b' {"a": 1.50,"b":\t[1e5]} '),
        (None, b'{"c":"\xc3\xbc"}'),
        (None, b"{}"),
    ]


def test_the_key_is_the_field_as_text(piped):
    lines = [b'{"k":%s}\n' % text for text in (b'"\\u00fc"', b"1.50", b"true", b"null")]
    assert [key for key, _ in piped(*lines, b'{"x":1}\n', key="k")] == [
        *("ü".encode(), b"1.50", b"true", None, None)
    ]


@pytest.mark.parametrize(
    "line",
    [
        *(
            b"[1]",
            b"1",
            b"null",
            b'"x"',
            b"{",
            b"{'a':1}",
            b'{"a":NaN}',
            b'{"a":-Infinity}',
            b"{}{}",
        ),
        *(
            b'{"a":"\xe9"}',
            '{"a":1}'.encode("utf-16"),
            b"\xef\xbb\xbf{}",
            b'{"k":[1]}',
            b"[" * 99_999,
        ),
        b'{"k":"\\ud800"}',
    ],
)
def test_a_line_that_is_no_object_is_named_with_its_number(piped, line):
    with pytest.raises(Failure, match=r"--stdin: line 3 is no JSON object: .") as caught:
        piped(b"{}\n", b"\n", line + b"\n", b"{}\n", key="k")
    assert len(str(caught.value)) < 400


def test_a_line_that_is_too_long_is_named_with_the_limit(piped, monkeypatch):
    monkeypatch.setattr("kafka_producer.MAX_LINE", 10)
    assert piped(b'{"a": 12}\n') == [(None, b'{"a": 12}')]
    with pytest.raises(Failure, match="--stdin: line 2 has more than 10 bytes"):
        piped(b"{}\n", b'{"a": 1234}\n')


def test_a_bad_line_ends_the_run_after_all_before_it_are_acknowledged(clock):
    broker = Broker(clock, latency=30)
    good = [b'{"n":%d}' % number for number in range(5)]
    pipe = io.BytesIO(b"\n".join([*good, b"bad", b"{}"]))
    sender = Sender(broker, "test", 0, clock)
    with pytest.raises(Failure, match="line 6"):
        run(sender, json_lines(pipe, ""), math.inf, GO)
    assert [value for _, value in broker.stored] == good
    assert (sender.sent, len(sender.line)) == (5, 0)


def test_a_pipe_that_pauses_is_neither_caught_up_with_nor_silence(clock, broker, lines):
    sender = Sender(broker, "test", 10, clock)
    times = []

    def pipe():
        for _ in range(3):
            yield ROW
        for _ in range(100):
            clock.now += 1
            yield None
        for _ in range(20):
            times.append(clock())
            yield ROW

    for row in pipe():
        while not step(sender, row, clock.sleep):
            pass
    sender.settle(1)
    assert times[-1] - times[0] == pytest.approx(1.9, abs=0.15)
    assert sender.sent == 23 and lines() == []


def test_a_stop_while_the_pipe_gives_nothing_ends_the_run(clock, broker):
    stop = SimpleNamespace(requested=False, check=lambda: None)

    def pipe():
        yield ROW
        yield None
        stop.requested = True
        while True:
            yield None

    sender = Sender(broker, "test", 0, clock)
    run(sender, pipe(), math.inf, stop)
    assert (sender.sent, len(sender.line)) == (1, 0)


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), RuntimeError("odd")])
def test_a_pipe_that_cannot_be_read_is_one_line_after_all_rows_before_it(error):
    lines = deque([b"{}\n", b"{}\n"])

    def readline(_):
        if lines:
            return lines.popleft()
        raise error

    rows = json_lines(SimpleNamespace(readline=readline), "")
    given = []
    with pytest.raises(Failure, match=r"the input cannot be read: .*(Input|odd)") as caught:
        for row in rows:
            given.append(row)
    assert [row for row in given if row] == [(None, b"{}")] * 2
    assert len(caught.value.args) == 1


def test_at_most_16_lines_are_read_ahead():
    pipe = io.BytesIO(b"{}\n" * 1000)
    rows = json_lines(pipe, "")
    next(rows)
    time.sleep(0.2)  # it must not read on; that it had the time proves nothing else
    assert pipe.tell() <= 18 * len(b"{}\n")


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        ("name,qty\r\npear,1\r\n\r,5\r\n", [("pear", 1), (None, 5)]),
        ("name,qty\npear,1\n\r,5\n", [("pear", 1), (None, 5)]),
        ("name,qty\r plum,2\n", [(" plum", 2)]),
        ("name,qty\rpear,1\r plum,2\r fig,3\r\n", [("pear", 1), (" plum", 2), (" fig", 3)]),
        ("name,qty\npear,1\n plum,2\r fig,3\n", [("pear", 1), (" plum", 2), (" fig", 3)]),
        ("name,qty\rpear,1\r plum,2\n" + "pear,1\r plum,2\n" * 2, [("pear", 1), (" plum", 2)] * 3),
        ('name,qty\n"a\rb",1\r "x",2\n', [("a\rb", 1), (' "x"', 2)]),
    ],
)
def test_lines_that_end_in_different_ways_are_the_rows_that_they_look_like(tmp_path, content, rows):
    path = tmp_path / "mixed.csv"
    path.write_bytes(content.encode())
    values = [json.loads(value) for _, value in read_rows(path)]
    assert [(row["name"], row["qty"]) for row in values] == rows


def test_a_byte_order_mark_written_twice_is_one_clear_line(tmp_path):
    path = tmp_path / "twice.csv"
    path.write_bytes('\ufeff\ufeff"a,b",c\n1,2\n'.encode())
    with pytest.raises(SettingsError, match="second byte order mark"):
        read_rows(path)


@pytest.mark.parametrize(
    ("content", "line"), [('n\n""\n""\n1\n2\nx\n3\n4\n', 6), ('n\n" "\n\n1\n2\nx\n3\n', 6)]
)
def test_cells_of_blanks_in_quotes_are_lines_like_others(tmp_path, lines, content, line):
    path = tmp_path / "blanks.csv"
    path.write_text(content)
    read_rows(path)
    assert any(f"the first 'x' in line {line}" in said for said in lines())


def test_cells_of_blanks_make_no_column_of_numbers(tmp_path, lines):
    path = tmp_path / "blanks.csv"
    path.write_text('a,b\nx,1\n"  ",2\n" ",3\n')
    assert [value for _, value in read_rows(path)][1] == b'{"a": "  ", "b": 2}'
    assert lines() == []


@pytest.mark.parametrize("now", [None, "x,y\n1,2\n", ""])
def test_a_file_that_is_replaced_while_it_is_read_is_said(tmp_path, monkeypatch, now):
    path = tmp_path / "rows.csv"
    path.write_text("a,b,c\n" + "1,x,2\n" * 9)
    chunks = kafka_producer.chunks

    def replaced(path):
        yield from chunks(path)
        path.unlink()
        if now is not None:
            path.write_text(now)

    monkeypatch.setattr(kafka_producer, "chunks", replaced)
    with pytest.raises(SettingsError, match="was replaced or written while it was read"):
        read_rows(path)


def test_an_archive_of_several_files_is_said_as_that(tmp_path):
    path = tmp_path / "two.csv.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.csv", "a\n1\n")
        archive.writestr("__MACOSX/a.csv", "a\n1\n")
    with pytest.raises(SettingsError, match=r"an archive of several files\? .*unpack it"):
        read_rows(path)


def test_a_pipe_that_begins_with_a_byte_order_mark_is_read_without_it():
    rows = json_lines(io.BytesIO(b'\xef\xbb\xbf{"a":1}\r\n{"a":2}\n'), "")
    assert [row for row in rows if row] == [(None, b'{"a":1}'), (None, b'{"a":2}')]


def test_a_compacted_topic_that_refuses_a_record_without_a_key_is_explained(clock, broker):
    broker.errors[0] = for_code(87)()
    sender = Sender(broker, "test", 1, clock)
    sender.submit(ROW)
    why = r"InvalidRecordError.*cleanup\.policy=compact.*without a key"
    with pytest.raises(Failure, match=why):
        sender.settle(1)


@pytest.mark.parametrize("content", ['a,b\n"', 'a,b\n1,"2\n', 'a,b\r1,2\n,a\r, ,,"\n\n'])
def test_a_quote_that_nothing_closes_is_named_with_its_line(tmp_path, content):
    path = tmp_path / "open.csv"
    path.write_bytes(content.encode())
    with pytest.raises(SettingsError, match=r"has a quote in line \d that nothing closes"):
        read_rows(path)
