"""Serves the counters of the two scripts to Prometheus; loaded only when METRICS_PORT is set.

The scripts only count, in attributes of their own. What Prometheus asks for is read from these
attributes at the moment of the scrape, in the thread that answers it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from prometheus_client import Histogram, disable_created_metrics, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry

from config import Failure, Settings

UPLOAD_SECONDS = "kafka_s3_upload_seconds"
UPLOAD_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)  # s

# The value of the second label, if the metric has one, and the number.
Sample = tuple[str | None, float]


@dataclass(frozen=True)
class Served:
    """One metric: its name, its help, and how its samples are read from a script's counters."""

    name: str
    help: str
    samples: Callable[[Any], Iterable[Sample]]
    label: str = ""  # besides the topic


def number(attribute: str) -> Callable[[Any], Iterable[Sample]]:
    """The one sample of a metric that is a number in the counters' attribute."""
    return lambda counters: [(None, getattr(counters, attribute))]


def lag_by_partition(stats: Any) -> Iterator[Sample]:
    # A copy, made in one step: the script goes on counting.
    for partition, records in dict(stats.lag).items():
        if records is not None:  # a lag that is not known is no sample, and not 0
            yield str(partition), records


def is_holding(stats: Any) -> Iterator[Sample]:
    yield None, float(bool(stats.holding))


def holding_by_reason(stats: Any) -> Iterator[Sample]:
    for reason in sorted(set(dict(stats.holding).values())):
        yield reason, 1.0


CONSUMER = (
    Served("kafka_s3_records_written_total", "Records whose object exists.", number("written")),
    Served("kafka_s3_bytes_written_total", "Bytes of those objects.", number("bytes")),
    Served(
        "kafka_s3_replays_total", "Objects already there with the same bytes.", number("replays")
    ),
    Served(
        "kafka_s3_dead_letters_total",
        "Records sent to the dead letter topic.",
        number("dead_letters"),
    ),
    Served(
        "kafka_s3_retries_total", "Attempts that failed and were made again.", number("retries")
    ),
    Served("kafka_s3_commits_total", "Offset commits acknowledged.", number("commits")),
    Served("kafka_s3_lag_records", "Records not yet done.", lag_by_partition, "partition"),
    Served("kafka_s3_holding", "1 while S3 fails and the consumer holds its place.", is_holding),
    Served("kafka_s3_holding_info", "Why it holds.", holding_by_reason, "reason"),
    Served("kafka_s3_holds_total", "Times it began to hold.", number("holds")),
    Served("kafka_s3_last_success_timestamp_seconds", "Last record done.", number("last_success")),
)

PRODUCER = (
    Served("kafka_csv_records_sent_total", "Records the broker acknowledged.", number("sent")),
    Served("kafka_csv_records_failed_total", "Records the broker refused.", number("failed")),
    Served(
        "kafka_csv_rate", "Messages a second asked for; 0: as fast as possible.", number("rate")
    ),
    Served(
        "kafka_csv_unacknowledged_records",
        "Sent and not yet acknowledged.",
        number("unacknowledged"),
    ),
    Served(
        "kafka_csv_last_success_timestamp_seconds",
        "Last acknowledgement.",
        number("last_success"),
    ),
)


class Reader(Collector):
    """Reads one script's counters whenever Prometheus asks."""

    def __init__(self, topic: str, table: Iterable[Served], counters: Any) -> None:
        self.topic, self.table, self.counters = topic, tuple(table), counters

    def collect(self) -> Iterator[Metric]:
        for served in self.table:
            kind = CounterMetricFamily if served.name.endswith("_total") else GaugeMetricFamily
            labels = ["topic", served.label] if served.label else ["topic"]
            family = kind(served.name, served.help, labels=labels)
            for value, measured in served.samples(self.counters):
                family.add_metric([self.topic] if value is None else [self.topic, value], measured)
            yield family


def serve_consumer(settings: Settings, stats: Any) -> None:
    """Serve the consumer's `stats` on METRICS_PORT, from a thread.

    `stats.lag` holds the records not yet done by partition (None: not known), `stats.holding` a
    reason for each partition that is held. `stats.observe_upload` is replaced: called with the
    seconds that an upload took, it counts them by bucket. Raises Failure for a port in use.
    """
    registry = CollectorRegistry()
    registry.register(Reader(settings.kafka_topic, CONSUMER, stats))
    seconds = Histogram(
        UPLOAD_SECONDS,
        "From a record's start to S3's or the broker's answer.",
        labelnames=["topic"],
        buckets=UPLOAD_BUCKETS,
        registry=registry,
    )
    stats.observe_upload = seconds.labels(settings.kafka_topic).observe
    _start(settings, registry)


def serve_producer(settings: Settings, sender: Any) -> None:
    """Serve the producer's `sender` on METRICS_PORT, from a thread. Raises Failure for a port in
    use."""
    registry = CollectorRegistry()
    registry.register(Reader(settings.kafka_topic, PRODUCER, sender))
    _start(settings, registry)


def _start(settings: Settings, registry: CollectorRegistry) -> None:
    assert settings.metrics_port is not None
    disable_created_metrics()  # a second sample for each metric, which nobody here asks for
    try:
        start_http_server(settings.metrics_port, registry=registry)
    except OSError as error:
        raise Failure(
            f"METRICS_PORT={settings.metrics_port}: {error.strerror}; choose a free port"
        ) from None
