"""The tests' own cluster: one broker of several that stands still, with its topics' properties."""

from __future__ import annotations

import pytest
from confluent_kafka.admin import AdminClient, ConfigResource
from helpers import KafkaCluster, produce, records, until

pytestmark = pytest.mark.slow


def test_a_topic_of_three_copies_is_served_when_its_leader_is_frozen(cluster: KafkaCluster) -> None:
    cluster.create_topic("copied")
    produce(cluster.bootstrap, "copied", [b"1", b"2"])
    leader = cluster.leader("copied")
    leader.freeze()
    try:
        others = ",".join(broker.bootstrap for broker in cluster.brokers if broker is not leader)
        until(
            lambda: (
                AdminClient({"bootstrap.servers": others})
                .list_topics(timeout=10)
                .topics["copied"]
                .partitions[0]
                .leader
                not in (-1, cluster.brokers.index(leader))
            ),
            what="another leader",
        )
        assert produce(others, "copied", [b"3"]) == [2]
    finally:
        leader.thaw()


def test_a_partition_of_one_copy_stands_on_one_broker(cluster: KafkaCluster) -> None:
    cluster.create_topic("spread", partitions=3, replicas=1)
    leaders = [cluster.leader("spread", partition) for partition in range(3)]
    assert all(leader in cluster.brokers for leader in leaders)
    leaders[0].kill()
    leaders[0].start_broker()
    produce(cluster.bootstrap, "spread", [b"1"], partition=0)


def test_a_topic_gets_a_property_and_partitions(cluster: KafkaCluster) -> None:
    cluster.create_topic("changed", config={"retention.ms": "60000"})
    broker = cluster.brokers[0]
    broker.configure_topic("changed", {"compression.type": "gzip"})
    broker.add_partitions("changed", 3)
    resource = ConfigResource(ConfigResource.Type.TOPIC, "changed")
    client = AdminClient({"bootstrap.servers": broker.internal})
    found = client.describe_configs([resource])[resource].result(10)
    assert (found["compression.type"].value, found["retention.ms"].value) == ("gzip", "60000")
    produce(cluster.bootstrap, "changed", [b"1"], partition=2)
    assert [record.partition for record in records(cluster.bootstrap, "changed")] == [2]
