"""Settings, logging and the ways to start and stop that both scripts share.

The settings are declared once, in `Settings`; everything else here is what the producer and the
consumer would otherwise both have to say.
"""

# ruff: noqa: E402 (what is installed is checked before it is imported)

from __future__ import annotations

import sys
from contextlib import suppress
from importlib import metadata
from importlib.util import find_spec


def _installation_problem() -> str:
    """Why the scripts cannot run with what is installed, and what to do; "" when they can."""
    install = f"{sys.executable} -m pip install -r requirements.txt"
    if sys.version_info < (3, 11):  # noqa: UP036
        return f"Python 3.11 or newer is needed, and this is {sys.version.split()[0]}"
    missing = [name for name in ("dotenv", "kafka", "pandas", "s3fs") if not find_spec(name)]
    if missing:
        return f"packages are missing ({', '.join(missing)}): {install}"
    clients = {}
    for name in ("kafka-python", "kafka-python-ng"):  # both are imported as kafka
        with suppress(metadata.PackageNotFoundError):
            clients[name] = metadata.version(name)
    if len(clients) > 1 or clients.get("kafka-python", "3") < "3":
        there = " and ".join(f"{name} {version}" for name, version in clients.items())
        remove = f"{sys.executable} -m pip uninstall -y kafka-python kafka-python-ng"
        return f"{there} cannot be used, or not together: {remove}; {install}"
    return ""


if problem := _installation_problem():  # before the imports that it is about
    print(problem, file=sys.stderr)
    sys.exit(2)

import argparse
import codecs
import difflib
import io
import ipaddress
import json
import logging
import math
import os
import re
import shutil
import signal
import socket
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from itertools import accumulate
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dotenv.parser import Binding, parse_stream
from kafka import KafkaConsumer, KafkaProducer, codec
from kafka.errors import KafkaError

# What differs between kafka-python-ng and kafka-python 3 is here and in `make_producer`.
try:
    from kafka import KafkaClient
    from kafka.consumer.fetcher import NoOffsetForPartitionError
except ImportError:
    from kafka.errors import NoOffsetForPartitionError  # noqa: F401

    KafkaClient = None

HERE = Path(__file__).resolve().parent
log = logging.getLogger(__name__)
records = logging.getLogger("records")  # the line about each record, to stdout


class SettingsError(Exception):
    """Wrong settings: `args` are the problems, one line each. Exit code 2."""


class Failure(Exception):
    """What a user can cause or meet while running: one line that says what, with which value,
    and what to try. Exit code 1."""


# ------------------------------------------------------------------------------------- settings


def _setting(default: str, parse: Callable[[str], Any] = str, *, secret: bool = False) -> Any:
    return field(metadata={"default": default, "parse": parse}, repr=not secret)


def _number(low: float, high: float, kind: type = int) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            number = kind(text)
        except ValueError:
            number = math.nan
        if not low <= number <= high or number == math.inf:
            whole = "a whole number" if kind is int else "a number"
            upper = "" if high == math.inf else f" and at most {high}"
            raise ValueError(f"must be {whole}, at least {low}{upper}")
        return number

    return parse


def _seed(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError("must be a whole number, or empty: another sequence each time") from None


def _optional(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda text: parse(text) if text else None


def _choice(*allowed: str) -> Callable[[str], str]:
    """One of `allowed`, whose case does not matter."""

    def parse(text: str) -> str:
        for name in allowed:
            if name.lower() == text.lower():
                return name
        raise ValueError("must be one of " + ", ".join(name or "(empty)" for name in allowed))

    return parse


def _matching(pattern: str, otherwise: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(otherwise)
        return text

    return parse


def _servers(text: str) -> tuple[str, ...]:
    servers = tuple(server.strip() for server in text.split(","))
    try:
        for server in servers:
            host, _, port = server.rpartition(":")
            if not re.fullmatch(r"\[.+\]|[^\s:/@]+", host) or not re.fullmatch(r"[0-9]{1,5}", port):
                raise ValueError
            if host.startswith("["):
                ipaddress.IPv6Address(host[1:-1])
            host.encode("idna")
            _number(1, 65535)(port)
    except ValueError:
        what = "must be host:port, the port at most 65535, several with commas between"
        raise ValueError(f"{what} (localhost:9092)") from None
    return servers


def _version(text: str) -> tuple[int, ...]:
    wrong = "must be a version such as 2.8.1, 0.11 at least, or empty: negotiate"
    version = tuple(map(int, _matching(r"\d+\.\d+(\.\d+)?", wrong)(text).split(".")))
    if version < (0, 11):  # it has no headers, which a dead letter needs
        raise ValueError(wrong)
    return version


def _url(text: str) -> str:
    try:
        parts = urlsplit(text)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise ValueError("must be an address such as http://localhost:9000, or empty: AWS")
    return text


def _path(text: str) -> Path:
    if not text:
        raise ValueError("must name a file")
    return HERE / os.path.expanduser(text)


# Kafka's rule for topic names: org.apache.kafka.common.internals.Topic.
_topic = _matching(
    r"(?!\.{1,2}$)[a-zA-Z0-9._-]{1,249}",
    "must be a topic name: letters, digits, '.', '_' and '-', at most 249",
)
_group = _matching(r"\S(.*\S)?", "must not be empty")
_bucket = _matching(
    r"[A-Za-z0-9][A-Za-z0-9._-]{1,253}[A-Za-z0-9]",
    "must be the bucket's name alone, without s3:// and without a path (see S3_PREFIX)",
)


def _prefix(text: str) -> str:
    if not re.fullmatch(r"(?!/)(?!.*//)(?!(.*/)?\.{1,2}/)[^\x00-\x1f\x7f\\]*", text):
        raise ValueError(
            "must not begin with / or hold //, ./, ../, a backslash or control characters"
        )
    if len(text.encode()) > 900:  # S3 takes names of 1,024 bytes, and ours have up to 58 more
        raise ValueError(f"must have at most 900 bytes, and has {len(text.encode())}")
    return text


@dataclass(frozen=True)
class Settings:
    """Every setting, named as its environment variable in lower case."""

    kafka_bootstrap_servers: tuple[str, ...] = _setting("localhost:9092", _servers)
    kafka_topic: str = _setting("test", _topic)
    kafka_group_id: str = _setting("python-consumer-group", _group)
    kafka_auto_offset_reset: str = _setting("latest", _choice("latest", "earliest"))
    kafka_api_version: tuple[int, ...] | None = _setting("2.8.1", _optional(_version))
    kafka_request_timeout_ms: int = _setting("30000", _number(1000, 500_000))
    kafka_security_protocol: str = _setting(
        "PLAINTEXT", _choice("PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL")
    )
    kafka_sasl_mechanism: str = _setting("", _choice("", "PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"))
    kafka_sasl_username: str = _setting("")
    kafka_sasl_password: str = _setting("", secret=True)
    kafka_ssl_cafile: str = _setting("")
    kafka_dlq_topic: str = _setting("error_topic", _topic)
    kafka_key_column: str = _setting("")
    kafka_compression_type: str = _setting("", _choice("", "gzip", "snappy", "lz4", "zstd"))
    csv_path: Path = _setting("indexProcessed.csv", _path)  # noqa: RUF009 (Path is no default)
    messages_per_second: float = _setting("1", _number(0, math.inf, float))
    random_seed: int | None = _setting("", _optional(_seed))
    s3_bucket: str = _setting("", _optional(_bucket))
    s3_prefix: str = _setting("", _prefix)
    s3_endpoint_url: str | None = _setting("", _optional(_url))
    s3_max_concurrency: int = _setting("64", _number(1, 256))  # records in hand
    log_level: str = _setting("INFO", _choice("DEBUG", "INFO", "WARNING", "ERROR"))
    log_format: str = _setting("text", _choice("text", "json"))
    metrics_port: int | None = _setting("", _optional(_number(1, 65535)))

    @classmethod
    def from_env(
        cls, environ: Mapping[str, str], *checks: Callable[[Mapping[str, Any]], str]
    ) -> Settings:
        """Build from `environ`. Each of `checks`, which a script adds, is given the values that
        could be read, by name, and returns a problem or "".

        Raises SettingsError with every problem at once.
        """
        values: dict[str, Any] = {}
        problems = []
        for each in fields(cls):
            name = each.name.upper()
            default = each.metadata["default"]
            text = environ.get(name, default)
            try:
                text.encode()
                values[each.name] = each.metadata["parse"](text)
            except UnicodeEncodeError:  # no value: it may be a secret
                problems.append(f"{name}: must be UTF-8")
            except ValueError as error:
                instead = f"; leave it out for {default}" if default and not text else ""
                problems.append(f"{name}={text!r}: {error}{instead}")
        problems += [*_kafka_problems(values), *_other_problems(values)]
        problems += filter(None, [check(values) for check in checks])
        if problems:
            raise SettingsError(*problems)
        return cls(**values)

    def kafka(self) -> dict[str, Any]:
        """The options that every Kafka client here is made with."""
        return {
            "bootstrap_servers": list(self.kafka_bootstrap_servers),
            "api_version": self.kafka_api_version,
            "security_protocol": self.kafka_security_protocol,
            "sasl_mechanism": self.kafka_sasl_mechanism or None,
            "sasl_plain_username": self.kafka_sasl_username or None,
            "sasl_plain_password": self.kafka_sasl_password or None,
            "ssl_cafile": self.kafka_ssl_cafile or None,
            "reconnect_backoff_max_ms": 1000,
        }


def _kafka_problems(values: Mapping[str, Any]) -> Iterator[str]:
    """Settings of Kafka that do not go together, or ask for what is not there."""
    get = values.get
    if get("kafka_topic") == get("kafka_dlq_topic", ""):
        yield f"KAFKA_DLQ_TOPIC={get('kafka_topic')!r}: must differ from KAFKA_TOPIC"
    protocol = get("kafka_security_protocol", "")
    if protocol.startswith("SASL"):
        for name in ("kafka_sasl_mechanism", "kafka_sasl_username", "kafka_sasl_password"):
            if not get(name, True):
                yield f"{name.upper()} is not set: KAFKA_SECURITY_PROTOCOL={protocol} needs it"
    if get("kafka_ssl_cafile") and not os.path.isfile(values["kafka_ssl_cafile"]):
        yield f"KAFKA_SSL_CAFILE={values['kafka_ssl_cafile']!r}: there is no such file"
    compression = get("kafka_compression_type")
    if compression and not getattr(codec, f"has_{compression}")():
        package = {"snappy": "python-snappy", "zstd": "zstandard"}.get(compression, compression)
        yield f"KAFKA_COMPRESSION_TYPE={compression!r}: pip install {package}"


def _other_problems(values: Mapping[str, Any]) -> Iterator[str]:
    if values.get("metrics_port") and not find_spec("prometheus_client"):
        yield f"METRICS_PORT={values['metrics_port']!r}: pip install prometheus-client"
    bucket, url = values.get("s3_bucket"), urlsplit(values.get("s3_endpoint_url") or "")
    # As in https://BUCKET.s3.amazonaws.com: minio.local is no bucket's host, however it is called.
    host = re.match(rf"{re.escape(bucket or '')}\.(s3|localhost|.+\..+\.)", url.hostname or "")
    if bucket and (host or bucket in url.path.split("/")):
        yield f"S3_ENDPOINT_URL={url.geturl()!r}: holds the bucket {bucket}; name the server alone"


def environment(flags: Mapping[str, str | None], dotenv: Path = HERE / ".env") -> dict[str, str]:
    """Flags over the environment over the file `dotenv`, whose other names (AWS credentials) are
    put into the process's environment too. Values are taken as they stand: no `${...}`.

    Raises SettingsError for a file that cannot be read, a line that is not NAME=value, a value
    that would not be taken as it stands, and a name that is nearly that of a setting.
    """
    if dotenv.exists():
        lines = [line for line in parse_stream(_open_text(dotenv)) if line.key or line.error]
        problems = [
            f"{dotenv}, line {_line_number(line)}: {problem}"
            for line in lines
            for problem in _line_problems(line)
        ]
        if problems:
            raise SettingsError(*problems)
        for name, value in {line.key: line.value for line in lines}.items():  # the last one counts
            os.environ.setdefault(str(name), str(value))
    elif dotenv.with_name(".env.txt").exists():
        log.warning("%s is not read: rename it to .env", dotenv.with_name(".env.txt"))
    return {**os.environ, **{name: text for name, text in flags.items() if text is not None}}


def _open_text(path: Path) -> io.StringIO:
    """A file in UTF-8, or in UTF-16 with its byte order mark, as PowerShell writes it."""
    try:
        content = path.read_bytes()
        utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        return io.StringIO(content.decode("utf-16" if utf16 else "utf-8-sig"))
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        problem = f"line {line} is not UTF-8; save it as UTF-8"
    except OSError as error:
        problem = "it is a folder, not a file" if path.is_dir() else f"{error.strerror}"
    raise SettingsError(f"{path} cannot be read: {problem}")


def _line_number(line: Binding) -> int:
    """Where a line's name stands; for the parser the blank lines before it are its own."""
    text = line.original.string
    return line.original.line + text[: len(text) - len(text.lstrip())].count("\n")


def _line_problems(line: Binding) -> Iterator[str]:
    """What is wrong with a line of `.env`, without its value, which may be a secret."""
    name, value = line.key or "", line.value
    settings = [each.name.upper() for each in fields(Settings)]
    ours = name.upper().startswith(("KAFKA_", "S3_"))
    close = difflib.get_close_matches(name.upper(), settings, 1, 0.78 if ours else 0.9)
    if line.error or value is None or "\0" in value:
        yield "must be NAME=value"
    elif set(re.findall(r"[\x00-\x1f]", value)) - set(line.original.string.strip()):
        yield f"{name}: in double quotes a backslash makes a control character; use single quotes"
    elif re.match("[\u2018-\u201f]", value):
        yield f"{name}: has typographic quotes; use straight ones, or none"
    elif close and name != close[0] and not name.startswith("AWS_"):
        yield f"{name} is no setting; did you mean {close[0]}?"
    elif ours and not close:
        log.warning("%s names no setting, and is not read", name)


def positive(text: str) -> int:
    """A count for argparse: a whole number, at least 1."""
    try:
        return int(_number(1, math.inf)(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


class Silence:
    """Says that the broker does not answer: after 2 s, then every 30 s, and when it is over."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.since = clock()
        self.said = -math.inf

    def lasts(self, more: str, since: float = -math.inf) -> None:
        """No answer came; nothing was owed before `since`. `more` is what that means."""
        self.since = max(self.since, since)
        seconds = self.clock() - self.since
        if seconds >= 2 and self.clock() - self.said >= 30:
            self.said = self.clock()
            log.warning("no answer from the broker for %.0f s: %s", seconds, more)

    def ends(self) -> None:
        """An answer came."""
        if self.said > -math.inf:
            log.warning("the broker answers again after %.1f s", self.clock() - self.since)
        self.said = -math.inf
        self.since = self.clock()


# -------------------------------------------------------------------------------------- logging


def printable(text: str) -> str:
    """`text` with control characters escaped: a record cannot write to the user's terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class _Text(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = printable(record.message)
        return super().formatMessage(record)


class _Json(logging.Formatter):
    """One object a line; the names are those of the README."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        for name in ("topic", "partition", "offset", "key"):
            if hasattr(record, name):
                line[name] = getattr(record, name)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


class _Stream(logging.StreamHandler):
    """A stream that may be a terminal, where the status is one line that stays at the bottom."""

    status = ""  # shared: stdout and stderr are the same terminal

    def __init__(self, stream: Any, formatter: logging.Formatter):
        super().__init__(stream)
        self.setFormatter(formatter)
        stream.reconfigure(errors="backslashreplace")  # a terminal that is not UTF-8
        self.tty = (
            isinstance(formatter, _Text) and stream.isatty() and os.environ.get("TERM") != "dumb"
        )

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        if not self.tty:
            return line
        if getattr(record, "status", False):
            _Stream.status = line[: shutil.get_terminal_size().columns - 1]
            return "\r\x1b[K" + _Stream.status
        if record.levelno >= logging.WARNING and not os.environ.get("NO_COLOR"):
            line = f"\x1b[{33 if record.levelno == logging.WARNING else 31}m{line}\x1b[0m"
        return f"\r\x1b[K{line}\n{_Stream.status}"

    def emit(self, record: logging.LogRecord) -> None:
        self.terminator = "" if self.tty else "\n"
        super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, BrokenPipeError):  # `| head`: the reader has left, so stop
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            if callable(signal.getsignal(signal.SIGTERM)):  # not stopping yet
                signal.raise_signal(signal.SIGTERM)
        elif not isinstance(error, OSError):  # a full disk is no reason to stop moving records
            super().handleError(record)

    def close(self) -> None:
        if self.tty and _Stream.status:
            _Stream.status = ""
            self.stream.write("\n")
        super().close()


def _seldom() -> Callable[[logging.LogRecord], bool]:
    """A filter that lets one line of the Kafka client through in 30 s, without its traceback: it
    says the same in many words at every attempt."""
    said = -math.inf

    def let(record: logging.LogRecord) -> bool:
        nonlocal said
        if not record.name.startswith("kafka."):
            return True
        record.exc_info = record.exc_text = None
        if record.created - said < 30:
            return False
        said = record.created
        return True

    return let


def setup_logging(settings: Settings) -> None:
    """Records to stdout, the rest to stderr, as text or as JSON."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 (None: started with >&-)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    made: Callable[[str], logging.Formatter] = (
        (lambda style: _Json()) if settings.log_format == "json" else _Text
    )
    errors = _Stream(sys.stderr, made("%(asctime)s %(levelname)s %(message)s"))
    if isinstance(errors.formatter, _Text):
        errors.formatter.datefmt = "%Y-%m-%d %H:%M:%S"
    logging.basicConfig(level=settings.log_level, handlers=[errors])
    records.addHandler(_Stream(sys.stdout, made("%(message)s")))
    records.propagate = False
    records.setLevel(logging.INFO)
    # The libraries say secrets at DEBUG (signatures, tokens), and much at INFO.
    for name in ("kafka", "botocore", "aiobotocore", "s3fs", "fsspec"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # complains of what an exit cuts off
    errors.addFilter(_seldom())
    # kafka-python-ng's SCRAM speaks through the root logger, with a traceback at each refusal.
    errors.addFilter(lambda record: record.name != "root")


def status(logger: logging.Logger, text: str, *args: object) -> None:
    """A line on the state: in place on a terminal, an ordinary line elsewhere."""
    logger.info(text, *args, extra={"status": True})


# -------------------------------------------------------------------------------------- metrics

_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Durations:
    """Durations in seconds, counted by bucket; the last bucket has no upper bound."""

    def __init__(self) -> None:
        self.counts = [0] * (len(_BUCKETS) + 1)
        self.total = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(_BUCKETS, seconds)] += 1
        self.total += seconds


def serve_metrics(settings: Settings, metrics: tuple[tuple[str, ...], ...], stats: object) -> None:
    """Serve attributes of `stats` to Prometheus on METRICS_PORT, from a thread; nothing when off.

    A row of `metrics` is (name, help, attribute[, label]). The attribute is a number, `Durations`,
    or with a label a dict of its values to numbers. They are read when Prometheus asks, so the
    scripts only count. Raises Failure for a port in use.
    """
    if settings.metrics_port is None:
        return
    from prometheus_client import core, start_http_server
    from prometheus_client.registry import Collector, CollectorRegistry

    class Reader(Collector):
        def collect(self) -> Iterator[core.Metric]:
            for name, text, attribute, *label in metrics:
                labels, value = ["topic", *label], getattr(stats, attribute)
                if isinstance(value, Durations):
                    histogram = core.HistogramMetricFamily(name, text, labels=labels)
                    bounds = [*map(str, _BUCKETS), "+Inf"]
                    counts = accumulate(list(value.counts))
                    histogram.add_metric(
                        [settings.kafka_topic], list(zip(bounds, counts, strict=True)), value.total
                    )
                    yield histogram
                    continue
                kind = core.CounterMetricFamily if name.endswith("_total") else None
                family = (kind or core.GaugeMetricFamily)(name, text, labels=labels)
                # list(): in one step, for the script goes on counting
                for key, number in list(value.items()) if label else [(None, value)]:
                    family.add_metric(
                        [settings.kafka_topic, *([str(key)] if label else [])], number
                    )
                yield family

    registry = CollectorRegistry()
    registry.register(Reader())
    try:
        start_http_server(settings.metrics_port, registry=registry)
    except OSError as error:
        raise Failure(
            f"METRICS_PORT={settings.metrics_port}: {error.strerror}; choose a free port"
        ) from None


# ---------------------------------------------------------------------------------------- Kafka

_FOREVER = 2**31 - 1  # ms, the most that the protocol's fields take


def make_producer(settings: Settings, **options: Any) -> KafkaProducer:
    """A producer that keeps the order and gives up no record: all replicas acknowledge, one
    request is in flight, and a broker that is down is waited for.

    A request is lost after KAFKA_REQUEST_TIMEOUT_MS and sent again; but a record that waits for
    its turn must not expire with it, as it does where one number says both.
    """
    timeout = settings.kafka_request_timeout_ms
    if "delivery_timeout_ms" in KafkaProducer.DEFAULT_CONFIG:
        options |= {"request_timeout_ms": timeout, "delivery_timeout_ms": _FOREVER}
        options["enable_idempotence"] = False  # with it, one refused record ends the client
    else:
        options |= {
            "request_timeout_ms": _FOREVER,
            "kafka_client": lambda **o: KafkaClient(**{**o, "request_timeout_ms": timeout}),
        }
    return KafkaProducer(
        **settings.kafka(),
        acks="all",
        retries=_FOREVER,
        max_in_flight_requests_per_connection=1,
        max_block_ms=500,
        max_request_size=2**30,  # the broker says what is too large
        compression_type=settings.kafka_compression_type or None,
        **options,
    )


# ---------------------------------------------------------------------------- starting, stopping


class Stop:
    """`requested` turns true at the first Ctrl-C or SIGTERM; the second ends the process."""

    requested = False
    code = 0  # of a process that has to be ended

    def __init__(self, farewell: Callable[[], str] = lambda: "") -> None:
        """Listen from now on. When the process is still there 4 s after the request (a broker
        that does not answer holds every call to it), it says `farewell()` and ends with 0."""
        self.farewell = farewell
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self._handle)
        threading.Thread(target=self._watch, daemon=True).start()

    def _handle(self, signum: int, frame: object) -> None:
        self.requested = True
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)

    def _watch(self) -> None:
        while not self.requested:
            time.sleep(0.25)
        time.sleep(4)
        _leave(self.code, "stopped without an answer from the other side", self.farewell)


def _leave(code: int, message: str, more: Callable[[], str] = lambda: "") -> None:
    timer = threading.Timer(0.3, os._exit, [code])  # should even stderr be blocked
    timer.daemon = True
    timer.start()
    log.log(logging.ERROR if code else logging.WARNING, "%s%s", message, more())
    os._exit(code)


class within:
    """End the process with 1 and `message` when the block takes longer than `seconds`."""

    def __init__(self, seconds: float, message: str, more: Callable[[], str] = lambda: "") -> None:
        self.timer = threading.Timer(seconds, _leave, [1, message, more])
        self.timer.daemon = True

    def __enter__(self) -> None:
        self.timer.start()

    def __exit__(self, *error: object) -> None:
        self.timer.cancel()


def _reach(host: str, port: int, timeout: float) -> str:
    """ "" when something listens there, else why not."""
    try:
        socket.create_connection((host, port), timeout).close()
    except OSError as error:
        return f"{host}:{port}: {error.strerror or error}"
    return ""


def check_kafka(settings: Settings) -> None:
    """Check, step by step, that the broker answers, knows the topic and can be reached where it
    says it is (the client itself reports all of these as "failed to update metadata").

    Raises Failure; takes 9 s at most.
    """
    servers = settings.kafka_bootstrap_servers
    where = f"KAFKA_BOOTSTRAP_SERVERS={','.join(servers)}"
    silent = (
        f"{where}: the broker took the connection and did not answer; is it Kafka, and"
        f" KAFKA_SECURITY_PROTOCOL={settings.kafka_security_protocol}, and are the user and"
        " password right?"
    )
    last = _LastError()
    with within(9, silent, last.said), last:
        problems = []
        for server in servers:
            host, _, port = server.rpartition(":")
            problems.append(_reach(host.strip("[]"), int(port), min(3, 6 / len(servers))))
            if not problems[-1]:
                break
        else:
            raise Failure(
                f"{where}: no broker can be reached ({'; '.join(problems)});"
                " is it running, the address right, the port open (security group)?"
            )
        try:
            client = KafkaConsumer(**settings.kafka())
            partitions = client.partitions_for_topic(settings.kafka_topic) or set()
            brokers = client._client.cluster.brokers()
            client.close()
        except KafkaError as error:
            raise Failure(f"{silent} {type(error).__name__}: {error}{last.said()}") from None
        except (OSError, ValueError, AssertionError) as error:
            raise Failure(f"{where}: {type(error).__name__}: {error}{last.said()}") from None
        # kafka-python 3 keeps the bootstrap addresses apart, and calls the field node_id.
        if all(str(getattr(broker, "nodeId", "")).startswith("bootstrap") for broker in brokers):
            raise Failure(silent + last.said())  # no metadata came: it hung up each time
        if not partitions:
            raise Failure(
                f"KAFKA_TOPIC={settings.kafka_topic}: the topic does not exist on {servers[0]}, or"
                " this user may not see it; create it with kafka-topics.sh --create"
            )
        timeout = min(3, 6 / max(1, len(brokers)))
        problems = [_reach(broker.host, broker.port, timeout) for broker in brokers]
        if problems and all(problems):
            raise Failure(
                f"{where} answers, but says that clients shall connect to an address that cannot"
                f" be reached ({'; '.join(problems)}); mend advertised.listeners on the broker"
            )


class _LastError(logging.Handler):
    """Keeps the Kafka client's last error, the only place where it says why it fails."""

    text = ""

    def __enter__(self) -> None:
        self.client = logging.getLogger("kafka")
        self.client.addHandler(self)
        self.client.propagate = False  # it is said once, with ours

    def __exit__(self, *error: object) -> None:
        self.client.removeHandler(self)
        self.client.propagate = True

    def emit(self, record: logging.LogRecord) -> None:
        self.text = record.getMessage()

    def said(self) -> str:
        return f" (the client says: {self.text})" if self.text else ""
