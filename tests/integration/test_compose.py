"""infra/compose.yaml, which cannot be run here: against Compose's schema, .env.example, Kafka."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from helpers import ROOT, Kafka
from local_stack import EXAMPLE

pytestmark = pytest.mark.detail

COMPOSE = yaml.safe_load((ROOT / "infra" / "compose.yaml").read_text())
BROKERS = [service for name, service in COMPOSE["services"].items() if "kafka-" in name]


def test_it_is_valid_for_compose() -> None:
    compose_spec = pytest.importorskip("compose_spec")
    plain = yaml.safe_dump(COMPOSE)  # anchors and merges resolved
    assert compose_spec.PyCompose.from_yaml(plain).validate() in (None, [], True)
    misspelt = plain.replace("depends_on:", "dependson:", 1)
    with pytest.raises(ValueError):
        compose_spec.PyCompose.from_yaml(misspelt).validate()


def test_it_gives_what_env_example_names() -> None:
    minio = COMPOSE["services"]["minio"]
    assert minio["environment"] == {
        "MINIO_ROOT_USER": EXAMPLE["AWS_ACCESS_KEY_ID"],
        "MINIO_ROOT_PASSWORD": EXAMPLE["AWS_SECRET_ACCESS_KEY"],
    }
    port = (EXAMPLE["S3_ENDPOINT_URL"] or "").rpartition(":")[2]
    assert minio["ports"] == [f"127.0.0.1:{port}:{port}"]
    topics, bucket = (COMPOSE["services"][name]["command"][0] for name in ("topics", "bucket"))
    assert f"for topic in {EXAMPLE['KAFKA_TOPIC']} {EXAMPLE['KAFKA_DLQ_TOPIC']};" in topics
    assert bucket.endswith(f"local/{EXAMPLE['S3_BUCKET']}")


def test_each_broker_is_reached_at_the_port_that_it_advertises() -> None:
    assert len(BROKERS) == 3
    for number, broker in enumerate(BROKERS):
        port, settings = 9092 + number, broker["environment"]
        assert broker["ports"] == [f"127.0.0.1:{port}:{port}"]
        assert f"CLIENT://:{port}," in settings["KAFKA_LISTENERS"]
        assert f"CLIENT://localhost:{port}," in settings["KAFKA_ADVERTISED_LISTENERS"]
        assert settings["KAFKA_BROKER_ID"] == number + 1
    said = (ROOT / "infra" / "compose.yaml").read_text()
    assert "KAFKA_BOOTSTRAP_SERVERS=localhost:9092,localhost:9093,localhost:9094" in said


def test_every_port_is_the_loopbacks_and_every_image_has_a_version() -> None:
    services: list[dict[str, Any]] = list(COMPOSE["services"].values())
    ports = [port for service in services for port in service.get("ports", ())]
    assert all(port.startswith("127.0.0.1:") for port in ports)
    assert all(re.search(r":[^:]*\d", service["image"]) for service in services)


def test_every_setting_of_a_broker_is_one_that_kafka_knows(kafka: Kafka) -> None:
    known = set(re.findall(r'id="([a-z.]+)"', kafka.command("kafka.server.KafkaConfig")))
    assert len(known) > 100
    for broker in BROKERS:
        names = {
            name.removeprefix("KAFKA_").lower().replace("_", ".") for name in broker["environment"]
        }
        assert names - known == set()
