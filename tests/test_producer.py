"""What goes in: CSV rows as JSON, the choice of rows, the pace, and every future looked at."""

import csv
import inspect
import json
import logging
import math
import tempfile
import time
from collections import Counter, deque
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kafka.errors import KafkaError, KafkaTimeoutError, MessageSizeTooLargeError
from kafka.errors import TopicAuthorizationFailedError as NotAllowed

import kafka_producer
from config import Failure, SettingsError
from kafka_producer import EACH, UNACKNOWLEDGED, Sender, read_rows, run, sample, step

ROWS = Path(kafka_producer.__file__).parent / "tests/data/indexProcessed.csv"


# ------------------------------------------------------------------------------------- CSV to JSON


def strict(value):
    """JSON as others read it: no NaN, no Infinity; a number's digits are kept."""

    def refuse(text):
        raise ValueError(text)

    assert b"\n" not in value and b"\r" not in value
    return json.loads(value.decode("utf-8"), parse_constant=refuse)


@pytest.fixture
def rows(tmp_path):
    """Reads a CSV given as text or bytes; returns its rows as Python objects."""

    def read(content, key_column=""):
        file = tmp_path / "some.csv"
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return [strict(value) for _, value in read_rows(file, key_column)]

    return read


def test_every_number_of_every_committed_row_is_the_same_number():
    with ROWS.open(encoding="utf-8", newline="") as file:
        source = list(csv.DictReader(file))
    found = [strict(value) for _, value in read_rows(ROWS)]
    assert len(found) == len(source) > 400
    for row, cells in zip(found, source, strict=True):
        assert list(row) == list(cells)
        for name, text in cells.items():
            if name in ("Index", "Date"):
                assert row[name] == text
            else:
                assert type(row[name]) in (int, float) and row[name] == float(text)


MISSES = ("", "NA", "nan", "NULL", "None", "N/A")
MISSING = st.sampled_from(MISSES)
WORD = st.text(st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from(',"\n;\t'))
INTEGER = st.integers() | st.integers(2**52, 2**66) | st.integers(-(10**40), 10**40)
FLOAT = st.floats(allow_nan=False, allow_infinity=False)
DIGITS = st.from_regex(
    r"[+-]?(0|[1-9][0-9]{0,20})\.[0-9]{1,25}([eE][+-]?[0-9]{1,2})?", fullmatch=True
)


@st.composite
def tables(draw):
    """A CSV's columns: name, whether it holds numbers, cells."""
    height = draw(st.integers(1, 6))
    columns = []
    for at in range(draw(st.integers(2, 4))):
        number, cells = draw(
            st.sampled_from(
                [
                    (True, INTEGER.map(str)),
                    (True, FLOAT.map(repr)),
                    (True, DIGITS),
                    (True, DIGITS | INTEGER.map(str)),
                    (False, WORD.map("w{}".format)),
                ]
            )
        )
        cells = draw(st.lists(cells | MISSING, min_size=height, max_size=height))
        columns.append((f"{at}{draw(WORD)}", number, cells))
    return columns


@settings(deadline=None, max_examples=60)  # the machine may be busy
@given(tables())
@example([("0", True, ["18446744073709551615", ""]), ("1", True, ["1", "2"])])
@example([("0", True, ["18446744073709551616", "0.0"]), ("1", True, ["18446744073709551615"] * 2)])
@example(
    [("0", True, ["9007199254740993", "NA"]), ("1", True, ["5e-324", "1.7976931348623157e308"])]
)
def test_in_any_table_a_number_is_the_same_number_a_word_the_same_and_missing_is_null(columns):
    height = len(columns[0][2])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "made.csv"
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(name for name, _, _ in columns)
            writer.writerows(zip(*(cells for _, _, cells in columns), strict=True))
        wanted = []
        for at in range(height):
            row = {name: (number, cells[at]) for name, number, cells in columns}
            if any(text not in MISSES for _, text in row.values()):
                wanted.append(row)
        if not wanted:
            with pytest.raises(SettingsError, match="no rows"):
                read_rows(path)
            return
        found = [strict(value) for _, value in read_rows(path)]
    whole = [
        all(text.lstrip("+-").isdigit() for text in cells if text not in MISSES)
        for _, _, cells in columns
    ]
    assert len(found) == len(wanted)
    for row, cells in zip(found, wanted, strict=True):
        assert list(row) == list(cells)
        for at, (got, (number, text)) in enumerate(zip(row.values(), cells.values(), strict=True)):
            if text in MISSES:
                assert got is None
            elif not number:
                assert got == text
            elif whole[at]:
                assert got == int(text)
            else:
                assert got == float(text)


def test_whole_numbers_stay_whole_in_a_column_with_gaps(rows):
    assert rows("a,b\n1,x\n,y\n9007199254740993,z\n") == [
        {"a": 1, "b": "x"},
        {"a": None, "b": "y"},
        {"a": 9007199254740993, "b": "z"},
    ]


def test_whole_numbers_beyond_64_bits_stay_numbers(rows):
    big = 10**40 + 7
    assert rows(f"a,b,c\n{2**64 - 1},1,{big}\nNA,2,-{big}\n3,3,\n") == [
        {"a": 2**64 - 1, "b": 1, "c": big},
        {"a": None, "b": 2, "c": -big},
        {"a": 3, "b": 3, "c": None},
    ]


def test_the_numbers_that_pandas_marks_a_gap_with_stay_numbers(rows):
    least, greatest = -(2**63), 2**64 - 1
    assert rows(f"a,b,c\n{least},{greatest},{greatest + 1}\n,7,0.5\n0,,\n") == [
        {"a": least, "b": greatest, "c": float(greatest + 1)},
        {"a": None, "b": 7, "c": 0.5},
        {"a": 0, "b": None, "c": None},
    ]
    assert rows(f"a,b\n1,{greatest}\n") == [{"a": 1, "b": greatest}]


def test_missing_is_null_and_never_nan(rows):
    found = rows("text,number\nx,1.5\n,\nNA,NaN\nN/A,2\n,null\ny,\n")
    assert found == [
        {"text": "x", "number": 1.5},
        {"text": None, "number": 2},
        {"text": "y", "number": None},
    ]


def test_rows_without_any_value_are_dropped_and_counted(rows, caplog):
    assert rows("a,b\n1,2\n,\nNA,\n3,4\n") == [{"a": 1, "b": 2}, {"a": 3, "b": 4}]
    assert [record.getMessage() for record in caplog.records] == [
        "2 of 4 rows have no value at all and are left out"
    ]


def test_nothing_is_said_of_a_file_without_such_rows(rows, caplog):
    rows("a,b\n1,2\n")
    assert not caplog.records


def test_a_byte_order_mark_is_no_part_of_the_first_name(rows):
    assert rows("\ufeffIndex,b\nHSI,1\n") == [{"Index": "HSI", "b": 1}]


def test_quoted_commas_quotes_and_line_breaks_stay_in_their_cell(rows):
    assert rows('a,"b, c"\n"x, y","say ""hi"""\n"two\nlines",z\n') == [
        {"a": "x, y", "b, c": 'say "hi"'},
        {"a": "two\nlines", "b, c": "z"},
    ]


def test_other_columns_keep_their_order_and_their_types(rows):
    found = rows("z,a,größe,flag\n2008-01-02,007,€,True\n2009-01-02,8,ß,False\n")
    assert found == [
        {"z": "2008-01-02", "a": 7, "größe": "€", "flag": True},
        {"z": "2009-01-02", "a": 8, "größe": "ß", "flag": False},
    ]
    assert list(found[0]) == ["z", "a", "größe", "flag"]


def test_text_is_sent_as_utf8_not_escaped(tmp_path):
    (tmp_path / "x.csv").write_text("a\n日経\n", encoding="utf-8")
    assert read_rows(tmp_path / "x.csv") == [(None, '{"a": "日経"}'.encode())]


def test_a_long_column_has_one_type_though_a_word_comes_late(rows):
    width = 64  # pandas reads a wide table in shorter parts
    header = ",".join(f"c{number}" for number in range(width))
    found = rows(f"{header}\n" + f"{'1.50,' * (width - 1)}2\n" * 9_000 + f"x{',3' * (width - 1)}\n")
    assert {row["c0"] for row in found} == {"1.50", "x"}
    assert {type(row["c1"]) for row in found} == {float}


def test_the_key_is_the_column_that_was_asked_for(tmp_path):
    file = tmp_path / "x.csv"
    file.write_text("Index,n\nHSI,1\nÜ,2\n,3\n", encoding="utf-8")
    assert [key for key, _ in read_rows(file)] == [None, None, None]
    assert [key for key, _ in read_rows(file, "Index")] == [b"HSI", "Ü".encode(), None]
    assert [key for key, _ in read_rows(file, "n")] == [b"1", b"2", b"3"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "No columns"),
        (b"a,b\n", "no rows"),
        (b"a,b\n,\n,\n", "no rows"),
        ("a,b\né,1\n".encode("latin-1"), "utf-8"),
        ("a,b\n1,2\n".encode("utf-16"), "utf-8"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "utf-8"),
        (b"a,b\n1,2\n3,4,5\n", "line 3"),
        (b"a,b\n1,2,3\n4,5,6\n", "more fields than its header"),
        (b"a,b\n1,2\n3,inf\n", "column 'b' holds inf"),
        (b"a,b\n1,2\n3,-Infinity\n", "column 'b' holds -inf"),
        (b"a,b\n1,2\n3,1e999\n", "column 'b' holds inf"),
        (b'a,b\n1,"2\n', "EOF inside string"),
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


GO = SimpleNamespace(requested=False)
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
            assert sender.waiting == 1
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
    run(Sender(broker, "test", EACH, clock), iter([ROW] * 3), 2, GO)
    assert lines("records") == [
        "[Sent] Topic: test | Partition: 0 | Offset: 0",
        '   Content: {"Index": "ü"}',
        "[Sent] Topic: test | Partition: 0 | Offset: 1",
        '   Content: {"Index": "ü"}',
    ]
    about = [record for record in caplog.records if record.name == "records"][-1]
    assert (about.topic, about.partition, about.offset, about.key) == ("test", 0, 1, "HSI")


@pytest.mark.parametrize("rate", [0, EACH + 1])
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
        most = max(most, sender.waiting)
    assert most == UNACKNOWLEDGED
    assert broker.stored == many


def test_the_run_ends_when_as_many_as_asked_are_acknowledged(clock, broker):
    sender = Sender(broker, "test", 0, clock)
    run(sender, sample(ABC, 1), 250, GO)
    assert (sender.begun, sender.sent, sender.waiting) == (250, 250, 0)
    assert broker.stored == list(islice(sample(ABC, 1), 250))
    assert sender.unsaid() == ""


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
            if sender.waiting > 5:
                sender.look(1)
    said = str(caught.value)
    assert "MessageSizeTooLargeError" in said and "too large" in said and ROW[1].decode() in said
    assert f"({len(ROW[1])} bytes)" in said
    assert (sender.sent, sender.failed) == (2, 1)


def test_a_record_refused_before_it_is_sent_ends_the_run_too(clock, broker):
    broker.raises.append(NotAllowed("test"))
    with pytest.raises(Failure, match="TopicAuthorizationFailedError"):
        Sender(broker, "test", 1, clock).send(ROW)


def test_a_record_that_expired_in_the_client_is_refused_not_waited_for(clock, broker):
    broker.errors[0] = KafkaTimeoutError("batch expired")
    sender = Sender(broker, "test", 1, clock)
    sender.send(ROW)
    with pytest.raises(Failure, match="batch expired"):
        sender.look(1)


def test_an_acknowledgement_in_the_moment_the_wait_ends_is_no_refusal(clock, broker):
    sender = Sender(broker, "test", 1, clock)
    sender.send(ROW)
    future = sender.waiting_for[0][0]

    def late(timeout):
        clock.now = future.at
        raise KafkaTimeoutError("timeout")

    get, future.get = future.get, late
    sender.look(0.001)
    assert (sender.waiting, sender.failed) == (1, 0)
    future.get = get
    sender.look(0.001)
    assert (sender.waiting, sender.sent) == (0, 1)


def test_silence_is_said_after_2_s_then_every_30_s_and_so_is_its_end(clock, broker, lines):
    broker.down, broker.up = clock() + 1.5, clock() + 72
    sender = Sender(broker, "test", 1, clock)
    going(sender, ROW, clock, clock() + 80)
    said = lines()
    assert len(said) == 4
    assert all("no answer from the broker for" in line for line in said[:3])
    assert [int(line.split("for ")[1].split(" ")[0]) for line in said[:3]] == [2, 32, 62]
    assert "the broker answers again after 70" in said[3]


def test_a_slow_pace_is_not_silence(clock, lines):
    broker = Broker(clock, latency=1.2)
    sender = Sender(broker, "test", 0.01, clock)
    going(sender, ROW, clock, clock() + 500)
    assert sender.sent == 5
    assert lines() == []


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
        sender.send(ROW)
    stopped = SimpleNamespace(requested=True)
    run(sender, iter([ROW] * 9), math.inf, stopped)
    assert (sender.sent, sender.waiting, len(broker.stored)) == (4, 0, 4)

    broker.down, broker.up = clock(), math.inf
    for _ in range(3):
        sender.send(ROW)
    before = clock()
    run(sender, iter([ROW] * 9), math.inf, stopped)
    assert 3 <= clock() - before <= 3.5
    assert (sender.sent, sender.waiting) == (4, 3)
    assert "3 more may or may not be in the topic" in sender.unsaid()


def test_a_failure_of_the_client_that_is_no_answer_is_a_failure(clock, broker):
    broker.raises.append(KafkaError("odd"))
    with pytest.raises(Failure, match="odd"):
        run(Sender(broker, "test", 0, clock), iter([ROW]), 1, GO)
