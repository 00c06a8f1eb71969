"""SASL and TLS against the real broker; secrets stay secret, and content stays content."""

import json
import subprocess
import unicodedata
from pathlib import Path

import pytest
from helpers import Kafka, assert_whole, free_port, produce, records
from s3_faults import FaultyS3

from config import Settings

pytestmark = [pytest.mark.real, pytest.mark.detail]

USER, PASSWORD = "writer", 'pa=ss"w;o%rd-7f3a'
PLAIN = "org.apache.kafka.common.security.plain.PlainLoginModule"
SCRAM = "org.apache.kafka.common.security.scram.ScramLoginModule"


class Secured:
    """A broker with a SASL_PLAINTEXT, a SASL_SSL and an SSL listener beside the usual two."""

    def __init__(self, folder: Path):
        self.kafka = kafka = Kafka(folder / "kafka")
        self.ports = {name: free_port() for name in ("SASL_PLAINTEXT", "SASL_SSL", "SSL")}
        self.authority, self.stranger = folder / "authority.crt", folder / "stranger.crt"
        for name, path in (("broker", self.authority), ("stranger", self.stranger)):
            _certificate(folder / f"{name}.p12", path)
        store = folder / "broker.p12"
        secret = PASSWORD.replace('"', '\\"')
        kafka.properties["listeners"] += "".join(
            f",{name}://127.0.0.1:{port}" for name, port in self.ports.items()
        )
        kafka.properties["listener.security.protocol.map"] += "".join(
            f",{name}:{name}" for name in self.ports
        )
        kafka.properties |= {
            "sasl.enabled.mechanisms": "PLAIN,SCRAM-SHA-256,SCRAM-SHA-512",
            "ssl.keystore.location": str(store),
            "ssl.keystore.password": "keystore-password",
            "ssl.keystore.type": "PKCS12",
        }
        for name in ("sasl_plaintext", "sasl_ssl"):
            start = f"listener.name.{name}"
            kafka.properties[f"{start}.plain.sasl.jaas.config"] = (
                f'{PLAIN} required user_{USER}="{secret}";'
            )
            for mechanism in ("scram-sha-256", "scram-sha-512"):
                kafka.properties[f"{start}.{mechanism}.sasl.jaas.config"] = f"{SCRAM} required;"
        kafka.start()
        kafka.command(
            "kafka.admin.ConfigCommand", "--bootstrap-server", kafka.internal, "--alter",
            "--entity-type", "users", "--entity-name", USER, "--add-config",
            f"SCRAM-SHA-256=[password={PASSWORD}],SCRAM-SHA-512=[password={PASSWORD}]",
        )  # fmt: skip

    def settings(self, protocol: str, mechanism: str = "") -> dict[str, str]:
        """What a client of that listener sets."""
        return {
            "KAFKA_BOOTSTRAP_SERVERS": f"127.0.0.1:{self.ports[protocol]}",
            "KAFKA_SECURITY_PROTOCOL": protocol,
            "KAFKA_SASL_MECHANISM": mechanism,
            "KAFKA_SASL_USERNAME": USER if mechanism else "",
            "KAFKA_SASL_PASSWORD": PASSWORD if mechanism else "",
            "KAFKA_SSL_CAFILE": str(self.authority) if "SSL" in protocol else "",
        }


def _certificate(store: Path, exported: Path) -> None:
    """A key with its certificate for 127.0.0.1 in `store`, the certificate also in `exported`."""
    common = ["-keystore", str(store), "-storepass", "keystore-password", "-storetype", "PKCS12"]
    generate = "-genkeypair -alias a -keyalg EC -dname CN=broker -ext san=ip:127.0.0.1 -validity 9"
    export = f"-exportcert -rfc -alias a -file {exported}"
    for action in (generate, export):
        subprocess.run(["keytool", *action.split(), *common], check=True, capture_output=True)


@pytest.fixture(scope="module")
def secured(tmp_path_factory):
    # Made only where the fixture `kafka` could be: the marker `real` is on every test.
    secured = Secured(tmp_path_factory.mktemp("secured"))
    try:
        yield secured
    finally:
        secured.kafka.stop()


@pytest.fixture
def own_topic(secured, topic):
    secured.kafka.create_topic(topic)
    secured.kafka.create_topic(f"{topic}_errors")
    return topic


WAYS = [
    ("SASL_PLAINTEXT", "PLAIN"),
    ("SASL_PLAINTEXT", "SCRAM-SHA-256"),
    ("SASL_SSL", "SCRAM-SHA-512"),
    ("SASL_SSL", "PLAIN"),
    ("SSL", ""),
]


def no_secret(env, *scripts) -> None:
    secrets = [PASSWORD, PASSWORD[:12], env["AWS_SECRET_ACCESS_KEY"]]
    for script in scripts:
        for secret in secrets:
            assert secret not in script.stdout + script.stderr


@pytest.mark.parametrize(("protocol", "mechanism"), WAYS)
def test_the_pair_works_and_tells_no_secret(
    run, env, secured, own_topic, objects, protocol, mechanism
):
    env = {**env, **secured.settings(protocol, mechanism), "LOG_LEVEL": "DEBUG"}
    assert env["AWS_SECRET_ACCESS_KEY"]
    producer = run("kafka_producer.py", "--rate", "20", env=env)
    consumer = run("kafka_consumer.py", "--max-messages", "10", env=env)
    consumer.wait_for("Upload Successfully")
    for script in (producer, consumer):
        for part in ("cmdline", "comm"):
            assert PASSWORD not in Path(f"/proc/{script.pid}/{part}").read_text()
    assert consumer.wait() == 0
    producer.terminate()
    assert producer.wait() == 0
    written = records(secured.kafka.internal, own_topic)
    assert_whole(written[:10], objects())
    no_secret(env, producer, consumer)


def ends_with_one_line(run, env, said: str) -> None:
    """Both scripts, side by side: exit code 1 within 15 s, and one line that says `said`."""
    for script in [run(name, env=env) for name in ("kafka_consumer.py", "kafka_producer.py")]:
        assert script.wait(timeout=15) == 1
        assert len(script.lines("stderr")) == 1, script.stderr
        assert said in script.stderr
        assert env["KAFKA_SASL_PASSWORD"] == "" or env["KAFKA_SASL_PASSWORD"] not in script.stderr


@pytest.mark.parametrize(
    "mechanism", ["SCRAM-SHA-512", pytest.param("PLAIN", marks=pytest.mark.slow)]
)
def test_a_wrong_password_is_one_line_that_does_not_repeat_it(
    run, env, secured, own_topic, mechanism
):
    wrong = {"KAFKA_SASL_PASSWORD": "wrong-pa55word"}
    env = {**env, **secured.settings("SASL_PLAINTEXT", mechanism), **wrong}
    ends_with_one_line(run, env, "the user and password right?")


@pytest.mark.slow
def test_another_authority_is_one_line(run, env, secured, own_topic):
    settings = {**secured.settings("SSL"), "KAFKA_SSL_CAFILE": str(secured.stranger)}
    ends_with_one_line(run, {**env, **settings}, "KAFKA_SECURITY_PROTOCOL=SSL")


@pytest.mark.slow
def test_tls_to_a_plaintext_listener_is_one_line(run, env, secured, own_topic):
    settings = {**secured.settings("SSL"), "KAFKA_BOOTSTRAP_SERVERS": secured.kafka.bootstrap}
    ends_with_one_line(run, {**env, **settings}, "KAFKA_SECURITY_PROTOCOL=SSL")


@pytest.mark.parametrize("listener", ["SSL", "SASL_PLAINTEXT"])
def test_plaintext_to_a_secured_listener_is_one_line(run, env, secured, own_topic, listener):
    settings = {"KAFKA_BOOTSTRAP_SERVERS": f"127.0.0.1:{secured.ports[listener]}"}
    ends_with_one_line(run, {**env, **settings}, "KAFKA_SECURITY_PROTOCOL=PLAINTEXT")


def controls(text: str) -> set[str]:
    """The control characters in a text, line ends apart."""
    return {c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp")} - {"\n"}


HOSTILE = "\x1b[2J\x1b]0;title\x07\x9b31m\x85\u202e\u2028../../etc\x7f"


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_content_and_keys_reach_neither_terminal_nor_object_name_raw(
    run, env, kafka, topic, objects, log_format
):
    hostile = HOSTILE.encode()
    values = [
        json.dumps({"x": HOSTILE}, ensure_ascii=False).replace("\x1b", "\\u001b")
        .replace("\x07", "\\u0007").encode(),
        hostile,
        b'{"x": "\x1b[31m"}',
        b"[\r\n2026-11-23 00:00:00 INFO forged]",
        b"{}",
    ]  # fmt: skip
    keys = [b"../../../up", hostile, b"a\r\nUpload Successfully: s3://forged", b"\xff\x00", None]
    produce(kafka.bootstrap, topic, values, keys=keys)
    settings = {**env, "LOG_LEVEL": "DEBUG", "LOG_FORMAT": log_format}
    script = run("kafka_consumer.py", "--max-messages", "5", env=settings)
    assert script.wait() == 0
    assert controls(script.stdout + script.stderr) == set()
    assert not any(line.startswith("Upload Successfully: s3://forged") for line in script.lines())
    assert not any(line.startswith("2026-11-23 00:00:00") for line in script.lines("stderr"))
    names = {f"stock_market_{n}.json" for n in (0, 4)}
    assert set(objects()) == names


def test_control_characters_in_the_csv_do_not_reach_the_terminal_raw(
    run, env, tmp_path, topic, kafka
):
    csv = tmp_path / "hostile.csv"
    csv.write_text(
        f'Index,x\na,"{HOSTILE}\r\n[Sent] Topic: forged"\n', newline="", encoding="utf-8"
    )
    settings = {**env, "CSV_PATH": str(csv), "MESSAGES_PER_SECOND": "50", "KAFKA_KEY_COLUMN": "x"}
    script = run("kafka_producer.py", "--max-messages", "3", env=settings)
    assert script.wait() == 0
    assert controls(script.stdout + script.stderr) == set()
    assert not any(line.startswith("[Sent] Topic: forged") for line in script.lines())
    for record in records(kafka.bootstrap, topic):
        assert json.loads(record.value)["x"].startswith(HOSTILE)


def test_a_session_token_is_in_no_line_even_at_debug(run, env, kafka, topic):
    settings = {**env, "LOG_LEVEL": "DEBUG", "AWS_SESSION_TOKEN": "a-token-of-an-assumed-role"}
    produce(kafka.bootstrap, topic, [b"{}"])
    with FaultyS3() as s3:
        settings["S3_ENDPOINT_URL"] = s3.endpoint
        script = run("kafka_consumer.py", "--max-messages", "1", env=settings)
        assert script.wait() == 0
    assert "a-token-of" not in script.stdout + script.stderr
    no_secret(env, script)


def test_secrets_are_in_no_repr_and_no_error_of_the_settings(run, env):
    settings = {**env, "MESSAGES_PER_SECOND": "fast", "KAFKA_SASL_PASSWORD": PASSWORD}
    for name in ("kafka_consumer.py", "kafka_producer.py"):
        script = run(name, env=settings)
        assert script.wait() == 2
        no_secret(env, script)
    shown = repr(Settings.from_env({**env, "KAFKA_SASL_PASSWORD": PASSWORD}))
    assert PASSWORD not in shown
    assert env["AWS_SECRET_ACCESS_KEY"] not in shown
