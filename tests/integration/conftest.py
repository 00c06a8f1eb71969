"""Fixtures of the integration tests: one real broker and one real S3 server a session, and a topic,
a bucket and a group of its own for each test."""

from __future__ import annotations

import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import Kafka, KafkaCluster, Script, scratch_env
from local_stack import ROOT, S3, StackError

CI = os.environ.get("CI") == "true"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`real` marks what needs a real server; `root` is skipped where it cannot work."""
    for item in items:
        if {"kafka", "cluster", "s3"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("real")
        if item.get_closest_marker("root") and not (sys.platform == "linux" and os.geteuid() == 0):
            item.add_marker(pytest.mark.skip(reason="needs root on Linux, for network namespaces"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """A failed test shows what its scripts printed and the end of the broker's log. In CI a skipped
    `real` test is a failed one."""
    report = yield
    expected = hasattr(report, "wasxfail")
    if CI and report.skipped and item.get_closest_marker("real") and not expected:
        report.outcome = "failed"
        report.longrepr = f"skipped, which CI=true forbids: {report.longrepr[2]}"
    if report.failed:
        arguments = getattr(item, "funcargs", {})
        for script in getattr(arguments.get("run"), "scripts", ()):
            for stream in ("stdout", "stderr"):
                report.sections.append(
                    (f"{script.name}: {stream}", "\n".join(script.lines(stream)[-60:]))
                )
        for name in {"kafka", "cluster"} & set(arguments):
            report.sections.append((f"log of {name}", arguments[name].log_tail()))
    return report


@pytest.fixture(scope="session")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kafka]:
    """The real broker. A test that stops it starts it again before its end; one that secures or
    breaks it in another way starts a Kafka of its own."""
    try:
        broker = Kafka(tmp_path_factory.mktemp("kafka"))
    except StackError as error:
        pytest.skip(f"needs the real broker: {error}")
    try:
        yield broker.start()
    finally:
        broker.stop()


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kafka]:
    """A broker that the tests of a file may stop, kill and freeze."""
    broker = Kafka(tmp_path_factory.mktemp("own"))
    try:
        yield broker.start()
    finally:
        broker.stop()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaCluster]:
    """Three brokers of its own for a file of tests: 12 s to start. Mark these tests as slow."""
    try:
        brokers = KafkaCluster(tmp_path_factory.mktemp("cluster"))
    except StackError as error:
        pytest.skip(f"needs real brokers: {error}")
    try:
        yield brokers.start()
    finally:
        brokers.stop()


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """The S3 server: versitygw; moto's only where Go, which builds versitygw, is missing too."""
    server = S3(tmp_path_factory.mktemp("s3"))
    if server.kind != "versitygw" and shutil.which("go"):
        pytest.skip("needs versitygw: tests/run.sh builds it")
    try:
        yield server.start()
    finally:
        server.stop()


@pytest.fixture
def topic(kafka: Kafka) -> str:
    """A new topic with one partition, and `<topic>_errors` for its dead letters."""
    name = f"test-{secrets.token_hex(4)}"
    kafka.create_topic(name)
    kafka.create_topic(f"{name}_errors")
    return name


@pytest.fixture
def bucket(s3: S3) -> str:
    """A new, empty bucket."""
    name = f"test-{secrets.token_hex(4)}"
    s3.create_bucket(name)
    return name


@pytest.fixture
def env(kafka: Kafka, s3: S3, topic: str, bucket: str, tmp_path: Path) -> dict[str, str]:
    """Every setting of the two scripts for this test's topic, bucket and group. All are set, so
    that the developer's `.env` adds nothing."""
    return {
        **scratch_env(tmp_path),
        "KAFKA_BOOTSTRAP_SERVERS": kafka.bootstrap,
        "KAFKA_TOPIC": topic,
        "KAFKA_GROUP_ID": f"group-{topic}",
        "KAFKA_AUTO_OFFSET_RESET": "earliest",
        "KAFKA_API_VERSION": "2.8.1",
        "KAFKA_REQUEST_TIMEOUT_MS": "30000",
        "KAFKA_SECURITY_PROTOCOL": "PLAINTEXT",
        "KAFKA_SASL_MECHANISM": "",
        "KAFKA_SASL_USERNAME": "",
        "KAFKA_SASL_PASSWORD": "",
        "KAFKA_SSL_CAFILE": "",
        "KAFKA_COMPRESSION_TYPE": "",
        "KAFKA_DLQ_TOPIC": f"{topic}_errors",
        "KAFKA_KEY_COLUMN": "",
        "CSV_PATH": str(ROOT / "tests" / "data" / "indexProcessed.csv"),
        "MESSAGES_PER_SECOND": "0",
        "RANDOM_SEED": "",
        "S3_BUCKET": bucket,
        "S3_PREFIX": "",
        "S3_ENDPOINT_URL": s3.endpoint,
        "S3_MAX_CONCURRENCY": "64",
        "LOG_LEVEL": "INFO",
        "LOG_FORMAT": "text",
        "METRICS_PORT": "",
        "AWS_ACCESS_KEY_ID": s3.access_key,
        "AWS_SECRET_ACCESS_KEY": s3.secret_key,
        "AWS_SESSION_TOKEN": "",
        "AWS_DEFAULT_REGION": s3.region,
    }


@pytest.fixture
def objects(s3: S3, bucket: str) -> Callable[[], dict[str, bytes]]:
    """Call it for what the test's bucket holds now, by name."""
    client = s3.client()

    def read() -> dict[str, bytes]:
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket)
        names = [entry["Key"] for page in pages for entry in page.get("Contents", ())]
        return {name: client.get_object(Bucket=bucket, Key=name)["Body"].read() for name in names}

    return read


@pytest.fixture
def run() -> Iterator[Callable[..., Script]]:
    """run("kafka_consumer.py", "--max-messages", "5", env=env) starts a script; what still runs at
    the end of the test is killed."""
    scripts: list[Script] = []

    def start(script: str, *args: str, env: dict[str, str]) -> Script:
        scripts.append(Script(script, *args, env=env))
        return scripts[-1]

    start.scripts = scripts  # type: ignore[attr-defined]
    yield start
    for script in scripts:
        script.kill()
