"""The rules, the dashboard and the metric names fit together, without a running Prometheus."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import kafka_consumer
import kafka_producer

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
    names = {row[0] for row in (*kafka_consumer.METRICS, *kafka_producer.METRICS)}
    upload = "kafka_s3_upload_seconds"
    return names - {upload} | {f"{upload}_{part}" for part in ("bucket", "sum", "count")}


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
