"""A real Prometheus scrapes both scripts: the dashboard has data, and the alerts fire."""

import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
from helpers import ROOT, Script, free_port, produce, until
from s3_faults import FaultyS3

pytestmark = [pytest.mark.real, pytest.mark.detail]

MONITORING = ROOT / "infra" / "monitoring"
DASHBOARD = json.loads((MONITORING / "grafana-dashboard.json").read_text())
VARIABLES = {"$topic": ".+", "$__rate_interval": "5s", "$__range": "1m"}
STREAMS = ("stdout", "stderr")
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
for variable, value in VARIABLES.items():
    QUERIES = [query.replace(variable, value) for query in QUERIES]


class Prometheus:
    """A Prometheus with this project's configuration, its minutes turned into seconds."""

    def __init__(self, folder: Path, consumer_port: int, producer_port: int):
        config = (MONITORING / "prometheus.yml").read_text()
        for old, new in (("9101", str(consumer_port)), ("9102", str(producer_port))):
            config = config.replace(f"localhost:{old}", f"127.0.0.1:{new}")
        (folder / "prometheus.yml").write_text(re.sub(r"\b15s", "250ms", config))
        rules = (MONITORING / "alerts.yml").read_text().replace("* 60", "* 1")
        (folder / "alerts.yml").write_text(re.sub(r"\b(\d+)m\b", r"\1s", rules))
        self.address = f"127.0.0.1:{free_port()}"
        self.log = (folder / "prometheus.log").open("w+")
        flags = [f"--web.listen-address={self.address}", f"--storage.tsdb.path={folder / 'data'}"]
        self.process = subprocess.Popen(
            ["prometheus", f"--config.file={folder / 'prometheus.yml'}", *flags], stderr=self.log
        )

    def get(self, path: str, **query: str) -> dict:
        """The data of an answer; {} while Prometheus is starting."""
        try:
            with urlopen(f"http://{self.address}/{path}?{urlencode(query)}", timeout=5) as answer:
                return json.load(answer)["data"]
        except HTTPError as error:
            if error.code != 503:
                pytest.fail(f"{query}: {error.code} {error.read()!r}")
        except OSError:
            assert self.process.poll() is None, "Prometheus has ended"
        return {}

    def values(self, query: str) -> list[float]:
        """The numbers that an instant query finds now; NaN is no number."""
        found = [float(each["value"][1]) for each in self.query(query)]
        return [value for value in found if value == value]

    def query(self, query: str) -> list[dict]:
        return self.get("api/v1/query", query=query).get("result", [])

    def rules(self) -> list[dict]:
        groups = self.get("api/v1/rules").get("groups", [])
        return [rule for group in groups for rule in group["rules"]]

    def firing(self) -> dict[str, str]:
        """Name and summary of what fires now."""
        return {
            rule["name"]: alert["annotations"]["summary"]
            for rule in self.rules()
            for alert in rule["alerts"]
            if alert["state"] == "firing"
        }


@pytest.fixture
def ports() -> tuple[int, int]:
    return free_port(), free_port()


@pytest.fixture
def prometheus(tmp_path: Path, ports: tuple[int, int]) -> Iterator[Prometheus]:
    if not shutil.which("prometheus"):
        pytest.skip("needs Prometheus (apt install prometheus)")
    server = Prometheus(tmp_path, *ports)
    try:
        until(server.rules, what="Prometheus")
        yield server
    finally:
        server.process.terminate()
        server.process.wait()
        server.log.seek(0)
        sys.stderr.write(server.log.read())
        server.log.close()


@pytest.fixture
def faulty(s3) -> Iterator[FaultyS3]:
    with FaultyS3(s3.endpoint) as proxy:
        yield proxy


@pytest.fixture
def producer(
    faulty: FaultyS3, run: Callable, env: dict[str, str], ports: tuple[int, int]
) -> Script:
    """The pair at 50 records a second, with its metrics served."""
    env = {**env, "S3_ENDPOINT_URL": faulty.endpoint}
    consumer = run("kafka_consumer.py", env={**env, "METRICS_PORT": str(ports[0])})
    producer = run("kafka_producer.py", "--rate", "50", env={**env, "METRICS_PORT": str(ports[1])})
    consumer.wait_for("Upload Successfully")
    return producer


def test_every_query_of_the_dashboard_and_of_the_alerts_returns_data(prometheus, producer, faulty):
    until(lambda: prometheus.values("sum(up)") == [2], what="both scripts scraped")
    while_holding = [query for query in QUERIES if "holding_info" in query]
    alerts = [
        re.sub(r"\s*(==|>)[\d* ]+$", "", part)
        for rule in prometheus.rules()
        for part in re.split(r"\s+(?:and|unless)\s+", rule["query"])
    ]
    assert len(QUERIES) > 20 and len(alerts) > 5 and while_holding
    for query in [*QUERIES, *alerts]:
        if query not in while_holding:
            until(lambda query=query: prometheus.values(query), what=query)
    faulty.fail("403")
    for query in while_holding:
        until(lambda query=query: prometheus.values(query), what=query)


def test_what_is_shown_is_what_happened(prometheus, producer, objects, env, kafka, topic):
    produce(kafka.bootstrap, topic, [b"not JSON", b"[]"])
    producer.terminate()
    assert producer.wait() == 0
    sent = len(re.findall(r"^\[Sent\]", producer.stdout, re.MULTILINE))
    written = f'kafka_s3_records_written_total{{topic="{topic}"}}'
    until(lambda: prometheus.values(written) == [sent], what=f"{sent} written")
    until(lambda: prometheus.values("sum(kafka_s3_lag_records)") == [0], what="no lag")
    found = objects()
    size = sum(map(len, found.values()))
    assert len(found) == sent
    assert prometheus.values("kafka_s3_bytes_written_total") == [size]
    assert prometheus.values("kafka_s3_dead_letters_total") == [2]
    assert prometheus.values("kafka_s3_upload_seconds_count >= " + str(sent))


def test_each_alert_fires_when_its_cause_is_there_and_ends_with_it(
    prometheus, producer, faulty, kafka, topic
):
    until(lambda: prometheus.values("sum(up)") == [2], what="both scripts scraped")
    until(lambda: prometheus.values("sum(kafka_s3_records_written_total) > 0"), what="records")
    assert not prometheus.firing()

    produce(kafka.bootstrap, topic, [b"not JSON"])
    until(lambda: "DeadLetters" in prometheus.firing(), what="alert DeadLetters")

    faulty.fail("403")
    until(lambda: "ConsumerHolding" in prometheus.firing(), what="ConsumerHolding")
    assert "AccessDenied" in prometheus.firing()["ConsumerHolding"]
    # More than the consumer takes at once: the lag is the topic's, also while nothing is fetched.
    until(lambda: prometheus.values("sum(kafka_s3_lag_records) > 500"), what="lag")
    expected = {"LagGrowing", "NothingWritten", "PartitionStandsStill"}
    fired: set[str] = set()
    until(
        lambda: fired.update(prometheus.firing()) or expected <= fired,
        timeout=60,
        what=", ".join(expected),
    )

    producer.kill()
    until(lambda: "ScrapeGone" in prometheus.firing(), what="ScrapeGone")
    assert "kafka_producer" in prometheus.firing()["ScrapeGone"]

    faulty.heal()
    until(lambda: prometheus.firing().keys() <= {"ScrapeGone"}, timeout=60, what="end of alerts")


@pytest.mark.parametrize("name", ["kafka_consumer.py", "kafka_producer.py"])
def test_a_port_in_use_is_one_line_and_exit_code_1(run, env, name) -> None:
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = str(taken.getsockname()[1])
        script = run(name, env={**env, "METRICS_PORT": port})
        assert script.wait() == 1
    assert f"METRICS_PORT={port}" in script.stderr and len(script.lines("stderr")) == 1


@pytest.fixture
def log_lines(faulty, run, env, kafka, topic) -> list[dict]:
    """What the scripts write as JSON while records come, one is bad, S3 fails and answers, and a
    second consumer has no partition."""
    env = {**env, "LOG_FORMAT": "json", "S3_ENDPOINT_URL": faulty.endpoint}
    consumer = run("kafka_consumer.py", env=env)
    producer = run("kafka_producer.py", "--rate", "20", env=env)
    consumer.wait_for("Upload Successfully")
    produce(kafka.bootstrap, topic, [b"not JSON"])
    consumer.wait_for("dead letter: ")
    faulty.fail("503")
    consumer.wait_for("holding at")
    faulty.heal()
    consumer.wait_for("answers again")
    consumer.wait_for(r"\| lag \d+ \|")
    spare = run("kafka_consumer.py", env=env)
    unknown = re.compile(r"\| lag \? \|")  # one of the two has no partition
    until(lambda: any(unknown.search(each.stderr) for each in (consumer, spare)), what="lag ?")
    scripts = (consumer, producer, spare)
    texts = [line for script in scripts for name in STREAMS for line in script.lines(name)]
    return [json.loads(text) for text in texts]


def test_the_log_queries_name_fields_and_messages_that_the_scripts_write(log_lines) -> None:
    blocks = re.findall(r"```\n(.+?)```", (MONITORING / "README.md").read_text(), re.DOTALL)
    queries = [block for block in blocks if "| " in block]
    assert len(queries) == 5
    patterns = {each for query in queries for each in re.findall(r"like /(.+)/", query)}
    for pattern in {each for whole in patterns for each in whole.split("|")}:
        assert any(re.search(pattern, line["message"]) for line in log_lines), pattern
    named = {each for query in queries for each in re.findall(r"(?:fields|by) (.+)", query)}
    fields = {each for group in named for each in group.split(", ") if each.isidentifier()}
    assert {"topic", "partition", "offset"} < fields
    assert fields <= {name for line in log_lines for name in line}


def matches(pattern: str, line: dict) -> bool:
    """Whether CloudWatch's pattern of one condition matches a line: `*` stands for any text."""
    field, operator, wanted = re.fullmatch(r"\{ \$\.(\w+) (=|>=) (.+) \}", pattern).groups()
    if field not in line:
        return False
    if operator == ">=":
        return isinstance(line[field], int) and line[field] >= float(wanted)
    parts = map(re.escape, json.loads(wanted).split("*"))
    return re.fullmatch(".*".join(parts), line[field], re.DOTALL) is not None


# What is looked for in the consumer's source, for want of a group or a broker that does not answer.
NOT_PROVOKED = {"PartitionStandsStill": " stands still", "PartitionNotServed": "waiting for group "}


def test_each_filter_of_cloudwatch_finds_a_line_that_the_scripts_write(log_lines) -> None:
    found = {}
    for path in (MONITORING / "cloudwatch").glob("*.filter.json"):
        pattern = json.loads(path.read_text())["filterPattern"]
        found[path.name.split(".")[0]] = [line for line in log_lines if matches(pattern, line)]
    assert {name for name, lines in found.items() if not lines} <= set(NOT_PROVOKED)
    assert {line["level"] for line in found["DeadLetters"]} == {"WARNING"}
    every = found.pop("ScrapeGone")
    assert len(every) == len(log_lines)
    assert all(len(lines) < len(log_lines) for lines in found.values()), "a filter that takes all"
    for name, words in NOT_PROVOKED.items():
        assert words in (ROOT / "kafka_consumer.py").read_text()
        assert words in (MONITORING / "cloudwatch" / f"{name}.filter.json").read_text()
