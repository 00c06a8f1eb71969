"""What comes out: records to objects, what is committed when, what holds."""

import json
import logging
import math
import random
import re
from concurrent.futures import Future
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import aiohttp
import pytest
from botocore.exceptions import ClientError, EndpointConnectionError
from hypothesis import given
from hypothesis import settings as with_settings
from hypothesis import strategies as st
from kafka.errors import CommitFailedError, KafkaTimeoutError
from kafka.errors import GroupAuthorizationFailedError as NotAllowed

from config import Failure, S3Error, Unreadable
from kafka_consumer import (
    BYTES_IN_HAND,
    BYTES_UNDER_WAY,
    COMMIT_EVERY,
    TIMEOUT,
    WINDOW,
    Conflict,
    TopicState,
    add_range,
    fetch_topic_state,
    object_name,
    run,
    validation_error,
)
from tests.fakes import TP, TP1, Broker, Client, Clock, Uploads, a_record, a_sink

# --------------------------------------------------------------------------- records and objects


@pytest.mark.parametrize(
    "value",
    [
        b"{}",
        b' {"a": 1}\r\n',
        '{"größe": "日経", "a": [1, {"b": null}]}'.encode(),
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"a": 1e999}',  # a JSON number, whatever reads it
        b'{"a": 1, "a": 2}',  # names should be unique, says the RFC, and need not
        rb'{"a": "\ud800"}',
        b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}",
    ],
)
def test_a_json_object_has_no_flaw(value):
    assert validation_error(value) == ""


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "null"),
        (b"", "empty"),
        (b" ", "not JSON"),
        (b"\n", "not JSON"),
        (b'{"a": "\xff"}', "not UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
        (b'{"a": "\xed\xa0\x80"}', "not UTF-8"),  # a surrogate's bytes
        (b'\xef\xbb\xbf{"a": 1}', "not JSON"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": [-Infinity]}', "-Infinity is not JSON"),
        (b'{"a": Infinity}', "Infinity is not JSON"),
        (b"NaN", "NaN is not JSON"),
        (b'{"a": 1', "not JSON"),
        (b'{"a": 1} {"b": 2}', "not JSON"),
        (b"{'a': 1}", "not JSON"),
        (b'{"a": "\n"}', "not JSON"),
        (b'{"a": 01}', "not JSON"),
        (b"[]", "not an object: list"),
        (b"1", "not an object"),
        (b"9" * 5000, "not an object"),
        (b'"{}"', "not an object: str"),
        (b"null", "not an object"),
        (b"true", "not an object: bool"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"a":' * 100_000, "nested too deep"),
    ],
)
def test_what_is_no_json_object_has_a_reason(value, reason):
    assert reason in validation_error(value)
    assert validation_error(value).isprintable() and len(validation_error(value)) < 200


@given(st.binary() | st.text().map(str.encode))
def test_any_bytes_are_judged_without_an_error(value):
    assert isinstance(validation_error(value), str)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(JSON, st.booleans())
def test_of_all_json_exactly_the_objects_are_good(value, ascii):
    try:
        text = json.dumps(value, ensure_ascii=ascii, allow_nan=False).encode()
    except ValueError:  # infinite, or a surrogate without \u
        return
    assert (validation_error(text) == "") == isinstance(value, dict)


def test_objects_are_named_by_partition_and_offset_alone():
    assert object_name("", 0, 0) == "stock_market_0.json"
    assert object_name("raw/", 0, 12) == "raw/stock_market_12.json"
    assert object_name("raw/", 3, 12) == "raw/partition=3/stock_market_12.json"
    assert object_name("x", 0, 1) == "xstock_market_1.json"


# ----------------------------------------------------------------------- what is decided, and when


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def sinks(clock):
    """Makes a sink over a topic whose partitions end at `ends`, all of them assigned."""

    def make(*ends, limit=math.inf, takes=None, outcome=None, group=None, begins=None, **environ):
        topic = Broker(clock, ends, begins)
        topic.group = group or {}
        uploads = Uploads(clock, takes, outcome)
        sink = a_sink(topic, Client(topic), uploads, limit, **environ)
        sink.consumer.subscribe(sink, range(len(ends)))
        return sink, topic, uploads

    return make


def stepping(sink, clock, seconds, check=lambda: None):
    until = clock() + seconds
    while clock() < until:
        before = clock()
        sink.step()
        assert clock() - before <= 0.5, "a step takes half a second at most"
        check()


def settled(sink, clock, seconds=1):
    """Step until every partition that is assigned has its position."""
    stepping(sink, clock, 0.001)
    until = clock() + seconds
    while sink.unsettled():
        assert clock() < until
        sink.step()


def rebalance(sink, *partitions):
    """Assign these partitions, in as many steps as it takes until the next poll."""
    sink.consumer.next = partitions
    while sink.consumer.next is not None:
        sink.step()


def failing(code="SlowDown"):
    return S3Error(code, "why")


def stopping(requested=True):
    return SimpleNamespace(requested=requested, check=lambda: None)


def test_every_record_is_handed_over_once_in_order_and_all_is_committed(sinks, clock):
    sink, topic, uploads = sinks(1_000)
    stepping(sink, clock, 3)
    assert uploads.submitted[0] == (0, 0)  # alone, until S3 has answered
    assert uploads.submitted == [(0, offset) for offset in range(1_000)]
    assert topic.group == {TP: 1_000}
    assert sink.stats.written == 1_000


@with_settings(deadline=None, max_examples=30)
@given(st.randoms(use_true_random=False), st.lists(st.integers(0, 700), min_size=1, max_size=3))
def test_in_any_order_of_completion_only_what_is_done_is_committed(chance, ends):
    clock, done = Clock(), set()
    topic = Broker(clock, ends)

    def outcome(record):
        done.add((record.partition, record.offset))
        return chance.choice(["written", "replayed", "dead"])

    uploads = Uploads(clock, lambda record: chance.choice([0, 0.01, 0.1, 3]), outcome)
    sink = a_sink(topic, Client(topic, chance.choice([1, 7, 100, 1000])), uploads)
    sink.consumer.subscribe(sink, range(len(ends)))

    whole = dict.fromkeys(topic.ends, 0)  # below it all is done

    def check():
        for tp, position in topic.group.items():
            while (tp.partition, whole[tp]) in done:
                whole[tp] += 1
            assert position <= whole[tp]
        assert len(uploads.submitted) - sum(topic.group.values()) <= WINDOW

    stepping(sink, clock, 5, check)
    until = clock() + 60
    while topic.group != topic.ends and clock() < until:
        stepping(sink, clock, 1, check)
    assert topic.group == topic.ends
    assert sorted(uploads.submitted) == sorted(set(uploads.submitted)) == sorted(done)
    assert sink.stats.done == sum(ends)


def test_a_record_that_takes_long_holds_the_commit_back_at_its_own_offset(sinks, clock):
    sink, topic, _uploads = sinks(100, takes=lambda record: 2 if record.offset == 40 else 0.01)
    stepping(sink, clock, 1)
    assert topic.group == {TP: 40}
    stepping(sink, clock, 2)
    assert topic.group == {TP: 100}


def test_the_window_of_256_is_never_exceeded(sinks, clock):
    sink, topic, uploads = sinks(
        2_000, 2_000, takes=lambda record: math.inf if record.offset else 0.01
    )

    def check():
        assert sink.in_hand() <= WINDOW
        assert len(uploads.under_way) <= WINDOW

    stepping(sink, clock, 5, check)
    assert len(uploads.under_way) > WINDOW - 64
    assert not any(position > 1 for position in topic.group.values())


def test_what_is_in_hand_is_bounded_in_bytes_too(sinks, clock):
    sink, topic, _uploads = sinks(400, takes=lambda record: math.inf)
    sink.consumer.prefetch = 1
    topic.values = lambda p, o: b"x" * 2**20
    stepping(sink, clock, 5)
    in_hand = sum(len(taken.record.value) for taken in sink.partitions[TP].line)
    assert in_hand == BYTES_IN_HAND


def test_one_record_at_least_is_taken_however_large(sinks, clock):
    sink, topic, _uploads = sinks(3)
    sink.consumer.prefetch = 1
    topic.values = lambda p, o: b"x" * (BYTES_IN_HAND + 1)
    stepping(sink, clock, 2, lambda: sink.in_hand() <= 1)
    assert topic.group == {TP: 3}


def test_under_load_it_is_committed_every_fifth_of_a_second_at_least(sinks, clock):
    sink, topic, _uploads = sinks(100_000, takes=lambda record: 0.025)
    stepping(sink, clock, 2)
    times = [at for at, _ in topic.commits]
    assert max(b - a for a, b in pairwise(times)) <= 0.2


@pytest.mark.parametrize("seconds", [0.05, 0.3, 1])
def test_a_trickle_is_committed_within_a_fifth_of_a_second_after_it_is_done(sinks, clock, seconds):
    sink, topic, uploads = sinks(0)
    written = {}
    uploads.outcome = lambda record: written.setdefault(record.offset, clock()) and "written"
    for _ in range(20):
        topic.ends[TP] += 1
        stepping(sink, clock, seconds)
    stepping(sink, clock, 1)
    first = {}
    for at, offsets in topic.commits:
        for offset in range(offsets[TP]):
            first.setdefault(offset, at)
    assert len(written) == 20
    assert all(first[offset] - at <= 2 * COMMIT_EVERY for offset, at in written.items())


def test_nothing_is_committed_when_nothing_was_done(sinks, clock):
    sink, topic, _uploads = sinks(0, group={TP: 0})
    stepping(sink, clock, 5)
    assert topic.commits == []


# -- Positions


@pytest.mark.parametrize(("reset", "position"), [("earliest", 5), ("latest", 50)])
def test_the_position_is_pinned_by_a_commit_before_anything_is_fetched(
    sinks, clock, lines, reset, position
):
    sink, topic, uploads = sinks(50, begins={TP: 5}, KAFKA_AUTO_OFFSET_RESET=reset)
    store = sink.consumer._store
    fetched = []
    sink.consumer._store = lambda offsets: (
        fetched.append(dict(sink.consumer.fetched)),
        store(offsets),
    )
    while not topic.commits:
        sink.step()
    assert fetched == [{}]
    assert topic.group == {TP: position}
    assert uploads.submitted == []
    assert f"begins test/0 at offset {position} ({reset})" in lines()[-1]
    topic.ends[TP] += 10
    stepping(sink, clock, 1)
    assert uploads.submitted == [(0, offset) for offset in range(position, 60)]


def test_who_finds_no_position_pins_every_partition_of_the_topic_in_one_commit(sinks, clock):
    sink, topic, uploads = sinks(30, 40, KAFKA_AUTO_OFFSET_RESET="latest")
    sink.consumer.next = [0]
    stepping(sink, clock, 1)
    assert topic.commits[0][1] == {TP: 30, TP1: 40}
    assert uploads.submitted == []


def test_who_does_not_own_the_first_partition_waits_until_its_owner_has_pinned(sinks, clock):
    sink, topic, uploads = sinks(30, 40, KAFKA_AUTO_OFFSET_RESET="latest")
    sink.consumer.next = [1]
    stepping(sink, clock, 1)
    assert topic.commits == []
    topic.group = {TP: 30, TP1: 38}
    stepping(sink, clock, 1)
    assert uploads.submitted == [(1, 38), (1, 39)]


def test_a_partition_that_another_program_does_not_pin_is_said(sinks, clock, lines):
    sink, topic, _uploads = sinks(30, 40)
    sink.consumer.next = [1]
    stepping(sink, clock, 12)
    said = [line for line in lines() if line.startswith("test/1 stands still: group ")]
    assert len(said) == 1 and "has no position on it" in said[0] and "another program" in said[0]
    topic.group = {TP: 30, TP1: 38}
    stepping(sink, clock, 3)
    assert any(line.startswith("test/1 moves again after") for line in lines())


def test_what_another_member_has_not_pinned_yet_keeps_no_partition_waiting(sinks, clock):
    sink, topic, uploads = sinks(30, 40, group={TP1: 38})
    sink.consumer.next = [1]
    stepping(sink, clock, 1)
    assert uploads.submitted == [(1, 38), (1, 39)]
    assert topic.group == {TP1: 40}


def test_a_group_goes_on_where_it_stopped(sinks, clock):
    sink, _topic, uploads = sinks(50, 9, group={TP: 42})
    stepping(sink, clock, 1)
    assert sorted(uploads.submitted) == [(0, o) for o in range(42, 50)] + [(1, o) for o in range(9)]


def test_a_partition_added_since_the_group_began_is_begun_at_its_first_record_despite_latest(
    sinks, clock
):
    sink, topic, uploads = sinks(9, 9, KAFKA_AUTO_OFFSET_RESET="latest")
    topic.group[TP] = 9
    stepping(sink, clock, 2)
    assert sorted(uploads.submitted) == [(1, offset) for offset in range(9)]


@pytest.mark.parametrize("method", ["look", "commit"])
@pytest.mark.parametrize("error", [KafkaTimeoutError("slow"), CommitFailedError("moved on")])
def test_a_position_that_cannot_be_settled_now_is_settled_later(sinks, clock, method, error):
    sink, topic, uploads = sinks(9, 9, KAFKA_AUTO_OFFSET_RESET="latest")
    if method == "look":
        failures = iter([math.inf] * 2)
        topic.look_takes = lambda: next(failures, 0.003)
    else:
        sink.consumer.errors[method] = [error] * 3
    stepping(sink, clock, 7)
    topic.ends |= {TP: 12, TP1: 12}
    stepping(sink, clock, 1)
    assert sorted(uploads.submitted) == [(p, o) for p in (0, 1) for o in (9, 10, 11)]


def test_a_leader_that_answers_half_is_one_that_does_not_answer():
    """Both ends of a partition are known, or neither is."""

    def begins(tps):
        if TP1 in tps:
            raise KafkaTimeoutError("slow")
        return dict.fromkeys(tps, 0)

    cluster = SimpleNamespace(
        leader_for_partition=lambda tp: tp.partition,
        broker_metadata=lambda node: SimpleNamespace(host="far", port=9092),
        set_topics=lambda topics: None,
    )
    client = SimpleNamespace(
        partitions_for_topic=lambda topic: {0, 1},
        end_offsets=lambda tps: dict.fromkeys(tps, 9),
        beginning_offsets=begins,
        _client=SimpleNamespace(cluster=cluster, set_topics=lambda topics: None),
        _coordinator=SimpleNamespace(fetch_committed_offsets=lambda tps: {}),
    )
    state = fetch_topic_state(client, "test", 0.0, lambda: None)
    assert (state.begins, state.ends) == ({TP: 0}, {TP: 9})
    assert "broker 1 (far:9092), does not answer" in state.problems[TP1]
    assert state.mute == {1}


def test_a_partition_whose_leader_does_not_answer_waits_and_the_others_are_served(sinks, clock):
    sink, topic, _uploads = sinks(9, 9)
    topic.mute = topic.refused = {TP1}
    stepping(sink, clock, 2)
    assert topic.group == {TP: 9}
    topic.mute = topic.refused = set()
    stepping(sink, clock, 5)
    assert topic.group == {TP: 9, TP1: 9}


def test_a_partition_that_waits_for_its_position_opens_the_window_for_no_other(sinks, clock):
    sink, topic, _uploads = sinks(2_000, 9, takes=lambda record: math.inf)
    topic.mute = topic.refused = {TP1}

    def check():
        assert sink.in_hand() <= WINDOW

    stepping(sink, clock, 10, check)


def test_while_nothing_can_be_taken_it_stays_a_member_and_skips_nothing(sinks, clock):
    late = clock() + 60
    sink, topic, uploads = sinks(1_000, takes=lambda record: max(0, late - clock()) + 0.02)
    topic.values = lambda p, o: b"x" * (BYTES_IN_HAND // 256)
    stepping(sink, clock, 50)
    polls = sink.consumer.polls
    times = [at for at, _ in polls]
    assert max(b - a for a, b in pairwise(times)) < 1
    assert all(TP in paused for at, paused in polls if at > 1_010)
    stepping(sink, clock, 20)
    assert uploads.submitted == [(0, offset) for offset in range(1_000)]
    assert topic.group == {TP: 1_000}


def test_an_error_that_passes_skips_nothing(sinks, clock):
    sink, _topic, uploads = sinks(1_000)
    stepping(sink, clock, 0.05)
    client = sink.consumer
    for _ in range(20):
        client.errors["poll"] = [KafkaTimeoutError("slow")]
        for tp in client.fetched:  # gone with the error
            client.at[tp] += len(client.fetched[tp])
        client.fetched.clear()
        stepping(sink, clock, 0.1)
    stepping(sink, clock, 1)
    assert uploads.submitted == [(0, offset) for offset in range(1_000)]


@pytest.mark.parametrize("method", ["poll", "commit"])
def test_an_error_that_does_not_pass_is_raised(sinks, clock, method):
    sink, _topic, _uploads = sinks(10, group={TP: 0})
    sink.consumer.errors[method] = [NotAllowed("no")]
    with pytest.raises(NotAllowed):
        stepping(sink, clock, 1)


def test_a_commit_that_the_group_refuses_is_made_by_whoever_owns_the_partition(sinks, clock):
    sink, topic, _uploads = sinks(100)
    settled(sink, clock)
    sink.consumer.errors["commit"] = [CommitFailedError("moved on")]
    sink.consumer.next = [0]
    stepping(sink, clock, 1)
    assert topic.group == {TP: 100}


@pytest.mark.parametrize("there", [{}, {TP: 40}])
def test_a_topic_made_anew_behind_an_error_ends_it_before_anything_of_it_is_committed(
    sinks, clock, there
):
    sink, topic, _uploads = sinks(100)
    stepping(sink, clock, 1)
    topic.make_anew([600])
    topic.group |= there
    sink.consumer.errors["poll"] = [KafkaTimeoutError("slow")]
    what = 40 if there else "gone"
    with pytest.raises(Failure, match=rf"position 100 .* test/0 is {what}"):
        stepping(sink, clock, 3)
    assert topic.group == there


def test_a_topic_made_anew_while_a_poll_took_long_ends_it_before_a_commit(sinks, clock):
    sink, topic, uploads = sinks(100)
    stepping(sink, clock, 1)
    topic.ends[TP] += 30
    while not uploads.under_way:
        sink.step()
    poll = sink.consumer.poll

    def a_long_poll(**args):
        sink.consumer.poll = poll
        topic.make_anew([600])
        clock.wait(0.6)  # what is under way is done meanwhile
        return {}

    sink.consumer.poll = a_long_poll
    sink.step()
    assert topic.group == {}
    with pytest.raises(Failure, match="was the topic deleted and made anew"):
        stepping(sink, clock, 3)
    assert topic.group == {}


@pytest.mark.parametrize("there", [{}, {TP: 40}])
def test_a_topic_made_anew_while_the_process_was_frozen_ends_it(sinks, clock, there):
    sink, topic, _uploads = sinks(100)
    stepping(sink, clock, 1)
    topic.make_anew([600])
    topic.group |= there
    clock.now += 0.6
    with pytest.raises(Failure, match="was the topic deleted and made anew"):
        stepping(sink, clock, 3)
    assert topic.group == there


@pytest.mark.parametrize("there", [{}, {TP: 40}])
def test_a_topic_made_anew_behind_a_rebalance_ends_it(sinks, clock, there):
    sink, topic, _uploads = sinks(100)
    stepping(sink, clock, 1)
    topic.make_anew([600])
    topic.group |= there
    sink.consumer.next = [0]
    with pytest.raises(Failure, match="was the topic deleted and made anew"):
        stepping(sink, clock, 3)
    assert topic.group == there


METADATA = SimpleNamespace(partitions_for_topic=lambda topic: {0})
WITHOUT_TOPIC = SimpleNamespace(partitions_for_topic=lambda topic: None)


def test_a_topic_made_anew_while_the_brokers_are_asked_ends_it(sinks, clock):
    """The answer is from before; but the client has met a broker that did not know the topic."""
    sink, topic, _uploads = sinks(100)
    stepping(sink, clock, 1)

    def look(asked_at, heard):
        answer, state = Future(), topic.seen(asked_at)
        clock.after(0.2, lambda: (heard(), answer.set_result(state)))
        return answer

    sink.monitor.ask = look
    sink.suspect()
    clock.wait(0.1)
    topic.make_anew([600])
    sink.on_metadata(WITHOUT_TOPIC)
    with pytest.raises(Failure, match="was the topic deleted and made anew"):
        stepping(sink, clock, 3)
    assert topic.group == {}


def test_metadata_that_comes_again_and_again_keeps_no_commit_waiting(sinks, clock):
    """As it does while a partition has no leader."""
    sink, topic, _uploads = sinks(2_000)
    stepping(sink, clock, 10, lambda: sink.on_metadata(METADATA))
    assert topic.group == {TP: 2_000}


def test_a_suspicion_while_a_commit_is_under_way_does_not_end_it(sinks, clock):
    """The brokers are asked before the commit has arrived, and the answer is older than it."""
    sink, topic, _uploads = sinks(200, takes=lambda record: 0.2)
    settled(sink, clock)
    stepping(sink, clock, 0.1)
    send, seen = sink.send, topic.seen
    before = dict(topic.group)

    def older(asked_at):
        committed = {tp: SimpleNamespace(offset=at, metadata="") for tp, at in before.items()}
        return replace(seen(asked_at), committed=committed)

    def slow_commit(client, positions):
        sink.on_metadata(METADATA)
        topic.seen = older
        clock.wait(0.3)
        topic.seen = seen
        send(client, positions)
        sink.send = send

    sink.send = slow_commit
    until = clock() + 3
    while clock() < until:
        sink.step()
    assert topic.group == {TP: 200}


def test_an_error_that_does_not_pass_is_raised_while_a_range_is_looked_for_too(sinks, clock):
    sink, topic, _uploads = sinks(9)
    settled(sink, clock)
    topic.look_takes = lambda: math.inf
    sink.range_unknown = True
    sink.consumer.errors["poll"] = [NotAllowed("group")]
    with pytest.raises(NotAllowed):
        sink.poll(0, 1)


def test_a_position_that_others_moved_while_the_partition_was_theirs_ends_nothing(sinks, clock):
    sink, topic, _uploads = sinks(20, 20)
    stepping(sink, clock, 2)
    rebalance(sink, 1)
    stepping(sink, clock, 1)
    topic.group[TP] = 5  # its log was cut, and its owner began again
    rebalance(sink, 0, 1)
    stepping(sink, clock, 2)
    assert topic.group == {TP: 20, TP1: 20}


def test_a_record_that_cannot_be_read_leaves_no_call_open(sinks, clock):
    sink, _topic, _uploads = sinks(9)
    settled(sink, clock)
    sink.consumer.errors["poll"] = [Unreadable("why")]
    with pytest.raises(Unreadable):
        stepping(sink, clock, 1)
    assert sink.called_at == math.inf


@pytest.mark.parametrize("fails", [False, True])
def test_what_stands_before_a_record_that_cannot_be_read_is_written_before_it_ends(
    sinks, clock, fails
):
    """The way past it is to set the group's position behind it: what is left here is lost."""
    sink, topic, uploads = sinks(150, 150, takes=lambda record: 9)
    if fails:
        uploads.takes, uploads.outcome = (lambda record: 0.01), (lambda record: failing())
        clock.after(40, lambda: setattr(uploads, "outcome", lambda record: "written"))
    uploads.slots = 64
    stepping(sink, clock, 0.3)
    sink.consumer.errors["poll"] = [Unreadable("why")]
    before = len(sink.consumer.polls)
    with pytest.raises(Unreadable):
        run(sink, stopping(False))
    assert sum(topic.group.values()) == len(set(uploads.submitted)) > 100
    assert len(sink.consumer.polls) > before + 10, "it stays a member meanwhile"


def test_a_stop_before_a_record_that_cannot_be_read_is_a_stop(sinks, clock):
    sink, topic, _uploads = sinks(150, takes=lambda record: 0.01 if record.offset < 9 else 10)
    stepping(sink, clock, 0.5)
    sink.consumer.errors["poll"] = [Unreadable("why")]
    stepping(sink, clock, 1)
    run(sink, stopping())
    assert topic.group == {TP: 9}


def test_a_record_that_cannot_be_read_is_left_to_who_has_its_partition_next(sinks, clock):
    sink, topic, uploads = sinks(50, 50, takes=lambda record: 3)
    stepping(sink, clock, 0.3)
    sink.consumer.errors["poll"] = [Unreadable("why")]
    stepping(sink, clock, 1)
    uploads.takes = lambda record: 0.01
    rebalance(sink, 1)
    stepping(sink, clock, 5)
    assert topic.group[TP1] == 50


def test_an_answer_from_before_the_topic_was_known_says_nothing_of_positions(sinks, clock):
    """A broker that just started answers for a moment as if it had no topic."""
    sink, topic, _uploads = sinks(50)
    stepping(sink, clock, 2)
    look = sink.monitor.ask
    sink.monitor.ask = lambda asked_at, heard: Future()  # the one under way ends
    stepping(sink, clock, 1)
    sink.suspect()
    clock.wait(0.1)
    empty = TopicState(clock(), {}, {}, {}, {})
    sink.monitor.latest, sink.monitor.asking = empty, None
    topic.ends[TP] = 60
    stepping(sink, clock, 1)
    assert topic.group == {TP: 50}
    sink.monitor.ask, sink.monitor.asking = look, None
    stepping(sink, clock, 2)
    assert topic.group == {TP: 60}


def test_commits_that_the_broker_refuses_are_said_and_so_is_their_end(sinks, clock, lines):
    sink, topic, _uploads = sinks(500)
    settled(sink, clock)
    commit = sink.send

    def refuse(client, positions):
        raise CommitFailedError("why")

    sink.send = refuse
    topic.ends[TP] = 1000
    stepping(sink, clock, 12)
    said = [line for line in lines() if "the broker takes no commit: CommitFailedError" in line]
    assert len(said) == 1
    sink.send = commit
    stepping(sink, clock, 3)
    assert topic.group == {TP: 1000}
    assert any("the broker takes a commit again" in line for line in lines())


def test_a_commit_that_an_outage_cut_off_is_not_one_that_the_broker_refuses(sinks, clock, lines):
    sink, topic, _uploads = sinks(50)
    stepping(sink, clock, 1)
    sink.consumer.errors["commit"] = [KafkaTimeoutError("why")]
    topic.look_takes = lambda: math.inf
    topic.ends[TP] = 100
    stepping(sink, clock, 20)
    topic.look_takes = lambda: 0.003
    stepping(sink, clock, 5)
    assert topic.group == {TP: 100}
    assert not any("takes no commit" in line for line in lines())


def test_a_group_whose_positions_cannot_be_asked_is_said(sinks, clock, lines):
    sink, topic, _uploads = sinks(50)
    look = sink.monitor.ask

    def refused(asked_at, heard):
        answer = Future()
        heard()  # the leaders answer, the coordinator refuses
        answer.set_exception(NotAllowed("why"))
        return answer

    sink.monitor.ask = refused
    stepping(sink, clock, 12)
    assert any("takes no question for its positions: GroupAuth" in line for line in lines())
    sink.monitor.ask = look
    stepping(sink, clock, 3)
    assert topic.group == {TP: 50}


def test_after_a_gap_nothing_is_committed_before_the_groups_position_is_known(sinks, clock):
    sink, topic, uploads = sinks(100)
    stepping(sink, clock, 1)
    looks = [math.inf]
    topic.look_takes = lambda: looks[0]
    clock.now += 0.6
    topic.ends[TP] = 200
    stepping(sink, clock, 4)
    assert len(uploads.submitted) == 200
    assert topic.group == {TP: 100}
    looks[0] = 0.01
    stepping(sink, clock, 4)
    assert topic.group == {TP: 200}


# -- What retention removes


def test_what_retention_removed_is_said_with_its_range(sinks, clock, lines):
    sink, topic, uploads = sinks(100, group={TP: 10})
    topic.begins[TP] = 60
    stepping(sink, clock, 1)
    lost = [line for line in lines() if line.startswith("LOST")]
    assert len(lost) == 1 and "offsets 10 to 59 of test/0" in lost[0]
    assert uploads.submitted == [(0, offset) for offset in range(60, 100)]
    assert topic.group == {TP: 100}


def test_what_retention_removed_stays_in_the_metadata_of_every_later_commit(sinks, clock):
    sink, topic, _uploads = sinks(100, group={TP: 10})
    topic.begins[TP] = 60
    stepping(sink, clock, 1)
    assert topic.metadata == {TP: "lost 10-59"}
    rebalance(sink)
    rebalance(sink, 0)
    topic.begins[TP], topic.ends[TP] = 200, 300
    stepping(sink, clock, 2)
    assert topic.group == {TP: 300}
    assert topic.metadata == {TP: "lost 10-59,100-199"}


@pytest.mark.parametrize("metadata", ["set by ops", "lost and found", "x" * 4094])
def test_what_another_program_noted_with_a_commit_is_no_lost_range(sinks, clock, metadata):
    sink, topic, _uploads = sinks(100, group={TP: 10})
    topic.metadata[TP] = metadata
    topic.begins[TP] = 60
    stepping(sink, clock, 1)
    assert topic.metadata == {TP: "lost 10-59"}


def test_lost_ranges_never_outgrow_the_metadata_and_the_newest_stay_apart():
    ranges = ""
    for first in range(10**9, 10**9 + 10_000, 10):
        ranges = add_range(ranges, first, first + 1)
        assert len(ranges) <= 4000
    parts = ranges.split(",")
    assert parts[-1] == f"{10**9 + 9_990}-{10**9 + 9_991}"
    assert parts[0].startswith(f"{10**9}-")
    numbers = [int(number) for part in parts for number in part.split("-")]
    assert numbers == sorted(numbers)


def test_retention_does_not_take_what_is_already_in_hand(sinks, clock, lines):
    late = clock() + 5

    def takes(record):
        return max(0, late - clock()) + record.offset % 100 / 50

    sink, topic, _uploads = sinks(300, takes=takes)
    stepping(sink, clock, 1)
    in_hand = sink.partitions[TP].position
    topic.begins[TP], topic.ends[TP] = 400, 420
    stepping(sink, clock, 14)
    assert any(f"offsets {in_hand} to 399" in line for line in lines() if line.startswith("LOST"))
    assert sink.stats.written == in_hand + 20
    assert topic.group == {TP: 420}


def test_a_topic_that_was_cut_is_said_and_begun_again(sinks, clock, lines):
    sink, topic, uploads = sinks(100, group={TP: 70})
    stepping(sink, clock, 1)
    topic.ends[TP] = 30
    stepping(sink, clock, 1)
    said = [line for line in lines() if "beyond the end" in line]
    assert len(said) == 1 and "position 100" in said[0] and "(30) of test/0" in said[0]
    assert uploads.submitted[-30:] == [(0, offset) for offset in range(30)]
    assert topic.group == {TP: 30}


def test_a_position_out_of_range_on_one_partition_leaves_the_others_alone(sinks, clock):
    sink, topic, uploads = sinks(2_000, 2_000)
    stepping(sink, clock, 0.1)
    topic.begins[TP1] = 1_500
    stepping(sink, clock, 5)
    assert [o for p, o in uploads.submitted if p == 0] == list(range(2_000))
    assert topic.group == {TP: 2_000, TP1: 2_000}


# -- The group


def test_a_first_join_waits_for_nothing(sinks, clock):
    sink, topic, _uploads = sinks(5)
    topic.look_takes = lambda: math.inf
    before = clock()
    sink.step()
    assert sink.assigned and clock() - before < 0.2


def test_what_was_given_up_is_not_settled_again_while_the_group_joins(sinks, clock):
    sink, topic, _uploads = sinks(50, 50)
    stepping(sink, clock, 3)
    client = sink.consumer
    topic.members = [client, Client(topic)]  # the other one does not join yet
    topic.rebalance()
    stepping(sink, clock, 5)
    assert client.assignment() == {TP, TP1}  # as the client shows it meanwhile
    assert not sink.partitions
    topic.join(topic.members[1])
    stepping(sink, clock, 5)
    assert set(sink.partitions) == client.assignment() == {TP}


def test_before_partitions_are_given_up_what_is_under_way_is_finished_and_committed(sinks, clock):
    sink, topic, uploads = sinks(1_000, 1_000, takes=lambda record: 0.5 if record.offset else 0.01)
    stepping(sink, clock, 0.3)
    taken = len(uploads.submitted)
    assert taken > 2 and not any(at > 1 for at in topic.group.values())
    rebalance(sink, 1)
    assert sum(topic.group.values()) == taken
    stepping(sink, clock, 10)
    assert topic.group[TP1] == 1_000
    assert len(uploads.submitted) == len(set(uploads.submitted))


def test_when_partitions_are_given_up_what_waits_for_a_slot_is_left_to_the_next(sinks, clock):
    sink, topic, uploads = sinks(500, takes=lambda record: 0.9)
    uploads.slots = 64
    stepping(sink, clock, 1.5)
    assert sink.in_hand() > 3 * uploads.slots
    before = clock()
    rebalance(sink)
    assert clock() - before < 1, "one round of uploads, not one after the other"
    assert topic.group == {TP: len(uploads.submitted)}
    rebalance(sink, 0)
    stepping(sink, clock, 10)
    assert len(uploads.submitted) == len(set(uploads.submitted)) == 500


def test_giving_up_takes_two_seconds_at_most_and_late_outcomes_are_ignored(sinks, clock, lines):
    sink, topic, uploads = sinks(50, takes=lambda record: 10 if record.offset >= 20 else 0.01)
    stepping(sink, clock, 0.5)
    assert topic.group == {TP: 20}
    before = clock()
    rebalance(sink)
    assert 2 <= clock() - before < 2.5
    assert not sink.partitions
    stepping(sink, clock, 15)
    assert not uploads.under_way
    assert topic.group == {TP: 20}
    assert sink.stats.written == 20 and len(lines("records")) == 20


def test_while_holding_partitions_are_given_up_at_once(sinks, clock):
    sink, _topic, uploads = sinks(50)
    uploads.outcome = lambda record: failing()
    stepping(sink, clock, 0.5)
    before = clock()
    rebalance(sink)
    assert clock() - before < 0.2
    assert not sink.stats.holding


def test_a_late_outcome_of_an_earlier_assignment_commits_nothing_of_the_new_one(sinks, clock):
    takes = [10.0, 30.0]
    sink, topic, _uploads = sinks(50, takes=lambda record: takes[0])
    stepping(sink, clock, 0.5)
    del takes[0]
    rebalance(sink, 0)
    stepping(sink, clock, 15)  # the first assignment's uploads end in this time
    assert topic.group == {TP: 0}
    stepping(sink, clock, 50)
    assert topic.group == {TP: 50}
    assert sink.stats.written == 50


def test_a_partition_given_up_while_holding_is_let_go_and_the_next_is_tried(sinks, clock):
    sink, topic, uploads = sinks(20, 20)
    sink.consumer.next = [0]
    uploads.outcome = lambda record: failing()
    stepping(sink, clock, 5)
    rebalance(sink, 1)
    stepping(sink, clock, 5)
    assert list(sink.stats.holding) == [1]
    uploads.outcome = lambda record: "written"
    stepping(sink, clock, 5)
    assert topic.group == {TP: 0, TP1: 20}
    assert not sink.stats.holding


def test_a_conflict_ends_the_step_even_after_a_rebalance(sinks, clock):
    sink, topic, _uploads = sinks(50, outcome=lambda record: Conflict("other bytes"))
    with pytest.raises(Conflict):
        stepping(sink, clock, 1)
    assert topic.group == {TP: 0}


# -- Holding


def test_a_failing_s3_is_tried_with_one_object_at_a_time_until_it_answers(sinks, clock):
    began = clock()
    sink, topic, uploads = sinks(50)
    uploads.outcome = lambda record: failing("HTTP 503") if clock() < began + 100 else "written"
    stepping(sink, clock, 50)
    assert sink.stats.holding == {0: "HTTP 503"}
    retries = set()

    def check():
        assert len(uploads.under_way) <= 1
        retries.add(sink.partitions[TP].hold.retry_at)

    stepping(sink, clock, 45, check)
    failed = [at + 0.025 for at, _, _ in uploads.times if at > clock() - 44]
    pauses = [min(at for at in retries if at > failure) - failure for failure in failed[:-1]]
    assert len(pauses) > 30
    assert all(0.5 <= pause <= 1.1 for pause in pauses)  # backoff capped, with jitter
    assert len({round(pause, 6) for pause in pauses}) > len(pauses) / 2
    assert len({offset for at, _, offset in uploads.times if 10 < at - began < 95}) == 1
    stepping(sink, clock, 7)
    assert sink.stats.written == 50 and topic.group == {TP: 50}
    first = min(at for at, _, _ in uploads.times if at >= began + 100)
    assert first - began - 100 < 2  # of recovery; the promise is 5 s
    assert not sink.stats.holding and sink.stats.holds == 1


def test_holding_is_said_at_once_then_every_30_s_and_so_is_its_end(sinks, clock, lines, caplog):
    sink, _topic, uploads = sinks(20)
    sink.monitor.show = lambda now: None
    uploads.outcome = lambda record: failing("AccessDenied")
    settled(sink, clock)
    caplog.clear()
    stepping(sink, clock, 0.2)
    assert len(lines()) == 1
    assert "S3 failing, holding at test/0/" in lines()[0]
    assert "AccessDenied" in lines()[0] and "s3:PutObject" in lines()[0]
    stepping(sink, clock, 95)
    assert len(lines()) == 4
    assert [re.search(r"for (\d+) s now", line)[1][0] for line in lines()[1:]] == ["3", "6", "9"]
    assert {(record.topic, record.partition) for record in caplog.records} == {("test", 0)}
    uploads.outcome = lambda record: "written"
    stepping(sink, clock, 5)
    assert len(lines()) == 5 and re.match(r"S3 answers again after 9\d\.\d s", lines()[4])
    assert all(record.exc_info is None for record in caplog.records)


def test_a_flurry_of_short_failures_is_said_once(sinks, clock, lines):
    chance = random.Random(1)
    sink, topic, uploads = sinks(0)
    uploads.outcome = lambda record: failing() if chance.random() < 0.1 else "written"
    for _ in range(60):
        topic.ends[TP] += 20
        stepping(sink, clock, 1)
    stepping(sink, clock, 5)
    assert sink.stats.written == 1_200
    assert sink.stats.holds > 50
    assert len([line for line in lines() if "failing" in line]) == 1
    assert len([line for line in lines() if "answers again" in line]) == 1


def test_a_long_outage_after_a_flurry_is_said(sinks, clock, lines):
    sink, topic, uploads = sinks(1)
    tried = []
    uploads.outcome = lambda record: "written" if tried or tried.append(1) else failing()
    stepping(sink, clock, 1)
    said = [line for line in lines() if line.startswith("S3 ")]
    assert len(said) == 2
    uploads.outcome = lambda record: failing()
    topic.ends[TP] = 2
    stepping(sink, clock, 3)
    said = [line for line in lines() if line.startswith("S3 ")]
    assert len(said) == 3 and "failing" in said[2]


def client_error(code, message="why"):
    return ClientError({"Error": {"Code": code, "Message": message}}, "ListObjectsV2")


@pytest.mark.parametrize(
    "error",
    [
        S3Error("HTTP 500", ""),
        client_error("InternalError"),
        EndpointConnectionError(endpoint_url="http://x"),
        aiohttp.ClientPayloadError("torn"),
        ConnectionResetError("reset"),
        TimeoutError(),
    ],
)
def test_a_known_failure_is_one_line_without_a_traceback(sinks, clock, caplog, error):
    sink, _topic, uploads = sinks(1)
    uploads.outcome = lambda record: error if len(uploads.times) == 1 else "written"
    stepping(sink, clock, 2)
    assert sink.stats.written == 1
    assert [record.exc_info for record in caplog.records if "failing" in record.getMessage()] == [
        None
    ]


def test_an_unknown_failure_keeps_its_traceback_and_skips_nothing(sinks, clock, caplog):
    sink, _topic, uploads = sinks(1)
    uploads.outcome = lambda record: ZeroDivisionError("x") if len(uploads.times) < 3 else "written"
    stepping(sink, clock, 2)
    assert sink.stats.written == 1
    failed = [record for record in caplog.records if "failing" in record.getMessage()]
    assert isinstance(failed[0].exc_info[1], ZeroDivisionError)
    assert sink.stats.retries == 2


def test_a_conflict_ends_it_at_once_and_what_is_before_it_is_done(sinks, clock):
    sink, _topic, uploads = sinks(6)
    uploads.outcome = lambda record: Conflict("other") if record.offset == 3 else "written"
    with pytest.raises(Conflict):
        stepping(sink, clock, 1)
    assert sink.stats.written == 3
    assert sink.partitions[TP].line[0].record.offset == 3


def test_what_is_before_a_conflict_is_committed_though_the_broker_is_slow_to_say_where_it_is(
    sinks, clock
):
    sink, topic, uploads = sinks(4)
    stepping(sink, clock, 1)
    uploads.outcome = lambda record: Conflict("other") if record.offset == 6 else "written"
    topic.ends[TP] = 8
    while not uploads.under_way:
        sink.step()
    topic.look_takes = lambda: 3
    sink.suspect()
    with pytest.raises(Conflict):
        run(sink, stopping(False))
    assert topic.group == {TP: 6}


def test_a_conflict_found_while_holding_ends_it(sinks, clock):
    sink, topic, uploads = sinks(1)
    uploads.outcome = lambda record: failing() if len(uploads.times) < 3 else Conflict("x")
    with pytest.raises(Conflict):
        stepping(sink, clock, 2)
    assert topic.group == {TP: 0}


def test_a_partition_that_cannot_be_served_keeps_no_other_waiting(sinks, clock, lines):
    sink, topic, uploads = sinks(100, 1_000)
    uploads.outcome = lambda record: failing("AccessDenied") if record.partition == 0 else "written"
    stepping(sink, clock, 5)
    assert topic.group == {TP: 0, TP1: 1_000}
    assert sink.stats.holding == {0: "AccessDenied"}
    uploads.outcome = lambda record: "written"
    stepping(sink, clock, 3)
    assert topic.group == {TP: 100, TP1: 1_000}


def test_a_held_partition_gives_back_what_fills_the_window(sinks, clock):
    sink, topic, uploads = sinks(1_000, 1_000)
    uploads.outcome = lambda record: failing("AccessDenied") if record.partition == 0 else "written"
    stepping(sink, clock, 10, lambda: sink.in_hand() <= WINDOW or pytest.fail("too many"))
    assert topic.group == {TP: 0, TP1: 1_000}
    topic.ends[TP1] += 500
    stepping(sink, clock, 5)
    assert topic.group == {TP: 0, TP1: 1_500}
    uploads.outcome = lambda record: "written"
    stepping(sink, clock, 10)
    assert topic.group == {TP: 1_000, TP1: 1_500}
    assert sink.stats.written == 2_500


@pytest.mark.parametrize(
    ("seconds", "most"),
    [(0.02, WINDOW), (TIMEOUT, WINDOW + 128)],  # all that was taken is done behind the second
    ids=["refused", "silent"],
)
def test_what_was_done_behind_a_hold_counts_among_what_a_kill_9_sends_again(
    sinks, clock, seconds, most
):
    sink, topic, uploads = sinks(1_000, 1_000)
    made = set()
    refused = {(0, 5)}

    def outcome(record):
        where = record.partition, record.offset
        if where in refused:
            return failing("SlowDown")
        made.add(where)
        return "written"

    uploads.slots = 64
    slow = {(0, 5): seconds, (1, 500): 4}
    uploads.takes = lambda record: slow.get((record.partition, record.offset), 0.02)
    uploads.outcome = outcome

    def few_are_sent_again():
        assert len(made) - sum(topic.group.values()) <= most

    stepping(sink, clock, 10, few_are_sent_again)
    assert topic.group == {TP: 5, TP1: 1_000}
    refused.clear()
    stepping(sink, clock, 10, few_are_sent_again)
    assert topic.group == {TP: 1_000, TP1: 1_000}
    assert len(uploads.submitted) - sink.stats.retries == 2_000


def test_a_dead_letter_behind_a_hold_is_not_sent_twice(sinks, clock):
    sink, topic, uploads = sinks(300, 1_000)
    denied = [True]

    def outcome(record):
        if record.partition == 0 and record.offset == 5 and denied:
            return failing("AccessDenied")
        return "dead" if record.partition == 0 and record.offset % 3 == 0 else "written"

    uploads.outcome = outcome
    stepping(sink, clock, 10)
    assert topic.group == {TP: 5, TP1: 1_000}
    denied.clear()
    stepping(sink, clock, 10)
    assert topic.group == {TP: 300, TP1: 1_000}
    dead = [offset for partition, offset in uploads.submitted if partition == 0 and offset % 3 == 0]
    assert sorted(dead) == list(range(0, 300, 3))
    assert sink.stats.dead_letters == 100 and sink.stats.written == 1_200


def test_when_a_hold_is_over_the_others_are_tried_at_once(sinks, clock):
    sink, topic, uploads = sinks(10, 10, takes=lambda record: 0.01)
    uploads.outcome = lambda record: failing("SlowDown")
    stepping(sink, clock, 20)
    ended = clock()
    uploads.outcome = lambda record: "written"
    while topic.group != {TP: 10, TP1: 10}:
        stepping(sink, clock, 0.001)
    tried = {partition: at for at, partition, offset in reversed(uploads.times) if at >= ended}
    assert abs(tried[0] - tried[1]) < 0.1


def test_of_large_records_few_are_under_way_at_once(sinks, clock):
    sink, topic, uploads = sinks(100)
    topic.values = lambda partition, offset: b'{"a": "%s"}' % (b"x" * 2**20)
    most = 0

    def count():
        nonlocal most
        most = max(most, len(uploads.under_way))

    stepping(sink, clock, 20, count)
    assert topic.group == {TP: 100}
    assert 4 <= most <= BYTES_UNDER_WAY // 2**20 + 1


def test_the_first_in_line_that_failed_is_the_hold(sinks, clock):
    sink, _topic, uploads = sinks(8)
    settled(sink, clock)
    stepping(sink, clock, 0.5)
    uploads.takes = lambda record: 0.5 if record.offset == 10 else 0.02
    uploads.outcome = lambda record: failing() if record.offset in (10, 12) else "written"
    _topic.ends[TP] = 20
    stepping(sink, clock, 0.3)
    assert sink.partitions[TP].hold.record.offset == 12
    stepping(sink, clock, 1)
    assert sink.partitions[TP].hold.record.offset == 10
    assert sink.stats.holds == 1


def test_a_dead_letter_in_an_outage_lets_no_more_uploads_begin(sinks, clock):
    sink, topic, uploads = sinks(9, 9)
    stepping(sink, clock, 1)

    def outcome(record):
        return "dead" if record.partition == 1 and record.offset < 12 else failing()

    uploads.outcome = outcome
    topic.ends[TP] = 40
    stepping(sink, clock, 1)
    topic.ends[TP1] = 40
    stepping(sink, clock, 5, lambda: len(uploads.under_way) <= 1 or pytest.fail("two at once"))
    assert sink.stats.dead_letters == 3


def test_a_rebalance_in_an_outage_does_not_say_that_it_is_over(sinks, clock, lines):
    sink, topic, uploads = sinks(20, takes=lambda record: 1.5)
    uploads.outcome = lambda record: failing()
    stepping(sink, clock, 10)
    rebalance(sink, 0)
    stepping(sink, clock, 10)
    assert not [line for line in lines() if "answers again" in line]
    uploads.outcome = lambda record: "written"
    stepping(sink, clock, 10)
    assert topic.group == {TP: 20}
    assert len([line for line in lines() if "S3 answers again" in line]) == 1


def test_what_fails_is_no_longer_said_by_a_member_that_lost_every_partition(sinks, clock, lines):
    sink, _, uploads = sinks(300)
    uploads.outcome = lambda record: failing()
    stepping(sink, clock, 3)
    assert len([line for line in lines() if "S3 failing" in line]) == 1
    rebalance(sink)
    stepping(sink, clock, 100)
    assert len([line for line in lines() if "S3" in line]) == 1, "others say it, and its end"
    rebalance(sink, 0)
    stepping(sink, clock, 3)
    assert len([line for line in lines() if "S3 failing" in line]) == 2
    uploads.outcome = lambda record: "written"
    stepping(sink, clock, 10)
    assert len([line for line in lines() if "S3 answers again" in line]) == 1


def test_while_all_partitions_fail_one_record_is_the_probe_for_all(sinks, clock):
    sink, _topic, uploads = sinks(50, 50)
    uploads.outcome = lambda record: failing()
    stepping(sink, clock, 3)
    assert set(sink.stats.holding) == {0, 1}
    stepping(sink, clock, 20, lambda: len(uploads.under_way) <= 1 or pytest.fail("two at once"))


def test_after_a_hold_by_silence_the_number_under_way_grows_from_one(sinks, clock):
    sink, _topic, uploads = sinks(200, takes=lambda record: 0.1)
    silent = clock() + 3
    uploads.outcome = lambda record: TimeoutError() if clock() < silent else "written"
    most = []
    stepping(sink, clock, 3)
    stepping(sink, clock, 8, lambda: most.append((sink.stats.written, len(uploads.under_way))))
    assert sink.stats.written == 200
    assert all(under_way <= written + 1 for written, under_way in most if written < 63)
    assert max(under_way for _, under_way in most) > 20


def test_what_waits_for_a_slot_when_a_hold_begins_is_not_sent_at_all(sinks, clock):
    sink, _topic, uploads = sinks(100)
    uploads.slots = 4
    settled(sink, clock)
    stepping(sink, clock, 0.1)
    uploads.outcome = lambda record: failing()
    stepping(sink, clock, 1)
    tried = len({offset for _, offset in uploads.submitted}) - sink.stats.written
    assert tried <= 2 * 4  # what had begun before the first failure was seen


# -- The limit, and the end


@pytest.mark.parametrize("limit", [1, 5, 64, 65, 300, 999])
def test_no_more_is_taken_than_was_asked_for(sinks, clock, limit):
    sink, topic, uploads = sinks(500, 500, limit=limit, takes=lambda record: record.offset % 7 / 50)
    run(sink, stopping(False))
    assert len(uploads.submitted) == limit == sink.stats.done
    assert sum(topic.group.values()) == limit
    assert sink.consumer.closed


def test_a_stop_finishes_what_is_under_way_commits_and_closes(sinks, clock, lines):
    sink, topic, uploads = sinks(500, takes=lambda record: 1)
    stepping(sink, clock, 1.5)
    assert len(uploads.under_way) > 100
    run(sink, stopping())
    begun = len(uploads.submitted)
    assert topic.group == {TP: begun} and sink.consumer.closed
    assert lines()[-1] == f"written {begun}, dead-lettered 0"


def test_a_stop_leaves_what_waits_for_a_slot_to_the_next_run(sinks, clock):
    sink, topic, uploads = sinks(500, takes=lambda record: 0.9)
    uploads.slots = 64
    stepping(sink, clock, 1.5)
    before = clock()
    run(sink, stopping())
    assert clock() - before < 1
    assert topic.group == {TP: len(uploads.submitted)}


def test_a_stop_does_not_wait_for_s3_while_it_fails(sinks, clock):
    sink, topic, uploads = sinks(50)
    uploads.outcome = lambda record: "written" if record.offset < 9 else failing()
    stepping(sink, clock, 0.5)
    before = clock()
    run(sink, stopping())
    assert clock() - before < 0.5
    assert topic.group == {TP: 9} and sink.consumer.closed


def test_a_stop_waits_two_seconds_at_most(sinks, clock):
    sink, topic, _uploads = sinks(50, takes=lambda r: 0.01 if r.offset != 9 else math.inf)
    stepping(sink, clock, 0.5)
    before = clock()
    run(sink, stopping())
    assert 2 <= clock() - before < 2.5
    assert topic.group == {TP: 9} and sink.consumer.closed


def test_a_failure_commits_what_was_done_before_it_closes(sinks, clock):
    sink, topic, _uploads = sinks(
        50, outcome=lambda record: Conflict("x") if record.offset == 30 else "written"
    )
    with pytest.raises(Conflict):
        run(sink, stopping(False))
    assert topic.group == {TP: 30} and sink.consumer.closed


# -- What is said


def test_each_object_has_its_line_and_each_dead_letter_a_warning(sinks, clock, lines, caplog):
    sink, topic, uploads = sinks(2, S3_PREFIX="raw/")
    topic.values = lambda p, o: b'{"a": 1}' if o == 0 else b"bad"
    uploads.outcome = lambda record: "written" if record.offset == 0 else "dead"
    stepping(sink, clock, 1)
    assert lines("records") == ["Upload Successfully: s3://bucket/raw/stock_market_0.json"]
    dead = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(dead) == 1
    assert "dead letter: test/0/1" in dead[0].getMessage() and "not JSON" in dead[0].getMessage()
    assert (dead[0].topic, dead[0].partition, dead[0].offset, dead[0].key) == ("test", 0, 1, None)
    assert (sink.stats.written, sink.stats.dead_letters, sink.stats.bytes) == (1, 1, 8)


def test_a_key_of_any_bytes_is_shown_as_text(sinks, clock, caplog):
    caplog.set_level(logging.INFO)
    sink, _topic, _uploads = sinks(0)
    sink.finish(a_record(key=b"\xffk"), "written")
    assert caplog.records[-1].key == "\\xffk"


def test_the_status_line_comes_every_ten_seconds_with_lag_and_rate(sinks, clock, lines):
    sink, _topic, _uploads = sinks(100_000, takes=lambda record: 1 if record.offset else 0.01)
    stop = stopping(False)
    every = sink.consumer.poll

    def poll(*args, **options):
        stop.requested = clock() > 1_035
        return every(*args, **options)

    sink.consumer.poll = poll
    run(sink, stop)
    status = [line for line in lines() if " | lag " in line]
    assert len(status) == 3
    written, rate, lag, *rest = status[1].split(" | ")
    assert rest == ["retries 0", "dead-lettered 0"]
    assert int(written.removeprefix("written ")) + int(lag.removeprefix("lag ")) == pytest.approx(
        100_000, abs=300
    )
    assert 200 < float(rate.removesuffix("/s")) < 300


def test_the_lag_grows_while_holding_though_nothing_is_fetched(sinks, clock):
    sink, topic, uploads = sinks(100)
    uploads.outcome = lambda record: failing()
    stepping(sink, clock, 3)
    assert sink.stats.lag == {0: 100}
    topic.ends[TP] = 5_000
    stepping(sink, clock, 3)
    assert sink.stats.lag == {0: 5_000}


def test_the_lag_is_unknown_while_the_broker_does_not_answer(sinks, clock, lines):
    sink, topic, _uploads = sinks(100)
    stepping(sink, clock, 3)
    assert sink.stats.lag == {0: 0}
    topic.look_takes = lambda: math.inf
    stepping(sink, clock, 15)
    assert sink.stats.lag == {0: None}
    assert any(" | lag ? | " in line for line in lines())
    said = [line for line in lines() if line.startswith("no answer from the broker for 2 s: ")]
    assert len(said) == 1
    topic.look_takes = lambda: 0.01
    stepping(sink, clock, 6)
    assert any(re.match(r"the broker answers again after \d+\.\d s", line) for line in lines())


def test_a_partition_that_gives_no_record_though_there_are_some_is_said_and_rests(
    sinks, clock, lines
):
    sink, topic, _uploads = sinks(10, 10)
    topic.refused = {TP1}
    stepping(sink, clock, 14)
    said = [line for line in lines() if line.startswith("test/1 stands still at 0: the broker")]
    assert len(said) == 1 and "compression.type" in said[0]
    assert topic.group == {TP: 10, TP1: 0}
    assert any({TP1} == paused for _, paused in sink.consumer.polls), "the other is not paused"
    topic.refused = set()
    stepping(sink, clock, 6)
    assert topic.group == {TP: 10, TP1: 10}
    assert any(line.startswith("test/1 moves again after") for line in lines())


def test_an_answer_that_takes_long_is_waited_for(sinks, clock, lines):
    """A pause would have what comes thrown away, and asked for again."""
    sink, topic, _uploads = sinks(50)
    stepping(sink, clock, 2)
    topic.ends[TP] = 100
    topic.refused.add(TP)  # nothing has come yet
    sink.consumer.asked, sink.consumer.polls = [7], []
    stepping(sink, clock, 25)
    assert not any(paused for _, paused in sink.consumer.polls)
    said = [line for line in lines() if "stands still at 50: the broker's answer is on" in line]
    assert said
    topic.refused.clear()
    stepping(sink, clock, 1)
    assert topic.group == {TP: 100}


def test_a_fetch_that_is_refused_again_and_again_is_not_an_answer_on_its_way(sinks, clock, lines):
    sink, topic, _uploads = sinks(50)
    settled(sink, clock)
    topic.ends[TP] = 100
    topic.refused.add(TP)
    requests = iter(range(10**9))
    every = sink.consumer.poll

    def poll(*args, **options):
        sink.consumer.asked = [next(requests)]
        return every(*args, **options)

    sink.consumer.poll = poll
    stepping(sink, clock, 8)
    assert TP in sink.consumer.paused
    assert any("it refuses the fetch" in line for line in lines())


def test_a_topic_that_is_gone_is_said(sinks, clock, lines):
    sink, topic, _uploads = sinks(10)
    stepping(sink, clock, 1)
    topic.mute = {TP}
    topic.seen = lambda asked_at: TopicState(asked_at, {}, {}, {}, {})
    stepping(sink, clock, 5)
    said = lines()
    assert any("topic test does not exist any more" in line for line in said)
    assert not any("the others go on" in line for line in said)


def test_a_member_without_a_partition_says_why_it_waits(sinks, clock, lines):
    sink, _topic, _uploads = sinks(10)
    sink.consumer.next = []
    stepping(sink, clock, 4)
    assert not [line for line in lines() if "no partition of test is assigned" in line]
    stepping(sink, clock, 4)
    assert [line for line in lines() if "no partition of test is assigned" in line]
    sink.consumer.next = [0]
    stepping(sink, clock, 5)
    assert any(line.startswith("a partition is assigned again after") for line in lines())
