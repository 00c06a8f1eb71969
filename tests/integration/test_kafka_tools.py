"""infra/kafka.sh: Kafka's own tools against the broker that runs here."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
from helpers import ROOT, Kafka, free_port, kafka_scripts, produce
from local_stack import kafka_home

pytestmark = pytest.mark.detail

SCRIPT = ROOT / "infra" / "kafka.sh"


def tool(*args: str, script: Path = SCRIPT, **env: str) -> subprocess.CompletedProcess[str]:
    """Run one of the tools."""
    settings = {**os.environ, **env}
    return subprocess.run(
        [script, *args], env=settings, capture_output=True, text=True, timeout=60, check=False
    )


def test_every_tool_is_a_class_of_the_jars(kafka: Kafka) -> None:
    classes = re.findall(r"^ +([a-z-]+)\) echo ([\w.]+) ;;$", SCRIPT.read_text(), re.MULTILINE)
    names = {
        name
        for jar in (kafka_home() / "libs").glob("kafka*.jar")
        for name in zipfile.ZipFile(jar).namelist()
    }
    for name, main_class in classes:
        assert f"{main_class.replace('.', '/')}.class" in names, name
    listed = tool("--help").stdout.partition("Tools:\n")[2].split()
    assert listed == sorted(name for name, _ in classes)


def test_the_commands_of_the_readme_work_on_the_broker_of_the_environment(
    kafka: Kafka, topic: str
) -> None:
    broker = {"KAFKA_BOOTSTRAP_SERVERS": kafka.bootstrap}
    made = tool("topics", "--create", "--topic", f"{topic}-3", "--partitions", "3", **broker)
    assert (made.returncode, made.stderr) == (0, "")
    altered = tool(
        *("kafka-topics.sh", "--bootstrap-server", kafka.bootstrap),
        *("--alter", "--topic", topic, "--partitions", "4"),
        KAFKA_BOOTSTRAP_SERVERS="127.0.0.1:1",
    )
    assert (altered.returncode, altered.stderr) == (0, "")
    produce(kafka.bootstrap, topic, [b"one"], partition=3)
    read = tool(
        *("console-consumer", "--topic", topic, "--from-beginning", "--max-messages", "1"),
        *("--group", f"tool-{topic}"),
        **broker,
    )
    assert read.stdout == "one\n"
    told = tool("consumer-groups", "--describe", "--group", f"tool-{topic}", **broker).stdout
    assert re.search(rf"{topic} +3 +1 +1 +0 ", told)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ("cluster", "cluster-id"),
        ("transactions", "list"),
        ("features", "describe"),
        ("log-dirs", "--describe"),
        ("broker-api-versions",),
        ("configs", "--describe", "--entity-type", "brokers", "--entity-default"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_the_broker_is_named_where_the_tool_wants_it(kafka: Kafka, arguments: list[str]) -> None:
    done = tool(*arguments, KAFKA_BOOTSTRAP_SERVERS=kafka.bootstrap)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_broker_of_env_is_used_and_the_environment_wins(
    kafka: Kafka, topic: str, tmp_path: Path
) -> None:
    (tmp_path / "infra").mkdir()
    script = Path(shutil.copy(SCRIPT, tmp_path / "infra"))
    env = {"KAFKA_HOME": str(kafka_home()), "KAFKA_BOOTSTRAP_SERVERS": ""}
    (tmp_path / ".env").write_text(f'A=1\nKAFKA_BOOTSTRAP_SERVERS="{kafka.bootstrap}" # mine\n')
    listed = tool("topics", "--list", script=script, **env)
    assert topic in listed.stdout.split(), listed.stderr
    env["KAFKA_BOOTSTRAP_SERVERS"] = "127.0.0.1:1"
    assert "no broker at 127.0.0.1:1: " in tool("topics", "--list", script=script, **env).stderr


@pytest.mark.slow
def test_the_stand_ins_for_apaches_scripts_work_as_those_do(
    kafka: Kafka, topic: str, tmp_path: Path
) -> None:
    kafka_scripts(tmp_path)
    (tmp_path / "libs").symlink_to(kafka_home() / "libs")
    listed = subprocess.check_output(
        [tmp_path / "bin" / "kafka-topics.sh", "--bootstrap-server", kafka.bootstrap, "--list"],
        text=True,
    )
    assert topic in listed.split()
    brokers = subprocess.run(
        [tmp_path / "bin" / "zookeeper-shell.sh", f"127.0.0.1:{kafka.zookeeper.port}"],
        input="ls /brokers/ids\nquit\n",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "[0]" in brokers.stdout


def test_no_broker_is_one_line_at_once(kafka: Kafka) -> None:
    address = f"localhost:{free_port()}"
    done = tool("topics", "--list", KAFKA_BOOTSTRAP_SERVERS=address)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"kafka.sh: no broker at {address}: start infra/local_stack.py in another terminal, or "
        "name another with KAFKA_BOOTSTRAP_SERVERS\n"
    )


def test_no_jars_and_no_java_are_one_line(kafka: Kafka, tmp_path: Path) -> None:
    done = tool("topics", "--list", KAFKA_HOME=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith(f"kafka.sh: no Kafka in {tmp_path}/libs: ")
    done = tool("topics", "--list", JAVA_HOME=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith("kafka.sh: Java was not found (Debian, Ubuntu: apt install ")


def test_a_path_with_other_letters_than_ascii_is_found_in_any_locale(tmp_path: Path) -> None:
    (tmp_path / "größe").symlink_to(kafka_home())
    home = str(tmp_path / "größe")
    done = tool("dump-log", "--version", KAFKA_HOME=home, LC_ALL="C", CDPATH=".")
    assert done.stdout.startswith("3.3.1") and done.stderr == ""


def test_an_unknown_tool_is_exit_code_2_with_those_that_exist() -> None:
    done = tool("topcs", "--list")
    assert done.returncode == 2
    assert done.stderr.startswith("kafka.sh: no tool 'topcs'; there are: acls broker-api-versions ")
