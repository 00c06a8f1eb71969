"""infra/local_stack.py in the foreground: what it starts, says and leaves behind."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import botocore.exceptions
import pytest
from helpers import Kafka, Script, free_port, produce, records, until
from kafka import KafkaConsumer
from kafka import __version__ as kafka_client
from kafka.admin import KafkaAdminClient
from local_stack import API_VERSION, EXAMPLE, S3, main, port_is_free

pytestmark = pytest.mark.detail


@pytest.fixture
def stack_env(tmp_path: Path) -> dict[str, str]:
    """This machine's programs, and a temporary folder in which what is left behind can be seen."""
    (tmp_path / "tmp").mkdir()
    return {**os.environ, "TMPDIR": str(tmp_path / "tmp")}


@pytest.fixture
def stack(run: Callable[..., Script], stack_env: dict[str, str]) -> Callable[..., Script]:
    """Call it to start the stack on free ports and wait for its ready line."""

    def start(*args: str, **env: str) -> Script:
        ports = ["--port", str(free_port()), "--s3-port", str(free_port())]
        script = run("infra/local_stack.py", *ports, *args, env={**stack_env, **env})
        script.wait_for("^Ready", 90, "stdout")
        return script

    return start


def ports(script: Script) -> tuple[int, int]:
    kafka = script.wait_for(r"localhost:(\d+) \(")
    s3 = script.wait_for(r"http://localhost:(\d+)")
    return int(kafka[1]), int(s3[1])


def children(pid: int) -> list[int]:
    """The processes that `pid` has started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


@pytest.mark.real
@pytest.mark.parametrize(
    "ask",
    [
        Script.interrupt,
        pytest.param(Script.terminate, marks=pytest.mark.slow),
        pytest.param(Script.hang_up, marks=pytest.mark.slow),
    ],
)
def test_it_serves_what_env_example_names_and_leaves_nothing_behind(
    kafka: Kafka, stack: Callable[..., Script], tmp_path: Path, ask: Callable[[Script], None]
) -> None:
    script = stack()
    port, s3_port = ports(script)
    assert "Apache Kafka 3.3.1" in script.stdout
    consumer = KafkaConsumer(bootstrap_servers=f"localhost:{port}", api_version=API_VERSION)
    assert consumer.topics() >= {EXAMPLE["KAFKA_TOPIC"], EXAMPLE["KAFKA_DLQ_TOPIC"]}
    assert consumer.partitions_for_topic(EXAMPLE["KAFKA_TOPIC"]) == {0}
    consumer.close()
    S3(tmp_path, s3_port).client().head_bucket(Bucket=EXAMPLE["S3_BUCKET"])

    ask(script)
    assert script.wait(15) == 0
    assert script.stderr == "Stopped.\n"
    assert list((tmp_path / "tmp").iterdir()) == []
    assert port_is_free(port) and port_is_free(s3_port)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's help is Linux's")
def test_its_servers_die_with_it_when_it_is_killed(
    kafka: Kafka, stack: Callable[..., Script]
) -> None:
    script = stack()
    servers = children(script.pid)
    assert len(servers) == 3
    script.kill()
    until(lambda: not any(Path(f"/proc/{pid}/cmdline").exists() for pid in servers), 5)


@pytest.mark.slow
def test_a_server_that_ends_ends_it_shows_the_end_of_its_log_and_keeps_the_log(
    kafka: Kafka, stack: Callable[..., Script], tmp_path: Path
) -> None:
    script = stack()
    (broker,) = (p for p in children(script.pid) if b"kafka.Kafka" in cmdline(p))
    os.kill(broker, 9)
    assert script.wait(15) == 1
    (log,) = (tmp_path / "tmp").iterdir()
    first, *shown, last = script.stderr.splitlines()
    assert first == "local_stack: the log of the broker ends:"
    assert last == (
        "local_stack: the broker has ended by itself, code -9, killed from outside; "
        f"all of its log is in {log}"
    )
    assert log.read_text().splitlines()[-len(shown) :] == shown
    assert "started (kafka.server.KafkaServer)" in shown[-1]


@pytest.mark.slow
def test_what_is_kept_is_there_at_the_next_start(
    kafka: Kafka, s3: S3, stack: Callable[..., Script], run: Callable[..., Script], tmp_path: Path
) -> None:
    if s3.kind != "versitygw":
        pytest.skip("moto keeps nothing")
    keep = tmp_path / "kept data"
    script = stack("--topic", "stocks:3", "--bucket", "another", "--keep", str(keep))
    port, s3_port = ports(script)
    assert "topics test:1, error_topic:1, stocks:3\n" in script.stdout
    produce(f"localhost:{port}", "stocks", [b"1", b"2"], partition=2)
    S3(tmp_path, s3_port).client().put_object(Bucket="another", Key="a", Body=b"kept")

    second = run(
        "infra/local_stack.py", "--port=0", "--s3-port=0", f"--keep={keep}", env=os.environ
    )
    assert second.wait() == 1
    assert second.stderr.startswith(f"local_stack: {keep} is in use by another local_stack.py: ")

    script.terminate()
    assert script.wait(15) == 0
    script = stack("--topic", "stocks:4", "--keep", str(keep))
    port, s3_port = ports(script)
    assert "bucket another, stock-market-local\n" in script.stdout
    assert "topics test:1, error_topic:1, stocks:3\n" in script.stdout
    assert script.stderr.startswith("Topic stocks was kept: its partitions are 3, not 4. ")
    found = records(f"localhost:{port}", "stocks")
    assert [(record.partition, record.value) for record in found] == [(2, b"1"), (2, b"2")]
    client = S3(tmp_path, s3_port).client()
    assert client.get_object(Bucket="another", Key="a")["Body"].read() == b"kept"


def test_nothing_can_be_kept_without_apache_kafka(
    s3: S3, run: Callable[..., Script], stack_env: dict[str, str], tmp_path: Path
) -> None:
    if s3.kind != "versitygw":
        pytest.skip("moto keeps nothing either")
    env = {**stack_env, "PATH": str(tmp_path), "JAVA_HOME": ""}
    keep = f"--keep={tmp_path / 'kept'}"
    script = run("infra/local_stack.py", "--port=0", "--s3-port=0", keep, env=env)
    assert script.wait() == 1
    assert script.stderr == (
        "local_stack: --keep needs Apache Kafka, which keeps topics on disk, and Java was not "
        "found: install a JDK and Maven, or run without --keep\n"
    )


def test_a_folder_with_a_comma_is_refused(
    run: Callable[..., Script], stack_env: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "c,d").mkdir()
    for args, env in (
        ([f"--keep={tmp_path / 'a,b'}"], stack_env),
        ([], stack_env | {"TMPDIR": str(tmp_path / "c,d")}),
    ):
        script = run("infra/local_stack.py", "--port=0", "--s3-port=0", *args, env=env)
        assert script.wait() == 1
        assert "a comma separates folders for Kafka; take another" in script.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c,d", "tmp"]


def test_an_s3_server_that_is_not_there_is_one_line(
    run: Callable[..., Script], stack_env: dict[str, str]
) -> None:
    env = stack_env | {"VERSITYGW": "/nowhere/versitygw"}
    script = run("infra/local_stack.py", "--port=0", "--s3-port=0", env=env)
    assert script.wait() == 1
    said = "local_stack: VERSITYGW=/nowhere/versitygw: there is no such program"
    assert script.lines("stderr") == [said]


@pytest.mark.real
def test_all_its_data_is_in_a_folder_of_any_name(
    kafka: Kafka, s3: S3, stack: Callable[..., Script], tmp_path: Path
) -> None:
    if s3.kind != "versitygw":
        pytest.skip("moto keeps nothing")
    keep = tmp_path / "größe 日経 50%20 #1 \\x"
    script = stack("--keep", str(keep), LC_ALL="C", PYTHONUTF8="1")
    script.terminate()
    assert script.wait(15) == 0
    assert {"kafka", "zookeeper", "s3", "broker.log"} <= {path.name for path in keep.iterdir()}
    assert "started (kafka.server.KafkaServer)" in (keep / "broker.log").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([keep.name, "tmp"])


def cmdline(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


@pytest.mark.skipif(
    kafka_client.startswith("3"), reason="kafka-python 3 does not understand librdkafka's broker"
)
def test_without_java_the_embedded_broker_serves_groups_on_the_same_port(
    stack: Callable[..., Script], tmp_path: Path
) -> None:
    script = stack(PATH=str(tmp_path), JAVA_HOME="")
    assert "No real broker here: Java was not found" in script.stderr
    port, _ = ports(script)
    bootstrap, topic = f"localhost:{port}", EXAMPLE["KAFKA_TOPIC"] or ""
    values = [b"%d" % n for n in range(100)]
    admin = KafkaAdminClient(bootstrap_servers=bootstrap, api_version=API_VERSION)
    assert [broker["port"] for broker in admin.describe_cluster()["brokers"]] == [port]
    admin.close()
    assert produce(bootstrap, topic, values) == list(range(100))
    assert [record.value for record in records(bootstrap, topic)] == values

    def consume(count: int) -> list[int]:
        """As a member of the group: the next `count` offsets, committed."""
        consumer = KafkaConsumer(
            topic,
            bootstrap_servers=bootstrap,
            api_version=API_VERSION,
            group_id="group",
            auto_offset_reset="earliest",
            enable_auto_commit=False,
            max_poll_records=1,
        )
        offsets = []
        for _ in range(count):
            (batch,) = until(lambda: consumer.poll(500), what="a record for the group").values()
            offsets.append(batch[0].offset)
        consumer.commit()
        consumer.close()
        return offsets

    assert consume(40) == list(range(40))
    assert consume(60) == list(range(40, 100))
    script.terminate()
    assert script.wait(15) == 0


def test_ports_in_use_are_named_with_what_to_do_and_exit_code_1(
    run: Callable[..., Script], stack_env: dict[str, str]
) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as one,
        socket.create_server(("127.0.0.1", 0)) as other,
    ):
        port, s3_port = one.getsockname()[1], other.getsockname()[1]
        arguments = ["--port", str(port), "--s3-port", str(s3_port)]
        script = run("infra/local_stack.py", *arguments, env=stack_env)
        assert script.wait() == 1
    assert script.lines("stderr") == [
        f"local_stack: port {port} on localhost is in use: stop what listens there, or take another"
        f" with --port and name it in .env: KAFKA_BOOTSTRAP_SERVERS=localhost:{port + 1}",
        f"local_stack: port {s3_port} on localhost is in use: stop what listens there, or take"
        f" another with --s3-port and name it in .env: S3_ENDPOINT_URL=http://localhost:"
        f"{s3_port + 1}",
    ]


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--port", "70000"], "argument --port: '70000' is no port: 1 to 65535"),
        (["--port", "1_000"], "argument --port: '1_000' is no port"),
        (["--keep", ""], "argument --keep: it names no folder"),
        (["--what"], "unrecognized arguments: --what"),
        (["--topc", "a"], "unrecognized arguments: --topc a"),
        (["--topic", "a/b"], "'a/b' is not NAME:PARTITIONS, for example stocks:3"),
        (["--topic", "a:0"], "'a:0' is not NAME:PARTITIONS"),
        (["--topic", ".."], "'..' is not NAME:PARTITIONS"),
        (["--bucket", "A"], "'A' is no name for a bucket"),
    ],
)
def test_wrong_usage_is_exit_code_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert told in capsys.readouterr().err


def test_the_s3_server_refuses_a_wrong_key_and_a_second_object_of_the_same_name(
    s3: S3, bucket: str
) -> None:
    if s3.kind != "versitygw":
        pytest.skip("moto's server checks no signatures")
    client = s3.client()
    client.put_object(Bucket=bucket, Key="a", Body=b"1", IfNoneMatch="*")
    with pytest.raises(botocore.exceptions.ClientError, match="PreconditionFailed"):
        client.put_object(Bucket=bucket, Key="a", Body=b"2", IfNoneMatch="*")
    stranger = S3(s3.folder, s3.port)
    stranger.secret_key = "wrong"
    with pytest.raises(botocore.exceptions.ClientError, match="SignatureDoesNotMatch"):
        stranger.client().list_objects_v2(Bucket=bucket)
