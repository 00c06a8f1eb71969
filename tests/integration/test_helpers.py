"""The tests' own cluster: one broker of several that stands still."""

from __future__ import annotations

import pytest
from confluent_kafka.admin import AdminClient
from helpers import KafkaCluster, produce, until

pytestmark = pytest.mark.slow


def leader_by(broker: str) -> int:
    """The number of the leader as this broker knows it; -1: none."""
    topics = AdminClient({"bootstrap.servers": broker}).list_topics(timeout=10).topics
    return int(topics["copied"].partitions[0].leader)


def test_a_topic_of_three_copies_is_served_when_its_leader_is_frozen(cluster: KafkaCluster) -> None:
    cluster.create_topic("copied")
    produce(cluster.bootstrap, "copied", [b"1", b"2"])
    leader = cluster.leader("copied")
    leader.freeze()
    try:
        others = [broker.bootstrap for broker in cluster.brokers if broker is not leader]
        old = {-1, cluster.brokers.index(leader)}
        until(lambda: not old & {leader_by(other) for other in others}, what="another leader")
        # The client may ask the frozen one all the same, and has to give it up then.
        assert produce(",".join(others), "copied", [b"3"], request_timeout_ms=5000) == [2]
    finally:
        leader.thaw()


def test_a_partition_of_one_copy_stands_on_one_broker(cluster: KafkaCluster) -> None:
    cluster.create_topic("spread", partitions=3, replicas=1)
    leaders = [cluster.leader("spread", partition) for partition in range(3)]
    assert all(leader in cluster.brokers for leader in leaders)
    leaders[0].kill()
    leaders[0].start_broker()
    produce(cluster.bootstrap, "spread", [b"1"], partition=0)
