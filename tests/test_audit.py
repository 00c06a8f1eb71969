"""The audit: clean is clean, and what is wrong is named."""

import asyncio
import json
import logging
import os
import random
import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from hashlib import md5, sha256
from types import SimpleNamespace

import pytest
from aiohttp import web
from hypothesis import HealthCheck, given
from hypothesis import settings as with_settings
from hypothesis import strategies as st
from kafka import OffsetAndMetadata
from kafka.record import MemoryRecords
from kafka.record.default_records import DefaultRecordBatchBuilder

from config import Failure, KafkaClient, Settings, TransactionMarker, is_marker, output
from infra.audit import (
    NAME,
    Audit,
    Folder,
    Ledger,
    Seal,
    Verify,
    digest,
    finished,
    lost_ranges,
    open_bucket,
)
from kafka_consumer import object_name
from tests.fakes import Record


def some_settings(**environ):
    return Settings.from_env({"S3_BUCKET": "bucket", **environ})


@pytest.fixture
def lines(caplog):
    """What was printed."""
    caplog.set_level(logging.INFO)

    def said():
        return [record.getMessage() for record in caplog.records if record.name == output.name]

    said.clear = caplog.clear
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


LONG_AGO = datetime(2026, 1, 1, tzinfo=UTC)


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
        self.modified = {}  # key -> time, of what was not there from the beginning

    def letter(self, offset, **headers):
        texts = {"source.topic": b"test", "source.partition": b"0", "source.offset": b"%d" % offset}
        texts |= headers
        return self.values[0][offset], list(texts.items())

    def run(self, stop=False, sealing=False):
        """(exit code, what was printed)."""
        stop = SimpleNamespace(requested=stop)
        return self.said(Audit(self.settings, self, Sources(self), stop, sealing).run())

    def seal(self):
        return self.run(sealing=True)

    def verify(self, root=None):
        return self.said(Verify(self.settings, self, SimpleNamespace(requested=False)).run(root))

    def said(self, proof):
        self.lines.clear()
        code = asyncio.run(proof)
        return code, "\n".join(self.lines())

    def put(self, key, value, days=1):
        """Change an object, so many days from now."""
        self.objects[key] = value
        self.modified[key] = datetime.now(UTC) + timedelta(days=days)

    # As a bucket:
    name = where = "bucket"

    async def create(self, key, value):
        if self.objects.setdefault(key, value) != value:
            raise Failure("another audit has made it")

    async def pages(self, Prefix="raw/"):
        names = sorted(name for name in self.objects if name.startswith(Prefix))
        for start in range(0, len(names), 5):
            yield [
                {
                    "Key": name,
                    "ETag": self.etag(self.objects[name]),
                    "LastModified": self.modified.get(name, LONG_AGO),
                }
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
        return {"test": {0, 1, 2}, "error_topic": {0}}.get(topic)

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
            if at is None:  # retention has removed what was to come
                self.at[tp] = self.audited.begins[tp.partition]
                return {}
            if tp.topic == "test" and 0 < at < self.audited.begins[tp.partition]:
                self.at[tp] = None
                return {}
            found = [record for record in self.records(tp)[at : at + 7]]
            self.at[tp] += len(found)
            found = [record for record in found if record.value is not ...]
            if found:
                answer[tp] = found
        return answer

    def close(self, autocommit):
        assert not autocommit


def batch_of(records, control):
    """Records as the broker hands them out, parsed as the client parses them."""
    builder = DefaultRecordBatchBuilder(2, 0, False, -1, -1, -1, 10_000)
    for offset, (key, value) in enumerate(records):
        builder.append(offset, 0, key, value, [])
    buffer = bytearray(builder.build())
    buffer[22] |= 0x20 if control else 0  # the attributes' low byte
    return list(MemoryRecords(bytes(buffer)).next_batch())


@pytest.mark.skipif(not KafkaClient, reason="kafka-python 3 delivers no markers")
def test_the_header_of_the_batch_alone_makes_a_transaction_marker():
    same = [(b"\0\0\0\1", bytes(6)), (b"\0\0\0\0", bytes(6)), (None, b"{}")]
    for control in (True, False):
        found = batch_of(same, control)
        assert [is_marker(record) for record in found] == [control] * 3
        assert [(record.key or None, record.value) for record in found] == same
        assert [record.offset for record in found] == [0, 1, 2]


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


def test_what_retention_removed_before_the_position_reached_it_is_lost(audited):
    """The consumer was away, and has not been started since: it could not note it."""
    for name in [name for name in audited.objects if name.startswith("raw/stock_market_")]:
        del audited.objects[name]
    audited.objects |= {f"raw/stock_market_{n}.json": audited.values[0][n] for n in (12, 16)}
    audited.committed[0], audited.begins[0] = 12, 18
    code, said = audited.run()
    assert code == 1
    assert "LOST: test/0 offsets 13 to 15" in said and "LOST: test/0 offsets 17 to 17" in said
    assert "checked test/0: 0 records, offsets 18 up to the committed position 12 (end 20)" in said
    assert said.endswith(": 4 lost")


def test_a_dead_letter_topic_that_is_not_there_is_named(audited, caplog):
    audited.settings = replace(audited.settings, kafka_dlq_topic="eror_topic")
    assert audited.run()[0] == 1
    assert "KAFKA_DLQ_TOPIC=eror_topic does not exist" in caplog.text


def test_without_a_committed_position_there_is_nothing_to_audit(audited):
    audited.committed = dict.fromkeys(audited.committed)
    with pytest.raises(Failure, match="KAFKA_GROUP_ID=python-consumer-group"):
        audited.run()


def test_an_audit_whose_lines_cannot_be_written_has_proven_nothing_to_anyone(monkeypatch):
    async def proof():
        return 0

    assert finished(proof(), SimpleNamespace()) == 0
    full = logging.StreamHandler()
    full.failed = True
    monkeypatch.setattr(output, "handlers", [full])
    assert finished(proof(), SimpleNamespace()) == 1


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


def test_what_retention_removes_while_the_topic_is_read_is_no_problem(audited):
    real = Sources.poll

    def poll(self, timeout_ms):
        found = real(self, timeout_ms)
        if found and audited.begins[0] == 0:
            audited.begins[0] = 12  # after the first seven records
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sources, "poll", poll)
        code, said = audited.run()
    assert code == 0
    assert "5 objects that outlive their records" in said


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


# --------------------------------------------------------------------------- what the audit knows


def test_what_the_consumer_notes_with_its_commit_is_read():
    assert lost_ranges("lost 100-199") == [(100, 199)]
    assert lost_ranges("lost 0-0,5-7") == [(0, 0), (5, 7)]
    for other in ("", None, "lost", "lost 5", "lost 5-6,", "somebody's note", "lost 5-6 and more"):
        assert lost_ranges(other) == []


def test_records_that_retention_removed_before_they_were_written_are_named(audited):
    audited.begins[0] = 9
    audited.metadata[0] = "lost 2-3,6-12"
    for offset in (2, 6, 7, 8):
        del audited.objects[f"raw/stock_market_{offset}.json"]
    code, said = audited.run()
    assert code == 1
    assert "LOST: test/0 offsets 2 to 2: retention removed them before they were written" in said
    assert "LOST: test/0 offsets 6 to 8" in said
    assert said.endswith(": 4 lost")  # 3 has its object, the topic has 9 to 12


def test_a_range_of_lost_records_may_hold_some_that_were_not(sealed):
    """The consumer merges its oldest ranges when they become too many."""
    sealed.values[0] += [b"{}"] * 10
    sealed.begins[0] = sealed.committed[0] = 30
    sealed.metadata[0] = "lost 3-28"
    sealed.objects["raw/stock_market_25.json"] = b"{}"
    code, said = sealed.run()
    assert code == 1
    lost = [line for line in said.splitlines() if line.startswith("LOST")]
    assert [re.search(r"offsets (\d+ to \d+)", line)[1] for line in lost] == [
        "20 to 24",
        "26 to 28",
    ]


def test_an_audit_that_could_compare_nothing_is_no_proof(audited):
    audited.committed = {0: 0, 1: None, 2: 0}
    audited.objects.clear()
    with pytest.raises(Failure, match="nothing was checked: topic test has 23 records"):
        audited.run()


# ------------------------------------------------------------------------------------------ seals


@pytest.fixture
def sealed(audited):
    """A bucket with two seals of partition 0 (offsets 0 to 14 and 15 to 19) and one of 2; the
    records are gone."""
    assert audited.seal()[0] == 0
    audited.committed[0] = 20
    audited.objects |= {f"raw/stock_market_{n}.json": audited.values[0][n] for n in range(15, 20)}
    code, said = audited.seal()
    assert code == 0
    audited.root = re.search("root ([0-9a-f]{64})", said)[1]
    audited.begins |= {0: 20, 2: 3}
    audited.read.clear()
    return audited


FIRST, SECOND, OTHER = (
    "raw/_seals/partition=0/0-14.json",
    "raw/_seals/partition=0/15-19.json",
    "raw/_seals/partition=2/0-2.json",
)
ALL_THERE = "every sealed object is there, every byte the same"


def test_a_seal_says_what_was_proven_and_anyone_can_compute_its_root(sealed):
    seal = json.loads(sealed.objects[FIRST])
    assert (seal["topic"], seal["partition"], seal["first"], seal["last"]) == ("test", 0, 0, 14)
    assert (seal["objects"], seal["dead_letters"], seal["kinds"]) == (13, 2, "4o2d9o")
    lines = [
        f"{n} {'d' if n in (4, 5) else 'o'} "
        + ("00" * 32 if value is None else sha256(value).hexdigest())
        + "\n"
        for n, value in enumerate(sealed.values[0][:15])
    ]
    assert seal["root"] == sha256("".join(lines).encode()).hexdigest()
    assert seal["before"] == ""
    second = json.loads(sealed.objects[SECOND])
    assert second["before"] == sha256(sealed.objects[FIRST]).hexdigest()
    assert json.loads(sealed.objects[OTHER])["before"] == ""


def test_the_root_is_of_the_last_seals_of_all_partitions(sealed):
    hashes = [(p, sha256(sealed.objects[key]).hexdigest()) for p, key in ((0, SECOND), (2, OTHER))]
    text = "".join(f"{partition} {found}\n" for partition, found in hashes)
    assert sealed.root == sha256(text.encode()).hexdigest()


def test_a_sealed_bucket_is_verified_without_reading_its_objects(sealed):
    code, said = sealed.verify()
    assert code == 0
    last = "verify: 21 sealed objects, 2 sealed dead letters"
    assert said.endswith(f"{last}: {ALL_THERE}; root {sealed.root}")
    assert not [key for key in sealed.read if "_seals/" not in key]


def test_the_audit_goes_by_the_seals_where_the_topic_has_no_records_any_more(sealed):
    code, said = sealed.run()
    assert code == 0
    assert "21 sealed objects, 2 sealed dead letters" in said
    assert "outlive" not in said
    del sealed.objects["raw/stock_market_3.json"]
    sealed.put("raw/stock_market_16.json", b"{}")
    code, said = sealed.run()
    assert code == 1
    assert f"MISSING: test/0 offsets 3 to 3: no object, sealed by {FIRST}" in said
    assert f"DIFFERENT: raw/stock_market_16.json: other bytes than {SECOND} has sealed" in said


def test_sealing_again_with_nothing_new_makes_no_seal(sealed):
    before = set(sealed.objects)
    code, said = sealed.seal()
    assert (code, set(sealed.objects)) == (0, before)
    assert sealed.root in said.splitlines()[-1]


def test_an_earlier_root_is_found_among_those_of_the_seals(audited):
    roots = []
    for end in (5, 10, 15):
        audited.committed[0] = end
        roots.append(re.search("root ([0-9a-f]{64})", audited.seal()[1])[1])
    for root in roots:
        code, said = audited.verify(root)
        assert code == 0
        assert f"root {root}: of 20" in said
    del audited.objects["raw/_seals/partition=0/10-14.json"]
    assert [audited.verify(root)[0] for root in roots] == [0, 0, 1]


def test_what_retention_removed_before_it_was_sealed_is_said_in_the_seal(sealed):
    sealed.values[0] += [b"{}"] * 20
    sealed.begins[0], sealed.committed[0] = 30, 35
    sealed.objects |= {f"raw/stock_market_{n}.json": b"{}" for n in range(28, 35)}
    code, said = sealed.seal()
    assert code == 0
    assert "not sealed: test/0 offsets 20 to 29, which retention has removed" in said
    seal = json.loads(sealed.objects["raw/_seals/partition=0/20-34.json"])
    assert (seal["kinds"], seal["removed"], seal["objects"]) == ("10r5o", 10, 5)
    code, said = sealed.verify()
    assert code == 0
    assert "not sealed: test/0 offsets 20 to 29, which retention had removed before" in said
    assert "10 removed before they were sealed" in said
    assert "2 objects that no seal covers" in said


def test_nothing_is_sealed_while_something_is_wrong(audited):
    del audited.objects["raw/stock_market_3.json"]
    with pytest.raises(Failure, match="nothing was sealed"):
        audited.seal()
    assert not [key for key in audited.objects if "_seals" in key]


def test_what_was_lost_does_not_keep_the_rest_from_being_sealed(audited):
    audited.begins[0], audited.metadata[0] = 3, "lost 1-2"
    for offset in (1, 2):
        del audited.objects[f"raw/stock_market_{offset}.json"]
    code, _ = audited.seal()
    assert code == 1
    assert json.loads(audited.objects[FIRST])["kinds"] == "3r1o2d9o"
    assert audited.verify()[0] == 0


def test_a_large_range_is_sealed_in_parts(audited, monkeypatch):
    monkeypatch.setattr("infra.audit.SEAL_SIZE", 4)
    assert audited.seal()[0] == 0
    names = sorted(key for key in audited.objects if "_seals/partition=0/" in key)
    assert [name.rpartition("/")[2] for name in names] == [
        "0-3.json",
        "12-14.json",
        "4-7.json",
        "8-11.json",
    ]
    assert audited.verify()[0] == 0
    assert audited.run()[0] == 0


def test_a_dead_letter_that_its_topic_no_longer_has_is_known_by_its_seal(audited):
    assert audited.seal()[0] == 0
    audited.letters.clear()
    code, said = audited.run()
    assert code == 0
    assert "2 dead letters" in said


def test_an_object_kept_by_compaction_is_wanted_by_its_seal(audited):
    audited.values[0][3] = audited.values[0][9] = ...
    del audited.objects["raw/stock_market_9.json"]
    assert audited.seal()[0] == 0
    assert json.loads(audited.objects[FIRST])["kinds"] == "3o1k2d3o1h5o"
    assert audited.verify()[0] == 0
    audited.put("raw/stock_market_9.json", b"{}")
    del audited.objects["raw/stock_market_3.json"]
    code, said = audited.verify()
    assert code == 1
    assert "STRAY: raw/stock_market_9.json: there was no record and no object" in said
    assert "MISSING: test/0 offsets 3 to 3" in said


def test_a_transaction_marker_is_sealed_as_one(audited):
    audited.markers.add((0, 2))
    del audited.objects["raw/stock_market_2.json"]
    assert audited.seal()[0] == 0
    assert json.loads(audited.objects[FIRST])["transaction_markers"] == 1
    audited.put("raw/stock_market_2.json", b"{}")
    code, said = audited.verify()
    assert code == 1
    assert "STRAY: raw/stock_market_2.json: at its offset is a transaction marker" in said


def test_a_record_compacted_away_since_it_was_sealed_is_proven_by_its_seal(audited):
    assert audited.seal()[0] == 0
    audited.values[0][3] = ...
    audited.objects["raw/stock_market_3.json"] = b"{}"
    code, said = audited.run()
    assert code == 1
    assert "DIFFERENT: raw/stock_market_3.json" in said


def test_a_topic_made_anew_does_not_have_what_was_sealed(audited):
    assert audited.seal()[0] == 0
    audited.values[0][8] = b'{"another": 1}'
    audited.objects["raw/stock_market_8.json"] = b'{"another": 1}'
    code, said = audited.run()
    assert code == 1
    assert f"DIFFERENT: test/0 offset 8: the topic's record is not the one that {FIRST}" in said
    audited.values[0], audited.committed[0] = audited.values[0][:10], 10
    assert f"BROKEN: {FIRST}: sealed beyond the topic's end (10)" in audited.run()[1]


def test_a_record_where_a_marker_was_sealed_is_named_and_the_other_way_round(audited):
    audited.markers.add((0, 2))
    object_2 = audited.objects.pop("raw/stock_market_2.json")
    assert audited.seal()[0] == 0
    audited.markers = {(0, 3)}
    audited.objects["raw/stock_market_2.json"] = object_2
    del audited.objects["raw/stock_market_3.json"]
    code, said = audited.run()
    assert code == 1
    for offset in (2, 3):
        assert f"DIFFERENT: test/0 offset {offset}: the topic's record is not" in said


def test_a_bucket_without_seals_cannot_be_verified(audited):
    with pytest.raises(Failure, match=r"no seals under raw/_seals/: infra/audit\.py --seal"):
        audited.verify()


def test_an_object_whose_etag_is_no_md5_is_read_and_compared_with_its_seal(sealed):
    sealed.etag = lambda value: '"9b2cf535f27731c974343645a3985328"'
    assert sealed.verify()[0] == 0
    assert len([key for key in sealed.read if "_seals" not in key]) == 21
    sealed.objects["raw/stock_market_3.json"] = b"{}"
    assert sealed.verify()[0] == 1


def test_an_object_put_there_later_with_the_same_md5_is_found(sealed, monkeypatch):
    honest = md5(sealed.objects["raw/stock_market_3.json"]).hexdigest()
    forged = b'{"forged": 1}'
    sealed.etag = lambda value: f'"{honest if value == forged else md5(value).hexdigest()}"'
    sealed.put("raw/stock_market_3.json", forged)
    code, said = sealed.verify()
    assert code == 1
    assert "DIFFERENT: raw/stock_market_3.json" in said


def changed(value, **fields):
    """A seal with other fields, its root and counts made to fit."""
    seal = Seal.decode(value)
    return replace(seal, **fields).encode()


def remove(key):
    return lambda bucket: bucket.objects.pop(key)


def put(key, value):
    return lambda bucket: bucket.put(key, value)


def forge(key, **fields):
    return lambda bucket: bucket.put(key, changed(bucket.objects[key], **fields))


def edit(key, old, new):
    def change(bucket):
        assert old in bucket.objects[key]
        bucket.put(key, bucket.objects[key].replace(old, new))

    return change


def swap(bucket):
    objects = bucket.objects
    objects[FIRST], objects[SECOND] = objects[SECOND], objects[FIRST]


def copy(key, name):
    return lambda bucket: bucket.put(name, bucket.objects[key])


def forge_object_and_seal(bucket):
    """A forged object, and a seal that fits it."""
    seal = Seal.decode(bucket.objects[FIRST])
    bucket.put("raw/stock_market_0.json", b"{}", days=-30)
    hashes = {"sha256": sha256(b"{}").digest() + seal.sha256[32:]}
    hashes["md5"] = md5(b"{}").digest() + seal.md5[16:]
    bucket.objects[FIRST] = replace(seal, **hashes).encode()


TAMPERED = [
    (remove("raw/stock_market_3.json"), "MISSING: test/0 offsets 3 to 3"),
    (put("raw/stock_market_3.json", b'{"n": 4}'), "DIFFERENT: raw/stock_market_3.json"),
    (put("raw/stock_market_3.json", b""), "DIFFERENT: raw/stock_market_3.json"),
    (
        put("raw/stock_market_5.json", b"bad"),
        "STRAY: raw/stock_market_5.json: its record is a dead",
    ),
    (put("raw/stock_market_007.json", b"{}"), "STRAY: raw/stock_market_007.json"),
    (remove(FIRST), f"BROKEN: test/0: no seal for offsets 0 to 14, before {SECOND}"),
    (edit(FIRST, b'"objects":13', b'"objects":14'), f"BROKEN: {FIRST}: no seal, or a changed one"),
    (edit(FIRST, b'"time":"', b'"time":"0'), f"BROKEN: {FIRST}: no seal, or a changed one"),
    (edit(FIRST, b'"root":"', b'"root":"0'), f"BROKEN: {FIRST}: no seal, or a changed one"),
    (edit(FIRST, b'{"', b'{ "'), f"BROKEN: {FIRST}: no seal, or a changed one"),
    (forge(FIRST, last=99, kinds="3h"), "its parts do not fit together"),
    (forge(FIRST, last=29_999, kinds="30000h", sha256=b"", md5=b""), "its parts do not fit"),
    (put(FIRST, b""), f"BROKEN: {FIRST}: no seal, or a changed one"),
    (put(FIRST, b"\xff"), f"BROKEN: {FIRST}: no seal, or a changed one"),
    (put(FIRST, b"[" * 100_000), f"BROKEN: {FIRST}: no seal, or a changed one"),
    (put(FIRST, b"[]"), f"BROKEN: {FIRST}: no seal, or a changed one"),
    (
        forge(FIRST, time="2026-01-01T00:00:00.000000+00:00"),
        f"BROKEN: {SECOND}: was not made after",
    ),
    (forge(SECOND, before="0" * 64), f"BROKEN: {SECOND}: was not made after {FIRST}"),
    (forge(OTHER, before="0" * 64), f"BROKEN: {OTHER}: was not made after no seal before it"),
    (forge(SECOND, time="2026-01-01T00:00:00.000000+00:00"), f"BROKEN: {SECOND}: it is older"),
    (forge(OTHER, topic="other"), f"BROKEN: {OTHER}: the seal of another topic, other"),
    (swap, f"BROKEN: {FIRST}: the seal of another place"),
    (copy(FIRST, "raw/_seals/partition=0/0-13.json"), "0-13.json: the seal of another place"),
    (copy(FIRST, "raw/_seals/partition=1/0-14.json"), "0-14.json: the seal of another place"),
    (copy(FIRST, "raw/_seals/partition=0/x.json"), "x.json: no seal has this name"),
    (forge_object_and_seal, f"BROKEN: {SECOND}: was not made after {FIRST}"),
]


@pytest.mark.parametrize(("tamper", "named"), TAMPERED)
def test_tampering_is_named(sealed, tamper, named):
    tamper(sealed)
    code, said = sealed.verify()
    assert code == 1
    assert named in said


def test_the_last_seal_may_not_be_removed_or_replaced_where_its_root_is_kept(sealed):
    assert sealed.verify(sealed.root)[0] == 0
    for tamper in (remove(SECOND), forge(SECOND, time="2030-01-01T00:00:00.000000+00:00")):
        kept = dict(sealed.objects)
        tamper(sealed)
        assert sealed.verify()[0] == 0  # nobody can know
        code, said = sealed.verify(sealed.root)
        assert code == 1
        assert f"BROKEN: {sealed.root} is no root of the seals that are here" in said
        sealed.objects = kept


def test_the_last_of_many_seals_of_one_run_may_not_be_removed(audited, monkeypatch):
    monkeypatch.setattr("infra.audit.SEAL_SIZE", 2)
    code, said = audited.seal()
    assert code == 0
    root = re.search("root ([0-9a-f]{64})", said)[1]
    seals = [key for key in audited.objects if "_seals/partition=0/" in key]
    seals.sort(key=lambda key: int(re.search("([0-9]+)-", key)[1]))
    assert len(seals) == 8
    assert audited.verify(root)[0] == 0
    for last in reversed(seals[1:]):
        del audited.objects[last]
        code, said = audited.verify(root)
        assert code == 1, last
        assert f"BROKEN: {root} is no root of the seals that are here" in said


@pytest.mark.parametrize(
    ("end", "said"), [(15, "another audit has made it"), (12, "two audits ran at once")]
)
def test_two_audits_that_seal_at_once_are_found(audited, end, said):
    """The other one seals while this one reads the bucket; its range may end elsewhere."""
    key = f"raw/_seals/partition=0/0-{end - 1}.json"
    other = Audited(audited.lines)
    other.committed[0] = end
    assert other.seal()[0] == 0
    audited.meanwhile = lambda: audited.objects.setdefault(key, other.objects[key])
    with pytest.raises(Failure, match=said):
        audited.seal()


def test_a_range_that_was_sealed_twice_is_named(audited):
    other = Audited(audited.lines)
    other.committed[0] = 12
    assert (audited.seal()[0], other.seal()[0]) == (0, 0)
    audited.objects |= {key: value for key, value in other.objects.items() if "partition=0" in key}
    text = f"BROKEN: {FIRST}: sealed twice, raw/_seals/partition=0/0-11.json has offset 0 too"
    for code, said in (audited.verify(), audited.run()):
        assert code == 1
        assert text in said


@given(st.integers(0, 2**32))
@with_settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_history_is_sealed_and_verified_and_any_tampering_is_found(audited, seed):
    """Records come, are written, are sealed and removed by retention at random; then something
    is changed."""
    chance = random.Random(seed)
    audited.__init__(audited.lines)
    audited.values, audited.objects, audited.letters = {0: [], 1: [], 2: []}, {}, []
    audited.committed, audited.markers = {0: 0, 1: 0, 2: 0}, set()
    root = None
    for _ in range(chance.randint(1, 6)):
        for partition in range(3):
            values, done = audited.values[partition], audited.committed[partition]
            for _ in range(chance.choice([0, 1, 3, 12])):
                kind = chance.choice(["object"] * 8 + ["letter", "marker", "hole"])
                if kind == "marker":
                    audited.markers.add((partition, len(values)))
                hole, value = kind == "hole", b'{"n": %d}' % chance.randrange(3)
                values.append(... if hole else value)
                if kind == "letter":
                    name, number = b"source.partition", b"%d" % partition
                    headers = [(b"source.topic", b"test"), (name, number)]
                    headers.append((b"source.offset", b"%d" % (len(values) - 1)))
                    texts = [(header.decode(), text) for header, text in headers]
                    audited.letters.append((value, texts))
                elif kind == "object":
                    audited.objects[object_name("raw/", partition, len(values) - 1)] = value
            audited.committed[partition] = len(values)
            audited.begins[partition] = chance.randint(audited.begins[partition], done)
        if any(of > audited.begins[p] for p, of in audited.committed.items()):
            code, said = audited.seal()
            assert code == 0, said
            root = re.search("root ([0-9a-f]{64})", said)[1]
    if root is None:
        return
    code, said = audited.verify(root)
    assert code == 0, said
    code, said = audited.run()
    assert code == 0, said
    seals = [Seal.decode(value) for key, value in audited.objects.items() if "_seals" in key]
    sure = [
        object_name("raw/", seal.partition, offset)
        for seal in seals
        for offset, kind, _ in seal.hashes()
        if kind == "o"
    ]
    targets = sure + [key for key in audited.objects if "_seals/" in key]
    key = chance.choice(targets)
    if chance.random() < 0.5:
        del audited.objects[key]
    else:
        value = bytearray(audited.objects[key])
        value[chance.randrange(len(value))] ^= 1 << chance.randrange(8)
        audited.put(key, bytes(value))
    try:
        assert audited.verify(root)[0] == 1, key
    except Failure as error:  # it was the only seal
        assert "no seals" in str(error), key


# ------------------------------------------------------------------------------------ the listing


def test_a_copy_in_a_folder_is_its_files(tmp_path):
    (tmp_path / "partition=1").mkdir()
    for name in ("stock_market_0.json", "partition=1/stock_market_2.json"):
        (tmp_path / name).write_text("{}")
    os.mkfifo(tmp_path / "stock_market_1.json")

    async def names():
        return [each["Key"] async for page in Folder(tmp_path).pages() for each in page]

    assert set(asyncio.run(names())) == {"stock_market_0.json", "partition=1/stock_market_2.json"}


def last_modified(monkeypatch, text):
    """What the audit takes a time for that a server says in its listing."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setattr("infra.audit.ATTEMPTS", 1)
    space = "http://s3.amazonaws.com/doc/2006-03-01/"
    entry = f"<Contents><Key>k</Key><LastModified>{text}</LastModified></Contents>"
    page = f"<IsTruncated>false</IsTruncated>{entry}"
    page = f'<ListBucketResult xmlns="{space}">{page}</ListBucketResult>'

    async def answer(request):
        return web.Response(text=page, content_type="application/xml")

    async def listed():
        runner = web.ServerRunner(web.Server(answer))
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            url = "http://{}:{}".format(*runner.addresses[0])
            async with open_bucket(some_settings(S3_ENDPOINT_URL=url)) as bucket:
                return [entry async for entries in bucket.pages() for entry in entries]
        finally:
            await runner.cleanup()

    (found,) = asyncio.run(listed())
    return found["LastModified"]


@pytest.mark.parametrize(
    "text",
    ["2026-11-29T14:00:00.000Z", "2026-11-29T14:00:00", "Sun, 29 Nov 2026 14:00:00 GMT"],
)
def test_a_time_of_the_listing_is_one_of_utc(monkeypatch, text):
    assert last_modified(monkeypatch, text) == datetime(2026, 11, 29, 14, tzinfo=UTC)


def test_a_listing_with_a_time_that_is_none_is_a_failure(monkeypatch):
    with pytest.raises(Failure, match=r"S3_BUCKET=bucket at http://.*yesterday"):
        last_modified(monkeypatch, "yesterday")
