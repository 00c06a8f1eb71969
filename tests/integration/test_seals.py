"""Seals: an audit proves the bucket once, and its proof outlives the records of the topic."""

import json
import re

import pytest
from helpers import delete_records, free_port, produce, until
from s3_faults import FaultyS3

pytestmark = [pytest.mark.real, pytest.mark.detail]

VALUES = [b'{"n": %d}' % n if n not in (7, 11) else b"bad %d" % n for n in range(20)]


@pytest.fixture
def client(s3):
    return s3.client()


@pytest.fixture
def consume(run, env, kafka, topic):
    """Send values and have them written."""

    def send(values):
        produce(kafka.bootstrap, topic, values)
        script = run("kafka_consumer.py", "--max-messages", str(len(values)), env=env)
        assert script.wait() == 0, script.stderr

    return send


@pytest.fixture
def proof(run, env):
    """proof("--seal") -> (exit code, all that was said)."""

    def start(*args, **changes):
        script = run("infra/audit.py", *args, env={**env, **changes})
        code = script.wait(60)
        assert "Traceback" not in script.stderr
        return code, script.stdout + script.stderr

    return start


@pytest.fixture
def verify(proof):
    """The verification, with a broker that is not there: it needs none."""

    def start(*args, **changes):
        nowhere = f"127.0.0.1:{free_port()}"
        return proof("--verify", *args, KAFKA_BOOTSTRAP_SERVERS=nowhere, **changes)

    return start


@pytest.fixture
def sealed(consume, proof):
    """20 records, two of them dead letters, in two seals; returns the root."""
    consume(VALUES[:15])
    code, said = proof("--seal")
    assert code == 0, said
    consume(VALUES[15:])
    code, said = proof("--seal")
    assert code == 0, said
    return re.search("root ([0-9a-f]{64})", said)[1]


FIRST, SECOND = "_seals/partition=0/0-14.json", "_seals/partition=0/15-19.json"


def test_what_was_sealed_is_proven_when_the_topic_has_forgotten_it(
    kafka, topic, env, proof, verify, sealed, objects, client, bucket
):
    assert {FIRST, SECOND} <= set(objects())
    delete_records(kafka.bootstrap, topic, before=20)
    before = objects()
    for code, said in (verify(), verify("--root", sealed), proof(), proof("--audit")):
        assert code == 0, said
        assert "18 sealed objects, 2 sealed dead letters" in said
        assert "outlive" not in said
    assert objects() == before
    client.delete_object(Bucket=bucket, Key="stock_market_3.json")
    for code, said in (verify(), proof()):
        assert code == 1
        assert f"MISSING: {topic}/0 offsets 3 to 3: no object, sealed by {FIRST}" in said


def test_the_consumers_audit_goes_by_the_seals_too(kafka, topic, run, env, sealed):
    delete_records(kafka.bootstrap, topic, before=20)
    script = run("kafka_consumer.py", "--audit", env=env)
    assert script.wait() == 0
    assert "18 sealed objects, 2 sealed dead letters" in script.stdout


def test_the_verdict_is_the_last_line(proof, verify, sealed):
    for answer, name in ((proof, "audit: "), (verify, "verify: ")):
        assert answer()[1].splitlines()[-1].startswith(name)


def test_a_seal_begins_where_the_last_one_ended_and_nothing_is_sealed_twice(
    consume, proof, sealed, objects
):
    before = objects()
    code, said = proof("--seal")
    assert code == 0
    assert f"root {sealed}" in said
    assert objects() == before
    consume([b"{}"] * 3)
    assert proof("--seal")[0] == 0
    made = set(objects()) - set(before) - {f"stock_market_{n}.json" for n in range(20, 23)}
    assert made == {"_seals/partition=0/20-22.json"}


def change(client, bucket, key, value):
    client.put_object(Bucket=bucket, Key=key, Body=value)


def remove(client, bucket, key):
    client.delete_object(Bucket=bucket, Key=key)


def change_seal(client, bucket, key):
    body = client.get_object(Bucket=bucket, Key=key)["Body"].read()
    change(client, bucket, key, body.replace(b'"objects":', b'"objects":1'))


def move(client, bucket, key, other):
    body = client.get_object(Bucket=bucket, Key=key)["Body"].read()
    remove(client, bucket, key)
    change(client, bucket, other, body)


@pytest.mark.parametrize(
    ("tamper", "named"),
    [
        ((remove, "stock_market_3.json"), "MISSING: .* offsets 3 to 3"),
        ((change, "stock_market_3.json", b'{"n": 4}'), "DIFFERENT: stock_market_3.json"),
        ((change, "stock_market_7.json", b"bad 7"), "STRAY: stock_market_7.json"),
        ((remove, FIRST), "BROKEN: .* no seal for offsets 0 to 14"),
        ((change_seal, FIRST), f"BROKEN: {FIRST}: no seal, or a changed one"),
        ((move, FIRST, "_seals/partition=0/0-13.json"), "BROKEN: .*: the seal of another place"),
        ((remove, SECOND), "BROKEN: [0-9a-f]{64} is no root"),
    ],
)
def test_tampering_is_named(verify, sealed, client, bucket, tamper, named):
    how, *what = tamper
    how(client, bucket, *what)
    code, said = verify("--root", sealed)
    assert code == 1
    assert re.search(named, said), said


def test_a_copy_of_the_bucket_in_a_folder_is_verified_without_s3(
    verify, sealed, objects, tmp_path, env
):
    folder = tmp_path / "copy"
    for name, value in objects().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(value)
    away = {"S3_BUCKET": "", "S3_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}"}
    code, said = verify("--folder", str(folder), "--root", sealed, **away)
    assert code == 0, said
    assert "18 sealed objects" in said
    (folder / "stock_market_3.json").write_bytes(b"{}")
    (folder / "stock_market_4.json").unlink()
    code, said = verify("--folder", str(folder), **away)
    assert code == 1
    assert f"DIFFERENT: stock_market_3.json: other bytes than {FIRST} has sealed" in said
    assert "offsets 4 to 4: no object" in said


def test_two_audits_at_once_make_one_chain(consume, run, env, verify, objects):
    consume(VALUES)
    scripts = [run("infra/audit.py", "--seal", env=env) for _ in range(2)]
    codes = sorted(script.wait(60) for script in scripts)
    assert codes in ([0, 0], [0, 1])
    for script in scripts:
        assert "Traceback" not in script.stderr
        assert script.process.returncode == 0 or "another audit" in script.stderr
    assert [name for name in objects() if "_seals" in name] == ["_seals/partition=0/0-19.json"]
    assert verify()[0] == 0


def test_nothing_is_sealed_while_something_is_wrong(consume, proof, client, bucket, objects):
    consume(VALUES)
    client.delete_object(Bucket=bucket, Key="stock_market_3.json")
    code, said = proof("--seal")
    assert code == 1
    assert "MISSING" in said and "nothing was sealed" in said
    assert not [name for name in objects() if "_seals" in name]


def test_a_store_that_replaces_objects_gets_one_seal_and_a_word(consume, run, env, objects):
    """As those do that do not know `If-None-Match`."""
    consume([b"{}"] * 3)
    with FaultyS3(traits=("ignores conditions",)) as s3:
        for name, value in objects().items():
            s3.store[f"{env['S3_BUCKET']}/{name}"] = value
        script = run("infra/audit.py", "--seal", env={**env, "S3_ENDPOINT_URL": s3.endpoint})
        assert script.wait() == 1
    assert "replaces objects despite If-None-Match" in script.stderr


def test_every_partition_has_its_chain_and_all_have_one_root(
    run, env, kafka, topic, proof, verify, objects
):
    kafka.create_topic(f"{topic}_3", partitions=3)
    here = {"KAFKA_TOPIC": f"{topic}_3", "S3_PREFIX": "a/b/", "KAFKA_GROUP_ID": f"{topic}_3"}
    for partition in range(3):
        produce(kafka.bootstrap, f"{topic}_3", [b'{"p": %d}' % partition] * 4, partition=partition)
    script = run("kafka_consumer.py", "--max-messages", "12", env={**env, **here})
    assert script.wait() == 0
    code, said = proof("--seal", **here)
    assert code == 0, said
    seals = sorted(name for name in objects() if "_seals" in name)
    assert seals == [f"a/b/_seals/partition={p}/0-3.json" for p in range(3)]
    root = re.search("root ([0-9a-f]{64})", said)[1]
    code, said = verify("--root", root, **here)
    assert code == 0
    assert "12 sealed objects" in said
    assert json.loads(objects()[seals[2]])["topic"] == f"{topic}_3"


def test_wrong_use_is_said_in_a_line(proof, env, tmp_path):
    for args in (
        ("--folder", str(tmp_path)),
        ("--verify", "--root", "abc"),
        ("--verify", "--folder", str(tmp_path / "nowhere")),
        ("--seal", "--verify"),
    ):
        assert proof(*args)[0] == 2
    assert proof("--verify", S3_BUCKET="")[0] == 2
    code, said = proof("--verify")
    assert code == 1
    assert "no seals under _seals/" in said
    code, said = proof("--verify", S3_BUCKET="there-is-no-such-bucket")
    assert code == 1
    assert "NoSuchBucket" in said and "create it, or correct S3_BUCKET" in said


def test_a_verification_can_be_stopped(run, env, sealed, s3):
    with FaultyS3(s3.endpoint) as faulty:
        faulty.latency = 1
        script = run("infra/audit.py", "--verify", env={**env, "S3_ENDPOINT_URL": faulty.endpoint})
        until(lambda: faulty.requests, what="a request")
        script.terminate()
        assert script.wait(10) == 1
    assert "Traceback" not in script.stderr
