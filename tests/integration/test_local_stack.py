"""infra/local_stack.py in the foreground: what it starts, says and leaves behind."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import botocore.exceptions
import pytest
from helpers import Script, free_port, produce, records, scratch_env, until
from kafka import KafkaConsumer
from kafka import __version__ as kafka_client
from kafka.admin import KafkaAdminClient
from local_stack import API_VERSION, EXAMPLE, S3, Kafka, port_is_free


@pytest.fixture
def stack_env(tmp_path: Path) -> dict[str, str]:
    """This machine's programs, and a temporary folder in which what is left behind can be seen."""
    (tmp_path / "tmp").mkdir()
    return {**os.environ, "TMPDIR": str(tmp_path / "tmp")}


@pytest.fixture
def stack(run: Callable[..., Script], stack_env: dict[str, str]) -> Callable[..., Script]:
    """Call it to start the stack on free ports and wait for its ready line."""

    def start(**env: str) -> Script:
        ports = ["--port", str(free_port()), "--s3-port", str(free_port())]
        script = run("infra/local_stack.py", *ports, env={**stack_env, **env})
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
@pytest.mark.parametrize("ask", [Script.interrupt, Script.terminate])
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


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's help is Linux's")
def test_its_servers_die_with_it_when_it_is_killed(
    kafka: Kafka, stack: Callable[..., Script]
) -> None:
    script = stack()
    servers = children(script.pid)
    assert len(servers) == 3
    script.kill()
    until(lambda: not any(Path(f"/proc/{pid}/cmdline").exists() for pid in servers), 5)


def test_a_server_that_ends_ends_it_with_an_error(
    kafka: Kafka, stack: Callable[..., Script]
) -> None:
    script = stack()
    (broker,) = (p for p in children(script.pid) if b"kafka.Kafka" in cmdline(p))
    os.kill(broker, 9)
    assert script.wait(15) == 1
    assert script.stderr == "local_stack: the broker has ended by itself, code -9\n"


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


@pytest.mark.parametrize("flag", ["--port", "--s3-port"])
def test_a_port_in_use_is_one_line_and_exit_code_1(
    run: Callable[..., Script], stack_env: dict[str, str], flag: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = server.getsockname()[1]
        other = {"--port": "--s3-port", "--s3-port": "--port"}[flag]
        arguments = [flag, str(taken), other, str(free_port())]
        script = run("infra/local_stack.py", *arguments, env=stack_env)
        assert script.wait() == 1
    assert script.stderr == (
        f"local_stack: port {taken} on localhost is in use: "
        f"stop what listens there or change {flag}\n"
    )


@pytest.mark.parametrize("arguments", [["--port", "70000"], ["--port", "x"], ["--what"]])
def test_wrong_usage_is_exit_code_2(
    run: Callable[..., Script], tmp_path: Path, arguments: list[str]
) -> None:
    script = run("infra/local_stack.py", *arguments, env=scratch_env(tmp_path))
    assert script.wait() == 2
    assert "Traceback" not in script.stderr


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
