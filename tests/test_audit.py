"""The audit: clean is clean, and what is wrong is named."""

import asyncio
import logging
from hashlib import md5
from types import SimpleNamespace
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kafka import OffsetAndMetadata

from config import Failure, Settings, TransactionMarker
from infra.audit import NAME, Audit, Ledger, digest
from kafka_consumer import object_name


class Record(NamedTuple):
    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: tuple = ()


def some_settings(**environ):
    return Settings.from_env({"S3_BUCKET": "bucket", **environ}, required="S3_BUCKET")


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


@given(st.sampled_from(["", "raw/", "a b"]), st.integers(0, 10**6), st.integers(0, 2**63 - 1))
def test_a_name_says_which_record_it_is_of(prefix, partition, offset):
    match = NAME.fullmatch(object_name(prefix, partition, offset), len(prefix))
    assert (int(match[1] or 0), int(match[2])) == (partition, offset)


@pytest.mark.parametrize(
    "name",
    [
        "stock_market_.json",
        "stock_market_01.json",
        "stock_market_-1.json",
        "stock_market_1.json\n",
        "stock_market_1.json.bak",
        "partition=0/stock_market_1.json",
        "partition=01/stock_market_1.json",
        "x/stock_market_1.json",
        "stock_market_\u0661.json",
    ],
)
def test_no_other_name_is_taken_for_a_records(name):
    assert not NAME.fullmatch(name)


def ledger_of(begin, values):
    """A ledger of a partition whose values begin at `begin`; `...` is a hole."""
    ledger = Ledger(begin, begin + len(values), begin + len(values))
    for offset, value in enumerate(values, begin):
        if value is not ...:
            ledger.write(Record("test", 0, offset, None, value))
    return ledger


def test_a_ledger_knows_what_is_missing_in_ranges():
    ledger = ledger_of(10, [b"a", b"b", b"c", ..., ..., b"d", b"e", ..., ..., b"f"])
    assert list(ledger.missing()) == [(10, 12), (15, 16), (19, 19)]
    ledger.settle(11, Ledger.OBJECT)
    ledger.settle(19, Ledger.LETTER)
    assert list(ledger.missing()) == [(10, 10), (12, 12), (15, 16)]


def test_a_ledger_tells_values_apart_null_and_empty_too():
    values = {5: b"a", 6: b"", 7: None}
    ledger = ledger_of(5, list(values.values()))
    for offset, value in values.items():
        for other in (b"a", b"", None, b"b"):
            assert ledger.same(offset, digest(other)) == (value == other)
    assert [offset in ledger for offset in (4, 5, 7, 8)] == [False, True, True, False]


def test_a_group_behind_retention_has_an_empty_ledger():
    ledger = Ledger(100, 7, 120)
    assert (len(ledger.marks), list(ledger.missing()), 7 in ledger) == (0, [], False)


class Audited:
    """A topic, its dead letters and a bucket, with a record of every kind; what is in them can be
    spoilt before `run`."""

    def __init__(self, lines, **environ):
        self.lines = lines
        self.settings = some_settings(S3_PREFIX="raw/", **environ)
        # By partition and offset: the value, ... for a hole in the log.
        self.values = {0: [b'{"n": %d}' % n for n in range(20)], 1: [], 2: [b'{"p": 2}'] * 3}
        self.values[0][4], self.values[0][5] = None, b"bad"
        self.markers = set()  # (partition, offset)
        self.letters = [self.letter(4), self.letter(5)]
        self.committed = {0: 15, 1: None, 2: 3}
        self.metadata = {}
        self.begins = {0: 0, 1: 0, 2: 0}
        self.objects = {
            object_name("raw/", partition, offset): value
            for partition, values in self.values.items()
            for offset, value in enumerate(values)
            if value not in (None, b"bad") and offset < self.committed[partition]
        }
        self.etag = lambda value: f'"{md5(value).hexdigest()}"'
        self.read = []

    def letter(self, offset, **headers):
        texts = {"source.topic": b"test", "source.partition": b"0", "source.offset": b"%d" % offset}
        texts |= headers
        return self.values[0][offset], list(texts.items())

    def run(self, stop=False):
        """(exit code, what was printed)."""
        before = len(self.lines("records"))
        audit = Audit(self.settings, self, Sources(self), SimpleNamespace(requested=stop))
        code = asyncio.run(audit.run())
        return code, "\n".join(self.lines("records")[before:])

    # As a bucket:
    name = "bucket"

    async def pages(self):
        names = sorted(name for name in self.objects if name.startswith("raw/"))
        for start in range(0, len(names), 5):
            yield [
                {"Key": name, "ETag": self.etag(self.objects[name])}
                for name in names[start : start + 5]
            ]
        self.meanwhile()
        yield []

    def meanwhile(self):
        """Happens between the listing and the end of the audit."""

    async def get(self, name):
        self.read.append(name)
        return self.objects.get(name)


class Sources:
    """A consumer of the audited topics."""

    def __init__(self, audited):
        self.audited = audited
        self.at = {}

    def records(self, tp):
        if tp.topic == "error_topic":
            return [
                Record(tp.topic, 0, offset, None, *letter)
                for offset, letter in enumerate(self.audited.letters)
            ]
        return [
            Record(tp.topic, tp.partition, offset, self.key(tp.partition, offset), value, [])
            for offset, value in enumerate(self.audited.values.get(tp.partition, []))
        ]

    def key(self, partition, offset):
        marker = (partition, offset) in self.audited.markers
        return TransactionMarker(b"\0\0\0\1") if marker else None

    def partitions_for_topic(self, topic):
        return {0, 1, 2} if topic == "test" else {0}

    def beginning_offsets(self, tps):
        return {tp: self.audited.begins[tp.partition] if tp.topic == "test" else 0 for tp in tps}

    def end_offsets(self, tps):
        return {tp: len(self.records(tp)) for tp in tps}

    def committed(self, tp, metadata=False):
        offset = self.audited.committed[tp.partition]
        if offset is None or not metadata:
            return offset
        return OffsetAndMetadata(offset, self.audited.metadata.get(tp.partition, ""))

    def assign(self, tps):
        self.at = dict.fromkeys(tps)

    def seek(self, tp, offset):
        self.at[tp] = offset

    def position(self, tp):
        return self.at[tp]

    def poll(self, timeout_ms):
        answer = {}
        for tp, at in self.at.items():
            found = [record for record in self.records(tp)[at : at + 7]]
            self.at[tp] += len(found)
            found = [record for record in found if record.value is not ...]
            if found:
                answer[tp] = found
        return answer

    def close(self, autocommit):
        assert not autocommit


@pytest.fixture
def audited(lines):
    return Audited(lines)


CLEAN = "nothing missing, nothing twice, every byte the same"


def test_the_audit_of_a_whole_bucket_finds_nothing_and_reads_no_object(audited):
    code, said = audited.run()
    assert code == 0
    assert said.endswith(f"audit: 16 objects, 2 dead letters: {CLEAN}")
    assert audited.read == []


def test_the_audit_finds_missing_objects(audited):
    for offset in (0, 7, 8, 14):
        del audited.objects[f"raw/stock_market_{offset}.json"]
    code, said = audited.run()
    assert code == 1
    for first, last in ((0, 0), (7, 8), (14, 14)):
        assert f"MISSING: test/0 offsets {first} to {last}" in said
    assert said.endswith(": 4 missing")


def test_the_audit_finds_a_missing_dead_letter(audited):
    audited.letters.pop()
    code, said = audited.run()
    assert code == 1
    assert "MISSING: test/0 offsets 5 to 5: no object, no dead letter" in said


@pytest.mark.parametrize(
    "headers",
    [
        {"source.topic": b"another"},
        {"source.partition": b"2"},
        {"source.partition": b"7"},
        {"source.partition": None},
        {"source.offset": b"6"},
        {"source.offset": b"1000000"},
        {"source.offset": b"five"},
    ],
)
def test_a_dead_letter_of_another_record_does_not_count(audited, headers):
    audited.letters[1] = audited.letter(5, **headers)
    assert "MISSING: test/0 offsets 5 to 5" in audited.run()[1]


def test_a_dead_letter_with_other_bytes_does_not_count(audited):
    audited.letters[1] = (b"other", audited.letters[1][1])
    assert "MISSING: test/0 offsets 5 to 5" in audited.run()[1]


def test_a_dead_letter_sent_again_is_counted_and_no_problem(audited):
    audited.letters.append(audited.letters[0])
    code, said = audited.run()
    assert code == 0
    assert "1 dead letters sent again" in said


def test_the_audit_finds_other_bytes(audited):
    audited.objects["raw/stock_market_3.json"] = b'{"n": 4}'
    code, said = audited.run()
    assert code == 1
    assert "DIFFERENT: raw/stock_market_3.json: other bytes than its record" in said
    assert said.endswith(": 1 different")


def test_objects_whose_etag_is_no_md5_are_read(audited):
    audited.etag = lambda value: '"9b2cf535f27731c974343645a3985328-2"'
    audited.objects["raw/stock_market_3.json"] = b"{}"
    code, said = audited.run()
    assert (code, said.count("DIFFERENT")) == (1, 1)
    assert len(audited.read) == len(audited.objects)


def test_an_object_that_is_removed_before_it_is_read_is_missing(audited):
    audited.etag = lambda value: '"9b2cf535f27731c974343645a3985328-2"'
    get = audited.get

    async def without(name):
        return None if name.endswith("_3.json") else await get(name)

    audited.get = without
    code, said = audited.run()
    assert code == 1
    assert "MISSING: test/0 offsets 3 to 3" in said


@pytest.mark.parametrize(
    "name",
    [
        "stock_market_20.json",  # the topic ends at 20
        "stock_market_007.json",
        "stock_market_x.json",
        "partition=1/stock_market_0.json",  # an empty partition
        "partition=9/stock_market_0.json",
        "partition=0/stock_market_0.json",
        "stock_market_5.json",  # a dead letter
    ],
)
def test_the_audit_finds_a_stray_object(audited, name):
    audited.objects[f"raw/{name}"] = b"{}"
    code, said = audited.run()
    assert code == 1
    assert f"STRAY: raw/{name}" in said
    assert said.endswith(": 1 stray")


def test_an_object_written_while_the_audit_runs_is_no_stray(audited):
    audited.objects["raw/stock_market_20.json"] = b"{}"
    audited.meanwhile = lambda: audited.values[0].append(b"{}")
    code, said = audited.run()
    assert code == 0
    assert "1 objects beyond the committed position" in said


def test_objects_under_way_of_times_past_and_of_others_are_counted_and_no_problem(audited):
    audited.begins[0] = 3  # retention
    audited.objects["raw/stock_market_17.json"] = audited.values[0][17]
    audited.objects["raw/notes.txt"] = b""
    audited.objects["elsewhere/stock_market_0.json"] = b"{}"
    code, said = audited.run()
    assert code == 0
    assert "3 objects that outlive their records" in said
    assert "1 objects beyond the committed position" in said
    assert "1 other objects under the prefix" in said


def test_a_position_beyond_the_end_of_the_topic_is_a_problem(audited):
    audited.committed[0] = 25
    audited.objects |= {f"raw/stock_market_{n}.json": audited.values[0][n] for n in range(15, 20)}
    code, said = audited.run()
    assert code == 1
    assert said.endswith(": 5 missing")


def test_without_a_committed_position_there_is_nothing_to_audit(audited):
    audited.committed = dict.fromkeys(audited.committed)
    with pytest.raises(Failure, match="KAFKA_GROUP_ID=python-consumer-group"):
        audited.run()


def test_an_audit_that_is_stopped_proves_nothing(audited):
    with pytest.raises(Failure, match="nothing is proven"):
        audited.run(stop=True)


# --------------------------------------------------------------- holes and markers in the log


def test_an_object_whose_record_was_compacted_away_outlives_it(audited):
    for offset in (2, 3, 9):
        audited.values[0][offset] = ...
    code, said = audited.run()
    assert code == 0
    assert "3 objects that outlive their records" in said


def test_a_record_that_was_compacted_away_is_not_missing(audited):
    audited.values[0][2] = ...
    del audited.objects["raw/stock_market_2.json"]
    assert audited.run()[0] == 0


def test_a_transaction_marker_is_neither_missing_nor_a_record(audited):
    audited.markers.add((0, 2))
    audited.values[0][2] = bytes(6)
    del audited.objects["raw/stock_market_2.json"]
    code, said = audited.run()
    assert code == 0
    assert "15 objects, 2 dead letters, 1 transaction markers" in said


def test_an_object_at_the_offset_of_a_marker_is_a_stray(audited):
    audited.markers.add((0, 2))
    code, said = audited.run()
    assert code == 1
    assert "STRAY: raw/stock_market_2.json: at its offset is a transaction marker" in said
