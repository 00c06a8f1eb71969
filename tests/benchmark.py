"""The speed of the two scripts beside the raw speed of their parts, in one run.

    .venv/bin/python tests/benchmark.py

Needs Linux, a JDK and Maven (or KAFKA_HOME), and the extras `fast` and `report`. Takes about a
quarter of an hour. The broker is the real one; S3 is a stand-in in its own process that answers
each request after 25 ms. What is compared is run in turn, ROUNDS times; a ratio is the median of
the rounds' ratios, so that a machine that slows down for a while does not move it. Rates are taken
from the broker's and the stand-in's clocks.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import itertools
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from statistics import median, quantiles
from typing import ClassVar
from urllib.parse import parse_qs, unquote

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "infra"), str(ROOT / "tests" / "integration")]

ROUNDS = 3
SENDS = 100_000  # of a producer run
RECORDS = 12_000  # of a consumer run, for each partition
SECONDS = 30  # of what is measured over time
WIDTH = 64  # uploads in flight
ROWS = 104_425  # of the CSV that the project was written for
BACKLOGS = (1_000, 10_000, 100_000)
KAFKA = {"api_version": (2, 8, 1)}

# ------------------------------------------------------------------- what is compared: the parts


def original(bootstrap: str, topic: str, endpoint: str, bucket: str, count: str) -> None:
    """One record after the other, as the script that the project began with did it."""
    from kafka import KafkaConsumer
    from s3fs import S3FileSystem

    fs = S3FileSystem(endpoint_url=endpoint)
    consumer = KafkaConsumer(
        topic,
        bootstrap_servers=bootstrap,
        auto_offset_reset="earliest",
        value_deserializer=lambda value: json.loads(value.decode()),
        **KAFKA,
    )
    for number, record in zip(range(int(count)), consumer, strict=False):
        with fs.open(f"s3://{bucket}/stock_market_{number}.json", "w") as file:
            json.dump(record.value, file)


def bare_s3fs(bootstrap: str, topic: str, endpoint: str, bucket: str, count: str) -> None:
    """s3fs alone at its best: prepared bytes, workers, and the public settings that save time."""
    import fsspec.asyn
    from aiobotocore.session import AioSession
    from botocore.handlers import add_expect_header
    from s3fs import S3FileSystem

    session = AioSession()
    session.unregister("before-call.s3", add_expect_header)
    fs = S3FileSystem(
        endpoint_url=endpoint,
        session=session,
        config_kwargs={
            "max_pool_connections": WIDTH,
            "user_agent": "bare",
            "parameter_validation": False,
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
        },
    )
    fs.ls(bucket)
    value = csv_values()[0]
    gc.freeze()

    async def write() -> None:
        numbers = iter(range(int(count)))

        async def work() -> None:
            for number in numbers:
                await fs._pipe_file(f"{bucket}/stock_market_{number}.json", value, mode="create")

        await asyncio.gather(*(work() for _ in range(WIDTH)))

    fsspec.asyn.sync(fs.loop, write)


def bare_put_object(bootstrap: str, topic: str, endpoint: str, bucket: str, count: str) -> None:
    """aiobotocore's `put_object` at its best, with the condition and the MD5 that every upload of
    the consumer has: what it would use if it did not sign and send by itself."""
    from base64 import b64encode

    from aiobotocore.config import AioConfig
    from aiobotocore.session import AioSession
    from botocore.handlers import add_expect_header

    session = AioSession()
    session.unregister("before-call.s3", add_expect_header)
    config = AioConfig(
        max_pool_connections=WIDTH,
        user_agent="bare",
        parameter_validation=False,
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    value = csv_values()[0]
    digest = b64encode(hashlib.md5(value).digest()).decode()
    gc.freeze()

    async def write() -> None:
        numbers = iter(range(int(count)))
        async with session.create_client("s3", endpoint_url=endpoint, config=config) as client:

            async def work() -> None:
                for number in numbers:
                    await client.put_object(
                        Bucket=bucket,
                        Key=f"stock_market_{number}.json",
                        Body=value,
                        ContentType="application/json",
                        ContentMD5=digest,
                        IfNoneMatch="*",
                    )

            await asyncio.gather(*(work() for _ in range(WIDTH)))

    asyncio.run(write())


def bare_send(bootstrap: str, topic: str, count: str) -> None:
    """The Kafka client alone: prepared bytes, the guarantees and batches of our producer."""
    from kafka import KafkaProducer

    values = csv_values()
    producer = KafkaProducer(
        bootstrap_servers=bootstrap,
        acks="all",
        retries=20,
        max_in_flight_requests_per_connection=1,
        linger_ms=5,
        batch_size=2**17,
        **KAFKA,
    )
    for value in itertools.islice(itertools.cycle(values), int(count)):
        producer.send(topic, value)
    producer.flush()


def csv_values() -> list[bytes]:
    from kafka_producer import read_rows

    return [value for _, value in read_rows(Path(os.environ["CSV_PATH"]))]


# ------------------------------------------------------------------------- S3, in its own process


class S3Connection(asyncio.Protocol):
    """As much of S3 as the scripts use, in memory, for little CPU. `GET /<bucket>?times` gives the
    moment at which each object's PUT was answered, `?count` their number."""

    latency = 0.0
    buckets: ClassVar[dict[str, dict[str, tuple[bytes, str]]]] = {}
    times: ClassVar[dict[str, dict[str, float]]] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.loop = asyncio.get_running_loop()
        self.buffer = bytearray()  # a large body comes in many parts

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head = bytes(self.buffer[:end]).lower()
            at = head.find(b"\r\ncontent-length:")
            length = int(head[at + 17 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            if len(self.buffer) < end + 4 + length:
                if b"\r\nexpect:" in head and len(self.buffer) == end + 4:
                    self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                return
            method, target, _ = bytes(self.buffer[:end]).decode().split(" ", 2)
            body = bytes(self.buffer[end + 4 : end + 4 + length])
            del self.buffer[: end + 4 + length]
            path, _, query = target.partition("?")
            bucket, _, name = unquote(path).strip("/").partition("/")
            create = b"\r\nif-none-match:" in head
            self.loop.call_later(
                self.latency, self.answer, method, bucket, name, query, create, body
            )

    def answer(
        self, method: str, bucket: str, name: str, query: str, create: bool, body: bytes
    ) -> None:
        objects = self.buckets.setdefault(bucket, {})
        status, tag = b"200 OK", b""
        if method == "PUT" and name:
            if create and name in objects:
                status = b"412 Precondition Failed"
                body = (
                    b"<Error><Code>PreconditionFailed</Code>"
                    b"<Condition>If-None-Match</Condition></Error>"
                )
            else:
                objects[name] = (body, hashlib.md5(body).hexdigest())
                self.times.setdefault(bucket, {})[name] = time.time()
                tag, body = objects[name][1].encode(), b""
        elif name:
            found = objects.get(name)
            status = b"200 OK" if found else b"404 Not Found"
            body, tag = (found[0], found[1].encode()) if found else (b"", b"")
        elif query == "times":
            body = json.dumps(self.times.get(bucket, {})).encode()
        elif query == "count":
            body = str(len(objects)).encode()
        else:
            body = self.listing(objects, parse_qs(query))
        length = len(body)
        self.transport.write(
            b'HTTP/1.1 %s\r\nETag: "%s"\r\nContent-Type: application/xml\r\n'
            b"Content-Length: %d\r\n\r\n%s"
            % (status, tag, length, b"" if method == "HEAD" else body)
        )

    @staticmethod
    def listing(objects: dict[str, tuple[bytes, str]], query: dict[str, list[str]]) -> bytes:
        start = int(query.get("continuation-token", ["0"])[0])
        prefix = query.get("prefix", [""])[0]
        there = sorted(name for name in objects if name.startswith(prefix))
        names = there[start : start + 1000]
        more = start + 1000 < len(there)
        entries = "".join(
            f"<Contents><Key>{name}</Key><Size>{len(objects[name][0])}</Size>"
            "<LastModified>2020-01-01T00:00:00.000Z</LastModified>"
            f'<ETag>"{objects[name][1]}"</ETag></Contents>'
            for name in names
        )
        return (
            f"<ListBucketResult><IsTruncated>{str(more).lower()}</IsTruncated>"
            f"<NextContinuationToken>{start + 1000}</NextContinuationToken>{entries}"
            "</ListBucketResult>"
        ).encode()


def serve_s3(latency: str) -> None:
    async def serve() -> None:
        S3Connection.latency = float(latency)
        loop = asyncio.get_running_loop()
        server = await loop.create_server(S3Connection, "127.0.0.1", 0, backlog=1000)
        print(server.sockets[0].getsockname()[1], flush=True)
        await server.serve_forever()

    asyncio.run(serve())


# ------------------------------------------------------------------------------ the measurements


def cpu(pid: int) -> float:
    """CPU seconds, user and system, that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak(pid: int) -> float:
    """The most memory a process has had, in MB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024 / 1e6


class Stand:
    """Broker, S3, and the scripts as processes, each with settings for one measurement."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        from local_stack import Kafka

        self.folder, self.numbers = folder, itertools.count()
        self.kafka = Kafka(folder / "kafka")
        stack.callback(self.kafka.stop)
        self.kafka.start()
        self.kafka.create_topic("error_topic")
        self.s3 = stack.enter_context(self.s3_server(0.025))
        sample = (ROOT / "tests" / "data" / "indexProcessed.csv").read_text().splitlines()
        rows = itertools.islice(itertools.cycle(sample[1:]), ROWS)
        self.csv = folder / "rows.csv"
        self.csv.write_text("\n".join([sample[0], *rows]) + "\n")

    @contextmanager
    def s3_server(self, latency: float) -> Iterator[tuple[int, str]]:
        """Yields (pid, endpoint)."""
        command = [sys.executable, __file__, "serve_s3", str(latency)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                yield process.pid, f"http://127.0.0.1:{process.stdout.readline().strip()}"
            finally:
                process.kill()

    def topic(self, partitions: int = 1, large: bool = False) -> str:
        """A new topic whose records carry the broker's clock; `large`: of up to 8 MB."""
        name = f"bench-{next(self.numbers)}"
        config = {"message.timestamp.type": "LogAppendTime"}
        if large:
            config["max.message.bytes"] = str(2**23)
        self.kafka.create_topic(name, partitions, config)
        return name

    def env(self, topic: str, **settings: str) -> dict[str, str]:
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(self.folder),
            "KAFKA_BOOTSTRAP_SERVERS": self.kafka.bootstrap,
            "KAFKA_TOPIC": topic,
            "KAFKA_GROUP_ID": f"group-{next(self.numbers)}",
            "KAFKA_AUTO_OFFSET_RESET": "earliest",
            "KAFKA_API_VERSION": "2.8.1",
            "KAFKA_SECURITY_PROTOCOL": "PLAINTEXT",
            "KAFKA_COMPRESSION_TYPE": "",
            "KAFKA_KEY_COLUMN": "",
            "CSV_PATH": str(self.csv),
            "MESSAGES_PER_SECOND": "0",
            "S3_BUCKET": f"bucket-{next(self.numbers)}",
            "S3_PREFIX": "",
            "S3_ENDPOINT_URL": self.s3[1],
            "S3_MAX_CONCURRENCY": str(WIDTH),
            "LOG_LEVEL": "INFO",
            "LOG_FORMAT": "text",
            "METRICS_PORT": "",
            "AWS_ACCESS_KEY_ID": "a" * 20,
            "AWS_SECRET_ACCESS_KEY": "b" * 40,
            "AWS_SESSION_TOKEN": "",
            "AWS_DEFAULT_REGION": "us-east-1",
            **settings,
        }

    @contextmanager
    def script(self, name: str, *args: str, env: dict[str, str]) -> Iterator[subprocess.Popen]:
        """A script of the project, its output in a file: `.out`; ended by SIGTERM."""
        out = self.folder / f"{next(self.numbers)}.out"
        with out.open("w") as stream:
            process = subprocess.Popen(
                [sys.executable, str(ROOT / name), *args],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
            )
        process.out = out
        try:
            yield process
        finally:
            process.terminate()
            process.wait(30)

    def run(self, name: str, *args: str, env: dict[str, str]) -> str:
        """A script to its end; what it printed."""
        with self.script(name, *args, env=env) as process:
            if process.wait(300):
                raise SystemExit(f"{name}: exit {process.returncode}\n{process.out.read_text()}")
        return process.out.read_text()

    def ask(self, bucket: str, what: str, endpoint: str = "") -> object:
        with urllib.request.urlopen(f"{endpoint or self.s3[1]}/{bucket}?{what}") as answer:
            return json.load(answer)

    def append_rate(self, topic: str) -> float:
        """Records a second, by the broker's clock, over the whole of partition 0."""
        from kafka import KafkaConsumer, TopicPartition

        consumer = KafkaConsumer(bootstrap_servers=self.kafka.bootstrap, **KAFKA)
        tp = TopicPartition(topic, 0)
        consumer.assign([tp])
        end = consumer.end_offsets([tp])[tp]
        moments = []
        for offset in (0, end - 1):
            consumer.seek(tp, offset)
            batches: dict = {}
            while not batches:
                batches = consumer.poll(1000, max_records=1)
            moments.append(batches[tp][0].timestamp)
        consumer.close()
        return (end - 1) / (moments[1] - moments[0]) * 1000

    def catch_up(self, script: str, *args: str, processes: int, env: dict[str, str], count: int):
        """(objects a second, CPU ms an object of the processes, of S3; peak MB) while `count`
        objects are written, from the time when 30% are there to 90%."""
        with ExitStack() as stack:
            running = [
                stack.enter_context(self.script(script, *args, env=env)) for _ in range(processes)
            ]
            pids, used = [self.s3[0], *(process.pid for process in running)], []
            for part in (0.3, 0.9):
                while (now := self.ask(env["S3_BUCKET"], "count")) < part * count:
                    if all(process.poll() is not None for process in running):
                        raise SystemExit(running[0].out.read_text())
                    time.sleep(0.1)
                used.append((now, [cpu(pid) for pid in pids]))
            memory = max(peak(process.pid) for process in running)
        (before, cpu_before), (after, cpu_after) = used
        s3, *ours = (
            1000 * (b - a) / (after - before) for a, b in zip(cpu_before, cpu_after, strict=True)
        )
        moments = sorted(self.ask(env["S3_BUCKET"], "times").values())
        first, last = int(0.3 * count), int(0.9 * count) - 1
        return (last - first) / (moments[last] - moments[first]), sum(ours), s3, memory


def say(text: str) -> None:
    print(f"{datetime.now():%H:%M:%S} {text}", file=sys.stderr, flush=True)


def producer_rates(stand: Stand) -> dict[str, list[float]]:
    """msg/s of the bare loop and of ours without the extra `fast`, and of ours with it."""
    rates: dict[str, list[float]] = {"bare": [], "ours": [], "fast": []}
    plain = without_crc32c(stand)
    for _ in range(ROUNDS):
        topic = stand.topic()
        arguments = ["bare_send", stand.kafka.bootstrap, topic, str(SENDS)]
        stand.run("tests/benchmark.py", *arguments, env=stand.env(topic, **plain))
        rates["bare"].append(stand.append_rate(topic))
        for name, extra in (("ours", plain), ("fast", {})):
            topic = stand.topic()
            env = stand.env(topic, **extra)
            stand.run("kafka_producer.py", "--max-messages", str(SENDS), env=env)
            rates[name].append(stand.append_rate(topic))
        say("producer: " + ", ".join(f"{name} {each[-1]:.0f}/s" for name, each in rates.items()))
    return rates


def compression(stand: Stand) -> list[tuple[str, float, float]]:
    """(type, msg/s, bytes a record in the broker's log) of what is installed."""
    from kafka import codec

    found = []
    for name in ("", "gzip", "snappy", "lz4", "zstd"):
        if name and not getattr(codec, f"has_{name}")():
            continue
        topic = stand.topic()
        env = stand.env(topic, KAFKA_COMPRESSION_TYPE=name)
        stand.run("kafka_producer.py", "--max-messages", str(SENDS // 2), env=env)
        logs = stand.folder.glob(f"kafka/kafka/{topic}-0/*.log")
        size = sum(log.stat().st_size for log in logs) / (SENDS // 2)
        found.append((name or "none", stand.append_rate(topic), size))
        say(f"compression {name or 'none'}: {found[-1][1]:.0f}/s, {size:.0f} bytes a record")
    return found


def paced(stand: Stand, rate: int = 1000) -> tuple[float, float, float]:
    """(msg/s, cores used, peak MB)."""
    topic = stand.topic()
    env = stand.env(topic, MESSAGES_PER_SECOND=str(rate))
    count = str(rate * SECONDS)
    with stand.script("kafka_producer.py", "--max-messages", count, env=env) as process:
        time.sleep(5)
        before, memory = cpu(process.pid), peak(process.pid)
        time.sleep(SECONDS - 10)
        used = (cpu(process.pid) - before) / (SECONDS - 10)
        memory = max(memory, peak(process.pid))
        process.wait(60)
    return stand.append_rate(topic), used, memory


def latencies(stand: Stand, rate: int, seconds: int, s3_latency: float):
    """(ms from acknowledgement to object of each record, cores used by producer and consumer)."""
    topic = stand.topic()
    with ExitStack() as stack:
        _, endpoint = stack.enter_context(stand.s3_server(s3_latency))
        env = stand.env(
            topic, MESSAGES_PER_SECOND=str(rate), LOG_FORMAT="json", S3_ENDPOINT_URL=endpoint
        )
        consumer = stack.enter_context(stand.script("kafka_consumer.py", env=env))
        producer = stack.enter_context(stand.script("kafka_producer.py", env=env))
        while not stand.ask(env["S3_BUCKET"], "count", endpoint):
            time.sleep(0.1)
        time.sleep(1)
        before = cpu(producer.pid), cpu(consumer.pid)
        time.sleep(seconds)
        after = cpu(producer.pid), cpu(consumer.pid)
        producer.terminate()
        producer.wait(30)
        time.sleep(1)
        objects = stand.ask(env["S3_BUCKET"], "times", endpoint)
    acknowledged = {}
    for text in producer.out.read_text().splitlines():
        line = json.loads(text)
        if "offset" in line:
            moment = datetime.fromisoformat(line["time"]).timestamp()
            acknowledged.setdefault(line["offset"], moment)
    missing = [n for n in acknowledged if f"stock_market_{n}.json" not in objects]
    if missing:
        raise SystemExit(f"no object of offsets {missing}")
    first = 2 * rate  # while Python warms up
    return (
        [1000 * (objects[f"stock_market_{n}.json"] - t) for n, t in acknowledged.items()][first:],
        [(b - a) / seconds for a, b in zip(before, after, strict=True)],
    )


def without_crc32c(stand: Stand) -> dict[str, str]:
    """An environment in which the package of the extra `fast` cannot be imported."""
    folder = stand.folder / "without"
    folder.mkdir(exist_ok=True)
    (folder / "crc32c.py").write_text('raise ImportError("left out for the comparison")\n')
    return {"PYTHONPATH": str(folder)}


def fill(stand: Stand, topic: str, value: bytes, count: int) -> None:
    """Send one value `count` times."""
    from kafka import KafkaProducer

    producer = KafkaProducer(
        bootstrap_servers=stand.kafka.bootstrap,
        acks="all",
        linger_ms=5,
        batch_size=2**17,
        max_request_size=2**23,
        **KAFKA,
    )
    futures = [producer.send(topic, value) for _ in range(count)]
    for future in futures:
        future.get(60)
    producer.close()


def rate_of_backlog(stand: Stand, topic: str, count: int, width: int = WIDTH) -> float:
    """Objects a second while one consumer catches up with `count` records."""
    env = stand.env(topic, S3_MAX_CONCURRENCY=str(width))
    return stand.catch_up("kafka_consumer.py", processes=1, env=env, count=count)[0]


def growth(stand: Stand) -> list[tuple[int, float]]:
    """(records of backlog, objects a second)."""
    found = []
    for count in BACKLOGS:
        topic = stand.topic()
        stand.run("kafka_producer.py", "--max-messages", str(count), env=stand.env(topic))
        found.append((count, rate_of_backlog(stand, topic, count)))
        say(f"backlog of {count}: {found[-1][1]:.0f}/s")
    return found


def sizes(stand: Stand) -> list[tuple[str, float, float]]:
    """(size of a record, MB/s while one consumer catches up, its peak MB)."""
    found = []
    for name, size, count in (("1 kB", 10**3, 4000), ("100 kB", 10**5, 600), ("1 MB", 10**6, 300)):
        topic = stand.topic(large=True)
        fill(stand, topic, b'{"a": "%s"}' % (b"x" * (size - 9)), count)
        args = dict(processes=1, env=stand.env(topic), count=count)
        rate, _, _, memory = stand.catch_up("kafka_consumer.py", **args)
        found.append((name, rate * size / 1e6, memory))
        say(f"records of {name}: {found[-1][1]:.0f} MB/s, {memory:.0f} MB")
    return found


def behind_a_large_one(stand: Stand) -> float:
    """ms from acknowledgement to object of a small record sent just after one of 1 MB; median."""
    from kafka import KafkaProducer

    topic = stand.topic(large=True)
    env = stand.env(topic)
    producer = KafkaProducer(
        bootstrap_servers=stand.kafka.bootstrap, acks="all", max_request_size=2**23, **KAFKA
    )
    sent = {}
    with stand.script("kafka_consumer.py", env=env):
        for _ in range(20):
            producer.send(topic, b'{"a": "%s"}' % (b"x" * 10**6))
            offset = producer.send(topic, b"{}").get(60).offset
            sent[f"stock_market_{offset}.json"] = time.time()
            while stand.ask(env["S3_BUCKET"], "count") <= offset:
                time.sleep(0.05)
        objects = stand.ask(env["S3_BUCKET"], "times")
    producer.close()
    return median(1000 * (objects[name] - at) for name, at in list(sent.items())[2:])


def start_time(stand: Stand, script: str, env: dict[str, str], line: str) -> float:
    """Seconds from the start of a script to the first line that begins so; median."""
    times = []
    for _ in range(ROUNDS):
        env = {**env, "KAFKA_GROUP_ID": f"start-{next(stand.numbers)}"}
        env["S3_BUCKET"] = env["KAFKA_GROUP_ID"]
        began = time.monotonic()
        command = [sys.executable, str(ROOT / script), "--max-messages", "1"]
        with subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            next(text for text in process.stdout if text.startswith(line))
            times.append(time.monotonic() - began)
    return median(times)


def large_file(stand: Stand, rows: int = 2_000_000) -> tuple[float, float]:
    """(seconds from the start to the first record of a file of so many rows, peak MB)."""
    sample = (ROOT / "tests" / "data" / "indexProcessed.csv").read_text().splitlines()
    path = stand.folder / "large.csv"
    with path.open("w") as file:
        file.write(sample[0] + "\n")
        file.writelines(row + "\n" for row in itertools.islice(itertools.cycle(sample[1:]), rows))
    env = stand.env(stand.topic(), MESSAGES_PER_SECOND="1", CSV_PATH=str(path))
    began = time.monotonic()
    with stand.script("kafka_producer.py", env=env) as process:
        while "[Sent]" not in process.out.read_text():
            time.sleep(0.1)
        return time.monotonic() - began, peak(process.pid)


def verify_rate(stand: Stand, env: dict[str, str]) -> float:
    """Sealed objects a second that `--verify` compares, its start included."""
    stand.run("infra/audit.py", "--seal", env=env)
    at = time.monotonic()
    said = stand.run("infra/audit.py", "--verify", env=env)
    return int(re.search(r"verify: (\d+) sealed objects", said)[1]) / (time.monotonic() - at)


def main() -> int:
    load = os.getloadavg()[0]
    began = time.monotonic()
    table: list[tuple[str, str, str, bool]] = []
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        stand = Stand(Path(name), stack)
        say("stack is up")
        sends = producer_rates(stand)
        packed = compression(stand)
        rate, used, producer_memory = paced(stand)

        one, two = stand.topic(), stand.topic(2)
        for topic, count in ((one, str(RECORDS)), (two, str(2 * RECORDS))):
            stand.run("kafka_producer.py", "--max-messages", count, env=stand.env(topic))
        runs: dict[str, list] = {name: [] for name in ("original", "s3fs", "put", "one", "two")}
        loops = {
            "original": ("original", RECORDS // 60),
            "s3fs": ("bare_s3fs", RECORDS // 2),
            "put": ("bare_put_object", RECORDS // 2),
        }
        for _ in range(ROUNDS):
            for short, (loop, count) in loops.items():
                env = stand.env(one)
                arguments = (stand.kafka.bootstrap, one, stand.s3[1], env["S3_BUCKET"], str(count))
                result = stand.catch_up(
                    "tests/benchmark.py", loop, *arguments, processes=1, env=env, count=count
                )
                runs[short].append(result)
            env = stand.env(one)
            args = dict(env=env, count=RECORDS)
            runs["one"].append(stand.catch_up("kafka_consumer.py", processes=1, **args))
            args = dict(env=stand.env(two), count=2 * RECORDS)
            runs["two"].append(stand.catch_up("kafka_consumer.py", processes=2, **args))
            say(", ".join(f"{name} {each[-1][0]:.0f}/s" for name, each in runs.items()))

        at = time.monotonic()
        audit = stand.run("kafka_consumer.py", "--audit", env=env)
        checked = int(re.search(r"audit: (\d+) objects", audit)[1])
        audited = checked / (time.monotonic() - at)
        say(f"audit {audited:.0f}/s")
        verified = verify_rate(stand, env)
        say(f"verify {verified:.0f}/s")
        large = large_file(stand)
        say(f"2,000,000 rows: {large[0]:.1f} s, {large[1]:.0f} MB")
        at = time.monotonic()
        stand.run("infra/report.py", env=env)
        reported = checked / (time.monotonic() - at)
        say(f"report {reported:.0f}/s")
        grown = growth(stand)
        widths = [(width, rate_of_backlog(stand, one, RECORDS, width)) for width in (16, 64, 256)]
        sized, behind = sizes(stand), behind_a_large_one(stand)
        env = stand.env(stand.topic(), MESSAGES_PER_SECOND="1")
        first_sent = start_time(stand, "kafka_producer.py", env, "[Sent]")
        first_object = start_time(stand, "kafka_consumer.py", stand.env(one), "Upload")
        ten, _ = latencies(stand, 10, SECONDS, 0.025)
        hundred, _ = latencies(stand, 100, SECONDS // 2, 0.025)
        single, idle = latencies(stand, 1, 2 * SECONDS, 0.05)

    def ratio(over: list, under: list) -> float:
        return median(a / b for a, b in zip(over, under, strict=True))

    def rates(name: str) -> list[float]:
        return [run[0] for run in runs[name]]

    def p99(values: list[float]) -> float:
        return quantiles(values, n=100, method="inclusive")[98]

    def row(what: str, least: str, measured: str, met: bool) -> None:
        table.append((what, least, measured, met))

    def latency(what: str, values: list[float], middle: float, late: float) -> None:
        text = f"median {median(values):.1f}, p99 {p99(values):.1f} ms"
        met = median(values) <= middle and p99(values) <= late
        row(what, f"median {middle:.1f}, p99 {late:.0f} ms", text, met)

    part, fast = ratio(sends["ours"], sends["bare"]), median(sends["fast"])
    row("producer, no limit, against a bare send loop", "0.90", f"{part:.2f}", part >= 0.9)
    row("with the extra `fast`", "50,000 msg/s", f"{fast:,.0f} msg/s", fast >= 50_000)
    text = f"{rate:,.1f} msg/s, {100 * used:.0f}% of a core"
    row("producer at 1,000 msg/s, 30 s", "±1%", text, abs(rate - 1000) <= 10)
    part = ratio(rates("one"), rates("original"))
    row("consumer against the original's loop", "30 times", f"{part:.0f} times", part >= 30)
    part = ratio(rates("one"), rates("s3fs"))
    row("consumer against the best bare s3fs loop", "0.90", f"{part:.2f}", part >= 0.9)
    part = ratio(rates("one"), rates("put"))
    row("consumer against the best `put_object` loop", "1.25", f"{part:.2f}", part >= 1.25)
    alone, own = median(rates("one")), median(run[1] for run in runs["one"])
    row("one consumer catching up", "2,100 objects/s", f"{alone:,.0f} objects/s", alone >= 2100)
    row("its CPU an object", "0.40 ms", f"{own:.2f} ms", own <= 0.4)
    both = median(rates("two"))
    row("two processes, two partitions", "3,500 objects/s", f"{both:,.0f} objects/s", both >= 3500)
    part = max(rate for _, rate in grown) / min(rate for _, rate in grown)
    text = ", ".join(f"{rate:,.0f}" for _, rate in grown)
    row("objects/s at a backlog of 1,000, 10,000, 100,000", "within 10%", text, part <= 1.1)
    latency("acknowledged to object, 10 msg/s, PUT 25 ms", ten, 28, 31)
    latency("the same, 100 msg/s", hundred, 28.5, 35)
    latency("the same, 1 msg/s, PUT 50 ms", single, 60, 100)
    row("a small record behind one of 1 MB, PUT 25 ms", "100 ms", f"{behind:.0f} ms", behind <= 100)
    text = f"producer {100 * idle[0]:.1f}%, consumer {100 * idle[1]:.1f}%"
    row("CPU at 1 msg/s, of a core", "under 2% each", text, max(idle) < 0.02)
    consumer_memory = max(run[3] for name in ("one", "two") for run in runs[name])
    row("consumer, peak memory", "90 MB", f"{consumer_memory:.0f} MB", consumer_memory < 90)
    text = f"{producer_memory:.0f} MB"
    row(f"producer with {ROWS:,} rows, peak memory", "130 MB", text, producer_memory < 130)
    row("start to first record sent", "1.5 s", f"{first_sent:.1f} s", first_sent < 1.5)
    row("start to first object written", "0.6 s", f"{first_object:.2f} s", first_object < 0.6)
    row("audit", "6,500 objects/s", f"{audited:,.0f} objects/s", audited >= 6500)
    row("verify its seals", "as the audit", f"{verified:,.0f} objects/s", verified >= 6500)
    text = f"{large[0]:.1f} s, {large[1]:.0f} MB"
    row("start with 2,000,000 rows, and its memory", "it starts", text, True)
    row("report", "1,000 objects/s", f"{reported:,.0f} objects/s", reported >= 1000)

    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    print(
        f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores ({model[1] if model else '?'}),"
        f" Python {platform.python_version()}, load {load:.1f} before and {os.getloadavg()[0]:.1f}"
        f" after, {time.monotonic() - began:.0f} s; median of {ROUNDS} rounds\n"
    )
    print("| what | at least | here | met |\n|---|---|---|---|")
    for what, least, measured, met in table:
        print(f"| {what} | {least} | {measured} | {'yes' if met else '**no**'} |")
    print("\n| what, by itself | objects or msg a second | CPU ms each | S3 stand-in's CPU ms |")
    print("|---|---|---|---|")
    print(f"| bare send loop | {median(sends['bare']):,.0f} | | |")
    for title, key in (
        ("the original's loop", "original"),
        ("best bare s3fs loop", "s3fs"),
        ("best `put_object` loop", "put"),
        ("one consumer", "one"),
        ("two consumers", "two"),
    ):
        figures = [median(run[i] for run in runs[key]) for i in range(3)]
        print(f"| {title} | {figures[0]:,.0f} | {figures[1]:.2f} | {figures[2]:.2f} |")
    print("\n| compression | msg/s | bytes a record |\n|---|---|---|")
    for kind, speed, size in packed:
        print(f"| {kind} | {speed:,.0f} | {size:.0f} |")
    print("\n| S3_MAX_CONCURRENCY | objects/s |\n|---|---|")
    for width, speed in widths:
        print(f"| {width} | {speed:,.0f} |")
    print("\n| a record of | MB/s catching up | peak MB |\n|---|---|---|")
    for size, speed, memory in sized:
        print(f"| {size} | {speed:,.0f} | {memory:.0f} |")
    return 0 if all(met for *_, met in table) else 1


if __name__ == "__main__":
    if len(sys.argv) > 1:  # a part, as a process of its own
        parts = {
            part.__name__: part
            for part in (original, bare_s3fs, bare_put_object, bare_send, serve_s3)
        }
        if sys.argv[1] not in parts:
            sys.exit(__doc__)
        parts[sys.argv[1]](*sys.argv[2:])
    else:
        sys.exit(main())
