"""The broker of infra/local_stack.py for machines without Java."""

from __future__ import annotations

import asyncio
import ctypes
import threading
from pathlib import Path


class EmbeddedKafka:
    """librdkafka's mock broker, out of the confluent-kafka wheel: in memory, in this process.

    For trying things out: it keeps 5 MiB a partition and then drops the oldest. It chooses its own
    port, so a relay listens at `port`, and the broker is told to name that as its address.
    """

    def __init__(self, port: int):
        self.port = port
        self._loop = asyncio.new_event_loop()

    def start(self) -> EmbeddedKafka:
        """Start the broker and the relay. RuntimeError, for the user, where that cannot be done."""
        lib = self._lib = _librdkafka()
        error = ctypes.create_string_buffer(512)
        conf = lib.rd_kafka_conf_new()
        lib.rd_kafka_conf_set(conf, b"log_level", b"0", error, len(error))
        producer = 0  # the kind of client; the cluster needs one to live in
        self._client = lib.rd_kafka_new(producer, conf, error, len(error))
        self._cluster = lib.rd_kafka_mock_cluster_new(self._client, 1)
        if not self._cluster:
            raise RuntimeError(f"the embedded broker did not start: {error.value.decode()}")
        address = lib.rd_kafka_mock_cluster_bootstraps(self._cluster).decode()
        lib.rd_kafka_mock_broker_set_host_port(self._cluster, 1, b"127.0.0.1", self.port)
        lib.rd_kafka_mock_group_initial_rebalance_delay_ms(self._cluster, 0)
        host, _, upstream = address.rpartition(":")

        async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                far_reader, far_writer = await asyncio.open_connection(host, int(upstream))
            except OSError:
                writer.close()
                return
            await asyncio.gather(_pump(reader, far_writer), _pump(far_reader, writer))

        self._loop.run_until_complete(asyncio.start_server(relay, "127.0.0.1", self.port))
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        return self

    def create_topic(self, name: str, partitions: int = 1) -> None:
        """Create a topic."""
        self._lib.rd_kafka_mock_topic_create(self._cluster, name.encode(), partitions, 1)

    def stop(self) -> None:
        """Stop the relay and the broker; what the topics held is gone."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._lib.rd_kafka_mock_cluster_destroy(self._cluster)
        self._lib.rd_kafka_destroy(self._client)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    finally:
        writer.close()


def _librdkafka() -> ctypes.CDLL:
    """The library inside the confluent-kafka wheel, with the signatures of what is used here."""
    try:
        import confluent_kafka
    except ImportError as error:
        raise RuntimeError(
            f"the embedded broker needs confluent-kafka: pip install '.[local]' ({error})"
        ) from error
    package = Path(confluent_kafka.__file__).parent
    found = [
        *package.parent.glob("confluent_kafka.libs/librdkafka*"),
        *package.glob(".dylibs/librdkafka*"),
    ]
    if not found:
        raise RuntimeError(
            f"no librdkafka beside {package}: this build of confluent-kafka has no embedded broker"
        )
    lib = ctypes.CDLL(str(found[0]))
    pointer, integer, text = ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p
    for name, result, *arguments in (
        ("rd_kafka_conf_new", pointer),
        ("rd_kafka_conf_set", integer, pointer, text, text, text, ctypes.c_size_t),
        ("rd_kafka_new", pointer, integer, pointer, text, ctypes.c_size_t),
        ("rd_kafka_destroy", None, pointer),
        ("rd_kafka_mock_cluster_new", pointer, pointer, integer),
        ("rd_kafka_mock_cluster_destroy", None, pointer),
        ("rd_kafka_mock_cluster_bootstraps", text, pointer),
        ("rd_kafka_mock_broker_set_host_port", None, pointer, ctypes.c_int32, text, integer),
        ("rd_kafka_mock_group_initial_rebalance_delay_ms", None, pointer, ctypes.c_int32),
        ("rd_kafka_mock_topic_create", integer, pointer, text, integer, integer),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib
