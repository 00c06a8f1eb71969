"""Bad records among good ones: dead letters with their bytes, and no record held up by them."""

import json

import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource
from helpers import assert_whole, committed, produce, records, until, until_done

pytestmark = pytest.mark.real

LARGE = 1_000_000
GOOD = [
    b'{"Index": "HSI", "Close": 1.5}',
    b"{}",
    '{"name": "Zürich ☃"}'.encode(),
    b' {"spaced" : [1, {"deep": null}]} \n',
    b'{"a": 1, "a": 2}',
    json.dumps({"large": "x" * (LARGE - 100)}).encode(),
]
BAD = {
    "not JSON": b"hello",
    "half": b'{"a": ',
    "two": b"{}{}",
    "empty": b"",
    "blank": b"  ",
    "null value": None,
    "not UTF-8": b'{"a": "\xff\xfe"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "byte order mark": b'\xef\xbb\xbf{"a": 1}',
    "NaN": b'{"a": NaN}',
    "Infinity": b'{"a": [-Infinity]}',
    "list": b"[1, 2]",
    "number": b"42",
    "string": b'"text"',
    "null": b"null",
    "control character": b'{"a": "\x1b[2J"}',
    "deep": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "long number": b'{"a": ' + b"9" * 10_000 + b"e}",
    "large": b"x" * LARGE,
}


def test_bad_records_become_dead_letters_with_bytes_and_headers_and_good_ones_objects(
    run, env, kafka, topic, objects
):
    values = [*GOOD, *BAD.values(), *GOOD]
    keys = [None if n % 2 else b"key-%d" % n for n in range(len(values))]
    # librdkafka's producer: kafka-python's refuses a record with neither key nor value.
    producer = Producer({"bootstrap.servers": kafka.bootstrap, "message.max.bytes": 2_000_000})
    for key, value in zip(keys, values, strict=True):
        producer.produce(topic, value, key, partition=0)
    assert producer.flush(30) == 0
    script = run("kafka_consumer.py", "--max-messages", str(len(values)), env=env)
    assert script.wait() == 0
    assert "Traceback" not in script.stderr
    letters = records(kafka.bootstrap, f"{topic}_errors")
    letters.sort(key=lambda letter: int(dict(letter.headers)["source.offset"]))
    assert_whole(records(kafka.bootstrap, topic), objects(), letters)
    assert [letter.value for letter in letters] == list(BAD.values())
    for letter, number in zip(letters, range(len(GOOD), len(values)), strict=False):
        headers = dict(letter.headers)
        assert headers.pop("error.reason").decode()
        assert headers == {
            "source.topic": topic.encode(),
            "source.partition": b"0",
            "source.offset": str(number).encode(),
        }
    assert len(objects()) == 2 * len(GOOD)
    assert committed(kafka.bootstrap, env["KAFKA_GROUP_ID"], topic) == {0: len(values)}


def test_bad_records_of_several_partitions_name_their_place(run, env, kafka, topic):
    kafka.create_topic(f"{topic}_3", partitions=3)
    for partition in range(3):
        produce(kafka.bootstrap, f"{topic}_3", [b"{}", b"bad"], partition=partition)
    settings = {**env, "KAFKA_TOPIC": f"{topic}_3"}
    assert run("kafka_consumer.py", "--max-messages", "6", env=settings).wait() == 0
    places = [dict(letter.headers) for letter in records(kafka.bootstrap, f"{topic}_errors")]
    found = sorted((h["source.partition"], h["source.offset"]) for h in places)
    assert found == [(b"0", b"1"), (b"1", b"1"), (b"2", b"1")]


def test_without_the_dead_letter_topic_it_holds_says_so_and_goes_on_when_it_is_made(
    run, env, kafka, topic, objects
):
    settings = {**env, "KAFKA_DLQ_TOPIC": f"{topic}_late"}
    produce(kafka.bootstrap, topic, [b'{"n": 0}', b"bad", b'{"n": 2}'])
    script = run("kafka_consumer.py", env=settings)
    script.wait_for(rf"{topic}_late", timeout=40, stream="stderr")
    until(lambda: "stock_market_0.json" in objects())
    until(lambda: committed(kafka.bootstrap, env["KAFKA_GROUP_ID"], topic) == {0: 1})
    assert script.process.poll() is None
    kafka.create_topic(f"{topic}_late")
    until_done(kafka.bootstrap, env["KAFKA_GROUP_ID"], topic)
    assert [r.value for r in records(kafka.bootstrap, f"{topic}_late")] == [b"bad"]
    assert set(objects()) == {"stock_market_0.json", "stock_market_2.json"}
    script.terminate()
    assert script.wait() == 0


def test_a_dead_letter_that_the_broker_refuses_holds_the_place_until_it_is_taken(
    run, env, kafka, topic, objects
):
    """What is committed was acknowledged: the topic is there, and takes no record of this size."""
    small = f"{topic}_small"
    kafka.create_topic(small, config={"max.message.bytes": "500"})
    produce(kafka.bootstrap, topic, [b'{"n": 0}', b"bad " * 500, b'{"n": 2}'])
    script = run("kafka_consumer.py", env={**env, "KAFKA_DLQ_TOPIC": small})
    script.wait_for(f"topic {small} failing, holding at {topic}/0/1: .*TooLarge", stream="stderr")
    until(lambda: committed(kafka.bootstrap, env["KAFKA_GROUP_ID"], topic) == {0: 1})
    change = ConfigEntry("max.message.bytes", "5000", incremental_operation=AlterConfigOpType.SET)
    resource = ConfigResource(ConfigResource.Type.TOPIC, small, incremental_configs=[change])
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap})
    admin.incremental_alter_configs([resource])[resource].result(10)
    until_done(kafka.bootstrap, env["KAFKA_GROUP_ID"], topic)
    assert [r.value for r in records(kafka.bootstrap, small)] == [b"bad " * 500]
    assert set(objects()) == {"stock_market_0.json", "stock_market_2.json"}
    script.terminate()
    assert script.wait() == 0
