"""Credentials that are renewed slowly, fail to be, or are gone for a moment (promise 10)."""

import json
import os
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from helpers import memory, produce, until
from s3_faults import FaultyS3

pytestmark = [pytest.mark.real, pytest.mark.detail]

# botocore renews credentials at all costs when less than 10 minutes of them are left.
ENDING = 300

PROGRAM = """\
#!/bin/sh
cd "$(dirname "$0")"
echo run >> runs
waited=0
while [ -e slow ] && [ "$waited" -lt "$(cat slow)" ]; do
    sleep 1
    waited=$((waited + 1))
done
[ -e broken ] && { echo "no token: sign in again" >&2; exit 1; }
cat answer
"""


class Process:
    """A `credential_process` whose answers, delays and failures a test sets."""

    def __init__(self, folder: Path):
        self.folder = folder
        program = folder / "credentials.sh"
        program.write_text(PROGRAM)
        program.chmod(0o755)
        self.config = folder / "config"
        self.config.write_text(f"[default]\ncredential_process = {program}\n")

    def gives(self, key: str, secret: str = "secret", seconds: float = 3600) -> None:
        """Answer with this key, good for so long."""
        end = datetime.now(UTC) + timedelta(seconds=seconds)
        answer = {
            "Version": 1,
            "AccessKeyId": key,
            "SecretAccessKey": secret,
            "Expiration": end.isoformat(timespec="milliseconds"),
        }
        new = self.folder / "answer.new"
        new.write_text(json.dumps(answer))
        new.rename(self.folder / "answer")

    def takes(self, seconds: int) -> None:
        (self.folder / "slow").write_text(str(seconds))

    def breaks(self) -> None:
        (self.folder / "broken").touch()

    def works(self) -> None:
        for name in ("slow", "broken"):
            (self.folder / name).unlink(missing_ok=True)

    @property
    def runs(self) -> int:
        runs = self.folder / "runs"
        return len(runs.read_text().splitlines()) if runs.exists() else 0


@pytest.fixture
def process(tmp_path):
    process = Process(tmp_path)
    yield process
    process.works()  # one that hangs ends, with or without the consumer


@pytest.fixture
def without_keys(env):
    """The settings without credentials: those come by another way."""
    return {name: value for name, value in env.items() if not name.startswith("AWS_A")} | {
        "AWS_DEFAULT_REGION": env["AWS_DEFAULT_REGION"],
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@pytest.fixture
def renewing(run, without_keys, process, kafka, topic, s3):
    """A consumer at the real server that has written an object, and whose credentials have to be
    renewed with the next; `process` is what gives them."""
    process.gives(s3.access_key, s3.secret_key, ENDING)
    settings = {**without_keys, "AWS_CONFIG_FILE": str(process.config)}
    produce(kafka.bootstrap, topic, [b'{"n": 0}'])
    script = run("kafka_consumer.py", env=settings)
    script.wait_for("Upload Successfully", stream="stdout")
    process.gives(s3.access_key, s3.secret_key)
    time.sleep(2)  # keys may be used for a moment without asking when they end
    process.before = process.runs
    return script


def holds(script) -> list[str]:
    return [line for line in script.lines("stderr") if "S3 failing" in line]


@pytest.mark.parametrize("seconds", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_a_renewal_that_takes_its_time_is_waited_for_by_all_and_is_no_failure_of_s3(
    renewing, process, kafka, topic, seconds
):
    process.takes(seconds)
    produce(kafka.bootstrap, topic, [b'{"n": %d}' % n for n in range(1, 50)])
    if seconds > 5:
        said = "still waiting for the AWS credentials"
        renewing.wait_for(said, timeout=10, stream="stderr")
    renewing.wait_for("stock_market_49.json", timeout=seconds + 5, stream="stdout")
    assert holds(renewing) == []
    assert process.runs == process.before + 1


@pytest.mark.slow
def test_a_renewal_without_an_end_is_said_as_the_credentials_after_60_s(
    renewing, process, kafka, topic
):
    process.takes(3600)
    began = time.monotonic()
    (offset,) = produce(kafka.bootstrap, topic, [b'{"n": 1}'])
    line = f"holding at {topic}/0/{offset}: .*credentials"
    renewing.wait_for(line, timeout=75, stream="stderr")
    assert time.monotonic() - began > 50
    process.works()
    renewing.wait_for("stock_market_1.json", timeout=10, stream="stdout")


def test_a_renewal_that_fails_is_said_as_the_credentials_and_made_again(
    renewing, process, kafka, topic
):
    process.breaks()
    (offset,) = produce(kafka.bootstrap, topic, [b'{"n": 1}'])
    line = f"holding at {topic}/0/{offset}: .*(?i:credential).*sign in again"
    renewing.wait_for(line, timeout=5, stream="stderr")
    process.works()
    renewing.wait_for("stock_market_1.json", timeout=5, stream="stdout")
    assert "Traceback" not in renewing.stderr


@pytest.fixture
def store():
    """A store at which the first key expires."""
    with FaultyS3() as store:
        store.access_keys = {"first"}
        yield store


def test_credentials_that_are_gone_for_one_look_are_found_at_the_next(
    run, without_keys, kafka, topic, store, tmp_path
):
    """A file is being rotated: it is away for a while, and comes back with the new key."""
    keys = tmp_path / "credentials"

    def write(key: str) -> None:
        text = f"[default]\naws_access_key_id = {key}\naws_secret_access_key = secret\n"
        (tmp_path / "new").write_text(text)
        (tmp_path / "new").rename(keys)

    write("first")
    files = {"AWS_SHARED_CREDENTIALS_FILE": str(keys), "S3_ENDPOINT_URL": store.endpoint}
    produce(kafka.bootstrap, topic, [b'{"n": 0}'])
    script = run("kafka_consumer.py", env={**without_keys, **files})
    script.wait_for("Upload Successfully", stream="stdout")
    keys.unlink()
    store.access_keys = {"second"}
    produce(kafka.bootstrap, topic, [b'{"n": %d}' % n for n in range(1, 20)])
    script.wait_for("holding at .*ExpiredToken", timeout=5, stream="stderr")
    time.sleep(3)  # looks without success
    write("second")
    script.wait_for("stock_market_19.json", timeout=15, stream="stdout")
    assert script.process.poll() is None


@pytest.fixture
def consumer(run, without_keys, process, kafka, topic, store):
    """A consumer that has written an object with the first key, which `process` gave."""
    process.gives("first")
    settings = {"AWS_CONFIG_FILE": str(process.config), "S3_ENDPOINT_URL": store.endpoint}
    produce(kafka.bootstrap, topic, [b'{"n": 0}'])
    script = run("kafka_consumer.py", env={**without_keys, **settings})
    script.wait_for("Upload Successfully", stream="stdout")
    return script


def test_a_process_that_fails_for_one_look_is_asked_again(consumer, process, kafka, topic, store):
    process.breaks()
    store.access_keys = {"second"}
    before = process.runs
    produce(kafka.bootstrap, topic, [b'{"n": 1}'])
    consumer.wait_for("holding at .*ExpiredToken", timeout=5, stream="stderr")
    until(lambda: process.runs > before, timeout=15, what="a look for new credentials")
    time.sleep(1)
    process.gives("second")
    process.works()
    consumer.wait_for("stock_market_1.json", timeout=15, stream="stdout")
    assert "Traceback" not in consumer.stderr


def cpu(pid: int) -> float:
    """Seconds of CPU that a process has used. Linux."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.slow
def test_the_look_for_new_credentials_costs_little_in_a_long_hold(
    consumer, process, kafka, topic, store
):
    store.access_keys = {"second"}
    produce(kafka.bootstrap, topic, [b'{"n": 1}'])
    consumer.wait_for("holding at .*ExpiredToken", timeout=5, stream="stderr")
    size, used, looks = memory(consumer.pid), cpu(consumer.pid), process.runs
    time.sleep(40)
    size, used, looks = (
        memory(consumer.pid) - size,
        cpu(consumer.pid) - used,
        process.runs - looks,
    )
    print(f"in 40 s: {looks} looks, {used:.1f} s of CPU, {size:.1f} MB more")
    assert used < 5 and size < 20 and looks < 25
    process.gives("second")
    consumer.wait_for("stock_market_1.json", timeout=10, stream="stdout")


@pytest.mark.slow
def test_one_look_at_a_time_however_long_it_takes(consumer, process, kafka, topic, store):
    """S3 fails, and the program that gives the credentials hangs too."""
    process.takes(3600)
    before = process.runs
    store.fail("503")
    produce(kafka.bootstrap, topic, [b'{"n": 1}'])
    consumer.wait_for("holding at .*SlowDown", timeout=5, stream="stderr")
    time.sleep(12)
    assert process.runs - before <= 2
    store.heal()
    consumer.wait_for("stock_market_1.json", timeout=5, stream="stdout")
