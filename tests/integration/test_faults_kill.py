"""kill -9 at any moment: what is in the topic and in the bucket is whole."""

import json
import random
import re
import time

import pytest
from helpers import assert_whole, produce, records, until, until_done
from s3_faults import FaultyS3

pytestmark = pytest.mark.real


def kill_and_go_on(run, env, kafka, topic, faulty, total: int, kills: int) -> list[int]:
    """Run the consumer over `total` records, killing it `kills` times; what was sent again after
    each."""
    values = [json.dumps({"n": n, "pad": "x" * (n % 500)}).encode() for n in range(total)]
    produce(kafka.bootstrap, topic, values)
    env = {**env, "S3_ENDPOINT_URL": faulty.endpoint}
    share = total // (kills + 1)
    sent_again = []
    for _ in range(kills):
        earlier = {put.key for put in faulty.puts()}
        seen = len(faulty.requests)
        target = len(faulty.stored()) + random.randint(share // 2, share)
        script = run("kafka_consumer.py", env=env)
        until(lambda target=target: len(faulty.stored()) >= target)
        script.kill()
        script.wait()
        sent_again.append(_again(faulty, seen, earlier))
    earlier, seen = {put.key for put in faulty.puts()}, len(faulty.requests)
    script = run("kafka_consumer.py", env=env)
    until_done(kafka.bootstrap, env["KAFKA_GROUP_ID"], topic, timeout=120)
    sent_again.append(_again(faulty, seen, earlier))
    script.terminate()
    assert script.wait() == 0
    return sent_again[1:]


def _again(faulty, seen: int, earlier: set[str]) -> int:
    """Records, not requests: the first object of a run is put twice (the server's condition)."""
    return len({r.key for r in faulty.requests[seen:] if r.operation == "put"} & earlier)


def check(run, env, kafka, topic, objects, faulty, sent_again) -> None:
    print("sent again after each kill:", sent_again)
    assert max(sent_again) <= 256
    stored = [put.key for put in faulty.stored()]
    assert len(stored) == len(set(stored)), "overwritten"
    assert_whole(records(kafka.bootstrap, topic), objects())
    audit = run("kafka_consumer.py", "--audit", env=env)
    assert audit.wait(timeout=60) == 0


def test_kill_9_of_the_consumer_loses_nothing_and_sends_little_again(
    run, env, kafka, topic, s3, objects
):
    """Killed when it hurts most: one upload hangs, so that nothing after it can be committed."""
    produce(kafka.bootstrap, topic, [b'{"n": %d}' % n for n in range(900)])
    with FaultyS3(s3.endpoint) as faulty:
        settings = {**env, "S3_ENDPOINT_URL": faulty.endpoint}
        faulty.fail("hang", only=("stock_market_300.json",))
        script = run("kafka_consumer.py", env=settings)
        # On a slow machine the hold can come before the window is full: then less is sent again.
        until(lambda: len(faulty.stored()) > 500 or "holding at" in script.stderr)
        time.sleep(1)
        script.kill()
        faulty.heal()
        earlier, seen = {put.key for put in faulty.puts()}, len(faulty.requests)
        run("kafka_consumer.py", env=settings)
        until_done(kafka.bootstrap, env["KAFKA_GROUP_ID"], topic)
        check(run, env, kafka, topic, objects, faulty, [_again(faulty, seen, earlier)])


@pytest.mark.slow
def test_ten_kills_of_the_consumer_in_5000_records_lose_nothing(
    run, env, kafka, topic, s3, objects
):
    with FaultyS3(s3.endpoint, latency=0.025) as faulty:
        sent_again = kill_and_go_on(run, env, kafka, topic, faulty, total=5000, kills=10)
    check(run, env, kafka, topic, objects, faulty, sent_again)


@pytest.mark.parametrize("rate", ["90", "0"], ids=["paced", "as fast as it goes"])
def test_kill_9_of_the_producer_leaves_whole_records_in_order_and_none_twice(
    run, env, kafka, topic, rate
):
    """With a seed the rows are known beforehand: the topic holds the first of them, no more."""
    kafka.create_topic(f"{topic}_seed")
    reference_env = {**env, "KAFKA_TOPIC": f"{topic}_seed"}
    script = run("kafka_producer.py", "--rate", rate, "--seed", "7", env=env)
    script.wait_for(r"Offset: 60\b|sent \d{4}")
    script.kill()
    script.wait()
    found = [r.value for r in records(kafka.bootstrap, topic)]
    assert found
    reference = run(
        "kafka_producer.py", "--rate", "0", "--seed", "7", "--max-messages", str(len(found)),
        env=reference_env,
    )  # fmt: skip
    assert reference.wait(timeout=60) == 0
    assert found == [r.value for r in records(kafka.bootstrap, f"{topic}_seed")]
    for offset, content in re.findall(r"Offset: (\d+)\s*\n\s+Content: (\{.*\})\n", script.stdout):
        assert json.loads(found[int(offset)]) == json.loads(content), "said, and not there"
