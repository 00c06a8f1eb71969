"""Topics written to in transactions: the markers of their ends are no records."""

import re

import kafka as client
import pytest
from confluent_kafka import Producer
from helpers import committed, end_of, produce, records, until

pytestmark = pytest.mark.real

# kafka-python-ng delivers aborted records too: no setting of ours can tell it not to.
READS_COMMITTED_ONLY = int(client.__version__.partition(".")[0]) >= 3


def transaction(bootstrap: str, topic: str, values: list[bytes], *, commit: bool = True) -> None:
    """The values in one transaction, and the marker that the broker puts behind them."""
    end = end_of(bootstrap, topic) + len(values) + 1
    producer = Producer({"bootstrap.servers": bootstrap, "transactional.id": f"tx-{topic}"})
    producer.init_transactions(30)
    producer.begin_transaction()
    for value in values:
        producer.produce(topic, value, partition=0)
    assert producer.flush(30) == 0
    if commit:
        producer.commit_transaction(30)
    else:
        producer.abort_transaction(30)
    until(lambda: end_of(bootstrap, topic) == end, what="the marker")


def test_markers_of_transactions_are_neither_objects_nor_dead_letters(
    run, env, kafka, topic, objects
):
    """Offsets: committed records 0 to 2, marker 3; aborted 4 and 5, marker 6; plain 7, 8; then a
    committed 9 and a marker 10 at the end, which is committed past."""
    transaction(kafka.bootstrap, topic, [b'{"n": %d}' % n for n in range(3)])
    transaction(kafka.bootstrap, topic, [b'{"aborted": 1}'] * 2, commit=False)
    assert produce(kafka.bootstrap, topic, [b'{"plain": 1}'] * 2) == [7, 8]
    transaction(kafka.bootstrap, topic, [b'{"last": 1}'])
    script = run("kafka_consumer.py", env=env)
    script.wait_for(r"stock_market_9\.json")
    until(lambda: committed(kafka.bootstrap, env["KAFKA_GROUP_ID"], topic).get(0, 0) >= 10)
    script.terminate()
    assert script.wait() == 0
    names = {f"stock_market_{n}.json" for n in (0, 1, 2, 7, 8, 9)}
    aborted = {f"stock_market_{n}.json" for n in (4, 5)}
    assert set(objects()) == (names if READS_COMMITTED_ONLY else names | aborted)
    assert records(kafka.bootstrap, f"{topic}_errors") == []
    assert "dead letter:" not in script.stderr
    audit = run("kafka_consumer.py", "--audit", env=env)
    assert audit.wait() == 0, audit.stdout
    assert re.search("nothing missing", audit.stdout)


def test_markers_do_not_count_as_messages(run, env, kafka, topic, objects):
    for n in range(3):
        transaction(kafka.bootstrap, topic, [b'{"n": %d}' % n])
    script = run("kafka_consumer.py", "--max-messages", "3", env=env)
    assert script.wait() == 0
    assert set(objects()) == {f"stock_market_{n}.json" for n in (0, 2, 4)}
    # Asked for one more, it waits for one: the last marker is none.
    more = run("kafka_consumer.py", "--max-messages", "1", env=env)
    more.wait_for(rf"assigned: {topic}/0", stream="stderr")
    produce(kafka.bootstrap, topic, [b'{"n": 3}'])
    assert more.wait() == 0
    assert "stock_market_6.json" in objects()


@pytest.mark.parametrize(
    "mark",
    [
        pytest.param(b"\0\0\0\0", id="abort"),
        pytest.param(b"\0\0\0\1", id="commit", marks=pytest.mark.slow),
    ],
)
def test_records_that_look_like_markers_are_records(run, env, kafka, topic, objects, mark):
    """Four bytes of key and six of value are what a marker has; a record may have them too."""
    values = [b'{"":1}', b"\0\0\0\0\0\0", b'{"n": 2}']
    produce(kafka.bootstrap, topic, values, keys=[mark, mark, None])
    script = run("kafka_consumer.py", "--max-messages", "3", env=env)
    assert script.wait() == 0
    assert objects() == {"stock_market_0.json": values[0], "stock_market_2.json": values[2]}
    assert [letter.value for letter in records(kafka.bootstrap, f"{topic}_errors")] == [values[1]]
