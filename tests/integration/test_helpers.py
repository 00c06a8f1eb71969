"""The tests' own cluster: one broker of several that stands still."""

from __future__ import annotations

import pytest
from confluent_kafka.admin import AdminClient
from helpers import KafkaCluster, produce, until

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
