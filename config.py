"""Settings, logging and the ways to start and stop that both scripts share.

The settings are declared once, in `Settings`; everything else here is what the producer and the
consumer would otherwise both have to say.
"""

# ruff: noqa: E402 (what is installed is checked before it is imported)

from __future__ import annotations

import sys
from contextlib import closing, suppress
from importlib import metadata
from importlib.util import find_spec

PIP_INSTALL = f"{sys.executable} -m pip install"


def _installation_problem() -> str:
    """Why the scripts cannot run with what is installed, and what to do; "" when they can."""
    if sys.version_info < (3, 11):  # noqa: UP036
        return f"Python 3.11 or newer is needed, and this is {sys.version.split()[0]}"
    install = f"{PIP_INSTALL} -r requirements.txt"
    missing = [name for name in ("dotenv", "kafka", "pandas", "s3fs") if not find_spec(name)]
    if missing:
        return f"packages are missing ({', '.join(missing)}): {install}"
    clients = []
    for name in ("kafka-python", "kafka-python-ng"):  # both are imported as kafka
        with suppress(metadata.PackageNotFoundError):
            clients.append(f"{name} {metadata.version(name)}")
    if len(clients) > 1 or any(client < "kafka-python 3" for client in clients):
        remove = f"{sys.executable} -m pip uninstall -y kafka-python kafka-python-ng"
        return f"{' and '.join(clients)} cannot be used, or not together: {remove}; {install}"
    return ""


if problem := _installation_problem():  # before the imports that it is about
    print(problem, file=sys.stderr)
    sys.exit(2)

import argparse
import atexit
import difflib
import io
import json
import logging
import math
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from dotenv.parser import Binding, parse_stream
from kafka import KafkaConsumer, KafkaProducer, TopicPartition, codec
from kafka.consumer import group
from kafka.errors import KafkaError, KafkaTimeoutError, UnsupportedCodecError
from kafka.record import memory_records

HERE = Path(__file__).resolve().parent
log = logging.getLogger(__name__)
output = logging.getLogger("records")  # the line about each record, to stdout


class SettingsError(Exception):
    """Wrong settings: `args` are the problems, one line each. Exit code 2."""


class S3Error(Exception):
    """An answer of S3 that is no success: `code` is S3's own where there is one."""

    def __init__(self, code: str, message: str) -> None:
        self.code = code
        super().__init__(message)


class Failure(Exception):
    """What a user can cause or meet while running: one line that says what, with which value,
    and what to try. Exit code 1."""


# --------------------------------------------------------------------------------------- errors

CREDENTIALS = {
    *("CredentialsTimeout", "CredentialRetrievalError", "NoCredentialsError"),  # there are none
    *("ExpiredToken", "TokenRefreshRequired"),
    *("InvalidAccessKeyId", "InvalidToken", "SignatureDoesNotMatch"),
}
NOT_S3 = "that is no answer of S3: is S3_ENDPOINT_URL right, is a proxy in between?"
HINTS = {
    "AccessDenied": "does the policy allow s3:PutObject, s3:GetObject and s3:ListBucket here?",
    "ConnectionClosedError": "is it http or https? See S3_ENDPOINT_URL",
    **dict.fromkeys(
        ("EndpointConnectionError", "ConnectTimeoutError", "ReadTimeoutError"),
        "see S3_ENDPOINT_URL; is the server up?",
    ),
    "SSLError": "name the file of a private authority in AWS_CA_BUNDLE; is it https at all?",
    "KafkaTimeoutError": "does KAFKA_DLQ_TOPIC exist, and may this user see it? Create it",
    "InconsistentGroupProtocolError": "another program is in KAFKA_GROUP_ID: take another group",
    "GroupAuthorizationFailedError": "allow this user Read on the group KAFKA_GROUP_ID",
    "TopicAuthorizationFailedError": "allow this user Read, or Write, on the topic: see the ACLs",
    "InvalidRecordError": "a topic with cleanup.policy=compact takes no record without a key",
    "GroupMaxSizeReachedError": "the broker's group.max.size allows no more members",
    "MessageSizeTooLargeError": "raise max.message.bytes of this topic",
    "InvalidRegionError": "see AWS_DEFAULT_REGION",
    "NoSuchBucket": "create it, or correct S3_BUCKET",
    "InvalidBucketName": "correct S3_BUCKET: lower-case letters, digits, '.' and '-'",
    "RequestTimeTooSkewed": "set this machine's clock",
    "ResponseParserError": NOT_S3,
    "InvalidObjectState": "it is in an archive (Glacier): restore it, or change S3_PREFIX",
    **dict.fromkeys(CREDENTIALS, "check or renew the AWS credentials"),
    **dict.fromkeys(("SSOTokenLoadError", "UnauthorizedSSOTokenError"), "aws sso login"),
}


def _s3_error(error: BaseException) -> dict[str, Any]:
    """S3's own error in a botocore ClientError (the producer does not import botocore)."""
    response = getattr(error, "response", None)
    return response.get("Error", {}) if isinstance(response, dict) else {}


def code_of(error: BaseException) -> str:
    """A short name of an error: S3's own code where there is one."""
    code = _s3_error(error).get("Code") or getattr(error, "code", None)
    return str(code or type(error).__name__)


def explain(error: BaseException) -> str:
    """An error in one line, with what to try where that is known."""
    code = code_of(error)
    message = _s3_error(error).get("Message", str(error))
    if isinstance(error, TimeoutError):
        message = "no answer in time"
    if code == "TopicAuthorizationFailedError":  # the client takes the name for a set of letters
        message = "the broker refuses it"
    message = message.removeprefix(f"{code}: ")  # as the Kafka client's errors begin
    # A status in the place of a code: the answer had no error of S3 in it.
    hint = NOT_S3 if code.isdecimal() else HINTS.get(code)
    text = f"{code}: {message} ({hint})" if hint else f"{code}: {message}"
    return " ".join(text.split())


# ------------------------------------------------------------------------------------- settings

Parser = Callable[[str], Any]  # raises ValueError: what the text must be
Check = Callable[[Mapping[str, Any]], str]  # of the values by name; returns a problem, or ""


class Unread(NamedTuple):
    """A line of `.env` that could not be taken."""

    name: str  # of the setting that it means
    problem: str


def _setting(default: str, parse: Parser = str, *, secret: bool = False) -> Any:
    return field(metadata={"default": default, "parse": parse}, repr=not secret)


def _choice(default: str, *others: str) -> Any:
    """A setting with one of these values, whose case does not matter."""
    values = {value.lower(): value for value in (default, *others)}

    def parse(text: str) -> str:
        if text.lower() not in values:
            allowed = ", ".join(value or "(empty)" for value in values.values())
            raise ValueError(f"must be one of {allowed}")
        return values[text.lower()]

    return _setting(default, parse)


def _matching(pattern: str, must: str, convert: Parser = str) -> Parser:
    def parse(text: str) -> Any:
        if not re.fullmatch(pattern, text):
            raise ValueError(must)
        return convert(text)

    return parse


def _number(low: int, high: float, kind: type = int) -> Parser:
    words = "a whole number" if kind is int else "a number"
    upper = "" if high == math.inf else f" and at most {high}"

    def parse(text: str) -> Any:
        with suppress(ValueError):
            number = kind(text)
            if low <= number <= high and number != math.inf:
                return number
        raise ValueError(f"must be {words}, at least {low}{upper}")

    return parse


def _optional(parse: Parser) -> Parser:
    return lambda text: parse(text) if text else None


_CODECS = {"snappy": "python-snappy", "lz4": "lz4", "zstd": "zstandard"}  # name: package
# Hosts are ASCII, as for Kafka's own client: org.apache.kafka.common.utils.Utils.
_SERVER = r"(([A-Za-z0-9_-]{1,63}\.)*[A-Za-z0-9_-]{1,63}\.?|\[[0-9A-Fa-f:.]+(%\w+)?\]):[0-9]{1,5}"


def _servers(text: str) -> tuple[str, ...]:
    servers = tuple(server.strip() for server in text.split(","))
    for server in servers:
        # urlsplit refuses an IPv6 address that is none, and a port above 65535.
        if not re.fullmatch(_SERVER, server) or not urlsplit(f"//{server}").port:
            raise ValueError("must be host:port, several with commas between (localhost:9092)")
    return servers


# As botocore wants it: no underscore, no dash at an end.
_S3_HOST = r"((?!-)[a-z0-9-]{1,63}(?<!-)\.)*(?!-)[a-z0-9-]{1,63}(?<!-)\.?"


def _url(text: str) -> str:
    url = urlsplit(text)
    host = url.hostname or ""
    named = re.fullmatch(_S3_HOST, host) or ":" in host  # an IPv6 address, which urlsplit checks
    more = url.query or url.fragment
    if url.scheme not in ("http", "https") or not named or url.port == 0 or more:
        raise ValueError("must be an address such as http://localhost:9000, or empty: AWS")
    if "@" in url.netloc:
        raise ValueError("must hold no user and password: AWS_ACCESS_KEY_ID is for that")
    return url._replace(netloc=url.netloc.lower()).geturl()  # as it is signed


def _prefix(text: str) -> str:
    if not re.fullmatch(r"(?!/)(?!.*//)(?!(.*/)?\.{1,2}/)[^\x00-\x1f\x7f\\]*", text):
        raise ValueError("must not begin with / or hold //, ./, ../, \\ or control characters")
    if text.startswith("_seals/") or "/_seals/" in text:
        raise ValueError("must hold no folder _seals: infra/audit.py keeps its seals in one")
    if len(text.encode()) > 900:  # S3 takes names of 1,024 bytes, and ours have up to 58 more
        raise ValueError(f"must have at most 900 bytes, and has {len(text.encode())}")
    return text


_version = _matching(
    r"(0\.11|[1-9][0-9]?\.[0-9]{1,3})(\.[0-9]{1,3})?",  # before 0.11 there were no headers
    "must be a version such as 2.8.1, 0.11 at least, or empty: negotiate",
    lambda text: tuple(map(int, text.split("."))),
)
# Kafka's rule for topic names: org.apache.kafka.common.internals.Topic.
_topic = _matching(
    r"(?!\.{1,2}$)[a-zA-Z0-9._-]{1,249}",
    "must be a topic name: letters, digits, '.', '_' and '-', at most 249",
)
_path = _matching("(?s).+", "must name a file", lambda text: HERE / os.path.expanduser(text))
_group = _matching(r"\S(.{0,253}\S)?", "must not be empty, and have at most 255 characters")
_bucket = _matching(
    r"[A-Za-z0-9][A-Za-z0-9._-]{1,253}[A-Za-z0-9]",
    "must be the bucket's name alone, without s3:// and without a path (see S3_PREFIX)",
)
_seed = _matching("-?[0-9]{1,99}", "must be a whole number, or empty: other rows each time", int)


@dataclass(frozen=True)
class Settings:
    """Every setting, named as its environment variable in lower case."""

    kafka_bootstrap_servers: tuple[str, ...] = _setting("localhost:9092", _servers)
    kafka_topic: str = _setting("test", _topic)
    kafka_group_id: str = _setting("python-consumer-group", _group)
    kafka_auto_offset_reset: str = _choice("latest", "earliest")
    kafka_api_version: tuple[int, ...] | None = _setting("2.8.1", _optional(_version))
    kafka_request_timeout_ms: int = _setting("30000", _number(1000, 500_000))
    kafka_security_protocol: str = _choice("PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL")
    kafka_sasl_mechanism: str = _choice("", "PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
    kafka_sasl_username: str = _setting("")
    kafka_sasl_password: str = _setting("", secret=True)
    kafka_ssl_cafile: str = _setting("")
    kafka_dlq_topic: str = _setting("error_topic", _topic)
    kafka_key_column: str = _setting("")
    kafka_compression_type: str = _choice("", "gzip", "snappy", "lz4", "zstd")
    csv_path: Path = _setting("indexProcessed.csv", _path)  # noqa: RUF009 (Path is no default)
    messages_per_second: float = _setting("1", _number(0, math.inf, float))
    random_seed: int | None = _setting("", _optional(_seed))
    s3_bucket: str = _setting("", _optional(_bucket))
    s3_prefix: str = _setting("", _prefix)
    s3_endpoint_url: str | None = _setting("", _optional(_url))
    s3_max_concurrency: int = _setting("64", _number(1, 10_000))
    log_level: str = _choice("INFO", "DEBUG", "WARNING", "ERROR")
    log_format: str = _choice("text", "json")
    metrics_port: int | None = _setting("", _optional(_number(1, 65535)))

    @classmethod
    def load(cls, flags: Mapping[str, str | None], *checks: Check) -> Settings:
        """As `from_env`, from what `environment` finds."""
        environ, unread = environment(flags)
        return cls.from_env(environ, *checks, unread=unread)

    @classmethod
    def from_env(
        cls, environ: Mapping[str, str], *checks: Check, unread: Sequence[Unread] = ()
    ) -> Settings:
        """Build from `environ`. Each of `checks`, which a script adds, is given the values that
        could be read; `unread` is what could not be read of a file.

        Raises SettingsError with every problem at once.
        """
        values: dict[str, Any] = {}
        problems = [line.problem for line in unread]
        for setting in fields(cls):
            name, default = setting.name.upper(), setting.metadata["default"]
            if any(line.name == name for line in unread):
                continue
            text = environ.get(name, default)
            try:
                text.encode()
                values[setting.name] = setting.metadata["parse"](text)
            except UnicodeEncodeError:  # no value: it may be a secret
                problems.append(f"{name}: must be UTF-8")
            except ValueError as error:
                instead = f"; leave it out for {default}" if default and not text else ""
                shown = re.sub("//.*@", "//...@", text)  # what is in front may be a password
                problems.append(f"{name}={shown!r}: {printable(str(error))}{instead}")
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
        yield f"KAFKA_COMPRESSION_TYPE={compression!r}: {PIP_INSTALL} {_CODECS[compression]}"


def _other_problems(values: Mapping[str, Any]) -> Iterator[str]:
    if values.get("metrics_port") and not find_spec("prometheus_client"):
        yield f"METRICS_PORT={values['metrics_port']!r}: {PIP_INSTALL} prometheus-client"
    bucket, url = values.get("s3_bucket"), urlsplit(values.get("s3_endpoint_url") or "")
    # As in https://BUCKET.s3.amazonaws.com: minio.local is no bucket's host, however it is called.
    host = re.match(rf"{re.escape(bucket or '')}\.(s3|localhost|.+\..+\.)", url.hostname or "")
    if bucket and (host or bucket in url.path.split("/")):
        yield f"S3_ENDPOINT_URL={url.geturl()!r}: holds the bucket {bucket}; name the server alone"


def environment(
    flags: Mapping[str, str | None], dotenv: Path = HERE / ".env"
) -> tuple[dict[str, str], list[Unread]]:
    """Flags over the environment over the file `dotenv`, and what is wrong in the file: a line
    that is not NAME=value, a value that would not be taken as it stands, a name that is nearly
    that of a setting. Where nothing is, the file's names (AWS credentials) are put into the
    process's environment too. Values are taken as they stand: no `${...}`.

    Raises SettingsError for a file that cannot be read.
    """
    found: dict[str, str] = {}
    unread = []
    if dotenv.exists():
        lines = [line for line in parse_stream(_open_text(dotenv)) if line.key or line.error]
        unread = [problem for line in lines for problem in _line_problems(dotenv, line)]
        found = {str(line.key): str(line.value) for line in lines}  # the last of a name counts
    elif dotenv.with_name(".env.txt").exists():
        log.warning("%s is not read: rename it to .env", dotenv.with_name(".env.txt"))
    if not unread:
        for name, text in found.items():
            os.environ.setdefault(name, text)
    given = {name: text for name, text in flags.items() if text is not None}
    return {**found, **os.environ, **given}, unread


def _open_text(path: Path) -> io.StringIO:
    """A file in UTF-8, or in UTF-16 with its byte order mark, as PowerShell writes it."""
    try:
        content = path.read_bytes()
        utf16 = content.startswith((b"\xff\xfe", b"\xfe\xff"))
        return io.StringIO(content.decode("utf-16" if utf16 else "utf-8-sig"))
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        problem = f"line {line} is not UTF-8; save it as UTF-8"
    except OSError as error:
        problem = "it is a folder, not a file" if path.is_dir() else f"{error.strerror}"
    raise SettingsError(f"{path} cannot be read: {problem}")


_AWS = "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_DEFAULT_REGION"


def _line_problems(file: Path, line: Binding) -> Iterator[Unread]:
    """What is wrong with a line of `.env`, without its value, which may be a secret."""
    name, value, text = line.key or "", line.value, line.original.string
    # For the parser the blank lines before a line are its own.
    number = line.original.line + text[: len(text) - len(text.lstrip())].count("\n")
    place = f"{file}, line {number}"
    where = f"{place}: {name}"
    settings = [each.name.upper() for each in fields(Settings)]
    ours = name.upper().startswith(("KAFKA_", "S3_"))
    close = difflib.get_close_matches(name.upper(), settings, 1, 0.78 if ours else 0.9)
    if line.error or value is None or "\0" in value or re.search("[=\0]", name):
        first = re.search(r"\w+", text.strip().removeprefix("export "))
        problem = "must be NAME=value, with no quotes or a pair of them"
        yield Unread(first[0] if first else "", f"{place}: {problem}")
    elif set(re.findall(r"[\x00-\x1f]", value)) - set(text.strip()):
        problem = "in double quotes a backslash makes a control character; use single quotes"
        yield Unread(name, f"{where}: {problem}")
    elif re.match("[\u2018-\u201f]", value):
        yield Unread(name, f"{where}: has typographic quotes; use straight ones, or none")
    elif close and name != close[0] and not name.startswith("AWS_"):
        yield Unread(close[0], f"{where} is no setting; did you mean {close[0]}?")
    elif ours and not close:
        log.warning("%s names no setting, and is not read", where)
    elif name not in _AWS and (meant := difflib.get_close_matches(name.upper(), _AWS, 1, 0.9)):
        log.warning("%s is no name that AWS knows; did you mean %s?", where, meant[0])


def positive(text: str) -> int:
    """A count for argparse: a whole number, at least 1."""
    try:
        return int(_number(1, 2**63)(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


# ------------------------------------------------------------------------------------ one record


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


# Numbers stay text: each keeps its digits, and Python converts 4,300 at most.
_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_int=str, parse_float=str)


def json_object(value: bytes) -> dict[str, Any]:
    """The JSON object that a record's value is. Raises ValueError: why it is none."""
    try:
        parsed = _DECODER.decode(value.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start}") from None
    except RecursionError:
        raise ValueError("not JSON: nested too deep") from None
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"JSON, but not an object: {type(parsed).__name__}")
    return parsed


# What the metadata of a commit says of offsets that retention removed before they were written.
LOST = re.compile(r"lost ([0-9]+-[0-9]+(?:,[0-9]+-[0-9]+)*)")

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
        about = ("topic", "partition", "offset", "key", "lag")
        line |= {name: vars(record)[name] for name in about if name in vars(record)}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def _is_journal(stream: Any) -> bool:
    """Whether systemd's journal reads the stream; sd-daemon(3) has its rules."""
    with suppress(OSError, ValueError):
        status = os.fstat(stream.fileno())
        return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
    return False


class _Stream(logging.StreamHandler):
    """A stream that outlives its reader. On a terminal the status is rewritten in place."""

    terminator = ""  # `format` ends the line, or leaves it open

    def __init__(self, stream: Any, formatter: logging.Formatter) -> None:
        stream.reconfigure(errors="backslashreplace")  # a terminal that is not UTF-8
        super().__init__(stream)
        self.setFormatter(formatter)
        dumb = os.environ.get("TERM") == "dumb"
        self.in_place = isinstance(formatter, _Text) and stream.isatty() and not dumb
        self.is_journal = _is_journal(stream)
        self.writing_since = math.inf
        self.failed = False  # a line at least is not written

    def emit(self, record: logging.LogRecord) -> None:
        self.writing_since = time.monotonic()
        super().emit(record)
        self.writing_since = math.inf

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        if self.in_place and hasattr(record, "status"):
            # The time would push the end of the line off a narrow terminal.
            width = os.get_terminal_size(self.stream.fileno()).columns
            return f"\r\x1b[K{record.message[: width - 1]}"
        if self.in_place:
            return f"\r\x1b[K{line}\n"
        if self.is_journal:  # which takes the priority, syslog's, from here
            priority = {logging.ERROR: 3, logging.WARNING: 4}.get(record.levelno, 6)
            return f"<{priority}>{line}\n"
        return f"{line}\n"

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, BrokenPipeError):  # `| head`: the reader has left, so stop
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            handler = signal.getsignal(signal.SIGTERM)
            if callable(handler) and handler is not _end_at_once:  # not stopping yet
                signal.raise_signal(signal.SIGTERM)
                log.warning("what read this script's output has left, so it ends")
        elif not isinstance(error, OSError):
            super().handleError(record)
        elif not self.failed:  # a full disk is no reason to stop moving records
            self.failed = True
            if self.stream is sys.stdout:
                log.warning("standard output cannot be written: %s", error.strerror)


_LAST_WORDS = {  # what to try, by what is in them
    "NotEnoughReplicas": "fewer replicas are in sync than the topic's min.insync.replicas",
    "UnknownTopicOrPartition": "the topic is gone, or was made anew with fewer partitions",
    "SaslAuthenticationFailed": "are the user and password right?",
}


class _LastWords(logging.Handler):
    """Keeps what the Kafka client said last: often the only place where it says why it fails."""

    text = ""
    said_at = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        text = " ".join(record.getMessage().split())
        if "refreshing metadata" not in text:  # says nothing of the reason, which was said before
            self.text, self.said_at = text, time.monotonic()

    def __str__(self) -> str:
        if not self.text or time.monotonic() - self.said_at > 60:  # it repeats what still holds
            return ""
        hints = [hint for name, hint in _LAST_WORDS.items() if name in self.text]
        return f" (the client says: {'; '.join([self.text, *hints])})"


last_words = _LastWords()


@atexit.register
def _drop_unwritten() -> None:
    """What a full disk or a reader that has left did not take changes no exit code."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def setup_logging(settings: Settings) -> None:
    """Records to stdout, the rest to stderr, as text or as JSON."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 (None: started with >&-)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    as_json = settings.log_format == "json"
    stamped = _Text("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S")
    errors = _Stream(sys.stderr, _Json() if as_json else stamped)
    logging.basicConfig(level=settings.log_level, handlers=[errors])
    lines = _Stream(sys.stdout, _Json() if as_json else _Text("%(message)s"))
    output.addHandler(lines)
    background(_watch_output, lines)
    output.propagate = False
    output.setLevel(logging.INFO)
    # The libraries say secrets at DEBUG (signatures, tokens), and much at INFO.
    for name in ("botocore", "aiobotocore", "s3fs", "fsspec"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # complains of what an exit cuts off
    # The client says the same in many words at every attempt: its last words go with ours.
    client = logging.getLogger("kafka")
    client.setLevel(logging.WARNING)
    client.propagate = False
    client.addHandler(last_words)
    # kafka-python-ng's SCRAM speaks through the root logger, with a traceback at each refusal.
    errors.addFilter(lambda record: record.name != "root")


def status(logger: logging.Logger, text: str, *args: object, **fields: object) -> None:
    """A line on the state: in place on a terminal, an ordinary line elsewhere. `fields` are those
    of the JSON line."""
    logger.info(text, *args, extra={"status": True, **fields})


class Problem(NamedTuple):
    """Something that stands still: why, the fields of its log line, an error worth a traceback."""

    text: str
    extra: Mapping[str, Any] = {}
    error: BaseException | None = None
    since: float | None = None  # when it began, by the clock of the notices; None: now


class Notices:
    """Says what stands still: when it begins, every 30 s, and when it is over. Where it comes and
    goes, only what lasts for a second is said."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.began: dict[str, float] = {}
        self.said: dict[str, float] = {}
        self.ended: dict[str, float] = {}

    def report(self, problems: Mapping[str, Problem]) -> None:
        """`problems`: all that stand still now. A key says what would be so if it did not, and is
        said with "again" when it is over: "the broker answers"."""
        now = self.clock()
        for what, problem in problems.items():
            began = self.began.setdefault(what, now if problem.since is None else problem.since)
            often = began - self.ended.get(what, -math.inf) < 5
            due = self.said[what] + 30 if what in self.said else began + (1 if often else 0)
            if now >= due:
                self.said[what] = now
                told = problem.since is not None or now - began < 2
                lasting = "" if told else f"; for {now - began:.0f} s now"
                text = f"{problem.text}{lasting}"
                log.warning("%s", text, extra=problem.extra, exc_info=problem.error)
        for what in self.began.keys() - problems.keys():
            self.ended[what], began = now, self.began.pop(what)
            if self.said.pop(what, None):
                log.warning("%s again after %.1f s", what, now - began)


def output_problem(lines: _Stream, now: float) -> dict[str, Problem]:
    """That nobody reads the lines about records: each is waited for, and what is behind it too."""
    since = lines.writing_since
    if now - since < 5:
        return {}
    text = "a line about a record waits: what reads this script's output does not go on"
    return {"the output is read": Problem(text, since=since)}


def _watch_output(lines: _Stream) -> None:
    """In a thread of its own, since the one that writes is held up."""
    notices = Notices()
    while True:
        time.sleep(0.5)
        notices.report(output_problem(lines, time.monotonic()))


# ---------------------------------------------------------------------------------------- Kafka

_FOREVER = 2**31 - 1  # ms, the most that the protocol's fields take


def make_producer(settings: Settings, **options: Any) -> KafkaProducer:
    """A producer that keeps the order and gives up no record: all replicas acknowledge, one
    request is in flight, and a broker that is down is waited for.

    A request is lost after KAFKA_REQUEST_TIMEOUT_MS and sent again; but a record that waits for
    its turn must not expire with it, as it does where one number says both.
    """
    producer = KafkaProducer(
        **settings.kafka(),
        **_NO_EXPIRY,
        request_timeout_ms=settings.kafka_request_timeout_ms,
        acks="all",
        retries=_FOREVER,
        max_in_flight_requests_per_connection=1,
        max_block_ms=500,
        max_request_size=2**30,  # the broker says what is too large
        compression_type=settings.kafka_compression_type or None,
        **options,
    )
    if KafkaClient:  # the client has its copy of the number, the line of records this one
        producer._sender.config["request_timeout_ms"] = _FOREVER
    return producer


def make_consumer(settings: Settings, **options: Any) -> KafkaConsumer:
    """A consumer that commits nothing and chooses no position by itself: both can skip records.

    Its polls may raise Unreadable.
    """
    return KafkaConsumer(
        **settings.kafka(),
        **_ONLY_COMMITTED,
        group_id=settings.kafka_group_id,
        enable_auto_commit=False,
        **{"auto_offset_reset": "none", **options},
    )


def position(consumer: KafkaConsumer, tp: TopicPartition) -> int:
    """Where a client that was told to seek fetches next. kafka-python 3's own `position` may ask a
    broker for it first, for 30 s."""
    fetches_at = consumer._subscription.assignment[tp].position
    return int(getattr(fetches_at, "offset", fetches_at))


class Unreadable(Failure):
    """A record that the client cannot decode."""


class TransactionMarker(bytes):
    """The key of a record that no application sent: the broker's note in the log that a
    transaction was committed or aborted there. It takes an offset of its own."""


def is_marker(record: Any) -> bool:
    """Whether a record that a consumer delivered is a transaction marker.

    The broker says so in the header of the batch alone; a record of an application can have any
    key and value, those of a marker too.
    """
    return isinstance(record.key, TransactionMarker)


# What differs between kafka-python-ng and its successor, kafka-python 3, stands from here to the
# next line of dashes. The successor leaves out markers and aborted records, rotates partitions.
try:
    from kafka import KafkaClient
    from kafka.consumer.fetcher import NoOffsetForPartitionError
    from kafka.errors import BrokerResponseError, kafka_errors

    _ONLY_COMMITTED: dict[str, Any] = {}
    _NO_EXPIRY: dict[str, Any] = {}
except ImportError:
    from kafka.errors import NoOffsetForPartitionError  # noqa: F401

    KafkaClient = None
    _ONLY_COMMITTED = {"isolation_level": "read_committed"}
    # With idempotence, one refused record ends the client.
    _NO_EXPIRY = {"delivery_timeout_ms": _FOREVER, "enable_idempotence": False}


if KafkaClient:
    # Codes that kafka-python-ng does not know are to it an unknown error, which ends a producer.
    # Number and whether it passes: the protocol's table of errors.
    for _code, _name, _passes in (
        (56, "KafkaStorageError", True),  # a broker's disk failed, and others lead soon
        (74, "FencedLeaderEpochError", True),
        (75, "UnknownLeaderEpochError", True),
        (78, "OffsetNotAvailableError", True),
        (81, "GroupMaxSizeReachedError", False),
        (87, "InvalidRecordError", False),
        (88, "UnstableOffsetCommitError", True),
    ):
        _about = dict(errno=_code, message=_name, retriable=_passes, invalid_metadata=_passes)
        kafka_errors[_code] = type(_name, (BrokerResponseError,), _about)


def track_topic(consumer: KafkaConsumer, topic: str) -> None:
    """Have the metadata of one topic kept, for a consumer that subscribes to none."""
    if KafkaClient:  # which never learns that a topic is gone if it is the only one
        consumer._client.set_topics([topic, "__consumer_offsets"])
    else:
        consumer._client.cluster.set_topics([topic])


def avoid_nodes(consumer: KafkaConsumer, mute: Callable[[], Any]) -> None:
    """Ask brokers that are not among `mute()` for metadata and for the group's coordinator.

    kafka-python-ng may ask a broker that is mute again and again, for a whole
    KAFKA_REQUEST_TIMEOUT_MS each time, and fetches nothing from the others meanwhile.
    """
    if not KafkaClient:
        return
    client = consumer._client
    least_loaded_node = client.least_loaded_node

    def answering_node() -> Any:
        avoided = mute()
        if avoided:
            for broker in client.cluster.brokers():
                if broker.nodeId not in avoided and client.is_ready(broker.nodeId, False):
                    return broker.nodeId
        return least_loaded_node()

    client.least_loaded_node = answering_node


def oldest_request(consumer: KafkaConsumer, tp: TopicPartition) -> Any:
    """What tells apart the requests to a partition's leader: that of the first which is not
    answered yet; None where there is none."""
    leader = consumer._client.cluster.leader_for_partition(tp)
    client = consumer._client if KafkaClient else consumer._client._manager
    connection = client._conns.get(leader)
    requests = list(connection.in_flight_requests) if connection else []  # other threads change it
    return requests[0] if requests else None


def commit_once(consumer: KafkaConsumer, positions: dict[TopicPartition, Any]) -> None:
    """Commit, and wait for the acknowledgement for 3 s at most.

    kafka-python-ng's own `commit` repeats what is refused for as long as it is: for ever when the
    topic is gone, or until it is made anew, where the position means other records.
    Raises KafkaError; what was not acknowledged may have been committed all the same.
    """
    if not KafkaClient:
        consumer.commit(positions, timeout_ms=3000)
        return
    if consumer._coordinator.coordinator_unknown():
        raise KafkaTimeoutError  # the next poll looks for it
    answer = consumer.commit_async(positions)
    deadline = time.monotonic() + 3
    while not answer.is_done:
        if time.monotonic() > deadline:
            raise KafkaTimeoutError
        consumer._client.poll(timeout_ms=20)
    if answer.failed():
        raise answer.exception


class _AnyHeader(bytearray):
    """A batch's bytes in which a header's name may be no UTF-8."""

    def __getitem__(self, at: Any) -> Any:
        part = super().__getitem__(at)
        return _AnyHeader(part) if isinstance(at, slice) else part

    def decode(self, *_: Any) -> str:
        return bytes(self).decode(errors="backslashreplace")


class _Batch(memory_records.DefaultRecordBatch):
    """A batch in which markers can be told from records, and any header can be read.

    Markers cannot be left out here: the client's position only moves past what it delivers.
    """

    __slots__ = ()

    def _read_msg(self, *args: Any) -> Any:
        try:
            record = super()._read_msg(*args)
        except UnicodeDecodeError:
            self._buffer = _AnyHeader(self._buffer)  # type: ignore[misc, has-type]
            record = super()._read_msg(*args)
        if self.is_control_batch:
            record._key = TransactionMarker(record.key or b"")
        return record


class _Fetcher(group.Fetcher):
    """Names the record that it cannot read, after those in front of it, and begins each request
    with another partition: a broker sends a record larger than max_partition_fetch_bytes for the
    first partition of a request only."""

    requests = 0  # for the round robin

    def _unpack_message_set(self, tp: TopicPartition, records: Any) -> Iterator[Any]:
        state = self._subscriptions.assignment[tp]
        last = None
        try:
            for record in super()._unpack_message_set(tp, records):
                if record.offset >= state.position:
                    last = record.offset
                yield record
        except Exception as error:
            if last is None:
                raise _unreadable(tp, state.position, error) from error
            state.last_offset_from_message_batch = last  # what cannot be read comes first next time

    def _fetchable_partitions(self) -> list[TopicPartition]:
        self.requests += 1
        partitions = sorted(super()._fetchable_partitions())
        first = self.requests % max(1, len(partitions))
        return partitions[first:] + partitions[:first]


def _unreadable(tp: TopicPartition, offset: int, error: Exception) -> Unreadable:
    hint = ""
    if isinstance(error, UnsupportedCodecError):
        packages = [_CODECS[name] for name in _CODECS if name in str(error).lower()]
        hint = f" ({PIP_INSTALL} {' '.join(packages)})"
    return Unreadable(
        f"the record at {tp.topic}/{tp.partition}/{offset} cannot be read: {explain(error)}{hint};"
        f" nothing from it on is committed. To go on without it: stop the group and"
        f" kafka-consumer-groups.sh --group KAFKA_GROUP_ID --reset-offsets"
        f" --topic {tp.topic}:{tp.partition} --to-offset {offset + 1} --execute"
    )


memory_records.DefaultRecordBatch = _Batch
if KafkaClient:
    group.Fetcher = _Fetcher

# ------------------------------------------------------------------------- checks at the start


def background(call: Callable[..., Any], *args: Any) -> Future[Any]:
    """Run `call(*args)` in a thread of its own that ends with the process; its outcome."""
    outcome: Future[Any] = Future()

    def run() -> None:
        try:
            outcome.set_result(call(*args))
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return outcome


def _unreachable(addresses: Iterable[str]) -> dict[str, str]:
    """Those (host:port) at which nothing listens, and why; in 4 s, since all are tried at once."""

    def reach(address: str) -> None:
        host, _, port = address.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), 3).close()

    tried = {address: background(reach, address) for address in addresses}
    wait(tried.values(), 4)  # a name may have several addresses, and take its time to resolve
    errors = {
        address: attempt.exception() if attempt.done() else TimeoutError()
        for address, attempt in tried.items()
    }
    return {
        where: f"{where}: {getattr(error, 'strerror', None) or explain(error)}"
        for where, error in errors.items()
        if error
    }


def _ask_metadata(settings: Settings) -> tuple[set[str], dict[str, list[str]]]:
    """The topics, and the brokers (host:port) with the partitions of KAFKA_TOPIC that they lead;
    no broker when none has said who it is."""
    with closing(KafkaConsumer(**settings.kafka(), enable_auto_commit=False)) as consumer:
        topics = set(consumer.topics())
        cluster = consumer._client.cluster
        brokers = {}
        for node, broker in cluster._brokers.items():  # without the bootstrap addresses
            led = sorted(cluster.partitions_for_broker(node) or ())
            names = [f"{t}/{p}" for t, p in led if t == settings.kafka_topic]
            brokers[f"{broker.host}:{broker.port}"] = names
        return topics, brokers


def _wait_for_topic(settings: Settings, where: str) -> tuple[set[str], dict[str, list[str]]]:
    """The metadata, with the topic in it. A broker that has just started does not answer at
    first, and then for about 2 s without its topics: it is asked again before that is said."""
    silent = (
        f"{where}: the broker accepted the connection and did not answer; is it Kafka, and are"
        f" KAFKA_SECURITY_PROTOCOL={settings.kafka_security_protocol}, the user and password right?"
    )
    missing = (
        f"KAFKA_TOPIC={settings.kafka_topic}: the topic does not exist at {where}, or this user"
        " may not see it; create it with kafka-topics.sh --create (infra/kafka.sh topics --create)"
    )
    deadline = time.monotonic() + 9
    while True:
        try:
            asked = background(_ask_metadata, settings)
            topics, brokers = asked.result(deadline - time.monotonic())
            if settings.kafka_topic in topics:
                return topics, brokers
            problem = missing if brokers else f"{silent}{last_words}"
        except (KafkaError, TimeoutError) as error:
            problem = f"{silent} {error!r}{last_words}"
        except (OSError, ValueError, AssertionError) as error:
            problem = f"{where}: {error!r}{last_words}"
        if time.monotonic() > deadline - 4:  # too late to ask once more
            raise Failure(problem)
        time.sleep(0.25)


def check_kafka(settings: Settings) -> set[str]:
    """Check, step by step, that a broker answers, knows the topic and can be reached where it
    says it is (the client itself reports all of these as "failed to update metadata").

    Returns the names of all topics. Raises Failure; takes 15 s at most. A broker that cannot be
    reached while others can is a warning.
    """
    servers = set(settings.kafka_bootstrap_servers)
    where = f"KAFKA_BOOTSTRAP_SERVERS={','.join(settings.kafka_bootstrap_servers)}"
    problems = _unreachable(servers)
    if len(problems) == len(servers):
        raise Failure(
            f"{where}: no broker can be reached ({'; '.join(problems.values())});"
            " is it running, the address right, the port open (security group)?"
        )
    topics, brokers = _wait_for_topic(settings, where)
    problems = _unreachable(brokers)
    if len(problems) == len(brokers):
        raise Failure(
            f"{where} answers, but says that clients shall connect to an address that cannot"
            f" be reached ({'; '.join(problems.values())}); fix advertised.listeners on the broker"
        )
    for address, problem in problems.items():
        led = ", ".join(brokers[address]) or "none"
        text = "a broker cannot be reached (%s); partitions that it leads, which wait: %s"
        log.warning(text, problem, led)
    last_words.text = ""  # what was said while it started is over
    return topics


# ---------------------------------------------------------------------------- starting, stopping


def _end_at_once(signum: int, frame: object) -> None:
    """As if nobody had listened. (Where the default is set earlier, a signal that has come by then
    and was not seen is lost with a traceback.)"""
    signal.signal(signum, signal.SIG_DFL)
    signal.raise_signal(signum)


class Stop:
    """`requested` turns true at the first Ctrl-C or SIGTERM; the second ends the process."""

    requested = False
    code = 0  # of a process that has to be ended
    dead_thread = ""

    def __init__(self) -> None:
        """Listen from now on. When the process is still there 4 s after the request (a broker
        that does not answer holds every call to it), it is ended with `code`."""
        self.under_way: Callable[[], str] = lambda: ""  # "12 uploads under way"
        self.farewell: Callable[[], str] = lambda: ""  # what such an end leaves open
        threading.excepthook = self._thread_died
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self._handle)
        threading.Thread(target=self._watch, daemon=True).start()

    def check(self) -> None:
        """Raises Failure when a thread has died: without its heartbeat, say, a client would
        stand still for ever."""
        if self.dead_thread:
            raise Failure(f"{self.dead_thread}; nothing is lost, start it again")

    def _handle(self, signum: int, frame: object) -> None:
        if self.requested:  # both came at once, and `signal.signal` below handles the other first
            _end_at_once(signum, frame)
        self.requested = True
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _end_at_once)

    def _thread_died(self, args: threading.ExceptHookArgs) -> None:
        what = f"the thread {getattr(args.thread, 'name', '?')} ended unexpectedly"
        self.dead_thread = f"{what}: {args.exc_type.__name__}: {args.exc_value}"

    def _watch(self) -> None:
        while not self.requested:
            time.sleep(0.1)
        if pending := self.under_way():
            background(log.warning, "stopping: %s; again to stop now", pending)
        time.sleep(4)
        level = logging.ERROR if self.code else logging.WARNING
        text = f"stopped without an answer from the other side{self.farewell()}"
        with suppress(TimeoutError):  # as above: stderr may be blocked, and a call with it
            background(log.log, level, "%s", text).result(0.3)
        os._exit(self.code)
