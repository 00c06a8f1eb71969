"""What is wrong at the start is said in one line within 15 s, with exit code 1 (promise 8)."""

import socket
import time
from contextlib import ExitStack

import pytest
from helpers import free_port
from s3_faults import FaultyS3

pytestmark = [pytest.mark.real, pytest.mark.detail]


@pytest.fixture
def silent():
    """A port that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield server.getsockname()[1]


CONSUMER = "kafka_consumer.py"
PRODUCER = "kafka_producer.py"


@pytest.fixture
def ends_with_one_line(run, env):
    """Starts (script, settings, what its line says) side by side; each ends with 1 within 15 s."""

    def check(*cases: tuple[str, dict[str, str], str]) -> None:
        started = time.monotonic()
        scripts = [run(name, env={**env, **settings}) for name, settings, _ in cases]
        for script, (_, _, said) in zip(scripts, cases, strict=True):
            assert script.wait(timeout=started + 15 - time.monotonic()) == 1
            errors = [line for line in script.lines("stderr") if " ERROR " in line]
            assert len(errors) == 1, script.stderr
            assert said in errors[0]
            assert "Traceback" not in script.stderr
            assert script.stdout == "" or "Upload" not in script.stdout

    return check


@pytest.mark.parametrize("script", [CONSUMER, PRODUCER])
def test_no_broker(ends_with_one_line, script):
    address = f"127.0.0.1:{free_port()}"
    ends_with_one_line((script, {"KAFKA_BOOTSTRAP_SERVERS": address}, address))


def test_a_broker_that_never_answers(ends_with_one_line, silent):
    settings = {"KAFKA_BOOTSTRAP_SERVERS": f"127.0.0.1:{silent}"}
    ends_with_one_line((CONSUMER, settings, str(silent)), (PRODUCER, settings, str(silent)))


def test_a_broker_whose_name_is_unknown(ends_with_one_line):
    settings = {"KAFKA_BOOTSTRAP_SERVERS": "broker.invalid:9092"}
    ends_with_one_line(
        (CONSUMER, settings, "broker.invalid"), (PRODUCER, settings, "broker.invalid")
    )


def test_no_topic(ends_with_one_line):
    settings = {"KAFKA_TOPIC": "nosuchtopic"}
    ends_with_one_line((CONSUMER, settings, "nosuchtopic"), (PRODUCER, settings, "nosuchtopic"))


def test_no_bucket_wrong_key_wrong_secret(ends_with_one_line):
    ends_with_one_line(
        (CONSUMER, {"S3_BUCKET": "no-such-bucket-here"}, "no-such-bucket-here"),
        (CONSUMER, {"AWS_SECRET_ACCESS_KEY": "wrong-secret"}, "SignatureDoesNotMatch"),
    )


def test_no_credentials(ends_with_one_line):
    settings = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}
    ends_with_one_line((CONSUMER, settings, "credentials"))


def test_s3_refused_or_silent(ends_with_one_line, silent):
    closed = f"http://127.0.0.1:{free_port()}"
    ends_with_one_line(
        (CONSUMER, {"S3_ENDPOINT_URL": closed}, closed),
        (CONSUMER, {"S3_ENDPOINT_URL": f"http://127.0.0.1:{silent}"}, str(silent)),
    )


def test_s3_expired_or_failing(ends_with_one_line, s3):
    with ExitStack() as stack:
        cases = []
        for kind, said in (("400", "expired"), ("503", "S3")):
            faulty = stack.enter_context(FaultyS3(s3.endpoint))
            faulty.fail(kind)
            cases.append((CONSUMER, {"S3_ENDPOINT_URL": faulty.endpoint}, said))
        ends_with_one_line(*cases)
