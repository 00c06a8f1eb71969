"""The road of a user: the two scripts as two processes, with the settings of .env.example."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import Kafka, Script, committed, produce, records, scratch_env, until
from local_stack import ROOT, S3

GROUP = "python-consumer-group"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with what the two scripts need and no more."""
    folder = tmp_path / "checkout"
    shutil.copytree(ROOT / "tests" / "data", folder / "tests" / "data")
    for name in ("config.py", "kafka_producer.py", "kafka_consumer.py"):
        shutil.copy(ROOT / name, folder)
    return folder


def lag(kafka: Kafka, bootstrap: str, group: str) -> dict[str, str]:
    """What kafka-consumer-groups.sh --describe says of the group's only partition, by column."""
    told = kafka.command(
        *("kafka.admin.ConsumerGroupCommand", "--bootstrap-server", bootstrap),
        *("--describe", "--group", group),
    )
    header, row = (line.split() for line in told.splitlines() if line.strip())
    return dict(zip(header, row, strict=True))


def test_env_example_as_it_stands_streams_rows_into_the_bucket_of_the_local_stack(
    kafka: Kafka, run: Callable[..., Script], checkout: Path, tmp_path: Path
) -> None:
    stack = run("infra/local_stack.py", "--port", "0", "--s3-port", "0", env=dict(os.environ))
    stack.wait_for("^Ready", 90)
    port = stack.wait_for(r"^Kafka: localhost:(\d+)")[1]
    s3_port = stack.wait_for(r"http://localhost:(\d+)")[1]
    example = (ROOT / ".env.example").read_text()
    free = example.replace("localhost:9092", f"localhost:{port}").replace(":9000", f":{s3_port}")
    (checkout / ".env").write_text(free)

    home = scratch_env(tmp_path)  # no setting but those of .env
    consumer = run(f"{checkout}/kafka_consumer.py", env=home)
    producer = run(f"{checkout}/kafka_producer.py", "--max-messages", "5", env=home)
    assert producer.wait(30) == 0
    until(lambda: consumer.stdout.count("Upload Successfully") == 5)

    values = [record.value for record in records(f"localhost:{port}", "test")]
    s3 = S3(tmp_path, int(s3_port)).client()
    bucket = "stock-market-local"
    names = [entry["Key"] for entry in s3.list_objects_v2(Bucket=bucket)["Contents"]]
    assert names == [f"stock_market_{n}.json" for n in range(5)]
    assert [s3.get_object(Bucket=bucket, Key=name)["Body"].read() for name in names] == values

    assert producer.lines()[:2] == [
        "[Sent] Topic: test | Partition: 0 | Offset: 0",
        f"   Content: {values[0].decode()}",
    ]
    assert consumer.lines()[0].startswith("Connection Test:  [")
    # Several at once, when it starts late: in any order.
    assert sorted(line for line in consumer.lines() if line.startswith("Upload")) == [
        f"Upload Successfully: s3://{bucket}/stock_market_{n}.json" for n in range(5)
    ]
    described = lag(kafka, f"localhost:{port}", GROUP)
    assert (described["CURRENT-OFFSET"], described["LAG"]) == ("5", "0")

    consumer.interrupt()
    assert consumer.wait(5) == 0
    stack.interrupt()
    assert stack.wait(15) == 0


def test_every_row_sent_is_a_row_of_the_csv_with_the_same_numbers(
    kafka: Kafka, topic: str, env: dict[str, str], run: Callable[..., Script]
) -> None:
    header, *lines = Path(env["CSV_PATH"]).read_text().splitlines()
    rows = {tuple(line.split(",")) for line in lines}
    assert run("kafka_producer.py", "--max-messages", "300", env=env).wait() == 0
    sent = records(kafka.bootstrap, topic)
    assert len(sent) == 300
    for record in sent:
        row = json.loads(record.value, parse_float=str)
        assert ",".join(row) == header
        assert tuple(row.values()) in rows


def test_a_second_start_goes_on_where_the_first_stopped_and_rewrites_nothing(
    kafka: Kafka,
    s3: S3,
    topic: str,
    bucket: str,
    env: dict[str, str],
    objects: Callable[[], dict[str, bytes]],
    run: Callable[..., Script],
) -> None:
    values = [b'{"n": %d}' % n for n in range(30)]

    def written() -> dict[str, object]:
        listed = s3.client().list_objects_v2(Bucket=bucket)["Contents"]
        return {entry["Key"]: entry["LastModified"] for entry in listed}

    produce(kafka.bootstrap, topic, values[:20])
    first = run("kafka_consumer.py", env=env)
    until(lambda: committed(kafka.bootstrap, env["KAFKA_GROUP_ID"], topic) == {0: 20})
    first.terminate()
    assert first.wait(5) == 0
    before = written()

    produce(kafka.bootstrap, topic, values[20:])
    second = run("kafka_consumer.py", "--max-messages", "10", env=env)
    assert second.wait() == 0
    uploads = re.findall(r"stock_market_(\d+)\.json$", second.stdout, re.MULTILINE)
    assert sorted(map(int, uploads)) == list(range(20, 30))
    assert {name: when for name, when in written().items() if name in before} == before
    assert objects() == {f"stock_market_{n}.json": value for n, value in enumerate(values)}
    assert lag(kafka, kafka.bootstrap, env["KAFKA_GROUP_ID"])["LAG"] == "0"

    audit = run("kafka_consumer.py", "--audit", env=env)
    assert audit.wait() == 0, audit.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh clone with a .env of its owner that must not be touched."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    folder = tmp_path_factory.mktemp("demo") / "clone"
    subprocess.run(["git", "clone", "-q", ROOT, folder], check=True)
    own = "KAFKA_BOOTSTRAP_SERVERS=127.0.0.1:1\nS3_BUCKET=precious\nKAFKA_TOPIC=precious\n"
    (folder / ".env").write_text(own + "AWS_PROFILE=precious\n")
    return folder


def commands_without(folder: Path, *left_out: str) -> str:
    """A PATH with the commands of this machine's but some."""
    folder.mkdir()
    for entry in os.environ["PATH"].split(os.pathsep):
        for command in Path(entry).glob("*"):
            link = folder / command.name
            if command.name not in left_out and not link.exists():
                link.symlink_to(command)
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("java", [True, False], ids=["with Java", "without Java"])
def test_the_demo_works_from_a_fresh_clone(clone: Path, tmp_path: Path, java: bool) -> None:
    env = {
        **os.environ,
        # Settings that must make no difference.
        **{"KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:1", "S3_BUCKET": "precious", "AWS_PROFILE": "no"},
        **{"TMPDIR": str(tmp_path)},
    }
    if java:
        env.setdefault("KAFKA_HOME", str(ROOT / ".local" / "kafka"))  # Maven was tried elsewhere
    else:
        env["PATH"] = commands_without(tmp_path / "bin", "java", "mvn", "go", "versitygw")
        for name in ("JAVA_HOME", "KAFKA_HOME", "VERSITYGW"):
            env.pop(name, None)
    done = subprocess.run(
        [clone / "infra" / "demo.sh"], env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    broker = "Apache Kafka 3.3.1 with ZooKeeper" if java else "the embedded broker"
    assert re.search(rf"^stack    \| Kafka: localhost:\d+ \({broker}", done.stdout, re.MULTILINE)
    assert done.stdout.count("producer | [Sent] Topic: test | Partition: 0 | Offset: ") == 20
    for n in range(20):
        assert f"consumer | Upload Successfully: s3://stock-market-local/stock_market_{n}.json" in (
            done.stdout
        )
    assert "precious" not in done.stdout + done.stderr
    assert "nothing missing" in done.stdout
    assert [path.name for path in tmp_path.iterdir() if path.name != "bin"] == []
