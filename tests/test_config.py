"""Settings, `.env`, logging and stopping: what both scripts share."""

import dataclasses
import io
import json
import logging
import os
import re
import signal
import string
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kafka.errors import MessageSizeTooLargeError, TopicAuthorizationFailedError

import config
import kafka_consumer
import kafka_producer
from config import Settings, SettingsError, environment, output, setup_logging, status
from kafka_consumer import bucket_is_set
from kafka_producer import csv_exists

HERE = Path(config.__file__).parent
ROWS = HERE / "tests/data/indexProcessed.csv"


def made(*checks, **environ):
    return Settings.from_env(environ, *checks)


def problems(*checks, **environ):
    """The problem lines, by setting."""
    with pytest.raises(SettingsError) as caught:
        made(*checks, **environ)
    assert all("\n" not in line and line.isprintable() for line in caught.value.args)
    return {re.match("[A-Z0-9_]+", line)[0]: line for line in caught.value.args}


# -------------------------------------------------------------------------------------- settings


def test_every_setting_has_the_default_of_the_contract():
    assert dataclasses.asdict(made()) == {
        "kafka_bootstrap_servers": ("localhost:9092",),
        "kafka_topic": "test",
        "kafka_group_id": "python-consumer-group",
        "kafka_auto_offset_reset": "latest",
        "kafka_api_version": (2, 8, 1),
        "kafka_request_timeout_ms": 30_000,
        "kafka_security_protocol": "PLAINTEXT",
        "kafka_sasl_mechanism": "",
        "kafka_sasl_username": "",
        "kafka_sasl_password": "",
        "kafka_ssl_cafile": "",
        "kafka_dlq_topic": "error_topic",
        "kafka_key_column": "",
        "kafka_compression_type": "",
        "csv_path": HERE / "indexProcessed.csv",
        "messages_per_second": 1.0,
        "random_seed": None,
        "s3_bucket": None,
        "s3_prefix": "",
        "s3_endpoint_url": None,
        "s3_max_concurrency": 64,
        "log_level": "INFO",
        "log_format": "text",
        "metrics_port": None,
    }


def test_the_example_file_names_every_setting_once_and_is_valid():
    lines = (HERE / ".env.example").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("=", 1) for line in lines if line and not line.startswith("#")]
    names = [name for name, _ in pairs]
    assert len(names) == len(set(names))
    assert {name for name in names if not name.startswith("AWS_")} == {
        field.name.upper() for field in dataclasses.fields(Settings)
    }
    for needed in (csv_exists, bucket_is_set):
        made(needed, **dict(pairs))


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("KAFKA_BOOTSTRAP_SERVERS", "a:1, b.c-d_e:65535", ("a:1", "b.c-d_e:65535")),
        ("KAFKA_BOOTSTRAP_SERVERS", "[::1]:9092", ("[::1]:9092",)),
        ("KAFKA_BOOTSTRAP_SERVERS", "[fe80::1%eth0]:9092", ("[fe80::1%eth0]:9092",)),
        ("KAFKA_BOOTSTRAP_SERVERS", "broker.local.:9092", ("broker.local.:9092",)),
        ("KAFKA_TOPIC", "a.b_C-9", "a.b_C-9"),
        ("KAFKA_GROUP_ID", "a group", "a group"),
        ("KAFKA_AUTO_OFFSET_RESET", "earliest", "earliest"),
        ("KAFKA_AUTO_OFFSET_RESET", "Latest", "latest"),
        ("KAFKA_SECURITY_PROTOCOL", "ssl", "SSL"),
        ("KAFKA_SASL_MECHANISM", "scram-sha-256", "SCRAM-SHA-256"),
        ("KAFKA_COMPRESSION_TYPE", "GZip", "gzip"),
        ("KAFKA_API_VERSION", "", None),
        ("KAFKA_API_VERSION", "2.6", (2, 6)),
        ("KAFKA_REQUEST_TIMEOUT_MS", "1000", 1000),
        ("KAFKA_KEY_COLUMN", "Adj Close", "Adj Close"),
        ("KAFKA_COMPRESSION_TYPE", "gzip", "gzip"),
        ("CSV_PATH", "a/b.csv", HERE / "a/b.csv"),
        ("CSV_PATH", str(ROWS), ROWS),
        ("CSV_PATH", "~/b.csv", Path.home() / "b.csv"),
        ("MESSAGES_PER_SECOND", "0", 0.0),
        ("MESSAGES_PER_SECOND", "0.25", 0.25),
        ("MESSAGES_PER_SECOND", "1e5", 100_000.0),
        ("RANDOM_SEED", "-7", -7),
        ("RANDOM_SEED", "0", 0),
        ("S3_BUCKET", "my.bucket-1", "my.bucket-1"),
        ("S3_PREFIX", "raw/2026/", "raw/2026/"),
        ("S3_PREFIX", "ünïcode ~'()/", "ünïcode ~'()/"),
        ("S3_ENDPOINT_URL", "https://minio.local:9000/", "https://minio.local:9000/"),
        ("S3_ENDPOINT_URL", "http://[::1]:9000", "http://[::1]:9000"),
        ("S3_ENDPOINT_URL", "http://s3-1.LOCAL.:80/a", "http://s3-1.local.:80/a"),
        ("S3_MAX_CONCURRENCY", "1", 1),
        ("LOG_LEVEL", "DEBUG", "DEBUG"),
        ("LOG_LEVEL", "info", "INFO"),
        ("LOG_FORMAT", "json", "json"),
        ("LOG_FORMAT", "JSON", "json"),
        ("METRICS_PORT", "9100", 9100),
    ],
)
def test_a_setting_is_read_as(name, text, value):
    assert getattr(made(**{name: text}), name.lower()) == value


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        (
            "KAFKA_BOOTSTRAP_SERVERS",
            "|host|host:|:9092|host:99999|host:0|host:x|a:1,|a:1 b:2|[::1:9092|[zz]:9092|::1:9092"
            f"|a..b:9092|{'x' * 64}:9092|ü:9092|u@h:1|kafka://host:9092|host:9092/".split("|"),
        ),
        ("KAFKA_TOPIC", ["", ".", "..", "a b", "a/b", "ü", "x" * 250, "a\n"]),
        ("KAFKA_GROUP_ID", ["", " ", "x" * 256]),
        ("KAFKA_AUTO_OFFSET_RESET", ["", "none", "Late"]),
        ("KAFKA_API_VERSION", ["2", "two", "2.8.1.0", "2.8.x", "2." + "9" * 5000, "0.10.2"]),
        ("KAFKA_REQUEST_TIMEOUT_MS", ["", "0", "1e4", "-1", "540000", "9" * 5000]),
        ("KAFKA_SECURITY_PROTOCOL", ["", "TLS"]),
        ("KAFKA_SASL_MECHANISM", ["GSSAPI"]),
        ("KAFKA_SSL_CAFILE", ["/no/such/file", "/", "x" * 5000]),
        ("KAFKA_DLQ_TOPIC", ["", "a b", "test"]),
        ("KAFKA_COMPRESSION_TYPE", ["zip"]),
        ("MESSAGES_PER_SECOND", ["", "fast", "-1", "-0.1", "nan", "inf", "1e999", "1,5"]),
        ("RANDOM_SEED", ["x", "1.5"]),
        (
            "S3_BUCKET",
            ["s3://bucket", "bucket/", "a/b", "ab", "-ab", "ab-", "a b", "ü" * 3, "x" * 256],
        ),
        ("S3_PREFIX", ["/a", "a//b", "../", "./", "a/../b", "a\\b", "a\nb", "a\x1b", "x" * 901]),
        ("S3_ENDPOINT_URL", ["localhost:9000", "ftp://h", "http://", "http://[", "http://h:99999"]),
        (
            "S3_ENDPOINT_URL",
            ["http://a b", "http://a..b", "http://-:1", "http://h?a=1", "http://h#a"],
        ),
        ("S3_ENDPOINT_URL", ["http://exämple.com", "http://under_score:9000"]),
        ("S3_MAX_CONCURRENCY", ["0", "-1", "x", "10001"]),
        ("LOG_LEVEL", ["", "TRACE"]),
        ("LOG_FORMAT", ["", "xml"]),
        ("METRICS_PORT", ["0", "65536", "x", "9100.0"]),
    ],
)
def test_a_wrong_setting_is_named_with_its_value_and_what_would_be_right(name, texts):
    for text in texts:
        found = problems(**{name: text})
        assert list(found) == [name], text
        shown, remedy = found[name].removeprefix(f"{name}=").split(": ", 1)
        assert shown == repr(text)
        assert remedy


def test_text_that_is_not_utf8_is_named_without_its_value():
    for field in dataclasses.fields(Settings):
        name = field.name.upper()
        assert "secret" not in problems(**{name: "secret\udcff"})[name]


def test_every_problem_is_reported_at_once():
    found = problems(
        bucket_is_set,
        KAFKA_BOOTSTRAP_SERVERS="host",
        KAFKA_AUTO_OFFSET_RESET="never",
        MESSAGES_PER_SECOND="fast",
        S3_PREFIX="/",
        LOG_FORMAT="xml",
        KAFKA_SECURITY_PROTOCOL="SASL_SSL",
        KAFKA_SSL_CAFILE="/no/such/file",
    )
    assert set(found) == {
        "KAFKA_BOOTSTRAP_SERVERS",
        "KAFKA_AUTO_OFFSET_RESET",
        "MESSAGES_PER_SECOND",
        "S3_PREFIX",
        "LOG_FORMAT",
        "S3_BUCKET",
        "KAFKA_SSL_CAFILE",
        "KAFKA_SASL_MECHANISM",
        "KAFKA_SASL_USERNAME",
        "KAFKA_SASL_PASSWORD",
    }


@settings(deadline=None)
@given(
    st.dictionaries(
        st.sampled_from([field.name.upper() for field in dataclasses.fields(Settings)]),
        st.text() | st.text(string.printable) | st.integers().map(str) | st.floats().map(str),
    )
)
def test_any_settings_are_either_taken_or_refused_in_lines(environ):
    try:
        made(bucket_is_set, **environ)
    except SettingsError as error:
        assert error.args
        assert all(line.isprintable() for line in error.args)


def test_each_script_needs_what_it_works_on():
    assert "not set" in problems(bucket_is_set)["S3_BUCKET"]
    assert made(bucket_is_set, S3_BUCKET="abc").s3_bucket == "abc"
    assert "no such file" in problems(csv_exists, CSV_PATH="nowhere.csv")["CSV_PATH"]
    assert "no such file" in problems(csv_exists, CSV_PATH="~no-such-user/x")["CSV_PATH"]
    assert "no such file" in problems(csv_exists, CSV_PATH="x" * 5000)["CSV_PATH"]
    assert made(csv_exists, CSV_PATH=str(ROWS)).csv_path == ROWS


def test_sasl_needs_mechanism_user_and_password():
    sasl = {"KAFKA_SECURITY_PROTOCOL": "SASL_PLAINTEXT"}
    assert set(problems(**sasl)) == {
        "KAFKA_SASL_MECHANISM",
        "KAFKA_SASL_USERNAME",
        "KAFKA_SASL_PASSWORD",
    }
    sasl |= {"KAFKA_SASL_MECHANISM": "SCRAM-SHA-512", "KAFKA_SASL_USERNAME": "me"}
    assert set(problems(**sasl)) == {"KAFKA_SASL_PASSWORD"}
    options = made(**sasl, KAFKA_SASL_PASSWORD="pa ss").kafka()
    assert options["security_protocol"] == "SASL_PLAINTEXT"
    assert options["sasl_mechanism"] == "SCRAM-SHA-512"
    assert (options["sasl_plain_username"], options["sasl_plain_password"]) == ("me", "pa ss")


def test_the_password_is_in_no_repr_and_no_problem():
    environ = {"KAFKA_SASL_PASSWORD": "hunter2", "KAFKA_SASL_USERNAME": "me"}
    assert "hunter2" not in repr(made(**environ))
    assert "hunter2" not in str(made(**environ))
    for wrong in ({"KAFKA_TOPIC": ""}, {"KAFKA_SECURITY_PROTOCOL": "SASL_SSL"}):
        assert "hunter2" not in "".join(problems(**environ, **wrong).values())


def test_settings_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        made().kafka_topic = "other"


# ------------------------------------------------------------------------------------------ .env


@pytest.fixture
def dotenv(tmp_path, monkeypatch):
    """Writes a `.env` file and reads it; the process's environment is its own."""
    monkeypatch.setattr(os, "environ", {"HOME": "/home/me"})

    def read(content, flags=None):
        file = tmp_path / ".env"
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        environ, unread = environment(flags or {}, file)
        if unread:
            raise SettingsError(*(line.problem for line in unread))
        return environ

    return read


def test_without_a_file_the_environment_is_enough(dotenv, tmp_path):
    assert environment({}, tmp_path / "missing") == (dict(os.environ), [])


def test_the_file_fills_what_the_environment_leaves_unset(dotenv):
    os.environ["KAFKA_TOPIC"] = "mine"
    os.environ["S3_PREFIX"] = ""
    found = dotenv("KAFKA_TOPIC=file\nS3_PREFIX=file/\nS3_BUCKET=file\n")
    assert (found["KAFKA_TOPIC"], found["S3_PREFIX"], found["S3_BUCKET"]) == ("mine", "", "file")


def test_flags_win_over_the_environment_and_the_file(dotenv):
    os.environ["RANDOM_SEED"] = "1"
    found = dotenv(
        "RANDOM_SEED=2\nMESSAGES_PER_SECOND=3", {"RANDOM_SEED": "0", "MESSAGES_PER_SECOND": None}
    )
    assert (found["RANDOM_SEED"], found["MESSAGES_PER_SECOND"]) == ("0", "3")


def test_names_of_other_libraries_reach_the_process(dotenv):
    dotenv("AWS_ACCESS_KEY_ID=AK\nexport AWS_PROFILE='p q'\n")
    assert os.environ["AWS_ACCESS_KEY_ID"] == "AK"
    assert os.environ["AWS_PROFILE"] == "p q"


def test_values_are_taken_as_they_stand(dotenv):
    found = dotenv("A=${HOME}\nB='$HOME'\nC=\"x y\" # comment\nD=p#q=r\nE=\n")
    assert [found[name] for name in "ABCDE"] == ["${HOME}", "$HOME", "x y", "p#q=r", ""]


def test_of_two_lines_with_a_name_the_last_counts(dotenv):
    assert dotenv("A=1\nB=2\nA=3\n")["A"] == "3"


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(dotenv, newline):
    found = dotenv(newline.join(["\ufeffKAFKA_TOPIC=a", "", "S3_BUCKET=b", ""]))
    assert (found["KAFKA_TOPIC"], found["S3_BUCKET"]) == ("a", "b")


def test_bad_lines_are_named_by_number_and_never_shown(dotenv):
    with pytest.raises(SettingsError) as caught:
        dotenv("A=1\n\n# note\n\nsecret key\nB=2\nSECRET\nC='secret\nD=4\n")
    said = r"line (\d+): must be NAME=value, with no quotes or a pair of them$"
    lines = [re.search(said, line)[1] for line in caught.value.args]
    assert lines == ["5", "7", "8"]
    assert "secret" not in "".join(caught.value.args).lower()
    assert not {"A", "B", "D"} & set(os.environ)


def test_what_is_wrong_in_the_file_and_in_the_values_is_said_together(tmp_path, monkeypatch):
    """A name that is misspelt, or whose line cannot be read, is not said to be missing too."""
    monkeypatch.setattr(os, "environ", {"LOG_LEVEL": "loud"})
    lines = [
        "S3_BUCKT=mine",
        "export KAFKA_TOPIC='test",
        "S3_PREFIX=\u201ca\u201d",
        "S3_MAX_CONCURRENCY=many",
    ]
    (tmp_path / ".env").write_text("\n".join(lines), encoding="utf-8")
    environ, unread = environment({"RANDOM_SEED": "x"}, tmp_path / ".env")
    with pytest.raises(SettingsError) as caught:
        Settings.from_env(environ, bucket_is_set, unread=unread)
    said = [line.removeprefix(f"{tmp_path / '.env'}, ") for line in caught.value.args]
    assert [re.match("line [0-9]|[A-Z0-9_]+", line)[0] for line in said] == [
        *("line 1", "line 2", "line 3"),
        *("RANDOM_SEED", "S3_MAX_CONCURRENCY", "LOG_LEVEL"),
    ]
    assert os.environ == {"LOG_LEVEL": "loud"}


@pytest.mark.parametrize("content", [b"A=\xff", "A=1".encode("utf-16")[2:], b"A=1\0"])
def test_a_file_that_is_no_text_is_an_error_in_one_line(dotenv, content):
    with pytest.raises(SettingsError, match=r"\.env.* (cannot be read|must be)") as caught:
        dotenv(content)
    assert len(caught.value.args) == 1


def test_utf16_with_its_byte_order_mark_is_read(dotenv):
    found = dotenv("S3_BUCKET=grün\r\nKAFKA_TOPIC=test\r\n".encode("utf-16"))
    assert (found["S3_BUCKET"], found["KAFKA_TOPIC"]) == ("grün", "test")


def test_another_encoding_is_refused_with_the_line_where_utf8_breaks(dotenv):
    with pytest.raises(SettingsError, match=r"\.env cannot be read: line 2 is not UTF-8; save it"):
        dotenv("A=1\n# chaîne\nS3_BUCKET=b\n".encode("cp1252"))


@pytest.mark.parametrize(
    "line",
    [
        r'CSV_PATH="C:\new\table.csv"',
        r'CSV_PATH="C:\vault"',
        r'CSV_PATH="a\b"',
        r'export CSV_PATH="x\n" # note',
    ],
)
def test_what_double_quotes_would_turn_into_control_characters_is_refused_by_name(dotenv, line):
    with pytest.raises(SettingsError) as caught:
        dotenv(f"A=1\n\n{line}\n")
    (said,) = caught.value.args
    assert "line 3: CSV_PATH: in double quotes" in said and "single quotes" in said
    assert "new" not in said and "vault" not in said and said.isprintable()


def test_backslashes_elsewhere_are_taken_as_they_stand(dotenv):
    found = dotenv("A=C:\\new\\table\nB='p\\nq'\nC=\"C:\\Users\"\n")
    assert [found[name] for name in "ABC"] == ["C:\\new\\table", "p\\nq", "C:\\Users"]


@pytest.mark.parametrize("line", ["'A=B'=c", "'A\0B'=c"])
def test_a_name_that_no_variable_can_have_is_refused(dotenv, line):
    with pytest.raises(SettingsError, match="line 2: must be NAME=value"):
        dotenv(f"A=1\n{line}\n")


def test_typographic_quotes_are_refused_by_name(dotenv):
    with pytest.raises(SettingsError) as caught:
        dotenv("S3_BUCKET=\u201cmy-bucket\u201d\nKAFKA_TOPIC=\u2018test\u2019\n")
    first, second = caught.value.args
    assert "line 1: S3_BUCKET: has typographic quotes" in first
    assert "line 2: KAFKA_TOPIC" in second


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("S3_BUCKET_NAME", "S3_BUCKET"),
        ("S3_BUKET", "S3_BUCKET"),
        ("KAFKA_BOOTSTRAP_SERVER", "KAFKA_BOOTSTRAP_SERVERS"),
        ("KAFKA_TOPIC_NAME", "KAFKA_TOPIC"),
        ("KAFKA_PASSWORD", "KAFKA_SASL_PASSWORD"),
        ("s3_bucket", "S3_BUCKET"),
        ("Kafka_Topic", "KAFKA_TOPIC"),
        ("log_level", "LOG_LEVEL"),
        ("MESSAGES_PER_SECONDS", "MESSAGES_PER_SECOND"),
    ],
)
def test_a_name_that_is_nearly_a_setting_is_refused_with_what_was_meant(dotenv, name, meant):
    with pytest.raises(SettingsError) as caught:
        dotenv(f"# mine\n{name}=secret\n")
    (said,) = caught.value.args
    assert said.endswith(f".env, line 2: {name} is no setting; did you mean {meant}?")
    assert "secret" not in said and name not in os.environ


@pytest.mark.parametrize("name", ["KAFKA_HEAP_OPTS", "KAFKA_HOME", "S3_REGION"])
def test_a_name_that_could_be_one_of_ours_and_is_none_is_a_warning(dotenv, tmp_path, caplog, name):
    assert dotenv(f"{name}=x\n")[name] == "x"
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / '.env'}, line 1: {name} names no setting, and is not read"
    ]


@pytest.mark.parametrize("name", ["AWS_ACCES_KEY_ID", "aws_access_key_id", "AWS_ACCESS_KEY"])
def test_a_name_that_is_nearly_one_of_aws_is_a_warning_without_its_value(
    dotenv, tmp_path, caplog, name
):
    dotenv(f"{name}=secret\n")
    (said,) = [record.getMessage() for record in caplog.records]
    assert said == (
        f"{tmp_path / '.env'}, line 1: {name} is no name that AWS knows; did you mean"
        " AWS_ACCESS_KEY_ID?"
    )


def test_names_of_others_are_no_matter(dotenv, caplog):
    dotenv("AWS_ENDPOINT_URL=http://x\nAWS_REGION=x\nHTTPS_PROXY=x\nMY_BUCKET=x\n")
    dotenv("AWS_ACCESS_KEY_ID=x\nAWS_SECRET_ACCESS_KEY=x\nAWS_PROFILE=x\nAWS_CA_BUNDLE=x\n")
    assert not caplog.records


def test_a_folder_called_env_is_said(tmp_path):
    (tmp_path / ".env").mkdir()
    with pytest.raises(SettingsError, match=r"\.env cannot be read: it is a folder"):
        environment({}, tmp_path / ".env")


def test_env_txt_beside_no_env_is_said(tmp_path, caplog):
    (tmp_path / ".env.txt").write_text("S3_BUCKET=b\n")
    environment({}, tmp_path / ".env")
    assert "rename it to .env" in caplog.records[0].getMessage()
    (tmp_path / ".env").write_text("")
    caplog.clear()
    environment({}, tmp_path / ".env")
    assert not caplog.records


def test_an_empty_value_stays_empty_and_the_problem_names_the_default(dotenv):
    found = dotenv("KAFKA_TOPIC=\nS3_PREFIX=\nS3_MAX_CONCURRENCY=\nCSV_PATH=\n")
    said = problems(**{name: found[name] for name in found if name != "HOME"})
    assert list(said) == ["KAFKA_TOPIC", "CSV_PATH", "S3_MAX_CONCURRENCY"]
    assert said["KAFKA_TOPIC"].endswith("leave it out for test")


@pytest.mark.parametrize(
    "url",
    [
        "https://my-bucket.s3.eu-central-1.amazonaws.com",
        "https://my-bucket.nyc3.digitaloceanspaces.com",
        "http://my-bucket.localhost:9000",
        "http://localhost:9000/my-bucket",
        "http://localhost:9000/my-bucket/",
    ],
)
def test_an_endpoint_with_the_bucket_in_it_is_refused(url):
    found = problems(S3_BUCKET="my-bucket", S3_ENDPOINT_URL=url)
    assert "holds the bucket my-bucket" in found["S3_ENDPOINT_URL"]
    assert made(S3_BUCKET="other", S3_ENDPOINT_URL=url).s3_endpoint_url == url


@pytest.mark.parametrize(
    "url", ["http://minio:9000", "http://minio.local:9000/", "https://h/minio2"]
)
def test_an_endpoint_whose_host_is_called_like_the_bucket_is_none_of_these(url):
    assert made(S3_BUCKET="minio", S3_ENDPOINT_URL=url).s3_endpoint_url == url


@pytest.mark.parametrize("prefix", ["_seals/", "a/_seals/", "_seals/b"])
def test_a_prefix_inside_the_folder_of_seals_is_refused(prefix):
    assert "_seals" in problems(S3_PREFIX=prefix)["S3_PREFIX"]
    assert made(S3_PREFIX="my_seals/").s3_prefix


def test_a_prefix_is_counted_in_bytes():
    assert "has 902" in problems(S3_PREFIX="ü" * 451)["S3_PREFIX"]
    longest = made(S3_PREFIX="ü" * 450).s3_prefix
    name = f"{longest}partition={2**31 - 1}/stock_market_{2**63 - 1}.json"
    assert len(name.encode()) <= 1024


# ---------------------------------------------------------------------------- what is installed

INSTALLED = """
import importlib.metadata, importlib.util, sys
versions = {versions}
real = importlib.metadata.version
def version(name):
    if name not in versions and name.startswith("kafka-python"):
        raise importlib.metadata.PackageNotFoundError(name)
    return versions.get(name) or real(name)
importlib.metadata.version = version
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name in {missing} else find(name, *more)
sys.version_info = {python}
import {script}
"""


@pytest.mark.parametrize("script", ["config", "kafka_producer"])
@pytest.mark.parametrize(
    ("versions", "missing", "python", "said"),
    [
        ({"kafka-python-ng": "2.2.3"}, ["pandas", "s3fs"], (3, 11), "missing (pandas, s3fs): "),
        ({"kafka-python-ng": "2.2.3"}, [], (3, 10, 4), "Python 3.11 or newer is needed"),
        ({"kafka-python": "2.0.2"}, [], (3, 12), "kafka-python 2.0.2 cannot be used"),
        ({"kafka-python": "2.0.2", "kafka-python-ng": "2.2.3"}, [], (3, 12), "uninstall -y"),
        ({"kafka-python": "3.0.1", "kafka-python-ng": "2.2.3"}, [], (3, 12), "uninstall -y"),
    ],
)
def test_what_is_not_installed_is_one_line_and_exit_code_2(script, versions, missing, python, said):
    code = INSTALLED.format(versions=versions, missing=missing, python=python, script=script)
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr and done.stderr.count("\n") == 1


# --------------------------------------------------------------------------------------- logging


class Terminal(io.TextIOWrapper):
    """A stream that says it is a terminal, or not, and keeps what it is given."""

    def __init__(self, *, tty=True, encoding="utf-8"):
        super().__init__(io.BytesIO(), encoding=encoding, write_through=True)
        self.tty = tty

    def isatty(self):
        return self.tty

    def fileno(self):
        return 2 if self.tty else super().fileno()

    def said(self):
        return self.buffer.getvalue().decode(self.encoding)


@pytest.fixture
def logs(monkeypatch):
    """Starts logging as a script does; returns what goes to stdout and stderr."""
    root, before = logging.getLogger(), dict(logging.root.manager.loggerDict)
    levels = {
        each: (each.level, each.propagate)
        for each in [root, *before.values()]
        if isinstance(each, logging.Logger)
    }
    monkeypatch.setattr(os, "get_terminal_size", lambda fileno: os.terminal_size((40, 20)))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)

    def start(*, tty=False, encoding="utf-8", **environ):
        out, err = (Terminal(tty=tty, encoding=encoding) for _ in range(2))
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        root.handlers.clear()  # pytest's own of this test, else basicConfig does nothing
        setup_logging(made(**environ))
        return out, err

    yield start
    for each in (root, output):
        for handler in each.handlers[:]:
            if isinstance(handler, config._Stream):
                each.removeHandler(handler)
    logging.getLogger("kafka").removeHandler(config.last_words)
    config.last_words.text = ""
    for each, (level, propagate) in levels.items():
        each.setLevel(level)
        each.propagate = propagate


log = logging.getLogger("a.script")
ABOUT = {"topic": "test", "partition": 0, "offset": 7, "key": "HSI"}


def test_records_go_to_stdout_and_all_else_to_stderr(logs):
    out, err = logs()
    output.info("   Content: %s", "{}")
    log.info("hello %d", 1)
    log.debug("too much")
    assert out.said() == "   Content: {}\n"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d INFO hello 1\n", err.said())


def test_the_level_is_for_stderr_and_never_hides_records(logs):
    out, err = logs(LOG_LEVEL="ERROR")
    output.info("record")
    log.warning("hidden")
    log.error("shown")
    assert out.said() == "record\n"
    assert err.said().endswith(" ERROR shown\n") and "hidden" not in err.said()


def test_as_json_each_line_on_both_streams_is_one_object_with_the_documented_names(logs):
    out, err = logs(LOG_FORMAT="json")
    output.info("Upload: %s", "a\nb\x1b[31m", extra=ABOUT)
    log.warning("careful")
    try:
        raise ValueError("why\nnot")
    except ValueError:
        log.exception("failed")
    lines = [json.loads(line) for line in (out.said() + err.said()).splitlines()]
    assert [line["message"] for line in lines] == ["Upload: a\nb\x1b[31m", "careful", "failed"]
    assert lines[0].items() >= (ABOUT | {"level": "INFO", "logger": "records"}).items()
    assert set(lines[1]) == {"time", "level", "logger", "message"}
    assert (lines[1]["level"], lines[1]["logger"]) == ("WARNING", "a.script")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", lines[1]["time"])
    assert "ValueError: why\nnot" in lines[2]["exception"]
    moment = time.strptime(lines[1]["time"][:19], "%Y-%m-%dT%H:%M:%S")
    assert abs(time.time() - (time.mktime(moment) - time.timezone)) < 5000  # UTC, not local


@pytest.mark.parametrize("format", ["text", "json"])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252"])
def test_a_record_cannot_break_out_of_its_line_or_reach_the_terminal(logs, format, encoding):
    out, err = logs(LOG_FORMAT=format, encoding=encoding)
    nasty = "ü€\x1b]0;x\x07\r\n\x85\u2028\u202e\x7f\x9b\udcff"
    output.info("   Content: %s", nasty)
    log.warning("key %s", nasty)
    for stream in (out, err):
        assert stream.said().count("\n") == 1
        assert len(stream.said().splitlines()) == 1
        assert stream.said().rstrip("\n").isprintable()
    if format == "json":
        assert json.loads(out.said())["message"] == f"   Content: {nasty}"
    elif encoding != "ascii":
        assert "ü€" in out.said()


@settings(deadline=None)
@given(st.text())
def test_printable_text_stays_and_all_else_is_escaped(text):
    assert config.printable(text).isprintable()
    if text.isprintable():
        assert config.printable(text) == text


def test_what_the_kafka_client_says_is_kept_as_its_last_words_and_not_printed(logs):
    out, err = logs(LOG_LEVEL="DEBUG")
    assert str(config.last_words) == ""
    client = logging.getLogger("kafka.conn")
    for at in (1000, 1001):
        client.error("attempt\n at %s", at, exc_info=_error())
    client.info("well")
    log.error("ours%s", config.last_words)
    assert err.said().splitlines()[0].endswith("ERROR ours (the client says: attempt at 1001)")
    assert len(err.said().splitlines()) == 1
    assert out.said() == ""


def test_what_the_client_says_through_the_root_logger_is_not_printed(logs):
    _, err = logs()
    logging.error("Authentication failed", exc_info=_error())
    assert err.said() == ""


def _error():
    try:
        raise OSError("deep in the client")
    except OSError:
        return sys.exc_info()


def test_libraries_that_say_secrets_at_debug_are_not_heard(logs):
    _, err = logs(LOG_LEVEL="DEBUG")
    for name in ("botocore.auth", "aiobotocore.x", "s3fs", "fsspec", "kafka.conn", "asyncio"):
        logging.getLogger(name).debug("secret")
        logging.getLogger(name).info("secret")
    log.debug("ours")
    assert "secret" not in err.said() and "ours" in err.said()


def test_on_a_pipe_the_status_is_a_plain_line(logs):
    out, err = logs()
    status(log, "written %d", 5)
    assert err.said().endswith(" INFO written 5\n")
    assert "\x1b" not in err.said() + out.said()


def test_on_a_terminal_the_status_is_rewritten_in_place_and_any_line_takes_its_place(logs):
    out, err = logs(tty=True)
    status(log, "sent %d", 1)
    output.info("a record")
    status(log, "sent %d", 2)
    log.info("a line")
    status(log, "sent %d", 3)
    assert out.said() == "\r\x1b[Ka record\n"
    stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    clear = re.escape("\r\x1b[K")
    assert re.fullmatch(
        f"{clear}sent 1{clear}sent 2{clear}{stamp} INFO a line\n{clear}sent 3", err.said()
    )


def test_on_a_terminal_the_status_fits_on_one_line(logs):
    _, err = logs(tty=True)
    status(log, "x" * 500)
    assert len(err.said().removeprefix("\r\x1b[K")) == 39


def test_the_fields_of_a_status_are_those_of_its_json_line(logs):
    _, err = logs(LOG_FORMAT="json")
    status(log, "lag %d", 3, lag=3)
    assert json.loads(err.said())["lag"] == 3


def test_a_dumb_terminal_gets_plain_lines(logs, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    _, err = logs(tty=True)
    status(log, "sent %d", 1)
    assert err.said().endswith("INFO sent 1\n") and "\x1b" not in err.said()


@pytest.mark.parametrize(
    ("tty", "environ", "names"),
    [
        (True, {"NO_COLOR": "1"}, {}),
        (True, {"TERM": "dumb"}, {}),
        (True, {}, {"LOG_FORMAT": "json"}),
        (False, {}, {}),
    ],
)
def test_without_colour(logs, monkeypatch, tty, environ, names):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    _, err = logs(tty=tty, **names)
    log.error("wrong")
    assert not re.search(r"\x1b\[\d+m", err.said())


def test_a_reader_who_leaves_stops_the_script_as_sigterm_does(tmp_path):
    # A process of its own: the signal is real. `| head` closes the pipe while lines are written.
    code = """
import logging, sys, config
config.setup_logging(config.Settings.from_env({}))
stop = config.Stop()
sys.stderr.write("ready\\n")
sys.stdin.read()
config.output.info("first")
config.output.info("second")
logging.getLogger("x").info("third")
print(stop.requested, file=open(sys.argv[1], "w"))
"""
    answer = tmp_path / "answer"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(answer)],
        cwd=HERE,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stderr.readline() == b"ready\n"
        for stream in (process.stdout, process.stderr, process.stdin):
            stream.close()
        assert process.wait(20) == 0  # not by the signal, which a second one would do
    assert answer.read_text() == "True\n"


def writing(code):
    """A process that logs as a script does, its output in pipes."""
    start = "import config\nconfig.setup_logging(config.Settings.from_env({}))\n"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", start + code], cwd=HERE, **pipes)


def test_that_the_reader_has_left_is_said():
    code = "stop = config.Stop()\nwhile not stop.requested:\n    config.output.info('line')\n"
    with writing(code) as process:
        process.stdout.readline()
        process.stdout.close()
        assert "WARNING what read this script's output has left" in process.stderr.read()
        assert process.wait(20) == 0


def test_a_full_disk_under_the_records_is_said_once_and_no_reason_to_stop(logs, monkeypatch):
    out, err = logs()

    def full(text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(out, "write", full)
    output.info("lost")
    output.info("lost")
    log.info("said")
    first, second = err.said().splitlines()
    why = "standard output cannot be written: No space left on device"
    assert first.endswith(f" WARNING {why}") and second.endswith(" INFO said")


def test_lines_that_nobody_reads_are_said_and_when_they_are_read_again():
    code = (
        "for number in range(200):\n"
        "    config.output.info('%d' + ' ' * 1000, number)\n"
        "import time; time.sleep(20)\n"
    )
    with writing(code) as process:
        said = process.stderr.readline()  # while nobody reads what is beyond the pipe's 64 kB
        assert "what reads this script's output does not go on" in said
        for _ in range(200):
            process.stdout.readline()
        assert "WARNING the output is read again after" in process.stderr.readline()
        process.kill()


def test_a_line_that_is_being_read_is_no_problem(logs, monkeypatch):
    out, _ = logs()
    (lines,) = (each for each in output.handlers if isinstance(each, config._Stream))
    problems = []

    def slowly(text):
        began = lines.writing_since
        problems.extend(config.output_problem(lines, began + after) for after in (4.9, 5.1))

    monkeypatch.setattr(out, "write", slowly)
    assert config.output_problem(lines, time.monotonic() + 100) == {}
    output.info("line")
    assert problems[0] == {} and "does not go on" in problems[1]["the output is read"].text
    assert config.output_problem(lines, time.monotonic() + 100) == {}


# --------------------------------------------------------------------------- what stands still


@pytest.fixture
def notices(lines):
    """Reports problems at given seconds; returns what was said then."""
    now = [1000.0]
    said = config.Notices(lambda: now[0])

    def report(at, **problems):
        now[0] = 1000.0 + at
        before = len(lines())
        said.report(
            {
                what: text if isinstance(text, config.Problem) else config.Problem(text)
                for what, text in problems.items()
            }
        )
        return lines()[before:]

    return report


def test_a_problem_is_said_at_once_every_30_s_and_when_it_is_over(notices):
    assert notices(0, S3="failing") == ["failing"]
    assert notices(29.9, S3="failing") == []
    assert notices(30, S3="failing, still") == ["failing, still; for 30 s now"]
    assert notices(59, S3="failing") == []
    assert notices(60, S3="failing") == ["failing; for 60 s now"]
    assert notices(61) == ["S3 again after 61.0 s"]
    assert notices(62) == []


def test_problems_are_said_each_for_itself(notices):
    assert notices(0, S3="failing") == ["failing"]
    assert notices(10, S3="failing", broker="silent") == ["silent"]
    assert notices(30, S3="failing", broker="silent") == ["failing; for 30 s now"]
    assert notices(31, broker="silent") == ["S3 again after 31.0 s"]


def test_what_comes_and_goes_is_said_only_when_it_lasts_for_a_second(notices):
    assert notices(0, S3="failing") == ["failing"]
    assert notices(1) == ["S3 again after 1.0 s"]
    for second in range(2, 20):
        assert notices(second, S3="failing") == []
        assert notices(second + 0.5) == []
    assert notices(20, S3="failing") == []
    assert notices(21, S3="failing") == ["failing"]


def test_what_was_not_said_is_not_said_to_be_over(notices):
    notices(0, S3="failing")
    notices(1)
    notices(2, S3="failing")
    assert notices(2.5) == []


def test_a_problem_that_began_earlier_says_so_itself(notices):
    problem = config.Problem("no answer for 2 s", since=998.0)
    assert notices(0, broker=problem) == ["no answer for 2 s"]
    assert notices(1) == ["broker again after 3.0 s"]


# ------------------------------------------------------------------- starting, stopping, counting


@pytest.fixture
def signals():
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    yield
    for each, handler in before.items():
        signal.signal(each, handler)


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_any_second_one_ends(signals, monkeypatch, first):
    class Unwatched(config.Stop):
        def _watch(self):
            """Ends the process, and this one runs the other tests."""

    stop = Unwatched()
    assert not stop.requested
    signal.raise_signal(first)
    assert stop.requested
    ends = []
    monkeypatch.setattr(signal, "raise_signal", ends.append)
    for second in (signal.SIGINT, signal.SIGTERM):
        signal.getsignal(second)(second, None)
        assert signal.getsignal(second) == signal.SIG_DFL
    stop._handle(signal.SIGTERM, None)  # both came at once, and it was on its way already
    assert ends == [signal.SIGINT, signal.SIGTERM, signal.SIGTERM]


def test_two_signals_at_once_end_a_script_without_a_traceback():
    code = """
import os, signal, time, config
config.Stop()
for signum in (signal.SIGTERM, signal.SIGINT):  # blocked, so that both are seen together
    signal.pthread_sigmask(signal.SIG_BLOCK, [signum])
    os.kill(os.getpid(), signum)
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM, signal.SIGINT])
time.sleep(60)  # another thread may have been given the second, and a moment later
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, timeout=60)
    assert ended.returncode in (-signal.SIGINT, -signal.SIGTERM)
    assert ended.stderr == b""


@pytest.mark.parametrize("text", ["0", "-1", "x", "", "1.5", "9" * 5000])
def test_a_count_is_a_whole_number_of_at_least_one(text):
    with pytest.raises(Exception, match="must be a whole number, at least 1"):
        config.positive(text)
    assert config.positive("1") == 1


def test_a_thread_that_died_is_a_failure_that_names_it(signals, monkeypatch):
    class Unwatched(config.Stop):
        def _watch(self):
            """Ends the process, and this one runs the other tests."""

    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    stop = Unwatched()
    stop.check()

    def beat():
        raise KeyError("broker 3")

    thread = threading.Thread(target=beat, name="heartbeat")
    thread.start()
    thread.join()
    with pytest.raises(config.Failure, match="heartbeat ended unexpectedly: KeyError: 'broker 3'"):
        stop.check()


def test_importing_the_scripts_starts_nothing():
    code = (
        "import os, threading; before = dict(os.environ)\n"
        "import config, kafka_producer, kafka_consumer, logging, signal\n"
        "assert threading.active_count() == 1, threading.enumerate()\n"
        "assert dict(os.environ) == before\n"
        "assert not logging.root.handlers\n"
        "assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=HERE, check=True, timeout=60)


@pytest.mark.parametrize("main", [kafka_producer.main, kafka_consumer.main])
def test_wrong_settings_and_usage_end_a_script_with_2_before_anything_is_contacted(
    main, capsys, monkeypatch
):
    # Nothing answers at this address: had it been contacted, the code would be 1.
    wrong = {"KAFKA_TOPIC": "a b", "LOG_LEVEL": "loud", "CSV_PATH": "/", "S3_BUCKET": "s3://b"}
    monkeypatch.setattr(os, "environ", wrong | {"KAFKA_BOOTSTRAP_SERVERS": "192.0.2.1:9092"})
    assert main([]) == 2
    said = capsys.readouterr()
    lines = [line.partition("=")[0] for line in said.err.splitlines()]
    assert (said.out, lines) == ("", ["KAFKA_TOPIC", "S3_BUCKET", "LOG_LEVEL"])
    for flag in ("--no-such-flag", "--max-messages=0"):
        with pytest.raises(SystemExit) as ended:
            main([flag])
        assert ended.value.code == 2
        assert flag.split("=")[0] in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "--max-messages" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("main", "flags"),
    [
        (kafka_producer.main, ["--seed=1", "--stdin"]),
        (kafka_consumer.main, ["--max-messages=1", "--audit"]),
    ],
)
def test_flags_of_which_one_would_be_ignored_are_usage_errors(main, flags, capsys):
    with pytest.raises(SystemExit) as ended:
        main(flags)
    assert ended.value.code == 2
    assert "not allowed with argument" in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix", reason="closed descriptors are a thing of POSIX shells")
def test_closed_standard_streams_do_no_harm():
    command = f"exec {sys.executable} -c '{CLOSED}' <&- >&- 2>&-"
    done = subprocess.run(["sh", "-c", command], cwd=HERE, timeout=60)
    assert done.returncode == 7


CLOSED = """
import logging, sys, config
config.setup_logging(config.Settings.from_env({}))
config.output.info("record")
logging.error("line")
sys.exit(7 if sys.stderr.isatty() is False else 1)
"""


def test_the_last_words_are_kept_where_they_say_why_and_explained_and_forgotten(logs, monkeypatch):
    logs()
    client = logging.getLogger("kafka.client")
    client.error("Got NotEnoughReplicasError, retrying")
    client.warning("Node 0 connection failed -- refreshing metadata")
    assert re.search(r"NotEnoughReplicasError.*; .*min\.insync\.replicas", str(config.last_words))
    monkeypatch.setattr(config.last_words, "said_at", time.monotonic() - 61)
    assert str(config.last_words) == ""


def test_a_password_in_an_address_is_refused_and_not_shown():
    with pytest.raises(SettingsError) as caught:
        Settings.from_env({"S3_ENDPOINT_URL": "http://user:sEcRet@host:9000"})
    assert "S3_ENDPOINT_URL" in str(caught.value) and "sEcRet" not in str(caught.value)


def test_the_host_of_an_address_is_in_lower_case_as_it_is_signed():
    settings = Settings.from_env({"S3_ENDPOINT_URL": "http://LOCALHOST:9000/Path"})
    assert settings.s3_endpoint_url == "http://localhost:9000/Path"


def test_a_topic_that_may_not_be_read_is_not_spelt_out_in_letters():
    text = config.explain(TopicAuthorizationFailedError(set("topic")))
    assert "{" not in text and "ACL" in text


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("kafka_consumer.py --help >/dev/full", 0),
        ("kafka_producer.py --help >/dev/full", 0),
        ("kafka_consumer.py 2>/dev/full", 2),
    ],
)
def test_a_full_disk_under_the_output_changes_no_exit_code(command, code):
    environ = {**os.environ, "S3_BUCKET": "", "PYTHONUNBUFFERED": ""}  # empty: it is buffered
    line = f"exec {sys.executable} {command}"
    done = subprocess.run(["sh", "-c", line], cwd=HERE, env=environ, timeout=60)
    assert done.returncode == code


def test_what_to_try_names_no_topic_that_may_be_another():
    assert "max.message.bytes of this topic" in config.explain(MessageSizeTooLargeError("why"))
