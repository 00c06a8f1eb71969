"""The metrics are the scripts' counters; the rules, the dashboard and the metric names fit
together, without a running Prometheus; what is handed to AWS is what its API takes."""

import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from urllib.request import urlopen

import botocore.session
import pytest
from botocore.validate import ParamValidator

import kafka_consumer
import kafka_producer
from config import Failure
from infra.monitoring import exporter

MONITORING = Path(__file__).parent.parent / "infra" / "monitoring"
DASHBOARD = json.loads((MONITORING / "grafana-dashboard.json").read_text())
METRIC = re.compile(r"\bkafka_(?:s3|csv)_\w+")


def promtool(*args: str) -> None:
    if not shutil.which("promtool"):
        pytest.skip("promtool is not installed (apt install prometheus)")
    done = subprocess.run(["promtool", *args], cwd=MONITORING, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def exported() -> set[str]:
    """The names of the samples that the scripts serve."""
    names = {served.name for served in (*exporter.CONSUMER, *exporter.PRODUCER)}
    upload = exporter.UPLOAD_SECONDS
    return names | {f"{upload}_{part}" for part in ("bucket", "sum", "count")}


@pytest.fixture
def settings() -> SimpleNamespace:
    """The settings that the exporter reads, with a free port."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return SimpleNamespace(kafka_topic="test", metrics_port=port)


@pytest.fixture
def scrape(settings: SimpleNamespace) -> Callable[[], dict[str, float]]:
    """Call it for the samples that Prometheus would read now, by name and labels."""

    def samples() -> dict[str, float]:
        with urlopen(f"http://127.0.0.1:{settings.metrics_port}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        pairs = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
        found = {name: float(value) for name, value in pairs}
        assert len(found) == len(pairs), "a sample is there twice"
        return found

    return samples


def consumer_stats(**changes: object) -> SimpleNamespace:
    counters = dict(written=7, bytes=900, replays=1, dead_letters=2, retries=3, commits=4, holds=5)
    state = dict(lag={}, holding={}, last_success=1.5e9, observe_upload=lambda seconds: None)
    return SimpleNamespace(**{**counters, **state, **changes})


def test_the_consumers_counters_are_served_by_their_names(settings, scrape) -> None:
    stats = consumer_stats(lag={0: 3, 12: 0})
    exporter.serve_consumer(settings, stats)
    stats.written = 8
    assert {name: value for name, value in scrape().items() if "upload_seconds" not in name} == {
        'kafka_s3_records_written_total{topic="test"}': 8,
        'kafka_s3_bytes_written_total{topic="test"}': 900,
        'kafka_s3_replays_total{topic="test"}': 1,
        'kafka_s3_dead_letters_total{topic="test"}': 2,
        'kafka_s3_retries_total{topic="test"}': 3,
        'kafka_s3_commits_total{topic="test"}': 4,
        'kafka_s3_lag_records{partition="0",topic="test"}': 3,
        'kafka_s3_lag_records{partition="12",topic="test"}': 0,
        'kafka_s3_holding{topic="test"}': 0,
        'kafka_s3_holds_total{topic="test"}': 5,
        'kafka_s3_last_success_timestamp_seconds{topic="test"}': 1.5e9,
    }


def test_a_lag_that_is_not_known_is_no_sample(settings, scrape) -> None:
    stats = consumer_stats(lag={0: None, 1: 4})
    exporter.serve_consumer(settings, stats)
    lags = {name: value for name, value in scrape().items() if "lag" in name}
    assert lags == {'kafka_s3_lag_records{partition="1",topic="test"}': 4}


def test_each_reason_of_a_hold_is_served_once_and_goes_with_it(settings, scrape) -> None:
    stats = consumer_stats(holding={0: "AccessDenied", 1: "SlowDown", 2: "AccessDenied"})
    exporter.serve_consumer(settings, stats)

    def holding() -> dict[str, float]:
        return {name: value for name, value in scrape().items() if "holding" in name}

    assert holding() == {
        'kafka_s3_holding{topic="test"}': 1,
        'kafka_s3_holding_info{reason="AccessDenied",topic="test"}': 1,
        'kafka_s3_holding_info{reason="SlowDown",topic="test"}': 1,
    }
    stats.holding.clear()
    assert holding() == {'kafka_s3_holding{topic="test"}': 0}


def test_uploads_are_counted_in_buckets_that_cover_everything(settings, scrape) -> None:
    stats = consumer_stats()
    exporter.serve_consumer(settings, stats)
    for seconds in (0, 0.005, 0.0051, 10, 10.1, 1e9):
        stats.observe_upload(seconds)
    found = scrape()
    bucket = 'kafka_s3_upload_seconds_bucket{{le="{}",topic="test"}}'
    assert found[bucket.format("0.005")] == 2 and found[bucket.format("0.01")] == 3
    assert found[bucket.format("10.0")] == 4 and found[bucket.format("+Inf")] == 6
    assert found['kafka_s3_upload_seconds_count{topic="test"}'] == 6
    assert not any("_created" in name for name in found)


def test_the_producers_counters_are_served_by_their_names(settings, scrape) -> None:
    sender = SimpleNamespace(sent=5, failed=1, rate=2.5, unacknowledged=3, last_success=1.5e9)
    exporter.serve_producer(settings, sender)
    assert scrape() == {
        'kafka_csv_records_sent_total{topic="test"}': 5,
        'kafka_csv_records_failed_total{topic="test"}': 1,
        'kafka_csv_rate{topic="test"}': 2.5,
        'kafka_csv_unacknowledged_records{topic="test"}': 3,
        'kafka_csv_last_success_timestamp_seconds{topic="test"}': 1.5e9,
    }


def test_the_scripts_own_counters_are_what_the_exporter_reads() -> None:
    pairs = (
        (exporter.CONSUMER, kafka_consumer.Stats()),
        (exporter.PRODUCER, kafka_producer.Sender(producer=None, topic="test", rate=1)),
    )
    for table, counters in pairs:
        assert len(list(exporter.Reader("test", table, counters).collect())) == len(table)
    assert callable(kafka_consumer.Stats().observe_upload)


def test_a_port_that_is_taken_is_a_failure_that_names_it(settings) -> None:
    with (
        socket.create_server(("0.0.0.0", settings.metrics_port)),
        pytest.raises(Failure, match=f"METRICS_PORT={settings.metrics_port}: .*free port"),
    ):
        exporter.serve_producer(settings, SimpleNamespace())


def test_the_scripts_do_not_load_the_exporter_unless_asked() -> None:
    code = "import sys, kafka_consumer, kafka_producer; print('prometheus_client' in sys.modules)"
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_promtool_accepts_the_configuration_and_the_rules() -> None:
    promtool("check", "config", "prometheus.yml")


def test_each_alert_fires_when_it_should_and_only_then() -> None:
    promtool("test", "rules", "alerts_test.yml")


def test_each_alert_has_a_test_that_expects_it() -> None:
    alerts = re.findall(r"- alert: (\w+)", (MONITORING / "alerts.yml").read_text())
    expected = re.findall(
        r"alertname: (\w+)\n\s+exp_alerts:", (MONITORING / "alerts_test.yml").read_text()
    )
    assert sorted(alerts) == sorted(set(expected))


@pytest.mark.parametrize("name", ["grafana-dashboard.json", "alerts.yml", "alerts_test.yml"])
def test_only_metrics_that_the_scripts_export_are_asked_for(name: str) -> None:
    assert set(METRIC.findall((MONITORING / name).read_text())) <= exported()


def test_the_dashboard_shows_every_metric() -> None:
    assert exported() <= set(METRIC.findall(json.dumps(DASHBOARD)))


def test_dashboard_panels_have_their_own_ids_and_do_not_overlap() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for at in (panel["gridPos"] for panel in panels)
        for x in range(at["x"], at["x"] + at["w"])
        for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24, "Grafana's grid is 24 wide"


def alert_names() -> list[str]:
    return sorted(re.findall(r"- alert: (\w+)", (MONITORING / "alerts.yml").read_text()))


def assert_accepted(service: str, operation: str, path: Path) -> dict:
    """Check a file that is handed to the AWS CLI against the service's own model; its content."""
    model = botocore.session.get_session().get_service_model(service).operation_model(operation)
    parameters = json.loads(path.read_text())
    report = ParamValidator().validate(parameters, model.input_shape)
    assert not report.has_errors(), report.generate_report()
    return parameters


@pytest.mark.parametrize("alert", alert_names())
def test_each_alert_is_an_alarm_of_cloudwatch_on_its_own_metric(alert: str) -> None:
    folder = MONITORING / "cloudwatch"
    of_log = assert_accepted("logs", "PutMetricFilter", folder / f"{alert}.filter.json")
    alarm = assert_accepted("cloudwatch", "PutMetricAlarm", folder / f"{alert}.alarm.json")
    made = of_log["metricTransformations"][0]
    statistics = [
        query["MetricStat"] for query in alarm.get("Metrics", ()) if "MetricStat" in query
    ]
    watched = statistics[0]["Metric"] if statistics else alarm
    assert (made["metricNamespace"], made["metricName"]) == (
        watched["Namespace"],
        watched["MetricName"],
    )
    period = statistics[0]["Period"] if statistics else alarm["Period"]
    assert period * alarm["EvaluationPeriods"] <= 86_400, "CloudWatch looks back a day at most"


def test_there_is_no_alarm_without_an_alert() -> None:
    files = {path.name for path in (MONITORING / "cloudwatch").iterdir()}
    kinds = ("filter", "alarm")
    assert files == {f"{alert}.{kind}.json" for alert in alert_names() for kind in kinds}


def test_glue_takes_the_crawlers_definition() -> None:
    crawler = assert_accepted("glue", "CreateCrawler", MONITORING.parent / "glue-crawler.json")
    assert json.loads(crawler["Configuration"])["Version"] == 1.0
    assert crawler["Targets"]["S3Targets"][0]["SampleSize"] < 250, "of each folder, Glue's limit"
