"""The files around the scripts: they exist, agree with each other, and say how they are used."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import local_stack
import pytest
from dotenv import dotenv_values

import kafka_consumer
import kafka_producer
from config import Settings

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = dotenv_values(ROOT / ".env.example", interpolate=False)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SOURCED = {ROOT / "infra" / "secure_kafka.sh"}  # by setup_kafka.sh
SHELL_SCRIPTS = sorted({*ROOT.glob("infra/*.sh"), *ROOT.glob("tests/*.sh")} - SOURCED)
INSTALLED = [
    *("setup_kafka.sh", "secure_kafka.sh", "openssl.cnf", "server.properties", "log4j.properties"),
    *("zookeeper.properties", "zookeeper.service", "kafka.service", "kafka-s3@.service"),
]


def tracked() -> set[str]:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    return set(subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines())


@pytest.mark.parametrize("script", ["audit.py", "report.py", "local_stack.py"])
def test_without_the_packages_a_script_says_so_in_one_line(script: str) -> None:
    command = [sys.executable, "-S", "-E", ROOT / "infra" / script]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("packages are missing (dotenv, kafka, pandas, s3fs): ")


def test_the_top_level_holds_what_people_look_for_and_nothing_else() -> None:
    assert {name.partition("/")[0] for name in tracked()} == {
        *("README.md", "LICENSE", "pyproject.toml", "requirements.txt"),
        *(".env.example", ".gitignore", ".ci"),
        *("config.py", "kafka_producer.py", "kafka_consumer.py", "infra", "tests"),
    }


@pytest.mark.parametrize("name", [".env", "key.pem", "indexProcessed.csv", ".venv/x", ".local/x"])
def test_git_ignores_secrets_and_what_is_fetched(name: str) -> None:
    assert name not in tracked()
    assert subprocess.run(["git", "check-ignore", "-q", name], cwd=ROOT).returncode == 0


def test_env_example_has_every_setting_and_each_is_valid() -> None:
    settings = {field.name.upper() for field in fields(Settings)}
    aws = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"}
    assert set(EXAMPLE) == settings | aws
    values = {name: value or "" for name, value in EXAMPLE.items()}
    for needed in (kafka_producer.csv_exists, kafka_consumer.bucket_is_set):
        Settings.from_env(values, needed)


def test_env_example_gives_the_defaults_but_where_the_local_stack_differs() -> None:
    differing = {"KAFKA_AUTO_OFFSET_RESET", "CSV_PATH", "S3_BUCKET", "S3_ENDPOINT_URL"}
    for field in fields(Settings):
        if field.name.upper() not in differing:
            assert EXAMPLE[field.name.upper()] == field.metadata["default"], field.name


def test_env_example_names_the_addresses_of_the_local_stack() -> None:
    options = local_stack.parser().parse_args([])
    assert EXAMPLE["KAFKA_BOOTSTRAP_SERVERS"] == f"localhost:{options.port}"
    assert EXAMPLE["S3_ENDPOINT_URL"] == f"http://localhost:{options.s3_port}"


def test_env_example_marks_the_three_lines_to_change() -> None:
    lines = (ROOT / ".env.example").read_text().splitlines()
    marked = [lines[n + 1].partition("=")[0] for n, line in enumerate(lines) if "# CHANGE" in line]
    assert marked == ["KAFKA_BOOTSTRAP_SERVERS", "S3_BUCKET", "S3_ENDPOINT_URL"]


def test_the_four_dependencies_are_pinned_and_the_same_in_both_files() -> None:
    required = (ROOT / "requirements.txt").read_text().split()
    assert required == PROJECT["dependencies"]
    assert [
        name for name, _, version in (line.partition("==") for line in required) if version
    ] == [
        *("kafka-python-ng", "pandas", "python-dotenv", "s3fs"),
    ]


@pytest.mark.parametrize("script", SHELL_SCRIPTS, ids=lambda path: path.name)
def test_a_shell_script_can_be_run_and_says_how_it_is_used(script: Path) -> None:
    assert os.access(script, os.X_OK)
    done = subprocess.run([script, "--help"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.match(rf"Usage: (\S+/)?{script.name}\b", done.stdout)


@pytest.mark.parametrize("script", ["infra/demo.sh", "infra/venv.sh", "infra/setup_kafka.sh"])
def test_a_shell_script_refuses_an_unknown_flag(script: str) -> None:
    done = subprocess.run([ROOT / script, "--what"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "--what" in done.stderr or "Usage:" in done.stderr


def bash(script: str, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "-c", script, "bash", *args]
    environ = os.environ | env
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)


def functions(script: str, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs a script that has the functions of setup_kafka.sh, which itself does nothing."""
    return bash(f"source infra/setup_kafka.sh; {script}", *args, **env)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--check --uninstall", "--check and --uninstall"),
        ("--check --user-data", "--check and --user-data"),
        ("--user-data --uninstall --purge", "--user-data and --uninstall"),
        ("--user-data --purge", "--purge goes with"),
        ("--public-address --help", "--public-address needs a value"),
        ("--user-data --public-address --secure", "--public-address needs a value"),
        ("--public-address 0", "--public-address '0'"),
        ("--private-address 10.0.0.256", "--private-address '10.0.0.256'"),
        ("--public-address 0.0.0.0", "--public-address '0.0.0.0'"),
        ("--zookeeper-connect 10.0.0.1:0", "--zookeeper-connect '10.0.0.1:0'"),
        ("--zookeeper-connect a:2181,b:65536", "--zookeeper-connect 'a:2181,b:65536'"),
    ],
)
def test_setup_refuses_options_that_cannot_be_right(options: str, said: str) -> None:
    done = functions('parse "$@"', *options.split())
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
    assert functions('parse "$@"', "--public-address", "").returncode == 2


@pytest.mark.parametrize(
    "options",
    [
        "--user-data --secure --public-address kafka.example.com --private-address auto",
        "--check --public-address 203.0.113.99",
        "--uninstall --purge",
        "--zookeeper-connect 10.0.0.11:2181,ip-10-0-0-12.ec2.internal:65535",
    ],
)
def test_setup_accepts_options_that_go_together(options: str) -> None:
    done = functions('parse "$@"', *options.split())
    assert (done.returncode, done.stderr) == (0, "")


def test_setup_does_not_depend_on_the_path_or_cdpath_of_who_calls_it() -> None:
    done = functions('echo "$HERE"; echo "$PATH"', CDPATH=".", PATH="/usr/bin:/bin")
    here, path = done.stdout.splitlines()
    assert here == str(ROOT / "infra")
    assert {"/usr/sbin", "/sbin"} <= set(path.split(":"))


def test_setup_refuses_a_private_address_of_another_machine() -> None:
    check = "PUBLIC=auto PRIVATE=192.0.2.9 ZOOKEEPER=''; ip() { echo \"$1\"; }; check_names"
    done = functions(check.replace("$1", "192.0.2.9 via 10.0.0.1"))
    assert done.returncode == 1 and "'192.0.2.9' is not this machine's" in done.stderr
    assert functions(check.replace("$1", "local 192.0.2.9 dev lo")).returncode == 0


def test_setup_names_the_program_that_has_its_port() -> None:
    line = 'LISTEN 0 50 127.0.0.1:2181 0.0.0.0:* users:(("nc",pid=77,fd=3))'
    taken = f"ss() {{ echo '{line}'; }}; systemctl() {{ echo %s; }}; refuse_taken zookeeper"
    done = functions(taken % 0)
    assert done.returncode == 1 and "port 2181 is taken by nc (process 77)" in done.stderr
    assert functions(taken % 77).returncode == 0, "its own"


@pytest.fixture
def setup_in(tmp_path: Path) -> Iterator[str]:
    """A script's beginning: the functions, with folders and stand-ins of the test's own."""
    shutil.copytree(ROOT / "infra", tmp_path / "infra", ignore=shutil.ignore_patterns("__py*"))
    for name in ("setup_kafka.sh", "secure_kafka.sh"):
        file = tmp_path / "infra" / name
        file.write_text(
            re.sub(r"/(etc|opt|var/lib|usr/local)/", rf"{tmp_path}/\1/", file.read_text())
        )
    for name in ("etc/kafka/secure", "opt/kafka/bin"):
        (tmp_path / name).mkdir(parents=True)
    yield (
        f"source {tmp_path}/infra/setup_kafka.sh; need_files; PURGE='' TLS='' ZOOKEEPER='';"
        "PUBLIC_ADDRESS=203.0.113.1 PRIVATE_ADDRESS=10.0.0.1 BROKER_ID=0;"
        'systemctl() { :; }; id() { false; }; chown() { :; }; install() { mkdir -p "${@: -1}"; };'
    )


@pytest.mark.parametrize(
    ("breakage", "said"),
    [
        ("echo junk >$SECURE/ca.pem", "ca.pem is no certificate"),
        ("rm $SECURE/ca.key", "ca.key is missing"),
    ],
)
def test_broken_authority_is_named_and_not_published(
    setup_in: str, breakage: str, said: str
) -> None:
    script = f"{setup_in} make_certificates >/dev/null; cp $CONF/ca.pem $CONF/before;"
    script += f"rm $SECURE/broker.pem; {breakage}; (make_certificates) || echo failed;"
    done = bash(script + "cmp $CONF/ca.pem $CONF/before && echo same")
    assert done.stdout.split() == ["failed", "same"], done.stderr
    assert said in done.stderr and done.stderr.count("\n") == 1


def test_check_of_a_hanging_broker_says_nothing_that_was_not_seen(setup_in: str) -> None:
    script = (
        f"{setup_in} touch $CURRENT/bin/kafka-topics.sh; chmod +x $CURRENT/bin/*; mkdir -p $DATA;"
    )
    script += "know_addresses() { :; }; check_services() { :; }; reachable() { true; };"
    script += "find() { :; }; topics() { false; }; zookeeper() { false; }; check"
    done = bash(script)
    assert done.returncode == 1
    assert re.findall("FAIL  ([^:]*)", done.stdout) == ["the broker answers"]
    assert "copies" not in done.stdout


def test_uninstall_says_that_data_is_left_only_where_it_is(setup_in: str) -> None:
    assert "still" not in bash(f"{setup_in} uninstall").stdout
    assert "still" in bash(f"{setup_in} mkdir -p $DATA; uninstall").stdout


@pytest.mark.parametrize("name", INSTALLED)
def test_what_is_installed_has_no_line_over_100_columns(name: str) -> None:
    lines = (ROOT / "infra" / name).read_text().splitlines()
    assert max(map(len, lines)) <= 100


def test_data_excerpt_is_rows_of_numbers() -> None:
    header, *rows = (ROOT / "tests" / "data" / "indexProcessed.csv").read_text().splitlines()
    assert header == "Index,Date,Open,High,Low,Close,Adj Close,Volume,CloseUSD"
    assert len(rows) == 492
    assert all(re.fullmatch(r"HSI,200[89]-\d\d-\d\d(,\d+\.\d+){7}", row) for row in rows)


@pytest.mark.slow
def test_pip_install_brings_the_three_modules_and_their_dependencies(tmp_path: Path) -> None:
    for name in tracked():
        if "/" not in name:
            shutil.copy(ROOT / name, tmp_path / name)
    target = tmp_path / "installed"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, tmp_path],
        check=True,
    )
    assert {path.name for path in target.glob("*.py")} == {
        *("config.py", "kafka_consumer.py", "kafka_producer.py"),
    }
    (metadata,) = target.glob("*.dist-info/METADATA")
    found = re.findall(r"^Requires-Dist: ([^;\n]+)$", metadata.read_text(), re.MULTILINE)
    assert found == PROJECT["dependencies"]
